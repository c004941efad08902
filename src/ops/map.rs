//! `map`: where each part of a disk is, layer by layer.
//!
//! Neighbours of which the same is true are one entry, however the layers' tables cut them.

use std::sync::Arc;

use crate::block::error::Context;
use crate::block::{Error, ExtentKind, GuestOffset, HostPlace, MapCursor, Mapping, Node, Result, StoredWord};
use crate::storage::{HostExtent, HostKind};

/// What is true of a part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MapEntry<'a> {
    /// Where it starts on the disk, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
    /// How many steps down the chain the layer is that says so.
    pub depth: usize,
    /// A layer has it: it is not only zeros for want of one.
    pub present: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// It is stored.
    pub data: bool,
    /// It is stored compressed.
    pub compressed: bool,
    /// Where it starts in `file`, if its bytes are there as the guest reads them, or would be.
    pub offset: Option<u64>,
    /// The file that it lies in.
    pub file: Option<&'a str>,
}

impl MapEntry<'_> {
    /// Where it ends on the disk.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// What is true of it wherever it lies.
    pub fn status(&self) -> [bool; 5] {
        [self.present, self.zero, self.data, self.compressed, self.offset.is_some()]
    }

    /// Makes it longer by what follows, if the same is true of that.
    fn join(&mut self, next: &Self) -> bool {
        let follows = match (self.offset, next.offset) {
            (Some(a), Some(b)) => a.checked_add(self.len) == Some(b),
            (None, None) => true,
            _ => false,
        };
        let same = self.status() == next.status() && self.depth == next.depth && self.file == next.file;
        let joins = same && follows && self.end() == next.start;
        if joins {
            self.len = self.len.saturating_add(next.len);
        }
        joins
    }
}

/// The entries of a part of a disk, one after the other. What comes before an error is told before it, but for what
/// was being looked at.
#[derive(Debug)]
pub struct MapEntries<'a> {
    cursor: MapCursor<'a>,
    at: u64,
    end: u64,
    pending: Option<MapEntry<'a>>,
}

/// Maps the disk from `start` on for at most `max` bytes.
pub fn map(node: &Node, start: u64, max: u64) -> MapEntries<'_> {
    let end = start.saturating_add(max).min(node.virtual_size());
    MapEntries { cursor: MapCursor::new(node), at: start, end, pending: None }
}

impl<'a> MapEntries<'a> {
    fn run(&mut self) -> Result<MapEntry<'a>> {
        let mapping = self.cursor.map(GuestOffset(self.at), self.end - self.at)?;
        let entry = entry_of(&mapping)?;
        self.at = entry.end();
        Ok(entry)
    }
}

impl<'a> Iterator for MapEntries<'a> {
    type Item = Result<MapEntry<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.at < self.end {
            let next = match self.run() {
                Ok(next) => next,
                Err(error) => {
                    (self.at, self.pending) = (self.end, None);
                    return Some(Err(error).context("Could not read file metadata"));
                }
            };
            if let Some(pending) = &mut self.pending
                && pending.join(&next)
            {
                continue;
            }
            if let Some(done) = self.pending.replace(next) {
                return Some(Ok(done));
            }
        }
        self.pending.take().map(Ok)
    }
}

/// What a run of a chain's map comes to; it may be shorter.
pub fn entry_of<'a>(mapping: &Mapping<'a>) -> Result<MapEntry<'a>> {
    let node = mapping.node;
    let (start, len, depth) = (mapping.start.get(), mapping.len, mapping.depth);
    let word = match mapping.kind {
        ExtentKind::Data(_) | ExtentKind::Zero(Some(_)) => node.driver().stored_word(mapping.start)?,
        _ => StoredWord::Layer,
    };
    let (place, [present, zero, data, compressed]) = match mapping.kind {
        ExtentKind::Data(place) => (Some(place), [true, false, true, false]),
        ExtentKind::Compressed(_) => (None, [true, false, true, true]),
        ExtentKind::Zero(place) => (place, [true, true, word == StoredWord::Both, false]),
        ExtentKind::Unallocated(place) => (place, [false, true, false, false]),
    };
    let child = |place: HostPlace| node.driver().files().get(place.file);
    let addressed = |place: HostPlace| child(place).is_none_or(|child| child.storage.facts().addressed);
    if let (StoredWord::File, Some(place)) = (word, place)
        && addressed(place)
        && let Some(inner) = inner_image(node, place)
        && place.at.get() < inner.virtual_size()
    {
        // The disk is the file, and the file is the disk of another image: that one knows.
        let left = len.min(inner.virtual_size() - place.at.get());
        let below = entry_of(&inner.map(GuestOffset(place.at.get()), left, usize::MAX)?)?;
        return Ok(MapEntry { start, depth, ..below });
    }
    let known = match (word, mapping.kind) {
        (StoredWord::File, ExtentKind::Data(place)) => told_by_file(node, mapping, place)?,
        _ => None,
    };
    let len = known.map_or(len, |known| known.len.min(len));
    if known.is_some_and(|known| known.kind == HostKind::Absent) {
        return Ok(MapEntry { start, len, depth, ..MapEntry::default() });
    }
    // Encrypted bytes are not what the guest reads.
    let place = place.filter(|_| node.driver().cipher().is_none());
    let place = place.filter(|place| addressed(*place));
    let file = place.and_then(child).map(|file| file.name.as_str());
    Ok(MapEntry { start, len, depth, present, zero, data, compressed, offset: place.map(|place| place.at.get()), file })
}

/// What the file of a disk that is the file says of a run, if it is none of this host: those are whole.
fn told_by_file(node: &Node, mapping: &Mapping<'_>, place: HostPlace) -> Result<Option<HostExtent>> {
    let file = node.driver().files().get(place.file).filter(|file| file.storage.facts().identity.is_none());
    let told = file.map(|file| file.storage.extent(place.at.get(), mapping.len)).transpose();
    told.map_err(Error::from).map(|told| told.filter(|told| told.len > 0))
}

/// The image that a file of a layer is.
fn inner_image(node: &Node, place: HostPlace) -> Option<&Arc<Node>> {
    let role = &node.driver().files().get(place.file)?.role;
    node.origin().inner.iter().find(|(known, _)| known == role).map(|(_, inner)| inner)
}
