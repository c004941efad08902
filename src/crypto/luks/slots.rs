//! The master key in and out of key slots, and new headers: LUKS On-Disk Format Specification 1.2.3, sections 4.1 to 4.4.

use std::ops::Range;

use super::cost::{Budget, Iterations, too_many};
use super::layout::{ACTIVE, DIGEST, INACTIVE, LuksFields, SALT, SlotFields};
use super::{LuksError, LuksHeader, LuksPlan, SECTOR, STRIPES, material_sectors, split};
use crate::crypto::{KeyBytes, SectorCipher};

/// A new header, and what is to be written behind it.
#[derive(Debug)]
pub struct NewVolume {
    /// The header.
    pub header: LuksHeader,
    /// Where the key material of its first slot goes, in bytes from the header.
    pub material_at: u64,
    /// That key material.
    pub material: Vec<u8>,
    /// The master key.
    pub key: KeyBytes,
}

impl LuksPlan {
    /// Makes a header with a new master key, which the passphrase opens by its first slot. `uuid` is a UUID as text.
    pub fn make(&self, uuid: &str, passphrase: &[u8]) -> Result<NewVolume, LuksError> {
        let mut header = self.header(uuid)?;
        let key = random(self.spec.key_bytes())?;
        SectorCipher::new(self.spec, &key)?;
        let iterations = Iterations::measure(self.hash, key.len(), DIGEST, self.time)?;
        header.fields.salt.copy_from_slice(&random(SALT)?);
        header.fields.iterations = iterations.digest.into();
        let digest = header.digest(&key);
        header.fields.digest.copy_from_slice(&digest);
        let material = header.fill_slot(0, &key, passphrase, iterations.slot)?;
        Ok(NewVolume { material_at: header.material(0).start, header, material, key })
    }
}

impl LuksHeader {
    /// The master key, by the first slot that the passphrase opens. `read` fills a buffer from that offset on, in bytes
    /// from the header's start.
    pub fn unlock<E: From<LuksError>>(
        &self,
        passphrase: &[u8],
        read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<KeyBytes, E> {
        let mut found = None;
        let fault = self.try_slots(passphrase, read, &mut |_, key| {
            found = Some(key);
            false
        })?;
        found.ok_or_else(|| fault.into())
    }

    /// The slots that the passphrase opens. Those whose cost is too high are not tried: an error where none opens.
    pub fn opened_by<E: From<LuksError>>(
        &self,
        passphrase: &[u8],
        read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Vec<usize>, E> {
        let mut found = Vec::new();
        let fault = self.try_slots(passphrase, read, &mut |index, _| {
            found.push(index);
            true
        })?;
        match fault {
            LuksError::TooManyIterations { .. } if found.is_empty() => Err(fault.into()),
            _ => Ok(found),
        }
    }

    /// Tries the active slots one after the other; `found` says whether to go on. Gives why none may have been found.
    fn try_slots<E: From<LuksError>>(
        &self,
        passphrase: &[u8],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
        found: &mut dyn FnMut(usize, KeyBytes) -> bool,
    ) -> Result<LuksError, E> {
        // Refused before minutes are spent.
        let mut fault = LuksError::Passphrase;
        SectorCipher::new(self.spec, &vec![0; self.key_bytes()]).map_err(LuksError::from)?;
        let mut budget = Budget::default();
        for (index, slot) in self.fields.slots.iter().enumerate() {
            if slot.active.get() != ACTIVE {
                continue;
            }
            let iterations = [(slot.iterations.get(), self.key_bytes()), (self.iterations(), DIGEST)];
            if let Some((many, _)) = iterations.into_iter().find(|(n, len)| !budget.take(self.hash, *n, *len)) {
                fault = too_many(self.hash, many);
                continue;
            }
            let place = self.material(index);
            let mut stripes = KeyBytes::from(vec![0; usize::try_from(place.end - place.start).unwrap_or(0)]);
            read(place.start, &mut stripes)?;
            let key = self.open_slot(slot, passphrase, &mut stripes)?;
            if self.digest(&key)[..] == self.fields.digest && !found(index, key) {
                break;
            }
        }
        Ok(fault)
    }

    /// What encrypts the payload, by the master key.
    pub fn cipher(&self, key: &[u8]) -> Result<SectorCipher, LuksError> {
        Ok(SectorCipher::new(self.spec, key)?)
    }

    /// Where the key material of a slot lies, in bytes from the header's start: whole sectors.
    pub fn material(&self, index: usize) -> Range<u64> {
        let start = self.fields.slots.get(index).map_or(0, |slot| u64::from(slot.material.get())) * SECTOR;
        start..start + material_sectors(self.key_bytes() as u64) * SECTOR
    }

    /// The cipher of a slot's key material.
    fn slot_cipher(&self, slot: &SlotFields, passphrase: &[u8]) -> Result<SectorCipher, LuksError> {
        let key = self.hash.derive(passphrase, &slot.salt, slot.iterations.get(), self.key_bytes());
        Ok(SectorCipher::new(self.spec, &key)?)
    }

    /// What comes out of a slot: the master key, if the passphrase is the right one.
    fn open_slot(&self, slot: &SlotFields, passphrase: &[u8], stripes: &mut [u8]) -> Result<KeyBytes, LuksError> {
        self.slot_cipher(slot, passphrase)?.decrypt(0, stripes)?;
        let len = self.key_bytes() * usize::try_from(STRIPES).unwrap_or(0);
        Ok(split::merge(self.hash, &stripes[..len.min(stripes.len())], self.key_bytes()))
    }

    /// Puts the master key under a passphrase into a slot. What is returned is to be written to [`Self::material`].
    pub fn fill_slot(
        &mut self,
        index: usize,
        key: &[u8],
        passphrase: &[u8],
        iterations: u32,
    ) -> Result<Vec<u8>, LuksError> {
        let place = self.material(index);
        let mut stripes = random(usize::try_from(place.end - place.start).unwrap_or(0))?;
        let used = key.len() * usize::try_from(STRIPES).unwrap_or(0);
        stripes[used..].fill(0);
        split::split(self.hash, key, &mut stripes[..used]);
        let Some(slot) = self.fields.slots.get_mut(index) else {
            return Err(LuksError::Header(format!("there is no key slot {index}")));
        };
        slot.active = ACTIVE.into();
        slot.iterations = iterations.into();
        slot.salt.copy_from_slice(&random(SALT)?);
        let slot = *slot;
        self.slot_cipher(&slot, passphrase)?.encrypt(0, &mut stripes)?;
        Ok(std::mem::take(&mut *stripes))
    }

    /// Empties a slot. Its key material, at [`Self::material`], is then to be written over.
    pub fn erase_slot(&mut self, index: usize) {
        if let Some(slot) = self.fields.slots.get_mut(index) {
            slot.active = INACTIVE.into();
            slot.iterations = 0.into();
            slot.salt.fill(0);
        }
    }

    /// What its key material is to be written over with.
    pub fn noise(&self, index: usize) -> Result<Vec<u8>, LuksError> {
        let place = self.material(index);
        Ok(std::mem::take(&mut *random(usize::try_from(place.end - place.start).unwrap_or(0))?))
    }

    /// The iterations of a slot that take so many milliseconds, measured.
    pub fn slot_iterations(&self, milliseconds: u64) -> Result<u32, LuksError> {
        Ok(Iterations::measure(self.hash, self.key_bytes(), DIGEST, milliseconds)?.slot)
    }

    /// What tells the master key from others.
    fn digest(&self, key: &[u8]) -> KeyBytes {
        let LuksFields { salt, iterations, .. } = &self.fields;
        self.hash.derive(key, salt, iterations.get(), DIGEST)
    }
}

/// Bytes that nobody can guess.
fn random(len: usize) -> Result<KeyBytes, LuksError> {
    let mut bytes = KeyBytes::from(vec![0; len]);
    getrandom::fill(&mut bytes).map_err(|error| LuksError::Random(error.to_string()))?;
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::crypto::luks::HEADER;
    use crate::crypto::{CipherAlgorithm, CipherMode, CipherSpec, HashAlgorithm, IvGenerator};

    const UUID: &str = "12345678-1234-4234-8234-123456789abc";

    fn plan(cipher: CipherAlgorithm, mode: CipherMode) -> LuksPlan {
        let spec = CipherSpec { cipher, mode, iv: IvGenerator::Plain64 };
        LuksPlan { spec, idle_hash: None, hash: HashAlgorithm::Sha256, time: 0, detached: false }
    }

    /// A volume's header and key material in memory.
    struct Volume(Vec<u8>);

    impl Volume {
        fn of(new: &NewVolume) -> Self {
            let mut volume = Self(vec![0; usize::try_from(new.header.payload()).unwrap()]);
            volume.write(0, new.header.bytes());
            volume.write(new.material_at, &new.material);
            volume
        }

        fn write(&mut self, at: u64, bytes: &[u8]) {
            let at = usize::try_from(at).unwrap();
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn header(&self) -> Result<LuksHeader, LuksError> {
            LuksHeader::parse(self.0.first_chunk::<HEADER>().unwrap(), false)
        }

        fn unlock(&self, passphrase: &[u8]) -> Result<KeyBytes, LuksError> {
            self.header()?.unlock(passphrase, |at, buf| {
                let at = usize::try_from(at).unwrap();
                buf.copy_from_slice(&self.0[at..at + buf.len()]);
                Ok(())
            })
        }
    }

    #[test]
    fn a_new_header_opens_with_its_passphrase_alone() {
        for (cipher, mode, payload) in [
            (CipherAlgorithm::AES_256, CipherMode::Xts, 4040),
            (CipherAlgorithm::AES_128, CipherMode::Cbc, 1032),
            (CipherAlgorithm::parse("aes-192").unwrap(), CipherMode::Cbc, 1544),
            (CipherAlgorithm::parse("cast5-128").unwrap(), CipherMode::Ecb, 1032),
        ] {
            let new = plan(cipher, mode).make(UUID, b"open sesame").unwrap();
            assert_eq!(new.header.payload(), payload * SECTOR);
            let volume = Volume::of(&new);
            assert_eq!(volume.header().unwrap().uuid(), UUID);
            let key = volume.unlock(b"open sesame").unwrap();
            let (mut one, mut other) = ([7; 512], [7; 512]);
            SectorCipher::new(*new.header.spec(), &new.key).unwrap().encrypt(9, &mut one).unwrap();
            SectorCipher::new(*new.header.spec(), &key).unwrap().encrypt(9, &mut other).unwrap();
            assert_eq!(one, other);
            assert_eq!(volume.unlock(b"open").unwrap_err(), LuksError::Passphrase);
        }
    }

    #[test]
    fn keys_are_not_shown() {
        let new = plan(CipherAlgorithm::AES_128, CipherMode::Cbc).make(UUID, b"first").unwrap();
        let shown = format!("{new:?}");
        assert!(
            shown.contains("key: KeyBytes") && !shown.contains(&format!("{:?}", &new.key[..4]).replace(['[', ']'], ""))
        );
    }

    #[test]
    fn any_slot_opens_and_an_erased_one_does_not() {
        let new = plan(CipherAlgorithm::AES_128, CipherMode::Xts).make(UUID, b"first").unwrap();
        let mut volume = Volume::of(&new);
        let (key, mut header) = (volume.unlock(b"first").unwrap(), volume.header().unwrap());
        let material = header.fill_slot(7, &key, b"last", 1000).unwrap();
        volume.write(header.material(7).start, &material);
        header.erase_slot(0);
        volume.write(0, header.bytes());
        assert_eq!(volume.unlock(b"last").unwrap(), key);
        assert_eq!(volume.unlock(b"first").unwrap_err(), LuksError::Passphrase);
    }

    #[test]
    fn a_slot_that_would_take_hours_is_left_out() {
        let new = plan(CipherAlgorithm::AES_128, CipherMode::Cbc).make(UUID, b"first").unwrap();
        let mut volume = Volume::of(&new);
        let (key, mut header) = (volume.unlock(b"first").unwrap(), volume.header().unwrap());
        header.fields.slots[0].iterations = u32::MAX.into();
        volume.write(0, header.bytes());
        assert_eq!(volume.unlock(b"first").unwrap_err(), too_many(HashAlgorithm::Sha256, u32::MAX));
        let material = header.fill_slot(3, &key, b"other", 1000).unwrap();
        volume.write(header.material(3).start, &material);
        volume.write(0, header.bytes());
        assert_eq!(volume.unlock(b"other").unwrap(), key);
    }
}
