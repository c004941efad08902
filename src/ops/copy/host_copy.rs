//! What the host is asked to copy (`-C`): as the reference does it, all that is stored as it is, up to the first piece that
//! the host has no way to copy: between these files, or because the source's file ends within it, or in a sector that is
//! not whole. From there on the copy is one like any other, which looks for zeros.
//!
//! Up to where that is depends on maps and files alone, so that the target does not depend on the number of threads.

use super::plan::CHUNK;
use super::zero::SECTOR;
use crate::block::{Child, ExtentKind, Mapping, Node, Result};
use crate::storage::offload::can_copy;

/// Asks what can be copied.
pub struct HostCopy<'a> {
    target: &'a Node,
    /// Where data goes in the target is where it lies on the disk: what was copied of a piece stays there.
    plain: bool,
    /// What was asked last, and the answer.
    known: Option<(&'a Child, bool)>,
}

impl<'a> HostCopy<'a> {
    /// Nothing where no run can be.
    pub fn to(target: &'a Node, plain: bool) -> Option<Self> {
        target.driver().lets_host_copy().then_some(Self { target, plain, known: None })
    }

    /// How much of the start of `len` bytes that are stored there the host copies; if that is not all, it is asked no
    /// more.
    pub fn takes(&mut self, mapping: &Mapping<'a>, len: u64) -> Result<u64> {
        let driver = mapping.node.driver();
        let ExtentKind::Data(place) = mapping.kind else { return Ok(0) };
        let Some(file) = driver.files().get(place.file).filter(|_| driver.lets_host_copy()) else { return Ok(0) };
        if !self.reaches(file) {
            return Ok(0);
        }
        let end = file.storage.len()?;
        let there = |end: u64| end.saturating_sub(place.at.get());
        Ok(match (there(end / SECTOR * SECTOR) < len, self.plain) {
            (false, _) => len,
            (true, true) => there(end.next_multiple_of(SECTOR)).min(len),
            (true, false) => there(end) / CHUNK * CHUNK,
        })
    }

    fn reaches(&mut self, file: &'a Child) -> bool {
        match self.known {
            Some((known, answer)) if std::ptr::eq(known, file) => answer,
            _ => {
                let files = self.target.driver().files();
                let answer = files.iter().all(|target| can_copy(&*file.storage, &*target.storage));
                self.known = Some((file, answer));
                answer
            }
        }
    }
}
