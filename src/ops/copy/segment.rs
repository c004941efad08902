//! A run of the target, what it is to hold, and how that is read.

use crate::block::error::Operation;
use crate::block::io::Scratch;
use crate::block::{ExtentKind, GuestOffset, Mapping, Node, Result};

/// What a run of the target is to hold.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// Stored in a source.
    Stored(Mapping<'a>),
    /// Zeros.
    Zero,
    /// What the target's backing file has there already.
    Keep,
}

/// A run of the target and what it is to hold.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// Where it starts on the target.
    pub at: u64,
    /// Its length, at least 1.
    pub len: u64,
    /// What it is to hold.
    pub content: Content<'a>,
}

impl<'a> Segment<'a> {
    /// Where it ends.
    pub fn end(&self) -> u64 {
        self.at + self.len
    }

    /// The first `len` bytes, and the rest (`0 < len < self.len`).
    pub fn split(self, len: u64) -> (Self, Self) {
        let mut rest = Self { at: self.at + len, len: self.len - len, content: self.content };
        if let Content::Stored(mapping) = &mut rest.content {
            *mapping = mapping.after(len);
        }
        (Self { len, ..self }, rest)
    }

    /// Makes it longer by what follows, if that is stored right behind it (one read then gets both).
    pub fn join(&mut self, next: &Segment<'a>) -> bool {
        let (Content::Stored(mine), Content::Stored(theirs)) = (&mut self.content, &next.content) else { return false };
        let (ExtentKind::Data(a), ExtentKind::Data(b)) = (mine.kind, theirs.kind) else { return false };
        let adjacent = std::ptr::eq(mine.node, theirs.node)
            && a.file == b.file
            && a.at.get().checked_add(self.len) == Some(b.at.get())
            && self.at.checked_add(self.len) == Some(next.at);
        if adjacent {
            self.len += next.len;
            mine.len += next.len;
        }
        adjacent
    }
}

/// Fills `buf` with a segment's bytes; what is not stored is left as zeros.
pub fn read(segment: &Segment<'_>, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
    match &segment.content {
        Content::Stored(mapping) => mapping.read(buf, scratch),
        Content::Zero | Content::Keep => {
            buf.fill(0);
            Ok(())
        }
    }
}

/// The same; what cannot be read is told with its place.
pub fn read_told(segment: &Segment<'_>, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
    read(segment, buf, scratch).map_err(|error| match (error.tells_guest(), &segment.content) {
        (false, Content::Stored(mapping)) => error.at(mapping.node.place_of(Operation::Read, mapping.start)),
        _ => error,
    })
}

/// The run at `at`; what is wrong with a map is said with its place.
pub(super) fn status(node: &Node, at: GuestOffset, max: u64, layers: usize) -> Result<Mapping<'_>> {
    node.map(at, max, layers).map_err(|error| match error.tells_guest() {
        true => error,
        false => error.at(node.place_of(Operation::Status, at)),
    })
}
