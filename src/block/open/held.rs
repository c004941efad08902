//! Layers that are open already: one that is asked for again is found, not opened and locked a second time.
//!
//! Invariant: what is found was opened for reading, and is asked for in the same way. A layer that is written to is
//! never found: whoever asks for it meets its locks, as any other program would.

use std::ffi::OsString;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::OpenHow;
use super::opened::Opened;
use super::settings::Settings;
use crate::block::{Layer, OptionTree, Purpose};
use crate::storage::Identity;

/// What two openings have in common that come to the same layer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Key {
    identity: Identity,
    format: &'static str,
    options: OptionTree,
    settings: Settings,
    exclusive: bool,
}

impl Key {
    /// Nothing for what is not shared: what is written to or looked at, and what is no plain file of the host.
    pub fn of(
        file: &Opened,
        format: &'static str,
        options: &OptionTree,
        settings: Settings,
        how: &OpenHow,
    ) -> Option<Self> {
        let plain = file.inner.is_none() && file.tree.keys().all(|key| ["driver", "filename"].contains(&key.as_str()));
        if settings.purpose != Purpose::Read || !plain || !file.locking {
            return None;
        }
        let identity = file.child.storage.facts().identity?;
        Some(Self { identity, format, options: options.clone(), settings, exclusive: how.exclusive })
    }
}

/// A layer that somebody may still use, and the name that the names in it are relative to.
#[derive(Debug)]
struct Held {
    key: Key,
    base: Option<OsString>,
    layer: Weak<Layer>,
}

/// See the module. Its lock is a leaf.
#[derive(Debug, Default)]
pub(super) struct HeldLayers(Mutex<Vec<Held>>);

impl HeldLayers {
    /// The layer, if it is open.
    pub fn find(&self, key: &Key, base: Option<&OsString>) -> Option<Arc<Layer>> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().filter(|held| held.key == *key).find_map(|held| {
            let layer = held.layer.upgrade()?;
            // Its other files were found from that name on.
            (layer.driver().files().len() == 1 || held.base.as_ref() == base).then_some(layer)
        })
    }

    /// From here on it can be found.
    pub fn add(&self, key: Key, base: Option<OsString>, layer: &Arc<Layer>) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|held| held.layer.strong_count() > 0 && !std::ptr::eq(held.layer.as_ptr(), Arc::as_ptr(layer)));
        held.push(Held { key, base, layer: Arc::downgrade(layer) });
    }

    /// It will be written to by another way.
    pub fn forget(&self, layer: &Arc<Layer>) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|held| !std::ptr::eq(held.layer.as_ptr(), Arc::as_ptr(layer)));
    }
}
