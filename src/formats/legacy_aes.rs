//! The encryption of qcow, and of qcow2 with `crypt_method` 1: AES-128 in CBC mode, each sector of 512 bytes on its own,
//! with the sector's number on the guest's disk as its initialisation vector.
//!
//! Source: the published qcow2 specification, sections "Header" and "Data encryption". The key is the passphrase
//! itself, cut off, or filled up with zeros, to 16 bytes. There is nothing by which a wrong one is noticed.

use std::num::NonZero;
use std::sync::Arc;

use crate::block::{Cipher, Error, GuestOffset, HostOffset, Result, SecretBytes};
use crate::crypto::{self, SECTOR, SectorCipher};

const SECTOR_BYTES: NonZero<u32> = NonZero::new(SECTOR as u32).unwrap();

/// See the module.
#[derive(Debug, Clone)]
pub struct LegacyAes(Arc<SectorCipher>);

impl LegacyAes {
    /// With that passphrase.
    pub fn new(passphrase: &SecretBytes) -> Result<Self> {
        let cipher = SectorCipher::legacy_aes(passphrase.get());
        Ok(Self(Arc::new(cipher.map_err(|error| Error::unsupported(error.to_string()))?)))
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

impl Cipher for LegacyAes {
    fn sector(&self) -> NonZero<u32> {
        SECTOR_BYTES
    }

    fn decrypt(&self, guest: GuestOffset, _host: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.0.decrypt(sector(guest.get())?, buf).map_err(told)
    }

    fn encrypt(&self, guest: GuestOffset, _host: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.0.encrypt(sector(guest.get())?, buf).map_err(told)
    }
}
