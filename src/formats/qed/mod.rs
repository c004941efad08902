//! QED: the QEMU enhanced disk format.
//!
//! Invariants: space is only ever taken from the end of the file; the header says that the tables need a check from
//! before the first of it is taken until the image is closed; a cluster's data is written before the L2 entry that names
//! it, an L2 table before its L1 entry. A stop in between leaves space that nothing names. An image in which tables and
//! clusters overlap, or lie outside the file, is not written to.
//!
//! One lock, over the tables (`one_file.rs`); it is never held while guest data moves.

mod check;
mod create;
mod layering;
mod layout;
mod measure;
mod resize;
mod tables;

use std::ffi::OsString;
use std::ops::Deref;
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicBool, Ordering};

use self::layout::{HEADER_BYTES, MAGIC, MOST_NAME, QedEntry, QedHeader, ZERO};
use self::tables::QedState;
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    Action, BackingChange, BackingRef, BlockDriver, Check, Child, Create, Error, Extent, ExtentKind, Fix, Format,
    GuestOffset, HostPlace, OpenRequest, Placed, Resize, Result, Store, Ticket, Write, ZeroedRoom,
};
use crate::formats::one_file::{OneFile, Tables};

/// The format.
#[derive(Debug)]
pub struct Qed;

/// The most bytes that one placement covers.
const RUN: u64 = 2 << 20;

impl Format for Qed {
    fn name(&self) -> &'static str {
        "qed"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        if head.starts_with(&MAGIC) { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let OpenRequest { file, purpose, .. } = request;
        let storage = &*file.storage;
        let mut raw = [0; HEADER_BYTES];
        storage.read_at(0, &mut raw).context("Could not read the QED header")?;
        let length = storage.len().with_context(|| format!("Could not get size of '{}'", file.name))?;
        let header = QedHeader::parse(raw, length)?;
        let backing = read_backing(&file, &header)?;
        let mut state = QedState::new(header.clone(), &file.name);
        let mut known = header.clone();
        if purpose.writes() && known.clear_unknown() {
            state.replace_header(storage, known)?;
        }
        let cluster = header.cluster();
        let image = OneFile::new(file, header.size(), state, purpose.writes());
        let driver = QedDriver { cluster, backing, keeps_zeros: AtomicBool::new(false), image };
        if purpose.mends() && header.needs_check() {
            Check::check(&driver, Fix::All, &|_: &str| {}).context("Could not repair the image")?;
        }
        Ok(Box::new(driver))
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }
}

fn read_backing(file: &Child, header: &QedHeader) -> Result<Option<BackingRef>> {
    let Some((at, length)) = header.backing() else { return Ok(None) };
    let mut name = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(MOST_NAME + 1)];
    file.storage.read_at(at, &mut name).context("Could not read the backing file's name")?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    if end > MOST_NAME {
        return Err(Error::corrupt("Backing file name too long"));
    }
    name.truncate(end);
    let name = OsString::from_vec(name);
    let format = header.is_backing_raw().then(|| "raw".to_owned());
    Ok((!name.is_empty()).then_some(BackingRef { name, format, elsewhere: Vec::new() }))
}

#[derive(Debug)]
struct QedDriver {
    image: OneFile<QedState>,
    cluster: u64,
    backing: Option<BackingRef>,
    /// Whether zeros are kept as such though nothing lies below.
    keeps_zeros: AtomicBool,
}

impl Deref for QedDriver {
    type Target = OneFile<QedState>;

    fn deref(&self) -> &OneFile<QedState> {
        &self.image
    }
}

impl BlockDriver for QedDriver {
    fn format(&self) -> &'static str {
        Qed.name()
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
        let run = self.run(&mut self.state(), index, within.saturating_add(max).div_ceil(self.cluster));
        let (entry, run) = run.map_err(|error| error.naming(&self.files[0].name))?;
        let len = max.min(run.saturating_mul(self.cluster).saturating_sub(within));
        let kind = match entry {
            QedEntry::Unallocated => ExtentKind::Unallocated(None),
            QedEntry::Zero => ExtentKind::Zero(None),
            QedEntry::Data(host) => ExtentKind::Data(HostPlace::main(host.saturating_add(within))),
        };
        Ok(Extent { start: at, len, kind })
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn backing(&self) -> Option<&BackingRef> {
        self.backing.as_ref()
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::plain(Some(self.cluster)))
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

    fn backing_change(&self) -> Option<&dyn BackingChange> {
        self.write.then_some(self)
    }

    fn resizing(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }
}

impl QedDriver {
    /// The entry of a cluster and how many go on like it. Refuses one that leads where no cluster can be.
    fn run(&self, state: &mut QedState, index: u64, max: u64) -> Result<(QedEntry, u64)> {
        let (entry, run) = state.run(self.storage(), index, max)?;
        match entry {
            QedEntry::Data(at) if !state.header.is_place(at) => {
                let error = Error::corrupt(format!("cluster {index} cannot be at offset {at}"));
                Err(match state.place_of(self.storage(), index)? {
                    Some(place) => error.in_file_at(place),
                    None => error,
                })
            }
            _ => Ok((entry, run)),
        }
    }

    /// How many of a run's clusters one placement from that byte on has: no more than share an L2 table.
    fn count(&self, state: &QedState, at: GuestOffset, len: u64, run: u64) -> u64 {
        let (index, within) = (at.get() / self.cluster, at.get() % self.cluster);
        within.saturating_add(len).div_ceil(self.cluster).min(run).min(state.left_in_table(index))
    }

    /// Room for clusters that have none, all alike.
    fn place_new(&self, state: &mut QedState, at: GuestOffset, len: u64, store: Store, run: u64) -> Result<Placed> {
        let (index, within) = (at.get() / self.cluster, at.get() % self.cluster);
        let zeros_before = self.backing.is_none() || state.run(self.storage(), index, 1)?.0 == QedEntry::Zero;
        let count = self.count(state, at, len, run).min((RUN / self.cluster).max(1));
        let len = len.min(count * self.cluster - within);
        let (host, fresh) = state.take(self.storage(), index, count)?;
        // Past the end of the file all is zero as it is, and so is what such a cluster read as.
        let (before, after) =
            if fresh && zeros_before { (0, 0) } else { (within, count * self.cluster - within - len) };
        let action = Action::Write { place: HostPlace::main(host + within), before, after };
        Ok(Placed { start: at, len, store, action, ticket: Ticket::New { unit: index, count, entry: host } })
    }
}

impl Write for QedDriver {
    fn unit(&self) -> u64 {
        self.cluster
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let zeros = store.is_zeros()?;
        let (index, within) = (at.get() / self.cluster, at.get() % self.cluster);
        let mut state = self.state();
        state.prepare(self.storage())?;
        let (entry, run) = self.run(&mut state, index, within.saturating_add(len).div_ceil(self.cluster))?;
        let here = len.min(run.saturating_mul(self.cluster).saturating_sub(within));
        // To the end of the disk counts as whole.
        let whole = within == 0 && (here.is_multiple_of(self.cluster) || at.get() + here >= self.virtual_size());
        match entry {
            QedEntry::Data(host) => Placed::over(at, here, store, HostPlace::main(host.saturating_add(within))),
            QedEntry::Zero if zeros => Ok(Placed::known(at, here, store, Action::Nothing)),
            QedEntry::Unallocated if zeros && self.backing.is_none() && !self.keeps_zeros.load(Ordering::Relaxed) => {
                Ok(Placed::known(at, here, store, Action::Nothing))
            }
            QedEntry::Unallocated if zeros && whole => {
                let count = self.count(&state, at, here, run);
                state.take(self.storage(), index, 0)?;
                let ticket = Ticket::Zeros { unit: index, count, room: ZeroedRoom::GiveUp };
                let len = here.min(count * self.cluster);
                Ok(Placed { start: at, len, store, action: Action::Nothing, ticket })
            }
            _ => self.place_new(&mut state, at, len, store, run),
        }
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        let (index, count, first) = match placed.ticket {
            Ticket::New { unit, count, entry } => (unit, count, entry),
            Ticket::Zeros { unit, count, .. } => (unit, count, ZERO),
            _ => return Ok(()),
        };
        let mut state = self.state();
        state.set(self.storage(), index, count, first)?;
        if state.wants_writing() { state.write_tables(self.storage()) } else { Ok(()) }
    }

    fn only_appends(&self) -> bool {
        true
    }

    fn withdraw(&self, placed: &Placed) {
        match placed.ticket {
            Ticket::New { unit, count, entry } => {
                let mut state = self.state();
                // What is placed behind it keeps it in the file; the disk, which may be full, gets it back.
                let _ = self.storage().discard(entry, count * self.cluster);
                state.give_back(unit, entry, count);
            }
            Ticket::Zeros { unit, .. } => self.state().give_back(unit, 0, 0),
            _ => {}
        }
    }
}
