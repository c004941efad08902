//! Apple's Universal Disk Image Format (UDIF) on disk, big endian, as it is publicly described: the trailer `koly`, block
//! tables `mish`, and their entries.

use std::mem::{offset_of, size_of};

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a sector, in which blocks are counted.
pub const SECTOR: u64 = 512;

/// Bytes of the trailer.
pub const KOLY_BYTES: usize = 512;
/// What a trailer starts with: its magic, version 4, 512 bytes long.
pub const KOLY: &[u8] = b"koly\0\0\0\x04\0\0\x02\0";
/// How many bytes at the end of a file are searched for a trailer: a file in whole sectors or blocks has padding.
pub const END: u64 = 64 << 10;
/// As in the reference, a trailer may start as far before the end of the last sector.
const LAST: u64 = 1024;

/// What an encrypted image starts with (version 2), and what one of version 1 ends with.
pub const ENCRYPTED: &[u8] = b"encrcdsa";
/// The latter.
pub const ENCRYPTED_END: &[u8] = b"cdsaencr";

/// A checksum. Of the types, 2 is CRC-32, in the first four bytes.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Checksum {
    kind: U32,
    /// In bits.
    size: U32,
    data: [u8; 128],
}

impl Checksum {
    /// The CRC-32 that it is, if it is one.
    pub fn crc(&self) -> Option<u32> {
        let [a, b, c, d, ..] = self.data;
        (self.kind.get() == 2 && self.size.get() == 32).then_some(u32::from_be_bytes([a, b, c, d]))
    }
}

/// The trailer.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Koly {
    /// [`KOLY`].
    pub signature: [u8; 12],
    flags: U32,
    running_data_offset: U64,
    /// Where the data fork is, from whose start block tables count.
    pub data_offset: U64,
    /// Its length.
    pub data_len: U64,
    /// Where the resource fork is, with the block tables of older images.
    pub resource_offset: U64,
    /// Its length; 0 where there is none.
    pub resource_len: U64,
    segment: U32,
    /// 0 or 1 where the image is one file.
    pub segments: U32,
    segment_id: [u8; 16],
    /// Of the data fork.
    pub data_checksum: Checksum,
    /// Where the property list is, with the block tables.
    pub list_offset: U64,
    /// Its length; 0 where there is none.
    pub list_len: U64,
    reserved: [u8; 120],
    /// Of the checksums of all block tables, in order.
    pub master_checksum: Checksum,
    variant: U32,
    /// Of the disk.
    pub sectors: U64,
    reserved_2: [u8; 12],
}

/// Bytes of a block table before its entries.
pub const MISH_BYTES: usize = 204;

/// A block table: one partition.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Mish {
    /// `mish`.
    pub magic: [u8; 4],
    version: U32,
    /// Where the partition starts on the disk.
    pub first: U64,
    /// Its length, in sectors.
    pub sectors: U64,
    /// What the entries' offsets count from, in the data fork.
    pub data_offset: U64,
    buffers: U32,
    descriptors: U32,
    reserved: [u8; 24],
    /// Of the partition.
    pub checksum: Checksum,
    /// Entries that follow.
    pub entries: U32,
}

/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 40;

/// Sectors that are stored in one way.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Entry {
    /// How: see [`EntryKind`].
    pub kind: U32,
    comment: U32,
    /// The first, within the partition.
    pub sector: U64,
    /// How many.
    pub sectors: U64,
    /// Where, from the table's data offset on.
    pub at: U64,
    /// How many bytes.
    pub len: U64,
}

const _: () = {
    assert!(size_of::<Koly>() == KOLY_BYTES);
    assert!(offset_of!(Koly, data_checksum) == 0x50);
    assert!(offset_of!(Koly, list_offset) == 0xd8);
    assert!(offset_of!(Koly, master_checksum) == 0x160);
    assert!(offset_of!(Koly, sectors) == 0x1ec);
    assert!(size_of::<Mish>() == MISH_BYTES);
    assert!(offset_of!(Mish, checksum) == 64);
    assert!(size_of::<Entry>() == ENTRY_BYTES);
};

/// What an entry's type says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// Zeros.
    Zero,
    /// Sectors of which nothing is kept, and which are in no checksum: they read as zeros.
    Ignored,
    /// As it is.
    Raw,
    /// In one of the codecs.
    Packed(Packing),
    /// No sectors: a comment, or the end of the table.
    None,
}

/// The codecs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Apple Data Compression.
    Adc,
    /// zlib.
    Zlib,
    /// bzip2.
    Bzip2,
    /// LZFSE.
    Lzfse,
    /// LZMA, in an xz stream.
    Lzma,
}

impl EntryKind {
    /// What that type says, if anything is known of it.
    pub fn of(kind: u32) -> Option<Self> {
        Some(match kind {
            0 => Self::Zero,
            1 => Self::Raw,
            2 => Self::Ignored,
            0x8000_0004 => Self::Packed(Packing::Adc),
            0x8000_0005 => Self::Packed(Packing::Zlib),
            0x8000_0006 => Self::Packed(Packing::Bzip2),
            0x8000_0007 => Self::Packed(Packing::Lzfse),
            0x8000_0008 => Self::Packed(Packing::Lzma),
            0x7fff_fffe | 0xffff_ffff => Self::None,
            _ => return None,
        })
    }
}

/// Where a trailer is, in a file of which `end` is the last part and `len` the length. Where the padding behind it is
/// long, the property list or the resource fork has to end where the trailer begins, so that an image within a disk is not
/// taken for the disk.
pub fn find_trailer(end: &[u8], len: u64) -> Option<u64> {
    let start = len.saturating_sub(end.len() as u64);
    let sectors = len.next_multiple_of(SECTOR);
    end.windows(KOLY_BYTES).enumerate().find_map(|(at, bytes)| {
        let place = start.saturating_add(at as u64);
        if !bytes.starts_with(KOLY) {
            return None;
        }
        let koly = Koly::read_from_bytes(bytes).ok()?;
        let ends_here = |at: U64, len: U64| at.get().checked_add(len.get()) == Some(place);
        let tables = ends_here(koly.list_offset, koly.list_len) || ends_here(koly.resource_offset, koly.resource_len);
        (sectors - place <= LAST || tables).then_some(place)
    })
}
