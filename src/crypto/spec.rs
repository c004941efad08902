//! The ciphers, modes and generators of initialization vectors by name, and what goes with what.
//!
//! Names are those of the reference's options. In a LUKS header (LUKS On-Disk Format Specification 1.2.3, table 4 and
//! following) a cipher's name stands without its key size: see [`CipherAlgorithm::family`].

use super::{CryptoError, HashAlgorithm, Result};

/// A block cipher with its key size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum CipherAlgorithm {
    Aes128,
    Aes192,
    Aes256,
    Des,
    TripleDes,
    Cast5,
    Serpent128,
    Serpent192,
    Serpent256,
    Twofish128,
    Twofish192,
    Twofish256,
    Sm4,
}

/// What is known of a cipher.
struct CipherFacts {
    cipher: CipherAlgorithm,
    name: &'static str,
    /// In a LUKS header; `None` where the reference has none for it.
    family: Option<&'static str>,
    /// In the reference's texts.
    title: &'static str,
    key: usize,
    block: usize,
}

const fn row(
    cipher: CipherAlgorithm,
    name: &'static str,
    family: Option<&'static str>,
    title: &'static str,
    key: usize,
    block: usize,
) -> CipherFacts {
    CipherFacts { cipher, name, family, title, key, block }
}

const CIPHERS: &[CipherFacts] = &[
    row(CipherAlgorithm::Aes128, "aes-128", Some("aes"), "AES", 16, 16),
    row(CipherAlgorithm::Aes192, "aes-192", Some("aes"), "AES", 24, 16),
    row(CipherAlgorithm::Aes256, "aes-256", Some("aes"), "AES", 32, 16),
    row(CipherAlgorithm::Des, "des", None, "DES", 8, 8),
    row(CipherAlgorithm::TripleDes, "3des", None, "3DES", 24, 8),
    row(CipherAlgorithm::Cast5, "cast5-128", Some("cast5"), "CAST5", 16, 8),
    row(CipherAlgorithm::Serpent128, "serpent-128", Some("serpent"), "Serpent", 16, 16),
    row(CipherAlgorithm::Serpent192, "serpent-192", Some("serpent"), "Serpent", 24, 16),
    row(CipherAlgorithm::Serpent256, "serpent-256", Some("serpent"), "Serpent", 32, 16),
    row(CipherAlgorithm::Twofish128, "twofish-128", Some("twofish"), "Twofish", 16, 16),
    row(CipherAlgorithm::Twofish192, "twofish-192", Some("twofish"), "Twofish", 24, 16),
    row(CipherAlgorithm::Twofish256, "twofish-256", Some("twofish"), "Twofish", 32, 16),
    row(CipherAlgorithm::Sm4, "sm4", None, "SM4", 16, 16),
];

impl CipherAlgorithm {
    /// All of them, those too that are known by name alone.
    pub fn all() -> impl Iterator<Item = Self> {
        CIPHERS.iter().map(|facts| facts.cipher)
    }

    /// The cipher with that name: `aes-256`.
    pub fn parse(name: &str) -> Option<Self> {
        CIPHERS.iter().find(|facts| facts.name == name).map(|facts| facts.cipher)
    }

    /// The cipher that a LUKS header means: `aes` and the bytes of a key.
    pub fn of_family(family: &str, key: usize) -> Option<Self> {
        CIPHERS.iter().find(|facts| facts.family == Some(family) && facts.key == key).map(|facts| facts.cipher)
    }

    fn facts(self) -> &'static CipherFacts {
        // The table has a row for each, in their order.
        &CIPHERS[self as usize]
    }

    /// Its name: `aes-256`.
    pub fn name(self) -> &'static str {
        self.facts().name
    }

    /// Its name in a LUKS header, `aes`; refused where there is none.
    pub fn family(self) -> Result<&'static str> {
        self.facts().family.ok_or(CryptoError::Unsupported(self.name()))
    }

    /// Bytes of a key.
    pub fn key_bytes(self) -> usize {
        self.facts().key
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.facts().block
    }
}

/// How blocks of a sector are chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CipherMode {
    /// Not at all.
    Ecb,
    /// Each with the one before (NIST SP 800-38A, 6.2).
    Cbc,
    /// By a tweak that goes on from block to block (IEEE 1619); the second half of the key is for the tweak.
    Xts,
    /// Encrypted counters (NIST SP 800-38A, 6.5).
    Ctr,
}

const MODES: [(CipherMode, &str); 4] =
    [(CipherMode::Ecb, "ecb"), (CipherMode::Cbc, "cbc"), (CipherMode::Xts, "xts"), (CipherMode::Ctr, "ctr")];

impl CipherMode {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        MODES.into_iter().map(|(mode, _)| mode)
    }

    /// The mode with that name.
    pub fn parse(name: &str) -> Option<Self> {
        MODES.into_iter().find(|(_, known)| *known == name).map(|(mode, _)| mode)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        MODES[self as usize].1
    }
}

/// How a sector's initialization vector comes from its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IvGenerator {
    /// The number's low 32 bits, little-endian.
    Plain,
    /// The number's 64 bits, little-endian.
    Plain64,
    /// The same, encrypted with the hash of the key.
    Essiv(HashAlgorithm),
}

/// Names of the generators.
pub const GENERATORS: [&str; 3] = ["plain", "plain64", "essiv"];

impl IvGenerator {
    /// The generator with that name; `None` too where it wants a hash that is not given.
    pub fn parse(name: &str, hash: Option<HashAlgorithm>) -> Option<Self> {
        match name {
            "plain" => Some(Self::Plain),
            "plain64" => Some(Self::Plain64),
            "essiv" => hash.map(Self::Essiv),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => GENERATORS[0],
            Self::Plain64 => GENERATORS[1],
            Self::Essiv(_) => GENERATORS[2],
        }
    }

    /// Its hash.
    pub fn hash(self) -> Option<HashAlgorithm> {
        match self {
            Self::Essiv(hash) => Some(hash),
            Self::Plain | Self::Plain64 => None,
        }
    }
}

/// All that says how sectors are encrypted, but for the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CipherSpec {
    /// The cipher.
    pub cipher: CipherAlgorithm,
    /// How blocks are chained.
    pub mode: CipherMode,
    /// Where initialization vectors come from.
    pub iv: IvGenerator,
}

impl CipherSpec {
    /// The reference's legacy encryption of qcow and qcow2: the passphrase is the key, cut or filled with zeros.
    pub const LEGACY_AES: Self =
        Self { cipher: CipherAlgorithm::Aes128, mode: CipherMode::Cbc, iv: IvGenerator::Plain64 };

    /// Bytes of a key: two keys of the cipher for [`CipherMode::Xts`].
    pub fn key_bytes(&self) -> usize {
        self.cipher.key_bytes() * if self.mode == CipherMode::Xts { 2 } else { 1 }
    }

    /// Refuses what does not go together, and what nothing computes.
    pub fn check(&self) -> Result<()> {
        self.cipher.family()?;
        if let IvGenerator::Essiv(_) = self.iv {
            self.essiv_cipher()?;
        }
        if self.mode == CipherMode::Xts && self.cipher.block_bytes() != 16 {
            return Err(CryptoError::Mode(self.mode.name()));
        }
        Ok(())
    }

    /// The cipher that encrypts initialization vectors: of the same family, with a key as long as what the hash gives.
    pub fn essiv_cipher(&self) -> Result<CipherAlgorithm> {
        let facts = self.cipher.facts();
        let Some(hash) = self.iv.hash().filter(|_| facts.block == 16) else {
            return Err(CryptoError::Generator { cipher: facts.name, generator: self.iv.name() });
        };
        let bytes = hash.digest_bytes();
        facts
            .family
            .and_then(|family| CipherAlgorithm::of_family(family, bytes))
            .ok_or(CryptoError::EssivKey { family: facts.title, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_in_the_order_of_what_they_list() {
        for (n, facts) in CIPHERS.iter().enumerate() {
            assert_eq!(facts.cipher as usize, n);
            assert_eq!(CipherAlgorithm::parse(facts.name), Some(facts.cipher));
        }
        for mode in CipherMode::all() {
            assert_eq!(CipherMode::parse(mode.name()), Some(mode));
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_in_the_references_words() {
        use CipherAlgorithm::{Aes128, Aes256, Cast5, Serpent256, Sm4, TripleDes};
        use HashAlgorithm::{Sha1, Sha256};
        let check = |cipher, mode, iv| {
            CipherSpec { cipher, mode, iv }.check().map_or_else(|error| error.to_string(), |()| String::new())
        };
        assert_eq!(check(Aes128, CipherMode::Cbc, IvGenerator::Essiv(Sha256)), "");
        assert_eq!(check(TripleDes, CipherMode::Cbc, IvGenerator::Plain), "Algorithm '3des' not supported");
        assert_eq!(check(Sm4, CipherMode::Cbc, IvGenerator::Plain), "Algorithm 'sm4' not supported");
        assert_eq!(check(Cast5, CipherMode::Xts, IvGenerator::Plain64), "Unsupported cipher mode xts");
        assert_eq!(
            check(Cast5, CipherMode::Xts, IvGenerator::Essiv(Sha256)),
            "Cipher cast5-128 not supported with essiv"
        );
        assert_eq!(
            check(Serpent256, CipherMode::Cbc, IvGenerator::Essiv(Sha1)),
            "No Serpent cipher with key size 20 available"
        );
        assert_eq!(check(Aes256, CipherMode::Xts, IvGenerator::Plain64), "");
    }
}
