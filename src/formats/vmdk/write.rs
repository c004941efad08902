//! Where new data goes in a vmdk, and how it becomes visible.
//!
//! Grains are appended in the order of the calls to `place`. Tables change in memory at `publish` and reach the
//! file at `flush`, after the grains. The content id is changed once, before the first write (`text.rs`).

use std::sync::atomic::Ordering;

use crate::block::error::Context;
use crate::block::io::punch_at;
use crate::block::{
    Action, Compress, Effort, Encoded, Error, ErrorKind, GuestOffset, HostOffset, HostPlace, Placed, Result, Store,
    Ticket, Write, ZeroedRoom,
};
use crate::codec::deflate::How;

use super::descriptor::ExtentAccess;
use super::layout::*;
use super::sparse::Sparse;
use super::tables::Grain;
use super::{Body, VmdkDriver, VmdkPart, grain, whole};

impl VmdkDriver {
    fn sparse_at(&self, at: GuestOffset) -> Option<(&VmdkPart, &Sparse)> {
        let part = &self.parts[self.part_at(at.get()).ok()?];
        match &part.body {
            Body::Sparse { sparse, .. } => Some((part, sparse)),
            _ => None,
        }
    }

    fn place_sparse(
        &self,
        file: usize,
        part: &VmdkPart,
        sparse: &Sparse,
        at: u64,
        len: u64,
        store: Store,
    ) -> Result<Placed> {
        let shape = sparse.shape;
        let start = part.start + at;
        let (first, skip) = (at / shape.grain, at % shape.grain);
        let here = |sector: Sectors| HostPlace { file, at: HostOffset(sector.bytes()) + skip };
        let placed = |len, action, ticket| Placed { start, len, store, action, ticket };
        let mut state = sparse.state();
        if let Store::Compressed { bytes } = store {
            let len = len.min(shape.grain);
            if state.grain(sparse, first)? != Grain::Unallocated {
                // A stream holds each grain once, and its readers rely on that.
                return Err(Error::unsupported("Could not write to allocated cluster for streamOptimized"));
            }
            let sector = if state.stream.is_some() {
                state.place_encoded(sparse, first, bytes)?
            } else {
                state.ensure_table(sparse, first)?;
                let sector = state.next;
                state.next += Sectors::holding(bytes);
                sector32(sector)?.into()
            };
            let action = Action::Write { place: here(sector), before: 0, after: 0 };
            return Ok(placed(len, action, Ticket::Packed { unit: first, entry: sector.0 }));
        }
        if shape.compressed && store == Store::Data {
            return Err(Error::unsupported("a stream-optimized image takes whole compressed grains only"));
        }
        // How many grains from here on are alike, within the range.
        let wanted = (skip + len).div_ceil(shape.grain);
        let old = state.grain(sparse, first)?;
        let mut grains = 1;
        while grains < wanted {
            let next = state.grain(sparse, first + grains)?;
            let alike = match (old, next) {
                (Grain::At(a), Grain::At(b)) => a + shape.grain_sectors() * grains == b,
                (Grain::At(_), _) | (_, Grain::At(_)) => false,
                (a, b) => a == b || store == Store::Data,
            };
            if !alike {
                break;
            }
            grains += 1;
        }
        let mut len = len.min(grains * shape.grain - skip);
        let grains_of = |len: u64| (skip + len).div_ceil(shape.grain);
        match (store, old) {
            (Store::Zero { .. }, Grain::Zeroed) => Ok(placed(len, Action::Nothing, Ticket::Nothing)),
            (Store::Zero { .. }, Grain::Unallocated)
                if self.backing.is_none() && !self.keeps_zeros.load(Ordering::Relaxed) =>
            {
                Ok(placed(len, Action::Nothing, Ticket::Nothing))
            }
            (Store::Zero { .. }, Grain::Unallocated) if shape.compressed => {
                // Over a parent zeros are data like any other.
                Err(Error::unsupported("a stream-optimized image takes whole compressed grains only"))
            }
            (Store::Zero { .. }, _) if shape.zeroed && !shape.compressed => {
                state.ensure_table(sparse, first)?;
                let ticket = Ticket::Zeros { unit: first, count: grains_of(len), room: ZeroedRoom::GiveUp };
                Ok(placed(len, Action::Nothing, ticket))
            }
            (Store::Zero { .. }, Grain::At(_)) if shape.compressed => {
                Err(Error::unsupported("a stream-optimized image cannot be written over"))
            }
            (Store::Zero { .. }, Grain::At(sector)) => {
                Ok(placed(len, Action::Zero { place: here(sector) }, Ticket::Nothing))
            }
            (_, Grain::At(sector)) => {
                let action = Action::Write { place: here(sector), before: 0, after: 0 };
                Ok(placed(len, action, Ticket::Nothing))
            }
            (_, Grain::Unallocated | Grain::Zeroed) => {
                if matches!(store, Store::Zero { .. }) {
                    len = len.min(shape.grain - skip);
                }
                let grains = grains_of(len);
                let mut table = first;
                while table < first + grains {
                    state.ensure_table(sparse, table)?;
                    table = (table / shape.gtes + 1) * shape.gtes;
                }
                let sector = state.next;
                sector32(sector + shape.grain_sectors() * grains)?;
                state.next += shape.grain_sectors() * grains;
                let after = grains * shape.grain - skip - len;
                let action = Action::Write { place: here(sector), before: skip, after };
                Ok(placed(len, action, Ticket::New { unit: first, count: grains, entry: sector.0 }))
            }
        }
    }

    /// Makes sure, once, that the image can be written to without harm.
    fn prepare(&self) -> Result<()> {
        let mut done = self.whole.lock().unwrap_or_else(|e| e.into_inner());
        if !*done {
            for part in &self.parts {
                if let Body::Sparse { sparse, .. } = &part.body {
                    whole::check(sparse)?;
                }
            }
            *done = true;
        }
        Ok(())
    }

    /// Tables, then the content id, then whatever the cache mode asks for.
    pub(super) fn write_out(&self) -> Result<()> {
        if !self.write {
            return Ok(());
        }
        let flush_files = || -> Result<()> {
            for file in &self.files {
                file.flush()?;
            }
            self.text_file().flush().context("could not flush the descriptor")
        };
        flush_files()?;
        for part in &self.parts {
            if let Body::Sparse { sparse, .. } = &part.body {
                sparse.flush()?;
            }
        }
        flush_files()
    }
}

impl Write for VmdkDriver {
    fn unit(&self) -> u64 {
        self.parts
            .iter()
            .filter_map(|part| match &part.body {
                Body::Sparse { sparse, .. } => Some(sparse.shape.grain),
                _ => None,
            })
            .max()
            .unwrap_or(1)
    }

    fn begin(&self) -> Result<()> {
        self.prepare()?;
        self.renew()
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let part = &self.parts[self.part_at(at.get())?];
        let inside = part.inside(at);
        let len = len.min(part.end().saturating_sub(at.get()));
        if part.access != ExtentAccess::ReadWrite
            && !matches!(&part.body, Body::Sparse { sparse, .. } if sparse.shape.compressed)
        {
            return Err(Error::unsupported(format!("offset {at} lies in an extent that may not be written")));
        }
        self.prepare()?;
        self.renew()?;
        match &part.body {
            Body::Forbidden => Err(Error::unsupported("the extent is marked NOACCESS")),
            Body::Closed { name } => Err(Error::new(ErrorKind::Forbidden, format!("'{name}' was not opened"))),
            Body::SeSparse { .. } => Err(Error::unsupported("seSparse extents cannot be written")),
            Body::Zero => match store {
                Store::Zero { .. } => {
                    Ok(Placed { start: at, len, store, action: Action::Nothing, ticket: Ticket::Nothing })
                }
                _ => Err(Error::unsupported("an extent of type ZERO cannot be written")),
            },
            Body::Flat { file, offset } => {
                let place = HostPlace { file: *file, at: *offset + inside };
                let action = match store {
                    Store::Zero { .. } => Action::Zero { place },
                    Store::Data => Action::Write { place, before: 0, after: 0 },
                    Store::Compressed { .. } => {
                        return Err(Error::unsupported("Compression not supported for flat extents"));
                    }
                };
                Ok(Placed { start: at, len, store, action, ticket: Ticket::Nothing })
            }
            Body::Sparse { file, sparse } => self.place_sparse(*file, part, sparse, inside, len, store),
        }
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        let (unit, count, sector) = match placed.ticket {
            Ticket::New { unit, count, entry } => (unit, count, Some(Sectors(entry))),
            Ticket::Packed { unit, entry } => (unit, 1, Some(Sectors(entry))),
            Ticket::Zeros { unit, count, .. } => (unit, count, None),
            Ticket::Nothing | Ticket::Whole { .. } | Ticket::Marks { .. } => return Ok(()),
        };
        let Some((_, sparse)) = self.sparse_at(placed.start) else { return Ok(()) };
        let mut state = sparse.state();
        if state.stream.is_some() {
            return Ok(());
        }
        for grain in 0..count {
            let value = match sector {
                Some(sector) => sector32(sector + sparse.shape.grain_sectors() * grain)?,
                None => GTE_ZEROED,
            };
            state.change(sparse, unit + grain, value)?;
        }
        Ok(())
    }

    fn withdraw(&self, placed: &Placed) {
        let Some((_, sparse)) = self.sparse_at(placed.start) else { return };
        let (unit, sector, sectors) = match (placed.ticket, placed.store) {
            (Ticket::New { unit, count, entry }, _) => (unit, Sectors(entry), sparse.shape.grain_sectors() * count),
            (Ticket::Packed { unit, entry }, Store::Compressed { bytes }) => {
                (unit, Sectors(entry), Sectors::holding(bytes))
            }
            _ => return,
        };
        let mut state = sparse.state();
        state.forget(sparse, unit);
        if sector + sectors == state.next {
            state.next = sector;
        }
    }

    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        let part = &self.parts[self.part_at(at.get())?];
        if let Body::Flat { file, offset } = &part.body {
            let inside = part.inside(at);
            let len = len.min(part.end().saturating_sub(at.get()));
            punch_at(self, HostPlace { file: *file, at: *offset + inside }, len)?;
        }
        Ok(())
    }

    fn compressing(&self) -> Option<&dyn Compress> {
        // Encoded grains begin with a marker: an extent without them is read only.
        let compressed = |part: &VmdkPart| match &part.body {
            Body::Sparse { sparse, .. } => sparse.shape.compressed && sparse.shape.markers,
            _ => false,
        };
        self.parts.iter().all(compressed).then_some(self)
    }
}

impl Compress for VmdkDriver {
    fn encode(&self, at: GuestOffset, plain: &[u8], effort: Effort, out: &mut Vec<u8>) -> Result<Encoded> {
        let how = How { level: effort.level.unwrap_or(How::VMDK.level), ..How::VMDK };
        let (part, _) = self.sparse_at(at).ok_or_else(|| Error::corrupt("no sparse extent here"))?;
        grain::encode(Sectors::within(part.inside(at)), plain, how, out)?;
        Ok(Encoded::Smaller)
    }

    fn always(&self) -> bool {
        true
    }
}
