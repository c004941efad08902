//! Turns: what workers do one after the other, in the order of their chunks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::block::Result;

/// Whose turn it is. Its lock is held while the turn's work is done.
#[derive(Debug, Default)]
pub struct Turn {
    next: Mutex<u64>,
    changed: Condvar,
}

impl Turn {
    /// Runs `work` when all chunks before `number` have had their turn, or, out of order, when nobody else is at it.
    /// Not at all once `stop` is set.
    pub fn take(
        &self,
        number: u64,
        in_order: bool,
        stop: &AtomicBool,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        while in_order && *next != number {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            next = self.changed.wait(next).unwrap_or_else(PoisonError::into_inner);
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let result = work();
        if result.is_ok() {
            *next = next.saturating_add(1);
        }
        drop(next);
        self.changed.notify_all();
        result
    }

    /// Wakes those who wait: `stop` has been set.
    pub fn wake(&self) {
        let _next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.notify_all();
    }
}
