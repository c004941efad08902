//! VHD on disk, big endian: Microsoft's *Virtual Hard Disk Image Format Specification* 1.0.
//!
//! Footer ("Hard Disk Footer Format") and dynamic header ("Dynamic Disk Header Format") are read, kept and
//! written back whole, so fields that mean nothing to us survive.

use std::mem::{offset_of, size_of};

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::{ChsGeometry, SizeRule};

/// What block allocation table and bitmaps count.
pub use crate::formats::sectors::{SECTOR, Sectors};

/// What errors call a footer.
pub const FOOTER: &str = "the VHD footer";
/// What they call a block's bitmap.
pub const BITMAP: &str = "the bitmap of a block";
/// What they call the table of blocks.
pub const TABLE: &str = "block allocation table";
/// What they call the dynamic header.
pub const HEADER: &str = "the dynamic VHD header";
/// Bytes of a footer.
pub const FOOTER_BYTES: usize = 512;
/// Bytes of a dynamic header.
pub const HEADER_BYTES: usize = 1024;
/// Entry of a block that is not there.
pub const UNALLOCATED: u32 = 0xffff_ffff;
/// The largest disk.
pub const MAX_SIZE: u64 = 2040 << 30;
/// The largest offset in a file.
pub const MAX_OFFSET: u64 = i64::MAX.unsigned_abs();
/// The longest table that is taken: 2040 GiB in blocks of 128 KiB.
pub const MAX_TABLE: u64 = 64 << 20;
/// The block size that is written.
pub const BLOCK_SIZE: u32 = 2 << 20;
/// Where the table starts in a new image.
pub const TABLE_OFFSET: u64 = 1536;
/// Disk type of a fixed disk.
pub const FIXED: u32 = 2;
/// Disk type of a dynamic disk.
pub const DYNAMIC: u32 = 3;
/// Disk type of a differencing disk.
pub const DIFFERENCING: u32 = 4;
/// Seconds between 1970 and 2000, where a footer's time begins.
pub const EPOCH: u64 = 946_684_800;

const COOKIE: [u8; 8] = *b"conectix";
const HEADER_COOKIE: [u8; 8] = *b"cxsparse";

/// "Hard Disk Footer Format".
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FooterFields {
    cookie: [u8; 8],
    /// 2, reserved, always set.
    features: U32,
    version: U32,
    /// Of the dynamic header; all ones in a fixed disk.
    data_offset: U64,
    /// Seconds since [`EPOCH`].
    timestamp: U32,
    creator: [u8; 4],
    creator_version: U32,
    creator_host: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    /// Per track.
    sectors: u8,
    kind: U32,
    /// One's complement of the sum of all other bytes.
    checksum: U32,
    uuid: [u8; 16],
    saved_state: u8,
    /// The first of the reserved bytes: [`UNFINISHED`] where the file is longer than its disk.
    unfinished: [u8; 16],
    reserved: [u8; 411],
}

/// "Parent Locator".
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct LocatorFields {
    code: [u8; 4],
    /// Sectors kept for it.
    space: U32,
    /// Bytes of it.
    length: U32,
    reserved: U32,
    offset: U64,
}

/// "Dynamic Disk Header Format".
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DynamicFields {
    cookie: [u8; 8],
    /// All ones.
    data_offset: U64,
    table: U64,
    version: U32,
    entries: U32,
    block_size: U32,
    /// One's complement of the sum of all other bytes.
    checksum: U32,
    parent_uuid: [u8; 16],
    parent_timestamp: U32,
    reserved: U32,
    /// UTF-16.
    parent_name: [U16; 256],
    parent_locators: [LocatorFields; 8],
    rest: [u8; 256],
}

const _: () = {
    assert!(size_of::<FooterFields>() == FOOTER_BYTES);
    assert!(offset_of!(FooterFields, data_offset) == 16);
    assert!(offset_of!(FooterFields, current_size) == 48);
    assert!(offset_of!(FooterFields, checksum) == 64);
    assert!(offset_of!(FooterFields, saved_state) == 84);
    assert!(offset_of!(FooterFields, unfinished) == 85);
    assert!(size_of::<DynamicFields>() == HEADER_BYTES);
    assert!(offset_of!(DynamicFields, table) == 16);
    assert!(offset_of!(DynamicFields, checksum) == 36);
    assert!(offset_of!(DynamicFields, parent_locators) == 576);
};

/// Where the checksum is in a footer.
pub const CHECKSUM_AT: u64 = offset_of!(FooterFields, checksum) as u64;
/// Where a dynamic header says where the table is.
pub const TABLE_AT: u64 = offset_of!(DynamicFields, table) as u64;
/// Where it says how many entries that has.
pub const ENTRIES_AT: u64 = offset_of!(DynamicFields, entries) as u64;
/// Where it says how long blocks are.
pub const BLOCK_SIZE_AT: u64 = offset_of!(DynamicFields, block_size) as u64;

/// The mark of a fixed disk that is being resized. The specification reserves the bytes in which it stands.
const UNFINISHED: [u8; 16] = *b"vimg: resizing..";

const VERSION_1_0: u32 = 0x0001_0000;

/// One's complement of the sum of all bytes but those of `stored`, the checksum that stands among them.
fn checksum(bytes: &[u8], stored: U32) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    !sum(bytes).wrapping_sub(sum(stored.as_bytes()))
}

/// A footer, or the copy of it at the start of a dynamic disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    raw: FooterFields,
}

impl Footer {
    /// That of a new image.
    pub fn new(size: u64, geometry: ChsGeometry, fixed: bool, creator: &[u8; 4], seconds: u64, uuid: [u8; 16]) -> Self {
        let mut raw = FooterFields::new_zeroed();
        raw.cookie = COOKIE;
        raw.features = 2.into();
        raw.version = VERSION_1_0.into();
        raw.data_offset = if fixed { u64::MAX } else { FOOTER_BYTES as u64 }.into();
        raw.timestamp = u32::try_from(seconds.saturating_sub(EPOCH)).unwrap_or(u32::MAX).into();
        raw.creator_version = 0x0005_0003.into();
        raw.creator_host = *b"Wi2k";
        raw.kind = if fixed { FIXED } else { DYNAMIC }.into();
        raw.uuid = uuid;
        let mut footer = Self { raw };
        footer.set_creator(creator);
        footer.set_size(size, geometry);
        footer
    }

    /// Takes the bytes in if they start as a footer does.
    pub fn parse(raw: [u8; FOOTER_BYTES]) -> Option<Self> {
        let raw: FooterFields = zerocopy::transmute!(raw);
        (raw.cookie == COOKIE).then_some(Self { raw })
    }

    /// The bytes as they are written.
    pub fn bytes(&self) -> &[u8; FOOTER_BYTES] {
        zerocopy::transmute_ref!(&self.raw)
    }

    /// Whether the checksum is right.
    pub fn is_sound(&self) -> bool {
        self.raw.checksum.get() == checksum(self.raw.as_bytes(), self.raw.checksum)
    }

    /// Where the dynamic header is.
    pub fn data_offset(&self) -> u64 {
        self.raw.data_offset.get()
    }

    /// The UUID.
    pub fn uuid(&self) -> u128 {
        u128::from_be_bytes(self.raw.uuid)
    }

    /// The disk type.
    pub fn kind(&self) -> u32 {
        self.raw.kind.get()
    }

    /// The program that made it.
    pub fn creator(&self) -> [u8; 4] {
        self.raw.creator
    }

    /// Sets the program that made it.
    pub fn set_creator(&mut self, creator: &[u8; 4]) {
        self.raw.creator = *creator;
        self.seal();
    }

    /// The size as it stands there, in bytes.
    pub fn current_size(&self) -> u64 {
        self.raw.current_size.get()
    }

    /// Cylinders, heads and sectors per track.
    pub fn geometry(&self) -> ChsGeometry {
        ChsGeometry { cylinders: self.raw.cylinders.get(), heads: self.raw.heads, sectors: self.raw.sectors }
    }

    /// The virtual size in bytes by that rule.
    pub fn size(&self, rule: SizeRule) -> u64 {
        rule.sectors(self.geometry(), self.current_size() / SECTOR).saturating_mul(SECTOR)
    }

    /// Sets the size and the geometry. The "original size" too: it is there for information, but some readers
    /// (libvhdi) take it for the disk's size.
    pub fn set_size(&mut self, size: u64, geometry: ChsGeometry) {
        (self.raw.original_size, self.raw.current_size) = (size.into(), size.into());
        self.raw.cylinders = geometry.cylinders.into();
        (self.raw.heads, self.raw.sectors) = (geometry.heads, geometry.sectors);
        self.seal();
    }

    /// Whether it ends a file that is longer than the disk, because a resize was not finished.
    pub fn is_unfinished(&self) -> bool {
        self.raw.unfinished == UNFINISHED
    }

    /// Sets or takes away the mark of that; other bytes that stand there stay.
    pub fn set_unfinished(&mut self, unfinished: bool) {
        if unfinished {
            self.raw.unfinished = UNFINISHED;
        } else if self.is_unfinished() {
            self.raw.unfinished = [0; 16];
        }
        self.seal();
    }

    fn seal(&mut self) {
        self.raw.checksum = checksum(self.raw.as_bytes(), self.raw.checksum).into();
    }
}

/// Where a text lies that tells where the parent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Locator {
    /// What kind of text.
    pub code: [u8; 4],
    /// Sectors kept for it.
    pub space: u32,
    /// Bytes of it.
    pub length: u32,
    /// Where it is.
    pub offset: u64,
}

/// The header of a dynamic disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DynamicHeader {
    raw: Box<DynamicFields>,
}

impl DynamicHeader {
    /// That of a new image.
    pub fn new(entries: u32) -> Self {
        let mut raw = Box::new(DynamicFields::new_zeroed());
        raw.cookie = HEADER_COOKIE;
        raw.data_offset = u64::MAX.into();
        raw.table = TABLE_OFFSET.into();
        raw.version = VERSION_1_0.into();
        raw.block_size = BLOCK_SIZE.into();
        let mut header = Self { raw };
        header.set_entries(entries);
        header
    }

    /// Takes the bytes in if they start as a header does.
    pub fn parse(raw: [u8; HEADER_BYTES]) -> Option<Self> {
        let raw: Box<DynamicFields> = Box::new(zerocopy::transmute!(raw));
        (raw.cookie == HEADER_COOKIE).then_some(Self { raw })
    }

    /// The bytes as they are written.
    pub fn bytes(&self) -> &[u8] {
        self.raw.as_bytes()
    }

    /// Whether the checksum is right.
    pub fn is_sound(&self) -> bool {
        self.raw.checksum.get() == checksum(self.raw.as_bytes(), self.raw.checksum)
    }

    /// Where the block allocation table is.
    pub fn table(&self) -> u64 {
        self.raw.table.get()
    }

    /// Entries of the table.
    pub fn entries(&self) -> u32 {
        self.raw.entries.get()
    }

    /// Sets the number of entries.
    pub fn set_entries(&mut self, entries: u32) {
        self.set_table(self.table(), entries);
    }

    /// Sets where the table is, and the number of its entries: both are in the header's first sector.
    pub fn set_table(&mut self, at: u64, entries: u32) {
        self.raw.table = at.into();
        self.raw.entries = entries.into();
        self.raw.checksum = checksum(self.raw.as_bytes(), self.raw.checksum).into();
    }

    /// The UUID of a differencing disk's parent.
    pub fn parent_uuid(&self) -> u128 {
        u128::from_be_bytes(self.raw.parent_uuid)
    }

    /// The parent's name, if it is text.
    pub fn parent_name(&self) -> Option<String> {
        let units = self.raw.parent_name.iter().map(|unit| unit.get()).take_while(|unit| *unit != 0);
        String::from_utf16(&units.collect::<Vec<_>>()).ok()
    }

    /// Where the parent is told.
    pub fn locators(&self) -> [Locator; 8] {
        self.raw.parent_locators.map(|raw| Locator {
            code: raw.code,
            space: raw.space.get(),
            length: raw.length.get(),
            offset: raw.offset.get(),
        })
    }

    /// Bytes of a block, its bitmap apart.
    pub fn block_size(&self) -> u32 {
        self.raw.block_size.get()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn checksums_follow_changes() {
        let geometry = ChsGeometry { cylinders: 1, heads: 4, sectors: 17 };
        let mut footer = Footer::new(34816, geometry, true, b"qemu", EPOCH + 7, [3; 16]);
        assert!(footer.is_sound());
        footer.set_size(1 << 20, geometry);
        footer.set_creator(b"qem2");
        assert!(footer.is_sound());
        assert_eq!(Footer::parse(*footer.bytes()).unwrap().current_size(), 1 << 20);
        let mut raw = *footer.bytes();
        raw[100] ^= 1;
        assert!(!Footer::parse(raw).unwrap().is_sound());
    }
}
