//! LZFSE streams, decoded.

use std::cell::RefCell;

use lzfse_rust::LzfseRingDecoder;

use super::{Result, fill};

thread_local! {
    static DECODER: RefCell<LzfseRingDecoder> = RefCell::default();
}

/// Decodes until `out` is full. What follows in `encoded` is not looked at.
pub fn decode(encoded: &[u8], out: &mut [u8]) -> Result<()> {
    DECODER.with_borrow_mut(|decoder| fill(decoder.reader_bytes(encoded), out))
}
