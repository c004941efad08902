//! User-mode Linux' COW file on disk, versions 2 and 3, big endian: as its makers' `uml_mkcow` and `uml_moo` (Debian's
//! uml-utilities) write and read it.
//!
//! A header; a bitmap of the sectors that are there; then room for all sectors of the disk.

use std::mem::{offset_of, size_of};

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What the file starts with.
pub const MAGIC: &[u8] = b"OOOM";
/// Where the version stands.
pub const VERSION_AT: usize = 4;
/// Bytes of the backing file's name, filled up with zeros.
pub const NAME_BYTES: usize = 4096;

/// The header of version 2. The bitmap follows at once; its length leaves out the bits of a last byte in part.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HeaderV2 {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// 2.
    pub version: U32,
    /// The backing file.
    pub backing: [u8; NAME_BYTES],
    /// When it was last written to: seconds since the epoch.
    pub time: U32,
    /// Its length, and so the disk's.
    pub size: U64,
    /// Bytes for which one bit stands.
    pub sector: U32,
}

/// The header of version 3. Bitmap and data are aligned.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HeaderV3 {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// 3.
    pub version: U32,
    /// When the backing file was last written to: seconds since the epoch.
    pub time: U32,
    /// Its length, and so the disk's.
    pub size: U64,
    /// Bytes for which one bit stands.
    pub sector: U32,
    /// What offsets are multiples of.
    pub alignment: U32,
    /// 0.
    pub bitmap_format: U32,
    /// The backing file.
    pub backing: [u8; NAME_BYTES],
}

/// Bytes of the longer header.
pub const HEADER_BYTES: usize = 4128;

const _: () = {
    assert!(size_of::<HeaderV2>() == 4120);
    assert!(offset_of!(HeaderV2, time) == 4104);
    assert!(size_of::<HeaderV3>() == HEADER_BYTES);
    assert!(offset_of!(HeaderV3, backing) == 32);
};
