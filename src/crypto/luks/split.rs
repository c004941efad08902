//! The anti-forensic splitter: LUKS On-Disk Format Specification 1.2.3, section 2.4. A key becomes many stripes, all of
//! which are needed to get it back, so that it is gone when a part of them is.

use crate::crypto::{HashAlgorithm, KeyBytes};

/// Splits a key. `stripes` has random bytes, as many whole stripes as there shall be; the last one is written over.
pub fn split(hash: HashAlgorithm, key: &[u8], stripes: &mut [u8]) {
    let Some(last) = stripes.len().checked_sub(key.len()) else { return };
    let (random, last) = stripes.split_at_mut(last);
    let sum = diffused_sum(hash, random, key.len());
    for ((to, key), sum) in last.iter_mut().zip(key).zip(sum.iter()) {
        *to = key ^ sum;
    }
}

/// The key of `len` bytes that those stripes make.
pub fn merge(hash: HashAlgorithm, stripes: &[u8], len: usize) -> KeyBytes {
    let (random, last) = stripes.split_at(stripes.len().saturating_sub(len));
    let mut key = diffused_sum(hash, random, len);
    key.iter_mut().zip(last).for_each(|(sum, last)| *sum ^= last);
    key
}

fn diffused_sum(hash: HashAlgorithm, stripes: &[u8], len: usize) -> KeyBytes {
    let mut sum = KeyBytes::from(vec![0; len]);
    for stripe in stripes.chunks_exact(len.max(1)) {
        sum.iter_mut().zip(stripe).for_each(|(sum, byte)| *sum ^= byte);
        diffuse(hash, &mut sum);
    }
    sum
}

/// Each piece as long as a digest becomes the digest of its number and itself; of the last one, as much as there is.
fn diffuse(hash: HashAlgorithm, bytes: &mut [u8]) {
    for (number, piece) in (0u32..).zip(bytes.chunks_mut(hash.digest_bytes())) {
        let digest = hash.digest(&[&number.to_be_bytes(), piece]);
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_key_comes_back_from_all_stripes_alone() {
        for hash in HashAlgorithm::all() {
            for len in [16, 32, 48, 64] {
                let key: Vec<u8> = (0..len as u8).collect();
                let mut stripes: Vec<u8> = (0..len * 7).map(|n| (n * n) as u8).collect();
                split(hash, &key, &mut stripes);
                assert_eq!(**merge(hash, &stripes, len), key);
                stripes[3] ^= 1;
                assert_ne!(**merge(hash, &stripes, len), key);
            }
        }
    }
}
