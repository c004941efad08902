//! Starting the write-back of new files while they are still being written, so that bringing them to stable storage
//! at the end waits for little; and counting what is written to them, so that the end knows how much that is.
//!
//! Each file that is to be written back early gathers what is written into runs ([`Track`]). One thread for all files,
//! made once more than [`LITTLE`] was written to them, has the kernel write the runs (`sync_file_range(2)`), a few at a
//! time, and counts what is done. Where no thread can be had, or the kernel cannot be asked, nothing more is started
//! early: it is waited for at the end.
//!
//! Invariants: whether anything is started early changes neither what is written nor where; a loss that the kernel
//! reports here is not reported again by a later sync, so it is kept and told by [`Writeback::finish`]; after that only
//! tracks hold files open.
//!
//! Lock order: a track's `run` and `queue` are never held together, and neither while the kernel writes.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::host;

/// Bytes that are waited for without asking: less time than it takes to start a program and convert them.
pub const LITTLE: u64 = 32 << 20;

/// Bytes that are written back in one request. Larger ones gain nothing, smaller ones cost calls.
const STEP: u64 = 8 << 20;

/// Requests that are under way at once, so that the device always has work, but not much more than is waited for.
const DEPTH: usize = 4;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Part of a file that was written.
#[derive(Debug)]
struct DirtyRun {
    file: Arc<File>,
    start: u64,
    end: u64,
    /// How much of it was written: there may be gaps.
    bytes: u64,
}

#[derive(Debug, Default)]
struct Queue {
    runs: VecDeque<DirtyRun>,
    /// Bytes written.
    written: u64,
    /// Bytes that have reached the device.
    done: u64,
    thread: Option<JoinHandle<()>>,
    /// No thread to be had, or no more work for it.
    closed: bool,
    failure: Option<io::Error>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// The write-back of some files.
#[derive(Debug, Default)]
pub struct Writeback {
    shared: Arc<Shared>,
}

/// What one file tells of its writes.
#[derive(Debug)]
pub struct Track {
    early: bool,
    run: Mutex<DirtyRun>,
    shared: Arc<Shared>,
}

impl Writeback {
    /// For one more file, whose writes are counted and, if `early`, written back at once.
    pub fn track(&self, file: Arc<File>, early: bool) -> Track {
        Track { early, run: Mutex::new(DirtyRun { file, start: 0, end: 0, bytes: 0 }), shared: self.shared.clone() }
    }

    /// Ends it, and says how many bytes may still be waiting to be written back, or what went wrong.
    pub fn finish(&self) -> io::Result<u64> {
        let thread = {
            let mut queue = lock(&self.shared.queue);
            queue.closed = true;
            queue.runs.clear();
            queue.thread.take()
        };
        self.shared.changed.notify_all();
        if let Some(thread) = thread {
            // It does not panic; if it did, nothing would be known to be done.
            let _ = thread.join();
        }
        let mut queue = lock(&self.shared.queue);
        match queue.failure.take() {
            Some(error) => Err(error),
            None => Ok(queue.written.saturating_sub(queue.done)),
        }
    }
}

#[cfg(test)]
impl Writeback {
    /// As if the kernel had told of a loss.
    pub fn lose(&self, error: io::Error) {
        lock(&self.shared.queue).failure = Some(error);
    }
}

impl Drop for Writeback {
    fn drop(&mut self) {
        // Whoever did not ask has an error of its own to tell.
        let _ = self.finish();
    }
}

impl Track {
    /// That much was written there.
    pub fn wrote(&self, at: u64, len: usize) {
        let (len, end) = (len as u64, at.saturating_add(len as u64));
        if !self.early {
            return self.shared.count(len);
        }
        let mut run = lock(&self.run);
        let near = run.bytes > 0 && at <= run.end.saturating_add(STEP) && end.saturating_add(STEP) >= run.start;
        let far = (run.bytes > 0 && !near).then(|| run.take());
        (run.start, run.end) = if near { (run.start.min(at), run.end.max(end)) } else { (at, end) };
        run.bytes += len;
        let full = (run.bytes >= STEP).then(|| run.take());
        drop(run);
        self.shared.wrote(len, far.into_iter().chain(full));
    }
}

impl DirtyRun {
    fn take(&mut self) -> DirtyRun {
        DirtyRun { file: self.file.clone(), start: self.start, end: self.end, bytes: std::mem::take(&mut self.bytes) }
    }
}

impl Shared {
    fn count(&self, len: u64) {
        let mut queue = lock(&self.queue);
        queue.written = queue.written.saturating_add(len);
    }

    fn wrote(self: &Arc<Self>, len: u64, runs: impl Iterator<Item = DirtyRun>) {
        let mut queue = lock(&self.queue);
        queue.written = queue.written.saturating_add(len);
        if queue.closed {
            return;
        }
        let before = queue.runs.len();
        queue.runs.extend(runs);
        if queue.written > LITTLE && queue.thread.is_none() {
            let shared = self.clone();
            match Builder::new().name("write-back".to_owned()).spawn(move || shared.work()) {
                Ok(thread) => queue.thread = Some(thread),
                Err(_) => {
                    queue.closed = true;
                    queue.runs.clear();
                }
            }
        }
        if queue.runs.len() > before {
            self.changed.notify_one();
        }
    }

    fn work(&self) {
        let mut under_way: VecDeque<DirtyRun> = VecDeque::new();
        loop {
            let next = {
                let mut queue = lock(&self.queue);
                while queue.runs.is_empty() && under_way.is_empty() && !queue.closed {
                    queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                if queue.closed {
                    return;
                }
                queue.runs.pop_front()
            };
            let idle = next.is_none();
            if let Some(run) = next {
                // What cannot be started now is written later.
                let _ = host::start_writeback(&run.file, run.start, run.end - run.start);
                under_way.push_back(run);
            }
            if idle || under_way.len() > DEPTH {
                let Some(run) = under_way.pop_front() else { continue };
                let waited = host::wait_for_writeback(&run.file, run.start, run.end - run.start);
                let mut queue = lock(&self.queue);
                match waited {
                    Ok(()) => queue.done = queue.done.saturating_add(run.bytes),
                    Err(error) if is_loss(&error) => queue.failure = Some(error),
                    Err(_) => queue.closed = true,
                }
            }
        }
    }
}

/// Whether data was lost, as opposed to a file that cannot be asked.
fn is_loss(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EIO | Errno::ENOSPC | Errno::EDQUOT))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_little_is_left_to_the_end_and_more_is_started() {
        let file = Arc::new(tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap());
        let writeback = Writeback::default();
        let track = writeback.track(file.clone(), true);
        let piece = vec![7; 1 << 20];
        let write = |count: u64| {
            for i in 0..count {
                file.write_all_at(&piece, i << 20).unwrap();
                track.wrote(i << 20, piece.len());
            }
        };
        write(LITTLE >> 20);
        assert!(lock(&writeback.shared.queue).thread.is_none());
        write(8);
        assert!(lock(&writeback.shared.queue).thread.is_some());
        let left = writeback.finish().unwrap();
        assert!(left <= LITTLE + (8 << 20), "{left}");
        drop(track);
        assert_eq!(Arc::strong_count(&file), 1, "nothing is held");
    }

    #[test]
    fn what_is_only_counted_is_not_started() {
        let writeback = Writeback::default();
        let track = writeback.track(Arc::new(tempfile::tempfile().unwrap()), false);
        for i in 0..5 {
            track.wrote(i * LITTLE, LITTLE as usize);
        }
        let queue = lock(&writeback.shared.queue);
        assert!(queue.thread.is_none() && queue.runs.is_empty());
        drop(queue);
        assert_eq!(writeback.finish().unwrap(), 5 * LITTLE);
    }

    #[test]
    fn runs_are_gathered_where_they_are_near() {
        let writeback = Writeback::default();
        let track = writeback.track(Arc::new(tempfile::tempfile().unwrap()), true);
        for i in [1, 0, 2, 3] {
            track.wrote(i << 20, 1 << 20);
        }
        assert_eq!(lock(&writeback.shared.queue).runs.len(), 0);
        track.wrote(1 << 40, 1 << 20);
        let queue = lock(&writeback.shared.queue);
        let run = queue.runs.front().unwrap();
        assert_eq!((run.start, run.end, run.bytes, queue.runs.len()), (0, 4 << 20, 4 << 20, 1));
    }
}
