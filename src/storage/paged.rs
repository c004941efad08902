//! Sparse bytes in memory, up to a limit: what lies in a file beside the data of its disk.
//!
//! Lock order: `state` is a leaf, but for what takes the bytes in [`PagedMemory::send`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::outgoing::Outgoing;
use super::zeros::is_zero;
use super::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// Bytes that are kept or not.
const PAGE: u64 = 4096;

/// See the module.
#[derive(Debug)]
pub struct PagedMemory {
    state: Mutex<Pages>,
    /// Pages that are kept at the most.
    most: usize,
    full: AtomicBool,
}

#[derive(Debug, Default)]
struct Pages {
    /// By their numbers; what is not there is zeros.
    pages: BTreeMap<u64, Box<[u8]>>,
    len: u64,
}

/// The part of a page from one offset in the file to another.
fn within(page: u64, at: u64, end: u64) -> std::ops::Range<usize> {
    let start = page * PAGE;
    let short = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    short(at.saturating_sub(start))..short(end.min(start + PAGE) - start)
}

impl PagedMemory {
    /// Nothing yet, and never more than so many bytes that are not zeros.
    pub fn new(most: u64) -> Self {
        let most = usize::try_from(most / PAGE).unwrap_or(usize::MAX);
        Self { state: Mutex::default(), most, full: AtomicBool::new(false) }
    }

    fn state(&self) -> MutexGuard<'_, Pages> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether more was written than is kept.
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Puts the bytes from one offset to another.
    pub fn send(&self, from: u64, to: u64, sink: &mut dyn Outgoing) -> Result<()> {
        let (state, mut at) = (self.state(), from);
        while at < to {
            let (number, end) = (at / PAGE, (at / PAGE + 1).saturating_mul(PAGE).min(to));
            match state.pages.get(&number) {
                Some(page) => {
                    sink.put(page.get(within(number, at, end)).unwrap_or_default())?;
                    at = end;
                }
                None => {
                    let next = state.pages.range(number..).next().map_or(to, |(next, _)| (next * PAGE).min(to));
                    sink.put_zeros(next - at)?;
                    at = next;
                }
            }
        }
        Ok(())
    }

    /// Forgets what lies before that offset, as far as it can be forgotten.
    pub fn forget_before(&self, at: u64) {
        let mut state = self.state();
        state.pages = state.pages.split_off(&(at / PAGE));
    }
}

impl Storage for PagedMemory {
    fn len(&self) -> Result<u64> {
        Ok(self.state().len)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        buf.fill(0);
        let state = self.state();
        let end = at.saturating_add(buf.len() as u64).min(state.len);
        if at >= end {
            return Ok(());
        }
        for (number, page) in state.pages.range(at / PAGE..end.div_ceil(PAGE)) {
            let from = page.get(within(*number, at, end)).unwrap_or_default();
            let skip = usize::try_from((number * PAGE).saturating_sub(at)).unwrap_or(usize::MAX);
            if let Some(to) = buf.get_mut(skip..skip.saturating_add(from.len())) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        let end = at.checked_add(buf.len() as u64).ok_or(Errno::EFBIG)?;
        let mut state = self.state();
        let mut rest = buf;
        let mut pos = at;
        while !rest.is_empty() {
            let number = pos / PAGE;
            let range = within(number, pos, end);
            let (now, later) = rest.split_at(range.len());
            let room = state.pages.len() < self.most;
            match state.pages.get_mut(&number) {
                Some(page) => page[range].copy_from_slice(now),
                None if is_zero(now) => {}
                None if !room => {
                    self.full.store(true, Ordering::Relaxed);
                    return Err(Errno::ENOBUFS.into());
                }
                None => {
                    let mut page = vec![0; PAGE as usize].into_boxed_slice();
                    page[range].copy_from_slice(now);
                    state.pages.insert(number, page);
                }
            }
            (pos, rest) = (pos + now.len() as u64, later);
        }
        state.len = state.len.max(end);
        Ok(())
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        let left = self.state().len.saturating_sub(at);
        Ok(if left == 0 { HostExtent::hole(max) } else { HostExtent::data(max.min(left)) })
    }

    fn zero(&self, at: u64, len: u64, _how: Zeroing) -> Result<()> {
        let end = at.checked_add(len).ok_or(Errno::EFBIG)?;
        let mut state = self.state();
        let mut pages: Vec<u64> = Vec::new();
        for (number, page) in state.pages.range_mut(at / PAGE..end.div_ceil(PAGE)) {
            let range = within(*number, at, end);
            if range.len() as u64 == PAGE {
                pages.push(*number);
            } else {
                page[range].fill(0);
            }
        }
        for number in pages {
            state.pages.remove(&number);
        }
        state.len = state.len.max(end);
        Ok(())
    }

    fn discard(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64, _fill: Preallocation) -> Result<()> {
        let old = self.state().len;
        if len < old {
            self.zero(len, old - len, Zeroing::Punch)?;
        }
        self.state().len = len;
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn facts(&self) -> Facts {
        Facts::PLAIN
    }

    fn host(&self) -> Option<&HostFile> {
        None
    }

    fn announce(&self, _event: Event) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::outgoing::Taken;

    fn sent(memory: &PagedMemory, from: u64, to: u64) -> Vec<u8> {
        let mut taken = Taken::default();
        memory.send(from, to, &mut taken).unwrap();
        taken.0.lock().unwrap().0.clone()
    }

    #[test]
    fn it_holds_what_a_vector_would() {
        let (memory, mut model) = (PagedMemory::new(1 << 20), Vec::new());
        let mut rng = fastrand::Rng::with_seed(7);
        for step in 0..2000u32 {
            let (at, len) = (rng.usize(..40_000), rng.usize(..10_000));
            if at + len > model.len() {
                model.resize(at + len, 0);
            }
            let bytes = vec![u8::try_from(step % 5).unwrap(); len];
            match rng.u8(..4) {
                0 => {
                    memory.zero(at as u64, len as u64, Zeroing::Punch).unwrap();
                    model[at..at + len].fill(0);
                }
                1 => {
                    memory.set_len(at as u64, Preallocation::Off).unwrap();
                    model.truncate(at);
                    model.resize(at, 0);
                }
                _ => {
                    memory.write_at(at as u64, &bytes).unwrap();
                    model[at..at + len].copy_from_slice(&bytes);
                }
            }
            assert_eq!(memory.len().unwrap(), model.len() as u64);
            let from = at / 2;
            let mut read = vec![9; model.len() + 10 - from.min(model.len())];
            memory.read_at(from as u64, &mut read).unwrap();
            let mut want = model[from.min(model.len())..].to_vec();
            want.resize(read.len(), 0);
            assert!(read == want, "step {step}");
            assert!(sent(&memory, 0, model.len() as u64) == model, "step {step}");
        }
    }

    #[test]
    fn it_is_full_at_its_limit_and_zeros_cost_nothing() {
        let memory = PagedMemory::new(2 * PAGE);
        memory.write_at(1 << 40, &[0; 100_000]).unwrap();
        memory.write_at(PAGE - 1, &[1, 2]).unwrap();
        assert!(memory.write_at(9 * PAGE, &[1]).is_err() && memory.is_full());
        memory.forget_before(PAGE + 1);
        memory.write_at(9 * PAGE, &[1]).unwrap();
        assert_eq!(sent(&memory, PAGE, PAGE + 3), [2, 0, 0]);
    }
}
