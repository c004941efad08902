//! A file that goes from front to back ([`Outgoing`]) while it is written, as it is written: what lies before a write is
//! final.
//!
//! What is written before [`Trailing::begin`] is kept, in whatever order it comes: the start of the file. From then on
//! each write sends all that lies before it, and is itself kept until the next one, which may write over it.
//!
//! Lock order: `state` before `kept`'s own.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::outgoing::Outgoing;
use super::paged::PagedMemory;
use super::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// What is kept at once: the start of a file, or one write.
const MOST: u64 = 64 << 20;

/// See the module.
pub struct Trailing {
    kept: PagedMemory,
    state: Mutex<Sending>,
}

struct Sending {
    /// Nothing when it was given up.
    sink: Option<Box<dyn Outgoing>>,
    /// So much was sent.
    sent: u64,
    begun: bool,
}

impl fmt::Debug for Trailing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trailing").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl Trailing {
    /// An empty file.
    pub fn new(sink: Box<dyn Outgoing>) -> Self {
        let state = Mutex::new(Sending { sink: Some(sink), sent: 0, begun: false });
        Self { kept: PagedMemory::new(MOST), state }
    }

    fn state(&self) -> MutexGuard<'_, Sending> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The start is there.
    pub fn begin(&self) {
        self.state().begun = true;
    }

    /// Nothing more is sent, and what takes the bytes is told so.
    pub fn abandon(&self) {
        drop(self.state().sink.take());
    }

    /// Sends the rest, and shows the file.
    pub fn complete(&self) -> Result<()> {
        let mut state = self.state();
        let end = self.kept.len()?;
        self.send_before(&mut state, end)?;
        state.sink.as_mut().ok_or(Errno::ECANCELED)?.complete()
    }

    fn send_before(&self, state: &mut Sending, at: u64) -> Result<()> {
        if at < state.sent {
            // It has gone.
            return Err(Errno::ESPIPE.into());
        }
        let sink = state.sink.as_mut().ok_or(Errno::ECANCELED)?;
        self.kept.send(state.sent, at, &mut **sink)?;
        state.sent = at;
        self.kept.forget_before(at);
        Ok(())
    }

    fn ready(&self, at: u64) -> Result<MutexGuard<'_, Sending>> {
        let mut state = self.state();
        if state.begun {
            self.send_before(&mut state, at)?;
        }
        Ok(state)
    }
}

impl Storage for Trailing {
    fn len(&self) -> Result<u64> {
        self.kept.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let state = self.state();
        if at < state.sent {
            return Err(Errno::ESPIPE.into());
        }
        self.kept.read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        let _state = self.ready(at)?;
        self.kept.write_at(at, buf)
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        self.kept.extent(at, max)
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        let _state = self.ready(at)?;
        self.kept.zero(at, len, how)
    }

    fn discard(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        let state = self.state();
        if len < state.sent {
            return Err(Errno::ESPIPE.into());
        }
        self.kept.set_len(len, fill)
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

    #[test]
    fn what_lies_before_a_write_has_gone() {
        let taken = Taken::default();
        let file = Trailing::new(Box::new(taken.clone()));
        file.write_at(100, &[2; 50]).unwrap();
        file.write_at(0, &[1; 10]).unwrap();
        file.begin();
        assert!(taken.0.lock().unwrap().0.is_empty());
        // Over the end of what was there.
        file.write_at(120, &[3; 10]).unwrap();
        file.write_at(120, &[4; 10]).unwrap();
        assert_eq!(taken.0.lock().unwrap().0.len(), 120);
        assert_eq!(file.write_at(119, &[5]).unwrap_err().errno(), Some(Errno::ESPIPE));
        file.write_at(200, &[6; 4]).unwrap();
        file.complete().unwrap();
        let (bytes, complete) = &*taken.0.lock().unwrap();
        let mut want = vec![0; 204];
        want[..10].fill(1);
        want[100..150].fill(2);
        want[120..130].fill(4);
        want[200..].fill(6);
        assert!(*bytes == want && *complete);
    }

    #[test]
    fn what_was_given_up_is_not_completed() {
        let taken = Taken::default();
        let file = Trailing::new(Box::new(taken.clone()));
        file.abandon();
        assert!(file.complete().is_err() && !taken.0.lock().unwrap().1);
    }
}
