//! The two headers, of which the newer whole one counts, and how they change: the other one is written, with a greater
//! number, between two flushes ([MS-VHDX], section 2.2.2).

use std::mem::offset_of;

use zerocopy::IntoBytes;

use super::layout::{Guid, HEADERS, Header, MIB, seal};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::storage::Storage;

/// The header that counts, and which of the two it is.
#[derive(Debug, Clone)]
pub struct Headers {
    /// As it is in the file.
    pub current: Header,
    slot: usize,
}

impl Headers {
    /// Reads both.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let [first, second] = Self::both(storage)?;
        let found = match (first, second) {
            (Some(first), Some(second)) if second.sequence > first.sequence => Some((second, 1)),
            (Some(first), _) => Some((first, 0)),
            (None, second) => second.map(|second| (second, 1)),
        };
        let (current, slot) =
            found.ok_or_else(|| Error::corrupt("No valid VHDX header found").in_file_at(HEADERS[0]))?;
        let (version, log_version) = (current.version.get(), current.log_version.get());
        if version != 1 || log_version != 0 {
            let text = format!("unsupported VHDX version {version}, with a log of version {log_version}");
            let field = if version == 1 { offset_of!(Header, log_version) } else { offset_of!(Header, version) };
            return Err(Error::unsupported(text).in_file_at(HEADERS[slot] + field as u64));
        }
        let (offset, length) = (current.log_offset.get(), u64::from(current.log_length.get()));
        if offset < MIB || !offset.is_multiple_of(MIB) || !length.is_multiple_of(MIB) {
            let error =
                Error::corrupt(format!("log of {length} bytes at {offset}: not in whole mebibytes of the file"));
            return Err(error.in_file_at(HEADERS[slot] + offset_of!(Header, log_length) as u64));
        }
        Ok(Self { current, slot })
    }

    /// What is whole of the two.
    pub fn both(storage: &dyn Storage) -> Result<[Option<Header>; 2]> {
        let mut found = [None, None];
        for (header, at) in found.iter_mut().zip(HEADERS) {
            let mut bytes = [0; size_of::<Header>()];
            storage.read_at(at, &mut bytes).context("Could not read the VHDX header")?;
            *header = Header::parse(bytes);
        }
        Ok(found)
    }

    /// Whether the log may hold changes that are not in their places.
    pub fn has_log(&self) -> bool {
        self.current.log_guid != Guid::ZERO
    }

    /// Where the log is, and its bytes.
    pub fn log(&self) -> (u64, u64) {
        (self.current.log_offset.get(), self.current.log_length.get().into())
    }

    /// Writes a changed header over the older one, once everything written before is on stable storage.
    pub fn change(&mut self, storage: &dyn Storage, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut header = self.current.clone();
        change(&mut header);
        let sequence = header.sequence.get().checked_add(1);
        header.sequence = sequence.ok_or_else(|| Error::corrupt("the VHDX header cannot change any more"))?.into();
        seal(header.as_mut_bytes());
        let slot = 1 - self.slot;
        storage.flush().context("Could not flush")?;
        storage.write_at(HEADERS[slot], header.as_bytes()).context("Could not write the VHDX header")?;
        storage.flush().context("Could not flush")?;
        *self = Self { current: header, slot };
        Ok(())
    }

    /// The same for what tells that the file, and what the guest sees in it, are not what they were.
    ///
    /// The new identifiers follow from the old ones, so that what is made reproducibly stays so.
    pub fn mark_changed(&mut self, storage: &dyn Storage) -> Result<()> {
        self.change(storage, |header| {
            header.file_write = next(header.file_write, header.sequence.get());
            header.data_write = next(header.data_write, header.sequence.get());
        })
    }

    /// The same once nothing in the log waits any more.
    pub fn clear_log(&mut self, storage: &dyn Storage) -> Result<()> {
        self.change(storage, |header| {
            header.file_write = next(header.file_write, header.sequence.get());
            header.log_guid = Guid::ZERO;
        })
    }
}

/// A name-based UUID (RFC 9562, section 5.5) in the name space of the old one.
fn next(old: Guid, sequence: u64) -> Guid {
    use sha1::Digest;
    let hash = sha1::Sha1::new().chain_update(old.number().to_be_bytes()).chain_update(sequence.to_be_bytes());
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash.finalize()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x50;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Guid::new(u128::from_be_bytes(uuid))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::storage::memory::Memory;

    #[test]
    fn the_newer_whole_header_counts() {
        let file = Memory::new(vec![0; 1 << 20]);
        Headers::read(&file).unwrap_err();
        let header = |sequence, id| Header::new(sequence, Guid([id; 16]), Guid([id; 16]), (MIB, 1 << 20));
        file.write_at(HEADERS[1], header(5, 1).as_bytes()).unwrap();
        let mut headers = Headers::read(&file).unwrap();
        assert_eq!(headers.current.file_write, Guid([1; 16]));
        headers.mark_changed(&file).unwrap();
        let changed = Headers::read(&file).unwrap().current;
        assert_eq!(changed.sequence.get(), 6);
        assert!(changed.file_write != Guid([1; 16]) && changed.data_write != Guid([1; 16]));
        assert_eq!(Headers::both(&file).unwrap()[1], Some(header(5, 1)));
        // A write that was cut short leaves the older one.
        file.write_at(HEADERS[0] + 30, &[7]).unwrap();
        assert_eq!(Headers::read(&file).unwrap().current, header(5, 1));
    }
}
