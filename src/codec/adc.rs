//! Apple Data Compression, as disk images of macOS use it: runs of bytes, and copies of what came before.
//!
//! The first byte of each says what it is:
//!
//! | bits | then | meaning |
//! |---|---|---|
//! | `1nnnnnnn` | n + 1 bytes | these bytes |
//! | `01nnnnnn` | 2 bytes | n + 4 bytes, copied from the big-endian distance + 1 back |
//! | `00nnnndd` | 1 byte | n + 3 bytes, copied from the distance (d the high bits) + 1 back |

use super::{Error, Result};

/// Decodes until `out` is full. What follows in `encoded` is not looked at.
pub fn decode(encoded: &[u8], out: &mut [u8]) -> Result<()> {
    let mut input = encoded.iter().copied();
    let mut next = || input.next().map(usize::from).ok_or(Error::Short);
    let mut done = 0;
    while done < out.len() {
        let first = next()?;
        let left = out.len() - done;
        if first & 0x80 != 0 {
            for _ in 0..((first & 0x7f) + 1).min(left) {
                let byte = next()?;
                *out.get_mut(done).ok_or(Error::Invalid)? = u8::try_from(byte).map_err(|_| Error::Invalid)?;
                done += 1;
            }
            continue;
        }
        let (len, distance) = match first & 0x40 {
            0 => ((first >> 2) + 3, ((first & 3) << 8 | next()?) + 1),
            _ => ((first & 0x3f) + 4, (next()? << 8 | next()?) + 1),
        };
        let from = done.checked_sub(distance).ok_or(Error::Invalid)?;
        for n in 0..len.min(left) {
            // One after the other: a copy may reach into itself.
            let byte = *out.get(from + n).ok_or(Error::Invalid)?;
            *out.get_mut(done).ok_or(Error::Invalid)? = byte;
            done += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_both_kinds_of_copies() {
        let encoded = [0x82, b'a', b'b', b'c', 0b0000_0100, 2, 0x41, 0, 0, 0x80, b'!'];
        let mut out = [0; 13];
        decode(&encoded, &mut out).unwrap();
        assert_eq!(&out, b"abcabcaaaaaa!");
        assert_eq!(decode(&encoded[..9], &mut out), Err(Error::Short));
        assert_eq!(decode(&[0, 0], &mut out), Err(Error::Invalid));
    }
}
