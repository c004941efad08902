//! `checksum`, `convert --verify`: the digest of what the guest's disk holds. Holes are not read.

use std::sync::Arc;

use super::copy::{GuestDigest, Joined, Observer, Silent, digest_of};
use crate::block::{Error, ErrorKind, Node, Result};
use crate::crypto::{Digest, DigestKind, Hasher};

/// The digest of disks, one after the other.
pub fn of(nodes: &[Arc<Node>], kind: DigestKind, observer: &dyn Observer) -> Result<Digest> {
    let joined = || Joined::new(nodes, None);
    digest_of(&joined(), GuestDigest::new(joined(), kind, false), observer)
}

/// Refuses another digest than the one that is expected.
pub fn check(name: &str, found: Digest, expected: Digest) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Mismatch, format!("{name}: the digest is {found}, not {expected}")))
}

/// Whether a disk holds what has that digest, in its first `len` bytes; and zeros behind, if `alone`.
pub fn holds(node: &Arc<Node>, len: u64, alone: bool, wanted: Digest, observer: &dyn Observer) -> Result<bool> {
    let part = |from, len, observer: &dyn Observer, kind| {
        let joined = || Joined::part(node, from, len);
        digest_of(&joined(), GuestDigest::new(joined(), kind, false), observer)
    };
    if part(0, len, observer, wanted.kind)? != wanted {
        return Ok(false);
    }
    let rest = if alone { node.virtual_size().saturating_sub(len) } else { 0 };
    let mut zeros = Hasher::new(DigestKind::Blake3Tree);
    zeros.zeros(rest);
    Ok(rest == 0 || part(len, rest, &Silent, DigestKind::Blake3Tree)? == zeros.finish())
}
