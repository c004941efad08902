//! Placing, writing and publishing what a worker's chunk has come to.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use super::{Engine, Piece, PieceKind, Worker, lock, short_len};
use crate::block::error::Operation;
use crate::block::io::{Scratch, Step, write_steps};
use crate::block::{Error, GuestOffset, Node, Result, Store};
use crate::ops::copy::plan::Chunk;
use crate::ops::copy::source::{Content, Joined};
use crate::ops::copy::{Sharing, Taking, target};
use crate::storage::offload::Offload;

/// Zeros, to be written.
static NOTHING: [u8; 64 << 10] = [0; 64 << 10];

/// Whether workers wait for each other before they write to the target. The kernel lets one at a time write to a file,
/// and has those that wait for it spin. (1.4 GB, raw→qcow2 by two threads on two cores, wall and CPU seconds, medians: in
/// memory 0.70 and 1.35 where the kernel has them wait, 0.64 and 1.0 here; on ext4 0.37 and 0.88, 0.38 and 0.70.) Not where
/// a source or the target has requests in flight, of which more are there than cores: they are no better off, and from
/// a server 5 to 10 % worse. Nor where writing is encrypting too.
pub(super) fn one_writer(source: &Joined, target: &Node) -> bool {
    let cached = |node: &Node| node.driver().files().iter().all(|file| file.storage.facts().parallel.is_none());
    target.driver().cipher().is_none() && cached(target) && source.layers().all(cached)
}

impl<'a> Engine<'a> {
    /// Held while something is written.
    pub(super) fn alone(&self) -> Option<MutexGuard<'_, ()>> {
        self.writer.as_ref().map(lock)
    }

    /// Places, writes and publishes what a chunk has come to.
    pub(super) fn store(&self, worker: &mut Worker<'a>, len: usize) -> Result<()> {
        let Worker { chunk, plain, encoded, units, scratch, pieces, steps, .. } = worker;
        let plain = plain.first(len);
        let early = self.facts.unnamed;
        let deferred_zeros = !self.ordered();
        // Before the turn, in which some of it may be written. What is counted is the guest's, however short it is stored.
        let data = pieces.iter().filter(|piece| piece.kind == PieceKind::Data).map(|piece| piece.len);
        self.wait(data.chain(units.iter().map(|unit| unit.len)).sum());
        self.in_turn(chunk.number, || {
            for piece in pieces.iter() {
                let from = short_len(piece.at - chunk.at);
                match piece.kind {
                    PieceKind::Data if self.one_by_one => {
                        target::place(self.target, piece, from, false, steps)?;
                        write_steps(steps, plain, encoded, self.hole, scratch)?;
                        steps.drain(..).try_for_each(|step| step.placement.publish())?;
                    }
                    PieceKind::Data => target::place(self.target, piece, from, early, steps)?,
                    PieceKind::Zero if !deferred_zeros => self.make_zero(piece.at, piece.len)?,
                    _ => {}
                }
            }
            for unit in units.iter() {
                if unit.encoded {
                    let store = Store::Compressed { bytes: unit.bytes as u64 };
                    let mut placement = self.target.place(GuestOffset(unit.at), unit.len, store)?;
                    if early {
                        placement.publish_early()?;
                    }
                    let step = Step { placement, from: unit.from, len: unit.bytes, encoded: true, done: 0 };
                    steps.push(step);
                } else {
                    let piece = Piece { at: unit.at, len: unit.len, kind: PieceKind::Data };
                    target::place(self.target, &piece, unit.from, early, steps)?;
                }
                // The place of the next one may come with a table that lies behind this one.
                if self.one_by_one {
                    write_steps(steps, plain, encoded, self.hole, scratch)?;
                    steps.drain(..).try_for_each(|step| step.placement.publish())?;
                }
            }
            Ok(())
        })
        .map_err(|error| self.wrote(error, chunk.at))?;
        units.clear();
        self.write(worker, len)?;
        let Worker { chunk, pieces, steps, .. } = worker;
        if deferred_zeros {
            for piece in pieces.iter().filter(|piece| piece.kind == PieceKind::Zero) {
                self.make_zero(piece.at, piece.len)?;
            }
        }
        steps.drain(..).try_for_each(|step| step.placement.publish()).map_err(|error| self.wrote(error, chunk.at))
    }

    /// What the host may do in place of writing, as long as it can.
    pub(super) fn offload(&self) -> Option<Offload> {
        self.offload.filter(|_| !self.cannot_offload.load(Ordering::Relaxed))
    }

    /// Whether what is done with a chunk is known without reading it, and all of it is the host's to do, if it can.
    pub(super) fn is_unread(&self, chunk: &Chunk<'a>) -> bool {
        self.offload() == Some(Offload::ShareOrCopy) && self.digest.is_none() && chunk.is_unsearched()
    }

    /// Has the host do what it can of what has been placed. Zeros between that are written, where the file has none yet.
    pub(super) fn share(&self, chunk: &Chunk<'a>, steps: &mut [Step<'a>], scratch: &mut Scratch) -> Result<()> {
        let Some(most) = self.offload() else { return Ok(()) };
        let zeros_too = self.target.driver().cipher().is_none();
        for step in steps.iter_mut() {
            while step.done < step.len {
                let at = chunk.at + (step.from + step.done) as u64;
                let Some(segment) = chunk.segment(at) else { break };
                let len = (segment.end() - at).min((step.len - step.done) as u64);
                let mapping = match &segment.content {
                    Content::Stored(mapping) => mapping,
                    Content::Zero if zeros_too && !step.encoded => {
                        if self.sparse.off() || !step.skip_zeros(len)? {
                            let zeros = &NOTHING[..short_len(len).min(NOTHING.len())];
                            step.write_next(zeros, usize::MAX, scratch)?;
                        }
                        continue;
                    }
                    _ => break,
                };
                // What was looked at for zeros has been read.
                let how = match (at < chunk.search_from, self.facts.sharing) {
                    (true, _) => most,
                    (false, Sharing::Always) => Offload::Share,
                    (false, _) => break,
                };
                let before = step.done;
                if !step.offload(&mapping.after(at - segment.at), len, how)? {
                    self.cannot_offload.store(true, Ordering::Relaxed);
                    return Ok(());
                }
                if ((step.done - before) as u64) < len {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Writes what has been placed.
    fn write(&self, worker: &mut Worker<'a>, len: usize) -> Result<()> {
        let Worker { chunk, steps, scratch, .. } = worker;
        if self.facts.taking == Taking::Nothing {
            return steps.iter().try_for_each(Step::reserve);
        }
        self.share(chunk, steps, scratch).map_err(|error| self.wrote(error, chunk.at))?;
        if worker.unread && worker.steps.iter().any(|step| step.done < step.len) {
            self.fill(worker, len, len)?;
        }
        let Worker { plain, encoded, scratch, steps, .. } = worker;
        let _alone = steps.iter().any(|step| step.done < step.len).then(|| self.alone());
        write_steps(steps, plain.first(len), encoded, self.hole, scratch)
    }

    /// Which file, and where: unless that is said already.
    pub(super) fn wrote(&self, error: Error, at: u64) -> Error {
        match error.tells_guest() {
            true => error,
            false => error.at(self.target.place_of(Operation::Write, GuestOffset(at))),
        }
    }

    pub(super) fn make_zero(&self, at: u64, len: u64) -> Result<()> {
        let unmap = self.detect.unwrap_or(true);
        let done = self.target.write_zeroes(GuestOffset(at), len, unmap, &mut Scratch::default());
        done.map_err(|error| self.wrote(error, at))
    }
}
