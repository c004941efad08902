//! Persistent bitmaps: their directory, read and checked.
//!
//! Source: specification, section "Bitmaps". The directory means something only while the autoclear bit is set.

use std::collections::HashSet;

use crate::block::{Child, Error, Result};

use super::Qcow2Driver;
use super::geometry::Geometry;
use super::header::{Qcow2Header, c_string};
use super::layout::{self, BITMAP_ENTRY, BitmapFields, ENTRY, OFFSET_MASK};
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

/// What errors call the directory.
pub(super) const DIRECTORY: &str = "the bitmap directory";
/// What they call a bitmap's table.
pub(super) const BITMAP_TABLE: &str = "a bitmap table";
/// What they call its bits.
pub(super) const BITMAP: &str = "a bitmap";

/// Largest bitmap table that the reference takes, in entries.
pub(super) const MAX_TABLE: u32 = 0x0800_0000;
/// Largest bitmap that the reference takes, in bytes.
pub(super) const MAX_BYTES: u64 = 0x2000_0000;

/// Reads the directory, if the image has one that is consistent. The texts of the refusals are the reference's.
/// With `tables`, the tables of those that were saved are looked at too.
pub fn read_directory(file: &Child, header: &Qcow2Header, tables: bool) -> Result<Vec<Bitmap>> {
    let Some(place) = header.bitmaps.filter(|_| header.fields.autoclear & layout::BITMAPS != 0) else {
        return Ok(Vec::new());
    };
    let broken = || Error::corrupt("Broken bitmap directory");
    if place.directory_size == 0 {
        return Err(Error::corrupt("Requested bitmap directory size is zero"));
    }
    if !header.geometry().places(place.directory_offset, place.directory_size) {
        return Err(Error::corrupt("Failed to read bitmap directory: Input/output error"));
    }
    let mut window = Window::new(file, DIRECTORY, place.directory_offset);
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
        check_fields(&fields, &name, &header.geometry())?;
        if !names.insert(name.clone()) {
            return Err(Error::corrupt(format!("Bitmap already exists: {name}")));
        }
        let disk = header.fields.size - header.fields.size % layout::SECTOR;
        found.push(Bitmap { fields, name, disk });
    }
    if found.len() as u64 != u64::from(place.count) {
        return Err(Error::corrupt("Less bitmaps found than specified in header extension"));
    }
    for bitmap in &found {
        let fields = &bitmap.fields;
        // What was not saved is not read.
        let read = fields.flags & layout::BITMAP_IN_USE == 0;
        if read && !header.geometry().places(fields.table_offset, u64::from(fields.table_size) * ENTRY) {
            return Err(unreadable(bitmap, "Input/output error"));
        }
        if tables && read {
            check_table(file, &header.geometry(), bitmap)?;
        }
        check_length(&bitmap.fields, &bitmap.name, &header.geometry(), header.fields.size)?;
    }
    Ok(found)
}

/// Refuses a bitmap that cannot be. The texts are the reference's.
pub(super) fn check(fields: &BitmapFields, name: &str, geometry: &Geometry, disk: u64) -> Result<()> {
    check_fields(fields, name, geometry)?;
    check_length(fields, name, geometry, disk)
}

fn check_fields(fields: &BitmapFields, name: &str, geometry: &Geometry) -> Result<()> {
    let granularity = layout::MIN_GRANULARITY_BITS..=layout::MAX_GRANULARITY_BITS;
    let bytes = u64::from(fields.table_size) << geometry.cluster_bits;
    let sound = fields.table_size != 0
        && fields.table_size <= MAX_TABLE
        && fields.table_offset != 0
        && geometry.in_cluster(fields.table_offset) == 0
        && bytes <= MAX_BYTES.saturating_add(geometry.cluster_size())
        && granularity.contains(&fields.granularity_bits)
        && fields.flags & !(layout::BITMAP_IN_USE | layout::BITMAP_AUTO) == 0
        && (1..=layout::MAX_BITMAP_NAME).contains(&fields.name_size)
        && fields.kind == layout::BITMAP_DIRTY_TRACKING;
    if !sound {
        return Err(Error::corrupt(format!("Bitmap '{name}' doesn't satisfy the constraints")));
    }
    Ok(())
}

fn check_length(fields: &BitmapFields, name: &str, geometry: &Geometry, disk: u64) -> Result<()> {
    // One that was saved must be as long as the disk asks for; one in use may be of another time.
    let bits = disk.div_ceil(1 << fields.granularity_bits);
    let clusters = bits.div_ceil(8).div_ceil(geometry.cluster_size());
    if fields.flags & layout::BITMAP_IN_USE == 0 && clusters != u64::from(fields.table_size) {
        return Err(Error::corrupt(format!("Could not read bitmap '{name}' from image: Invalid argument")));
    }
    Ok(())
}

/// Refuses a bitmap that was saved and whose table cannot be. The text is the reference's.
fn check_table(file: &Child, geometry: &Geometry, bitmap: &Bitmap) -> Result<()> {
    let mut window = Window::new(file, BITMAP_TABLE, bitmap.fields.table_offset);
    for _ in 0..bitmap.fields.table_size {
        if !is_table_entry(geometry, layout::word(window.take(ENTRY)?, 0).unwrap_or(0)) {
            return Err(unreadable(bitmap, "Invalid argument"));
        }
    }
    Ok(())
}

fn unreadable(bitmap: &Bitmap, why: &str) -> Error {
    let name = &bitmap.name;
    Error::corrupt(format!("Could not read bitmap_table table from image for bitmap '{name}': {why}"))
}

/// Whether a bitmap table can have this entry.
pub(super) fn is_table_entry(geometry: &Geometry, word: u64) -> bool {
    let at = word & OFFSET_MASK;
    word & layout::BITMAP_TABLE_RESERVED == 0 && geometry.in_cluster(at) == 0 && (at == 0 || word & ALL_SET == 0)
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
}
