//! How many chunks a worker takes at once, and what servers are told of them.
//!
//! Most take one. What is read from a server comes a while after it was asked for, however much that is: there a worker
//! takes several chunks that follow each other, if nobody has to wait for it meanwhile, and what lies in one run in the
//! server's file is announced as such, so that it is asked for once. Those chunks are shorter, as more workers hold one.
//!
//! Invariant: a worker does what it has taken in the order of the plan.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::plan::{CHUNK, Chunk, CopyPlan};
use super::segment::Content;
use super::source::Joined;
use crate::block::{Child, ExtentKind, Result};
use crate::storage::Event;

/// Guest data in a chunk, where several are taken at once.
const SHORT_CHUNK: u64 = 512 << 10;

/// The most bytes that are taken at once, and the most chunks.
const MOST: u64 = 8 << 20;
const MOST_CHUNKS: usize = 64;

/// Into so many parts at least is divided what there is, so that each of 16 workers gets some of them.
const PARTS: u64 = 16 * 4;

/// How chunks are taken.
#[derive(Debug, Clone, Copy)]
pub struct Taken {
    /// Until they have so many bytes; 0: one at once.
    most: u64,
    /// They are announced.
    announced: bool,
}

impl Taken {
    /// As suits the sources. `free`: no worker waits for one that has taken what comes before.
    pub fn from(source: &Joined, free: bool) -> Self {
        let files =
            || source.layers().flat_map(|node| node.driver().files()).filter(|file| file.storage.facts().by_run);
        let announced = files().next().is_some();
        let len: u64 = files().filter_map(|file| file.len().ok()).fold(0, u64::saturating_add);
        let most = (len / PARTS).min(MOST);
        Self { most: if free && most > SHORT_CHUNK { most } else { 0 }, announced }
    }

    /// Guest data in a chunk, before rounding to units.
    pub fn chunk(self) -> u64 {
        if self.most > 0 { SHORT_CHUNK } else { CHUNK }
    }
}

/// What a worker has taken, and not begun.
#[derive(Default)]
pub struct Ahead<'a>(VecDeque<Result<Chunk<'a>>>);

impl<'a> Ahead<'a> {
    /// Makes the next piece of work `chunk`; false when there is none left.
    pub fn next(&mut self, taken: Taken, plan: &Mutex<CopyPlan<'a>>, chunk: &mut Chunk<'a>) -> Result<bool> {
        let plan = || plan.lock().unwrap_or_else(PoisonError::into_inner);
        if !taken.announced {
            return plan().next(chunk);
        }
        if self.0.is_empty() {
            self.take(taken.most, &mut plan());
            self.announce();
        }
        let next = self.0.pop_front().transpose()?;
        Ok(next.map(|next| *chunk = next).is_some())
    }

    fn take(&mut self, most: u64, plan: &mut CopyPlan<'a>) {
        let mut bytes = 0;
        while self.0.is_empty() || (bytes < most && self.0.len() < MOST_CHUNKS) {
            let mut chunk = Chunk::default();
            match plan.next(&mut chunk) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.0.push_back(Err(error)),
            }
            for segment in &chunk.segments {
                bytes += match &segment.content {
                    // It is fetched through a cache of blocks, which holds what workers need that are close together.
                    Content::Stored(mapping) if matches!(mapping.kind, ExtentKind::Compressed(_)) => {
                        segment.len.saturating_mul(most.div_ceil(CHUNK))
                    }
                    Content::Stored(_) => segment.len,
                    Content::Zero | Content::Keep => 0,
                };
            }
            self.0.push_back(Ok(chunk));
        }
    }

    /// Tells servers what will be read of their files. A run ends where something else has to be asked for: nobody may hold
    /// an answer, of which a server perhaps gives but a few at once, while it waits for another one.
    fn announce(&self) {
        let mut runs: Vec<(&Child, u64, u64)> = Vec::new();
        let mut goes_on = true;
        for segment in self.0.iter().flatten().flat_map(|chunk| &chunk.segments) {
            let Content::Stored(mapping) = &segment.content else { continue };
            let place = match mapping.kind {
                ExtentKind::Data(place) => Some(place),
                _ => None,
            };
            let file = place.and_then(|place| Some((place.at.get(), mapping.node.driver().files().get(place.file)?)));
            let Some((at, file)) = file else {
                goes_on = false;
                continue;
            };
            match runs.last_mut() {
                Some((last, start, len))
                    if goes_on && std::ptr::eq(*last, file) && start.checked_add(*len) == Some(at) =>
                {
                    *len += segment.len;
                }
                _ => runs.push((file, at, segment.len)),
            }
            goes_on = true;
        }
        runs.into_iter().for_each(|(file, at, len)| file.storage.announce(Event::Reads { at, len }));
    }
}
