//! The cache: which blocks are there, which are on their way, and which have not been used for the longest time.
//!
//! Lock order: `state` is a leaf, and never held while anything is fetched.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
enum Slot {
    /// Somebody fetches it.
    Coming,
    There {
        bytes: Arc<[u8]>,
        used: u64,
        /// How many blocks were fetched together when this one was.
        run: u32,
    },
}

#[derive(Debug, Default)]
struct Slots {
    slots: HashMap<u64, Slot>,
    clock: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Blocks {
    most: usize,
    state: Mutex<Slots>,
    changed: Condvar,
}

/// What there is of a block.
pub enum Claim {
    /// It.
    There(Arc<[u8]>),
    /// Nothing: the caller is to fetch it, which nobody else does meanwhile.
    Ours {
        /// How many blocks were fetched together with the one before it; 0 if that is not there.
        run: u32,
    },
}

impl Blocks {
    /// Room for so many blocks.
    pub fn new(most: usize) -> Self {
        Self { most, state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, Slots> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the block is neither there nor on its way.
    pub fn is_absent(&self, block: u64) -> bool {
        !self.state().slots.contains_key(&block)
    }

    /// The block, once it is there, or the task to fetch it.
    pub fn claim(&self, block: u64) -> Claim {
        let mut state = self.state();
        loop {
            state.clock += 1;
            let now = state.clock;
            match state.slots.get_mut(&block) {
                Some(Slot::There { bytes, used, .. }) => {
                    *used = now;
                    return Claim::There(bytes.clone());
                }
                Some(Slot::Coming) => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                None => break,
            }
        }
        state.slots.insert(block, Slot::Coming);
        let run = match block.checked_sub(1).and_then(|before| state.slots.get(&before)) {
            Some(Slot::There { run, .. }) => *run,
            _ => 0,
        };
        Claim::Ours { run }
    }

    /// Claims the blocks behind one that is claimed, up to `end` or the first that is there or on its way.
    pub fn claim_behind(&self, block: u64, end: u64) -> Claimed<'_> {
        let mut state = self.state();
        let mut next = block + 1;
        while next < end && !state.slots.contains_key(&next) {
            state.slots.insert(next, Slot::Coming);
            next += 1;
        }
        Claimed { blocks: self, next: block, end: next }
    }

    /// Keeps a block.
    pub fn put(&self, block: u64, bytes: Arc<[u8]>, run: u32) {
        let mut state = self.state();
        state.clock += 1;
        let used = state.clock;
        state.slots.insert(block, Slot::There { bytes, used, run });
        while state.slots.len() > self.most {
            let oldest = state.slots.iter().filter_map(|(block, slot)| match slot {
                Slot::There { used, .. } => Some((*used, *block)),
                Slot::Coming => None,
            });
            let Some((_, oldest)) = oldest.min() else { break };
            state.slots.remove(&oldest);
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// Blocks that are to be fetched by whoever has this. Those that it is dropped without are anybody's again.
pub struct Claimed<'a> {
    blocks: &'a Blocks,
    next: u64,
    end: u64,
}

impl Claimed<'_> {
    /// The first block that is not ours.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Keeps them.
    pub fn fill(mut self, bytes: impl Iterator<Item = Arc<[u8]>>, run: u32) {
        for bytes in bytes {
            if self.next < self.end {
                self.blocks.put(self.next, bytes, run);
                self.next += 1;
            }
        }
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        if self.next < self.end {
            let mut state = self.blocks.state();
            (self.next..self.end).for_each(|block| drop(state.slots.remove(&block)));
            drop(state);
            self.blocks.changed.notify_all();
        }
    }
}
