//! What the server has said of its runs, kept until something is written: one answer tells of many.
//!
//! Invariant: runs follow each other without a gap. Its lock is a leaf, and not held while the server is asked.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::layout::{BASE_ALLOCATION, state};
use super::requests::StatusRun;
use crate::storage::{HostExtent, HostKind};

/// Bytes that are asked about at first; then as many as answers of a good size are about.
const FIRST_LEN: u64 = 256 << 20;
const LEAST_LEN: u64 = 4 << 20;
/// What a request without extended headers is to ask about at most.
const MOST_LEN: u64 = 2 << 30;
/// Runs of an answer that are neither many nor few.
const GOOD_RUNS: std::ops::RangeInclusive<usize> = 1024..=16384;

/// See the module.
#[derive(Debug, Default)]
pub struct KnownExtents(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    start: u64,
    /// Where each run ends, and what it is.
    runs: Vec<(u64, HostKind)>,
    /// Counts what was written: an answer that began before is worth nothing.
    writes: u64,
    /// How much was asked about last, and how much is to be asked about next.
    ask: Option<u64>,
}

impl KnownExtents {
    /// The run at `at`, if it is known.
    pub fn find(&self, at: u64, max: u64) -> Option<HostExtent> {
        let known = self.lock();
        if at < known.start {
            return None;
        }
        let next = known.runs.partition_point(|(end, _)| *end <= at);
        let (end, kind) = known.runs.get(next)?;
        Some(HostExtent { len: (end - at).min(max), kind: *kind })
    }

    /// How many bytes to ask about, and what [`Self::learn`] wants to be told. `extended`: with 64 bits to say how many.
    pub fn plan(&self, extended: bool) -> (u64, u64) {
        let known = self.lock();
        let most = if extended { u64::MAX } else { MOST_LEN };
        (known.ask.unwrap_or(FIRST_LEN).min(most), known.writes)
    }

    /// An answer of the server, about `asked` bytes from `at` on in an export of `size` bytes.
    pub fn learn(&self, at: u64, asked: u64, size: u64, answer: &[StatusRun], plan: u64, meaning: Meaning) {
        let mut known = self.lock();
        if known.writes != plan {
            return;
        }
        known.ask = Some(match answer.len() {
            few if few < *GOOD_RUNS.start() => asked.saturating_mul(4),
            many if many > *GOOD_RUNS.end() => asked / 4,
            _ => asked,
        })
        .map(|len| len.max(LEAST_LEN));
        known.start = at;
        known.runs.clear();
        let mut end = at;
        for (len, flags) in answer {
            end = end.saturating_add(*len).min(size);
            let kind = meaning(*flags);
            match known.runs.last_mut() {
                Some((last, same)) if *same == kind => *last = end,
                _ => known.runs.push((end, kind)),
            }
        }
    }

    /// Something was written.
    pub fn forget(&self) {
        let mut known = self.lock();
        known.writes += 1;
        known.runs.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// "`base:allocation` metadata context". A hole that need not read as zeros is to be read.
fn allocated(flags: u64) -> HostKind {
    match (flags & state::ZERO != 0, flags & state::HOLE != 0) {
        (true, true) => HostKind::Hole,
        (true, false) => HostKind::Zero,
        (false, _) => HostKind::Data,
    }
}

/// Of another context, shown as the reference does: what is marked there is absent here.
fn marked(flags: u64) -> HostKind {
    if flags & state::MARKED != 0 { HostKind::Absent } else { HostKind::Data }
}

/// What the flags of a context mean.
pub type Meaning = fn(u64) -> HostKind;

/// That of a context by its name.
pub fn meaning(context: &str) -> Meaning {
    if context == BASE_ALLOCATION { allocated } else { marked }
}
