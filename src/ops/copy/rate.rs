//! The limit of `-r`: bytes a second, over all workers.
//!
//! Invariant: nobody sleeps with the lock held, nor longer than a moment after all is stopped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that were waited for; one test alone makes copies with a limit.
#[cfg(test)]
pub static COUNTED: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// At most this many bytes a second.
#[derive(Debug)]
pub struct Rate {
    bytes_per_second: u64,
    free: Mutex<Instant>,
}

impl Rate {
    /// Nothing has gone yet.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, free: Mutex::new(Instant::now()) }
    }

    /// When `bytes` more may go: now, or when what went before has had its time.
    fn due(&self, bytes: u64, now: Instant) -> Instant {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second.max(1) as f64);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (*free).max(now);
        *free = at.checked_add(cost).unwrap_or(at);
        at
    }

    /// Waits until `bytes` more may go; gives up when `stop` is set.
    pub fn wait(&self, bytes: u64, stop: &AtomicBool) {
        #[cfg(test)]
        COUNTED.fetch_add(bytes, Ordering::Relaxed);
        let at = self.due(bytes, Instant::now());
        while !stop.load(Ordering::Relaxed) {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_lets_bytes_go_when_those_before_have_had_their_time() {
        let start = Instant::now();
        let rate = Rate { bytes_per_second: 1 << 20, free: Mutex::new(start) };
        let after = |millis| start + Duration::from_millis(millis);
        // At once, after what went before, and at once again when nothing has gone for a while.
        for (now, bytes, due) in [(0, 1 << 20, 0), (0, 1 << 19, 1000), (700, 1, 1500), (5000, 1 << 20, 5000)] {
            assert_eq!(rate.due(bytes, after(now)), after(due));
        }
    }
}
