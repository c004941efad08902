//! VHD on disk, big endian: Microsoft's *Virtual Hard Disk Image Format Specification* 1.0.
//!
//! Footer ("Hard Disk Footer Format") and dynamic header ("Dynamic Disk Header Format") are read, kept and
//! written back whole, so fields that mean nothing to us survive.

use byteorder::{BigEndian as Be, ByteOrder};

use super::geometry::Geometry;

/// Bytes of a footer.
pub const FOOTER_BYTES: usize = 512;
/// Bytes of a dynamic header.
pub const HEADER_BYTES: usize = 1024;
/// Bytes of a sector: what block allocation table and bitmaps count.
pub const SECTOR: u64 = 512;
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

const COOKIE: &[u8; 8] = b"conectix"; // 0, 8 bytes
const FEATURES: usize = 8; // 4 bytes: 2, reserved, always set
const VERSION: usize = 12; // 4 bytes: 1.0
const DATA_OFFSET: usize = 16; // 8 bytes: of the dynamic header; all ones in a fixed disk
const TIMESTAMP: usize = 24; // 4 bytes
const CREATOR: usize = 28; // 4 bytes: application
const CREATOR_VERSION: usize = 32; // 4 bytes
const CREATOR_HOST: usize = 36; // 4 bytes
const ORIGINAL_SIZE: usize = 40; // 8 bytes
const CURRENT_SIZE: usize = 48; // 8 bytes
const GEOMETRY: usize = 56; // 2 bytes cylinders, 1 heads, 1 sectors per track
const TYPE: usize = 60; // 4 bytes
const CHECKSUM: usize = 64; // 4 bytes
const UUID: usize = 68; // 16 bytes
// 84: saved state, 1 byte; then reserved

const HEADER_COOKIE: &[u8; 8] = b"cxsparse"; // 0, 8 bytes
const HEADER_DATA_OFFSET: usize = 8; // 8 bytes: all ones
const HEADER_TABLE: usize = 16; // 8 bytes
const HEADER_VERSION: usize = 24; // 4 bytes: 1.0
const HEADER_ENTRIES: usize = 28; // 4 bytes
const HEADER_BLOCK: usize = 32; // 4 bytes
const HEADER_CHECKSUM: usize = 36; // 4 bytes

const VERSION_1_0: u32 = 0x0001_0000;

/// One's complement of the sum of all bytes, the four at `at` taken as zero.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    !sum(&bytes[..at]).wrapping_add(sum(&bytes[at + 4..]))
}

/// A footer, or the copy of it at the start of a dynamic disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    raw: [u8; FOOTER_BYTES],
}

impl Footer {
    /// That of a new image.
    pub fn new(size: u64, geometry: Geometry, fixed: bool, creator: &[u8; 4], seconds: u64, uuid: [u8; 16]) -> Self {
        let mut raw = [0; FOOTER_BYTES];
        raw[..8].copy_from_slice(COOKIE);
        Be::write_u32(&mut raw[FEATURES..], 2);
        Be::write_u32(&mut raw[VERSION..], VERSION_1_0);
        Be::write_u64(&mut raw[DATA_OFFSET..], if fixed { u64::MAX } else { FOOTER_BYTES as u64 });
        let since = u32::try_from(seconds.saturating_sub(EPOCH)).unwrap_or(u32::MAX);
        Be::write_u32(&mut raw[TIMESTAMP..], since);
        Be::write_u32(&mut raw[CREATOR_VERSION..], 0x0005_0003);
        raw[CREATOR_HOST..CREATOR_HOST + 4].copy_from_slice(b"Wi2k");
        Be::write_u32(&mut raw[TYPE..], if fixed { FIXED } else { DYNAMIC });
        raw[UUID..UUID + 16].copy_from_slice(&uuid);
        let mut footer = Self { raw };
        footer.set_creator(creator);
        footer.set_size(size, geometry);
        footer
    }

    /// Takes the bytes in if they start as a footer does.
    pub fn parse(raw: [u8; FOOTER_BYTES]) -> Option<Self> {
        (raw[..8] == *COOKIE).then_some(Self { raw })
    }

    /// The bytes as they are written.
    pub fn bytes(&self) -> &[u8; FOOTER_BYTES] {
        &self.raw
    }

    /// Whether the checksum is right.
    pub fn is_sound(&self) -> bool {
        Be::read_u32(&self.raw[CHECKSUM..]) == checksum(&self.raw, CHECKSUM)
    }

    /// Where the dynamic header is.
    pub fn data_offset(&self) -> u64 {
        Be::read_u64(&self.raw[DATA_OFFSET..])
    }

    /// The disk type.
    pub fn kind(&self) -> u32 {
        Be::read_u32(&self.raw[TYPE..])
    }

    /// The program that made it.
    pub fn creator(&self) -> [u8; 4] {
        let mut creator = [0; 4];
        creator.copy_from_slice(&self.raw[CREATOR..CREATOR + 4]);
        creator
    }

    /// Sets the program that made it.
    pub fn set_creator(&mut self, creator: &[u8; 4]) {
        self.raw[CREATOR..CREATOR + 4].copy_from_slice(creator);
        self.seal();
    }

    /// The size as it stands there, in bytes.
    pub fn current_size(&self) -> u64 {
        Be::read_u64(&self.raw[CURRENT_SIZE..])
    }

    /// Cylinders, heads and sectors per track.
    pub fn geometry(&self) -> Geometry {
        let [heads, sectors] = [self.raw[GEOMETRY + 2], self.raw[GEOMETRY + 3]];
        Geometry { cylinders: Be::read_u16(&self.raw[GEOMETRY..]), heads, sectors }
    }

    /// Sets the size and the geometry. The "original size" too: it is there for information, but some readers
    /// (libvhdi) take it for the disk's size.
    pub fn set_size(&mut self, size: u64, geometry: Geometry) {
        Be::write_u64(&mut self.raw[ORIGINAL_SIZE..], size);
        Be::write_u64(&mut self.raw[CURRENT_SIZE..], size);
        Be::write_u16(&mut self.raw[GEOMETRY..], geometry.cylinders);
        self.raw[GEOMETRY + 2] = geometry.heads;
        self.raw[GEOMETRY + 3] = geometry.sectors;
        self.seal();
    }

    fn seal(&mut self) {
        let sum = checksum(&self.raw, CHECKSUM);
        Be::write_u32(&mut self.raw[CHECKSUM..], sum);
    }
}

/// The header of a dynamic disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DynamicHeader {
    raw: Box<[u8; HEADER_BYTES]>,
}

impl DynamicHeader {
    /// That of a new image.
    pub fn new(entries: u32) -> Self {
        let mut raw = Box::new([0; HEADER_BYTES]);
        raw[..8].copy_from_slice(HEADER_COOKIE);
        Be::write_u64(&mut raw[HEADER_DATA_OFFSET..], u64::MAX);
        Be::write_u64(&mut raw[HEADER_TABLE..], TABLE_OFFSET);
        Be::write_u32(&mut raw[HEADER_VERSION..], VERSION_1_0);
        Be::write_u32(&mut raw[HEADER_BLOCK..], BLOCK_SIZE);
        let mut header = Self { raw };
        header.set_entries(entries);
        header
    }

    /// Takes the bytes in if they start as a header does.
    pub fn parse(raw: Box<[u8; HEADER_BYTES]>) -> Option<Self> {
        (raw[..8] == *HEADER_COOKIE).then_some(Self { raw })
    }

    /// The bytes as they are written.
    pub fn bytes(&self) -> &[u8] {
        &self.raw[..]
    }

    /// Where the block allocation table is.
    pub fn table(&self) -> u64 {
        Be::read_u64(&self.raw[HEADER_TABLE..])
    }

    /// Entries of the table.
    pub fn entries(&self) -> u32 {
        Be::read_u32(&self.raw[HEADER_ENTRIES..])
    }

    /// Sets the number of entries.
    pub fn set_entries(&mut self, entries: u32) {
        Be::write_u32(&mut self.raw[HEADER_ENTRIES..], entries);
        let sum = checksum(&self.raw[..], HEADER_CHECKSUM);
        Be::write_u32(&mut self.raw[HEADER_CHECKSUM..], sum);
    }

    /// Bytes of a block, its bitmap apart.
    pub fn block_size(&self) -> u32 {
        Be::read_u32(&self.raw[HEADER_BLOCK..])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn footer_fields_do_not_overlap() {
        let fields = [
            (0, 8),
            (FEATURES, 4),
            (VERSION, 4),
            (DATA_OFFSET, 8),
            (TIMESTAMP, 4),
            (CREATOR, 4),
            (CREATOR_VERSION, 4),
            (CREATOR_HOST, 4),
            (ORIGINAL_SIZE, 8),
            (CURRENT_SIZE, 8),
            (GEOMETRY, 4),
            (TYPE, 4),
            (CHECKSUM, 4),
            (UUID, 16),
        ];
        let mut end = 0;
        for (at, len) in fields {
            assert_eq!(at, end);
            end = at + len;
        }
        assert_eq!(end, 84);
        let header = [
            (0, 8),
            (HEADER_DATA_OFFSET, 8),
            (HEADER_TABLE, 8),
            (HEADER_VERSION, 4),
            (HEADER_ENTRIES, 4),
            (HEADER_BLOCK, 4),
            (HEADER_CHECKSUM, 4),
        ];
        let mut end = 0;
        for (at, len) in header {
            assert_eq!(at, end);
            end = at + len;
        }
    }

    #[test]
    fn checksums_follow_changes() {
        let geometry = Geometry { cylinders: 1, heads: 4, sectors: 17 };
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
