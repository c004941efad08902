//! `-t` and `-T`: cache modes by their words.

use super::Complaint;
use crate::storage::CacheMode;

/// The mode with that word, for an image that is written (`-t`).
pub fn target(word: &str) -> Result<CacheMode, Complaint> {
    CacheMode::parse(word).ok_or_else(|| Complaint::value(format!("Invalid cache option: {word}")))
}

/// The mode with that word, for an image that is read (`-T`).
pub fn source(word: &str) -> Result<CacheMode, Complaint> {
    CacheMode::parse(word).ok_or_else(|| Complaint::value(format!("Invalid source cache option: {word}")))
}
