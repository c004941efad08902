//! Persistent bitmaps: their directory.
//!
//! Source: specification, section "Bitmaps". The directory means something only while the autoclear bit is set.

use std::collections::HashSet;

use crate::block::{Error, Result};
use crate::storage::Storage;

use super::header::{Header, c_string};
use super::layout::{self, BITMAP_ENTRY, BitmapFields, ENTRY, Geometry};
use super::window::Window;

/// An entry of the bitmap directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// The fixed fields.
    pub fields: BitmapFields,
    /// Its name.
    pub name: String,
}

/// Largest bitmap table that the reference takes, in entries.
const MAX_TABLE: u32 = 0x0800_0000;
/// Largest bitmap that the reference takes, in bytes.
const MAX_BYTES: u64 = 0x2000_0000;

/// Reads the directory, if the image has one that is consistent. The texts of the refusals are the reference's.
pub fn read_directory(storage: &dyn Storage, header: &Header) -> Result<Vec<Bitmap>> {
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
        found.push(Bitmap { fields, name });
    }
    if found.len() as u64 != u64::from(place.count) {
        return Err(Error::corrupt("Less bitmaps found than specified in header extension"));
    }
    Ok(found)
}

fn check(fields: &BitmapFields, name: &str, geometry: &Geometry, disk: u64) -> Result<()> {
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
