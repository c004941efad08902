//! The compressed unit of a node that was decoded last.
//!
//! Its lock is a leaf, and held for no I/O and no decoding.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::CompressedUnit;

/// The unit that was decoded last: small reads one after the other decode it once.
#[derive(Debug, Default)]
pub struct LastUnit {
    state: Mutex<Decoded>,
}

#[derive(Debug, Default)]
struct Decoded {
    /// Counts what was stored: a unit read before that must not be kept after it.
    stored: u64,
    unit: Option<(CompressedUnit, Arc<Vec<u8>>)>,
}

impl LastUnit {
    fn state(&self) -> MutexGuard<'_, Decoded> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The unit's bytes if they are kept; else what [`LastUnit::keep`] wants to know.
    pub fn find(&self, wanted: &CompressedUnit) -> std::result::Result<Arc<Vec<u8>>, u64> {
        let state = self.state();
        match &state.unit {
            Some((unit, bytes)) if unit == wanted => Ok(bytes.clone()),
            _ => Err(state.stored),
        }
    }

    /// Keeps a unit, unless one was stored since it was read, or there is no memory for it.
    pub fn keep(&self, unit: CompressedUnit, bytes: &[u8], stored: u64) {
        let mut kept = Vec::new();
        if kept.try_reserve_exact(bytes.len()).is_err() {
            return;
        }
        kept.extend_from_slice(bytes);
        let mut state = self.state();
        if state.stored == stored {
            state.unit = Some((unit, Arc::new(kept)));
        }
    }

    /// Forgets it, because a unit was stored.
    pub fn forget(&self) {
        let mut state = self.state();
        state.stored = state.stored.wrapping_add(1);
        state.unit = None;
    }
}
