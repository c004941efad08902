//! QCOW version 1 on disk, big endian, as the published description of "The QCOW Image Format" has it.
//!
//! Header, backing file name, L1 table; L2 tables and clusters wherever they were added.

use std::mem::{offset_of, size_of};

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{Error, Result};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 48;
/// What the file starts with.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The longest name of a backing file.
pub const MAX_BACKING_NAME: u32 = 1023;
/// The most entries of an L1 table.
pub const MAX_L1: u64 = (1 << 28) - 1;
/// The largest offset in a file.
pub const MAX_OFFSET: u64 = i64::MAX.unsigned_abs();
/// L2 entry: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 63;

#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fields {
    magic: [u8; 4],
    version: U32,
    /// 0 for none.
    backing_offset: U64,
    backing_length: U32,
    /// Time of the backing file's last change: always 0.
    backing_time: U32,
    size: U64,
    cluster_bits: u8,
    l2_bits: u8,
    padding: U16,
    /// 0 none, 1 AES.
    crypt: U32,
    l1_offset: U64,
}

const _: () = {
    assert!(size_of::<Fields>() == HEADER_BYTES);
    assert!(offset_of!(Fields, size) == 24);
    assert!(offset_of!(Fields, crypt) == 36);
    assert!(offset_of!(Fields, l1_offset) == 40);
};

/// The header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QcowHeader {
    raw: Fields,
}

impl QcowHeader {
    /// That of a new image with a backing file's name of that length. With a backing file the clusters are one
    /// sector each, so that a small write copies little.
    pub fn new(size: u64, backing: Option<u32>, encrypted: bool) -> Self {
        let mut raw = Fields::new_zeroed();
        raw.magic = MAGIC;
        raw.version = 1.into();
        raw.size = size.into();
        raw.crypt = u32::from(encrypted).into();
        let mut end = HEADER_BYTES as u64;
        (raw.cluster_bits, raw.l2_bits) = (12, 9);
        if let Some(length) = backing {
            raw.backing_offset = end.into();
            raw.backing_length = length.into();
            end += u64::from(length);
            (raw.cluster_bits, raw.l2_bits) = (9, 12);
        }
        raw.l1_offset = end.next_multiple_of(8).into();
        Self { raw }
    }

    /// Takes the bytes in after having checked them.
    pub fn parse(raw: [u8; HEADER_BYTES]) -> Result<Self> {
        let header = Self { raw: zerocopy::transmute!(raw) };
        if header.raw.magic != MAGIC {
            return Err(Error::corrupt("Image not in qcow format").in_field(offset_of!(Fields, magic)));
        }
        let version = header.raw.version.get();
        if version != 1 {
            let error = Error::unsupported(format!("qcow (v1) does not support qcow version {version}"));
            let error = error.in_field(offset_of!(Fields, version));
            return Err(match version {
                2 | 3 => error.hint("Try the 'qcow2' driver instead."),
                _ => error,
            });
        }
        if header.size() <= 1 {
            return Err(
                Error::corrupt("Image size is too small (must be at least 2 bytes)").in_field(offset_of!(Fields, size))
            );
        }
        if !(9..=16).contains(&header.raw.cluster_bits) {
            return Err(
                Error::corrupt("Cluster size must be between 512 and 64k").in_field(offset_of!(Fields, cluster_bits))
            );
        }
        if !(6..=13).contains(&header.raw.l2_bits) {
            return Err(
                Error::corrupt("L2 table size must be between 512 and 64k").in_field(offset_of!(Fields, l2_bits))
            );
        }
        if header.crypt() > 1 {
            return Err(Error::corrupt("invalid encryption method in qcow header").in_field(offset_of!(Fields, crypt)));
        }
        if header.l1_entries(header.size()).is_none_or(|entries| entries > MAX_L1) {
            return Err(too_large().in_field(offset_of!(Fields, size)));
        }
        let l1_end = header.l1_entries(header.size()).and_then(|n| n.checked_mul(8)?.checked_add(header.l1_offset()));
        if l1_end.is_none_or(|end| end > MAX_OFFSET) {
            let error = Error::corrupt(format!("no file has an L1 table at {}", header.l1_offset()));
            return Err(error.in_field(offset_of!(Fields, l1_offset)));
        }
        if header.backing().is_some_and(|(_, length)| length > MAX_BACKING_NAME) {
            return Err(Error::corrupt("Backing file name too long").in_field(offset_of!(Fields, backing_length)));
        }
        Ok(header)
    }

    /// The bytes as they are written.
    pub fn bytes(&self) -> &[u8; HEADER_BYTES] {
        zerocopy::transmute_ref!(&self.raw)
    }

    /// The virtual size as it stands there.
    pub fn size(&self) -> u64 {
        self.raw.size.get()
    }

    /// Sets the virtual size.
    pub fn set_size(&mut self, size: u64) {
        self.raw.size = size.into();
    }

    /// Where the backing file's name is, and how long it is.
    pub fn backing(&self) -> Option<(u64, u32)> {
        let at = self.raw.backing_offset.get();
        (at != 0).then(|| (at, self.raw.backing_length.get()))
    }

    /// Sets it.
    pub fn set_backing(&mut self, backing: Option<(u64, u32)>) {
        let (at, length) = backing.unwrap_or_default();
        (self.raw.backing_offset, self.raw.backing_length) = (at.into(), length.into());
    }

    /// A cluster's size is two to this power.
    pub fn cluster_bits(&self) -> u32 {
        u32::from(self.raw.cluster_bits)
    }

    /// Entries of an L2 table: two to this power.
    pub fn l2_bits(&self) -> u32 {
        u32::from(self.raw.l2_bits)
    }

    /// The encryption method.
    pub fn crypt(&self) -> u32 {
        self.raw.crypt.get()
    }

    /// Where the L1 table is.
    pub fn l1_offset(&self) -> u64 {
        self.raw.l1_offset.get()
    }

    /// Sets where the L1 table is.
    pub fn set_l1_offset(&mut self, at: u64) {
        self.raw.l1_offset = at.into();
    }

    /// How many L1 entries that size takes.
    pub fn l1_entries(&self, size: u64) -> Option<u64> {
        let bits = self.cluster_bits() + self.l2_bits();
        Some(size.checked_add((1 << bits) - 1)? >> bits)
    }
}

/// The error for a virtual size past what the L1 table can hold.
pub fn too_large() -> Error {
    Error::unsupported("Image too large")
}

/// An L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QcowEntry {
    /// Not there.
    Unallocated,
    /// At that place in the file.
    Plain(u64),
    /// Encoded, at that place, so many bytes.
    Compressed(u64, u64),
}

impl QcowEntry {
    /// From its bits: for a compressed cluster the length stands above the offset.
    pub fn decode(bits: u64, cluster_bits: u32) -> Self {
        if bits == 0 {
            return Self::Unallocated;
        }
        if bits & COMPRESSED == 0 {
            return Self::Plain(bits);
        }
        let shift = 63 - cluster_bits;
        Self::Compressed(bits & ((1 << shift) - 1), bits >> shift & ((1 << cluster_bits) - 1))
    }

    /// To its bits, if it fits.
    pub fn encode(self, cluster_bits: u32) -> Option<u64> {
        let shift = 63 - cluster_bits;
        match self {
            Self::Unallocated => Some(0),
            Self::Plain(at) => (at != 0 && at & COMPRESSED == 0).then_some(at),
            Self::Compressed(at, bytes) => {
                (at < 1 << shift && bytes < 1 << cluster_bits).then(|| COMPRESSED | bytes << shift | at)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let header = QcowHeader::new(1 << 30, Some(5), false);
        let read = QcowHeader::parse(*header.bytes()).unwrap();
        assert_eq!((read.size(), read.backing(), read.l1_offset()), (1 << 30, Some((48, 5)), 56));
        assert_eq!((read.cluster_bits(), read.l2_bits(), read.l1_entries(1 << 30)), (9, 12, Some(512)));
        assert_eq!(QcowHeader::new(512, None, true).l1_offset(), 48);
    }

    #[test]
    fn entries_keep_place_and_length() {
        // Seen in an image: 21 bytes at 0x18000, clusters of 4096 bytes.
        assert_eq!(QcowEntry::decode(0x80a8_0000_0001_8000, 12), QcowEntry::Compressed(0x18000, 21));
        for entry in [QcowEntry::Unallocated, QcowEntry::Plain(0x9000), QcowEntry::Compressed(0x18200, 4095)] {
            assert_eq!(QcowEntry::decode(entry.encode(12).unwrap(), 12), entry);
        }
        assert_eq!(QcowEntry::Compressed(0, 4096).encode(12), None);
    }
}
