//! The descriptor's text in its file: changed in its place, or the file replaced as a whole.
//!
//! Changed in place, only what differs is written, so that a torn write can hurt no more than that.
//!
//! Lock order: `renewed`, then `replaced`.

use std::sync::Arc;

use crate::block::error::Context;
use crate::block::{Error, ResizeFiles, Result, metadata};
use crate::storage::{Preallocation, Storage};

use super::descriptor::{self, NO_PARENT};
use super::open::read_text;
use super::{Body, VmdkDriver};

impl VmdkDriver {
    /// The file that holds the text now.
    pub(super) fn text_file(&self) -> Arc<dyn Storage> {
        let replaced = self.replaced.lock().unwrap_or_else(|e| e.into_inner());
        replaced.as_ref().unwrap_or(&self.files[0].storage).clone()
    }

    /// Gives the image a new content id, once: its content is about to differ from what children were made of.
    /// The new id follows from the old one, so that the same work gives the same bytes, and has as many digits, so
    /// that the rest of the text stays where it is.
    pub(super) fn renew(&self) -> Result<()> {
        let mut renewed = self.renewed.lock().unwrap_or_else(|e| e.into_inner());
        let streaming = self.parts.iter().any(|part| match &part.body {
            Body::Sparse { sparse, .. } => sparse.state().stream.is_some(),
            _ => false,
        });
        if renewed.is_none() {
            let mut new = self.descriptor.cid;
            if !streaming {
                self.rewrite_text(|text| {
                    let digits = descriptor::value_of(text, "CID").map_or(8, str::len).clamp(1, 8);
                    new = next_cid(self.descriptor.cid, digits);
                    descriptor::with_value(text, "CID", &format!("{new:0digits$x}"))
                })?;
            }
            *renewed = Some(new);
        }
        Ok(())
    }

    /// What is in the text's place now, and what shall be. Where the text gets shorter NULs follow it, as the
    /// reference has it; what lies behind the NULs is not ours.
    pub(super) fn changed(&self, change: impl FnOnce(&str) -> String) -> Result<(Vec<u8>, Vec<u8>)> {
        let (at, room) = self.text_at;
        let storage = self.text_file();
        let len = match room {
            Some(room) => room,
            None => storage.len().context("Could not get the length of the descriptor")?,
        };
        let old = read_text(&*storage, &self.files[0].name, at, len)?;
        let mut new = descriptor::encoded(&change(&descriptor::text(&old)), &old);
        if room.is_none() {
            new.resize(new.len().next_multiple_of(512), 0);
            return Ok((old, new));
        }
        let written = old.iter().position(|byte| *byte == 0).unwrap_or(old.len());
        new.resize(new.len().max(written), 0);
        if !old.get(written..new.len()).is_some_and(|free| free.iter().all(|byte| *byte == 0)) {
            return Err(Error::unsupported("the descriptor does not fit in its place any more"));
        }
        new.extend_from_slice(old.get(new.len()..).unwrap_or_default());
        Ok((old, new))
    }

    /// Changes the text in its place.
    pub(super) fn rewrite_text(&self, change: impl FnOnce(&str) -> String) -> Result<()> {
        let ((old, new), (at, _)) = (self.changed(change)?, self.text_at);
        let storage = self.text_file();
        let file = &self.files[0].name;
        let same = new.iter().zip(&old).take_while(|(a, b)| a == b).count();
        let is_old = |index: usize| old.get(index) == new.get(index);
        let end = (same..new.len()).rev().find(|index| !is_old(*index)).map_or(same, |last| last + 1);
        if let Some(bytes) = new.get(same..end).filter(|bytes| !bytes.is_empty()) {
            metadata::write(&*storage, file, "the descriptor", at + same as u64, bytes)?;
        }
        if new.len() < old.len() {
            let failed = || format!("{file}: could not shorten the descriptor");
            storage.set_len(new.len() as u64, Preallocation::Off).with_context(failed)?;
        }
        Ok(())
    }

    /// Changes the text: where it is a file of its own, by a new file in place of the old one, behind the files
    /// that were made before; both or nothing.
    pub(super) fn replace_text(&self, change: impl Fn(&str) -> String, files: &dyn ResizeFiles) -> Result<()> {
        if let (_, None) = self.text_at
            && let Some(storage) = files.commit(&self.changed(&change)?.1)?
        {
            *self.replaced.lock().unwrap_or_else(|e| e.into_inner()) = Some(storage);
            return Ok(());
        }
        self.rewrite_text(change)
    }
}

/// Another id of at most so many hexadecimal digits, the first of them not 0.
fn next_cid(cid: u32, digits: usize) -> u32 {
    let mixed = cid.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    let spare = u32::try_from(4 * (8 - digits.clamp(1, 8))).unwrap_or(0);
    let top = 0x1000_0000 >> spare;
    let new = (mixed & (u32::MAX >> spare)) | if mixed & (top * 15) == 0 { top } else { 0 };
    // All ones stand for no parent, and one less for none known.
    match new {
        new if new == cid && digits == 8 => 0x1000_0001,
        new if new >= NO_PARENT - 1 => 0x1000_0000,
        new => new,
    }
}

#[cfg(test)]
mod tests {
    use super::next_cid;

    #[test]
    fn ids_keep_their_digits() {
        for digits in 1..=8 {
            for seed in 0..200u32 {
                let cid = next_cid(seed.wrapping_mul(0x9e37_79b9), digits);
                assert_eq!(format!("{cid:x}").len(), digits);
                assert!(cid < u32::MAX - 1);
            }
        }
        assert_ne!(next_cid(7, 1), next_cid(next_cid(7, 1), 1));
    }
}
