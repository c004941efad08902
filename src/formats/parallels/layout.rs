//! Parallels expandable images on disk, version 2, little-endian, as the published "Parallels Expandable Image File
//! Format" has them.
//!
//! Header, block allocation table (BAT), and from the data offset on clusters. An entry counts in sectors or, where the
//! magic says so, in clusters.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{Error, Result};

/// Bytes of the header; the BAT follows.
pub const HEADER_BYTES: usize = 64;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Entries in sectors, sizes of 32 bits.
pub const MAGIC: &[u8; 16] = b"WithoutFreeSpace";
/// Entries in clusters.
pub const MAGIC_CLUSTERS: &[u8; 16] = b"WithouFreSpacExt";
/// The most sectors of a cluster: the reference's.
pub const MOST_CLUSTER_SECTORS: u64 = 4_186_127;
/// The most entries of a BAT: the reference's.
pub const MOST_ENTRIES: u64 = (1 << 29) - 1;

const VERSION: u32 = 2;
/// Somebody writes to it, or has died of it.
const IN_USE: u32 = 0x746f_6e59;
/// What a disk's size is divided by to count its cylinders.
const HEADS: u32 = 16;
const SECTORS_OF_A_TRACK: u64 = 32;

#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fields {
    magic: [u8; 16],
    version: U32,
    heads: U32,
    cylinders: U32,
    /// Of a cluster.
    sectors: U32,
    entries: U32,
    /// Sectors of the disk.
    size: U64,
    in_use: U32,
    /// In sectors; 0 in the older kind: behind the BAT.
    data_offset: U32,
    flags: U32,
    /// Of the format extension, in sectors; 0 if there is none.
    extension: U64,
}

const _: () = {
    assert!(size_of::<Fields>() == HEADER_BYTES);
    assert!(offset_of!(Fields, sectors) == 28);
    assert!(offset_of!(Fields, size) == 36);
    assert!(offset_of!(Fields, in_use) == 44);
    assert!(offset_of!(Fields, data_offset) == 48);
    assert!(offset_of!(Fields, extension) == 56);
};

/// The header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParallelsHeader {
    raw: Fields,
}

/// Whether a file starts like one.
pub fn is_parallels(head: &[u8]) -> bool {
    let magic = head.starts_with(MAGIC) || head.starts_with(MAGIC_CLUSTERS);
    magic && head.get(16..20) == Some(&VERSION.to_le_bytes())
}

fn narrow(value: u64) -> U32 {
    u32::try_from(value).unwrap_or(u32::MAX).into()
}

impl ParallelsHeader {
    /// That of a new image: sizes in sectors that were found to be possible.
    pub fn new(size: u64, cluster: u64) -> Self {
        let mut raw = Fields::new_zeroed();
        raw.magic = *MAGIC_CLUSTERS;
        raw.version = VERSION.into();
        raw.heads = HEADS.into();
        raw.sectors = narrow(cluster);
        let mut header = Self { raw };
        header.set_size(size);
        header.set_entries(size.div_ceil(cluster));
        header.set_data_offset(header.bat_end().div_ceil(cluster * SECTOR) * cluster);
        header
    }

    /// Takes the bytes in after having checked them.
    pub fn parse(raw: [u8; HEADER_BYTES]) -> Result<Self> {
        if !is_parallels(&raw) {
            let magic = raw.starts_with(MAGIC) || raw.starts_with(MAGIC_CLUSTERS);
            let field = if magic { offset_of!(Fields, version) } else { offset_of!(Fields, magic) };
            return Err(Error::corrupt("Image not in Parallels format").in_field(field));
        }
        let header = Self { raw: zerocopy::transmute!(raw) };
        match u64::from(header.raw.sectors.get()) {
            0 => {
                return Err(
                    Error::corrupt("Invalid image: Zero sectors per track").in_field(offset_of!(Fields, sectors))
                );
            }
            sectors if sectors > MOST_CLUSTER_SECTORS => {
                return Err(Error::corrupt("Invalid image: Too big cluster").in_field(offset_of!(Fields, sectors)));
            }
            _ => {}
        }
        if header.entries() > MOST_ENTRIES {
            return Err(Error::corrupt("Catalog too large").in_field(offset_of!(Fields, entries)));
        }
        if header.sectors() > i64::MAX.unsigned_abs() / SECTOR {
            let error = Error::corrupt("Could not refresh total sector count: File too large");
            return Err(error.in_field(offset_of!(Fields, size)));
        }
        Ok(header)
    }

    /// The bytes as they are written.
    pub fn bytes(&self) -> &[u8; HEADER_BYTES] {
        zerocopy::transmute_ref!(&self.raw)
    }

    /// Whether entries count in clusters.
    pub fn counts_clusters(&self) -> bool {
        self.raw.magic == *MAGIC_CLUSTERS
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        u64::from(self.raw.sectors.get()) * SECTOR
    }

    /// Bytes for which one of an entry stands.
    pub fn entry_unit(&self) -> u64 {
        if self.counts_clusters() { self.cluster() } else { SECTOR }
    }

    /// Sectors of the disk. The older kind has 32 bits for them.
    pub fn sectors(&self) -> u64 {
        let sectors = self.raw.size.get();
        if self.counts_clusters() { sectors } else { sectors & u64::from(u32::MAX) }
    }

    /// Sets them, with the geometry that follows from them.
    pub fn set_size(&mut self, sectors: u64) {
        self.raw.size = sectors.into();
        self.raw.cylinders = narrow(sectors / (u64::from(HEADS) * SECTORS_OF_A_TRACK));
        self.raw.heads = HEADS.into();
    }

    /// The most sectors that a disk of this kind can have.
    pub fn most_sectors(&self) -> u64 {
        if self.counts_clusters() { i64::MAX.unsigned_abs() / SECTOR } else { u32::MAX.into() }
    }

    /// Entries of the BAT.
    pub fn entries(&self) -> u64 {
        self.raw.entries.get().into()
    }

    /// Sets how many there are.
    pub fn set_entries(&mut self, entries: u64) {
        self.raw.entries = narrow(entries);
    }

    /// Where the BAT ends, in bytes.
    pub fn bat_end(&self) -> u64 {
        HEADER_BYTES as u64 + self.entries() * 4
    }

    /// The data offset as it stands there, in sectors.
    pub fn data_offset(&self) -> u64 {
        self.raw.data_offset.get().into()
    }

    /// Sets it.
    pub fn set_data_offset(&mut self, sectors: u64) {
        self.raw.data_offset = narrow(sectors);
    }

    /// The lowest data offset that there can be, in sectors: behind the BAT, at a whole cluster where entries count in
    /// clusters.
    pub fn least_data_offset(&self) -> u64 {
        let sectors = self.bat_end().div_ceil(SECTOR);
        if self.counts_clusters() { sectors.next_multiple_of(self.cluster() / SECTOR) } else { sectors }
    }

    /// Whether the data offset can be one, in a file of that length.
    pub fn is_data_offset_right(&self, length: u64) -> bool {
        let sectors = self.data_offset();
        if sectors == 0 && !self.counts_clusters() {
            return true;
        }
        let aligned = !self.counts_clusters() || (sectors * SECTOR).is_multiple_of(self.cluster());
        aligned && sectors >= self.least_data_offset() && sectors * SECTOR <= length
    }

    /// Where the data starts, in bytes; where the data offset cannot be one, as low as it can be.
    pub fn data_start(&self, length: u64) -> u64 {
        let given = self.data_offset() != 0 && self.is_data_offset_right(length);
        (if given { self.data_offset() } else { self.least_data_offset() }) * SECTOR
    }

    /// Whether somebody has left the image open for writing.
    pub fn is_in_use(&self) -> bool {
        self.raw.in_use.get() == IN_USE
    }

    /// Says whether it is. It is closed as by software that knows of no extension: what the extension says does not
    /// follow what is written.
    pub fn set_in_use(&mut self, in_use: bool) {
        self.raw.in_use = if in_use { IN_USE } else { 0 }.into();
    }

    /// Where the format extension is, in sectors.
    pub fn extension(&self) -> Option<u64> {
        Some(self.raw.extension.get()).filter(|at| *at != 0)
    }

    /// Forgets it.
    pub fn drop_extension(&mut self) {
        self.raw.extension = 0.into();
    }
}

/// The start of the format extension's cluster.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtensionHeader {
    /// [`EXTENSION_MAGIC`].
    pub magic: U64,
    /// MD5 of the rest of the cluster.
    pub checksum: [u8; 16],
}

/// What the format extension starts with.
pub const EXTENSION_MAGIC: u64 = 0xab23_4cef_23dc_ea87;

const _: () = assert!(size_of::<ExtensionHeader>() == 24);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let header = ParallelsHeader::new(20480, 2048);
        let mut read = ParallelsHeader::parse(*header.bytes()).unwrap();
        assert_eq!((read.sectors(), read.cluster(), read.entries(), read.data_offset()), (20480, 1 << 20, 10, 2048));
        assert!(read.is_data_offset_right(1 << 20) && !read.is_data_offset_right(1 << 19) && !read.is_in_use());
        read.set_in_use(true);
        assert!(ParallelsHeader::parse(*read.bytes()).unwrap().is_in_use());
        read.set_in_use(false);
        assert_eq!(read, header);
    }

    #[test]
    fn the_older_kind_has_its_data_behind_the_table() {
        let mut header = ParallelsHeader::new(4096, 128);
        header.raw.magic = *MAGIC;
        header.raw.size = (4096 + (1 << 32)).into();
        header.set_data_offset(0);
        assert_eq!((header.sectors(), header.entry_unit(), header.data_start(1 << 20)), (4096, 512, 512));
        header.set_data_offset(128);
        assert_eq!(header.data_start(1 << 20), 65536);
    }
}
