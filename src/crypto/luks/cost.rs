//! What a derivation costs: how many iterations take so long on this machine, and how many are too many.
//!
//! Time is that of the thread on the CPU, so that a busy machine makes no weaker keys.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

use super::LuksError;
use crate::crypto::HashAlgorithm;

/// The fewest iterations that a key is given (section 5.1 of the specification has it as a minimum).
const FEWEST: u64 = 1000;
/// How long a measurement takes at least.
const LONG_ENOUGH: Duration = Duration::from_millis(64);
/// Of the time that is to be spent on a key slot, the digest of the master key has one part in so many.
const DIGEST_SHARE: u64 = 8;

/// What one attempt to unlock may cost, all slots together, in rounds with SHA-256: about a minute of a machine that does
/// 8 million of them in a second, as many do. Eight slots of the two seconds that programs give them by default are a
/// quarter of that, and a user who asks for ten seconds in each of a few slots still opens them. A header that asks for
/// more was made to stop whoever opens it.
const MOST_COST: u64 = 1 << 29;

/// How often a hash may be turned over for one attempt to unlock.
fn most_rounds(hash: HashAlgorithm) -> u64 {
    MOST_COST / hash.round_cost()
}

/// What tells that a header, or a user, asks for more.
pub fn too_many(hash: HashAlgorithm, iterations: u32) -> LuksError {
    LuksError::TooManyIterations { iterations, most: most_rounds(hash) }
}

/// The thread's time on the CPU.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Iterations in a second that derive a key of `len` bytes.
fn rate(hash: HashAlgorithm, len: usize) -> u64 {
    let mut iterations: u32 = 1 << 12;
    loop {
        let start = now();
        hash.derive(b"passphrase", b"salt", iterations, len);
        let spent = now().saturating_sub(start);
        if spent >= LONG_ENOUGH || iterations >= 1 << 30 {
            let per_second = u128::from(iterations) * 1_000_000_000 / spent.as_nanos().max(1);
            return u64::try_from(per_second).unwrap_or(u64::MAX);
        }
        iterations *= 2;
    }
}

/// The iterations of a new header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Iterations {
    /// Of a key slot.
    pub slot: u32,
    /// Of the master key's digest.
    pub digest: u32,
}

impl Iterations {
    /// As many as take `milliseconds` for a slot, measured. Refused where that is more than the header can say, or than
    /// would be opened again.
    pub fn measure(hash: HashAlgorithm, key: usize, digest: usize, milliseconds: u64) -> Result<Self, LuksError> {
        let fewest = u32::try_from(FEWEST).unwrap_or(0);
        if milliseconds == 0 {
            // There is nothing to measure.
            return Ok(Self { slot: fewest, digest: fewest });
        }
        let count = |rate: u64| u128::from(rate) * u128::from(milliseconds) / 1000;
        let fits = |count: u128, len: usize| {
            let iterations = u32::try_from(count).map_err(|_| LuksError::TooLong(count))?;
            let iterations = iterations.max(fewest);
            match hash.rounds(iterations, len) {
                rounds if rounds > most_rounds(hash) / 2 => Err(too_many(hash, iterations)),
                _ => Ok(iterations),
            }
        };
        let digest_count = count(rate(hash, digest) / DIGEST_SHARE);
        let digest = fits(digest_count, digest)?;
        let slot = fits(count(rate(hash, key)), key)?;
        Ok(Self { slot, digest })
    }
}

/// What may still be spent on one attempt to unlock.
#[derive(Debug)]
pub struct Budget(u64);

impl Default for Budget {
    fn default() -> Self {
        Self(MOST_COST)
    }
}

impl Budget {
    /// Takes the rounds of a derivation from it; false where they are not left.
    pub fn take(&mut self, hash: HashAlgorithm, iterations: u32, len: usize) -> bool {
        let cost = hash.rounds(iterations, len).saturating_mul(hash.round_cost());
        let left = self.0.checked_sub(cost);
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn iterations_have_a_floor_and_what_cannot_be_stored_is_refused() {
        let least = Iterations::measure(HashAlgorithm::Sha256, 64, 20, 0).unwrap();
        assert_eq!((least.slot, least.digest), (1000, 1000));
        let error = |time| Iterations::measure(HashAlgorithm::Sha256, 64, 20, time).unwrap_err();
        assert!(matches!(error(u64::MAX), LuksError::TooLong(_)));
    }

    #[test]
    fn a_budget_is_spent_once() {
        let mut budget = Budget::default();
        assert!(!budget.take(HashAlgorithm::Sha1, u32::MAX, 64));
        assert!(budget.take(HashAlgorithm::Sha1, (MOST_COST / 4) as u32, 64));
        assert!(!budget.take(HashAlgorithm::Sha1, 1, 1));
        // A slower hash gets fewer rounds.
        let mut budget = Budget::default();
        assert!(!budget.take(HashAlgorithm::Sha512, (MOST_COST / 2) as u32, 64));
        assert!(budget.take(HashAlgorithm::Sha512, (MOST_COST / 4) as u32, 64));
    }
}
