//! VMDK's on-disk structures, and nothing else.
//!
//! Source: VMware, *Virtual Disk Format 5.0* (technical note), sections "Hosted Sparse Extents" (`KDMV`), "ESXi
//! Host Sparse Extents" (`COWD`) and "Stream-Optimized Compressed Sparse Extents" (markers). All numbers are
//! little-endian; offsets and sizes in the structures are in sectors of 512 bytes.
//!
//! The layout of space-efficient sparse extents is not published; places and entry bits here were found by building
//! extents and watching how the reference maps them.
//!
//! Structures are read and written whole, so that bytes that mean nothing to us survive.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{Error, Result, metadata};
use crate::storage::Storage;

pub use crate::formats::sectors::{SECTOR, Sectors};

/// Sparse extent magic, `KDMV`.
pub const MAGIC: &[u8; 4] = b"KDMV";
/// ESXi host sparse extent magic.
pub const COWD_MAGIC: &[u8; 4] = b"COWD";

/// Header flag: the newline detection bytes are valid.
pub const FLAG_NEWLINES: u32 = 1 << 0;
/// Header flag: there is a redundant grain directory.
pub const FLAG_REDUNDANT: u32 = 1 << 1;
/// Header flag: a grain table entry of 1 is a zeroed grain (version 2).
pub const FLAG_ZERO_GRAIN: u32 = 1 << 2;
/// Header flag: grains are compressed.
pub const FLAG_COMPRESSED: u32 = 1 << 16;
/// Header flag: there are markers.
pub const FLAG_MARKERS: u32 = 1 << 17;

/// `gdOffset` of a stream-optimized extent whose directory is found through the footer.
pub const GD_AT_END: Sectors = Sectors(u64::MAX);
/// `compressAlgorithm`: deflate (RFC 1951 in a zlib frame, RFC 1950).
pub const COMPRESSION_DEFLATE: u16 = 1;
/// `singleEndLineChar`, `nonEndLineChar`, `doubleEndLineChar1`, `doubleEndLineChar2`.
pub const NEWLINES: [u8; 4] = *b"\n \r\n";

/// Grain table entry of a zeroed grain.
pub const GTE_ZEROED: u32 = 1;
/// Entries in a hosted grain table: the only number the format allows.
pub const HOSTED_GTES: u32 = 512;
/// Entries in an ESXi host grain table.
pub const COWD_GTES: u32 = 4096;
/// Sectors of a hosted grain table.
pub const GT_SECTORS: Sectors = Sectors::holding(HOSTED_GTES as u64 * 4);
/// Sectors of a grain as written by everybody.
pub const GRAIN_SECTORS: Sectors = Sectors(128);
/// The largest grain we read: 16 MiB. Bounds the buffers that a header can ask for.
pub const MAX_GRAIN_SECTORS: Sectors = Sectors(1 << 15);
/// Sectors kept for the embedded descriptor.
pub const DESCRIPTOR_SECTORS: Sectors = Sectors(20);
/// The longest descriptor we read.
pub const MAX_DESCRIPTOR: u64 = 1 << 20;
/// The most grain tables we map: 64 TiB of 64 KiB grains.
pub const MAX_TABLES: u64 = 1 << 21;
/// The most extents of one image.
pub const MAX_EXTENTS: usize = 1 << 15;

/// Sectors as they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct StoredSectors(U64);

impl StoredSectors {
    /// What is stored.
    pub fn get(self) -> Sectors {
        Sectors(self.0.get())
    }
}

impl From<Sectors> for StoredSectors {
    fn from(sectors: Sectors) -> Self {
        Self(sectors.0.into())
    }
}

/// `SparseExtentHeader`: one sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SparseHeader {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// 1; 2 with zeroed grains; 3 stream-optimized.
    pub version: U32,
    /// `FLAG_*`.
    pub flags: U32,
    /// Capacity in sectors.
    pub capacity: StoredSectors,
    /// Sectors in a grain.
    pub grain_sectors: StoredSectors,
    /// First sector of the embedded descriptor, 0 for none.
    pub descriptor_at: StoredSectors,
    /// Its length in sectors.
    pub descriptor_sectors: StoredSectors,
    /// Entries in a grain table.
    pub gtes: U32,
    /// First sector of the redundant grain directory.
    pub rgd_at: StoredSectors,
    /// First sector of the grain directory, or [`GD_AT_END`].
    pub gd_at: StoredSectors,
    /// Sectors before the first grain.
    pub overhead: StoredSectors,
    /// 1 where the extent was not closed cleanly.
    pub unclean: u8,
    /// [`NEWLINES`], unless the file went through a translation of line ends.
    pub newlines: [u8; 4],
    /// 0 none, 1 deflate.
    pub compression: U16,
    /// Zeros.
    pub padding: [u8; 433],
}

const _: () = {
    assert!(size_of::<SparseHeader>() as u64 == SECTOR);
    assert!(offset_of!(SparseHeader, version) == 0x04);
    assert!(offset_of!(SparseHeader, flags) == 0x08);
    assert!(offset_of!(SparseHeader, capacity) == 0x0c);
    assert!(offset_of!(SparseHeader, grain_sectors) == 0x14);
    assert!(offset_of!(SparseHeader, descriptor_at) == 0x1c);
    assert!(offset_of!(SparseHeader, descriptor_sectors) == 0x24);
    assert!(offset_of!(SparseHeader, gtes) == 0x2c);
    assert!(offset_of!(SparseHeader, rgd_at) == 0x30);
    assert!(offset_of!(SparseHeader, gd_at) == 0x38);
    assert!(offset_of!(SparseHeader, overhead) == 0x40);
    assert!(offset_of!(SparseHeader, unclean) == 0x48);
    assert!(offset_of!(SparseHeader, newlines) == 0x49);
    assert!(offset_of!(SparseHeader, compression) == 0x4d);
    assert!(offset_of!(SparseHeader, padding) == 0x4f);
};

impl SparseHeader {
    /// A header with its magic, no descriptor, 512 entries a table and grains of 64 KiB; all else is 0.
    pub fn new(version: u32, flags: u32, capacity: Sectors) -> Self {
        Self {
            magic: *MAGIC,
            version: version.into(),
            flags: (FLAG_NEWLINES | flags).into(),
            capacity: capacity.into(),
            grain_sectors: GRAIN_SECTORS.into(),
            gtes: HOSTED_GTES.into(),
            newlines: NEWLINES,
            ..Self::new_zeroed()
        }
    }

    /// The header at the start of `bytes`; `None` where there is no magic, or too few bytes.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (header, _) = Self::read_from_prefix(bytes).ok()?;
        (header.magic == *MAGIC).then_some(header)
    }

    /// Whether grains are compressed: the algorithm says it, whatever the flag.
    pub fn compressed(&self) -> bool {
        self.compression.get() == COMPRESSION_DEFLATE
    }

    /// Whether that flag is set.
    pub fn has(&self, flag: u32) -> bool {
        self.flags.get() & flag != 0
    }
}

/// `COWDisk_Header`, the part that matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CowdHeader {
    /// [`COWD_MAGIC`].
    pub magic: [u8; 4],
    /// 1.
    pub version: U32,
    /// 3.
    pub flags: U32,
    /// Capacity in sectors.
    pub capacity: U32,
    /// Sectors in a grain.
    pub grain_sectors: U32,
    /// First sector of the grain directory.
    pub gd_at: U32,
    /// Entries of the grain directory.
    pub gd_entries: U32,
    /// The sector where the next grain goes.
    pub free_at: U32,
}

const _: () = {
    assert!(size_of::<CowdHeader>() == 32);
    assert!(offset_of!(CowdHeader, capacity) == 0x0c);
    assert!(offset_of!(CowdHeader, gd_entries) == 0x18);
};

/// What stands before the data of a compressed grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GrainMarker {
    /// The grain's first sector on the guest's disk.
    pub sector: StoredSectors,
    /// Bytes of the data that follow.
    pub bytes: U32,
}

const _: () = assert!(size_of::<GrainMarker>() == 12);

/// The sector before a piece of metadata in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Marker {
    /// Sectors of what follows.
    pub sectors: StoredSectors,
    /// 0: a [`GrainMarker`] has the length of its data here.
    pub bytes: U32,
    /// `MARKER_*`.
    pub kind: U32,
    /// Zeros.
    pub padding: [u8; 496],
}

const _: () = {
    assert!(size_of::<Marker>() as u64 == SECTOR);
    assert!(offset_of!(Marker, bytes) == offset_of!(GrainMarker, bytes));
    assert!(offset_of!(Marker, kind) == 12);
};

/// Nothing follows.
pub const MARKER_END: u32 = 0;
/// A grain table follows.
pub const MARKER_TABLE: u32 = 1;
/// The grain directory follows.
pub const MARKER_DIRECTORY: u32 = 2;
/// The footer follows: the header again, with the directory's place.
pub const MARKER_FOOTER: u32 = 3;

impl Marker {
    /// The marker of that kind, before so many sectors.
    pub fn new(kind: u32, sectors: Sectors) -> Self {
        Self { sectors: sectors.into(), kind: kind.into(), ..Self::new_zeroed() }
    }
}

/// The constant header of a space-efficient sparse extent: 64 words of 64 bits.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SeSparseHeader {
    /// [`SESPARSE_MAGIC`].
    pub magic: U64,
    /// [`SESPARSE_VERSION`].
    pub version: U64,
    /// Capacity in sectors.
    pub capacity: StoredSectors,
    /// Sectors in a grain: 8.
    pub grain_sectors: StoredSectors,
    /// Sectors of a grain table: 64, so 4096 entries.
    pub table_sectors: StoredSectors,
    /// Unknown.
    pub unknown_5: [U64; 5],
    /// First sector of the volatile header.
    pub volatile_at: StoredSectors,
    /// Unknown.
    pub unknown_11: [U64; 5],
    /// First sector of the grain directory.
    pub gd_at: StoredSectors,
    /// Its length in sectors. An entry's top nibble is 1 where there is a table, its low 32 bits the table's number.
    pub gd_sectors: StoredSectors,
    /// First sector of the grain tables.
    pub tables_at: StoredSectors,
    /// Their length in sectors. An entry's top nibble says 0 or 1: nothing or unmapped, 2: zeros, 3: allocated; bits
    /// 48 to 59 are the low 12 bits of the grain's number, bits 0 to 47 the high ones.
    pub tables_sectors: StoredSectors,
    /// Unknown.
    pub unknown_20: [U64; 4],
    /// First sector of the grains.
    pub grains_at: StoredSectors,
    /// Their length in sectors.
    pub grains_sectors: StoredSectors,
    /// Unknown.
    pub unknown_26: [U64; 38],
}

const _: () = {
    assert!(size_of::<SeSparseHeader>() as u64 == SECTOR);
    assert!(offset_of!(SeSparseHeader, volatile_at) == 10 * 8);
    assert!(offset_of!(SeSparseHeader, gd_at) == 16 * 8);
    assert!(offset_of!(SeSparseHeader, grains_at) == 24 * 8);
};

/// The start of the volatile header of such an extent.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SeSparseVolatile {
    /// [`SESPARSE_VOLATILE_MAGIC`].
    pub magic: U64,
    /// Unknown.
    pub unknown_1: [U64; 2],
    /// Not 0 where the journal must be replayed.
    pub replay: U64,
}

const _: () = assert!(offset_of!(SeSparseVolatile, replay) == 3 * 8);

/// Magic number of a space-efficient sparse extent.
pub const SESPARSE_MAGIC: u64 = 0xcafe_babe;
/// Magic number of its volatile header.
pub const SESPARSE_VOLATILE_MAGIC: u64 = 0xcafe_cafe;
/// Version 2.1.
pub const SESPARSE_VERSION: u64 = 0x0000_0002_0000_0001;
/// Sectors in a grain of such an extent.
pub const SESPARSE_GRAIN_SECTORS: Sectors = Sectors(8);
/// Entries in its grain tables.
pub const SESPARSE_GTES: u64 = 4096;

/// Whether these are the first bytes of such an extent.
pub fn is_sesparse(head: &[u8]) -> bool {
    U64::read_from_prefix(head).is_ok_and(|(magic, _)| magic.get() == SESPARSE_MAGIC)
}

/// Reads a structure of the size of its type, which is called `what`, at that byte of the file with that name.
pub fn read<T: FromBytes + IntoBytes + FromZeros>(
    storage: &dyn Storage,
    file: &str,
    what: &'static str,
    at: u64,
) -> Result<T> {
    let mut value = T::new_zeroed();
    metadata::read(storage, file, what, at, value.as_mut_bytes())?;
    Ok(value)
}

/// The bytes of the entries of a grain table or directory.
pub fn entry_bytes(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// A sector number as tables hold it.
pub fn sector32(sector: Sectors) -> Result<u32> {
    u32::try_from(sector.0)
        .map_err(|_| Error::unsupported("The extent is full: a sparse VMDK file cannot be larger than 2 TiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_fields_have_their_places() {
        let header = SparseHeader {
            gd_at: GD_AT_END.into(),
            unclean: 1,
            compression: COMPRESSION_DEFLATE.into(),
            ..SparseHeader::new(3, FLAG_COMPRESSED | FLAG_MARKERS, Sectors(0x1234_5678_9abc))
        };
        let bytes = header.as_bytes();
        assert_eq!(&bytes[..4], b"KDMV");
        assert_eq!(bytes[72..79], [1, b'\n', b' ', b'\r', b'\n', 1, 0]);
        assert_eq!(bytes[12..18], [0xbc, 0x9a, 0x78, 0x56, 0x34, 0x12]);
        assert_eq!(SparseHeader::parse(bytes), Some(header));
        assert_eq!(SparseHeader::parse(&bytes[..511]), None);
    }
}
