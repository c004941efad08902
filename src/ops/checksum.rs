//! `checksum`, `convert --verify`: the digest of what the guest's disk holds. Holes are not read.

use std::sync::Arc;

use super::copy::{GuestDigest, Joined, Observer, Silent, digest_of};
use crate::block::io::Scratch;
use crate::block::{Error, ErrorKind, GuestOffset, Node, Result};
use crate::crypto::{Digest, DigestKind, Hasher};

const SECTOR: u64 = 512;

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
    let text = format!("{name}: the digest is {found}, not {expected}");
    Err(Error::new(ErrorKind::Mismatch, text).about(name))
}

/// A disk that is to hold what other disks hold, one after the other.
pub struct Copied<'a> {
    /// The others.
    pub sources: &'a [Arc<Node>],
    /// Itself.
    pub target: &'a Arc<Node>,
    /// Behind that it is zeros.
    pub alone: bool,
    /// What cannot be read of the others is zeros.
    pub salvaged: bool,
}

impl Copied<'_> {
    fn len(&self) -> u64 {
        self.sources.iter().fold(0, |sum, source| sum.saturating_add(source.virtual_size()))
    }

    fn rest(&self) -> u64 {
        if self.alone { self.target.virtual_size().saturating_sub(self.len()) } else { 0 }
    }

    /// Whether it holds what has that digest.
    pub fn holds(&self, wanted: Digest, observer: &dyn Observer) -> Result<bool> {
        let len = self.len();
        Ok(of_part(self.target, 0, len, wanted.kind, observer)? == wanted
            && !self.differs_from_zeros(len, self.rest())?)
    }

    /// Where it holds something else first: found by halves, since digests are made of what is there alone.
    pub fn first_difference(&self) -> Result<Option<u64>> {
        let mut start = 0;
        for source in self.sources {
            let differs = |from, len| self.differs(source, from, start + from, len);
            if let Some(sector) = first_sector(source.virtual_size(), differs)? {
                let mut both = [[0; SECTOR as usize]; 2];
                let [there, here] = &mut both;
                match source.read(GuestOffset(sector), there, &mut Scratch::default()) {
                    Err(_) if self.salvaged => {}
                    read => read?,
                }
                self.target.read(GuestOffset(start + sector), here, &mut Scratch::default())?;
                let byte = there.iter().zip(here.iter()).position(|(there, here)| there != here);
                return Ok(Some(start + sector + byte.unwrap_or(0) as u64));
            }
            start += source.virtual_size();
        }
        let differs = |from, len| self.differs_from_zeros(start + from, len);
        Ok(first_sector(self.rest(), differs)?.map(|sector| start + sector))
    }

    fn differs(&self, source: &Arc<Node>, from: u64, to: u64, len: u64) -> Result<bool> {
        let part = || Joined::part(source, from, len);
        let wanted = digest_of(&part(), GuestDigest::new(part(), DigestKind::Blake3Tree, self.salvaged), &Silent)?;
        Ok(of_part(self.target, to, len, DigestKind::Blake3Tree, &Silent)? != wanted)
    }

    fn differs_from_zeros(&self, from: u64, len: u64) -> Result<bool> {
        let mut zeros = Hasher::new(DigestKind::Blake3Tree);
        zeros.zeros(len);
        Ok(len > 0 && of_part(self.target, from, len, DigestKind::Blake3Tree, &Silent)? != zeros.finish())
    }
}

fn of_part(node: &Arc<Node>, from: u64, len: u64, kind: DigestKind, observer: &dyn Observer) -> Result<Digest> {
    let part = || Joined::part(node, from, len);
    digest_of(&part(), GuestDigest::new(part(), kind, false), observer)
}

/// The first sector of `len` bytes that differs.
fn first_sector(len: u64, differs: impl Fn(u64, u64) -> Result<bool>) -> Result<Option<u64>> {
    if len == 0 || !differs(0, len)? {
        return Ok(None);
    }
    let (mut from, mut len) = (0, len);
    while len > SECTOR {
        let half = (len / 2).next_multiple_of(SECTOR);
        match differs(from, half)? {
            true => len = half,
            false => (from, len) = (from + half, len - half),
        }
    }
    Ok(Some(from))
}
