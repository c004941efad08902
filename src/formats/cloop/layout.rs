//! cloop on disk, big endian, as `cloop.h` of Debian's cloop-utils (Knoppix) publishes it.
//!
//! A shell script that mounts it; a header; the offsets of the blocks, and of their end; then the blocks, each a zlib
//! stream (RFC 1950).

use std::mem::{offset_of, size_of};

use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What the script starts with, in the version that is known.
pub const SCRIPT: &[u8] = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop";
/// What it starts with in any version: `#V3.0 Format` follows.
pub const ANY_SCRIPT: &[u8] = b"#!/bin/sh\n#V";
/// What follows its version.
pub const FORMAT: &[u8] = b" Format\n";
/// Bytes of the script and the header.
pub const HEADER_BYTES: usize = 136;
/// Bytes of an offset.
pub const OFFSET_BYTES: u64 = 8;

/// The header.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`SCRIPT`], filled up with zeros.
    pub script: [u8; 128],
    /// Bytes of a block.
    pub block: U32,
    /// How many there are.
    pub blocks: U32,
}

const _: () = {
    assert!(size_of::<Header>() == HEADER_BYTES);
    assert!(offset_of!(Header, block) == 128);
};
