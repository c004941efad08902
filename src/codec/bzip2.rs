//! bzip2 streams, decoded.

use super::{Result, fill};

/// Decodes until `out` is full. What follows in `encoded` is not looked at.
pub fn decode(encoded: &[u8], out: &mut [u8]) -> Result<()> {
    fill(bzip2::read::MultiBzDecoder::new(encoded), out)
}
