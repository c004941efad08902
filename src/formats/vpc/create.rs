//! New VHD images.

use super::Vpc;
use super::geometry::ChsGeometry;
use super::layout::{BLOCK_SIZE, DynamicHeader, FOOTER_BYTES, Footer, MAX_SIZE, SECTOR, TABLE_OFFSET};
use crate::block::error::Context;
use crate::block::{Create, CreateRequest, Error, ErrorKind, OptionKind, OptionSpec, Result};
use crate::storage::{Preallocation, Storage, Zeroing};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new(
        "subformat",
        OptionKind::Text,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
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

impl Create for Vpc {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        let fixed = match request.options.text("subformat") {
            None | Some("dynamic") => false,
            Some("fixed") => true,
            Some(other) => {
                return Err(Error::invalid(format!("Parameter 'subformat' does not accept value '{other}'")));
            }
        };
        let shape = VpcShape::new(request.size, request.options.switch("force_size"))
            .ok_or_else(|| Error::new(ErrorKind::TooLarge, "Disk size is too large, max size is 2040 GiB"))?;
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

fn create_dynamic(file: &dyn Storage, size: u64, footer: &Footer) -> Result<()> {
    let entries = u32::try_from(size.div_ceil(u64::from(BLOCK_SIZE)));
    let entries =
        entries.map_err(|_| Error::new(ErrorKind::TooLarge, "Disk size is too large, max size is 2040 GiB"))?;
    let table = (u64::from(entries) * 4).next_multiple_of(SECTOR);
    let mut bytes = footer.bytes().to_vec();
    bytes.extend(DynamicHeader::new(entries).bytes());
    bytes.resize(bytes.len() + usize::try_from(table).unwrap_or(0), 0xff);
    bytes.extend(footer.bytes());
    debug_assert_eq!(bytes.len() as u64, TABLE_OFFSET + table + FOOTER_BYTES as u64);
    file.write_at(0, &bytes).context("Could not write the VHD headers")
}
