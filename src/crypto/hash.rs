//! Hashes by name, and what is made with them: digests and keys from passphrases (PBKDF2, RFC 8018, 5.2).

use hmac::{EagerHash, Hmac};
use sha2::Digest;

use super::KeyBytes;

/// A hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum HashAlgorithm {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
    Sm3,
}

/// Hashes, their names, the bytes of their digests, and what a round of PBKDF2 costs with them in rounds with SHA-256:
/// as measured with the code that is used here, on CPUs with instructions for SHA-1 and SHA-256, and rounded up.
const HASHES: [(HashAlgorithm, &str, usize, u64); 8] = [
    (HashAlgorithm::Md5, "md5", 16, 2),
    (HashAlgorithm::Sha1, "sha1", 20, 1),
    (HashAlgorithm::Sha224, "sha224", 28, 1),
    (HashAlgorithm::Sha256, "sha256", 32, 1),
    (HashAlgorithm::Sha384, "sha384", 48, 4),
    (HashAlgorithm::Sha512, "sha512", 64, 4),
    (HashAlgorithm::Ripemd160, "ripemd160", 20, 3),
    (HashAlgorithm::Sm3, "sm3", 32, 3),
];

/// Calls a generic function for the hash that a value stands for.
macro_rules! with_hash {
    ($hash:expr, $function:ident($($argument:expr),*)) => {
        match $hash {
            HashAlgorithm::Md5 => $function::<md5::Md5>($($argument),*),
            HashAlgorithm::Sha1 => $function::<sha1::Sha1>($($argument),*),
            HashAlgorithm::Sha224 => $function::<sha2::Sha224>($($argument),*),
            HashAlgorithm::Sha256 => $function::<sha2::Sha256>($($argument),*),
            HashAlgorithm::Sha384 => $function::<sha2::Sha384>($($argument),*),
            HashAlgorithm::Sha512 => $function::<sha2::Sha512>($($argument),*),
            HashAlgorithm::Ripemd160 => $function::<ripemd::Ripemd160>($($argument),*),
            HashAlgorithm::Sm3 => $function::<sm3::Sm3>($($argument),*),
        }
    };
}

impl HashAlgorithm {
    /// The names of all of them.
    pub const NAMES: [&'static str; HASHES.len()] = {
        let (mut names, mut n) = ([""; HASHES.len()], 0);
        while n < names.len() {
            names[n] = HASHES[n].1;
            n += 1;
        }
        names
    };

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        HASHES.into_iter().map(|(hash, ..)| hash)
    }

    /// The hash with that name.
    pub fn parse(name: &str) -> Option<Self> {
        HASHES.into_iter().find(|(_, known, ..)| *known == name).map(|(hash, ..)| hash)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        HASHES[self as usize].1
    }

    /// Bytes of a digest.
    pub fn digest_bytes(self) -> usize {
        HASHES[self as usize].2
    }

    /// The digest of some pieces, one after the other.
    pub fn digest(self, pieces: &[&[u8]]) -> KeyBytes {
        with_hash!(self, digest_of(pieces))
    }

    /// How often the hash is turned over to derive a key of that length: what a derivation costs.
    pub fn rounds(self, iterations: u32, key: usize) -> u64 {
        u64::from(iterations).saturating_mul(key.div_ceil(self.digest_bytes()) as u64)
    }

    /// What a round costs, in rounds with SHA-256.
    pub fn round_cost(self) -> u64 {
        HASHES[self as usize].3
    }

    /// Derives a key of `len` bytes from a passphrase by PBKDF2 with this hash's HMAC. Takes as long as the
    /// iterations say: bound them before.
    pub fn derive(self, passphrase: &[u8], salt: &[u8], iterations: u32, len: usize) -> KeyBytes {
        let mut key = KeyBytes::from(vec![0; len]);
        with_hash!(self, derive_into(passphrase, salt, iterations, &mut key));
        key
    }
}

fn digest_of<D: Digest>(pieces: &[&[u8]]) -> KeyBytes {
    let mut hash = D::new();
    pieces.iter().for_each(|piece| hash.update(piece));
    hash.finalize().to_vec().into()
}

fn derive_into<D: EagerHash>(passphrase: &[u8], salt: &[u8], iterations: u32, key: &mut [u8]) {
    let done = pbkdf2::pbkdf2::<Hmac<D>>(passphrase, salt, iterations, key);
    debug_assert!(done.is_ok(), "HMAC takes keys of any length");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The digests of `abc`, from the hashes' own specifications.
    #[test]
    fn digests() {
        for (hash, digest) in [
            (HashAlgorithm::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (HashAlgorithm::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (HashAlgorithm::Sha224, "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
            (HashAlgorithm::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (HashAlgorithm::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
            (HashAlgorithm::Sm3, "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"),
        ] {
            assert_eq!(hex(&hash.digest(&[b"a", b"", b"bc"])), digest, "{}", hash.name());
        }
        for hash in HashAlgorithm::all() {
            assert_eq!(hash.digest(&[]).len(), hash.digest_bytes());
            assert_eq!(HashAlgorithm::parse(hash.name()), Some(hash));
        }
    }

    /// RFC 6070, and RFC 7914 section 11.
    #[test]
    fn keys_of_passphrases() {
        let key =
            HashAlgorithm::Sha1.derive(b"passwordPASSWORDpassword", b"saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096, 25);
        assert_eq!(hex(&key), "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038");
        let key = HashAlgorithm::Sha256.derive(b"passwd", b"salt", 1, 64);
        assert_eq!(
            hex(&key),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
             49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        );
        assert_eq!(HashAlgorithm::Sha1.rounds(1000, 64), 4000);
    }
}
