//! Signals: which of them are heeded, and what they do when they are let through.

use nix::sys::signal::{SigSet, Signal, raise};

/// Lets a signal that is blocked have its usual effect.
pub fn have_effect(signal: Signal) {
    let mut set = SigSet::empty();
    set.add(signal);
    let _ = set.thread_unblock().and_then(|()| raise(signal));
}

/// Those of the signals that are not ignored.
pub fn heeded(signals: &[Signal]) -> SigSet {
    let ignored = ignored();
    let wanted = |signal: &&Signal| ignored & (1 << (**signal as i32 - 1)) == 0;
    let mut set = SigSet::empty();
    signals.iter().filter(wanted).for_each(|signal| set.add(*signal));
    set
}

/// The signals that are ignored: signal n is bit n - 1.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
