//! deflate (RFC 1951), bare or in a zlib wrapper (RFC 1950).
//!
//! Two libraries, each for what it is best at. libdeflate decodes half as fast again as zlib-rs, and encodes the full
//! window faster and smaller; it knows neither another window nor a stream that does not end. zlib-rs encodes with
//! the window of 4 KiB that strict readers of qcow2 set up, and decodes what libdeflate refuses.

use std::cell::RefCell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use libdeflater::{CompressionLvl, Compressor, DecompressionError, Decompressor};

use super::{Error, Result};

/// What stands around the deflate stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrap {
    /// Nothing (RFC 1951).
    Raw,
    /// A zlib header and a checksum (RFC 1950).
    Zlib,
}

/// How far back references go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeflateWindow {
    /// 4 KiB. Levels 1 to [`DeflateWindow::levels`].
    Narrow,
    /// 32 KiB, all that deflate can.
    Full,
}

impl DeflateWindow {
    /// The highest level that it has.
    pub fn levels(self) -> u8 {
        match self {
            Self::Narrow => 9,
            Self::Full => 12,
        }
    }
}

/// How to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// What stands around the stream.
    pub wrap: Wrap,
    /// How far back references go.
    pub window: DeflateWindow,
    /// From 1 on: higher is smaller and slower.
    pub level: u8,
}

impl How {
    /// qcow and qcow2: bare, and for strict readers. 2 to 4 % larger than stock zlib's level 6 and 2.7 times as fast;
    /// level 3, 3.4 times as fast, is up to 5 % larger.
    pub const QCOW: How = How { wrap: Wrap::Raw, window: DeflateWindow::Narrow, level: 6 };
    /// qcow2 for all others: smaller than [`How::QCOW`] and faster.
    pub const QCOW_FULL: How = How { wrap: Wrap::Raw, window: DeflateWindow::Full, level: 3 };
    /// vmdk. The lowest level that is not larger than stock zlib's level 6.
    pub const VMDK: How = How { wrap: Wrap::Zlib, window: DeflateWindow::Full, level: 5 };
}

/// An encoder that was used last, by how it encodes.
enum Encoder {
    Narrow(Compress),
    Full(Compressor),
}

impl Encoder {
    fn new(how: How) -> Result<Self> {
        let level = how.level.clamp(1, how.window.levels());
        Ok(match how.window {
            DeflateWindow::Narrow => {
                let zlib = how.wrap == Wrap::Zlib;
                Self::Narrow(Compress::new_with_window_bits(Compression::new(level.into()), zlib, 12))
            }
            DeflateWindow::Full => {
                Self::Full(Compressor::new(CompressionLvl::new(level.into()).map_err(|_| Error::Encoder)?))
            }
        })
    }
}

thread_local! {
    static ENCODER: RefCell<Option<(How, Encoder)>> = const { RefCell::new(None) };
    static DECODER: RefCell<Option<Decompressor>> = const { RefCell::new(None) };
}

/// Encodes `plain` to `out` if that takes at most `limit` bytes; else false, and `out` means nothing.
pub fn encode(how: How, plain: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<bool> {
    ENCODER.with_borrow_mut(|kept| {
        let (_, encoder) = match kept {
            Some(kept) if kept.0 == how => kept,
            _ => kept.insert((how, Encoder::new(how)?)),
        };
        let len = match encoder {
            Encoder::Narrow(encoder) => narrow(encoder, plain, out, limit)?,
            Encoder::Full(encoder) => {
                out.resize(limit, 0);
                match how.wrap {
                    Wrap::Raw => encoder.deflate_compress(plain, out),
                    Wrap::Zlib => encoder.zlib_compress(plain, out),
                }
                // Room is the one thing that it can lack.
                .ok()
            }
        };
        out.truncate(len.unwrap_or(0));
        Ok(len.is_some_and(|len| len <= limit))
    })
}

/// The length, or `None` where the room is too small.
fn narrow(encoder: &mut Compress, plain: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<Option<usize>> {
    encoder.reset();
    // Room for the whole stream whatever it comes to: an encoder that was left half way does not always come
    // out of its reset whole, and panics later.
    out.resize(limit.max(plain.len()).saturating_add(plain.len() / 8 + 128), 0);
    loop {
        let (read, wrote) = (position(encoder.total_in()), position(encoder.total_out()));
        let (input, room) = (plain.get(read..).unwrap_or(&[]), out.get_mut(wrote..).unwrap_or(&mut []));
        if room.is_empty() {
            return Ok(None);
        }
        let status = encoder.compress(input, room, FlushCompress::Finish).map_err(|_| Error::Encoder)?;
        let stuck = position(encoder.total_in()) == read && position(encoder.total_out()) == wrote;
        match status {
            Status::StreamEnd => return Ok(Some(position(encoder.total_out()))),
            _ if stuck => return Err(Error::Encoder),
            _ => {}
        }
    }
}

/// Decodes until `out` is full. What follows in `encoded` (padding, the next unit) is not looked at.
pub fn decode(wrap: Wrap, encoded: &[u8], out: &mut [u8]) -> Result<()> {
    if decode_some(wrap, encoded, out)? == out.len() { Ok(()) } else { Err(Error::Short) }
}

/// Decodes until `out` is full or the stream ends, and says how many bytes came out.
pub fn decode_some(wrap: Wrap, encoded: &[u8], out: &mut [u8]) -> Result<usize> {
    let decoded: std::result::Result<_, DecompressionError> = DECODER.with_borrow_mut(|kept| {
        let decoder = kept.get_or_insert_with(Decompressor::new);
        match wrap {
            Wrap::Raw => decoder.deflate_decompress(encoded, out),
            Wrap::Zlib => decoder.zlib_decompress(encoded, out),
        }
    });
    // A stream that has no end, or one behind what is wanted, is still good for what is wanted.
    decoded.or_else(|_| decode_loosely(wrap, encoded, out))
}

fn decode_loosely(wrap: Wrap, encoded: &[u8], out: &mut [u8]) -> Result<usize> {
    let mut decoder = Decompress::new(wrap == Wrap::Zlib);
    let status = decoder.decompress(encoded, out, FlushDecompress::Finish).map_err(|_| Error::Invalid)?;
    let done = position(decoder.total_out());
    if status != Status::StreamEnd && done < out.len() { Err(Error::Short) } else { Ok(done) }
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

    const HOWS: [How; 7] = [
        How::QCOW,
        How::QCOW_FULL,
        How::VMDK,
        How { level: 1, ..How::QCOW },
        How { level: 9, ..How::QCOW },
        How { level: 12, ..How::QCOW_FULL },
        How { window: DeflateWindow::Narrow, ..How::VMDK },
    ];

    #[test]
    fn what_is_encoded_comes_back_with_garbage_behind() {
        for plain in [sample(), vec![0; 65536], vec![7; 1], vec![0; 2 << 20]] {
            for how in HOWS {
                let mut encoded = vec![1; 20];
                assert!(encode(how, &plain, &mut encoded, plain.len() + 100).unwrap(), "{how:?}");
                for garbage in [0, 0xa5, 0xff] {
                    let mut padded = encoded.clone();
                    padded.resize(encoded.len() + 700, garbage);
                    let mut back = vec![1; plain.len()];
                    decode(how.wrap, &padded, &mut back).unwrap();
                    assert!(back == plain, "{how:?}");
                }
            }
        }
    }

    #[test]
    fn a_limit_is_a_limit() {
        let plain = sample();
        for how in HOWS {
            let mut encoded = Vec::new();
            assert!(encode(how, &plain, &mut encoded, plain.len()).unwrap());
            let whole = encoded.clone();
            assert!(!encode(how, &plain, &mut encoded, whole.len() - 1).unwrap());
            assert!(!encode(how, &plain, &mut encoded, 0).unwrap());
            // libdeflate wants a few bytes more than it will use.
            assert!(encode(how, &plain, &mut encoded, whole.len() + 16).unwrap(), "{how:?}");
            assert!(encoded == whole, "{how:?}");
        }
    }

    #[test]
    fn a_narrow_window_is_one() {
        // Noise that repeats after 4 KiB and a little: there is nothing to refer to, but for a full window.
        let mut rng = fastrand::Rng::with_seed(1);
        let noise: Vec<u8> = (0..5000).map(|_| rng.u8(..)).collect();
        let plain: Vec<u8> = noise.iter().copied().cycle().take(65536).collect();
        for how in HOWS {
            let smaller = encode(how, &plain, &mut Vec::new(), plain.len() / 2).unwrap();
            assert_eq!(smaller, how.window == DeflateWindow::Full, "{how:?}");
        }
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
        assert_eq!(decode_some(Wrap::Raw, &encoded, &mut out), Ok(plain.len()));
    }

    #[test]
    fn streams_that_go_on_are_good_for_what_is_wanted() {
        let plain = sample();
        for how in HOWS {
            let mut encoded = Vec::new();
            assert!(encode(how, &plain, &mut encoded, plain.len()).unwrap());
            let mut out = vec![0; 100];
            decode(how.wrap, &encoded, &mut out).unwrap();
            assert_eq!(out, plain[..100], "{how:?}");
        }
        // Without a last block.
        let mut encoder = Compress::new(Compression::new(6), false);
        let mut encoded = vec![0; 70_000];
        encoder.compress(&plain, &mut encoded, FlushCompress::Sync).unwrap();
        encoded.truncate(position(encoder.total_out()));
        let mut out = vec![0; plain.len()];
        decode(Wrap::Raw, &encoded, &mut out).unwrap();
        assert!(out == plain);
    }

    #[test]
    fn a_wrong_checksum_is_wrong() {
        let plain = sample();
        let mut encoded = Vec::new();
        assert!(encode(How::VMDK, &plain, &mut encoded, plain.len()).unwrap());
        *encoded.last_mut().unwrap() ^= 1;
        let mut out = vec![0; plain.len()];
        assert_eq!(decode(Wrap::Zlib, &encoded, &mut out), Err(Error::Invalid));
    }
}
