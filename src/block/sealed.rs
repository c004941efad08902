//! Secrets that are encrypted with another one: AES-256 in CBC mode, padded as PKCS #7 (RFC 5652, section 6.3) says.

use super::{Error, Result, SecretBytes};
use crate::crypto::{CipherAlgorithm, decrypt_cbc};

const BLOCK: usize = 16;

/// Decrypts. A last byte of zero is no padding, and the padding's other bytes are not looked at, as with the
/// reference.
pub fn open(key: &[u8; 32], iv: &[u8; BLOCK], data: &SecretBytes) -> Result<SecretBytes> {
    let length = data.get().len();
    if !length.is_multiple_of(BLOCK) {
        return Err(Error::invalid(format!("Length {length} must be a multiple of block size {BLOCK}")));
    }
    let mut plain = data.clone();
    let opened = decrypt_cbc(CipherAlgorithm::AES_256, key, iv, plain.get_mut());
    opened.map_err(|error| Error::invalid(error.to_string()))?;
    let padding = plain.get().last().copied().map_or(0, usize::from);
    if padding > BLOCK {
        let text = format!("Incorrect number of padding bytes ({padding}) found on decrypted data");
        return Err(Error::invalid(text));
    }
    plain.get_mut().truncate(length.saturating_sub(padding));
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NIST SP 800-38A, F.2.6: the first block of CBC-AES256.
    #[test]
    fn the_published_example_is_decrypted() {
        let key: [u8; 32] = [
            0x60, 0x3d, 0xeb, 0x10, 0x15, 0xca, 0x71, 0xbe, 0x2b, 0x73, 0xae, 0xf0, 0x85, 0x7d, 0x77, 0x81, 0x1f, 0x35,
            0x2c, 0x07, 0x3b, 0x61, 0x08, 0xd7, 0x2d, 0x98, 0x10, 0xa3, 0x09, 0x14, 0xdf, 0xf4,
        ];
        let iv: [u8; 16] = std::array::from_fn(|n| n as u8);
        let sealed = [0xf5, 0x8c, 0x4c, 0x04, 0xd6, 0xe5, 0xf1, 0xba, 0x77, 0x9e, 0xab, 0xfb, 0x5f, 0x7b, 0xfb, 0xd6];
        let error = open(&key, &iv, &sealed.to_vec().into()).map_err(|error| error.message());
        // The block ends in 0x2a, which is no padding.
        assert_eq!(error, Err("Incorrect number of padding bytes (42) found on decrypted data".to_owned()));
        let odd = open(&key, &iv, &vec![0; 17].into()).map_err(|error| error.message());
        assert_eq!(odd, Err("Length 17 must be a multiple of block size 16".to_owned()));
        assert_eq!(open(&key, &iv, &SecretBytes::default()).ok(), Some(SecretBytes::default()));
    }
}
