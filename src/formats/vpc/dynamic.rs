//! The dynamic kind: blocks are added as they are written.

use std::ops::Deref;

use super::Vpc;
use super::layout::{DynamicHeader, Footer, SECTOR};
use super::table::VpcState;
use crate::block::info::ImageInfo;
use crate::block::io::punch;
use crate::block::{
    Action, BlockDriver, Check, Child, Error, Extent, ExtentKind, Format, GuestOffset, HostPlace, Placed, Purpose,
    Resize, Result, Store, Ticket, Write,
};
use crate::formats::one_file::{OneFile, Tables};

/// The largest block that is written: one has to fit in memory.
const MAX_WRITTEN_BLOCK: u64 = 64 << 20;

/// A dynamic disk.
#[derive(Debug)]
pub struct Dynamic {
    image: OneFile<VpcState>,
    block: u64,
    bitmap: u64,
}

impl Dynamic {
    /// Checks the table and opens.
    pub fn open(file: Child, footer: Footer, header: DynamicHeader, size: u64, purpose: Purpose) -> Result<Self> {
        let write = purpose.writes();
        let state = VpcState::open(&file, footer, header, size, purpose)?;
        let (block, bitmap) = (state.block(), state.bitmap());
        if write && block > MAX_WRITTEN_BLOCK {
            return Err(Error::unsupported(format!("blocks of {block} bytes cannot be written")));
        }
        Ok(Self { image: OneFile::new(file, size, state, write), block, bitmap })
    }
}

impl Deref for Dynamic {
    type Target = OneFile<VpcState>;

    fn deref(&self) -> &OneFile<VpcState> {
        &self.image
    }
}

impl BlockDriver for Dynamic {
    fn format(&self) -> &'static str {
        Vpc.name()
    }

    fn virtual_size(&self) -> u64 {
        self.image.virtual_size()
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let max = max.min(self.virtual_size().saturating_sub(at.get()));
        let (block, within) = (at.get() / self.block, at.get() % self.block);
        let mut state = self.state();
        let (place, run) = state.run(self.storage(), block, within.saturating_add(max).div_ceil(self.block))?;
        let Some(place) = place else {
            let len = max.min((run * self.block).saturating_sub(within));
            return Ok(Extent { start: at, len, kind: ExtentKind::Zero(None) });
        };
        let (written, sectors) = state.sectors(self.storage(), block, place, within / SECTOR)?;
        let len = max.min((sectors * SECTOR).saturating_sub(within % SECTOR));
        let host = HostPlace::main(place.saturating_add(self.bitmap + within));
        let kind = if written { ExtentKind::Data(host) } else { ExtentKind::Zero(Some(host)) };
        Ok(Extent { start: at, len, kind })
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::plain(Some(self.block)))
    }

    fn flush(&self) -> Result<()> {
        self.image.flush()
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

impl Write for Dynamic {
    fn unit(&self) -> u64 {
        self.block
    }

    fn fill_unit(&self) -> u64 {
        // A block that is new at the end of the file reads as zeros around what is written.
        SECTOR
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let zero = store.is_zeros()?;
        let (block, within) = (at.get() / self.block, at.get() % self.block);
        let mut state = self.state();
        let (place, run) = state.run(self.storage(), block, within.saturating_add(len).div_ceil(self.block))?;
        let done = |len, action, ticket| Ok(Placed { start: at, len, store, action, ticket });
        let Some(old) = place else {
            if zero {
                let len = len.min((run * self.block).saturating_sub(within));
                return done(len, Action::Nothing, Ticket::Nothing);
            }
            let len = len.min(self.block - within);
            let (new, fresh) = state.take(self.storage())?;
            let place = HostPlace::main(new + self.bitmap + within);
            // Past the end of the file all is zero as it is.
            let (before, after) = if fresh { (0, 0) } else { (within, self.block - within - len) };
            return done(
                len,
                Action::Write { place, before, after },
                Ticket::New { unit: block, count: 1, entry: new },
            );
        };
        state.prepare(self.storage())?;
        let len = len.min(self.block - within);
        let place = HostPlace::main(old + self.bitmap + within);
        if zero {
            // Sectors that are not marked as written read as zeros already.
            return done(len, Action::Zero { place }, Ticket::Nothing);
        }
        let (written, sectors) = state.sectors(self.storage(), block, old, within / SECTOR)?;
        if written && sectors * SECTOR >= within % SECTOR + len {
            return done(len, Action::Write { place, before: 0, after: 0 }, Ticket::Nothing);
        }
        // The rest of a sector becomes visible with it.
        let (before, after) = (within % SECTOR, (within + len).next_multiple_of(SECTOR) - within - len);
        done(len, Action::Write { place, before, after }, Ticket::Marks { unit: block, entry: old })
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        let storage = self.storage();
        let mut state = self.state();
        match placed.ticket {
            Ticket::Marks { unit, entry } => {
                let within = placed.start.get() % self.block;
                let (from, to) = (within / SECTOR, (within + placed.len).div_ceil(SECTOR));
                return state.mark_sectors(storage, unit, entry, from, to);
            }
            Ticket::New { unit, entry, .. } => {
                state.write_bitmap(storage, unit, entry)?;
                state.set(storage, unit, Some(entry))?;
            }
            _ => return Ok(()),
        }
        if state.wants_writing() { state.write_tables(storage) } else { Ok(()) }
    }

    fn withdraw(&self, placed: &Placed) {
        if let Ticket::New { entry, .. } = placed.ticket {
            self.state().give_back(entry);
        }
    }

    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        punch(self, at, len)
    }
}
