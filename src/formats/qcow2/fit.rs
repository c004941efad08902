//! Persistent bitmaps whose length follows the disk's.
//!
//! Bitmaps are not changed in place: new tables and a new directory are written beside the old ones, and the header
//! that has the new size points to them.
//!
//! Source: specification, section "Bitmaps".

use crate::block::{Error, Result};

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::bitmap::{ALL_SET, BITMAP, BITMAP_TABLE, DIRECTORY, MAX_BYTES, MAX_TABLE, directory};
use super::layout::{self, BitmapFields, BitmapsExtension, ENTRY, OFFSET_MASK};

impl Qcow2Driver {
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
        let directory_offset = self.put(alloc, DIRECTORY, &directory)?;
        self.free_bytes(alloc, place.directory_offset, place.directory_size);
        Ok(Some(BitmapsExtension { directory_offset, directory_size: directory.len() as u64, ..place }))
    }

    fn fit_bitmap(&self, alloc: &mut Allocator, old: &BitmapFields, from: u64, to: u64) -> Result<BitmapFields> {
        let cluster = self.geometry.cluster_size();
        let bits = to.div_ceil(1 << old.granularity_bits);
        let clusters = bits.div_ceil(cluster * 8);
        let short = |n: u64| usize::try_from(n).map_err(|_| Error::unsupported("The bitmap would be too long"));
        if clusters > u64::from(MAX_TABLE) || bits.div_ceil(8) > MAX_BYTES {
            return Err(Error::unsupported("The bitmap would be too long"));
        }
        let mut bytes = vec![0; short(u64::from(old.table_size) * ENTRY)?];
        self.file().read_metadata(BITMAP_TABLE, old.table_offset, &mut bytes)?;
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
                _ => self.file().read_metadata(BITMAP, at, &mut bytes)?,
            }
            let whole = short(rest / 8)?;
            bytes[whole] &= (1u8 << (rest % 8)) - 1;
            bytes[whole + 1..].fill(0);
            *last = self.put(alloc, BITMAP, &bytes)?;
            self.check_data(at, u64::from(at != 0))?;
            self.free_bytes(alloc, at, cluster);
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let table_offset = self.put(alloc, BITMAP_TABLE, &bytes)?;
        self.add_bitmap_table(table_offset, bytes.len() as u64);
        self.free_bytes(alloc, old.table_offset, u64::from(old.table_size) * ENTRY);
        let table_size = u32::try_from(table.len()).map_err(|_| Error::unsupported("The bitmap would be too long"))?;
        Ok(BitmapFields { table_offset, table_size, ..*old })
    }

    /// Writes what errors call `what` to new clusters, filled up with zeros.
    pub(super) fn put(&self, alloc: &mut Allocator, what: &'static str, bytes: &[u8]) -> Result<u64> {
        let cluster = self.geometry.cluster_size();
        let clusters = (bytes.len() as u64).div_ceil(cluster).max(1);
        let mut whole = bytes.to_vec();
        whole.resize(usize::try_from(clusters * cluster).unwrap_or(bytes.len()), 0);
        self.put_bytes(alloc, what, &whole)
    }

    /// The same; what is behind it stays what it is.
    pub(super) fn put_bytes(&self, alloc: &mut Allocator, what: &'static str, bytes: &[u8]) -> Result<u64> {
        let clusters = (bytes.len() as u64).div_ceil(self.geometry.cluster_size()).max(1);
        let at = self.geometry.offset_of(self.allocate(alloc, clusters)?);
        self.file().write_metadata(what, at, bytes)?;
        Ok(at)
    }

    /// The clusters of a run of bytes lose a reference, later.
    pub(super) fn free_bytes(&self, alloc: &mut Allocator, at: u64, len: u64) {
        if at != 0 && len > 0 {
            alloc.freed.push((self.geometry.cluster_of(at), len.div_ceil(self.geometry.cluster_size()), true));
        }
    }
}
