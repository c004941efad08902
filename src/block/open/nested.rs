//! An image in an image: the guest's disk of one as the file of another.
//!
//! Invariant: recursion into images inside images is capped.

use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;

use super::layer::Ask;
use super::opened::Opened;
use super::{OpenHow, Opener, Trail};
use crate::block::io::Scratch;
use crate::block::{self, Child, ExtentKind, GuestOffset, Node};
use crate::storage::lock::Access;
use crate::storage::{Error, Event, Facts, HostExtent, HostFile, HostKind, Preallocation, Result, Storage, Zeroing};

/// Images in images in images: nobody needs as many.
pub(super) const DEEPEST: usize = 32;

impl Opener<'_> {
    /// Opens the image that another one lies in.
    pub(super) fn nested(&self, role: &str, ask: Ask, how: &OpenHow, trail: &mut Trail) -> block::Result<Opened> {
        if trail.depth >= DEEPEST {
            return Err(block::Error::invalid("Images are nested too deeply"));
        }
        trail.depth += 1;
        let ask = Ask { settings: ask.settings.inside(), ..ask };
        let how = OpenHow { no_backing: false, ..how.clone() };
        let node = self.chain(ask, &how, trail);
        trail.depth -= 1;
        let node = node?;
        let origin = node.origin();
        let child = Child {
            role: role.to_owned(),
            name: node.name().to_owned(),
            driver: node.driver().format(),
            storage: Arc::new(NodeStorage::new(node.clone())),
        };
        let (tree, base, node_name) = (origin.tree.clone(), origin.base.clone(), origin.node_name.clone());
        Ok(Opened { child, tree, path: None, base, node_name, inner: Some(node), locking: false, access: Access::NONE })
    }
}

/// The guest's disk of one image as the file of another.
///
/// Lock order: `changing` before whatever the inner image's driver locks; it is held across data I/O, for the outer
/// image's writers know nothing of the units of the inner one, which no two of them may share.
#[derive(Debug)]
pub struct NodeStorage {
    node: Arc<Node>,
    changing: Mutex<()>,
}

impl NodeStorage {
    /// That image's disk.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node, changing: Mutex::default() }
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Storage for NodeStorage {
    fn len(&self) -> Result<u64> {
        Ok(self.node.virtual_size())
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.node.read(GuestOffset(at), buf, &mut Scratch::default()).map_err(Error::from)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        let _alone = self.change();
        self.grow(at, buf.len() as u64)?;
        self.node.write(GuestOffset(at), buf, &mut Scratch::default()).map_err(Error::from)
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        let mapping = self.node.map(GuestOffset(at), max, usize::MAX).map_err(Error::from)?;
        let kind = match mapping.kind {
            ExtentKind::Data(_) | ExtentKind::Compressed(_) => HostKind::Data,
            ExtentKind::Zero(Some(_)) => HostKind::Zero,
            ExtentKind::Zero(None) | ExtentKind::Unallocated(_) => HostKind::Hole,
        };
        Ok(HostExtent { len: mapping.len, kind })
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        let _alone = self.change();
        self.grow(at, len)?;
        let unmap = how == Zeroing::Punch;
        self.node.write_zeroes(GuestOffset(at), len, unmap, &mut Scratch::default()).map_err(Error::from)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        let _alone = self.change();
        self.node.writing().and_then(|writing| writing.discard(GuestOffset(at), len)).map_err(Error::from)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        let _alone = self.change();
        self.resize(len, fill)
    }

    fn flush(&self) -> Result<()> {
        self.node.driver().flush().map_err(Error::from)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        let mut sum = Some(0);
        for child in self.node.driver().files() {
            let bytes = child.storage.allocated()?;
            sum = sum.zip(bytes).and_then(|(a, b): (u64, u64)| a.checked_add(b));
        }
        Ok(sum)
    }

    fn facts(&self) -> Facts {
        let driver = self.node.driver();
        let files = || driver.files().iter().map(|child| child.storage.facts());
        let longer = driver.virtual_size().saturating_add(512);
        Facts {
            fixed_len: driver.resizing().is_none_or(|resize| resize.check(longer, Preallocation::Off).is_err()),
            // What is encrypted and was never written reads as anything.
            new_reads_zero: driver.cipher().is_none() && files().all(|facts| facts.new_reads_zero),
            parallel: files().filter_map(|facts| facts.parallel).max(),
            ordered: self.node.writing().is_ok_and(|writing| writing.unit() > 1) || files().any(|facts| facts.ordered),
            offload: driver.lets_host_copy() && files().all(|facts| facts.offload),
            ..Facts::PLAIN
        }
    }

    fn host(&self) -> Option<&HostFile> {
        None
    }

    fn announce(&self, _event: Event) {}
}

impl NodeStorage {
    fn resize(&self, len: u64, fill: Preallocation) -> Result<()> {
        if len == self.node.virtual_size() {
            return Ok(());
        }
        let resizing = self.node.driver().resizing().ok_or(Errno::ENOTSUP)?;
        let old = self.node.virtual_size();
        resizing.resize(len.checked_next_multiple_of(512).ok_or(Errno::EFBIG)?, fill).map_err(Error::from)?;
        if len > old && self.node.driver().cipher().is_some() {
            let new = len - old;
            self.node.write_zeroes(GuestOffset(old), new, false, &mut Scratch::default()).map_err(Error::from)?;
        }
        Ok(())
    }

    fn grow(&self, at: u64, len: u64) -> Result<()> {
        let end = at.checked_add(len).ok_or(Errno::EFBIG)?;
        if end > self.node.virtual_size() { self.resize(end, Preallocation::Off) } else { Ok(()) }
    }
}

impl Drop for NodeStorage {
    /// The last user of an image that was written to takes back its marks.
    fn drop(&mut self) {
        if self.node.driver().writing().is_some() {
            // Whoever needs to know has flushed before.
            let _ = self.node.driver().close();
        }
    }
}
