//! Parallels expandable images (`.hdd`, `.hds`), of both kinds: entries in sectors (`WithoutFreeSpace`), or in clusters
//! (`WithouFreSpacExt`).
//!
//! Invariants: space is only ever taken behind all that the BAT names; the header says that the image is in use from
//! before the first change until the image is closed; a cluster's data is written before the entry that names it. A stop
//! in between leaves that mark, and space that nothing names. An image in which clusters overlap, or lie outside the file,
//! is not written to.
//!
//! One lock, over the BAT (`one_file.rs`); it is never held while guest data moves.

mod check;
mod create;
mod extension;
mod layout;
mod measure;
mod resize;
mod table;

use std::ops::Deref;
use std::sync::Mutex;

use self::layout::{HEADER_BYTES, ParallelsHeader, SECTOR, is_parallels};
use self::table::ParallelsState;
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    Action, BlockDriver, Check, Child, Create, Error, Extent, ExtentKind, Fix, Format, GuestOffset, HostPlace, Notice,
    OpenRequest, Placed, Resize, Result, Store, Ticket, Write,
};
use crate::formats::one_file::{OneFile, Tables};

/// The format.
#[derive(Debug)]
pub struct Parallels;

/// The most bytes that one placement covers.
const RUN: u64 = 2 << 20;

impl Format for Parallels {
    fn name(&self) -> &'static str {
        "parallels"
    }

    fn also_called(&self) -> &'static [&'static str] {
        &["hdd", "hds"]
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        if is_parallels(head) { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let OpenRequest { file, purpose, related, .. } = request;
        let storage = &*file.storage;
        let mut raw = [0; HEADER_BYTES];
        storage.read_at(0, &mut raw).context("Could not read the Parallels header")?;
        let header = ParallelsHeader::parse(raw)?;
        if !purpose.writes() {
            extension::check(storage, &header)?;
        } else if header.extension().is_some() {
            related.notice(Notice::Warning("Format Extension ignored in RW mode".to_owned()));
        }
        let in_use = header.is_in_use();
        let state = ParallelsState::new(header.clone(), &file.name);
        let (cluster, size) = (header.cluster(), header.sectors() * SECTOR);
        let driver = ParallelsDriver { cluster, image: OneFile::new(file, size, state, purpose.writes()) };
        if purpose.mends() && in_use {
            let told = Mutex::new(Vec::new());
            let lines = || told.lock().unwrap_or_else(|e| e.into_inner());
            let mended = Check::check(&driver, Fix::All, &|line: &str| lines().push(line.to_owned()));
            lines().drain(..).for_each(|line| related.notice(Notice::Line(line)));
            mended.context("Could not repair corrupted image")?;
        }
        Ok(Box::new(driver))
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }
}

#[derive(Debug)]
struct ParallelsDriver {
    image: OneFile<ParallelsState>,
    cluster: u64,
}

impl Deref for ParallelsDriver {
    type Target = OneFile<ParallelsState>;

    fn deref(&self) -> &OneFile<ParallelsState> {
        &self.image
    }
}

impl BlockDriver for ParallelsDriver {
    fn format(&self) -> &'static str {
        Parallels.name()
    }

    fn virtual_size(&self) -> u64 {
        self.image.virtual_size()
    }

    /// Blocks are written as a whole.
    fn short_unit(&self) -> Option<u64> {
        Some(1)
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let max = max.min(self.virtual_size().saturating_sub(at.get()));
        let (index, within) = (at.get() / self.cluster, at.get() % self.cluster);
        let run = self.state().run(self.storage(), index, within.saturating_add(max).div_ceil(self.cluster));
        let (host, run) = run.map_err(|error| error.naming(&self.files[0].name))?;
        let len = max.min(run.saturating_mul(self.cluster).saturating_sub(within));
        let kind = match host {
            0 => ExtentKind::Unallocated(None),
            host => ExtentKind::Data(HostPlace::main(host.saturating_add(within))),
        };
        Ok(Extent { start: at, len, kind })
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn knows_bitmaps(&self) -> bool {
        true
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo { dirty: None, ..ImageInfo::plain(None) })
    }

    fn flush(&self) -> Result<()> {
        self.image.flush()
    }

    fn close(&self) -> Result<()> {
        self.flush()?;
        if self.write { self.state().unmark(self.storage()) } else { Ok(()) }
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

impl Write for ParallelsDriver {
    fn unit(&self) -> u64 {
        self.cluster
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let zeros = store.is_zeros()?;
        let (index, within) = (at.get() / self.cluster, at.get() % self.cluster);
        let (mut state, storage) = (self.state(), self.storage());
        state.prepare(storage)?;
        let (host, run) = state.run(storage, index, within.saturating_add(len).div_ceil(self.cluster))?;
        let here = len.min(run.saturating_mul(self.cluster).saturating_sub(within));
        if host != 0 {
            state.mark(storage)?;
            return Placed::over(at, here, store, HostPlace::main(host.saturating_add(within)));
        }
        if zeros {
            return Ok(Placed::known(at, here, store, Action::Nothing));
        }
        if index >= state.header.entries() {
            return Err(Error::corrupt(format!("the BAT has no entry for cluster {index}")));
        }
        let count = within.saturating_add(len).div_ceil(self.cluster).min(run).min((RUN / self.cluster).max(1));
        let len = len.min(count * self.cluster - within);
        let (host, fresh) = state.take(storage, count)?;
        // Past the end of the file all is zero as it is, and so is what such a cluster read as.
        let (before, after) = if fresh { (0, 0) } else { (within, count * self.cluster - within - len) };
        let action = Action::Write { place: HostPlace::main(host + within), before, after };
        Ok(Placed { start: at, len, store, action, ticket: Ticket::New { unit: index, count, entry: host } })
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        let Ticket::New { unit, count, entry } = placed.ticket else { return Ok(()) };
        let mut state = self.state();
        state.set(self.storage(), unit, count, entry)?;
        if state.wants_writing() { state.write_tables(self.storage()) } else { Ok(()) }
    }

    fn withdraw(&self, placed: &Placed) {
        if let Ticket::New { count, entry, .. } = placed.ticket {
            self.state().give_back(entry, count);
        }
    }
}
