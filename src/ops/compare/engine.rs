//! The workers: each takes the next chunk of the plan and compares it.
//!
//! Invariant: chunks are handed out in guest order, and those that were are finished; so of what was found, what comes
//! first on the disk is what a single thread would have found.
//!
//! Lock order: `plan`, `first` and `told` one at a time; none is held while data is read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::plan::{CompareChunk, ComparePlan, Run, Stop};
use super::reader::{PIECE, SideReader};
use super::{CompareFailure, CompareStep, Comparison, Difference, Outcome, Side};
use crate::block::Error;
use crate::ops::copy::Observer;
use crate::ops::copy::zero::SECTOR;
use crate::storage::zeros::is_zero;

/// One comparison, as all workers see it.
pub struct Engine<'a> {
    plan: Mutex<ComparePlan<'a>>,
    stop: AtomicBool,
    /// What was found first on the disk, and where.
    first: Mutex<Option<(u64, Stop)>>,
    observer: &'a dyn Observer,
    told: Mutex<Told>,
    total: u64,
}

/// What has been reported.
#[derive(Default)]
struct Told {
    /// The chunk that is to be reported next.
    next: u64,
    /// Those that are finished before their turn.
    waiting: BTreeMap<u64, Vec<u64>>,
}

/// What one worker has.
#[derive(Default)]
struct Worker<'a> {
    chunk: CompareChunk<'a>,
    left: SideReader,
    right: SideReader,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Engine<'a> {
    /// For the part of the disks from `from` to `to`.
    pub fn new(comparison: &Comparison<'a>, from: u64, to: u64) -> Self {
        let (left, right) = comparison.sizes();
        Self {
            plan: Mutex::new(ComparePlan::new(comparison, from, to)),
            stop: AtomicBool::new(false),
            first: Mutex::default(),
            observer: comparison.observer,
            told: Mutex::default(),
            total: left.max(right),
        }
    }

    /// Does all of it, by this thread and as many others as can be had, `threads` in all at most.
    pub fn run(&self, threads: usize) -> Outcome {
        std::thread::scope(|scope| {
            for _ in 1..threads {
                if std::thread::Builder::new().spawn_scoped(scope, || self.work()).is_err() {
                    break;
                }
            }
            self.work();
        });
        match lock(&self.first).take() {
            None => Ok(None),
            Some((_, Ok(difference))) => Ok(Some(difference)),
            Some((_, Err(failure))) => Err(failure),
        }
    }

    fn work(&self) {
        let mut worker = Worker::default();
        while !self.stop.load(Ordering::Relaxed) {
            let more = lock(&self.plan).next(&mut worker.chunk);
            let found = match more {
                Ok(more) => {
                    let found = worker.compare();
                    if found.is_none() && !more {
                        self.report(&mut worker.chunk, u64::MAX);
                        return;
                    }
                    found
                }
                Err(stop) => Some(stop),
            };
            self.report(&mut worker.chunk, found.as_ref().map_or(u64::MAX, |(at, _)| *at));
            if let Some((at, what)) = found {
                let mut first = lock(&self.first);
                if first.as_ref().is_none_or(|(earlier, _)| at < *earlier) {
                    *first = Some((at, what));
                }
                self.stop.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Reports how far the walk has come with that chunk, as far as `to`, once those before it are finished.
    fn report(&self, chunk: &mut CompareChunk<'a>, to: u64) {
        if !self.observer.wants_progress() {
            return;
        }
        let mut told = lock(&self.told);
        let mut ends = std::mem::take(&mut chunk.ends);
        ends.retain(|end| *end <= to);
        told.waiting.insert(chunk.number, ends);
        loop {
            let next = told.next;
            let Some(ends) = told.waiting.remove(&next) else { return };
            ends.into_iter().for_each(|end| self.observer.progress(end, self.total));
            // Nothing comes behind a difference.
            told.next = if to == u64::MAX { next + 1 } else { u64::MAX };
        }
    }
}

impl Worker<'_> {
    /// What differs first in the chunk, or cannot be read.
    fn compare(&mut self) -> Option<(u64, Stop)> {
        let Self { chunk, left, right } = self;
        for run in &chunk.runs {
            let mut done = 0;
            while done < run.len {
                let n = (run.len - done).min(PIECE);
                let at = run.at + done;
                match piece(run, done, usize::try_from(n).unwrap_or(0), left, right) {
                    Ok(None) => {}
                    Ok(Some(differs)) => {
                        let sector = run.at + (done + differs as u64) / SECTOR * SECTOR;
                        return Some((sector, Ok(Difference::Content(sector))));
                    }
                    Err((side, error)) => {
                        let failure = CompareFailure { step: CompareStep::Read, side, at, error };
                        return Some((at, Err(Box::new(failure))));
                    }
                }
                done += n;
            }
        }
        None
    }
}

/// Where the first byte is that differs in a piece of a run.
fn piece(
    run: &Run<'_>,
    skip: u64,
    n: usize,
    left: &mut SideReader,
    right: &mut SideReader,
) -> Result<Option<usize>, (Side, Error)> {
    let left = run.left.map(|run| left.read(&run, skip, n)).transpose().map_err(|error| (Side::Left, error))?;
    let right = run.right.map(|run| right.read(&run, skip, n)).transpose().map_err(|error| (Side::Right, error))?;
    Ok(match (left, right) {
        (Some(left), Some(right)) if left == right => None,
        (Some(left), Some(right)) => left.iter().zip(right).position(|(a, b)| a != b),
        (Some(bytes), None) | (None, Some(bytes)) if is_zero(bytes) => None,
        (Some(bytes), None) | (None, Some(bytes)) => bytes.iter().position(|byte| *byte != 0),
        (None, None) => None,
    })
}
