//! Bitmaps that are added, changed and removed.
//!
//! None is changed in place: what is new of their bits, their tables and the directory is written to free clusters, and
//! flushed; then the header points to the new directory; then what is not used any more is given up. An image that stops
//! at any write has the old bitmaps or the new ones, with leaks at worst.
//!
//! Source: specification, section "Bitmaps".

use crate::block::driver::{MakeBits, WantedBitmap, WantedBits};
use crate::block::error::Context;
use crate::block::{Error, Result};

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::bitmap::{self, ALL_SET, BITMAP, BITMAP_TABLE, Bitmap, DIRECTORY, MAX_BYTES};
use super::layout::{
    self, BITMAP_AUTO, BITMAP_ENTRY, BITMAP_IN_USE, BitmapFields, BitmapsExtension, ENTRY, OFFSET_MASK,
};

/// Bytes of a bitmap that are made at a time: a whole number of clusters of any image.
const PIECE: u64 = 2 << 20;

/// Places of the file in bytes: offset and length.
type Places = Vec<(u64, u64)>;

impl Qcow2Driver {
    /// See [`crate::block::driver::Bitmaps::check_new`]. The texts are the reference's, as far as it refuses the same.
    pub(super) fn check_new_bitmap(&self, name: &str, granularity_bits: u8, others: usize) -> Result<()> {
        let unsupported = |text: &str| Err(Error::unsupported(text));
        let size = self.header().fields.size;
        if size == 0 {
            return unsupported("Bitmaps cannot be kept in an image without a size");
        }
        if name.len() > usize::from(layout::MAX_BITMAP_NAME) {
            return unsupported("Name length exceeds maximum (1023 characters)");
        }
        if others as u64 >= u64::from(layout::MAX_BITMAPS) {
            return unsupported("Maximum number of persistent bitmaps is already reached");
        }
        let entries = self.bitmap_list().iter().map(|one| entry_bytes(usize::from(one.fields.name_size))).sum::<u64>();
        if entries + entry_bytes(name.len()) > layout::MAX_BITMAP_DIRECTORY_BYTES {
            return unsupported("Not enough space in the bitmap directory");
        }
        if size.div_ceil(1 << granularity_bits).div_ceil(8) > MAX_BYTES {
            return unsupported("Too much space will be occupied by the bitmap. Use larger granularity");
        }
        Ok(())
    }

    /// See [`crate::block::driver::Bitmaps::arrange`].
    pub(super) fn arrange_bitmaps(&self, wanted: &[WantedBitmap<'_>]) -> Result<()> {
        if !self.write {
            return Err(Error::unsupported("Block node is read-only"));
        }
        let mut alloc = self.lock_alloc();
        self.before_resize(&mut alloc)?;
        self.finish_bitmaps(&mut alloc)?;
        let old = self.bitmap_list();
        let gone = self.places_of_others(&old, wanted)?;
        if !wanted.is_empty() {
            // Refused here, not when room has been taken for them.
            let mut header = self.header().clone();
            header.bitmaps = Some(BitmapsExtension::default());
            header.to_bytes()?;
        }
        let mut taken = Places::new();
        let (list, place) = match self.put_bitmaps(&mut alloc, &old, wanted, &mut taken) {
            Ok(new) => new,
            Err(error) => {
                // What was taken is not used. If that cannot be said any more it is lost.
                taken.iter().for_each(|(at, len)| self.free_bytes(&mut alloc, *at, *len));
                let _ = self.settle(&mut alloc);
                return Err(error);
            }
        };
        self.settle(&mut alloc)?;
        self.file().storage.flush().context("Could not flush")?;
        self.update_header(|header| {
            header.bitmaps = place;
            header.fields.autoclear &= !layout::BITMAPS;
            header.fields.autoclear |= if place.is_some() { layout::BITMAPS } else { 0 };
        })?;
        self.set_bitmap_list(list);
        self.file().storage.flush().context("Could not write qcow2 header")?;
        gone.iter().for_each(|(at, len)| self.free_bytes(&mut alloc, *at, *len));
        self.settle(&mut alloc)
    }

    /// What the directory uses, and those bitmaps that are not kept.
    fn places_of_others(&self, old: &[Bitmap], wanted: &[WantedBitmap<'_>]) -> Result<Places> {
        let kept = |index: usize| wanted.iter().any(|one| matches!(one.bits, WantedBits::Kept(n) if n == index));
        let mut places = Places::new();
        for (_, bitmap) in old.iter().enumerate().filter(|(index, _)| !kept(*index)) {
            self.places_of(bitmap, &mut places)?;
        }
        let header = self.header();
        if let Some(place) = header.bitmaps.filter(|_| header.fields.autoclear & layout::BITMAPS != 0) {
            places.push((place.directory_offset, place.directory_size));
        }
        Ok(places)
    }

    fn places_of(&self, bitmap: &Bitmap, places: &mut Places) -> Result<()> {
        let (fields, cluster) = (&bitmap.fields, self.geometry.cluster_size());
        let table = self.bitmap_table(fields)?;
        for (index, entry) in table.iter().enumerate() {
            let at = entry & OFFSET_MASK;
            let broken = fields.flags & BITMAP_IN_USE != 0 && !bitmap::is_table_entry(&self.geometry, *entry);
            // Nobody says that the table of one that was not saved can be believed: what it cannot mean stays where it is.
            if at == 0 || broken {
                continue;
            }
            self.check_data(at, cluster)?;
            if self.refcount(self.geometry.cluster_of(at))? == 0 {
                return Err(self.corrupt(format!("Bitmap data offset {at:#x} is wrong (table index: {index:#x})")));
            }
            places.push((at, cluster));
        }
        places.push((fields.table_offset, u64::from(fields.table_size) * ENTRY));
        Ok(())
    }

    fn bitmap_table(&self, fields: &BitmapFields) -> Result<Vec<u64>> {
        let len = u64::from(fields.table_size) * ENTRY;
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| Error::corrupt("A bitmap's table is too long"))?];
        self.file().read_metadata(BITMAP_TABLE, fields.table_offset, &mut bytes)?;
        Ok(layout::words(&bytes).collect())
    }

    /// Writes what is new to free clusters, which are noted in `taken`. Gives the list, and where the directory is.
    fn put_bitmaps(
        &self,
        alloc: &mut Allocator,
        old: &[Bitmap],
        wanted: &[WantedBitmap<'_>],
        taken: &mut Places,
    ) -> Result<(Vec<Bitmap>, Option<BitmapsExtension>)> {
        let disk = self.header().fields.size;
        let mut list = Vec::with_capacity(wanted.len());
        for one in wanted {
            let auto = if one.enabled { BITMAP_AUTO } else { 0 };
            list.push(match one.bits {
                WantedBits::Kept(index) => {
                    let bitmap = old.get(index).ok_or_else(|| Error::invalid("There is no such bitmap"))?;
                    let flags = bitmap.fields.flags & !BITMAP_AUTO | auto;
                    Bitmap { fields: BitmapFields { flags, ..bitmap.fields }, ..bitmap.clone() }
                }
                WantedBits::Made(bits) => {
                    let table = self.put_bits(alloc, bits, disk.div_ceil(1 << one.granularity_bits), taken)?;
                    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
                    let table_offset = self.put(alloc, BITMAP_TABLE, &bytes)?;
                    taken.push((table_offset, bytes.len() as u64));
                    self.add_bitmap_table(table_offset, bytes.len() as u64);
                    let fields = BitmapFields {
                        table_offset,
                        table_size: u32::try_from(table.len()).unwrap_or(u32::MAX),
                        flags: auto,
                        kind: layout::BITMAP_DIRTY_TRACKING,
                        granularity_bits: one.granularity_bits,
                        name_size: u16::try_from(one.name.len()).unwrap_or(u16::MAX),
                        extra_size: 0,
                    };
                    bitmap::check(&fields, &one.name, &self.geometry, disk)?;
                    Bitmap { fields, name: one.name.clone(), disk }
                }
            });
        }
        if list.is_empty() {
            return Ok((list, None));
        }
        let bytes = bitmap::directory(&list)?;
        let directory_offset = self.put(alloc, DIRECTORY, &bytes)?;
        taken.push((directory_offset, bytes.len() as u64));
        let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
        let directory_size = bytes.len() as u64;
        Ok((list, Some(BitmapsExtension { count, reserved: 0, directory_size, directory_offset })))
    }

    /// Writes so many bits, and gives their table.
    fn put_bits(&self, alloc: &mut Allocator, make: &dyn MakeBits, bits: u64, taken: &mut Places) -> Result<Vec<u64>> {
        let too_long = || Error::unsupported("The bitmap would be too long");
        let (bytes, cluster) = (bits.div_ceil(8), self.geometry.cluster_size());
        if bytes > MAX_BYTES {
            return Err(too_long());
        }
        let step = usize::try_from(cluster).map_err(|_| too_long())?;
        let (mut table, mut piece, mut at) = (Vec::new(), Vec::new(), 0);
        while at < bytes {
            let len = PIECE.min(bytes - at);
            piece.clear();
            piece.resize(usize::try_from(len).map_err(|_| too_long())?, 0);
            make.fill(at, &mut piece)?;
            for part in piece.chunks(step) {
                table.push(if part.iter().all(|byte| *byte == 0) {
                    0
                } else if part.len() == step && part.iter().all(|byte| *byte == 0xff) {
                    ALL_SET
                } else {
                    let host = self.put(alloc, BITMAP, part)?;
                    taken.push((host, cluster));
                    host
                });
            }
            at += len;
        }
        Ok(table)
    }
}

/// Bytes of a directory entry whose name has that length.
fn entry_bytes(name: usize) -> u64 {
    (BITMAP_ENTRY as u64 + name as u64).next_multiple_of(8)
}
