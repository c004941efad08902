//! The fixed kind: the guest's disk byte by byte, then the footer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::Vpc;
use super::layout::{FOOTER_BYTES, Footer};
use crate::block::info::ImageInfo;
use crate::block::io::punch_at;
use crate::block::{
    BlockDriver, Check, Child, Error, Extent, ExtentKind, Format, GuestOffset, HostPlace, Placed, Resize, Result,
    Store, StoredWord, Write,
};

/// A fixed disk.
#[derive(Debug)]
pub struct Fixed {
    pub(super) files: [Child; 1],
    pub(super) size: AtomicU64,
    /// Where the data ends: the footer's place.
    pub(super) end: AtomicU64,
    footer: Mutex<Footer>,
    write: bool,
}

impl Fixed {
    /// A disk whose data ends at `end`.
    pub fn new(file: Child, footer: Footer, size: u64, end: u64, write: bool) -> Self {
        let (size, end) = (AtomicU64::new(size), AtomicU64::new(end));
        Self { files: [file], size, end, footer: Mutex::new(footer), write }
    }

    pub(super) fn footer(&self) -> MutexGuard<'_, Footer> {
        self.footer.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The refusal of an image that has less data than its footer says.
    pub(super) fn too_short(&self) -> Error {
        let (size, end) = (self.size.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        Error::corrupt(format!(
            "'{}' has {end} bytes of data before its footer, which says that the disk has {size}",
            self.files[0].name
        ))
    }

    /// How much data there is from `at` on, at most `max`. A footer may promise more than the file has.
    fn there(&self, at: u64, max: u64) -> u64 {
        max.min(self.end.load(Ordering::Relaxed).saturating_sub(at))
    }
}

impl BlockDriver for Fixed {
    fn format(&self) -> &'static str {
        Vpc.name()
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn content_id(&self) -> Option<u128> {
        Some(self.footer().uuid())
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let max = max.min(self.virtual_size().saturating_sub(at.get()));
        let there = self.there(at.get(), max);
        if there == 0 {
            // What should be there is not zeros: it lies past the end of the file, and not in the footer.
            let place = HostPlace::main(at.get().saturating_add(FOOTER_BYTES as u64));
            return Ok(Extent { start: at, len: max, kind: ExtentKind::Data(place) });
        }
        self.files[0].extent(at, HostPlace::main(at.get()), there)
    }

    fn stored_word(&self, _at: GuestOffset) -> Result<StoredWord> {
        Ok(StoredWord::Both)
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::plain(None))
    }

    fn flush(&self) -> Result<()> {
        self.files[0].flush()
    }

    fn writing(&self) -> Option<&dyn Write> {
        self.write.then_some(self)
    }

    fn resizing(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }
}

impl Write for Fixed {
    fn unit(&self) -> u64 {
        1
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let len = self.there(at.get(), len);
        if len == 0 {
            return Err(self.too_short());
        }
        Placed::over(at, len, store, HostPlace::main(at.get()))
    }

    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        let len = self.there(at.get(), len);
        if len == 0 {
            return Ok(());
        }
        punch_at(self, HostPlace::main(at.get()), len)
    }
}
