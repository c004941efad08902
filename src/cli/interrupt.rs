//! SIGINT, SIGTERM and SIGHUP while an image is changed in place: the work ends where the image is consistent and its
//! marks say so, then the signal has its usual effect. A second one has it at once, and so has one before the work, or
//! while the user is asked for something.
//!
//! The signals are blocked in every thread, and waited for in one of its own: no handler runs. One that is ignored
//! stays so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

use super::signals::{have_effect, heeded};
use super::terminal;

const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// See the module.
#[derive(Debug)]
pub struct Interrupt {
    /// The signal's number; 0 for none.
    caught: Arc<AtomicI32>,
    /// Whether the work has begun.
    begun: Arc<AtomicBool>,
}

impl Interrupt {
    /// Called before there are other threads; where signals cannot be caught they have their usual effect.
    pub fn catch() -> Self {
        let (caught, begun) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicBool::new(false)));
        let set = heeded(&SIGNALS);
        if set.thread_block().is_ok() {
            let (seen, begun) = (caught.clone(), begun.clone());
            let waits = spawn_deaf(move || {
                while let Ok(signal) = set.wait() {
                    let asking = terminal::give_terminal_back();
                    if asking || seen.swap(signal as i32, Ordering::SeqCst) != 0 || !begun.load(Ordering::SeqCst) {
                        have_effect(signal);
                    }
                }
            });
            if !waits {
                let _ = set.thread_unblock();
            }
        }
        Self { caught, begun }
    }

    /// Does work that is short, or looks itself whether a signal came.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        self.begin();
        let done = work();
        self.end();
        done
    }

    /// The work begins.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::SeqCst);
    }

    /// Whether one came.
    pub fn is_caught(&self) -> bool {
        self.caught.load(Ordering::SeqCst) != 0
    }

    /// The work has come to its end, or to one: a signal that came has its effect.
    pub fn end(&self) {
        if let Ok(signal) = Signal::try_from(self.caught.load(Ordering::SeqCst)) {
            have_effect(signal);
        }
    }
}

/// A thread that no signal ends, stops or interrupts, from its beginning on: it waits for those that it wants. False if
/// there is none to be had.
pub fn spawn_deaf(work: impl FnOnce() + Send + 'static) -> bool {
    let Ok(before) = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK) else { return false };
    let spawned = std::thread::Builder::new().spawn(work).is_ok();
    let _ = before.thread_set_mask();
    spawned
}
