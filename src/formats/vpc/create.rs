//! New VHD images.

use super::Vpc;
use super::geometry::ChsGeometry;
use super::layout::{BLOCK_SIZE, DynamicHeader, FOOTER_BYTES, Footer, MAX_SIZE, SECTOR, TABLE_OFFSET};
use crate::block::error::Context;
use crate::block::measure::Measure;
use crate::block::{Create, CreateOptions, CreateRequest, Error, ErrorKind, FileOrder, OptionKind, OptionSpec, Result};
use crate::storage::{Preallocation, Storage, Zeroing};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new(
        "subformat",
        OptionKind::Text,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    )
    .among(&["dynamic", "fixed"]),
    OptionSpec::new(
        "force_size",
        OptionKind::Switch,
        "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based calculation",
    ),
];

/// What the footer of a disk shall say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VpcShape {
    /// The size in bytes.
    pub size: u64,
    /// The geometry.
    pub geometry: ChsGeometry,
    /// The program that made it: it tells which of the two is the size.
    pub creator: [u8; 4],
}

impl VpcShape {
    /// A new disk of at least `size` bytes: exactly that many if `exact`, else a whole number of cylinders
    /// where these can count it.
    fn new(size: u64, exact: bool) -> Option<Self> {
        let sectors = size.div_ceil(SECTOR);
        if sectors > MAX_SIZE / SECTOR {
            return None;
        }
        if exact {
            return Some(Self { size: sectors * SECTOR, geometry: ChsGeometry::MAX, creator: *b"qem2" });
        }
        let geometry = ChsGeometry::at_least(sectors);
        let sectors = if geometry == ChsGeometry::MAX { sectors } else { geometry.count() };
        Some(Self { size: sectors * SECTOR, geometry, creator: *b"qemu" })
    }
}

fn too_large() -> Error {
    Error::new(ErrorKind::TooLarge, "Disk size is too large, max size is 2040 GiB")
}

/// A new disk, decided.
pub struct NewVpc {
    /// Whether it is a fixed one.
    pub fixed: bool,
    /// What its footer says.
    pub shape: VpcShape,
}

impl NewVpc {
    /// Every check that needs no file.
    pub fn decide(options: &CreateOptions, size: u64) -> Result<Self> {
        let fixed = match options.text("subformat") {
            None | Some("dynamic") => false,
            Some("fixed") => true,
            Some(other) => {
                return Err(Error::invalid(format!("Parameter 'subformat' does not accept value '{other}'")));
            }
        };
        let shape = VpcShape::new(size, options.switch("force_size")).ok_or_else(too_large)?;
        Ok(Self { fixed, shape })
    }
}

impl Create for Vpc {
    fn grows(&self, options: &CreateOptions) -> bool {
        options.text("subformat") != Some("fixed")
    }

    fn file_order(&self, options: &CreateOptions) -> FileOrder {
        if self.grows(options) { FileOrder::Planned } else { FileOrder::Laid }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn measuring(&self) -> Option<&dyn Measure> {
        Some(self)
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        let NewVpc { fixed, shape } = NewVpc::decide(request.options, request.size)?;
        let fill = request.options.text("preallocation").and_then(Preallocation::parse).unwrap_or_default();
        let (seconds, uuid) = (request.ids.seconds(), request.ids.uuid("image"));
        let footer = Footer::new(shape.size, shape.geometry, fixed, &shape.creator, seconds, uuid);
        let file = request.files.main()?;
        if fixed {
            create_fixed(&*file, shape.size, &footer, fill)
        } else {
            create_dynamic(&*file, shape.size, &footer)
        }
    }
}

fn create_fixed(file: &dyn Storage, size: u64, footer: &Footer, fill: Preallocation) -> Result<()> {
    let end = size + FOOTER_BYTES as u64;
    file.set_len(end, fill).context("Could not resize file")?;
    if !file.facts().new_reads_zero && size > 0 {
        file.zero(0, size, Zeroing::Punch).context("Could not clear the device")?;
    }
    // On a device it goes to the device's end, where readers look for it.
    let at = file.len().context("Could not get the size of the file")?.max(end) - FOOTER_BYTES as u64;
    file.write_at(at, footer.bytes()).context("Could not write the VHD footer")
}

/// Blocks of a dynamic disk, and bytes of its file as long as it has none of them.
pub fn dynamic_bytes(size: u64) -> Result<(u32, u64)> {
    let entries = u32::try_from(size.div_ceil(u64::from(BLOCK_SIZE))).map_err(|_| too_large())?;
    let table = (u64::from(entries) * 4).next_multiple_of(SECTOR);
    Ok((entries, TABLE_OFFSET + table + FOOTER_BYTES as u64))
}

fn create_dynamic(file: &dyn Storage, size: u64, footer: &Footer) -> Result<()> {
    let (entries, end) = dynamic_bytes(size)?;
    let table = end - TABLE_OFFSET - FOOTER_BYTES as u64;
    let mut bytes = footer.bytes().to_vec();
    bytes.extend(DynamicHeader::new(entries).bytes());
    bytes.resize(bytes.len() + usize::try_from(table).unwrap_or(0), 0xff);
    bytes.extend(footer.bytes());
    debug_assert_eq!(bytes.len() as u64, end);
    file.write_at(0, &bytes).context("Could not write the VHD headers")
}
