//! Internal snapshots: listed, taken, applied, deleted.

use super::ids::{IdChoice, ImageIds};
use super::resize::naming_file;
use crate::block::driver::{NewSnapshot, SnapshotKey};
use crate::block::error::Context;
use crate::block::info::SnapshotInfo;
use crate::block::nearest::nearest;
use crate::block::{Error, ErrorKind, Node, Result};

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotChange {
    /// Take one of that name.
    Create(String),
    /// Give the disk the content of the one with that id, or else of the first of that name.
    Apply(String),
    /// Give up the first of that name.
    Delete(String),
}

/// All of them; none where the format has no snapshots.
pub fn list(node: &Node) -> Result<Vec<SnapshotInfo>> {
    node.driver().snapshots().map_or(Ok(Vec::new()), |snapshots| snapshots.list())
}

/// Does it, and closes the image.
pub fn change(node: &Node, change: &SnapshotChange) -> Result<()> {
    let (done, name, did) = match change {
        SnapshotChange::Create(name) => ("create", name, create(node, name)),
        SnapshotChange::Apply(name) => ("apply", name, apply(node, name)),
        SnapshotChange::Delete(name) => ("delete", name, delete(node, name)),
    };
    let meant = |error| match change {
        SnapshotChange::Create(_) => error,
        SnapshotChange::Apply(name) | SnapshotChange::Delete(name) => {
            advising(error, node, &SnapshotKey::IdOrName(name.clone()))
        }
    };
    let did = did.map_err(meant).and_then(|()| node.driver().close()).map_err(|error| naming_file(node, error));
    did.with_context(|| format!("Could not {done} snapshot '{name}'"))
}

fn create(node: &Node, name: &str) -> Result<()> {
    let snapshots = node.driver().snapshots().ok_or_else(|| Error::unsupported("Operation not supported"))?;
    let (date_sec, date_nsec) = ImageIds::of(node.name(), node.virtual_size(), IdChoice::default())?.time();
    snapshots.create(&NewSnapshot { name: name.to_owned(), date_sec, date_nsec })
}

fn apply(node: &Node, name: &str) -> Result<()> {
    let snapshots = node.driver().snapshots();
    let snapshots = snapshots.ok_or_else(|| Error::unsupported("Block driver does not support snapshots"))?;
    snapshots.apply(&SnapshotKey::IdOrName(name.to_owned()))
}

fn delete(node: &Node, name: &str) -> Result<()> {
    let index = list(node)?.iter().position(|one| one.name == name);
    match (node.driver().snapshots(), index) {
        (Some(snapshots), Some(index)) => snapshots.delete(index),
        _ => Err(Error::new(ErrorKind::NotFound, "snapshot not found")),
    }
}

/// The error, where no snapshot is of that name, with the one that was probably meant.
pub fn advising(error: Error, node: &Node, key: &SnapshotKey) -> Error {
    let (SnapshotKey::IdOrName(name) | SnapshotKey::Exact { name: Some(name), .. }) = key else { return error };
    let known = list(node).unwrap_or_default();
    let missing = !known.iter().any(|one| one.name == *name || one.id == *name);
    match nearest(name, known.iter().map(|one| one.name.as_str())).filter(|_| missing) {
        Some(meant) => error.advise(format!("did you mean '{meant}'?")),
        None => error,
    }
}
