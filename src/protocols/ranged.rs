//! Bytes that a server gives range by range, as a storage that is only read: what protocols of the net have in common.
//!
//! Small reads (of tables, of compressed units) go through a cache of blocks ([`blocks`]), so that they do not cost a
//! round trip each; a block that follows the one before is fetched together with those behind it. Large reads, and those
//! of a run that was announced, fetch what they are for and not a byte more, but for what the cache has; several are
//! under way at once, one a thread.
//!
//! Invariants: every fetch lies in the file; two threads never fetch the same block at the same time.
//!
//! Lock order: `runs` is a leaf, never held while anything is fetched.

mod blocks;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use self::blocks::{Blocks, Claim};
use crate::storage::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// Gives ranges of a file. It tries again by itself where that may help.
pub trait Fetch: Send + Sync + fmt::Debug {
    /// Fills `buf` with the bytes from `at` on, all of which the file has. So many bytes `behind` them will be fetched
    /// next by the same thread: they may be asked for already.
    fn fetch(&self, at: u64, buf: &mut [u8], behind: u64) -> Result<()>;
}

impl Fetch for Box<dyn Fetch> {
    fn fetch(&self, at: u64, buf: &mut [u8], behind: u64) -> Result<()> {
        (**self).fetch(at, buf, behind)
    }
}

/// The least and the most bytes that are kept as one block.
const BLOCK: std::ops::RangeInclusive<u64> = 4096..=4 << 20;

/// What is kept, in bytes.
const KEPT: usize = 24 << 20;

/// The most blocks that are fetched together, unless more are asked for.
const MOST_AHEAD: usize = 8;

/// The most runs that are remembered of those that were announced: what is not read is forgotten.
const MOST_RUNS: usize = 1024;

/// A run that was announced.
#[derive(Debug)]
struct Run {
    start: u64,
    end: u64,
    /// Up to there it has been asked for.
    asked: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Ranged<F> {
    source: F,
    len: u64,
    block: usize,
    blocks: Blocks,
    parallel: u32,
    /// What was announced, and has not been read to its end.
    runs: Mutex<Vec<Run>>,
}

impl<F: Fetch> Ranged<F> {
    /// A file of `len` bytes, which is fetched `ahead` bytes at a time where less is asked for, by that many requests
    /// at once.
    pub fn new(source: F, len: u64, ahead: u64, parallel: u32) -> Self {
        let block = block_size(ahead);
        Self { source, len, block, blocks: Blocks::new((KEPT / block).max(8)), parallel, runs: Mutex::default() }
    }

    /// Keeps what is known already of the file's start.
    pub fn with_start(self, bytes: &[u8]) -> Self {
        let whole = bytes.chunks(self.block);
        for (number, bytes) in (0..).zip(whole) {
            if bytes.len() == self.len_of(number) {
                self.blocks.put(number, bytes.into(), 1);
            }
        }
        self
    }

    fn start_of(&self, block: u64) -> u64 {
        block.saturating_mul(self.block as u64)
    }

    /// How long a block is: the last one ends with the file.
    fn len_of(&self, block: u64) -> usize {
        let left = self.len.saturating_sub(self.start_of(block));
        usize::try_from(left).map_or(self.block, |left| left.min(self.block))
    }

    /// The start of `buf` from `at` on: how much of it was filled.
    fn read_some(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let block = at / self.block as u64;
        let skip = short(at - self.start_of(block));
        let (asked, run) = self.run(at, buf.len() as u64);
        // What has been asked for comes, whatever is there meanwhile.
        if asked > 0 || run.is_some() && self.blocks.is_absent(block) {
            let mut len = asked;
            if let (0, Some(run)) = (asked, run) {
                // Up to the first block that is there already.
                len = (self.len_of(block).saturating_sub(skip) as u64).min(run);
                let mut next = block + 1;
                while len < run && self.blocks.is_absent(next) {
                    len = (len + self.len_of(next) as u64).min(run);
                    next += 1;
                }
            }
            let here = short(len).min(buf.len());
            self.has_read(at, here as u64, len);
            self.source.fetch(at, &mut buf[..here], len - here as u64)?;
            return Ok(here);
        }
        let bytes = match self.blocks.claim(block) {
            Claim::There(bytes) => bytes,
            Claim::Ours { run } => self.load(block, run, (skip + buf.len()).div_ceil(self.block))?,
        };
        let part = bytes.get(skip..).unwrap_or_default();
        let len = part.len().min(buf.len());
        buf[..len].copy_from_slice(&part[..len]);
        Ok(len)
    }

    fn runs(&self) -> MutexGuard<'_, Vec<Run>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many bytes from `at` on have been asked for, as a part of a run that was announced; and how many will be read in
    /// one go, if they are not few: `len` of them now, and those of such a run.
    fn run(&self, at: u64, len: u64) -> (u64, Option<u64>) {
        match self.runs().iter().find(|run| (run.start..run.end).contains(&at)) {
            Some(run) => (run.asked.saturating_sub(at), Some((run.end - at).max(len))),
            None => (0, (len >= self.block as u64).then_some(len)),
        }
    }

    /// Notes that `here` bytes from `at` on are read, and `len` are asked for.
    fn has_read(&self, at: u64, here: u64, len: u64) {
        let mut runs = self.runs();
        let Some(index) = runs.iter().position(|run| (run.start..run.end).contains(&at)) else { return };
        if at + here >= runs[index].end {
            runs.swap_remove(index);
        } else {
            runs[index].asked = at + len;
        }
    }

    /// Fetches a block that was claimed, and with it those behind it that are wanted or will be: twice as many as the
    /// last time, where reads go on and on.
    fn load(&self, block: u64, run: u32, wanted: usize) -> Result<std::sync::Arc<[u8]>> {
        let ahead = if run > 0 { usize::try_from(run).unwrap_or(MOST_AHEAD).saturating_mul(2) } else { 1 };
        let last = self.len.div_ceil(self.block as u64);
        let most = wanted.max(ahead.min(MOST_AHEAD));
        let claimed = self.blocks.claim_behind(block, last.min(block.saturating_add(most as u64)));
        let count = short(claimed.end() - block);
        let len = (block..claimed.end()).map(|number| self.len_of(number)).sum();
        let mut bytes = vec![0; len];
        self.source.fetch(self.start_of(block), &mut bytes, 0)?;
        let run = u32::try_from(count).unwrap_or(u32::MAX);
        claimed.fill(bytes.chunks(self.block).map(Into::into), run);
        bytes.truncate(self.block);
        Ok(bytes.into())
    }
}

/// What `readahead` comes to.
pub fn block_size(ahead: u64) -> usize {
    short(ahead.clamp(*BLOCK.start(), *BLOCK.end()))
}

fn short(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

impl<F: Fetch> Storage for Ranged<F> {
    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let there = short(self.len.saturating_sub(at)).min(buf.len());
        let (mut buf, past) = buf.split_at_mut(there);
        past.fill(0);
        let mut at = at;
        while !buf.is_empty() {
            let done = self.read_some(at, buf)?;
            if done == 0 {
                return Err(Errno::EIO.into());
            }
            at += done as u64;
            buf = &mut buf[done..];
        }
        Ok(())
    }

    fn write_at(&self, _at: u64, _buf: &[u8]) -> Result<()> {
        Err(Errno::EROFS.into())
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        Ok(match self.len.checked_sub(at) {
            None | Some(0) => HostExtent::hole(max),
            Some(left) => HostExtent::data(max.min(left)),
        })
    }

    fn zero(&self, _at: u64, _len: u64, _how: Zeroing) -> Result<()> {
        Err(Errno::EROFS.into())
    }

    fn discard(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, _len: u64, _fill: Preallocation) -> Result<()> {
        Err(Errno::EROFS.into())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn facts(&self) -> Facts {
        Facts { fixed_len: true, new_reads_zero: false, parallel: Some(self.parallel), by_run: true, ..Facts::PLAIN }
    }

    fn host(&self) -> Option<&HostFile> {
        None
    }

    fn announce(&self, event: Event) {
        let Event::Reads { at, len } = event else { return };
        let end = at.saturating_add(len).min(self.len);
        let mut runs = self.runs();
        if end.saturating_sub(at) >= self.block as u64 {
            if runs.len() >= MOST_RUNS {
                runs.remove(0);
            }
            runs.push(Run { start: at, end, asked: at });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A file whose bytes tell where they are, and what was asked of it.
    #[derive(Debug, Default)]
    struct Told {
        asked: Mutex<Vec<(u64, usize)>>,
        behind: std::sync::atomic::AtomicU64,
        fails: std::sync::atomic::AtomicBool,
    }

    fn byte(at: u64) -> u8 {
        (at / 7 % 251) as u8
    }

    impl Fetch for &Told {
        fn fetch(&self, at: u64, buf: &mut [u8], behind: u64) -> Result<()> {
            self.behind.fetch_max(behind, std::sync::atomic::Ordering::Relaxed);
            self.asked.lock().unwrap_or_else(|e| e.into_inner()).push((at, buf.len()));
            if self.fails.swap(false, std::sync::atomic::Ordering::Relaxed) {
                return Err(Errno::ECONNRESET.into());
            }
            (at..).zip(buf).for_each(|(at, out)| *out = byte(at));
            Ok(())
        }
    }

    fn read<F: Fetch>(file: &Ranged<F>, at: u64, len: usize) -> Result<()> {
        let mut buf = vec![0xee; len];
        file.read_at(at, &mut buf)?;
        let end = file.len;
        assert!((at..).zip(buf).all(|(at, seen)| seen == if at < end { byte(at) } else { 0 }), "{at} {len}");
        Ok(())
    }

    fn asked(told: &Told) -> Vec<(u64, usize)> {
        std::mem::take(&mut told.asked.lock().unwrap_or_else(|e| e.into_inner()))
    }

    const K64: u64 = 65536;

    #[test]
    fn small_reads_share_blocks_and_large_ones_fetch_what_they_are_for() {
        let told = Told::default();
        let file = Ranged::new(&told, 100 * K64 + 100, K64, 4);
        read(&file, 10, 100).unwrap();
        read(&file, 60_000, 5536).unwrap();
        assert_eq!(asked(&told), [(0, 65536)]);
        // What is there is not fetched again; the rest exactly.
        read(&file, 1000, 200_000).unwrap();
        assert_eq!(asked(&told), [(K64, 201_000 - 65536)]);
        // Large reads keep nothing, and stop at what is kept.
        read(&file, 5 * K64 + 9, 10).unwrap();
        read(&file, 3 * K64 + 1, 4 * 65536).unwrap();
        assert_eq!(asked(&told), [(5 * K64, 65536), (3 * K64 + 1, 2 * 65536 - 1), (6 * K64, 65537)]);
        // The end of the file.
        read(&file, 100 * K64 + 50, 100).unwrap();
        read(&file, 100 * K64 + 100, 100).unwrap();
        assert_eq!(asked(&told), [(100 * K64, 100)]);
    }

    #[test]
    fn small_reads_that_go_on_are_fetched_ahead() {
        let told = Told::default();
        let file = Ranged::new(&told, 40 * K64, K64, 4);
        for at in (0..30 * K64).step_by(16384) {
            read(&file, at, 16384).unwrap();
        }
        let lens: Vec<_> = asked(&told).into_iter().map(|(_, len)| len / 65536).collect();
        assert_eq!(lens, [1, 2, 4, 8, 8, 8]);
        // One read over several blocks is one request.
        let told = Told::default();
        let file = Ranged::new(&told, 40 * K64, K64, 4);
        read(&file, K64 / 2, 65536).unwrap();
        assert_eq!(asked(&told), [(K64 / 2, 65536)]);
        read(&file, K64 / 2, 65535).unwrap();
        assert_eq!(asked(&told), [(0, 2 * 65536)]);
    }

    #[test]
    fn runs_that_are_announced_are_fetched_as_such() {
        let told = Told::default();
        let behind = || told.behind.swap(0, std::sync::atomic::Ordering::Relaxed);
        let file = Ranged::new(&told, 100 * K64, K64, 4);
        // Small reads too, and no byte of what lies around.
        file.announce(Event::Reads { at: K64 / 2, len: 3 * K64 });
        read(&file, K64 / 2, 512).unwrap();
        assert_eq!((asked(&told), behind()), (vec![(K64 / 2, 512)], 3 * K64 - 512));
        read(&file, K64 / 2 + 512, 65536).unwrap();
        assert_eq!((asked(&told), behind()), (vec![(K64 / 2 + 512, 65536)], 2 * K64 - 512));
        // The last of it ends the run.
        read(&file, 3 * K64 / 2 + 512, 2 * 65536 - 512).unwrap();
        assert_eq!((asked(&told).len(), behind()), (1, 0));
        read(&file, K64 / 2, 512).unwrap();
        assert_eq!((asked(&told), behind()), (vec![(0, 65536)], 0));
        // It stops at what is there.
        read(&file, 13 * K64, 1).unwrap();
        file.announce(Event::Reads { at: 10 * K64, len: 8 * K64 });
        read(&file, 10 * K64, 65536).unwrap();
        assert_eq!((asked(&told), behind()), (vec![(13 * K64, 65536), (10 * K64, 65536)], 2 * K64));
        read(&file, 11 * K64, 4 * 65536).unwrap();
        let expected = vec![(11 * K64, 2 * 65536), (14 * K64, 65536)];
        assert_eq!((asked(&told), behind()), (expected, 3 * K64));
        // But not where it has been asked for by then. A small end of a run is no reason to fetch what lies around it.
        file.announce(Event::Reads { at: 20 * K64, len: 3 * K64 + 512 });
        read(&file, 20 * K64, 65536).unwrap();
        file.blocks.put(22, (22 * K64..23 * K64).map(byte).collect(), 1);
        read(&file, 21 * K64, 2 * 65536).unwrap();
        read(&file, 23 * K64, 512).unwrap();
        let expected = vec![(20 * K64, 65536), (21 * K64, 2 * 65536), (23 * K64, 512)];
        assert_eq!((asked(&told), behind()), (expected, 2 * K64 + 512));
        assert!(file.runs().iter().all(|run| run.start != 20 * K64));
        // What is never read is forgotten, and the file's end is the end of all.
        (0..MOST_RUNS as u64).for_each(|n| file.announce(Event::Reads { at: 90 * K64 + n, len: K64 }));
        read(&file, 15 * K64, 65536).unwrap();
        assert_eq!(behind(), 0);
        file.announce(Event::Reads { at: 95 * K64, len: u64::MAX });
        read(&file, 95 * K64, 512).unwrap();
        assert_eq!(behind(), 5 * K64 - 512);
        // A few bytes are no run.
        asked(&told);
        file.announce(Event::Reads { at: 40 * K64 + 1, len: K64 - 1 });
        read(&file, 40 * K64 + 1, 512).unwrap();
        assert_eq!(asked(&told), [(40 * K64, 65536)]);
    }

    #[test]
    fn what_failed_can_be_tried_again() {
        let told = Told::default();
        let file = Ranged::new(&told, 40 * K64, K64, 4);
        told.fails.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(read(&file, 0, 10).is_err());
        read(&file, 0, 10).unwrap();
        assert_eq!(asked(&told).len(), 2);
    }

    #[test]
    fn threads_wait_for_a_block_that_is_on_its_way() {
        let told = Told::default();
        let file = Ranged::new(&told, 8 * K64, K64, 4).with_start(&(0..K64).map(byte).collect::<Vec<_>>());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..8 * K64).step_by(4096).for_each(|at| read(&file, at, 4096).unwrap()));
            }
        });
        let bytes: usize = asked(&told).iter().map(|(_, len)| len).sum();
        assert_eq!(bytes, 7 * 65536, "each block once, and none that is known");
    }
}
