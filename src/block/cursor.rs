//! A walk down a chain's maps that remembers what each layer said.
//!
//! [`Node::map`] asks every layer anew for each run: where a lower layer is scattered, those above look at the same
//! entries again and again. A cursor asks a layer once for as long a run as it answers, and goes by that until it ends.
//! For images that nobody writes to meanwhile, and offsets that mostly grow. No lock is held.

use std::sync::Arc;

use super::{Error, Extent, ExtentKind, GuestOffset, Mapping, Node, Result};

/// See the module.
#[derive(Debug)]
pub struct MapCursor<'a> {
    /// From the top down.
    layers: Vec<CursorLayer<'a>>,
}

#[derive(Debug)]
struct CursorLayer<'a> {
    node: &'a Node,
    size: u64,
    known: Option<Extent>,
}

impl<'a> CursorLayer<'a> {
    /// What the layer says from `at` (below its size) on.
    fn run(&mut self, at: GuestOffset) -> Result<Extent> {
        let passed = |extent: &Extent| at.get().checked_sub(extent.start.get()).filter(|passed| *passed < extent.len);
        if let Some(known) = self.known
            && let Some(passed) = passed(&known)
        {
            let (len, kind) = (known.len - passed, known.kind.after(passed));
            return Ok(Extent { start: at, len, kind });
        }
        let left = self.size.saturating_sub(at.get());
        let extent = self.node.extent(at, left)?;
        if extent.len == 0 || extent.len > left {
            return Err(Error::corrupt(format!("{}: the map makes no progress at {at}", self.node.name())));
        }
        self.known = Some(extent);
        Ok(extent)
    }
}

impl<'a> MapCursor<'a> {
    /// Over the whole chain.
    pub fn new(top: &'a Node) -> Self {
        let nodes = std::iter::successors(Some(top), |node| node.backing().map(Arc::as_ref));
        Self { layers: nodes.map(|node| CursorLayer { node, size: node.virtual_size(), known: None }).collect() }
    }

    /// The run at `at` (below the top layer's size), at most `max` bytes long. Where a backing file is too short, or
    /// there is none, it is the layer above that leaves the run [`Unallocated`](ExtentKind::Unallocated).
    pub fn map(&mut self, at: GuestOffset, max: u64) -> Result<Mapping<'a>> {
        let mut found: Option<Mapping<'a>> = None;
        for (depth, layer) in self.layers.iter_mut().enumerate() {
            if at.get() >= layer.size {
                break;
            }
            let extent = layer.run(at)?;
            let len = found.map_or(max, |above| above.len).min(extent.len);
            found = Some(Mapping { start: at, len, kind: extent.kind, depth, node: layer.node });
            if !matches!(extent.kind, ExtentKind::Unallocated(_)) {
                break;
            }
        }
        found.ok_or_else(|| Error::invalid(format!("{at} is past the end of the disk")))
    }
}
