//! zstd frames (RFC 8878).
//!
//! Frames are decoded in one go, straight to the output, so a frame that asks for a large window costs nothing.

use std::cell::RefCell;

use zstd::zstd_safe::zstd_sys::ZSTD_ErrorCode;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx};

use super::{Error, Result, resize};

/// The level that the reference uses.
pub const LEVEL: i32 = 3;
/// The highest level.
pub const LEVELS: u8 = 22;

/// What zstd returns where the output does not fit: errors are the negatives of their numbers.
const TOO_SMALL: usize = (ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall as usize).wrapping_neg();

/// The same where it has no memory.
const NO_MEMORY: usize = (ZSTD_ErrorCode::ZSTD_error_memory_allocation as usize).wrapping_neg();

thread_local! {
    static ENCODER: RefCell<Option<(i32, CCtx<'static>)>> = const { RefCell::new(None) };
    static DECODER: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// Encodes `plain` as one frame to `out` if that takes at most `limit` bytes; else false, and `out`
/// means nothing.
pub fn encode(level: i32, plain: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<bool> {
    ENCODER.with_borrow_mut(|kept| {
        let (_, encoder) = match kept {
            Some(kept) if kept.0 == level => kept,
            _ => {
                let mut encoder = CCtx::try_create().ok_or(Error::Memory)?;
                encoder.set_parameter(CParameter::CompressionLevel(level)).map_err(|_| Error::Encoder)?;
                kept.insert((level, encoder))
            }
        };
        resize(out, limit)?;
        match encoder.compress2(out.as_mut_slice(), plain) {
            Ok(len) => {
                out.truncate(len);
                Ok(true)
            }
            Err(code) if code == TOO_SMALL => Ok(false),
            Err(NO_MEMORY) => Err(Error::Memory),
            Err(_) => Err(Error::Encoder),
        }
    })
}

/// Decodes frames until `out` is full. What follows in `encoded` (padding, the next unit) is not looked at.
pub fn decode(encoded: &[u8], out: &mut [u8]) -> Result<()> {
    DECODER.with_borrow_mut(|kept| {
        let decoder = match kept {
            Some(decoder) => decoder,
            None => kept.insert(DCtx::try_create().ok_or(Error::Memory)?),
        };
        let (mut encoded, mut out) = (encoded, out);
        while !out.is_empty() {
            let len = zstd_safe::find_frame_compressed_size(encoded).map_err(|_| Error::Invalid)?;
            let (frame, rest) = encoded.split_at_checked(len).ok_or(Error::Short)?;
            let wrote = decoder.decompress(out, frame).map_err(|_| Error::Invalid)?;
            if wrote == 0 && rest.is_empty() {
                return Err(Error::Short);
            }
            out = out.get_mut(wrote..).ok_or(Error::Invalid)?;
            encoded = rest;
            if encoded.is_empty() && !out.is_empty() {
                return Err(Error::Short);
            }
        }
        Ok(())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_comes_back_with_garbage_behind() {
        let plain: Vec<u8> = (0..65536u32).map(|n| (n / 7) as u8).collect();
        let mut encoded = Vec::new();
        assert!(encode(LEVEL, &plain, &mut encoded, plain.len()).unwrap());
        let len = encoded.len();
        assert!(!encode(LEVEL, &plain, &mut encoded, len / 2).unwrap());
        assert!(encode(LEVEL, &plain, &mut encoded, plain.len()).unwrap());
        encoded.extend_from_slice(&[0xa5; 700]);
        let mut back = vec![0; plain.len()];
        decode(&encoded, &mut back).unwrap();
        assert_eq!(back, plain);
        assert!(decode(&encoded[..len - 1], &mut back).is_err());
        back.push(0);
        assert!(decode(&encoded[..len], &mut back).is_err());
        assert!(decode(&[0; 64], &mut back).is_err());
        assert!(decode(&[], &mut back).is_err());
    }
}
