//! The cipher of a layer whose sectors are encrypted each on its own, numbered as they lie on the guest's disk or in the
//! file.
//!
//! The legacy encryption of qcow, and of qcow2 with `crypt_method` 1, is AES-128 in CBC mode; source: the published qcow2
//! specification, sections "Header" and "Data encryption". Its key is the passphrase itself, cut off, or filled up with
//! zeros, to 16 bytes. There is nothing by which a wrong one is noticed.

use std::num::NonZero;
use std::sync::Arc;

use crate::block::{Cipher, Error, GuestOffset, HostOffset, Result, SecretBytes};
use crate::crypto::{self, SECTOR, SectorCipher};

const SECTOR_BYTES: NonZero<u32> = NonZero::new(SECTOR as u32).unwrap();

/// See the module.
#[derive(Debug, Clone)]
pub struct ImageCipher {
    cipher: Arc<SectorCipher>,
    by_guest: bool,
}

impl ImageCipher {
    /// The legacy encryption with that passphrase.
    pub fn legacy_aes(passphrase: &SecretBytes) -> Result<Self> {
        let cipher = SectorCipher::legacy_aes(passphrase.get());
        Ok(Self::by_guest(cipher.map_err(|error| Error::unsupported(error.to_string()))?))
    }

    /// Sectors are numbered as they lie on the guest's disk.
    pub fn by_guest(cipher: SectorCipher) -> Self {
        Self { cipher: Arc::new(cipher), by_guest: true }
    }

    /// Sectors are numbered as they lie in the file.
    pub fn by_host(cipher: SectorCipher) -> Self {
        Self { cipher: Arc::new(cipher), by_guest: false }
    }

    fn sector_of(&self, guest: GuestOffset, host: HostOffset) -> Result<u64> {
        sector(if self.by_guest { guest.get() } else { host.get() })
    }
}

/// The number of the sector that starts there, and the error for what is none.
fn sector(at: u64) -> Result<u64> {
    let sector = SECTOR as u64;
    if at.is_multiple_of(sector) { Ok(at / sector) } else { Err(Error::invalid(format!("no sector starts at {at}"))) }
}

fn told(error: crypto::CryptoError) -> Error {
    Error::invalid(error.to_string())
}

impl Cipher for ImageCipher {
    fn sector(&self) -> NonZero<u32> {
        SECTOR_BYTES
    }

    fn decrypt(&self, guest: GuestOffset, host: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.cipher.decrypt(self.sector_of(guest, host)?, buf).map_err(told)
    }

    fn encrypt(&self, guest: GuestOffset, host: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.cipher.encrypt(self.sector_of(guest, host)?, buf).map_err(told)
    }
}
