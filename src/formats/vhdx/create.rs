//! New VHDX images: identifier, headers, log, BAT, metadata and a gap, as the reference lays them out.

use zerocopy::IntoBytes;

use super::Vhdx;
use super::layout::{
    BAT, BlockState, ENTRY, FILE_PARAMETERS, FileIdentifier, Guid, HEADERS, Header, IS_REQUIRED, IS_VIRTUAL_DISK,
    LEAVE_BLOCKS_ALLOCATED, LOGICAL_SECTOR, MAX_BLOCK, MAX_SIZE, METADATA, MIB, MIN_BLOCK, MetadataEntry,
    MetadataTableHeader, PHYSICAL_SECTOR, REGION_TABLES, SIGNATURE, TABLE, VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE,
};
use super::regions::{Region, RegionTable, Shape};
use crate::block::error::Context;
use crate::block::measure::Measure;
use crate::block::{Create, CreateOptions, CreateRequest, Error, OptionKind, OptionSpec, Result};
use crate::storage::{Preallocation, Storage, Zeroing};

/// In the order of the `Formatting` line.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size; max of 64TB."),
    OptionSpec::new("log_size", OptionKind::Size, "Log size; min 1MB.").or("1048576"),
    OptionSpec::new(
        "block_size",
        OptionKind::Size,
        "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
    )
    .or("0"),
    OptionSpec::new(
        "subformat",
        OptionKind::Text,
        "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
    )
    .among(&["dynamic", "fixed"]),
    OptionSpec::new(
        "block_state_zero",
        OptionKind::Switch,
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using \
         'qemu-img convert' with subformat=dynamic.",
    ),
    OptionSpec::new(
        "logical_sector_size",
        OptionKind::Size,
        "Bytes of a sector as the guest sees it: 512 (default) or 4096",
    )
    .among(&["512", "4096"])
    .own(),
];

/// Bytes between the metadata and the first block.
const GAP: u64 = 4 * MIB;
/// Where the log is.
const LOG: u64 = MIB;

/// A new image, decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewVhdx {
    /// What kind of disk.
    pub shape: Shape,
    log: u64,
    /// Whether blocks that are not there are said to be zeros.
    zero: bool,
}

impl NewVhdx {
    /// Every check that needs no file.
    pub fn decide(options: &CreateOptions, size: u64) -> Result<Self> {
        if size > MAX_SIZE {
            return Err(Error::unsupported("Image size too large; max of 64TB"));
        }
        let log = options.number("log_size").unwrap_or(MIB);
        if log == 0 {
            return Err(Error::invalid("Log size must be a multiple of 1 MB"));
        }
        let log = log.checked_next_multiple_of(MIB).filter(|log| *log <= u64::from(u32::MAX));
        let log = log.ok_or_else(|| Error::invalid("Log size must be smaller than 4 GB"))?;
        let fixed = match options.text("subformat") {
            None | Some("dynamic") => false,
            Some("fixed") => true,
            Some(other) => {
                return Err(Error::invalid(format!("Parameter 'subformat' does not accept value '{other}'")));
            }
        };
        let block = match options.number("block_size").unwrap_or(0) {
            0 => suitable_block(size),
            block => block.checked_next_multiple_of(MIB).unwrap_or(u64::MAX).min(MAX_BLOCK),
        };
        if !block.is_power_of_two() {
            return Err(Error::invalid("Block size must be a power of two"));
        }
        let sector = options.number("logical_sector_size").unwrap_or(512);
        if !matches!(sector, 512 | 4096) {
            return Err(Error::invalid("'logical_sector_size' must be 512 or 4096"));
        }
        let zero = options.given("block_state_zero").is_none() || options.switch("block_state_zero");
        let shape = Shape { size: size.next_multiple_of(sector), block, sector, fixed, has_parent: false };
        let new = Self { shape, log, zero };
        // The reference cannot write, nor open, such a table of an empty disk.
        if new.bat().length > i32::MAX as u64 {
            return Err(Error::invalid("An empty disk cannot have blocks so large: its table would take 2 GiB"));
        }
        Ok(new)
    }

    fn bat(&self) -> Region {
        let length = match self.shape.size {
            // The reference counts the entries of an empty disk below none, and opens it only with all of those.
            0 => (u64::from(u32::MAX) / self.shape.chunk() * ENTRY).next_multiple_of(MIB),
            _ => self.shape.bat_bytes(),
        };
        Region { offset: LOG + self.log, length }
    }

    fn metadata(&self) -> Region {
        Region { offset: self.bat().run().1, length: MIB }
    }

    /// Where the blocks start: the file's end as long as it has none.
    pub fn start(&self) -> u64 {
        self.metadata().run().1 + GAP
    }

    /// The file's end once it has all blocks.
    pub fn end(&self) -> u64 {
        self.start() + self.shape.blocks() * self.shape.block
    }
}

/// The block size for a disk: the reference's choice.
fn suitable_block(size: u64) -> u64 {
    const SIZES: [(u64, u64); 3] = [(32 << 40, 64), (100 << 30, 32), (1 << 30, 16)];
    SIZES.iter().find(|(above, _)| size > *above).map_or(8, |(_, block)| *block) * MIB
}

const _: () = assert!(MIN_BLOCK == MIB);

impl Create for Vhdx {
    fn grows(&self, options: &CreateOptions) -> bool {
        options.text("subformat") != Some("fixed")
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn measuring(&self) -> Option<&dyn Measure> {
        Some(self)
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        let new = NewVhdx::decide(request.options, request.size)?;
        let fill = request.options.text("preallocation").and_then(Preallocation::parse).unwrap_or_default();
        let id = |purpose| Guid::new(u128::from_be_bytes(request.ids.uuid(purpose)));
        let file = request.files.main()?;
        let file = &*file;
        if !file.facts().new_reads_zero {
            let end = if new.shape.fixed { new.end() } else { new.start() };
            file.zero(0, end, Zeroing::Punch).context("Could not clear the device")?;
        }
        if new.shape.fixed {
            file.set_len(new.start(), Preallocation::Off).context("Could not resize file")?;
            file.set_len(new.end(), fill).context("Could not resize file")?;
        } else {
            file.set_len(new.start(), Preallocation::Off).context("Could not resize file")?;
        }
        write_bat(file, &new)?;
        let writing = "Could not write the VHDX metadata";
        let (table, items) = metadata(&new, id("disk"));
        file.write_at(new.metadata().offset, &table).context(writing)?;
        file.write_at(new.metadata().offset + TABLE as u64, &items).context(writing)?;
        let table = RegionTable::new(&[(BAT, new.bat()), (METADATA, new.metadata())]);
        for at in REGION_TABLES {
            file.write_at(at, table.bytes()).context("Could not write the VHDX region table")?;
        }
        let (written, data) = (id("file"), id("data"));
        for (n, at) in (0..).zip(HEADERS) {
            let log = u32::try_from(new.log).map_err(|_| Error::invalid("Log size must be smaller than 4 GB"))?;
            let header = Header::new(n, written, data, (LOG, log));
            file.write_at(at, header.as_bytes()).context("Could not write the VHDX header")?;
        }
        file.write_at(0, identifier().as_bytes()).context("Could not write the VHDX header")
    }
}

fn identifier() -> FileIdentifier {
    let mut creator = [0.into(); 256];
    let text = concat!("vimg ", env!("CARGO_PKG_VERSION"));
    for (place, unit) in creator.iter_mut().zip(text.encode_utf16()) {
        *place = unit.into();
    }
    FileIdentifier { signature: *SIGNATURE, creator }
}

fn write_bat(file: &dyn Storage, new: &NewVhdx) -> Result<()> {
    let shape = &new.shape;
    if !shape.fixed && !new.zero {
        // A file begins as zeros: no block is present.
        return Ok(());
    }
    let (chunk, first, unit) = (shape.chunk(), new.start() / MIB, shape.block / MIB);
    let entry = |block: u64| match shape.fixed {
        true => BlockState::Full(first + block * unit).entry(),
        false => BlockState::Zero.entry(),
    };
    const AT_ONCE: u64 = 1 << 16;
    let entries = shape.entries();
    let mut index = 0;
    while index < entries {
        let last = entries.min(index + AT_ONCE);
        let is_bitmap = |index: u64| index % (chunk + 1) == chunk;
        let bytes: Vec<u8> = (index..last)
            .flat_map(|n| if is_bitmap(n) { 0 } else { entry(n - n / (chunk + 1)) }.to_le_bytes())
            .collect();
        file.write_at(new.bat().offset + index * ENTRY, &bytes).context("Could not write the VHDX BAT")?;
        index = last;
    }
    Ok(())
}

/// The table of the metadata region, and the items that lie behind it.
fn metadata(new: &NewVhdx, disk: Guid) -> (Vec<u8>, Vec<u8>) {
    let shape = &new.shape;
    let flags = if shape.fixed { LEAVE_BLOCKS_ALLOCATED } else { 0 };
    let parameters = u64::from(flags) << 32 | shape.block;
    let sector = u32::try_from(shape.sector).unwrap_or(512).to_le_bytes();
    let values: [(Guid, u32, &[u8]); 5] = [
        (FILE_PARAMETERS, IS_REQUIRED, &parameters.to_le_bytes()),
        (VIRTUAL_DISK_SIZE, IS_REQUIRED | IS_VIRTUAL_DISK, &shape.size.to_le_bytes()),
        (VIRTUAL_DISK_ID, IS_REQUIRED | IS_VIRTUAL_DISK, &disk.0),
        (LOGICAL_SECTOR, IS_REQUIRED | IS_VIRTUAL_DISK, &sector),
        (PHYSICAL_SECTOR, IS_REQUIRED | IS_VIRTUAL_DISK, &sector),
    ];
    let header =
        MetadataTableHeader { signature: *b"metadata", reserved: 0.into(), count: 5.into(), more_reserved: [0; 20] };
    let (mut table, mut items) = (header.as_bytes().to_vec(), Vec::new());
    for (item, flags, value) in values {
        let (offset, length) = (TABLE + items.len(), value.len());
        let narrow = |n: usize| u32::try_from(n).unwrap_or(0).into();
        let entry = MetadataEntry {
            item,
            offset: narrow(offset),
            length: narrow(length),
            flags: flags.into(),
            reserved: 0.into(),
        };
        table.extend(entry.as_bytes());
        items.extend(value);
    }
    (table, items)
}
