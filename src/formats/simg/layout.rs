//! Android's sparse image on disk, little endian, as libsparse's published header `sparse_format.h` (AOSP) has it.
//!
//! A file header; then chunks, each a header and what it carries. Together they are the disk, block by block.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What the file starts with.
pub const MAGIC: [u8; 4] = 0xed26_ff3a_u32.to_le_bytes();
/// Bytes of the file header, of those that are known.
pub const HEADER_BYTES: usize = 28;
/// Bytes of a chunk header, of those that are known.
pub const CHUNK_BYTES: usize = 12;
/// The version that is known; minor ones add nothing that must be understood.
pub const MAJOR: u16 = 1;

/// Chunk type: blocks as they are.
pub const RAW: u16 = 0xcac1;
/// Chunk type: 4 bytes, of which blocks are made.
pub const FILL: u16 = 0xcac2;
/// Chunk type: blocks of which nothing is said.
pub const SKIP: u16 = 0xcac3;
/// Chunk type: the CRC-32 of the disk up to here, in no block.
pub const CHECKSUM: u16 = 0xcac4;
/// Bytes that a fill or checksum chunk carries.
pub const WORD_BYTES: u64 = 4;

/// `sparse_header_t`.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FileHeader {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// [`MAJOR`].
    pub major: U16,
    /// Any.
    pub minor: U16,
    /// Where the first chunk starts: at least [`HEADER_BYTES`].
    pub header_bytes: U16,
    /// Where a chunk's data starts within it: at least [`CHUNK_BYTES`].
    pub chunk_bytes: U16,
    /// Bytes of a block: a multiple of 4.
    pub block: U32,
    /// Blocks of the disk.
    pub blocks: U32,
    /// Chunks in the file.
    pub chunks: U32,
    /// CRC-32 of the disk, or 0.
    pub checksum: U32,
}

/// `chunk_header_t`.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkHeader {
    /// [`RAW`], [`FILL`], [`SKIP`] or [`CHECKSUM`].
    pub kind: U16,
    /// 0.
    pub reserved: U16,
    /// Blocks of the disk.
    pub blocks: U32,
    /// Bytes in the file, with this header.
    pub bytes: U32,
}

const _: () = {
    assert!(size_of::<FileHeader>() == HEADER_BYTES);
    assert!(offset_of!(FileHeader, block) == 12);
    assert!(offset_of!(FileHeader, checksum) == 24);
    assert!(size_of::<ChunkHeader>() == CHUNK_BYTES);
    assert!(offset_of!(ChunkHeader, bytes) == 8);
};
