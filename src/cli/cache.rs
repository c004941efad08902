//! `-t` and `-T`: cache modes by their words.

use super::Complaint;
use crate::block::nearest::nearest;
use crate::storage::CacheMode;

/// The mode with that word, for an image that is written (`-t`).
pub fn target(word: &str) -> Result<CacheMode, Complaint> {
    mode(word, "Invalid cache option")
}

/// The mode with that word, for an image that is read (`-T`).
pub fn source(word: &str) -> Result<CacheMode, Complaint> {
    mode(word, "Invalid source cache option")
}

fn mode(word: &str, complaint: &str) -> Result<CacheMode, Complaint> {
    let meant = || nearest(word, CacheMode::NAMES);
    CacheMode::parse(word).ok_or_else(|| Complaint::misspelt(format!("{complaint}: {word}"), meant()))
}
