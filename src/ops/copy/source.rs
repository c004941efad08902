//! Where guest data comes from: one image, or several joined.
//!
//! Invariants: offsets are the target's; holes are found by asking the maps, never by reading; a file that gets shorter
//! while it is read is an error, not zeros.

use std::sync::Arc;

use super::onto::Onto;
use super::segment::status;
pub use super::segment::{Content, Segment, read, read_told};
use super::zero::SECTOR;
use crate::block::{ExtentKind, GuestOffset, Node, Result};
use crate::ops::lengths::{self, FileLengths};

/// The sources, one after the other.
#[derive(Debug)]
pub struct Joined {
    parts: Vec<SourcePart>,
    len: u64,
    above: Option<Above>,
    onto: Option<Onto>,
}

#[derive(Debug)]
struct SourcePart {
    node: Arc<Node>,
    /// Where it starts on the target.
    start: u64,
    /// Where it starts on its own disk.
    from: u64,
    len: u64,
}

/// Only what lies above the target's backing file is copied.
#[derive(Debug, Clone, Copy)]
pub struct Above {
    /// How many layers, from the top.
    pub layers: usize,
    /// How long that backing file is: past its end the target has nothing to keep.
    pub backing_len: u64,
    /// Past that the target reads as zeros.
    pub blank_past: bool,
}

impl Joined {
    /// Joins them in that order.
    pub fn new(nodes: &[Arc<Node>], above: Option<Above>) -> Self {
        let mut start = 0u64;
        let mut parts = Vec::new();
        for node in nodes {
            let len = node.virtual_size();
            parts.push(SourcePart { node: node.clone(), start, from: 0, len });
            start = start.saturating_add(len);
        }
        Self { parts, len: start, above, onto: None }
    }

    /// What a layer, which is the target as well, needs of its own before it stands on another backing file.
    pub fn onto(node: &Arc<Node>, onto: Onto) -> Self {
        Self { onto: Some(onto), ..Self::new(std::slice::from_ref(node), None) }
    }

    /// From there on what the target keeps is zeros: past the end of its backing file.
    pub(super) fn blank_from(&self) -> u64 {
        self.above.filter(|above| above.blank_past).map_or(u64::MAX, |above| above.backing_len)
    }

    /// See [`Joined::onto`].
    pub(super) fn new_backing(&self) -> Option<&Onto> {
        self.onto.as_ref()
    }

    /// `len` bytes of one disk, from `from` on. What is missing to a whole sector is zeros.
    pub fn part(node: &Arc<Node>, from: u64, len: u64) -> Self {
        let len = len.min(node.virtual_size().saturating_sub(from));
        let part = SourcePart { node: node.clone(), start: 0, from, len };
        Self { parts: vec![part], len: len.next_multiple_of(SECTOR), above: None, onto: None }
    }

    /// What is joined, in order.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.parts.iter().map(|part| &*part.node)
    }

    /// The same, each followed by what lies below it.
    pub fn layers(&self) -> impl Iterator<Item = &Node> {
        self.nodes().flat_map(lengths::layers)
    }

    /// How long the files are that the sources lie in, or were when those were opened.
    pub fn lengths(&self) -> Result<FileLengths<'_>> {
        FileLengths::of(self.layers())
    }

    /// The length of all together.
    pub fn total(&self) -> u64 {
        self.len
    }

    /// The run at `at` (below the length).
    pub fn map(&self, at: u64, max: u64) -> Result<Segment<'_>> {
        let index = self.parts.partition_point(|part| part.start + part.len <= at);
        let Some(part) = self.parts.get(index) else {
            return Ok(Segment { at, len: max, content: Content::Zero });
        };
        let max = max.min(part.start + part.len - at);
        let inside = part.from + (at - part.start);
        if let Some(onto) = &self.onto {
            return onto.map(&part.node, inside, max);
        }
        if let Some(above) = self.above.filter(|above| at < above.backing_len) {
            let max = max.min(above.backing_len - at);
            let mapping = status(&part.node, GuestOffset(inside), max, above.layers)?;
            let (content, len) = match mapping.kind {
                // What no layer of the source says is zeros, whatever the target's backing file holds there.
                ExtentKind::Unallocated(_) => {
                    match mapping.node.backing().map_or(0, |below| below.virtual_size()).saturating_sub(inside) {
                        0 => (Content::Zero, mapping.len),
                        left => (Content::Keep, mapping.len.min(left)),
                    }
                }
                ExtentKind::Zero(_) => (Content::Zero, mapping.len),
                _ => (Content::Stored(mapping), mapping.len),
            };
            return Ok(Segment { at, len, content });
        }
        let mapping = status(&part.node, GuestOffset(inside), max, usize::MAX)?;
        let content = match mapping.is_zero() {
            true if self.above.is_some_and(|above| above.blank_past) => Content::Keep,
            true => Content::Zero,
            false => Content::Stored(mapping),
        };
        Ok(Segment { at, len: mapping.len, content })
    }

    /// The same through all layers, wherever the target's backing file stands among them.
    pub fn map_through(&self, at: u64, max: u64) -> Result<Segment<'_>> {
        let index = self.parts.partition_point(|part| part.start + part.len <= at);
        let Some(part) = self.parts.get(index) else {
            return Ok(Segment { at, len: max, content: Content::Zero });
        };
        let max = max.min(part.start + part.len - at);
        let mapping = status(&part.node, GuestOffset(part.from + (at - part.start)), max, usize::MAX)?;
        let content = if mapping.is_zero() { Content::Zero } else { Content::Stored(mapping) };
        Ok(Segment { at, len: mapping.len, content })
    }

    /// How many bytes are stored: what there is to do; with `zeros` those that are zero too.
    /// What cannot be told counts as nothing, and is passed in growing steps.
    pub fn work(&self, zeros: bool) -> u64 {
        let (mut at, mut sum, mut step) = (0, 0, SECTOR);
        while at < self.len {
            let Ok(segment) = self.map(at, self.len - at) else {
                at = at.saturating_add(step);
                step = step.saturating_mul(2);
                continue;
            };
            step = SECTOR;
            if matches!(segment.content, Content::Stored(_)) || zeros && matches!(segment.content, Content::Zero) {
                sum += segment.len;
            }
            at = segment.end();
        }
        sum
    }
}
