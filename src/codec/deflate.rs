//! deflate (RFC 1951), bare or in a zlib wrapper (RFC 1950).
//!
//! Two libraries, each for what it is best at, and an encoder of our own. libdeflate decodes half as fast again as
//! zlib-rs, and encodes the full window faster and smaller; it knows neither another window nor a stream that does not
//! end. zlib-rs decodes what libdeflate refuses. Our own encodes with the window of 4 KiB that strict readers of qcow2
//! set up.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use libdeflater::{CompressionLvl, Compressor, DecompressionError, Decompressor};

use super::narrow;
use super::{Error, Result, resize};

/// What stands around the deflate stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrap {
    /// Nothing (RFC 1951).
    Raw,
    /// A zlib header and a checksum (RFC 1950).
    Zlib,
}

/// A stream as it is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Bare; references go back 4 KiB.
    Narrow,
    /// Bare; they go back 32 KiB, all that deflate can.
    Full,
    /// The same in a zlib wrapper.
    Zlib,
}

impl Stream {
    /// The highest level that it has.
    pub fn levels(self) -> u8 {
        match self {
            Self::Narrow => narrow::LEVELS,
            Self::Full | Self::Zlib => 12,
        }
    }

    /// What stands around it.
    pub fn wrap(self) -> Wrap {
        match self {
            Self::Narrow | Self::Full => Wrap::Raw,
            Self::Zlib => Wrap::Zlib,
        }
    }
}

/// How to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// What comes out.
    pub stream: Stream,
    /// From 1 on: higher is smaller and slower.
    pub level: u8,
}

impl How {
    /// qcow and qcow2, for strict readers. Not larger than stock zlib's level 6.
    pub const QCOW: How = How { stream: Stream::Narrow, level: 6 };
    /// qcow2 for all others: smaller than [`How::QCOW`] and faster.
    pub const QCOW_FULL: How = How { stream: Stream::Full, level: 3 };
    /// vmdk. The lowest level that is not larger than stock zlib's level 6.
    pub const VMDK: How = How { stream: Stream::Zlib, level: 5 };
}

/// An encoder that was used last, by how it encodes.
enum Encoder {
    Narrow(Box<narrow::Encoder>),
    Full(Compressor),
}

impl Encoder {
    fn new(how: How) -> Result<Self> {
        Ok(match how.stream {
            Stream::Narrow => Self::Narrow(Box::new(narrow::Encoder::new())),
            Stream::Full | Stream::Zlib => {
                let level = CompressionLvl::new(how.level.clamp(1, how.stream.levels()).into());
                // It ends the program where it lacks memory, of which it takes less than that.
                let bytes = if how.level < 10 { 2 << 20 } else { 16 << 20 };
                super::reserve::<u8>(&mut Vec::new(), bytes)?;
                Self::Full(Compressor::new(level.map_err(|_| Error::Encoder)?))
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
            Encoder::Narrow(encoder) => return encoder.encode(how.level, plain, out, limit),
            Encoder::Full(encoder) => {
                resize(out, limit)?;
                match how.stream.wrap() {
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

/// Decodes until `out` is full. What follows in `encoded` (padding, the next unit) is not looked at.
pub fn decode(wrap: Wrap, encoded: &[u8], out: &mut [u8]) -> Result<()> {
    if decode_some(wrap, encoded, out)? == out.len() { Ok(()) } else { Err(Error::Short) }
}

/// Decodes until `out` is full or the stream ends, and says how many bytes came out.
pub fn decode_some(wrap: Wrap, encoded: &[u8], out: &mut [u8]) -> Result<usize> {
    decode_and_look_on(wrap, encoded, out).map(|(done, _)| done)
}

/// The same, and whether the stream has more than `out` takes.
pub fn decode_and_look_on(wrap: Wrap, encoded: &[u8], out: &mut [u8]) -> Result<(usize, bool)> {
    let decoded: std::result::Result<_, DecompressionError> = DECODER.with_borrow_mut(|kept| {
        let decoder = kept.get_or_insert_with(Decompressor::new);
        match wrap {
            Wrap::Raw => decoder.deflate_decompress(encoded, out),
            Wrap::Zlib => decoder.zlib_decompress(encoded, out),
        }
    });
    // A stream that has no end, or one behind what is wanted, is still good for what is wanted.
    decoded.map(|done| (done, false)).or_else(|_| decode_loosely(wrap, encoded, out))
}

fn decode_loosely(wrap: Wrap, encoded: &[u8], out: &mut [u8]) -> Result<(usize, bool)> {
    let mut decoder = Decompress::new(wrap == Wrap::Zlib);
    let status = decoder.decompress(encoded, out, FlushDecompress::Finish).map_err(|_| Error::Invalid)?;
    let done = position(decoder.total_out());
    if status == Status::StreamEnd {
        return Ok((done, false));
    }
    if done < out.len() {
        return Err(Error::Short);
    }
    let rest = encoded.get(position(decoder.total_in())..).unwrap_or_default();
    let _ = decoder.decompress(rest, &mut [0], FlushDecompress::Finish);
    Ok((done, position(decoder.total_out()) > done))
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
    fn no_memory_is_an_error() {
        for how in HOWS {
            assert_eq!(encode(how, &sample(), &mut Vec::new(), usize::MAX / 4), Err(Error::Memory), "{how:?}");
        }
        assert_eq!(super::super::zstd::encode(3, &sample(), &mut Vec::new(), usize::MAX / 4), Err(Error::Memory));
    }

    const HOWS: [How; 6] = [
        How::QCOW,
        How::QCOW_FULL,
        How::VMDK,
        How { level: 1, ..How::QCOW },
        How { level: 9, ..How::QCOW },
        How { level: 12, ..How::QCOW_FULL },
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
                    decode(how.stream.wrap(), &padded, &mut back).unwrap();
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
            assert_eq!(smaller, how.stream != Stream::Narrow, "{how:?}");
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
            decode(how.stream.wrap(), &encoded, &mut out).unwrap();
            assert_eq!(out, plain[..100], "{how:?}");
        }
        // Without a last block.
        let mut encoder = flate2::Compress::new(flate2::Compression::new(6), false);
        let mut encoded = vec![0; 70_000];
        encoder.compress(&plain, &mut encoded, flate2::FlushCompress::Sync).unwrap();
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
