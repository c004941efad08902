//! LUKS: an encrypted disk behind a header that keeps its key (version 1, [`crate::crypto::luks`]).
//!
//! Invariants: nothing is allocated, so placing is the identity, from the payload's offset on; a sector is encrypted by
//! its number on the guest's disk. What was never written reads as whatever decrypting zeros gives: nothing in such an
//! image is known to be zeros, and a new one does not read as zeros either. The header may lie in a file of its own,
//! which options name as `header`.
//!
//! The disk is as long as its file, in whole sectors: of a file that was cut, no more can be seen than a last sector that
//! is there in part. Writers leave one so where nothing was ever written to it, which is a part that is all zeros.

mod amend;
mod create;
mod measure;

use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::driver::Amend;
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::keys::take_text;
use crate::block::{
    BlockDriver, Child, Cipher, Create, Error, Extent, ExtentKind, FileEnd, Format, GuestOffset, HostPlace, KeyUse,
    OpenRequest, OptionSpec, Placed, Resize, Result, SecretBytes, Store, Write,
};
use crate::crypto::luks::{HEADER, LuksHeader};
use crate::formats::luks_header::{self, luks_facts};
use crate::formats::luks_slots;
use crate::formats::sector_cipher::ImageCipher;
use crate::storage::{self, Preallocation, Storage, Zeroing};

/// The format.
#[derive(Debug)]
pub struct Luks;

const SECTOR: u64 = 512;
/// The option that names the secret with the passphrase.
const KEY_SECRET: &str = "key-secret";
/// The part that a detached header's file plays.
const HEADER_FILE: &str = "header";

impl Format for Luks {
    fn name(&self) -> &'static str {
        "luks"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        if LuksHeader::probe(head) { 100 } else { 0 }
    }

    fn strong_options(&self) -> &'static [&'static str] {
        &[KEY_SECRET]
    }

    fn side_files(&self) -> &'static [&'static str] {
        &[HEADER_FILE]
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let OpenRequest { file, side_files, options, purpose, secrets, .. } = request;
        let id = take_text(options, KEY_SECRET);
        let name = file.name.clone();
        let mut files = vec![file];
        files.extend(side_files);
        let detached = files.len() > 1;
        let holder = files.last().ok_or_else(|| Error::invalid("no file"))?;
        let header = match read_header(&*holder.storage, detached) {
            // The reference wants the key first; one that is asked for is asked for when it is known to be wanted.
            Err(_) if !purpose.only_looks() && (id.is_some() || !secrets.can_ask()) => {
                secrets.key(KEY_SECRET, id.as_deref(), &name, KeyUse::from(purpose))?;
                read_header(&*holder.storage, detached)?
            }
            header => header?,
        };
        let key = match purpose.only_looks() {
            true => None,
            false => {
                let passphrase = secrets.key(KEY_SECRET, id.as_deref(), &name, KeyUse::from(purpose))?;
                Some(luks_header::unlock(secrets, &header, &passphrase, key_material(&*holder.storage))?)
            }
        };
        let cipher = key.as_ref().map(|key| header.cipher(key.get())).transpose()?.map(ImageCipher::by_guest);
        let write = purpose.writes();
        let mut driver = LuksDriver { files, header, key, cipher, size: AtomicU64::new(0), cut: false, write };
        driver.size.store(driver.room()?, Ordering::Relaxed);
        driver.cut = driver.ends_within_data()?;
        Ok(Box::new(driver))
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }

    fn amend_options(&self) -> &'static [OptionSpec] {
        luks_slots::OPTIONS
    }
}

fn read_header(storage: &dyn Storage, detached: bool) -> Result<LuksHeader> {
    let mut bytes = [0; HEADER];
    storage.read_at(0, &mut bytes).context("Unable to read LUKS header")?;
    Ok(LuksHeader::parse(&bytes, detached)?)
}

fn key_material(storage: &dyn Storage) -> impl FnMut(u64, &mut [u8]) -> Result<()> {
    let end = FileEnd::default();
    move |at, buf| {
        end.require(storage, "the key material", at, buf.len() as u64)?;
        storage.read_at(at, buf).context("Failed to read key material")
    }
}

#[derive(Debug)]
struct LuksDriver {
    /// The payload's, and the header's, where that is detached.
    files: Vec<Child>,
    header: LuksHeader,
    /// The master key. Nothing where the header alone is looked at.
    key: Option<SecretBytes>,
    /// Nothing where the header alone is looked at.
    cipher: Option<ImageCipher>,
    /// The virtual size in bytes.
    size: AtomicU64,
    /// A part of the last sector was missing when it was opened.
    cut: bool,
    write: bool,
}

impl LuksDriver {
    fn storage(&self) -> &dyn Storage {
        &*self.files[0].storage
    }

    fn place_of(&self, at: GuestOffset) -> HostPlace {
        HostPlace::main(self.header.payload().saturating_add(at.get()))
    }

    fn file_len(&self) -> Result<u64> {
        self.storage().len().with_context(|| format!("Could not get size of '{}'", self.files[0].name))
    }

    /// Bytes of the payload. A file counts in whole sectors.
    fn room(&self) -> Result<u64> {
        let end = self.file_len()?;
        let end = end.checked_next_multiple_of(SECTOR).unwrap_or(end);
        end.checked_sub(self.header.payload())
            .ok_or_else(|| Error::truncated("the payload", self.header.payload(), end))
    }

    /// Whether the file ends within a sector that was written to.
    fn ends_within_data(&self) -> Result<bool> {
        let end = self.file_len()?;
        let mut there = [0; SECTOR as usize];
        let there = &mut there[..(end % SECTOR) as usize];
        self.storage().read_at(end - end % SECTOR, there).context("Could not read the last sector")?;
        Ok(there.iter().any(|byte| *byte != 0))
    }
}

impl BlockDriver for LuksDriver {
    fn format(&self) -> &'static str {
        Luks.name()
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let len = max.min(self.virtual_size().saturating_sub(at.get()));
        Ok(Extent { start: at, len, kind: ExtentKind::Data(self.place_of(at)) })
    }

    fn short_unit(&self) -> Option<u64> {
        self.cut.then_some(1)
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn info(&self) -> Result<ImageInfo> {
        // The reference goes by the offset, wherever the header is.
        let facts = luks_facts(&self.header, self.header.payload() == 0);
        Ok(ImageInfo { encrypted: true, specific: Some((Luks.name(), facts)), ..ImageInfo::plain(None) })
    }

    fn flush(&self) -> Result<()> {
        self.files[0].flush()
    }

    fn writing(&self) -> Option<&dyn Write> {
        (self.write && self.cipher.is_some()).then_some(self)
    }

    fn resizing(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn amending(&self) -> Option<&dyn Amend> {
        Some(self)
    }

    fn cipher(&self) -> Option<&dyn Cipher> {
        self.cipher.as_ref().map(|cipher| cipher as _)
    }
}

impl Write for LuksDriver {
    fn unit(&self) -> u64 {
        SECTOR
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        Placed::over(at, len, store, self.place_of(at))
    }
}

impl Resize for LuksDriver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        let device = self.storage().facts().fixed_len;
        match fill {
            Preallocation::Falloc | Preallocation::Full if device => {
                Err(storage::Error::DevicePreallocation(fill).into())
            }
            _ if device && size != self.virtual_size() => Err(Error::unsupported("Cannot resize device files")),
            Preallocation::Metadata => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
            // What is missing would be taken for what nobody wrote.
            _ if self.cut && size >= self.virtual_size() => {
                let end = self.file_len()?;
                Err(Error::truncated("data", end - end % SECTOR, end))
            }
            _ => self.end(size).map(|_| ()),
        }
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.check(size, fill)?;
        let (old, end) = (self.file_len()?, self.end(size)?);
        // The length is the disk's size: it goes from the old one to the new one in one step.
        self.storage().set_len(end, Preallocation::Off)?;
        if let Err(error) = self.reserve(old, end, fill) {
            // If this fails too, the first error is the one to show.
            let _ = self.storage().set_len(old, Preallocation::Off);
            return Err(error.into());
        }
        self.size.store(self.room()?, Ordering::Relaxed);
        Ok(())
    }
}

impl LuksDriver {
    /// Takes room for a part of the file, where there is to be some.
    fn reserve(&self, from: u64, end: u64, fill: Preallocation) -> storage::Result<()> {
        let (how, step) = match fill {
            Preallocation::Falloc => (Zeroing::Allocate, "Could not preallocate new data"),
            Preallocation::Full => (Zeroing::Write, "Could not write zeros for preallocation"),
            Preallocation::Off | Preallocation::Metadata => return Ok(()),
        };
        self.storage().zero(from, end.saturating_sub(from), how).map_err(|error| error.step(step))?;
        self.storage().flush()
    }

    /// Where a disk of that size ends in the file: a part of a sector could not be decrypted.
    fn end(&self, size: u64) -> Result<u64> {
        create::file_end(self.header.payload(), size.checked_next_multiple_of(SECTOR).unwrap_or(size))
    }
}
