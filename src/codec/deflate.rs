//! deflate (RFC 1951), bare or in a zlib wrapper (RFC 1950).

use std::cell::RefCell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::{Error, Result};

/// What stands around the deflate stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrap {
    /// Nothing (RFC 1951).
    Raw,
    /// A zlib header and a checksum (RFC 1950).
    Zlib,
}

/// How to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// What stands around the stream.
    pub wrap: Wrap,
    /// log2 of the window, 9 to 15.
    pub window_bits: u8,
    /// 0 (store) to 9 (smallest).
    pub level: u8,
}

impl How {
    /// Bare deflate with a 4 KiB window, level 6: qcow and qcow2.
    pub const QCOW: How = How { wrap: Wrap::Raw, window_bits: 12, level: 6 };
    /// zlib with a full window, level 6: vmdk.
    pub const ZLIB: How = How { wrap: Wrap::Zlib, window_bits: 15, level: 6 };
}

thread_local! {
    static ENCODER: RefCell<Option<(How, Compress)>> = const { RefCell::new(None) };
    static RAW: RefCell<Option<Decompress>> = const { RefCell::new(None) };
    static ZLIB: RefCell<Option<Decompress>> = const { RefCell::new(None) };
}

/// Encodes `plain` to `out` (cleared first) if that takes at most `limit` bytes; else false, and `out` means nothing.
pub fn encode(how: How, plain: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<bool> {
    ENCODER.with_borrow_mut(|kept| {
        let (_, encoder) = match kept {
            Some(kept) if kept.0 == how => {
                kept.1.reset();
                kept
            }
            _ => {
                let level = Compression::new(u32::from(how.level.min(9)));
                let bits = how.window_bits.clamp(9, 15);
                kept.insert((how, Compress::new_with_window_bits(level, how.wrap == Wrap::Zlib, bits)))
            }
        };
        out.clear();
        // Room for the whole stream whatever it comes to: an encoder that was left half way does not always come
        // out of its reset whole, and panics later.
        out.resize(limit.max(plain.len()).saturating_add(plain.len() / 8 + 128), 0);
        loop {
            let (read, wrote) = (position(encoder.total_in()), position(encoder.total_out()));
            let (input, room) = (plain.get(read..).unwrap_or(&[]), out.get_mut(wrote..).unwrap_or(&mut []));
            if room.is_empty() {
                return Ok(false);
            }
            let status = encoder.compress(input, room, FlushCompress::Finish).map_err(|_| Error::Encoder)?;
            let stuck = position(encoder.total_in()) == read && position(encoder.total_out()) == wrote;
            match status {
                Status::StreamEnd => {
                    out.truncate(position(encoder.total_out()));
                    return Ok(out.len() <= limit);
                }
                _ if stuck => return Err(Error::Encoder),
                _ => {}
            }
        }
    })
}

/// Decodes until `out` is full. What follows in `encoded` (padding, the next unit) is not looked at.
pub fn decode(wrap: Wrap, encoded: &[u8], out: &mut [u8]) -> Result<()> {
    let wanted = out.len();
    let kept = if wrap == Wrap::Zlib { &ZLIB } else { &RAW };
    kept.with_borrow_mut(|kept| {
        let zlib = wrap == Wrap::Zlib;
        let decoder = match kept {
            Some(decoder) => {
                decoder.reset(zlib);
                decoder
            }
            None => kept.insert(Decompress::new(zlib)),
        };
        loop {
            let (read, wrote) = (position(decoder.total_in()), position(decoder.total_out()));
            if wrote >= wanted {
                return Ok(());
            }
            let (input, room) = (encoded.get(read..).unwrap_or(&[]), out.get_mut(wrote..).unwrap_or(&mut []));
            let status = decoder.decompress(input, room, FlushDecompress::None).map_err(|_| Error::Invalid)?;
            let stuck = position(decoder.total_in()) == read && position(decoder.total_out()) == wrote;
            if position(decoder.total_out()) < wanted && (status == Status::StreamEnd || stuck) {
                return Err(Error::Short);
            }
        }
    })
}

fn position(total: u64) -> usize {
    usize::try_from(total).unwrap_or(usize::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        (0..65536u32).flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 28).to_le_bytes()).take(65536).collect()
    }

    #[test]
    fn what_is_encoded_comes_back_with_garbage_behind() {
        let plain = sample();
        for how in [How::QCOW, How::ZLIB, How { level: 1, ..How::QCOW }, How { window_bits: 9, ..How::ZLIB }] {
            let mut encoded = Vec::new();
            assert!(encode(how, &plain, &mut encoded, plain.len()).unwrap(), "{how:?}");
            encoded.extend_from_slice(&[0xa5; 700]);
            let mut back = vec![0; plain.len()];
            decode(how.wrap, &encoded, &mut back).unwrap();
            assert_eq!(back, plain, "{how:?}");
        }
    }

    #[test]
    fn a_limit_is_a_limit() {
        let plain = sample();
        let mut encoded = Vec::new();
        assert!(encode(How::QCOW, &plain, &mut encoded, plain.len()).unwrap());
        let len = encoded.len();
        assert!(!encode(How::QCOW, &plain, &mut encoded, len - 1).unwrap());
        assert!(encode(How::QCOW, &plain, &mut encoded, len).unwrap());
        assert!(!encode(How::QCOW, &plain, &mut encoded, 0).unwrap());
    }

    #[test]
    fn short_and_wrong_input_is_refused() {
        let plain = sample();
        let mut encoded = Vec::new();
        assert!(encode(How::QCOW, &plain, &mut encoded, plain.len()).unwrap());
        let mut out = vec![0; plain.len()];
        assert_eq!(decode(Wrap::Raw, &encoded[..encoded.len() / 2], &mut out), Err(Error::Short));
        assert_eq!(decode(Wrap::Raw, &[], &mut out), Err(Error::Short));
        assert_eq!(decode(Wrap::Raw, &[0xff; 64], &mut out), Err(Error::Invalid));
        out.push(0);
        assert_eq!(decode(Wrap::Raw, &encoded, &mut out), Err(Error::Short));
        decode(Wrap::Raw, &encoded, &mut out[..100]).unwrap();
        assert_eq!(out[..100], plain[..100]);
    }
}
