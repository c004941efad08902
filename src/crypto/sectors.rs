//! Runs of encrypted sectors.
//!
//! The cipher, mode and generator are chosen once, when the key is set; what is called for each run is compiled for that
//! cipher. Sectors are worked on many at a time, so that the CPU has independent blocks to encrypt side by side, in the
//! modes that chain blocks too: sectors do not depend on each other.

use std::fmt;

use super::modes::{Ivs, SECTOR, SectorMode};
use super::{CipherAlgorithm, CipherMode, CipherSpec, CryptoError, IvGenerator, Result};

/// A cipher with its key, for sectors of [`SECTOR`] bytes.
pub struct SectorCipher {
    spec: CipherSpec,
    mode: Box<dyn SectorMode>,
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl SectorCipher {
    /// Sets the key, which has [`CipherSpec::key_bytes`] bytes.
    pub fn new(spec: CipherSpec, key: &[u8]) -> Result<Self> {
        spec.check()?;
        if key.len() != spec.key_bytes() {
            return Err(length(&spec, key));
        }
        let mode = keyed(&spec, key)?.ok_or_else(|| length(&spec, key))?;
        Ok(Self { spec, mode })
    }

    /// The legacy encryption of qcow and qcow2: the passphrase itself is the key, cut or filled with zeros.
    pub fn legacy_aes(passphrase: &[u8]) -> Result<Self> {
        let mut key = zeroize::Zeroizing::new([0; 16]);
        let used = passphrase.len().min(key.len());
        key[..used].copy_from_slice(&passphrase[..used]);
        Self::new(CipherSpec::LEGACY_AES, &*key)
    }

    /// How it encrypts.
    pub fn spec(&self) -> &CipherSpec {
        &self.spec
    }

    /// Encrypts whole sectors, the first of which has that number.
    pub fn encrypt(&self, first: u64, sectors: &mut [u8]) -> Result<()> {
        whole(sectors, SECTOR)?;
        self.mode.encrypt(first, sectors);
        Ok(())
    }

    /// Decrypts whole sectors, the first of which has that number.
    pub fn decrypt(&self, first: u64, sectors: &mut [u8]) -> Result<()> {
        whole(sectors, SECTOR)?;
        self.mode.decrypt(first, sectors);
        Ok(())
    }
}

/// Encrypts whole blocks in one chain of [`CipherMode::Cbc`].
pub fn encrypt_cbc(cipher: CipherAlgorithm, key: &[u8], iv: &[u8], blocks: &mut [u8]) -> Result<()> {
    whole_cbc(cipher, key, iv, blocks)?;
    (cipher.functions()?.cbc_encrypt)(key, iv, blocks)
}

/// Decrypts whole blocks in one chain of [`CipherMode::Cbc`].
pub fn decrypt_cbc(cipher: CipherAlgorithm, key: &[u8], iv: &[u8], blocks: &mut [u8]) -> Result<()> {
    whole_cbc(cipher, key, iv, blocks)?;
    (cipher.functions()?.cbc_decrypt)(key, iv, blocks)
}

fn whole_cbc(cipher: CipherAlgorithm, key: &[u8], iv: &[u8], blocks: &[u8]) -> Result<()> {
    let spec = CipherSpec { cipher, mode: CipherMode::Cbc, iv: IvGenerator::Plain };
    if key.len() != spec.key_bytes() {
        return Err(length(&spec, key));
    }
    if iv.len() != cipher.block_bytes() {
        return Err(CryptoError::Length(iv.len()));
    }
    whole(blocks, cipher.block_bytes())
}

fn whole(bytes: &[u8], of: usize) -> Result<()> {
    if bytes.len().is_multiple_of(of) { Ok(()) } else { Err(CryptoError::Length(bytes.len())) }
}

fn length(spec: &CipherSpec, key: &[u8]) -> CryptoError {
    let (cipher, mode) = (spec.cipher.name(), spec.mode.name());
    CryptoError::KeyLength { cipher, mode, given: key.len(), wanted: spec.key_bytes() }
}

/// The cipher with its key in its mode; `None` for a key of a length that it cannot have.
fn keyed(spec: &CipherSpec, key: &[u8]) -> Result<Option<Box<dyn SectorMode>>> {
    let functions = spec.cipher.functions()?;
    Ok(match spec.mode {
        CipherMode::Ecb => (functions.ecb)(key),
        CipherMode::Ctr => (functions.ctr)(key, ivs(spec, key)?),
        CipherMode::Cbc => (functions.cbc)(key, ivs(spec, key)?),
        CipherMode::Xts => {
            let xts = functions.xts.ok_or(CryptoError::Mode(spec.mode.name()))?;
            let (data, tweak) = key.split_at(key.len() / 2);
            xts(data, tweak, ivs(spec, key)?)
        }
    })
}

fn ivs(spec: &CipherSpec, key: &[u8]) -> Result<Ivs> {
    Ok(match spec.iv {
        IvGenerator::Plain => Ivs::Plain,
        IvGenerator::Plain64 => Ivs::Plain64,
        IvGenerator::Essiv(hash) => {
            let (cipher, salt) = (spec.essiv_cipher()?, hash.digest(&[key]));
            Ivs::Essiv((cipher.functions()?.encipher)(&salt).ok_or_else(|| length(spec, &salt))?)
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::crypto::HashAlgorithm;

    const FIRST: u64 = 0xffff_fffe;

    fn spec(cipher: &str, mode: &str, iv: &str) -> CipherSpec {
        let (iv, hash) = iv.split_once(':').map_or((iv, None), |(iv, hash)| (iv, HashAlgorithm::parse(hash)));
        CipherSpec {
            cipher: CipherAlgorithm::parse(cipher).unwrap(),
            mode: CipherMode::parse(mode).unwrap(),
            iv: IvGenerator::parse(iv, hash).unwrap(),
        }
    }

    fn plain() -> Vec<u8> {
        (0..20 * SECTOR).map(|n| (n * 7 + n / SECTOR) as u8).collect()
    }

    fn set(spec: CipherSpec) -> SectorCipher {
        let key: Vec<u8> = (1..=64).collect();
        SectorCipher::new(spec, &key[..spec.key_bytes()]).unwrap()
    }

    /// What another implementation (Python's `cryptography`) makes of the same sectors, key and numbers: the start of
    /// the SHA-256 of it.
    #[test]
    fn sectors_are_encrypted_as_others_do() {
        for (cipher, mode, iv, digest) in [
            ("aes-128", "xts", "plain64", "efde59cd5c3802d0"),
            ("aes-256", "xts", "plain", "d663f26c823053a3"),
            ("aes-256", "xts", "plain64", "b13aa1af03cb3b79"),
            ("aes-256", "xts", "essiv:md5", "3f92984e9335f73e"),
            ("aes-128", "cbc", "plain64", "2bf4290eb7b57818"),
            ("aes-256", "cbc", "essiv:sha256", "ebb028952a73c2c1"),
            ("aes-192", "cbc", "plain", "d4b52a52ecab2fe5"),
            ("aes-256", "ctr", "plain64", "735000bcd7c5d368"),
            ("aes-192", "ctr", "plain", "2064627841c4f0bb"),
            ("aes-256", "ecb", "plain", "73b973d91df0e1a8"),
            ("cast5-128", "cbc", "plain64", "fd23cd0391df2213"),
            ("cast5-128", "cbc", "plain", "33d6f88d54a410cd"),
            ("cast5-128", "ctr", "plain64", "5351255cc1276a59"),
            ("cast5-128", "ecb", "plain", "ba5cd305dcb91b95"),
        ] {
            let mut sectors = plain();
            set(spec(cipher, mode, iv)).encrypt(FIRST, &mut sectors).unwrap();
            let found = HashAlgorithm::Sha256.digest(&[&sectors]);
            let found: String = found[..8].iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(found, digest, "{cipher} {mode} {iv}");
        }
    }

    #[test]
    fn what_is_encrypted_is_decrypted_from_any_sector_on() {
        let mut tried = 0;
        for cipher in CipherAlgorithm::all() {
            for mode in CipherMode::all() {
                for iv in [
                    IvGenerator::Plain,
                    IvGenerator::Plain64,
                    IvGenerator::Essiv(HashAlgorithm::Md5),
                    IvGenerator::Essiv(HashAlgorithm::Sha256),
                ] {
                    let spec = CipherSpec { cipher, mode, iv };
                    if spec.check().is_err() {
                        continue;
                    }
                    let (set, mut sectors) = (set(spec), plain());
                    set.encrypt(FIRST, &mut sectors[..7 * SECTOR]).unwrap();
                    set.encrypt(FIRST + 7, &mut sectors[7 * SECTOR..]).unwrap();
                    assert_ne!(sectors, plain());
                    set.decrypt(FIRST, &mut sectors).unwrap();
                    assert!(sectors == plain(), "{spec:?}");
                    tried += 1;
                }
            }
        }
        // Short blocks do without one mode, and their cipher has no keys of 256 bits for vectors.
        let kept = CipherAlgorithm::all().filter(|cipher| cipher.functions().is_ok());
        let wanted: i32 = kept.map(|cipher| if cipher.block_bytes() == 16 { 4 * 4 } else { 3 * 3 }).sum();
        assert_eq!(tried, wanted);
    }

    #[test]
    fn a_legacy_key_is_the_passphrase_cut_or_filled() {
        let sealed = |cipher: SectorCipher| {
            let mut sectors = plain();
            cipher.encrypt(1, &mut sectors).unwrap();
            sectors
        };
        let spec = CipherSpec::LEGACY_AES;
        let short = SectorCipher::new(spec, b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0").unwrap();
        assert!(sealed(SectorCipher::legacy_aes(b"abc").unwrap()) == sealed(short));
        let long = SectorCipher::new(spec, b"0123456789abcdef").unwrap();
        assert!(sealed(SectorCipher::legacy_aes(b"0123456789abcdefgh").unwrap()) == sealed(long));
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    /// IEEE 1619-2007, annex B, vectors 4 (sector 0) and 10 (sector 0xff).
    #[test]
    fn sectors_of_the_standard_for_xts() {
        for (cipher, key, sector, start, end) in [
            (
                "aes-128",
                "2718281828459045235360287471352631415926535897932384626433832795",
                0,
                "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
                "eb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568",
            ),
            (
                "aes-256",
                "2718281828459045235360287471352662497757247093699959574966967627\
                 3141592653589793238462643383279502884197169399375105820974944592",
                0xff,
                "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
                "773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151",
            ),
        ] {
            let mut bytes: Vec<u8> = (0..SECTOR).map(|n| n as u8).collect();
            let cipher = SectorCipher::new(spec(cipher, "xts", "plain64"), &hex(key)).unwrap();
            cipher.encrypt(sector, &mut bytes).unwrap();
            assert_eq!(bytes[..32], hex(start), "sector {sector:x}");
            assert!(bytes.ends_with(&hex(end)), "sector {sector:x}");
        }
    }

    /// NIST SP 800-38A, F.2.5.
    #[test]
    fn one_chain_of_cbc() {
        let key = hex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4");
        let iv = hex("000102030405060708090a0b0c0d0e0f");
        let plain = hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51");
        let mut bytes = plain.clone();
        encrypt_cbc(CipherAlgorithm::AES_256, &key, &iv, &mut bytes).unwrap();
        assert_eq!(bytes, hex("f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d"));
        decrypt_cbc(CipherAlgorithm::AES_256, &key, &iv, &mut bytes).unwrap();
        assert_eq!(bytes, plain);
        let long: Vec<u8> = (0..65 * 16).map(|n| n as u8).collect();
        let mut bytes = long.clone();
        let cast5 = CipherAlgorithm::parse("cast5-128").unwrap();
        encrypt_cbc(cast5, &key[..16], &iv[..8], &mut bytes).unwrap();
        decrypt_cbc(cast5, &key[..16], &iv[..8], &mut bytes).unwrap();
        assert_eq!(bytes, long);
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let wanted = CryptoError::KeyLength { cipher: "aes-256", mode: "xts", given: 32, wanted: 64 };
        assert_eq!(SectorCipher::new(spec("aes-256", "xts", "plain"), &[0; 32]).unwrap_err(), wanted);
        let set = set(spec("aes-256", "xts", "plain"));
        assert_eq!(set.encrypt(0, &mut [0; 100]), Err(CryptoError::Length(100)));
        let chain = |key: &[u8], iv: &[u8], len| decrypt_cbc(CipherAlgorithm::AES_256, key, iv, &mut vec![0; len]);
        assert!(chain(&[0; 16], &[0; 16], 16).is_err());
        assert!(chain(&[0; 32], &[0; 8], 16).is_err());
        assert!(chain(&[0; 32], &[0; 16], 17).is_err());
    }
}
