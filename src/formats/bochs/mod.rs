//! bochs: Bochs' growing disk, versions 1 and 2; read-only.
//!
//! Its redologs of other kinds lie over a base file that they do not name: they are refused.
//!
//! One lock, over the tables; it is never held while guest data moves.

mod check;
mod layout;

use std::sync::Mutex;

use zerocopy::FromBytes;

use self::layout::{ENTRY_BYTES, GROWING, HEADER_BYTES, Header, MAGIC, NO_EXTENT, REDOLOG, SECTOR, V1, V2};
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    BlockDriver, Check, Child, Error, Extent, ExtentKind, FileEnd, Format, GuestOffset, HostPlace, OpenRequest, Result,
};
use crate::formats::table::TableCache;

/// The format.
#[derive(Debug)]
pub struct Bochs;

/// The most entries of a catalog, and the largest extent.
const MOST_ENTRIES: u32 = 1 << 20;
const LARGEST_EXTENT: u32 = 8 << 20;
/// Memory for tables.
const CACHE: usize = 1 << 20;

impl Format for Bochs {
    fn name(&self) -> &'static str {
        "bochs"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        let kind = head.get(32..).unwrap_or_default();
        if head.starts_with(MAGIC) && kind.starts_with(REDOLOG) { 100 } else { 0 }
    }

    fn writable(&self) -> bool {
        false
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let file = request.file;
        let mut head = [0; HEADER_BYTES];
        file.storage.read_at(0, &mut head).context("Could not read the header of the Bochs image")?;
        let header = Header::read_from_bytes(&head).map_err(|_| Error::corrupt("a header of another size"))?;
        let (version, extent) = (header.version.get(), header.extent.get());
        let known = header.magic.starts_with(MAGIC) && header.kind.starts_with(REDOLOG);
        if !known || !matches!(version, V1 | V2) {
            return Err(Error::corrupt("Image not in Bochs format"));
        }
        if !header.subtype.starts_with(GROWING) {
            let subtype = header.subtype.split(|byte| *byte == 0).next().unwrap_or_default().escape_ascii();
            return Err(Error::unsupported(format!(
                "A Bochs redolog of type '{subtype}' is not supported: commit it to its base file, with bximage"
            )));
        }
        if header.entries.get() > MOST_ENTRIES {
            return Err(Error::corrupt("Catalog size is too large"));
        }
        if u64::from(extent) < SECTOR {
            return Err(Error::corrupt("Extent size must be at least 512"));
        }
        if !extent.is_power_of_two() {
            return Err(Error::corrupt(format!("Extent size {extent} is not a power of two")));
        }
        if extent > LARGEST_EXTENT {
            return Err(Error::corrupt(format!("Extent size {extent} is too large")));
        }
        let (entries, extent) = (u64::from(header.entries.get()), u64::from(extent));
        // A sector that is there in part alone is none.
        let size = header.size() / SECTOR * SECTOR;
        if size.div_ceil(extent) > entries {
            return Err(Error::corrupt("Catalog size is too small for this disk size"));
        }
        let bitmap = u64::from(header.bitmap.get());
        if bitmap.saturating_mul(8) < extent / SECTOR {
            return Err(Error::corrupt(format!("Bitmaps of {bitmap} bytes are too small for extents of {extent}")));
        }
        let catalog = u64::from(header.header_bytes.get());
        FileEnd::default().require(&*file.storage, "the catalog", catalog, size.div_ceil(extent) * ENTRY_BYTES)?;
        Ok(Box::new(BochsDriver {
            size,
            catalog,
            extents: catalog + entries * ENTRY_BYTES,
            bitmap: bitmap.next_multiple_of(SECTOR),
            extent,
            tables: Mutex::new(TableCache::new(CACHE, &file.name, "catalog")),
            end: FileEnd::default(),
            files: [file],
        }))
    }
}

#[derive(Debug)]
struct BochsDriver {
    files: [Child; 1],
    size: u64,
    /// Where the catalog starts, and where the extents do.
    catalog: u64,
    extents: u64,
    /// Bytes of an extent's bitmap, and of its sectors.
    bitmap: u64,
    extent: u64,
    tables: Mutex<TableCache>,
    end: FileEnd,
}

impl BochsDriver {
    /// Where the extent with that index starts, if it is there.
    fn extent_at(&self, tables: &mut TableCache, index: u64) -> Result<Option<u64>> {
        let mut entry = [0; 4];
        tables.read(&*self.files[0].storage, self.catalog + index * ENTRY_BYTES, &mut entry)?;
        let entry = u32::from_le_bytes(entry);
        let stride = self.bitmap + self.extent;
        Ok((entry != NO_EXTENT).then(|| self.extents + u64::from(entry) * stride))
    }
}

impl BlockDriver for BochsDriver {
    fn format(&self) -> &'static str {
        Bochs.name()
    }

    fn virtual_size(&self) -> u64 {
        self.size
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let offset = at.get();
        let max = max.min(self.size.saturating_sub(offset));
        let (index, within) = (offset / self.extent, offset % self.extent);
        let mut tables = self.tables.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(start) = self.extent_at(&mut tables, index)? {
            let end = self.extent.min(within + max).div_ceil(SECTOR);
            let storage = &*self.files[0].storage;
            self.end.require(storage, "the bitmap of an extent", start, self.bitmap)?;
            let (there, count) = tables.bit_run(storage, start, within / SECTOR, end - within / SECTOR)?;
            let kind = match there {
                true => ExtentKind::Data(HostPlace::main(start + self.bitmap + within)),
                false => ExtentKind::Zero(None),
            };
            return Ok(Extent { start: at, len: max.min((within / SECTOR + count) * SECTOR - within), kind });
        }
        let mut next = index + 1;
        while next * self.extent < offset + max && self.extent_at(&mut tables, next)?.is_none() {
            next += 1;
        }
        Ok(Extent { start: at, len: max.min(next * self.extent - offset), kind: ExtentKind::Zero(None) })
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::default())
    }
}
