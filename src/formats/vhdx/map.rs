//! Where guest data is, and where new data goes.

use super::layout::{BlockState, Guid, MIB};
use super::parent::Parent;
use super::state::VhdxState;
use super::{Vhdx, VhdxDriver};
use crate::block::driver::ZeroedRoom;
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::io::punch;
use crate::block::{
    Action, BackingChange, BackingRef, BlockDriver, Check, Child, Error, Extent, ExtentKind, Format, GuestOffset,
    HostPlace, Placed, Resize, Result, Store, StoredWord, Ticket, Write, keeps_its_parent,
};
use crate::formats::one_file::Tables;

/// The most blocks that one placement covers.
const RUN: u64 = 16;

impl BlockDriver for VhdxDriver {
    fn format(&self) -> &'static str {
        Vhdx.name()
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
        let found = self.look(at.get(), max).map_err(|error| error.naming(&self.files[0].name));
        let (kind, len) = found?;
        let extent = Extent { start: at, len: len.min(max), kind };
        match kind {
            ExtentKind::Data(place) if self.fixed => self.files[0].stored_extent(at, place, extent.len),
            _ => Ok(extent),
        }
    }

    fn stored_word(&self, _at: GuestOffset) -> Result<StoredWord> {
        // A fixed image is as sparse as the host made it.
        Ok(if self.fixed { StoredWord::Both } else { StoredWord::Layer })
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn backing(&self) -> Option<&BackingRef> {
        self.parent.as_ref().map(|parent| &parent.backing)
    }

    fn content_id(&self) -> Option<u128> {
        Some(self.state().headers.current.data_write.number())
    }

    fn accept_backing(&self, below: &dyn BlockDriver) -> Result<()> {
        let Some(parent) = &self.parent else {
            return Err(Error::unsupported("The image is no differencing disk, and has no parent"));
        };
        let mut known: Vec<u128> = parent.linkage.iter().map(|guid| guid.number()).collect();
        known.extend(*self.relinked.lock().unwrap_or_else(|e| e.into_inner()));
        match below.content_id() {
            Some(id) if below.format() == Vhdx.name() && known.contains(&id) => {}
            Some(id) if below.format() == Vhdx.name() => {
                let (is, was) = (Guid::new(id), parent.linkage[0]);
                return Err(Error::corrupt(format!(
                    "The parent has changed since this image was made: its data write GUID is {is}, not {was}"
                )));
            }
            _ => return Err(Error::corrupt("The parent is not a vhdx image")),
        }
        Ok(())
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

    fn backing_change(&self) -> Option<&dyn BackingChange> {
        self.parent.is_some().then_some(self)
    }
}

/// The parent stays the same file: its name is in the locator in forms that only the system has which made it.
impl BackingChange for VhdxDriver {
    fn check(&self, _new: Option<&BackingRef>, _below: Option<&dyn BlockDriver>) -> Result<()> {
        Err(keeps_its_parent(self))
    }

    fn begin(&self) {}

    fn change(&self, new: Option<&BackingRef>, below: Option<&dyn BlockDriver>) -> Result<()> {
        BackingChange::check(self, new, below)
    }

    fn follow(&self, below: &dyn BlockDriver) -> Result<()> {
        let not_vhdx = || Error::corrupt("The parent is not a vhdx image");
        let id = below.content_id().filter(|_| below.format() == Vhdx.name()).ok_or_else(not_vhdx)?;
        let mut state = self.state();
        let Some(item) = state.metadata.locator else { return Ok(()) };
        let storage = self.storage();
        state.prepare(storage)?;
        if let Some((at, text)) = Parent::relinked(&item.bytes(storage)?, Guid::new(id))? {
            storage.flush().context("Could not flush")?;
            storage.write_at(item.at + at, &text).context("Could not write the parent locator")?;
            storage.flush().context("Could not flush")?;
        }
        *self.relinked.lock().unwrap_or_else(|e| e.into_inner()) = Some(id);
        Ok(())
    }
}

impl VhdxDriver {
    /// What is at a guest offset, and for how many bytes at most (it may be more than was asked for).
    fn look(&self, at: u64, max: u64) -> Result<(ExtentKind, u64)> {
        let (block, within) = (at / self.block, at % self.block);
        let mut state = self.state();
        let (found, run) = state.sound_run(self.storage(), block, self.blocks(within.saturating_add(max)))?;
        let rest = run.saturating_mul(self.block).saturating_sub(within);
        Ok(match found {
            BlockState::Full(first) => (ExtentKind::Data(place(first, within)), rest),
            BlockState::NotPresent => (ExtentKind::Unallocated(None), rest),
            BlockState::Partial(first) => {
                let (present, sectors) = state.sectors(self.storage(), block, within / self.sector)?;
                let place = place(first, within);
                let kind = if present { ExtentKind::Data(place) } else { ExtentKind::Unallocated(Some(place)) };
                (kind, sectors * self.sector - within % self.sector)
            }
            BlockState::Zero | BlockState::Invalid(_) => (ExtentKind::Zero(None), rest),
        })
    }

    /// A range that becomes part of what a block has, in whole sectors of it.
    fn sectors(&self, at: u64, len: u64, store: Store, first: u64, ticket: Ticket) -> Result<Placed> {
        let (start, within) = (GuestOffset(at), at % self.block);
        let place = place(first, within);
        let action = if store.is_zeros()? {
            Action::Zero { place }
        } else {
            let end = (within + len).next_multiple_of(self.sector);
            Action::Write { place, before: within % self.sector, after: end - within - len }
        };
        Ok(Placed { start, len, store, action, ticket })
    }

    /// The sectors that a published range makes present.
    fn written(&self, placed: &Placed) -> std::ops::Range<u64> {
        let within = placed.start.get() % self.block;
        within / self.sector..(within + placed.len).div_ceil(self.sector)
    }

    /// A range, or what of it lies in whole blocks, where that is all of the first one at least.
    fn whole_blocks(&self, at: u64, len: u64) -> Option<u64> {
        let end = at.saturating_add(len);
        let blocks = if end >= self.virtual_size() { self.blocks(end) } else { end / self.block };
        blocks.checked_sub(at / self.block).filter(|count| *count > 0 && at.is_multiple_of(self.block))
    }
}

fn place(mib: u64, within: u64) -> HostPlace {
    HostPlace::main(mib.saturating_mul(MIB).saturating_add(within))
}

impl Write for VhdxDriver {
    fn unit(&self) -> u64 {
        self.block
    }

    fn fill_unit(&self) -> u64 {
        // A new block reads as zeros around what is written, or its other sectors as the parent.
        if self.parent.is_some() { self.sector } else { 512 }
    }

    fn begin(&self) -> Result<()> {
        self.state().prepare(self.storage())
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let (start, storage) = (at.get(), self.storage());
        let (block, within) = (start / self.block, start % self.block);
        let zero = store.is_zeros()?;
        let mut state = self.state();
        state.prepare(storage)?;
        let (found, run) = state.sound_run(storage, block, self.blocks(within.saturating_add(len)))?;
        let covered = |blocks: u64| len.min(blocks.saturating_mul(self.block).saturating_sub(within));
        let whole = self.whole_blocks(start, covered(run)).filter(|_| zero);
        if let Some(count) = whole
            && (found == BlockState::NotPresent || (store == Store::Zero { unmap: true } && !self.fixed))
            && found != BlockState::Zero
        {
            let ticket = Ticket::Zeros { unit: block, count, room: ZeroedRoom::GiveUp };
            return Ok(Placed { start: at, len: covered(count), store, action: Action::Nothing, ticket });
        }
        match found {
            BlockState::Full(first) => Placed::over(at, covered(run), store, place(first, within)),
            BlockState::Partial(first) => {
                let (present, sectors) = state.sectors(storage, block, within / self.sector)?;
                let len = len.min(sectors * self.sector - within % self.sector);
                if present {
                    return Placed::over(at, len, store, place(first, within));
                }
                self.sectors(start, len, store, first, Ticket::Marks { unit: block, entry: first })
            }
            BlockState::NotPresent => {
                state.need_bitmap(storage, block)?;
                let (first, _) = state.take(storage, 1)?;
                self.sectors(start, covered(1), store, first, Ticket::New { unit: block, count: 1, entry: first })
            }
            BlockState::Zero | BlockState::Invalid(_) if zero => {
                Ok(Placed::known(at, covered(run), store, Action::Nothing))
            }
            BlockState::Zero | BlockState::Invalid(_) => {
                let (first, count) = state.take(storage, run.min(RUN))?;
                let action = Action::Write { place: place(first, within), before: 0, after: 0 };
                let ticket = Ticket::Whole { unit: block, count, entry: first };
                Ok(Placed { start: at, len: covered(count), store, action, ticket })
            }
        }
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        let storage = self.storage();
        let mut state = self.state();
        match placed.ticket {
            Ticket::Whole { unit, count, entry } => {
                let step = state.unit();
                for n in 0..count {
                    state.set(storage, unit + n, BlockState::Full(entry + n * step))?;
                }
            }
            Ticket::New { unit, entry, .. } => {
                // What a stopped write may have left.
                let all = self.block / self.sector;
                state.mark_sectors(storage, unit, 0..all, false)?;
                state.mark_sectors(storage, unit, self.written(placed), true)?;
                state.set(storage, unit, BlockState::Partial(entry))?;
            }
            Ticket::Marks { unit, .. } => state.mark_sectors(storage, unit, self.written(placed), true)?,
            Ticket::Zeros { unit, count, .. } => state.zero_blocks(storage, unit, count)?,
            _ => return Ok(()),
        }
        write_if_full(&mut state, storage)
    }

    fn withdraw(&self, placed: &Placed) {
        if let Ticket::New { count, entry: first, .. } | Ticket::Whole { count, entry: first, .. } = placed.ticket {
            self.state().give_back(first, count);
        }
    }

    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        let end = at.get().saturating_add(len).min(self.virtual_size());
        let start = at.get().next_multiple_of(self.block);
        let whole = self.whole_blocks(start, end.saturating_sub(start)).filter(|_| start < end && !self.fixed);
        self.state().prepare(self.storage())?;
        let Some(count) = whole else { return punch(self, at, len) };
        {
            let mut state = self.state();
            state.zero_blocks(self.storage(), start / self.block, count)?;
            write_if_full(&mut state, self.storage())?;
        }
        let rest = start.saturating_add(count * self.block);
        punch(self, at, start - at.get())?;
        punch(self, GuestOffset(rest), end.saturating_sub(rest))
    }
}

fn write_if_full(state: &mut VhdxState, storage: &dyn crate::storage::Storage) -> Result<()> {
    if state.is_full() { state.write_tables(storage) } else { Ok(()) }
}
