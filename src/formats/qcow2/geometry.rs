//! What follows from a header's fixed fields by calculation: sizes, indices, places.

use std::fmt;
use std::ops::Add;

use crate::block::GuestOffset;

use super::layout::{COMPRESSED, COPIED, ENTRY, EXTENDED_ENTRY, SECTOR, SUBCLUSTERS};

/// The number of a cluster of the image file, from its start on. Guest clusters, refcount blocks and offsets have numbers
/// of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ClusterIndex(pub u64);

impl ClusterIndex {
    /// Past every file's end.
    pub const MAX: Self = Self(u64::MAX);

    /// `n` clusters from this one on.
    pub fn run(self, n: u64) -> impl Iterator<Item = Self> {
        (self.0..self.0.saturating_add(n)).map(Self)
    }

    /// How many clusters there are from an earlier one up to this one.
    pub fn since(self, first: Self) -> u64 {
        self.0.saturating_sub(first.0)
    }
}

impl Add<u64> for ClusterIndex {
    type Output = Self;

    /// Saturates: what an image made overflow lies past every end.
    fn add(self, n: u64) -> Self {
        Self(self.0.saturating_add(n))
    }
}

impl fmt::Display for ClusterIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What follows from a header's fixed fields alone, and never changes while an image is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the refcount width, 0 to 6.
    pub refcount_order: u32,
    /// Whether L2 entries have subclusters.
    pub extended: bool,
}

impl Geometry {
    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes between the end of a disk's last subcluster and the end of its cluster.
    pub fn behind_last_subcluster(&self, size: u64) -> u64 {
        match size % self.cluster_size() {
            0 => 0,
            last => self.cluster_size() - last.next_multiple_of(self.subcluster_size()),
        }
    }

    /// Bytes in the unit of allocation status: the subcluster, or the cluster where there are none.
    pub fn subcluster_size(&self) -> u64 {
        if self.extended { self.cluster_size() / u64::from(SUBCLUSTERS) } else { self.cluster_size() }
    }

    /// Bytes of an L2 entry: 8 or 16.
    pub fn l2_entry(&self) -> u64 {
        if self.extended { EXTENDED_ENTRY } else { ENTRY }
    }

    /// Entries in an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry()
    }

    /// Guest bytes that one L1 entry stands for.
    pub fn l1_covers(&self) -> u64 {
        self.cluster_size() * self.l2_entries()
    }

    /// L1 entries for a disk of that size.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l1_covers())
    }

    /// Width of a refcount in bits.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount.
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Refcounts in a refcount block.
    pub fn refcounts_per_block(&self) -> u64 {
        self.cluster_size() * 8 / u64::from(self.refcount_bits())
    }

    /// The cluster of the image file in which an offset lies.
    pub fn cluster_of(&self, offset: u64) -> ClusterIndex {
        ClusterIndex(offset >> self.cluster_bits)
    }

    /// Where a cluster of the image file starts.
    pub fn offset_of(&self, cluster: ClusterIndex) -> u64 {
        cluster.0 << self.cluster_bits
    }

    /// The index of the refcount block that has a cluster's refcount, and the refcount's index in it.
    pub fn refcount_of(&self, cluster: ClusterIndex) -> (u64, u64) {
        let per_block = self.refcounts_per_block();
        (cluster.0 / per_block, cluster.0 % per_block)
    }

    /// The first cluster whose refcount a refcount block has.
    pub fn first_counted(&self, block: u64) -> ClusterIndex {
        ClusterIndex(block.saturating_mul(self.refcounts_per_block()))
    }

    /// L1 index of a guest offset.
    pub fn l1_index(&self, guest: GuestOffset) -> u64 {
        guest.get() / self.l1_covers()
    }

    /// L2 index of a guest offset.
    pub fn l2_index(&self, guest: GuestOffset) -> u64 {
        self.guest_cluster(guest) % self.l2_entries()
    }

    /// Which of the guest's clusters an offset is in.
    pub fn guest_cluster(&self, guest: GuestOffset) -> u64 {
        guest.get() >> self.cluster_bits
    }

    /// Where the guest's cluster starts that an offset is in, and how far in it that is.
    pub fn within(&self, guest: GuestOffset) -> (GuestOffset, u64) {
        let within = self.in_cluster(guest.get());
        (GuestOffset(guest.get() - within), within)
    }

    /// Whether a table of that length may lie there: aligned, and representable as a file offset.
    pub fn places(&self, at: u64, len: u64) -> bool {
        self.in_cluster(at) == 0 && at.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok())
    }

    /// Where in its cluster an offset is.
    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// `x` of the section "Compressed Clusters Descriptor": the lowest bit of the number of sectors.
    pub fn compressed_shift(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// Host offset and greatest length in bytes that a compressed L2 entry tells. Host offsets have 56 bits: in small
    /// clusters there is room for more, which are passed over.
    pub fn compressed(&self, entry: u64) -> (u64, u64) {
        let (at, len) = self.compressed_as_told(entry);
        (at & ((1 << 56) - 1), len)
    }

    /// The same with all the bits that there is room for.
    pub fn compressed_as_told(&self, entry: u64) -> (u64, u64) {
        let shift = self.compressed_shift();
        let at = entry & ((1 << shift) - 1);
        let sectors = ((entry & !(COPIED | COMPRESSED)) >> shift) + 1;
        (at, sectors * SECTOR - at % SECTOR)
    }

    /// The L2 entry for `len` encoded bytes at `at`; `None` if they cannot be told.
    pub fn compressed_entry(&self, at: u64, len: u64) -> Option<u64> {
        let shift = self.compressed_shift();
        let last = at.checked_add(len.checked_sub(1)?)?;
        let sectors = last / SECTOR - at / SECTOR;
        let fits = at < 1 << shift.min(56) && sectors < 1 << (62 - shift);
        fits.then_some(COMPRESSED | at | (sectors << shift))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::layout::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
    use super::*;

    #[test]
    fn compressed_entries_round_trip() {
        for cluster_bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
            let geometry = Geometry { version: 3, cluster_bits, refcount_order: 4, extended: false };
            for (at, len) in [(0, 1), (511, 2), (70_000, 300), (1 << 40, geometry.cluster_size() - 1)] {
                let entry = geometry.compressed_entry(at, len).unwrap();
                let (place, most) = geometry.compressed(entry);
                assert_eq!(place, at);
                assert!(most >= len && most < len + SECTOR, "{cluster_bits} {at} {len} {most}");
            }
        }
    }

    #[test]
    fn geometry_of_the_extremes() {
        let small = Geometry { version: 3, cluster_bits: 9, refcount_order: 6, extended: false };
        assert_eq!((small.l1_covers(), small.refcounts_per_block(), small.refcount_max()), (32768, 64, u64::MAX));
        let large = Geometry { version: 3, cluster_bits: 21, refcount_order: 0, extended: true };
        assert_eq!((large.l2_entries(), large.subcluster_size(), large.refcount_max()), (131_072, 65536, 1));
    }
}
