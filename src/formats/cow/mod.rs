//! cow: User-mode Linux' copy-on-write file, versions 2 and 3; read-only.
//!
//! It lies over a raw file, whose length and time of change it keeps: over any other it would be a mixture of two disks.
//!
//! One lock, over the bitmap; it is never held while guest data moves.

mod check;
mod layout;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;

use zerocopy::FromBytes;

use self::layout::{HEADER_BYTES, HeaderV2, HeaderV3, MAGIC, VERSION_AT};
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    BackingRef, BlockDriver, Check, Child, Error, Extent, ExtentKind, FileEnd, Format, GuestOffset, HostPlace,
    OpenRequest, Result,
};
use crate::formats::table::TableCache;
use crate::storage;

/// The format.
#[derive(Debug)]
pub struct Cow;

/// The largest unit for which one bit stands, and the largest alignment.
const LARGEST: u64 = 1 << 20;
/// Memory for the bitmap.
const CACHE: usize = 1 << 20;

impl Format for Cow {
    fn name(&self) -> &'static str {
        "cow"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        let version = head.get(VERSION_AT..VERSION_AT + 4);
        if head.starts_with(MAGIC) && matches!(version, Some([0, 0, 0, 1..=3])) { 100 } else { 0 }
    }

    fn writable(&self) -> bool {
        false
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let file = request.file;
        let layout = CowLayout::read(&file)?;
        let bitmap_end = layout.bitmap + layout.bits.div_ceil(8);
        FileEnd::default().require(&*file.storage, "the bitmap", layout.bitmap, bitmap_end - layout.bitmap)?;
        let tables = Mutex::new(TableCache::new(CACHE, &file.name, "bitmap"));
        Ok(Box::new(CowDriver { files: [file], layout, tables }))
    }

    fn layered(&self) -> bool {
        true
    }
}

/// What the header says, and what comes of it.
#[derive(Debug)]
struct CowLayout {
    backing: Option<BackingRef>,
    /// When the backing file was last written to: the lower 32 bits of it.
    time: u32,
    /// Bytes of the disk.
    size: u64,
    /// Bytes for which one bit stands.
    sector: u64,
    /// Where the bitmap starts, how many bits it has, and where the disk's first sector is.
    bitmap: u64,
    bits: u64,
    data: u64,
}

impl CowLayout {
    fn read(file: &Child) -> Result<Self> {
        let mut head = [0; HEADER_BYTES];
        file.storage.read_at(0, &mut head).context("Could not read the header of the COW file")?;
        if !head.starts_with(MAGIC) {
            return Err(Error::corrupt("Image not in cow format"));
        }
        let other = || Error::corrupt("a header of another size");
        let v3 = HeaderV3::read_from_bytes(&head).map_err(|_| other())?;
        let (v2, _) = HeaderV2::read_from_prefix(&head).map_err(|_| other())?;
        let (size, sector, alignment, name, time) = match v3.version.get() {
            2 => (v2.size.get(), v2.sector.get(), v2.sector.get(), v2.backing, v2.time.get()),
            3 => (v3.size.get(), v3.sector.get(), v3.alignment.get(), v3.backing, v3.time.get()),
            version => return Err(Error::unsupported(format!("COW files of version {version} are not supported"))),
        };
        let (sector, alignment) = (u64::from(sector), u64::from(alignment));
        if sector % 512 != 0 || !(1..=LARGEST).contains(&sector) {
            return Err(Error::corrupt(format!("The sector size {sector} is not a multiple of 512 up to 1 MiB")));
        }
        if !(1..=LARGEST).contains(&alignment) {
            return Err(Error::corrupt(format!("The alignment {alignment} is not a number up to 1 MiB")));
        }
        if size > i64::MAX.unsigned_abs() / 2 {
            return Err(Error::corrupt(format!("The size {size} is more than a disk can have")));
        }
        let sectors = size.div_ceil(sector);
        let (bitmap, bits) = match v3.version.get() {
            2 => (size_of::<HeaderV2>() as u64, sectors / 8 * 8),
            _ => ((HEADER_BYTES as u64).next_multiple_of(alignment), sectors),
        };
        let data = (bitmap + bits.div_ceil(8)).next_multiple_of(alignment);
        // Bits that version 2 leaves out may lie before the data: its own tools look there. Without one, a sector is the base's.
        let bits = sectors.min((data - bitmap) * 8);
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let backing = (!name.is_empty()).then(|| BackingRef {
            name: OsString::from_vec(name.to_vec()),
            format: Some("raw".to_owned()),
            elsewhere: Vec::new(),
        });
        Ok(Self { backing, time, size, sector, bitmap, bits, data })
    }
}

#[derive(Debug)]
struct CowDriver {
    files: [Child; 1],
    layout: CowLayout,
    tables: Mutex<TableCache>,
}

impl BlockDriver for CowDriver {
    fn format(&self) -> &'static str {
        Cow.name()
    }

    fn virtual_size(&self) -> u64 {
        self.layout.size.next_multiple_of(512)
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let CowLayout { sector, bitmap, bits, data, .. } = self.layout;
        let max = max.min(self.virtual_size().saturating_sub(at.get()));
        let (first, within) = (at.get() / sector, at.get() % sector);
        let most = (within + max).div_ceil(sector);
        let mut tables = self.tables.lock().unwrap_or_else(|e| e.into_inner());
        let (there, count) = match bits.saturating_sub(first) {
            0 => (false, most),
            known => tables.bit_run(&*self.files[0].storage, bitmap, first, most.min(known))?,
        };
        let kind = match there {
            true => ExtentKind::Data(HostPlace::main(data.saturating_add(at.get()))),
            false => ExtentKind::Unallocated(None),
        };
        Ok(Extent { start: at, len: max.min(count * sector - within), kind })
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn backing(&self) -> Option<&BackingRef> {
        self.layout.backing.as_ref()
    }

    fn accept_backing(&self, below: &dyn BlockDriver) -> Result<()> {
        let CowLayout { size, time, .. } = self.layout;
        if below.virtual_size() != self.virtual_size() {
            let is = below.virtual_size();
            return Err(Error::corrupt(format!(
                "The backing file is not the one that this image was made on: its size is {is}, not {size}"
            )));
        }
        let Some(file) = below.files().first().and_then(|child| child.storage.host()) else { return Ok(()) };
        let meta = file.file().metadata().map_err(storage::Error::from);
        let meta = meta.context("Could not get the time of the backing file")?;
        // Version 3 keeps 32 bits of it too.
        if meta.is_file() && meta.mtime().rem_euclid(1 << 32) != i64::from(time) {
            let is = meta.mtime();
            return Err(Error::corrupt(format!(
                "The backing file has changed since this image was made: its time is {is}, not {time} (if it is a \
                 copy, give it the time that it had, with touch -d @{time})"
            )));
        }
        Ok(())
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::default())
    }
}
