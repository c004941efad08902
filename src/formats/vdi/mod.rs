//! vdi: VirtualBox's disk image, dynamic, static and differencing.
//!
//! Invariants: no two map entries name the same block; the header's counter of blocks is above every index in
//! use, because QEMU and VirtualBox take it for the index of the next new block. Hence the order on disk: data,
//! then the counter, in one write with the entries that share the file's first page with it (those of the first
//! 896 MiB), then the rest of the map. A stop in between leaves a block that nothing names, or a counter that is too
//! high.
//!
//! One lock, over the tables (`one_file.rs`); it is never held while guest data moves.

mod check;
mod create;
mod layout;
mod map;
mod measure;
mod parent;
mod resize;

use std::ops::Deref;

use self::layout::{HEADER, HEADER_BYTES, HostBlock, MapEntry, STATIC, VdiHeader};
use self::map::VdiState;
use self::parent::VdiParent;
use crate::block::driver::ZeroedRoom;
use crate::block::info::ImageInfo;
use crate::block::io::punch;
use crate::block::{
    Action, BackingRef, BlockDriver, Check, Child, Create, Error, Extent, ExtentKind, Format, GuestOffset, HostPlace,
    OpenRequest, Placed, Resize, Result, Store, StoredWord, Ticket, Write,
};
use crate::formats::one_file::{OneFile, Tables};

/// The format.
#[derive(Debug)]
pub struct Vdi;

/// The most blocks that one placement covers.
const RUN: u64 = 16;

impl Format for Vdi {
    fn name(&self) -> &'static str {
        "vdi"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        let signature = head.get(layout::SIGNATURE_AT..).unwrap_or_default();
        if signature.starts_with(&layout::SIGNATURE.to_le_bytes()) { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let OpenRequest { file, purpose, related, .. } = request;
        let write = purpose.writes();
        let mut head = [0; HEADER_BYTES];
        file.read_metadata(HEADER, 0, &mut head)?;
        let header = VdiHeader::parse(head)?;
        let state = VdiState::new(header.clone(), &file.name);
        Ok(Box::new(VdiDriver {
            block: u64::from(header.block_size()),
            fixed: header.kind() == STATIC,
            image_id: header.image(),
            parent: header.link().map(|id| VdiParent::find(id, related)),
            image: OneFile::new(file, header.size().next_multiple_of(512), state, write),
        }))
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }

    fn layered(&self) -> bool {
        true
    }
}

#[derive(Debug)]
struct VdiDriver {
    image: OneFile<VdiState>,
    /// Bytes of a block.
    block: u64,
    fixed: bool,
    /// Its UUID.
    image_id: u128,
    parent: Option<VdiParent>,
}

impl VdiDriver {
    fn blocks(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.block)
    }
}

impl Deref for VdiDriver {
    type Target = OneFile<VdiState>;

    fn deref(&self) -> &OneFile<VdiState> {
        &self.image
    }
}

impl BlockDriver for VdiDriver {
    fn format(&self) -> &'static str {
        Vdi.name()
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
        let run = state.run(self.storage(), block, self.blocks(within.saturating_add(max)));
        let (entry, run) = run.map_err(|error| error.naming(&self.files[0].name))?;
        let len = max.min((run * self.block).saturating_sub(within));
        let kind = match entry {
            MapEntry::Unallocated if self.parent.is_some() => ExtentKind::Unallocated(None),
            MapEntry::Unallocated | MapEntry::Discarded => ExtentKind::Zero(None),
            MapEntry::At(host) => {
                let place = HostPlace { file: 0, at: state.host(host) + within };
                drop(state);
                if self.fixed {
                    return self.files[0].stored_extent(at, place, len);
                }
                ExtentKind::Data(place)
            }
        };
        Ok(Extent { start: at, len, kind })
    }

    fn stored_word(&self, _at: GuestOffset) -> Result<StoredWord> {
        // A static image is as sparse as the host made it.
        Ok(if self.fixed { StoredWord::Both } else { StoredWord::Layer })
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn backing(&self) -> Option<&BackingRef> {
        self.parent.as_ref().map(|parent| &parent.backing)
    }

    fn content_id(&self) -> Option<u128> {
        Some(self.image_id)
    }

    fn accept_backing(&self, below: &dyn BlockDriver) -> Result<()> {
        let Some(parent) = &self.parent else {
            return Err(Error::unsupported("The image is no differencing image, and has no parent"));
        };
        match below.content_id().filter(|_| below.format() == Vdi.name()) {
            Some(id) if id == parent.id => Ok(()),
            Some(id) => Err(Error::corrupt(format!(
                "The parent is not the one that this image was made on: its UUID is {}, not {}",
                parent::text_of(id),
                parent::text_of(parent.id)
            ))),
            None => Err(Error::corrupt("The parent is not a vdi image")),
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

impl Write for VdiDriver {
    fn unit(&self) -> u64 {
        self.block
    }

    fn fill_unit(&self) -> u64 {
        // A block that is new at the end of the file reads as zeros around what is written, or as the parent.
        if self.parent.is_some() { self.block } else { 512 }
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let (block, within) = (at.get() / self.block, at.get() % self.block);
        let zero = store.is_zeros()?;
        let wanted = self.blocks(within.saturating_add(len));
        let mut state = self.state();
        let (entry, run) = state.run(self.storage(), block, wanted)?;
        let covered = |blocks: u64| len.min(blocks.saturating_mul(self.block).saturating_sub(within));
        if let MapEntry::At(host) = entry {
            state.space(self.storage())?;
            let place = HostPlace { file: 0, at: state.host(host) + within };
            return Placed::over(at, covered(run), store, place);
        }
        let below = entry == MapEntry::Unallocated && self.parent.is_some();
        if zero && !below {
            return Ok(Placed::known(at, covered(run), store, Action::Nothing));
        }
        let whole = len.min(run.saturating_mul(self.block).saturating_sub(within));
        let end = at.get().saturating_add(whole);
        let count = if end >= self.virtual_size() { self.blocks(end) } else { end / self.block }.saturating_sub(block);
        if zero && within == 0 && count > 0 {
            let ticket = Ticket::Zeros { unit: block, count, room: ZeroedRoom::GiveUp };
            return Ok(Placed { start: at, len: covered(count), store, action: Action::Nothing, ticket });
        }
        let (first, count, fresh) = state.take(self.storage(), run.min(RUN))?;
        let (len, fresh) = (covered(count), fresh && !below);
        let place = HostPlace { file: 0, at: state.host(first) + within };
        // Past the end of the file all is zero as it is.
        let (before, after) = if fresh { (0, 0) } else { (within, count * self.block - within - len) };
        let ticket = Ticket::New { unit: block, count, entry: first.0 };
        Ok(Placed { start: at, len, store, action: Action::Write { place, before, after }, ticket })
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        let mut state = self.state();
        match placed.ticket {
            Ticket::New { unit: block, count, entry: first } => {
                for n in 0..count {
                    state.set(self.storage(), block + n, MapEntry::At(HostBlock(first) + n))?;
                }
            }
            Ticket::Zeros { unit: block, count, .. } => {
                state.space(self.storage())?;
                for n in 0..count {
                    state.set(self.storage(), block + n, MapEntry::Discarded)?;
                }
            }
            _ => return Ok(()),
        }
        if state.is_full() { state.write_tables(self.storage()) } else { Ok(()) }
    }

    fn withdraw(&self, placed: &Placed) {
        if let Ticket::New { count, entry: first, .. } = placed.ticket {
            self.state().give_back(HostBlock(first), count);
        }
    }

    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        punch(self, at, len)
    }
}
