//! raw: the guest's disk, byte by byte, in a file or on a device.
//!
//! `measure.rs` is how large one becomes.
//!
//! Invariants: never `Unallocated` (a hole is a zero); nothing is allocated, so placing is the identity.

mod measure;

use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::bytes::{allocate_start, make_disk};
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::io::punch_at;
use crate::block::keys::take_size;
use crate::block::measure::Measure;
use crate::block::{
    BlockDriver, Child, Create, CreateOptions, CreateRequest, Error, Extent, FileOrder, Format, GuestOffset, HostPlace,
    OpenRequest, OptionKind, OptionSpec, Placed, Resize, Result, Store, StoredWord, Write,
};
use crate::storage::{self, Preallocation};

/// The format.
#[derive(Debug)]
pub struct Raw;

const SECTOR: u64 = 512;

const OPTIONS: &[OptionSpec] = &[OptionSpec::new("size", OptionKind::Size, "Virtual disk size")];

impl Format for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn also_called(&self) -> &'static [&'static str] {
        &["img", "iso", "bin", "dd"]
    }

    fn probe(&self, _head: &[u8], _name: &str) -> u32 {
        1
    }

    fn strong_options(&self) -> &'static [&'static str] {
        &["offset", "size"]
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let OpenRequest { file, options, purpose, .. } = request;
        let write = purpose.writes();
        let end = file.storage.len().with_context(|| format!("Could not get size of '{}'", file.name))?;
        // A file counts in whole sectors.
        let length = end.checked_next_multiple_of(SECTOR).unwrap_or(end);
        let offset = take_size(options, "offset")?.unwrap_or(0);
        let size = take_size(options, "size")?;
        let room = length.checked_sub(offset).ok_or_else(|| {
            Error::invalid(format!("Offset ({offset}) cannot be greater than size of the containing file ({length})"))
        })?;
        if let Some(size) = size {
            if size > room {
                return Err(Error::invalid(format!(
                    "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size \
                     of the containing file ({length})"
                )));
            }
            if !size.is_multiple_of(SECTOR) {
                return Err(Error::invalid("Specified size is not multiple of 512"));
            }
        }
        let fixed = size.is_some();
        let size = AtomicU64::new(size.unwrap_or_else(|| end.saturating_sub(offset)));
        Ok(Box::new(RawDriver { files: [file], offset, fixed, size, write }))
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }
}

impl Create for Raw {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn file_order(&self, _options: &CreateOptions) -> FileOrder {
        FileOrder::Laid
    }

    fn measuring(&self) -> Option<&dyn Measure> {
        Some(self)
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        make_disk(request)
    }
}

#[derive(Debug)]
struct RawDriver {
    files: [Child; 1],
    /// Where the disk starts in the file.
    offset: u64,
    /// Whether its size was given, and so does not follow the file's.
    fixed: bool,
    size: AtomicU64,
    write: bool,
}

impl RawDriver {
    fn place_of(&self, at: GuestOffset) -> HostPlace {
        HostPlace::main(self.offset.saturating_add(at.get()))
    }
}

impl BlockDriver for RawDriver {
    fn format(&self) -> &'static str {
        Raw.name()
    }

    fn virtual_size(&self) -> u64 {
        let size = self.size.load(Ordering::Relaxed);
        size.checked_next_multiple_of(SECTOR).unwrap_or(size)
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.files[0].extent(at, self.place_of(at), max)
    }

    fn short_unit(&self) -> Option<u64> {
        None
    }

    fn lets_host_copy(&self) -> bool {
        true
    }

    fn stored_word(&self, _at: GuestOffset) -> Result<StoredWord> {
        Ok(StoredWord::File)
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
        // A device of the host says itself what is wrong with the new size.
        let file = &self.files[0].storage;
        let facts = file.facts();
        (file.host().is_some() || !facts.fixed_len || facts.resize_refusal.is_some()).then_some(self)
    }
}

impl Write for RawDriver {
    fn unit(&self) -> u64 {
        1
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        Placed::over(at, len, store, self.place_of(at))
    }

    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        punch_at(self, self.place_of(at), len)
    }
}

impl Resize for RawDriver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        let facts = self.files[0].storage.facts();
        let device = facts.fixed_len;
        match fill {
            Preallocation::Falloc | Preallocation::Full if device => {
                Err(storage::Error::DevicePreallocation(fill).into())
            }
            _ if device && size != self.size.load(Ordering::Relaxed) => {
                Err(Error::unsupported(facts.resize_refusal.unwrap_or("Cannot resize device files")))
            }
            Preallocation::Metadata => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
            _ if self.fixed => Err(Error::unsupported("Cannot resize fixed-size raw disks")),
            _ => Ok(()),
        }
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.check(size, fill)?;
        let storage = &self.files[0].storage;
        let end = self.offset.checked_add(size).ok_or_else(|| Error::invalid("Disk size is too large"))?;
        let empty = storage.len().context("Could not get size")? == 0;
        storage.set_len(end, fill)?;
        if empty && !storage.facts().fixed_len {
            allocate_start(&**storage, end, fill)?;
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }
}
