//! Asking again: what went wrong with a range, and when and how often it is asked for once more.
//!
//! Invariant: the number of requests for a range is bounded, and what has come of it is not asked for again.
//!
//! Lock order: `lost` is a leaf, never held while a request is under way.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::storage::{Error, Result};

/// How often a range is asked for that does not come.
const TRIES: u32 = 6;

/// How long is waited before the second try; before each further one twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause that a server can ask for.
const LONGEST_PAUSE: u64 = 30;

/// Why a range has not come, or not all of it.
#[derive(Debug)]
pub struct Trouble {
    /// In words.
    pub text: String,
    /// What is done about it.
    pub kind: TroubleKind,
}

/// What is done about trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TroubleKind {
    /// It may go better the next time, after so many seconds if that is said.
    Passing(Option<u64>),
    /// Not that range, and no other one.
    Lasting,
}

impl Trouble {
    /// It would go no better.
    pub fn lasting(text: impl Into<String>) -> Self {
        Self { text: text.into(), kind: TroubleKind::Lasting }
    }

    /// It may go better.
    pub fn passing(text: impl Into<String>) -> Self {
        Self { text: text.into(), kind: TroubleKind::Passing(None) }
    }

    fn after(&self) -> Option<u64> {
        match self.kind {
            TroubleKind::Passing(after) => after,
            TroubleKind::Lasting => None,
        }
    }
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        Error::Other(trouble.text)
    }
}

/// What all requests for one file know of its fate.
#[derive(Debug, Default)]
pub struct Persistence {
    /// Why nothing is asked for any more.
    lost: Mutex<Option<String>>,
}

impl Persistence {
    /// Fills `buf` with what `ask` gives: the start of what it is asked for, and why that is not all, if it should be.
    pub fn fetch(
        &self,
        at: u64,
        buf: &mut [u8],
        mut ask: impl FnMut(u64, &mut [u8]) -> (usize, std::result::Result<(), Trouble>),
    ) -> Result<()> {
        let (mut done, mut tries) = (0, 0);
        while done < buf.len() {
            if let Some(text) = &*self.lost.lock().unwrap_or_else(PoisonError::into_inner) {
                return Err(Error::Other(text.clone()));
            }
            let (came, result) = ask(at + done as u64, &mut buf[done..]);
            done += came;
            let Err(mut trouble) = result else { continue };
            // A server that gives a little each time is asked on, but not for ever.
            tries = if came >= 65536 { 0 } else { tries + 1 };
            if trouble.kind != TroubleKind::Lasting && tries < TRIES {
                pause(tries.saturating_sub(1), &trouble);
                continue;
            }
            let _ = write!(trouble.text, " (at byte {} of the file)", at + done as u64);
            *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble.text.clone());
            return Err(trouble.into());
        }
        Ok(())
    }
}

/// Opens a file by `ask`, with fewer tries: a user waits who may have mistyped it.
pub fn open<T>(ask: impl FnMut() -> std::result::Result<T, Trouble>) -> Result<T> {
    try_so_often(TRIES / 2, ask)
}

/// Does what can be done again from its start.
pub fn repeat<T>(ask: impl FnMut() -> std::result::Result<T, Trouble>) -> Result<T> {
    try_so_often(TRIES, ask)
}

fn try_so_often<T>(most: u32, mut ask: impl FnMut() -> std::result::Result<T, Trouble>) -> Result<T> {
    let mut tries = 0;
    loop {
        match ask() {
            Err(trouble) if trouble.kind != TroubleKind::Lasting && tries + 1 < most => pause(tries, &trouble),
            other => return Ok(other?),
        }
        tries += 1;
    }
}

fn pause(tries: u32, trouble: &Trouble) {
    let own = FIRST_PAUSE.saturating_mul(2u32.saturating_pow(tries));
    std::thread::sleep(trouble.after().map_or(own, |seconds| Duration::from_secs(seconds.min(LONGEST_PAUSE))));
}
