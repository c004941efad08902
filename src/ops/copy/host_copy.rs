//! What the host is asked to copy (`-C`): as the reference does it, all that is stored as it is, up to the first run that
//! the host has no way to copy. From there on the copy is one like any other, which looks for zeros.
//!
//! Up to where that is depends on maps and files alone, so that the target does not depend on the number of threads.

use crate::block::{Child, ExtentKind, Mapping, Node};
use crate::storage::offload::can_copy;

/// Asks whether a run can be copied.
pub struct HostCopy<'a> {
    target: &'a Node,
    /// What was asked last, and the answer.
    known: Option<(&'a Child, bool)>,
}

impl<'a> HostCopy<'a> {
    /// Nothing where no run can be.
    pub fn to(target: &'a Node) -> Option<Self> {
        target.driver().lets_host_copy().then_some(Self { target, known: None })
    }

    /// Whether the host can copy what is stored there.
    pub fn takes(&mut self, mapping: &Mapping<'a>) -> bool {
        let driver = mapping.node.driver();
        let ExtentKind::Data(place) = mapping.kind else { return false };
        let Some(file) = driver.files().get(place.file).filter(|_| driver.lets_host_copy()) else { return false };
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
