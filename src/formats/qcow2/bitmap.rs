//! Persistent bitmaps: their directory, and their length when the disk's changes.
//!
//! Bitmaps are not changed in place: new tables and a new directory are written beside the old ones, and the header
//! that has the new size points to them.
//!
//! Source: specification, section "Bitmaps". The directory means something only while the autoclear bit is set.

use std::collections::HashSet;

use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::storage::Storage;

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::geometry::Geometry;
use super::header::{Qcow2Header, c_string};
use super::layout::{self, BITMAP_ENTRY, BitmapFields, BitmapsExtension, ENTRY, OFFSET_MASK};
use super::window::Window;

/// An entry of the bitmap directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// The fixed fields.
    pub fields: BitmapFields,
    /// Its name.
    pub name: String,
    /// The size of the disk that it is for.
    pub disk: u64,
}

/// Largest bitmap table that the reference takes, in entries.
const MAX_TABLE: u32 = 0x0800_0000;
/// Largest bitmap that the reference takes, in bytes.
const MAX_BYTES: u64 = 0x2000_0000;

/// Reads the directory, if the image has one that is consistent. The texts of the refusals are the reference's.
pub fn read_directory(storage: &dyn Storage, header: &Qcow2Header) -> Result<Vec<Bitmap>> {
    let Some(place) = header.bitmaps.filter(|_| header.fields.autoclear & layout::BITMAPS != 0) else {
        return Ok(Vec::new());
    };
    let broken = || Error::corrupt("Broken bitmap directory");
    if place.directory_size == 0 {
        return Err(Error::corrupt("Requested bitmap directory size is zero"));
    }
    let mut window = Window::new(storage, place.directory_offset);
    let mut left = place.directory_size;
    let mut found = Vec::new();
    let mut names = HashSet::new();
    while left > 0 {
        if left < BITMAP_ENTRY as u64 {
            return Err(broken());
        }
        if found.len() as u64 >= u64::from(place.count) {
            return Err(Error::corrupt("More bitmaps found than specified in header extension"));
        }
        let fixed: [u8; BITMAP_ENTRY] = window.take(BITMAP_ENTRY as u64)?.try_into().map_err(|_| broken())?;
        let fields = BitmapFields::read(&fixed);
        if fields.extra_size != 0 {
            return Err(Error::corrupt("Bitmap extra data is not supported"));
        }
        let len = (BITMAP_ENTRY as u64 + u64::from(fields.name_size)).next_multiple_of(8);
        left = left.checked_sub(len).ok_or_else(broken)?;
        let name = window.take(len - BITMAP_ENTRY as u64)?;
        let name = c_string(name.get(..usize::from(fields.name_size)).unwrap_or(&[]));
        check(&fields, &name, &header.geometry(), header.fields.size)?;
        if !names.insert(name.clone()) {
            return Err(Error::corrupt(format!("Bitmap already exists: {name}")));
        }
        let disk = header.fields.size - header.fields.size % layout::SECTOR;
        found.push(Bitmap { fields, name, disk });
    }
    if found.len() as u64 != u64::from(place.count) {
        return Err(Error::corrupt("Less bitmaps found than specified in header extension"));
    }
    Ok(found)
}

/// Refuses a bitmap that cannot be. The texts are the reference's.
pub(super) fn check(fields: &BitmapFields, name: &str, geometry: &Geometry, disk: u64) -> Result<()> {
    let granularity = layout::MIN_GRANULARITY_BITS..=layout::MAX_GRANULARITY_BITS;
    let bytes = u64::from(fields.table_size) << geometry.cluster_bits;
    let sound = fields.table_size != 0
        && fields.table_size <= MAX_TABLE
        && fields.table_offset != 0
        && geometry.places(fields.table_offset, u64::from(fields.table_size) * ENTRY)
        && bytes <= MAX_BYTES.saturating_add(geometry.cluster_size())
        && granularity.contains(&fields.granularity_bits)
        && fields.flags & !(layout::BITMAP_IN_USE | layout::BITMAP_AUTO) == 0
        && (1..=layout::MAX_BITMAP_NAME).contains(&fields.name_size)
        && fields.kind == layout::BITMAP_DIRTY_TRACKING;
    if !sound {
        return Err(Error::corrupt(format!("Bitmap '{name}' doesn't satisfy the constraints")));
    }
    // One that was saved must be as long as the disk asks for; one in use may be of another time.
    let bits = disk.div_ceil(1 << fields.granularity_bits);
    let clusters = bits.div_ceil(8).div_ceil(geometry.cluster_size());
    if fields.flags & layout::BITMAP_IN_USE == 0 && clusters != u64::from(fields.table_size) {
        return Err(Error::corrupt(format!("Could not read bitmap '{name}' from image: Invalid argument")));
    }
    Ok(())
}

/// The directory as it is stored.
pub(super) fn directory(list: &[Bitmap]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for bitmap in list {
        if bitmap.name.len() != usize::from(bitmap.fields.name_size) {
            return Err(Error::unsupported(format!("Bitmap '{}' has a name that cannot be kept", bitmap.name)));
        }
        bytes.extend_from_slice(&bitmap.fields.to_bytes());
        bytes.extend_from_slice(bitmap.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    if list.len() as u64 > u64::from(layout::MAX_BITMAPS) || bytes.len() as u64 > layout::MAX_BITMAP_DIRECTORY_BYTES {
        return Err(Error::unsupported("There is no room for more bitmaps"));
    }
    Ok(bytes)
}

/// Bit 0 of a table entry without an offset: the bits it stands for are all set.
pub(super) const ALL_SET: u64 = 1;

impl Qcow2Driver {
    /// Refuses bitmaps that share a table: each would be counted, copied and freed as its own.
    pub(super) fn bitmaps_apart(&self) -> Result<()> {
        let mut places: Vec<u64> = self.bitmap_list().iter().map(|bitmap| bitmap.fields.table_offset).collect();
        places.retain(|at| *at != 0);
        places.sort_unstable();
        match places.windows(2).any(|pair| pair[0] == pair[1]) {
            true => Err(Error::corrupt("Two bitmaps have the same table")),
            false => Ok(()),
        }
    }

    /// Copies of all bitmaps for a disk of `size` bytes (not 0), and where their directory is. New bits are clear.
    /// What the old ones used waits in the allocator to be freed.
    pub(super) fn fit_bitmaps(&self, alloc: &mut Allocator, size: u64) -> Result<Option<BitmapsExtension>> {
        let header = self.header().clone();
        let mut list = self.bitmap_list();
        let Some(place) = header.bitmaps.filter(|_| !list.is_empty()) else { return Ok(None) };
        for bitmap in &mut list {
            bitmap.fields = self.fit_bitmap(alloc, &bitmap.fields, header.fields.size, size)?;
            bitmap.disk = size;
        }
        let directory = directory(&list)?;
        self.set_bitmap_list(list);
        let directory_offset = self.put(alloc, &directory)?;
        self.free_bytes(alloc, place.directory_offset, place.directory_size);
        Ok(Some(BitmapsExtension { directory_offset, directory_size: directory.len() as u64, ..place }))
    }

    fn fit_bitmap(&self, alloc: &mut Allocator, old: &BitmapFields, from: u64, to: u64) -> Result<BitmapFields> {
        let cluster = self.geometry.cluster_size();
        let storage = &self.file().storage;
        let bits = to.div_ceil(1 << old.granularity_bits);
        let clusters = bits.div_ceil(cluster * 8);
        let short = |n: u64| usize::try_from(n).map_err(|_| Error::unsupported("The bitmap would be too long"));
        if clusters > u64::from(MAX_TABLE) || bits.div_ceil(8) > MAX_BYTES {
            return Err(Error::unsupported("The bitmap would be too long"));
        }
        let mut bytes = vec![0; short(u64::from(old.table_size) * ENTRY)?];
        storage.read_at(old.table_offset, &mut bytes).context("Could not read a bitmap table")?;
        let mut table: Vec<u64> = layout::words(&bytes).collect();
        let kept = short(clusters)?;
        for entry in table.iter().skip(kept) {
            self.check_data(entry & OFFSET_MASK, u64::from(entry & OFFSET_MASK != 0))?;
            self.free_bytes(alloc, entry & OFFSET_MASK, cluster);
        }
        table.resize(kept, 0);
        let rest = bits % (cluster * 8);
        if to < from
            && rest != 0
            && let Some(last) = table.last_mut().filter(|last| **last != 0)
        {
            // Bits past the end are clear, so that growing again does not bring them back.
            let at = *last & OFFSET_MASK;
            let mut bytes = vec![0; short(cluster)?];
            match (at, *last & ALL_SET) {
                (0, ALL_SET) => bytes.fill(0xff),
                (0, _) => {}
                _ => storage.read_at(at, &mut bytes).context("Could not read a bitmap")?,
            }
            let whole = short(rest / 8)?;
            bytes[whole] &= (1u8 << (rest % 8)) - 1;
            bytes[whole + 1..].fill(0);
            *last = self.put(alloc, &bytes)?;
            self.check_data(at, u64::from(at != 0))?;
            self.free_bytes(alloc, at, cluster);
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let table_offset = self.put(alloc, &bytes)?;
        self.add_bitmap_table(table_offset, bytes.len() as u64);
        self.free_bytes(alloc, old.table_offset, u64::from(old.table_size) * ENTRY);
        let table_size = u32::try_from(table.len()).map_err(|_| Error::unsupported("The bitmap would be too long"))?;
        Ok(BitmapFields { table_offset, table_size, ..*old })
    }

    /// Writes bytes to new clusters, filled up with zeros.
    pub(super) fn put(&self, alloc: &mut Allocator, bytes: &[u8]) -> Result<u64> {
        let cluster = self.geometry.cluster_size();
        let clusters = (bytes.len() as u64).div_ceil(cluster).max(1);
        let mut whole = bytes.to_vec();
        whole.resize(usize::try_from(clusters * cluster).unwrap_or(bytes.len()), 0);
        self.put_bytes(alloc, &whole)
    }

    /// Writes bytes to new clusters; what is behind them stays what it is.
    pub(super) fn put_bytes(&self, alloc: &mut Allocator, bytes: &[u8]) -> Result<u64> {
        let clusters = (bytes.len() as u64).div_ceil(self.geometry.cluster_size()).max(1);
        let at = self.allocate(alloc, clusters)? << self.geometry.cluster_bits;
        self.file().storage.write_at(at, bytes).context("Could not write a bitmap")?;
        Ok(at)
    }

    /// The clusters of a run of bytes lose a reference, later.
    pub(super) fn free_bytes(&self, alloc: &mut Allocator, at: u64, len: u64) {
        if at != 0 && len > 0 {
            let bits = self.geometry.cluster_bits;
            alloc.freed.push((at >> bits, len.div_ceil(self.geometry.cluster_size()), true));
        }
    }
}
