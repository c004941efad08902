//! The ciphers, modes and generators of initialization vectors by name, and what goes with what.
//!
//! Names are those of the reference's options. In a LUKS header (LUKS On-Disk Format Specification 1.2.3, table 4 and
//! following) a cipher's name stands without its key size: see [`CipherAlgorithm::family`].

use std::fmt;

use super::modes::CipherFunctions;
use super::{CryptoError, HashAlgorithm, Result};

/// A block cipher with its key size: a row of the table.
#[derive(Clone, Copy)]
pub struct CipherAlgorithm(&'static CipherFacts);

/// What is known of a cipher.
struct CipherFacts {
    name: &'static str,
    /// In a LUKS header; `None` where the reference has none for it.
    family: Option<&'static str>,
    /// In the reference's texts.
    title: &'static str,
    key: usize,
    block: usize,
    /// `None` where it is known by name alone.
    functions: Option<CipherFunctions>,
}

const fn row(
    name: &'static str,
    family: Option<&'static str>,
    title: &'static str,
    [key, block]: [usize; 2],
    functions: Option<CipherFunctions>,
) -> CipherFacts {
    CipherFacts { name, family, title, key, block, functions }
}

const CIPHERS: &[CipherFacts] = &[
    row("aes-128", Some("aes"), "AES", [16, 16], Some(CipherFunctions::wide::<aes::Aes128>())),
    row("aes-192", Some("aes"), "AES", [24, 16], Some(CipherFunctions::wide::<aes::Aes192>())),
    row("aes-256", Some("aes"), "AES", [32, 16], Some(CipherFunctions::wide::<aes::Aes256>())),
    row("des", None, "DES", [8, 8], None),
    row("3des", None, "3DES", [24, 8], None),
    row("cast5-128", Some("cast5"), "CAST5", [16, 8], Some(CipherFunctions::narrow::<cast5::Cast5>())),
    row("serpent-128", Some("serpent"), "Serpent", [16, 16], Some(CipherFunctions::wide::<serpent::Serpent>())),
    row("serpent-192", Some("serpent"), "Serpent", [24, 16], Some(CipherFunctions::wide::<serpent::Serpent>())),
    row("serpent-256", Some("serpent"), "Serpent", [32, 16], Some(CipherFunctions::wide::<serpent::Serpent>())),
    row("twofish-128", Some("twofish"), "Twofish", [16, 16], Some(CipherFunctions::wide::<twofish::Twofish>())),
    row("twofish-192", Some("twofish"), "Twofish", [24, 16], Some(CipherFunctions::wide::<twofish::Twofish>())),
    row("twofish-256", Some("twofish"), "Twofish", [32, 16], Some(CipherFunctions::wide::<twofish::Twofish>())),
    row("sm4", None, "SM4", [16, 16], None),
];

impl fmt::Debug for CipherAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Names are unique.
impl PartialEq for CipherAlgorithm {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for CipherAlgorithm {}

/// The row with that name, which is there.
const fn named(name: &str) -> CipherAlgorithm {
    let mut n = 0;
    while !same(CIPHERS[n].name.as_bytes(), name.as_bytes()) {
        n += 1;
    }
    CipherAlgorithm(&CIPHERS[n])
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut n = 0;
    while n < a.len() && n < b.len() && a[n] == b[n] {
        n += 1;
    }
    n == a.len() && n == b.len()
}

impl CipherAlgorithm {
    /// AES with a key of 128 bits.
    pub const AES_128: Self = named("aes-128");
    /// AES with a key of 256 bits.
    pub const AES_256: Self = named("aes-256");

    /// The names of all of them.
    pub const NAMES: [&'static str; CIPHERS.len()] = {
        let (mut names, mut n) = ([""; CIPHERS.len()], 0);
        while n < names.len() {
            names[n] = CIPHERS[n].name;
            n += 1;
        }
        names
    };

    /// All of them, those too that are known by name alone.
    pub fn all() -> impl Iterator<Item = Self> {
        CIPHERS.iter().map(Self)
    }

    /// The cipher with that name: `aes-256`.
    pub fn parse(name: &str) -> Option<Self> {
        Self::all().find(|cipher| cipher.name() == name)
    }

    /// The cipher that a LUKS header means: `aes` and the bytes of a key.
    pub fn of_family(family: &str, key: usize) -> Option<Self> {
        Self::all().find(|cipher| cipher.0.family == Some(family) && cipher.0.key == key)
    }

    /// What computes it; refused where nothing does.
    pub(super) fn functions(self) -> Result<&'static CipherFunctions> {
        self.0.functions.as_ref().ok_or(CryptoError::Unsupported(self.0.name))
    }

    /// Its name: `aes-256`.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// Its name in a LUKS header, `aes`; refused where there is none.
    pub fn family(self) -> Result<&'static str> {
        self.0.family.ok_or(CryptoError::Unsupported(self.name()))
    }

    /// Bytes of a key.
    pub fn key_bytes(self) -> usize {
        self.0.key
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.0.block
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
    /// The names of all of them.
    pub const NAMES: [&'static str; MODES.len()] = {
        let (mut names, mut n) = ([""; MODES.len()], 0);
        while n < names.len() {
            names[n] = MODES[n].1;
            n += 1;
        }
        names
    };

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
        Self { cipher: CipherAlgorithm::AES_128, mode: CipherMode::Cbc, iv: IvGenerator::Plain64 };

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
        let facts = self.cipher.0;
        let no_generator = CryptoError::Generator { cipher: facts.name, generator: self.iv.name() };
        let Some(hash) = self.iv.hash() else { return Err(no_generator) };
        let bytes = hash.digest_bytes();
        let cipher = facts.family.and_then(|family| CipherAlgorithm::of_family(family, bytes));
        // A family of one cipher is told from one that has others, as the reference does.
        let alone = CIPHERS.iter().filter(|other| other.family == facts.family).count() == 1;
        cipher.ok_or(if alone { no_generator } else { CryptoError::EssivKey { family: facts.title, bytes } })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_what_they_name() {
        for cipher in CipherAlgorithm::all() {
            assert_eq!(CipherAlgorithm::parse(cipher.name()), Some(cipher));
        }
        for mode in CipherMode::all() {
            assert_eq!(CipherMode::parse(mode.name()), Some(mode));
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_in_the_references_words() {
        use HashAlgorithm::{Md5, Sha1, Sha256};
        let check = |cipher, mode, iv| {
            let cipher = CipherAlgorithm::parse(cipher).unwrap();
            CipherSpec { cipher, mode, iv }.check().map_or_else(|error| error.to_string(), |()| String::new())
        };
        assert_eq!(check("aes-128", CipherMode::Cbc, IvGenerator::Essiv(Sha256)), "");
        assert_eq!(check("3des", CipherMode::Cbc, IvGenerator::Plain), "Algorithm '3des' not supported");
        assert_eq!(check("sm4", CipherMode::Cbc, IvGenerator::Plain), "Algorithm 'sm4' not supported");
        assert_eq!(check("cast5-128", CipherMode::Xts, IvGenerator::Plain64), "Unsupported cipher mode xts");
        assert_eq!(check("cast5-128", CipherMode::Cbc, IvGenerator::Essiv(Md5)), "");
        assert_eq!(check("cast5-128", CipherMode::Xts, IvGenerator::Essiv(Md5)), "Unsupported cipher mode xts");
        assert_eq!(
            check("cast5-128", CipherMode::Xts, IvGenerator::Essiv(Sha256)),
            "Cipher cast5-128 not supported with essiv"
        );
        assert_eq!(
            check("serpent-256", CipherMode::Cbc, IvGenerator::Essiv(Sha1)),
            "No Serpent cipher with key size 20 available"
        );
        assert_eq!(check("aes-256", CipherMode::Xts, IvGenerator::Plain64), "");
    }
}
