//! The dynamic kind, and the differencing one: blocks are added as they are written.

use std::ops::Deref;

use super::Vpc;
use super::layout::{DynamicHeader, Footer, SECTOR, Sectors};
use super::parent::VpcParent;
use super::table::VpcState;
use crate::block::info::ImageInfo;
use crate::block::io::punch;
use crate::block::{
    Action, BackingRef, BlockDriver, Check, Child, Error, Extent, ExtentKind, Format, GuestOffset, HostOffset,
    HostPlace, Placed, Purpose, Resize, Result, Store, Ticket, Write,
};
use crate::formats::one_file::{OneFile, Tables};

/// The largest block that is written: one has to fit in memory.
const MAX_WRITTEN_BLOCK: u64 = 64 << 20;

/// A dynamic or differencing disk.
#[derive(Debug)]
pub struct Dynamic {
    image: OneFile<VpcState>,
    block: u64,
    bitmap: u64,
    uuid: u128,
    parent: Option<VpcParent>,
}

impl Dynamic {
    /// Checks the table and opens.
    pub fn open(
        file: Child,
        footer: Footer,
        header: DynamicHeader,
        parent: Option<VpcParent>,
        size: u64,
        purpose: Purpose,
    ) -> Result<Self> {
        let write = purpose.writes();
        let locators = parent.as_ref().map_or_else(Vec::new, |parent| parent.locators.clone());
        let uuid = footer.uuid();
        let state = VpcState::open(&file, footer, header, locators, size, purpose)?;
        let (block, bitmap) = (state.block(), state.bitmap());
        if write && block > MAX_WRITTEN_BLOCK {
            return Err(Error::unsupported(format!("blocks of {block} bytes cannot be written")));
        }
        Ok(Self { image: OneFile::new(file, size, state, write), block, bitmap, uuid, parent })
    }

    /// Whether another disk shows where this one has nothing.
    pub fn has_parent(&self) -> bool {
        self.parent.is_some()
    }

    /// Where a byte of a block is whose bitmap is at `at`.
    fn data(&self, at: HostOffset, within: u64) -> HostPlace {
        HostPlace { file: 0, at: at + self.bitmap + within }
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

    /// Blocks are written as a whole.
    fn short_unit(&self) -> Option<u64> {
        Some(1)
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let max = max.min(self.virtual_size().saturating_sub(at.get()));
        let (block, within) = (at.get() / self.block, at.get() % self.block);
        let mut state = self.state();
        let (place, run) = state.run(self.storage(), block, within.saturating_add(max).div_ceil(self.block))?;
        let Some(place) = place else {
            let len = max.min((run * self.block).saturating_sub(within));
            let kind = if self.parent.is_some() { ExtentKind::Unallocated(None) } else { ExtentKind::Zero(None) };
            return Ok(Extent { start: at, len, kind });
        };
        let (written, sectors) = state.sectors(self.storage(), block, place, Sectors::within(within))?;
        let len = max.min(sectors.bytes().saturating_sub(within % SECTOR));
        let host = self.data(place, within);
        let kind = match written {
            true => ExtentKind::Data(host),
            false if self.parent.is_some() => ExtentKind::Unallocated(Some(host)),
            false => ExtentKind::Zero(Some(host)),
        };
        Ok(Extent { start: at, len, kind })
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn backing(&self) -> Option<&BackingRef> {
        self.parent.as_ref().map(|parent| &parent.backing)
    }

    fn content_id(&self) -> Option<u128> {
        Some(self.uuid)
    }

    fn accept_backing(&self, below: &dyn BlockDriver) -> Result<()> {
        let Some(parent) = &self.parent else {
            return Err(Error::unsupported("The image is no differencing disk, and has no parent"));
        };
        match below.content_id().filter(|_| below.format() == Vpc.name()) {
            Some(id) if id == parent.uuid => Ok(()),
            Some(id) => Err(Error::corrupt(format!(
                "The parent is not the one that this image was made on: its UUID is {id:032x}, not {:032x}",
                parent.uuid
            ))),
            None => Err(Error::corrupt("The parent is not a vpc image")),
        }
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
            if zero && self.parent.is_none() {
                let len = len.min((run * self.block).saturating_sub(within));
                return done(len, Action::Nothing, Ticket::Nothing);
            }
            let len = len.min(self.block - within);
            let (new, fresh) = state.take(self.storage())?;
            let place = self.data(new, within);
            // Past the end of the file all is zero as it is.
            let whole = fresh && self.parent.is_none();
            let (before, after) = if whole { (0, 0) } else { (within, self.block - within - len) };
            return done(
                len,
                Action::Write { place, before, after },
                Ticket::New { unit: block, count: 1, entry: new.get() },
            );
        };
        state.prepare(self.storage())?;
        let len = len.min(self.block - within);
        let place = self.data(old, within);
        if zero {
            // Sectors that are not marked as written read as zeros already, unless a parent shows there.
            let mark = Ticket::Marks { unit: block, entry: old.get() };
            return done(len, Action::Zero { place }, if self.parent.is_some() { mark } else { Ticket::Nothing });
        }
        let (written, sectors) = state.sectors(self.storage(), block, old, Sectors::within(within))?;
        if written && sectors.bytes() >= within % SECTOR + len {
            return done(len, Action::Write { place, before: 0, after: 0 }, Ticket::Nothing);
        }
        // The rest of a sector becomes visible with it.
        let (before, after) = (within % SECTOR, (within + len).next_multiple_of(SECTOR) - within - len);
        done(len, Action::Write { place, before, after }, Ticket::Marks { unit: block, entry: old.get() })
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        let storage = self.storage();
        let mut state = self.state();
        match placed.ticket {
            Ticket::Marks { unit, entry } => {
                let within = placed.start.get() % self.block;
                let sectors = Sectors::within(within)..Sectors::holding(within + placed.len);
                return state.mark_sectors(storage, unit, HostOffset(entry), sectors);
            }
            Ticket::New { unit, entry, .. } => {
                let at = HostOffset(entry);
                state.write_bitmap(storage, unit, at)?;
                state.set(storage, unit, Some(at))?;
            }
            _ => return Ok(()),
        }
        if state.wants_writing() { state.write_tables(storage) } else { Ok(()) }
    }

    fn withdraw(&self, placed: &Placed) {
        if let Ticket::New { entry, .. } = placed.ticket {
            self.state().give_back(HostOffset(entry));
        }
    }

    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        punch(self, at, len)
    }
}
