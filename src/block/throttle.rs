//! Throttle groups: how much may pass in a second, counted together for all that name the group.
//!
//! Each limit is a bucket that leaks at the average rate. What comes in fills it; while it is too full, requests wait. A
//! limit without a burst holds a tenth of a second's worth; one with a burst as much as that rate gives in the burst's
//! length, and then a second bucket keeps the burst itself to its rate.
//!
//! The lock is a leaf, and nobody sleeps under it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It reads.
    Read,
    /// It writes, zeroes or discards.
    Write,
}

/// A limit of so much in a second; an average of 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// In the long run.
    pub average: u64,
    /// In a burst; 0 for none.
    pub burst: u64,
    /// How long a burst may be, in seconds; 0 is 1.
    pub length: u64,
}

/// The limits on one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    /// On both ways together.
    pub total: Rate,
    /// On reading.
    pub read: Rate,
    /// On writing.
    pub write: Rate,
}

/// All limits of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// On bytes.
    pub bytes: Rates,
    /// On requests.
    pub requests: Rates,
    /// Bytes of a request that counts as one; longer ones count as more. 0: each is one.
    pub request_bytes: u64,
}

/// A group.
#[derive(Debug)]
pub struct ThrottleGroup {
    start: Instant,
    buckets: Mutex<Buckets>,
}

impl ThrottleGroup {
    /// A group in which nothing has passed yet.
    pub fn new(limits: Limits) -> Self {
        Self { start: Instant::now(), buckets: Mutex::new(Buckets::new(limits)) }
    }

    /// Waits until a request may pass.
    pub fn pass(&self, way: Way, bytes: u64) {
        let now = self.start.elapsed();
        let wait = self.buckets.lock().unwrap_or_else(|e| e.into_inner()).admit(way, bytes, now);
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
    }
}

#[derive(Debug)]
struct Buckets {
    request_bytes: u64,
    /// Bytes, then requests: total, read, write.
    all: [[Bucket; 3]; 2],
    /// When they leaked last.
    last: Duration,
}

#[derive(Debug, Default)]
struct Bucket {
    rate: Rate,
    level: f64,
    burst: f64,
}

impl Buckets {
    fn new(limits: Limits) -> Self {
        let buckets =
            |rates: Rates| [rates.total, rates.read, rates.write].map(|rate| Bucket { rate, ..Bucket::default() });
        Self {
            request_bytes: limits.request_bytes,
            all: [buckets(limits.bytes), buckets(limits.requests)],
            last: Duration::ZERO,
        }
    }

    /// How long a request has to wait that comes now. It counts from now on.
    fn admit(&mut self, way: Way, bytes: u64, now: Duration) -> Duration {
        let seconds = now.saturating_sub(self.last).as_secs_f64();
        self.last = self.last.max(now);
        let requests = match self.request_bytes {
            0 => 1.0,
            size => (bytes as f64 / size as f64).max(1.0),
        };
        let mut wait: f64 = 0.0;
        for (buckets, amount) in self.all.iter_mut().zip([bytes as f64, requests]) {
            for (index, bucket) in buckets.iter_mut().enumerate() {
                bucket.leak(seconds);
                if index == 0 || index == (if way == Way::Read { 1 } else { 2 }) {
                    wait = wait.max(bucket.wait());
                    bucket.fill(amount);
                }
            }
        }
        Duration::try_from_secs_f64(wait).unwrap_or(Duration::MAX)
    }
}

impl Bucket {
    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.rate.average as f64 * seconds).max(0.0);
        self.burst = (self.burst - self.rate.burst as f64 * seconds).max(0.0);
    }

    fn fill(&mut self, amount: f64) {
        if self.rate.average > 0 {
            self.level += amount;
            self.burst += amount;
        }
    }

    /// Seconds until the bucket has leaked to what it holds.
    fn wait(&self) -> f64 {
        let Rate { average, burst, length } = self.rate;
        if average == 0 {
            return 0.0;
        }
        let (average, burst, length) = (average as f64, burst as f64, length.max(1) as f64);
        let holds = if burst == 0.0 { average / 10.0 } else { burst * length };
        let long = (self.level - holds).max(0.0) / average;
        let short = if burst > 0.0 && length > 1.0 { (self.burst - burst / 10.0).max(0.0) / burst } else { 0.0 };
        long.max(short)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn rate(average: u64, burst: u64, length: u64) -> Rate {
        Rate { average, burst, length }
    }

    /// Seconds that requests need, one after the other.
    fn seconds(limits: Limits, requests: impl IntoIterator<Item = (Way, u64)>) -> f64 {
        let mut buckets = Buckets::new(limits);
        let mut now = Duration::ZERO;
        for (way, bytes) in requests {
            now += buckets.admit(way, bytes, now);
        }
        now.as_secs_f64()
    }

    #[test]
    fn a_limit_holds_in_the_long_run() {
        let bytes = Rates { total: rate(1000, 0, 0), ..Rates::default() };
        let limits = Limits { bytes, ..Limits::default() };
        let requests = (0..101).map(|n| (if n % 2 == 0 { Way::Read } else { Way::Write }, 100));
        // 10000 bytes are through before the last begins, but for a tenth of a second's worth.
        assert!((seconds(limits, requests) - 9.9).abs() < 0.01);
    }

    #[test]
    fn a_limit_on_one_way_leaves_the_other_alone() {
        let requests = Rates { write: rate(10, 0, 0), ..Rates::default() };
        let limits = Limits { requests, ..Limits::default() };
        assert_eq!(seconds(limits, (0..1000).map(|_| (Way::Read, 1 << 20))), 0.0);
        assert!((seconds(limits, (0..102).map(|_| (Way::Write, 1))) - 10.0).abs() < 0.01);
        // Long requests count as several.
        let limits = Limits { request_bytes: 4096, ..limits };
        assert!((seconds(limits, (0..26).map(|_| (Way::Write, 16384))) - 9.9).abs() < 0.01);
    }

    #[test]
    fn a_burst_passes_at_its_own_rate() {
        let bytes = Rates { read: rate(100, 1000, 5), ..Rates::default() };
        let limits = Limits { bytes, ..Limits::default() };
        let read = |count: usize| seconds(limits, (0..count).map(|_| (Way::Read, 100)));
        // 5000 bytes at 1000 in a second, and what comes then at 100.
        assert!((read(41) - 3.9).abs() < 0.01);
        assert!(read(100) > 45.0 && read(100) < 50.0);
    }
}
