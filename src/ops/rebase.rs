//! Another backing file for an image, which shows the same before and after, or (unsafe) whatever comes of it.
//!
//! First what the image shows of its old backing file, and would not of the new one, becomes its own; then the header
//! changes over. What stops in between has the old backing file and shows what it showed.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use super::copy::{self, CopyOptions, Joined, Observer, Onto, TargetFacts};
use super::written;
use crate::block::error::Context;
use crate::block::{BackingChange, BackingRef, BlockDriver, Error, Node, Result, keeps_its_parent, name};
use crate::storage::host_part::parts_at;

/// What the image is to stand on.
#[derive(Debug, Clone)]
pub struct NewBacking {
    /// As the header will name it; none: on nothing.
    pub named: Option<BackingRef>,
    /// As the user typed it, for errors.
    pub typed: Option<String>,
    /// That image, if it is open.
    pub below: Option<Arc<Node>>,
}

impl NewBacking {
    /// Refuses what cannot be, before anything is changed.
    pub fn check(&self, node: &Node) -> Result<()> {
        self.refuse_loop(node)?;
        self.change_of(node)?.check(self.named.as_ref(), self.below()).with_context(|| self.failed())?;
        match &self.named {
            // Without it whoever writes to the backing file can have it taken for another format.
            Some(named) if named.format.is_none() => {
                Err(Error::invalid("backing format must be specified")).with_context(|| self.failed())
            }
            _ => Ok(()),
        }
    }

    /// An image on top of itself could not be opened again.
    fn refuse_loop(&self, node: &Node) -> Result<()> {
        let mut next = self.below.as_ref();
        let mut again = false;
        let own = node.identity().map(|(own, _)| own);
        while let Some(below) = next {
            again |= below.identity().is_some() && below.identity() == node.identity();
            // A loop device of it.
            let same = below.driver().format() == node.driver().format();
            let mut hosts = below.driver().files().iter().filter_map(|child| child.storage.host());
            again |= same && hosts.any(|host| host.lies_in().iter().any(|part| Some(part.of) == own));
            next = below.backing();
        }
        if let (None, Some(named), Some(own)) = (&self.below, &self.named, own) {
            let path = name::find_beside(node.origin().base.as_deref(), &named.name);
            again |= path.is_some_and(|path| parts_at(Path::new(&path)).iter().any(|part| part.of == own));
        }
        match again {
            true => {
                let text = format!("Backing file '{}' creates an infinite loop.", node.name());
                Err(Error::invalid(text)).with_context(|| self.failed())
            }
            false => Ok(()),
        }
    }

    fn below(&self) -> Option<&dyn BlockDriver> {
        self.below.as_ref().map(|below| below.driver())
    }

    fn change_of<'a>(&self, node: &'a Node) -> Result<&'a dyn BackingChange> {
        let driver = node.driver();
        let refusal = || match driver.backing() {
            Some(_) => keeps_its_parent(driver),
            None => Error::unsupported("Operation not supported"),
        };
        driver.backing_change().ok_or_else(refusal).with_context(|| self.failed())
    }

    fn failed(&self) -> String {
        // The reference prints a null pointer where nothing was typed.
        format!("Could not change the backing file to '{}'", self.typed.as_deref().unwrap_or("(null)"))
    }
}

/// Makes it the backing file; what the disk shows stays the same. `compress` stores compressed what is copied.
pub fn rebase(node: &Arc<Node>, new: &NewBacking, compress: bool, observer: &dyn Observer) -> Result<()> {
    new.check(node)?;
    let options = CopyOptions { compress, ..CopyOptions::default() };
    new.change_of(node)?.begin();
    let source = Joined::onto(node, Onto(new.below.clone()));
    let copied = copy::copy(&source, node, &options, TargetFacts::default(), observer);
    if copied.is_err() {
        return written::close(node, copied);
    }
    rename(node, new)
}

/// Makes it the backing file, whatever the disk shows then.
pub fn rename(node: &Node, new: &NewBacking) -> Result<()> {
    new.check(node)?;
    new.change_of(node)?.change(new.named.as_ref(), new.below()).with_context(|| new.failed())?;
    node.driver().close()
}

/// Refuses to compress where that cannot be.
pub fn check_compression(node: &Node) -> Result<()> {
    if node.driver().cipher().is_some() {
        // Compressed units would lie there for everybody to read.
        return Err(Error::invalid("Compression and encryption not supported at the same time"));
    }
    match node.writing()?.compressing() {
        Some(_) => Ok(()),
        None => Err(Error::unsupported("Compression not supported for this file format")),
    }
}

/// The name that a layer's header gives its backing file, as a path.
pub fn path_of(node: &Node, named: &OsStr) -> Result<OsString> {
    name::find_beside(node.origin().base.as_deref(), named).ok_or_else(|| {
        let named = named.display();
        Error::invalid(format!("Cannot tell where '{named}' is, because the image has no plain name"))
    })
}
