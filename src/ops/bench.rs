//! Measuring how fast an image is read or written: so many requests, so many of them at once.
//!
//! Each request in flight has a thread of its own, which waits in the block layer's positional I/O as the thread of a
//! guest would. A thread takes what is due next (a flush before a request), does it, and tells that it is done.
//!
//! Invariants: never more than the depth in flight, flushes apart; with `drain` nothing is in flight while a flush is; at
//! most one flush at a time; requests that may allocate the same unit of the image come one after the other; the first
//! failure stops everybody.
//!
//! Lock order: a hold on units, then what the driver locks; `state` and the list of units are leaves.

use std::collections::HashSet;
use std::num::NonZero;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::block::driver::{Action, Ticket, Write};
use crate::block::io::Scratch;
use crate::block::{Error, GuestOffset, Node, Result, Store};

/// Threads there are at most, so requests in flight: more would only wait for each other.
pub const MOST_THREADS: u64 = 1024;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Write, with what.
    pub write: Option<Writes>,
    /// How many requests.
    pub count: u64,
    /// How many of them at once.
    pub depth: u64,
    /// Bytes each, at least 1.
    pub len: u64,
    /// Where the first one starts.
    pub offset: u64,
    /// How far the next one is, within the disk.
    pub step: u64,
}

/// What is particular to writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writes {
    /// Every byte.
    pub pattern: u8,
    /// Flush each time so many requests are done.
    pub flush_every: Option<NonZero<u64>>,
    /// For a flush, wait for the requests in flight, and start no more before it is done.
    pub drain: bool,
}

/// What there is to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Request(u64),
    Flush,
    Wait,
    Nothing,
}

/// How far it has come.
#[derive(Debug, Default)]
struct Counters {
    next: u64,
    started: u64,
    in_flight: u64,
    done: u64,
    flushes_due: u64,
    flushing: bool,
    failure: Option<Error>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workload {
    /// Whether the request at `at` does not lie within a disk of that size.
    fn past_end(&self, at: u64, size: u64) -> bool {
        at.checked_add(self.len).is_none_or(|end| end > size)
    }

    /// Where the request after the one at `at` starts. One that would pass the end of the disk starts at the beginning.
    fn after(&self, at: u64, size: u64) -> u64 {
        let next = at.saturating_add(self.step) % size.max(1);
        if self.past_end(next, size) { 0 } else { next }
    }

    fn flush_every(&self) -> Option<NonZero<u64>> {
        self.write.and_then(|writes| writes.flush_every)
    }

    /// Takes what is next.
    fn take(&self, state: &mut Counters, size: u64) -> Step {
        let drain = self.write.is_some_and(|writes| writes.drain);
        if state.failure.is_some() {
            return Step::Nothing;
        }
        if state.flushes_due > 0 && !state.flushing && !(drain && state.in_flight > 0) {
            state.flushes_due -= 1;
            state.flushing = true;
            return Step::Flush;
        }
        let held = drain && (state.flushing || state.flushes_due > 0);
        if state.started < self.count && state.in_flight < self.depth && !held {
            let at = state.next;
            state.next = self.after(at, size);
            state.started += 1;
            state.in_flight += 1;
            return Step::Request(at);
        }
        // The thread that does a request takes the flush that follows it, unless another flush is under way.
        let no_more = state.started == self.count && (self.flush_every().is_none() || state.done == self.count);
        if no_more && state.flushes_due == 0 { Step::Nothing } else { Step::Wait }
    }

    /// Takes note of what was done. Whether others may have waited for that.
    fn did(&self, state: &mut Counters, step: Step, outcome: Result<()>) -> bool {
        let mut concerns_others = outcome.is_err();
        match step {
            Step::Request(_) => {
                state.in_flight -= 1;
                state.done += 1;
                if self.flush_every().is_some_and(|every| state.done.is_multiple_of(every.get())) {
                    state.flushes_due += 1;
                    concerns_others = true;
                }
                concerns_others |= state.done == self.count;
            }
            Step::Flush => {
                state.flushing = false;
                concerns_others = true;
            }
            Step::Wait | Step::Nothing => {}
        }
        if let Err(error) = outcome {
            state.failure.get_or_insert(error);
        }
        concerns_others
    }
}

/// Does it, and says how long it took. The image is not closed.
pub fn run(node: &Node, workload: &Workload) -> Result<Duration> {
    let size = node.virtual_size();
    if workload.past_end(workload.offset, size) {
        let Workload { len, offset, .. } = workload;
        let name = node.name();
        let text = format!("{name}: {len} bytes at {offset} are not within the disk, which has {size} bytes");
        return Err(Error::invalid(text));
    }
    let bench = Bench {
        node,
        workload,
        size,
        writing: workload.write.is_some().then(|| node.writing()).transpose()?,
        written: workload.write.map_or(Ok(Vec::new()), |writes| filled(workload.len, writes.pattern))?,
        state: Mutex::new(Counters { next: workload.offset, ..Counters::default() }),
        changed: Condvar::new(),
        units: Units::default(),
    };
    let extra = u64::from(workload.write.is_some_and(|writes| writes.flush_every.is_some() && !writes.drain));
    let threads = workload.depth.min(workload.count).min(MOST_THREADS) + extra;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // With those that can be had.
            if std::thread::Builder::new().spawn_scoped(scope, || bench.work()).is_err() {
                break;
            }
        }
        bench.work();
    });
    let took = start.elapsed();
    match lock(&bench.state).failure.take() {
        Some(error) => Err(error),
        None => Ok(took),
    }
}

/// So many bytes of a kind, if there is memory for them.
fn filled(len: u64, byte: u8) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let lacking = |_| Error::invalid(format!("there is no memory for a request of {len} bytes"));
    bytes.try_reserve_exact(len).map_err(lacking)?;
    bytes.resize(len, byte);
    Ok(bytes)
}

/// One run, as all threads see it.
struct Bench<'a> {
    node: &'a Node,
    workload: &'a Workload,
    size: u64,
    writing: Option<&'a dyn Write>,
    /// What every write writes.
    written: Vec<u8>,
    state: Mutex<Counters>,
    changed: Condvar,
    units: Units,
}

impl Bench<'_> {
    fn work(&self) {
        let mut buffer = Vec::new();
        let mut scratch = Scratch::default();
        let mut state = lock(&self.state);
        loop {
            let step = self.workload.take(&mut state, self.size);
            match step {
                Step::Nothing => break,
                Step::Wait => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                Step::Request(_) | Step::Flush => {}
            }
            drop(state);
            let outcome = match step {
                Step::Request(at) => self.request(at, &mut buffer, &mut scratch),
                _ => self.node.driver().flush(),
            };
            state = lock(&self.state);
            if self.workload.did(&mut state, step, outcome) {
                self.changed.notify_all();
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn request(&self, at: u64, buffer: &mut Vec<u8>, scratch: &mut Scratch) -> Result<()> {
        if let Some(writing) = self.writing {
            return self.write(writing, at, &self.written, scratch);
        }
        if buffer.is_empty() {
            *buffer = filled(self.workload.len, 0)?;
        }
        self.node.read(GuestOffset(at), buffer, scratch)
    }

    fn write(&self, writing: &dyn Write, at: u64, buffer: &[u8], scratch: &mut Scratch) -> Result<()> {
        let unit = writing.unit().max(1);
        let len = buffer.len() as u64;
        if let Some(unmap) = self.node.manner().detect_zeroes
            && self.workload.write.is_some_and(|writes| writes.pattern == 0)
        {
            let _held = self.units.hold(at, len, unit);
            return self.node.write_zeroes(GuestOffset(at), len, unmap, scratch);
        }
        if unit == 1 {
            return self.node.write(GuestOffset(at), buffer, scratch);
        }
        let mut rest = buffer;
        while !rest.is_empty() {
            let from = GuestOffset(at + (buffer.len() - rest.len()) as u64);
            let held = self.units.hold(from.get(), rest.len() as u64, unit);
            let placement = self.node.place(from, rest.len() as u64, Store::Data)?;
            let placed = placement.placed();
            let alone = matches!(placed.action, Action::Write { before: 0, after: 0, .. })
                && placed.ticket == Ticket::Nothing
                && self.node.driver().cipher().is_none();
            // What goes to where it is already concerns nobody else.
            let _held = (!alone).then_some(held);
            let n = placement.len().min(rest.len());
            placement.write(&rest[..n], scratch)?;
            placement.publish()?;
            rest = &rest[n..];
        }
        Ok(())
    }
}

/// The units of the image that somebody is writing to.
#[derive(Debug, Default)]
struct Units {
    busy: Mutex<HashSet<u64>>,
    changed: Condvar,
}

/// Some of them, held until it is dropped.
struct Held<'a> {
    units: &'a Units,
    first: u64,
    last: u64,
}

impl Units {
    /// Waits for those of a range. They may be counted from anywhere (the start of an extent): with one more after them
    /// two ranges that share a unit have a number in common.
    fn hold(&self, at: u64, len: u64, unit: u64) -> Held<'_> {
        let (first, last) = (at / unit, at.saturating_add(len.saturating_sub(1)) / unit + 1);
        let mut busy = lock(&self.busy);
        while (first..=last).any(|unit| busy.contains(&unit)) {
            busy = self.changed.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        busy.extend(first..=last);
        Held { units: self, first, last }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut busy = lock(&self.units.busy);
        (self.first..=self.last).for_each(|unit| {
            busy.remove(&unit);
        });
        drop(busy);
        self.units.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writes(flush_every: u64, drain: bool) -> Workload {
        let writes = Writes { pattern: 0, flush_every: NonZero::new(flush_every), drain };
        Workload { write: Some(writes), count: 7, depth: 2, len: 4, offset: 0, step: 4 }
    }

    /// What one thread that takes whatever it is given, `depth` at a time, comes to do.
    fn steps(workload: &Workload, size: u64) -> Vec<Step> {
        let (mut state, mut all) = (Counters { next: workload.offset, ..Counters::default() }, Vec::new());
        let mut under_way = std::collections::VecDeque::new();
        loop {
            match workload.take(&mut state, size) {
                Step::Nothing if under_way.is_empty() => return all,
                Step::Nothing | Step::Wait => {
                    workload.did(&mut state, under_way.pop_front().unwrap(), Ok(()));
                }
                step => {
                    all.push(step);
                    under_way.push_back(step);
                }
            }
        }
    }

    #[test]
    fn a_flush_waits_for_what_is_in_flight_if_it_is_to_drain() {
        let flushes = |workload: &Workload| -> Vec<usize> {
            let steps = steps(workload, 1000);
            (0..steps.len()).filter(|at| steps[*at] == Step::Flush).collect()
        };
        // After the third of seven is done the fourth is in flight.
        assert_eq!(flushes(&writes(3, true)), [4, 8]);
        assert_eq!(flushes(&writes(2, true)), [3, 6, 9]);
        assert_eq!(flushes(&writes(3, false)), [4, 8]);
        assert_eq!(flushes(&writes(2, false)).len(), 3);
        assert!(flushes(&writes(0, true)).is_empty());
    }

    #[test]
    fn requests_stay_within_the_disk() {
        let offsets = |len, offset, step, size| -> Vec<u64> {
            let workload = Workload { write: None, count: 5, depth: 9, len, offset, step };
            let request = |step| match step {
                Step::Request(at) => at,
                other => panic!("{other:?}"),
            };
            steps(&workload, size).into_iter().map(request).collect()
        };
        assert_eq!(offsets(4, 0, 8, 12), [0, 8, 4, 0, 8]);
        assert_eq!(offsets(4, 0, 20, 12), [0, 8, 4, 0, 8]);
        assert_eq!(offsets(4, 1, 4, 10), [1, 5, 0, 4, 0]);
        assert_eq!(offsets(4, 6, 0, 10), [6; 5]);
        assert_eq!(offsets(1, u64::MAX - 2, u64::MAX, u64::MAX), [u64::MAX - 2, 0, 0, 0, 0]);
    }
}
