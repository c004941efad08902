//! Bochs' redolog on disk, little endian, as "Harddisk Images based on redologs" of the Bochs Developers Guide has it.
//!
//! A header; the catalog, an entry for each extent of the disk; then the extents that were written to, in any order:
//! each a bitmap of the sectors that are there, in whole sectors, and room for all of its sectors.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What the file starts with, filled up with zeros.
pub const MAGIC: &[u8] = b"Bochs Virtual HD Image\0";
/// The type that is known.
pub const REDOLOG: &[u8] = b"Redolog\0";
/// The subtype that is a disk of its own: what it does not have is zeros.
pub const GROWING: &[u8] = b"Growing\0";
/// A version: the disk's size stands where the second one has a time.
pub const V1: u32 = 0x1_0000;
/// The other one.
pub const V2: u32 = 0x2_0000;
/// An extent that is not there.
pub const NO_EXTENT: u32 = u32::MAX;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 512;
/// Bytes of an entry of the catalog.
pub const ENTRY_BYTES: u64 = 4;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// The header, both parts of it.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 32],
    /// [`REDOLOG`].
    pub kind: [u8; 16],
    /// [`GROWING`], `Undoable`, `Volatile`.
    pub subtype: [u8; 16],
    /// [`V1`] or [`V2`].
    pub version: U32,
    /// Where the catalog starts.
    pub header_bytes: U32,
    /// Entries of the catalog.
    pub entries: U32,
    /// Bytes of an extent's bitmap.
    pub bitmap: U32,
    /// Bytes of an extent's sectors.
    pub extent: U32,
    /// Version 2: when the base file was last written to. Version 1: the first half of the size.
    time: U32,
    /// Version 2: bytes of the disk.
    size: U64,
    rest: [u8; 416],
}

impl Header {
    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        match self.version.get() {
            V1 => self.size.get() << 32 | u64::from(self.time.get()),
            _ => self.size.get(),
        }
    }
}

const _: () = {
    assert!(size_of::<Header>() == HEADER_BYTES);
    assert!(offset_of!(Header, version) == 64);
    assert!(offset_of!(Header, extent) == 80);
    assert!(offset_of!(Header, size) == 88);
};
