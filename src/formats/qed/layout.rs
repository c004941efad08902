//! QED on disk, little-endian, as the published "QED Image File Format Specification" has it.
//!
//! Header and backing file name, L1 table; L2 tables and clusters wherever they were added. A table is one or more
//! clusters long, L1 and L2 tables alike.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{Error, Result};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;
/// What the file starts with.
pub const MAGIC: [u8; 4] = *b"QED\0";
/// The smallest cluster and the largest, in bytes.
pub const CLUSTERS: (u64, u64) = (1 << 12, 1 << 26);
/// The most clusters of a table.
pub const MOST_TABLE_CLUSTERS: u64 = 16;
/// The longest name of a backing file: the longest path of Linux.
pub const MOST_NAME: usize = 4095;
/// Feature: there is a backing file.
const BACKING_FILE: u64 = 1;
/// Feature: the tables need a check before the image is used.
const NEED_CHECK: u64 = 2;
/// Feature: the backing file is raw.
const BACKING_NO_PROBE: u64 = 4;
/// L2 entry: reads as zeros, whatever the backing file holds.
pub const ZERO: u64 = 1;

#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fields {
    magic: [u8; 4],
    cluster_size: U32,
    /// In clusters.
    table_size: U32,
    /// In clusters.
    header_size: U32,
    features: U64,
    compat_features: U64,
    /// Bits that whoever writes without knowing them clears.
    autoclear_features: U64,
    l1_offset: U64,
    size: U64,
    backing_offset: U32,
    backing_length: U32,
}

const _: () = {
    assert!(size_of::<Fields>() == HEADER_BYTES);
    assert!(offset_of!(Fields, features) == 16);
    assert!(offset_of!(Fields, l1_offset) == 40);
    assert!(offset_of!(Fields, backing_offset) == 56);
};

/// The header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QedHeader {
    raw: Fields,
}

/// Whether clusters of so many bytes can be.
pub fn is_cluster_size(bytes: u64) -> bool {
    bytes.is_power_of_two() && (CLUSTERS.0..=CLUSTERS.1).contains(&bytes)
}

/// Whether tables of so many clusters can be.
pub fn is_table_size(clusters: u64) -> bool {
    clusters.is_power_of_two() && clusters <= MOST_TABLE_CLUSTERS
}

/// The largest disk in bytes. Where it would not fit 64 bits there is none, for the reference too.
pub fn largest_disk(cluster: u64, table_clusters: u64) -> u64 {
    let entries = cluster * table_clusters / 8;
    (entries * entries).checked_mul(cluster).unwrap_or(0)
}

impl QedHeader {
    /// That of a new image: sizes that were found to be possible, and the length of the name of its backing file, with
    /// whether that is raw.
    pub fn new(size: u64, cluster: u64, table_clusters: u64, backing: Option<(u32, bool)>) -> Self {
        let mut raw = Fields::new_zeroed();
        raw.magic = MAGIC;
        raw.cluster_size = narrow(cluster);
        raw.table_size = narrow(table_clusters);
        raw.size = size.into();
        let mut end = HEADER_BYTES as u64;
        if let Some((length, is_raw)) = backing {
            raw.features = (BACKING_FILE | if is_raw { BACKING_NO_PROBE } else { 0 }).into();
            raw.backing_offset = narrow(end);
            raw.backing_length = length.into();
            end += u64::from(length);
        }
        let header_clusters = end.div_ceil(cluster);
        raw.header_size = narrow(header_clusters);
        raw.l1_offset = (header_clusters * cluster).into();
        Self { raw }
    }

    /// Takes the bytes in after having checked them, for a file of that length.
    pub fn parse(raw: [u8; HEADER_BYTES], length: u64) -> Result<Self> {
        let header = Self { raw: zerocopy::transmute!(raw) };
        if header.raw.magic != MAGIC {
            return Err(Error::corrupt("Image not in QED format").in_field(offset_of!(Fields, magic)));
        }
        let unknown = header.features() & !(BACKING_FILE | NEED_CHECK | BACKING_NO_PROBE);
        if unknown != 0 {
            return Err(Error::unsupported(format!("Unsupported QED features: {unknown:x}"))
                .in_field(offset_of!(Fields, features)));
        }
        if !is_cluster_size(header.cluster()) {
            return Err(Error::corrupt("QED cluster size is invalid").in_field(offset_of!(Fields, cluster_size)));
        }
        if !is_table_size(header.raw.table_size.get().into()) {
            return Err(Error::corrupt("QED table size is invalid").in_field(offset_of!(Fields, table_size)));
        }
        let largest = largest_disk(header.cluster(), header.raw.table_size.get().into());
        if !header.size().is_multiple_of(512) || header.size() > largest {
            return Err(Error::corrupt("QED image size is invalid").in_field(offset_of!(Fields, size)));
        }
        let l1_end = header.l1_offset().saturating_add(header.table_bytes());
        // Lengths are counted in whole sectors.
        let length = length.checked_next_multiple_of(512).unwrap_or(length);
        if !header.is_place(header.l1_offset()) || l1_end > length {
            return Err(Error::corrupt("QED table offset is invalid").in_field(offset_of!(Fields, l1_offset)));
        }
        if header.backing().is_some_and(|(at, bytes)| at + u64::from(bytes) > header.end()) {
            return Err(
                Error::corrupt("QED backing filename offset is invalid").in_field(offset_of!(Fields, backing_offset))
            );
        }
        Ok(header)
    }

    /// The bytes as they are written.
    pub fn bytes(&self) -> &[u8; HEADER_BYTES] {
        zerocopy::transmute_ref!(&self.raw)
    }

    fn features(&self) -> u64 {
        self.raw.features.get()
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        self.raw.cluster_size.get().into()
    }

    /// Bytes of the disk in the cluster with that number.
    pub fn used_cluster(&self, index: u64) -> u64 {
        self.size().saturating_sub(index.saturating_mul(self.cluster())).min(self.cluster())
    }

    /// Bytes of a table.
    pub fn table_bytes(&self) -> u64 {
        self.cluster() * u64::from(self.raw.table_size.get())
    }

    /// The virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.raw.size.get()
    }

    /// Sets the virtual size.
    pub fn set_size(&mut self, size: u64) {
        self.raw.size = size.into();
    }

    /// Where the L1 table is.
    pub fn l1_offset(&self) -> u64 {
        self.raw.l1_offset.get()
    }

    /// Where the clusters end that belong to the header.
    pub fn end(&self) -> u64 {
        u64::from(self.raw.header_size.get()) * self.cluster()
    }

    /// Whether a table or a cluster may start there: at a multiple of the cluster's size, behind the header.
    pub fn is_place(&self, at: u64) -> bool {
        at != 0 && at.is_multiple_of(self.cluster()) && at >= self.end()
    }

    /// Where the backing file's name is, and how long it is.
    pub fn backing(&self) -> Option<(u64, u32)> {
        let there = self.features() & BACKING_FILE != 0;
        there.then(|| (self.raw.backing_offset.get().into(), self.raw.backing_length.get()))
    }

    /// Sets it, and whether the backing file is raw.
    pub fn set_backing(&mut self, backing: Option<(u64, u32)>, is_raw: bool) {
        let others = self.features() & !(BACKING_FILE | BACKING_NO_PROBE);
        let there = if backing.is_some() { BACKING_FILE } else { 0 };
        self.raw.features = (others | there | if is_raw { BACKING_NO_PROBE } else { 0 }).into();
        let (at, length) = backing.unwrap_or_default();
        (self.raw.backing_offset, self.raw.backing_length) = (narrow(at), length.into());
    }

    /// Whether the backing file is said to be raw.
    pub fn is_backing_raw(&self) -> bool {
        self.features() & BACKING_NO_PROBE != 0
    }

    /// Whether the tables are said to need a check.
    pub fn needs_check(&self) -> bool {
        self.features() & NEED_CHECK != 0
    }

    /// Says whether they do.
    pub fn set_needs_check(&mut self, needed: bool) {
        let others = self.features() & !NEED_CHECK;
        self.raw.features = (others | if needed { NEED_CHECK } else { 0 }).into();
    }

    /// Clears the bits of what only those may keep who know them; false if there are none.
    pub fn clear_unknown(&mut self) -> bool {
        let any = self.raw.autoclear_features.get() != 0;
        self.raw.autoclear_features = 0.into();
        any
    }
}

fn narrow(value: u64) -> U32 {
    u32::try_from(value).unwrap_or(u32::MAX).into()
}

/// An L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QedEntry {
    /// Not there.
    Unallocated,
    /// Zeros.
    Zero,
    /// At that place in the file.
    Data(u64),
}

impl QedEntry {
    /// From its bits.
    pub fn decode(bits: u64) -> Self {
        match bits {
            0 => Self::Unallocated,
            ZERO => Self::Zero,
            at => Self::Data(at),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let header = QedHeader::new(1 << 30, 4096, 2, Some((5000, true)));
        let mut read = QedHeader::parse(*header.bytes(), 1 << 20).unwrap();
        assert_eq!((read.size(), read.backing(), read.l1_offset()), (1 << 30, Some((64, 5000)), 8192));
        assert!(read.is_backing_raw() && !read.needs_check() && !read.clear_unknown());
        read.set_needs_check(true);
        assert!(QedHeader::parse(*read.bytes(), 1 << 20).unwrap().needs_check());
        read.set_needs_check(false);
        assert_eq!(read, header);
    }

    #[test]
    fn the_largest_disk_is_what_both_tables_reach() {
        assert_eq!(largest_disk(65536, 4), 1 << 46);
        assert_eq!(largest_disk(4096, 1), 1 << 30);
        assert_eq!(largest_disk(1 << 23, 1), 1 << 63);
        assert_eq!(largest_disk(1 << 26, 16), 0, "more than 64 bits");
    }
}
