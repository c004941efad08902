//! Bytes as an image: what a protocol gives, without a format to say what is in them.

use std::sync::atomic::{AtomicU64, Ordering};

use super::error::Context;
use super::info::ImageInfo;
use super::io::punch_at;
use super::{
    BlockDriver, Child, Error, Extent, GuestOffset, HostPlace, Placed, Resize, Result, Store, StoredWord, Write,
};
use crate::storage::{self, Preallocation};

/// Bytes that no format has a say in.
#[derive(Debug)]
pub(super) struct Bare {
    driver: &'static str,
    size: AtomicU64,
    files: [Child; 1],
    write: bool,
}

impl Bare {
    /// `file`, under the name of the driver that gave it.
    pub fn open(driver: &'static str, file: Child, write: bool) -> Result<Self> {
        let length = file.storage.len().with_context(|| format!("Could not get size of '{}'", file.name))?;
        let size = AtomicU64::new(whole_sectors(length));
        Ok(Self { driver, size, files: [file], write })
    }
}

fn whole_sectors(length: u64) -> u64 {
    length.checked_next_multiple_of(512).unwrap_or(length)
}

impl BlockDriver for Bare {
    fn format(&self) -> &'static str {
        self.driver
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let [file] = &self.files;
        file.extent(at, HostPlace::main(at.get()), max)
    }

    fn stored_word(&self, _at: GuestOffset) -> Result<StoredWord> {
        Ok(StoredWord::File)
    }

    fn lets_host_copy(&self) -> bool {
        true
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn info(&self) -> Result<ImageInfo> {
        let [file] = &self.files;
        // What is put together from several places has no mark of its own.
        Ok(if file.storage.facts().addressed { ImageInfo::plain(None) } else { ImageInfo::default() })
    }

    fn flush(&self) -> Result<()> {
        let [file] = &self.files;
        file.flush()
    }

    fn writing(&self) -> Option<&dyn Write> {
        self.write.then_some(self)
    }

    fn resizing(&self) -> Option<&dyn Resize> {
        let [file] = &self.files;
        let facts = file.storage.facts();
        // A device of the host says itself what is wrong with the new size; what is put together has none of its own.
        let sized = facts.addressed && (file.storage.host().is_some() || !facts.fixed_len);
        (sized || facts.resize_refusal.is_some()).then_some(self)
    }
}

impl Resize for Bare {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        let [file] = &self.files;
        let facts = file.storage.facts();
        let fixed = facts.fixed_len || facts.resize_refusal.is_some();
        match fill {
            Preallocation::Falloc | Preallocation::Full if fixed => {
                Err(storage::Error::DevicePreallocation(fill).into())
            }
            _ if fixed && size != self.virtual_size() => {
                Err(Error::unsupported(facts.resize_refusal.unwrap_or("Cannot resize device files")))
            }
            // An image that the bytes are the disk of says itself what it can.
            Preallocation::Metadata if file.storage.host().is_some() => {
                Err(Error::unsupported("Unsupported preallocation mode: metadata"))
            }
            _ => Ok(()),
        }
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.check(size, fill)?;
        let [file] = &self.files;
        if size != self.virtual_size() {
            file.storage.set_len(size, fill)?;
            self.size.store(whole_sectors(size), Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Write for Bare {
    fn unit(&self) -> u64 {
        1
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        Placed::over(at, len, store, HostPlace::main(at.get()))
    }

    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        punch_at(self, HostPlace::main(at.get()), len)
    }
}
