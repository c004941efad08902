//! xz streams (the .xz File Format), decoded.

use lzma_rust2::XzReader;

use super::{Result, fill};

/// The most memory for a dictionary, in KiB: that of the highest preset is 64 MiB.
const DICTIONARY_KIB: u32 = 66 << 10;

/// Decodes until `out` is full. What follows in `encoded` is not looked at.
pub fn decode(encoded: &[u8], out: &mut [u8]) -> Result<()> {
    fill(XzReader::new_mem_limit(encoded, true, DICTIONARY_KIB), out)
}
