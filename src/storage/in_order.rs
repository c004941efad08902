//! What takes bytes from front to back alone ([`Outgoing`]) as a storage: whoever writes further on waits for what
//! comes before.
//!
//! Writers have to see to it that the one whose bytes come next never waits for another, and to say
//! [`InOrder::give_up`] when they stop: then nobody waits any more.
//!
//! Lock order: `state` is a leaf, held while bytes are put: they go one after the other anyway.

use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::outgoing::Outgoing;
use super::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// Zeros that are put at once.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// See the module.
pub struct InOrder {
    len: u64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Nothing when it was given up.
    sink: Option<Box<dyn Outgoing>>,
    /// So much was put.
    at: u64,
    given_up: bool,
}

impl fmt::Debug for InOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InOrder").field("len", &self.len).finish_non_exhaustive()
    }
}

impl InOrder {
    /// Takes `len` bytes.
    pub fn new(sink: Box<dyn Outgoing>, len: u64) -> Self {
        Self { len, state: Mutex::new(State { sink: Some(sink), at: 0, given_up: false }), changed: Condvar::new() }
    }

    /// Nothing more is put, and what takes the bytes is told so: whoever has this open still may go later.
    pub fn abandon(&self) {
        self.give_up();
        drop(self.state().sink.take());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing more is put.
    pub fn give_up(&self) {
        self.state().given_up = true;
        self.changed.notify_all();
    }

    /// Shows the file, if all of it was put; `false` if not.
    pub fn complete(&self) -> Result<bool> {
        let mut state = self.state();
        if state.at != self.len || state.given_up {
            return Ok(false);
        }
        state.sink.as_mut().map_or(Ok(false), |sink| sink.complete().map(|()| true))
    }

    /// Waits until `at` comes next, and has `put` done.
    fn in_turn(&self, at: u64, len: u64, put: impl FnOnce(&mut dyn Outgoing) -> Result<()>) -> Result<()> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Errno::EFBIG.into());
        }
        let mut state = self.state();
        while state.at < at && !state.given_up {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.given_up {
            return Err(Errno::ECANCELED.into());
        }
        if state.at > at {
            // It has gone.
            return Err(Errno::ESPIPE.into());
        }
        let sink = state.sink.as_mut().ok_or(Errno::ECANCELED)?;
        put(&mut **sink)?;
        state.at += len;
        drop(state);
        self.changed.notify_all();
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
        self.in_turn(at, buf.len() as u64, |sink| sink.put(buf))
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        let left = self.len.saturating_sub(at);
        Ok(if left == 0 { HostExtent::hole(max) } else { HostExtent::data(max.min(left)) })
    }

    fn zero(&self, at: u64, len: u64, _how: Zeroing) -> Result<()> {
        self.in_turn(at, len, |sink| {
            let mut left = len;
            while left > 0 {
                let n = usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
                sink.put(&ZEROS[..n])?;
                left -= n as u64;
            }
            Ok(())
        })
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
    use std::sync::Arc;

    use super::*;

    #[derive(Debug, Default, Clone)]
    struct Kept(Arc<Mutex<(Vec<u8>, bool)>>);

    impl Outgoing for Kept {
        fn put(&mut self, bytes: &[u8]) -> Result<()> {
            self.0.lock().unwrap().0.extend_from_slice(bytes);
            Ok(())
        }

        fn complete(&mut self) -> Result<()> {
            self.0.lock().unwrap().1 = true;
            Ok(())
        }
    }

    #[test]
    fn bytes_go_from_front_to_back_whoever_comes_first() {
        let kept = Kept::default();
        let sink = InOrder::new(Box::new(kept.clone()), 400_000);
        std::thread::scope(|scope| {
            for n in (0..4u64).rev() {
                let sink = &sink;
                scope.spawn(move || {
                    let bytes = vec![n as u8 + 1; 50_000];
                    sink.write_at(n * 100_000, &bytes).unwrap();
                    sink.zero(n * 100_000 + 50_000, 50_000, Zeroing::Punch).unwrap();
                });
            }
        });
        assert!(sink.complete().unwrap());
        let (seen, complete) = &*kept.0.lock().unwrap();
        let want = |at: usize| if at % 100_000 < 50_000 { (at / 100_000) as u8 + 1 } else { 0 };
        assert!(seen.len() == 400_000 && seen.iter().enumerate().all(|(at, byte)| *byte == want(at)));
        assert!(*complete);
    }

    #[test]
    fn nobody_waits_for_what_will_not_come() {
        let kept = Kept::default();
        let sink = InOrder::new(Box::new(kept.clone()), 100);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| sink.write_at(50, &[1; 10]));
            sink.give_up();
            assert_eq!(waiting.join().unwrap().unwrap_err().errno(), Some(Errno::ECANCELED));
        });
        assert!(sink.write_at(0, &[1]).is_err() && !sink.complete().unwrap() && !kept.0.lock().unwrap().1);
        let sink = InOrder::new(Box::new(Kept::default()), 100);
        sink.write_at(0, &[1; 10]).unwrap();
        assert_eq!(sink.write_at(0, &[1]).unwrap_err().errno(), Some(Errno::ESPIPE));
        assert_eq!(sink.write_at(99, &[1; 2]).unwrap_err().errno(), Some(Errno::EFBIG));
    }
}
