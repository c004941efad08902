//! The walk over both maps in step, cut into chunks for the workers.
//!
//! Invariants: chunks are in guest order and do not overlap; what is in none of them is equal. The cuts depend on the
//! maps alone.

use super::{CompareFailure, CompareStep, Comparison, Difference, Side};
use crate::block::{CompressedUnit, Error, ExtentKind, GuestOffset, HostPlace, MapCursor, Mapping, Node};
use crate::ops::map::entry_of;

/// A chunk ends at a multiple of so many bytes, so that it has compressed units as a whole.
pub const CHUNK: u64 = 2 << 20;

/// A run of which a side stores something.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// Where it starts.
    pub at: u64,
    /// Its length.
    pub len: u64,
    /// What the left side has; `None`: zeros.
    pub left: Option<Mapping<'a>>,
    /// What the right side has; not zeros too.
    pub right: Option<Mapping<'a>>,
}

/// A piece of work.
#[derive(Debug, Default)]
pub struct CompareChunk<'a> {
    /// Its place in the order, from 0.
    pub number: u64,
    /// What has to be compared, in order.
    pub runs: Vec<Run<'a>>,
    /// How far the walk has come by each of its runs, where that is worth a report.
    pub ends: Vec<u64>,
}

/// Why the walk ends before the end.
pub type Stop = std::result::Result<Difference, Box<CompareFailure>>;

/// The walk.
pub struct ComparePlan<'a> {
    left: PlanSide<'a>,
    right: PlanSide<'a>,
    strict: bool,
    at: u64,
    end: u64,
    number: u64,
    /// How long the longer disk is.
    total: u64,
    /// What was last worth a report.
    told: u64,
    stop: Option<Stop>,
}

struct PlanSide<'a> {
    side: Side,
    cursor: MapCursor<'a>,
    size: u64,
    /// The run that the walk stands in.
    run: Option<Mapping<'a>>,
}

impl<'a> PlanSide<'a> {
    fn new(side: Side, node: &'a Node) -> Self {
        Self { side, cursor: MapCursor::new(node), size: node.virtual_size(), run: None }
    }

    /// What it has from `at` on; `None` past its end.
    fn run(&mut self, at: u64) -> std::result::Result<Option<Mapping<'a>>, Box<CompareFailure>> {
        if at >= self.size {
            return Ok(None);
        }
        if let Some(run) = self.run
            && let Some(passed) = at.checked_sub(run.start.get())
            && passed < run.len
        {
            return Ok(Some(run.after(passed)));
        }
        let mapped = self.cursor.map(GuestOffset(at), self.size - at);
        let run = mapped.map_err(|error| self.failure(CompareStep::Status, at, error))?;
        self.run = Some(run);
        Ok(Some(run))
    }

    fn failure(&self, step: CompareStep, at: u64, error: Error) -> Box<CompareFailure> {
        Box::new(CompareFailure { step, side: self.side, at, error })
    }
}

impl<'a> ComparePlan<'a> {
    /// A walk from `from` to `to`.
    pub fn new(comparison: &Comparison<'a>, from: u64, to: u64) -> Self {
        let (left, right) = comparison.sizes();
        Self {
            left: PlanSide::new(Side::Left, comparison.left),
            right: PlanSide::new(Side::Right, comparison.right),
            strict: comparison.options.strict,
            at: from,
            end: to,
            number: 0,
            total: left.max(right),
            told: from,
            stop: None,
        }
    }

    /// The next piece of work, into `chunk`; false when there is none left, though there may be ends to report. The
    /// walk stops at a difference of the maps, or where one cannot be read.
    pub fn next(&mut self, chunk: &mut CompareChunk<'a>) -> std::result::Result<bool, (u64, Stop)> {
        chunk.runs.clear();
        chunk.ends.clear();
        chunk.number = self.number;
        self.number += 1;
        if let Some(stop) = self.stop.take() {
            return Err(self.stopped(stop));
        }
        let mut limit = None;
        while self.at < self.end && limit.is_none_or(|limit| self.at < limit) {
            match self.step(limit.unwrap_or(self.end)) {
                Ok(None) => {}
                Ok(Some(run)) => {
                    limit.get_or_insert((run.at / CHUNK).saturating_add(1).saturating_mul(CHUNK).min(self.end));
                    chunk.runs.push(run);
                }
                Err(stop) if chunk.runs.is_empty() => return Err(self.stopped(stop)),
                Err(stop) => {
                    self.stop = Some(stop);
                    break;
                }
            }
            if (self.at - self.told).saturating_mul(50) > self.total || self.at == self.total {
                self.told = self.at;
                chunk.ends.push(self.at);
            }
        }
        Ok(!chunk.runs.is_empty())
    }

    /// Whoever asks again is told nothing more.
    fn stopped(&mut self, stop: Stop) -> (u64, Stop) {
        (std::mem::replace(&mut self.at, self.end), stop)
    }

    /// Passes the next run, which ends at `limit` at the latest; gives it if it has to be compared.
    fn step(&mut self, limit: u64) -> std::result::Result<Option<Run<'a>>, Stop> {
        let at = self.at;
        let (left, right) = (self.left.run(at).map_err(Err)?, self.right.run(at).map_err(Err)?);
        let len = |run: Option<Mapping<'_>>| run.map_or(u64::MAX, |run| run.len);
        let stored = |run: Option<Mapping<'a>>| run.filter(|run| !run.is_zero());
        let mut len = len(left).min(len(right)).min(limit - at);
        if self.strict
            && let (Some(left), Some(right)) = (left, right)
        {
            let same = self.same_status(left, right, &mut len)?;
            if !same {
                return Err(Ok(Difference::Status(at)));
            }
        }
        let (left, right) = (stored(left), stored(right));
        let run = match (left, right) {
            (None, None) => None,
            (Some(left), Some(right)) if same_bytes(&left, &right) => {
                let there = left.there().map_err(|error| Err(self.left.failure(CompareStep::Read, at, error)))?;
                if there < len && there == 0 {
                    let error = left.missing();
                    return Err(Err(self.left.failure(CompareStep::Read, at, error)));
                }
                len = len.min(there);
                None
            }
            (left, right) => {
                // A run of data ends where a chunk may.
                len = len.min(CHUNK - at % CHUNK);
                Some(Run { at, len, left, right })
            }
        };
        self.at += len;
        Ok(run)
    }

    /// Whether `map` shows both alike, for the first `len` bytes, which may become fewer.
    fn same_status(&self, left: Mapping<'a>, right: Mapping<'a>, len: &mut u64) -> std::result::Result<bool, Stop> {
        let status = |side: &PlanSide<'a>, run: Mapping<'a>| {
            entry_of(&run).map_err(|error| Err(side.failure(CompareStep::Status, self.at, error)))
        };
        let (left, right) = (status(&self.left, left)?, status(&self.right, right)?);
        *len = (*len).min(left.len).min(right.len);
        Ok(left.status() == right.status())
    }
}

/// Whether both are the same bytes of the same file, which are read in the same way.
fn same_bytes(left: &Mapping<'_>, right: &Mapping<'_>) -> bool {
    let one_layer = std::ptr::eq(&**left.node.layer(), &**right.node.layer());
    match (left.kind, right.kind) {
        (ExtentKind::Data(a), ExtentKind::Data(b)) => {
            let sealed = left.node.driver().cipher().is_some() || right.node.driver().cipher().is_some();
            let alike = !sealed || one_layer && left.start == right.start;
            alike && one_place(left.node, a, right.node, b)
        }
        (ExtentKind::Compressed(a), ExtentKind::Compressed(b)) => {
            let unit = |unit: CompressedUnit| (unit.start, unit.len, unit.host_len);
            let alike = left.node.driver().format() == right.node.driver().format();
            alike && unit(a) == unit(b) && one_place(left.node, a.place, right.node, b.place)
        }
        _ => false,
    }
}

/// Whether both places are one in the same file of the host. Not through a filter, or over a log: the bytes that come from
/// there may be others, or none.
fn one_place(left: &Node, a: HostPlace, right: &Node, b: HostPlace) -> bool {
    let identity = |node: &Node, place: HostPlace| {
        let facts = node.driver().files().get(place.file)?.storage.facts();
        facts.identity.filter(|_| facts.offload)
    };
    a.at == b.at && identity(left, a).is_some_and(|one| identity(right, b) == Some(one))
}
