//! Encryption: bytes in, bytes out; no files.
//!
//! [`spec`] is the table of ciphers, modes and generators of initialization vectors; [`hash`] that of hashes and what is
//! made with them; [`digest`] makes digests of disks; [`SectorCipher`] encrypts and decrypts runs of sectors, as images are stored. [`luks`] is the header
//! that keeps a key under passphrases.
//!
//! Invariants: key bytes and what is derived from them are wiped when they are dropped. An algorithm that no kept crate
//! offers is refused by its name.

pub mod digest;
pub mod hash;
pub mod luks;
mod modes;
mod sectors;
pub mod spec;

pub use digest::{Digest, DigestKind, Hasher};
pub use hash::HashAlgorithm;
pub use modes::SECTOR;
pub use sectors::{SectorCipher, decrypt_cbc, encrypt_cbc};
pub use spec::{CipherAlgorithm, CipherMode, CipherSpec, IvGenerator};

/// Key bytes, shown nowhere, and wiped when they are dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyBytes(zeroize::Zeroizing<Vec<u8>>);

impl From<Vec<u8>> for KeyBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

impl std::ops::Deref for KeyBytes {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

impl std::ops::DerefMut for KeyBytes {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

impl std::fmt::Debug for KeyBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyBytes")
    }
}

/// What cannot be encrypted or decrypted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CryptoError {
    /// Known by name, but there is nothing that computes it.
    #[error("Algorithm '{0}' not supported")]
    Unsupported(&'static str),
    /// The mode does not go with the cipher.
    #[error("Unsupported cipher mode {0}")]
    Mode(&'static str),
    /// The generator of initialization vectors does not go with the cipher.
    #[error("Cipher {cipher} not supported with {generator}")]
    Generator {
        /// The cipher.
        cipher: &'static str,
        /// The generator.
        generator: &'static str,
    },
    /// The hash of a generator gives no key that the cipher can have.
    #[error("No {family} cipher with key size {bytes} available")]
    EssivKey {
        /// The ciphers that were looked through.
        family: &'static str,
        /// Bytes that the hash gives.
        bytes: usize,
    },
    /// The key is not as long as the cipher and mode want it.
    #[error("a key of {given} bytes for {cipher} in mode {mode}, which takes {wanted}")]
    KeyLength {
        /// The cipher.
        cipher: &'static str,
        /// The mode.
        mode: &'static str,
        /// Bytes of the key.
        given: usize,
        /// Bytes that it takes.
        wanted: usize,
    },
    /// What is given is not whole sectors, or not whole blocks of the cipher.
    #[error("encrypted data of {0} bytes is not whole blocks")]
    Length(usize),
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, CryptoError>;
