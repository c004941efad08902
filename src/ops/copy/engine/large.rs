//! Chunks of more bytes than a worker holds: of large units that are written, or given up, as a whole.
//!
//! They are gone through in parts, twice: to find out what is to be done with each granule, for which the first data in
//! it is enough, and, once there is a place for it, to write it.

use super::{Engine, MOST, Piece, PieceKind, Worker, short_len};
use crate::block::io::Step;
use crate::block::{GuestOffset, Result};
use crate::ops::copy::plan::{CHUNK, Chunk, Zeros};
use crate::ops::copy::source::Content;
use crate::ops::copy::{Taking, target};

impl<'a> Engine<'a> {
    /// Whether a chunk is gone through in parts. What is compared with a new backing file, encoded or encrypted is held
    /// as a whole.
    pub(super) fn is_large(&self, chunk: &Chunk<'a>) -> bool {
        let held = self.compress.is_some() || self.source.new_backing().is_some();
        chunk.len > MOST && !held && self.target.driver().cipher().is_none()
    }

    /// Moves such a chunk.
    pub(super) fn process_large(&self, worker: &mut Worker<'a>) -> Result<()> {
        let whole = std::mem::take(&mut worker.chunk);
        let done = self.find_out(&whole, worker).and_then(|()| self.store_large(&whole, worker));
        worker.chunk = whole;
        done
    }

    /// Decides what is done with each granule.
    fn find_out(&self, whole: &Chunk<'a>, worker: &mut Worker<'a>) -> Result<()> {
        let mut pieces = Vec::new();
        match self.digest {
            _ if self.is_unread(whole) => target::decide(whole, &[], self.sparse, self.zeros, &mut pieces),
            None => self.survey(whole, &mut pieces, worker)?,
            Some(_) => {
                self.hashing.take(whole.number, true, &self.stop, || self.survey(whole, &mut pieces, worker))?;
            }
        }
        if self.granule > 1 {
            let blank = self.source.blank_from();
            target::coarsen(whole.at, whole.len, self.granule, blank, &mut worker.flags, &mut pieces);
        }
        pieces.retain(|piece| match piece.kind {
            PieceKind::Data => true,
            PieceKind::Zero => self.zeros != Zeros::Skip,
            PieceKind::Keep => false,
        });
        worker.pieces = pieces;
        Ok(())
    }

    /// Looks at all parts, or at as many as are needed to know of each granule whether there is any data in it.
    fn survey(&self, whole: &Chunk<'a>, pieces: &mut Vec<Piece>, worker: &mut Worker<'a>) -> Result<()> {
        // What is hashed has to be seen, and what cannot be read has to be told.
        let all = self.digest.is_some() || self.options.salvage || self.granule <= CHUNK;
        let mut at = whole.at;
        while at < whole.end() {
            let rest = (whole.end() - at).min(self.granule.max(CHUNK) - at % self.granule.max(1));
            whole.part(at, rest.min(CHUNK), &mut worker.chunk);
            let len = short_len(worker.chunk.len);
            self.fill(worker, len, len)?;
            if let Some(digest) = self.digest {
                match worker.chunk.keeps() {
                    true => digest.up_to(worker.chunk.end())?,
                    false => digest.bytes(at, worker.plain.first(len))?,
                }
            }
            self.decide_part(worker, len);
            for piece in &worker.pieces {
                match pieces.last_mut() {
                    Some(last) if last.kind == piece.kind && last.at + last.len == piece.at => last.len += piece.len,
                    _ => pieces.push(*piece),
                }
            }
            let enough = !all && worker.pieces.iter().any(|piece| piece.kind == PieceKind::Data);
            at = if enough { at.saturating_add(rest) } else { worker.chunk.end() };
        }
        Ok(())
    }

    fn decide_part(&self, worker: &mut Worker<'a>, len: usize) {
        let Worker { chunk, plain, pieces, .. } = worker;
        target::decide(chunk, plain.first(len), self.sparse, self.zeros, pieces);
        if self.detect.is_some() {
            target::detect_zeros(chunk.at, plain.first(len), pieces);
        }
    }

    /// Places, writes and publishes.
    fn store_large(&self, whole: &Chunk<'a>, worker: &mut Worker<'a>) -> Result<()> {
        let pieces = std::mem::take(&mut worker.pieces);
        self.in_turn(whole.number, || {
            for piece in &pieces {
                match piece.kind {
                    PieceKind::Zero => self.make_zero(piece.at, piece.len)?,
                    _ => {
                        let from = short_len(piece.at - whole.at);
                        target::place(self.target, piece, from, self.facts.unnamed, &mut worker.steps)?;
                    }
                }
                if self.one_by_one {
                    self.write_parts(whole, worker)?;
                    worker.steps.drain(..).try_for_each(|step| step.placement.publish())?;
                }
            }
            Ok(())
        })
        .map_err(|error| self.wrote(error, whole.at))?;
        worker.pieces = pieces;
        self.write_parts(whole, worker)?;
        let published = worker.steps.drain(..).try_for_each(|step| step.placement.publish());
        published.map_err(|error| self.wrote(error, whole.at))
    }

    /// Writes what has been placed, as many bytes at a time as a part has.
    fn write_parts(&self, whole: &Chunk<'a>, worker: &mut Worker<'a>) -> Result<()> {
        if self.facts.taking == Taking::Nothing {
            return worker.steps.iter().try_for_each(Step::reserve);
        }
        let shared = self.share(whole, &mut worker.steps, &mut worker.scratch);
        shared.map_err(|error| self.wrote(error, whole.at))?;
        self.wait(worker.steps.iter().map(|step| step.done as u64).sum());
        let mut next = 0;
        while let Some(step) = worker.steps.get_mut(next) {
            if step.done == step.len {
                next += 1;
                continue;
            }
            let at = whole.at + (step.from + step.done) as u64;
            let segment = whole.segment(at).filter(|segment| matches!(segment.content, Content::Zero));
            let zeros = segment.map_or(0, |segment| segment.end() - at);
            if zeros >= self.hole as u64 && step.skip_zeros(zeros).map_err(|error| self.wrote(error, at))? {
                continue;
            }
            let from = step.from + step.done;
            let most = from.saturating_add(short_len(CHUNK));
            let ends = worker.steps[next..].iter().take_while(|step| step.from < most).map(|step| step.from + step.len);
            let to = ends.last().unwrap_or(from).min(most);
            whole.part(whole.at + from as u64, (to - from) as u64, &mut worker.chunk);
            self.load(worker, to - from)?;
            let inside = |step: &Step<'_>| (step.from + step.len).min(to).saturating_sub(step.from + step.done) as u64;
            self.wait(worker.steps[next..].iter().map(inside).sum());
            let Worker { plain, scratch, steps, .. } = &mut *worker;
            let _alone = self.alone();
            for step in steps[next..].iter_mut().take_while(|step| step.from < to) {
                let (start, end) = (step.from + step.done, (step.from + step.len).min(to));
                if start < end {
                    let bytes = plain.first(to - from).get(start - from..end - from).unwrap_or_default();
                    step.write_next(bytes, self.hole, scratch)?;
                }
            }
        }
        Ok(())
    }

    /// Reads a part that is written. What is kept, in a granule with data, is what the target holds.
    fn load(&self, worker: &mut Worker<'a>, len: usize) -> Result<()> {
        self.fill(worker, len, len)?;
        let Worker { chunk, plain, scratch, .. } = worker;
        let bytes = plain.room(len)?;
        for kept in chunk.segments.iter().filter(|segment| matches!(segment.content, Content::Keep)) {
            let from = short_len(kept.at - chunk.at);
            let Some(part) = bytes.get_mut(from..from.saturating_add(short_len(kept.len))) else { continue };
            // A new image shows its new units already.
            match (self.facts.unnamed, self.target.backing()) {
                (true, Some(below)) => below.read(GuestOffset(kept.at), part, scratch)?,
                (true, None) => {}
                (false, _) => self.target.read(GuestOffset(kept.at), part, scratch)?,
            }
        }
        Ok(())
    }
}
