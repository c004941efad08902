//! Bytes as an image: what a protocol gives, without a format to say what is in them.

use super::error::Context;
use super::info::ImageInfo;
use super::io::punch_at;
use super::{
    BlockDriver, Child, Error, Extent, GuestOffset, HostPlace, Placed, Resize, Result, Store, StoredWord, Write,
};
use crate::storage::Preallocation;

/// Bytes that no format has a say in. Their number does not change: whoever wants to resize says `raw`.
#[derive(Debug)]
pub(super) struct Bare {
    driver: &'static str,
    size: u64,
    files: [Child; 1],
    write: bool,
}

impl Bare {
    /// `file`, under the name of the driver that gave it.
    pub fn open(driver: &'static str, file: Child, write: bool) -> Result<Self> {
        let length = file.storage.len().with_context(|| format!("Could not get size of '{}'", file.name))?;
        let size = length.checked_next_multiple_of(512).unwrap_or(length);
        Ok(Self { driver, size, files: [file], write })
    }
}

impl BlockDriver for Bare {
    fn format(&self) -> &'static str {
        self.driver
    }

    fn virtual_size(&self) -> u64 {
        self.size
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let [file] = &self.files;
        file.extent(at, HostPlace::main(at.get()), max)
    }

    fn stored_word(&self, _at: GuestOffset) -> Result<StoredWord> {
        Ok(StoredWord::File)
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
        file.storage.facts().resize_refusal.is_some().then_some(self)
    }
}

impl Resize for Bare {
    fn check(&self, size: u64, _fill: Preallocation) -> Result<()> {
        let [file] = &self.files;
        match file.storage.facts().resize_refusal {
            Some(why) if size != self.size => Err(Error::unsupported(why)),
            _ => Ok(()),
        }
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.check(size, fill)
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
