//! What an entry of an L1 or L2 table says, taken apart.
//!
//! Source: specification, section "Cluster mapping": "L1 table entry", "L2 table entry", "Standard Cluster Descriptor".

use crate::block::HostOffset;

use super::layout::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};

fn place(word: u64) -> Option<HostOffset> {
    Some(HostOffset(word & OFFSET_MASK)).filter(|at| at.get() != 0)
}

/// An entry of an L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// That of an L2 table which no snapshot shares.
    pub fn own(table: HostOffset) -> Self {
        Self(COPIED | table.get())
    }

    /// Where the L2 table is, if there is one.
    pub fn table(self) -> Option<HostOffset> {
        place(self.0)
    }

    /// Whether the table's refcount is exactly one, so that it can be changed.
    pub fn is_own(self) -> bool {
        self.0 & COPIED != 0
    }
}

/// An entry of an L2 table; of an extended one, without the bitmap of its subclusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L2Entry(pub u64);

impl L2Entry {
    /// Nothing: what the backing file shows.
    pub const NOTHING: Self = Self(0);
    /// Zeros that have no place (version 3, without subclusters).
    pub const ZEROS: Self = Self(ZERO);

    /// That of a cluster which no snapshot shares.
    pub fn own(host: HostOffset) -> Self {
        Self(COPIED | host.get())
    }

    /// Whether it is the descriptor of a compressed cluster: then the offset is told in another way
    /// ([`Geometry::compressed`](super::geometry::Geometry::compressed)).
    pub fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// Where the cluster is, if it has a place and is not compressed.
    pub fn host(self) -> Option<HostOffset> {
        place(self.0).filter(|_| !self.is_compressed())
    }

    /// Whether it refers to anything in the file.
    pub fn refers(self) -> bool {
        self.is_compressed() || self.host().is_some()
    }

    /// Whether the cluster's refcount is exactly one, so that it can be written to. In an image with an external data
    /// file this, not the offset, says that there is a cluster: the first one's offset is 0.
    pub fn is_own(self) -> bool {
        self.0 & (COPIED | COMPRESSED) == COPIED
    }

    /// Whether it reads as zeros, whatever is there. Without subclusters, and not compressed.
    pub fn reads_zero(self) -> bool {
        self.0 & (ZERO | COMPRESSED) == ZERO
    }

    /// The same cluster, reading as zeros or as what it holds.
    pub fn with_zero(self, zero: bool) -> Self {
        if zero { Self(self.0 | ZERO) } else { Self(self.0 & !ZERO) }
    }

    /// Whether a cluster stays where it is when this entry takes the place of that one.
    pub fn is_where(self, old: Self) -> bool {
        !self.is_compressed() && !old.is_compressed() && self.host() == old.host()
    }
}
