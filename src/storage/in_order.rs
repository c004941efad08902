//! What takes bytes from front to back alone ([`Outgoing`]) as a storage: each write begins where the last one ended.
//! Whoever writes to it sees to that.
//!
//! Lock order: `state` is a leaf, held while bytes are put: they go one after the other anyway.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::outgoing::Outgoing;
use super::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// See the module.
pub struct InOrder {
    len: u64,
    state: Mutex<Position>,
}

struct Position {
    /// Nothing when it was given up.
    sink: Option<Box<dyn Outgoing>>,
    /// So much was put.
    at: u64,
}

impl fmt::Debug for InOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InOrder").field("len", &self.len).finish_non_exhaustive()
    }
}

impl InOrder {
    /// Takes `len` bytes.
    pub fn new(sink: Box<dyn Outgoing>, len: u64) -> Self {
        Self { len, state: Mutex::new(Position { sink: Some(sink), at: 0 }) }
    }

    /// Nothing more is put, and what takes the bytes is told so: whoever has this open still may go later.
    pub fn abandon(&self) {
        drop(self.state().sink.take());
    }

    fn state(&self) -> MutexGuard<'_, Position> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the file, if all of it was put; `false` if not.
    pub fn complete(&self) -> Result<bool> {
        let mut state = self.state();
        if state.at != self.len {
            return Ok(false);
        }
        state.sink.as_mut().map_or(Ok(false), |sink| sink.complete().map(|()| true))
    }

    /// Has `put` put what comes next.
    fn next(&self, at: u64, len: u64, put: impl FnOnce(&mut dyn Outgoing) -> Result<()>) -> Result<()> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Errno::EFBIG.into());
        }
        let mut state = self.state();
        if state.at != at {
            return Err(Errno::ESPIPE.into());
        }
        let sink = state.sink.as_mut().ok_or(Errno::ECANCELED)?;
        put(&mut **sink)?;
        state.at += len;
        Ok(())
    }
}

impl Storage for InOrder {
    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, _at: u64, _buf: &mut [u8]) -> Result<()> {
        Err(Errno::ESPIPE.into())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        self.next(at, buf.len() as u64, |sink| sink.put(buf))
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        let left = self.len.saturating_sub(at);
        Ok(if left == 0 { HostExtent::hole(max) } else { HostExtent::data(max.min(left)) })
    }

    fn zero(&self, at: u64, len: u64, _how: Zeroing) -> Result<()> {
        self.next(at, len, |sink| sink.put_zeros(len))
    }

    fn discard(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64, _fill: Preallocation) -> Result<()> {
        if len <= self.len { Ok(()) } else { Err(Errno::EFBIG.into()) }
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn facts(&self) -> Facts {
        Facts { fixed_len: true, new_reads_zero: false, ..Facts::PLAIN }
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

    #[test]
    fn bytes_go_from_front_to_back_and_no_other_way() {
        let taken = Taken::default();
        let sink = InOrder::new(Box::new(taken.clone()), 300_000);
        sink.write_at(0, &[1; 100]).unwrap();
        assert_eq!(sink.write_at(0, &[1]).unwrap_err().errno(), Some(Errno::ESPIPE));
        assert_eq!(sink.write_at(200, &[1]).unwrap_err().errno(), Some(Errno::ESPIPE));
        assert_eq!(sink.write_at(299_999, &[1; 2]).unwrap_err().errno(), Some(Errno::EFBIG));
        assert!(!sink.complete().unwrap() && !taken.0.lock().unwrap().1);
        sink.zero(100, 299_900, Zeroing::Punch).unwrap();
        assert!(sink.complete().unwrap());
        let (seen, complete) = &*taken.0.lock().unwrap();
        let want = |at: usize| u8::from(at < 100);
        assert!(seen.len() == 300_000 && seen.iter().enumerate().all(|(at, byte)| *byte == want(at)) && *complete);
    }

    #[test]
    fn what_was_given_up_is_not_completed() {
        let taken = Taken::default();
        let sink = InOrder::new(Box::new(taken.clone()), 10);
        sink.abandon();
        assert_eq!(sink.write_at(0, &[1; 10]).unwrap_err().errno(), Some(Errno::ECANCELED));
        assert!(!sink.complete().unwrap() && !taken.0.lock().unwrap().1);
    }
}
