//! qcow2 on disk: every structure's fields with offset, width and meaning. All numbers are big endian.
//!
//! The source is the published specification "Qcow2 Image File Format"; the section is named at each structure.
//! Nothing here decides anything: values are read and written as they are.

use byteorder::{BigEndian, ByteOrder};

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Smallest cluster: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster: 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Largest exponent of the refcount width: 64 bits.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Refcount width of a version 2 image: 16 bits.
pub const V2_REFCOUNT_ORDER: u32 = 4;
/// Largest L1 table, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most snapshots in an image.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Most bytes of unknown extra data in a snapshot's entry.
pub const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Largest snapshot table, in bytes.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// Longest name of a backing file, in bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Most bitmaps in an image.
pub const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory that the reference takes, in bytes.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = MAX_BITMAPS as u64 * 1024;
/// Longest name of a bitmap, in bytes.
pub const MAX_BITMAP_NAME: u16 = 1023;
/// Smallest exponent of a bitmap's granularity.
pub const MIN_GRANULARITY_BITS: u8 = 9;
/// Largest exponent of a bitmap's granularity.
pub const MAX_GRANULARITY_BITS: u8 = 31;
/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;
/// The unit of a compressed cluster's length.
pub const SECTOR: u64 = 512;

/// Length of a version 2 header.
pub const HEADER_V2: usize = 72;
/// Least length of a version 3 header.
pub const HEADER_V3: usize = 104;
/// Length of the header that we write: up to and with the compression type, padded.
pub const HEADER_FULL: usize = 112;

/// Incompatible bit 0: refcounts may be inconsistent.
pub const DIRTY: u64 = 1 << 0;
/// Incompatible bit 1: any structure may be corrupt; not to be written to.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible bit 2: guest clusters lie in an external data file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible bit 3: the compression type is not the default.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible bit 4: extended L2 entries.
pub const EXTENDED_L2: u64 = 1 << 4;
/// The incompatible bits that we know.
pub const INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
/// Compatible bit 0: refcount updates may be postponed under the dirty bit.
pub const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear bit 0: the bitmaps extension is consistent.
pub const BITMAPS: u64 = 1 << 0;
/// Autoclear bit 1: the external data file is a raw image by itself.
pub const DATA_FILE_RAW: u64 = 1 << 1;
/// The autoclear bits that we know.
pub const AUTOCLEAR: u64 = BITMAPS | DATA_FILE_RAW;

/// `crypt_method`: none.
pub const CRYPT_NONE: u32 = 0;
/// `crypt_method`: AES-CBC.
pub const CRYPT_AES: u32 = 1;
/// `crypt_method`: LUKS.
pub const CRYPT_LUKS: u32 = 2;

/// `compression_type`: raw deflate.
pub const ZLIB: u8 = 0;
/// `compression_type`: zstd.
pub const ZSTD: u8 = 1;

/// The fixed fields (section "Header" and "Additional fields").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeaderFields {
    /// 4, 4 bytes: 2 or 3. (0, 4 bytes: the magic.)
    pub version: u32,
    /// 8, 8 bytes: where the backing file's name is; 0 without one.
    pub backing_file_offset: u64,
    /// 16, 4 bytes: its length.
    pub backing_file_size: u32,
    /// 20, 4 bytes: log2 of the cluster size.
    pub cluster_bits: u32,
    /// 24, 8 bytes: virtual size in bytes.
    pub size: u64,
    /// 32, 4 bytes: see `CRYPT_*`.
    pub crypt_method: u32,
    /// 36, 4 bytes: entries in the active L1 table.
    pub l1_size: u32,
    /// 40, 8 bytes: where it is.
    pub l1_table_offset: u64,
    /// 48, 8 bytes: where the refcount table is.
    pub refcount_table_offset: u64,
    /// 56, 4 bytes: its length in clusters.
    pub refcount_table_clusters: u32,
    /// 60, 4 bytes: number of snapshots.
    pub nb_snapshots: u32,
    /// 64, 8 bytes: where the snapshot table is.
    pub snapshots_offset: u64,
    /// 72, 8 bytes (version 3 from here on).
    pub incompatible: u64,
    /// 80, 8 bytes.
    pub compatible: u64,
    /// 88, 8 bytes.
    pub autoclear: u64,
    /// 96, 4 bytes: log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// 100, 4 bytes: length of the header, a multiple of 8.
    pub header_length: u32,
    /// 104, 1 byte, if the header is that long: see `ZLIB`, `ZSTD`. 7 bytes of padding follow.
    pub compression_type: u8,
}

impl HeaderFields {
    /// Reads the fields; `bytes` is the start of the file, missing bytes are zeros. What version 2 does not have
    /// gets the value that it means there. The magic is not looked at.
    pub fn read(bytes: &[u8; HEADER_FULL]) -> Self {
        let u32_at = |at: usize| BigEndian::read_u32(&bytes[at..at + 4]);
        let u64_at = |at: usize| BigEndian::read_u64(&bytes[at..at + 8]);
        let mut fields = Self {
            version: u32_at(4),
            backing_file_offset: u64_at(8),
            backing_file_size: u32_at(16),
            cluster_bits: u32_at(20),
            size: u64_at(24),
            crypt_method: u32_at(32),
            l1_size: u32_at(36),
            l1_table_offset: u64_at(40),
            refcount_table_offset: u64_at(48),
            refcount_table_clusters: u32_at(56),
            nb_snapshots: u32_at(60),
            snapshots_offset: u64_at(64),
            refcount_order: V2_REFCOUNT_ORDER,
            header_length: HEADER_V2 as u32,
            ..Self::default()
        };
        if fields.version >= 3 {
            fields.incompatible = u64_at(72);
            fields.compatible = u64_at(80);
            fields.autoclear = u64_at(88);
            fields.refcount_order = u32_at(96);
            fields.header_length = u32_at(100);
            if fields.header_length > HEADER_V3 as u32 {
                fields.compression_type = bytes[104];
            }
        }
        fields
    }

    /// The fields as they are stored: 72 bytes for version 2, 112 for version 3.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; if self.version < 3 { HEADER_V2 } else { HEADER_FULL }];
        let mut put32 = |at: usize, value: u32| BigEndian::write_u32(&mut bytes[at..at + 4], value);
        put32(0, MAGIC);
        put32(4, self.version);
        put32(16, self.backing_file_size);
        put32(20, self.cluster_bits);
        put32(32, self.crypt_method);
        put32(36, self.l1_size);
        put32(56, self.refcount_table_clusters);
        put32(60, self.nb_snapshots);
        if self.version >= 3 {
            put32(96, self.refcount_order);
            put32(100, self.header_length);
        }
        let mut put64 = |at: usize, value: u64| BigEndian::write_u64(&mut bytes[at..at + 8], value);
        put64(8, self.backing_file_offset);
        put64(24, self.size);
        put64(40, self.l1_table_offset);
        put64(48, self.refcount_table_offset);
        put64(64, self.snapshots_offset);
        if self.version >= 3 {
            put64(72, self.incompatible);
            put64(80, self.compatible);
            put64(88, self.autoclear);
            bytes[104] = self.compression_type;
        }
        bytes
    }
}

/// Header extension: end of the list. Each extension is type (4 bytes), length (4 bytes), data, padding to 8.
pub const EXT_END: u32 = 0;
/// Header extension: format of the backing file, a string.
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: feature name table, entries of [`FEATURE_NAME`] bytes.
pub const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Header extension: bitmaps, [`BITMAPS_EXT`] bytes.
pub const EXT_BITMAPS: u32 = 0x2385_2875;
/// Header extension: where the LUKS header is, [`CRYPTO_EXT`] bytes.
pub const EXT_CRYPTO: u32 = 0x0537_be77;
/// Header extension: name of the external data file, a string.
pub const EXT_DATA_FILE: u32 = 0x4441_5441;
/// Bytes before an extension's data.
pub const EXT_HEAD: usize = 8;

/// One entry of the feature name table: 0, 1 byte type (0 incompatible, 1 compatible, 2 autoclear); 1, 1 byte
/// bit number; 2, 46 bytes name, padded with zeros.
pub const FEATURE_NAME: usize = 48;

/// The names that we write, in the reference's order.
pub const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Length of the bitmaps extension.
pub const BITMAPS_EXT: usize = 24;

/// Section "Bitmaps extension".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// 0, 4 bytes: number of bitmaps, at least 1.
    pub count: u32,
    /// 4, 4 bytes: reserved, zero.
    pub reserved: u32,
    /// 8, 8 bytes: length of the directory in bytes.
    pub directory_size: u64,
    /// 16, 8 bytes: where the directory is.
    pub directory_offset: u64,
}

impl BitmapsExtension {
    /// Reads it; `None` if the length is wrong.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; BITMAPS_EXT] = bytes.try_into().ok()?;
        Some(Self {
            count: BigEndian::read_u32(&bytes[0..4]),
            reserved: BigEndian::read_u32(&bytes[4..8]),
            directory_size: BigEndian::read_u64(&bytes[8..16]),
            directory_offset: BigEndian::read_u64(&bytes[16..24]),
        })
    }

    /// As it is stored.
    pub fn to_bytes(&self) -> [u8; BITMAPS_EXT] {
        let mut bytes = [0; BITMAPS_EXT];
        BigEndian::write_u32(&mut bytes[0..4], self.count);
        BigEndian::write_u32(&mut bytes[4..8], self.reserved);
        BigEndian::write_u64(&mut bytes[8..16], self.directory_size);
        BigEndian::write_u64(&mut bytes[16..24], self.directory_offset);
        bytes
    }
}

/// Length of the full disk encryption header pointer: 0, 8 bytes offset; 8, 8 bytes length.
pub const CRYPTO_EXT: usize = 16;

/// Bits 9 to 55 of an L1, L2 or bitmap table entry: a host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63 of an L1 or L2 entry: the refcount of what it points to is exactly one.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry of version 3 without subclusters: reads as zeros.
pub const ZERO: u64 = 1;
/// Bits of an L1 entry that must be 0.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that must be 0.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits 9 to 63 of a refcount table entry: a host offset.
pub const REFCOUNT_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// Bits of a refcount table entry that must be 0.
pub const REFCOUNT_RESERVED: u64 = 0x1ff;
/// Width of an L1, refcount table or bitmap table entry, and of an L2 entry without subclusters.
pub const ENTRY: u64 = 8;
/// Width of an L2 entry with subclusters: the entry, then the allocation bitmap (bits 0 to 31 allocated, bits 32
/// to 63 reads as zeros; subcluster 0 is the least significant bit of each half).
pub const EXTENDED_ENTRY: u64 = 16;

/// Fixed part of a snapshot table entry (section "Snapshots"); then extra data, id, name, padding to 8.
pub const SNAPSHOT_ENTRY: usize = 40;
/// Length of the extra data that we write: VM state size (8), virtual size (8), instruction count (8).
pub const SNAPSHOT_EXTRA: usize = 24;

/// The fixed fields of a snapshot table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SnapshotFields {
    /// 0, 8 bytes: where its L1 table is.
    pub l1_table_offset: u64,
    /// 8, 4 bytes: entries in it.
    pub l1_size: u32,
    /// 12, 2 bytes: length of the id.
    pub id_size: u16,
    /// 14, 2 bytes: length of the name.
    pub name_size: u16,
    /// 16, 4 bytes: when it was taken, seconds since the epoch.
    pub date_sec: u32,
    /// 20, 4 bytes: and nanoseconds.
    pub date_nsec: u32,
    /// 24, 8 bytes: the guest's clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// 32, 4 bytes: size of the VM state; superseded by the extra data.
    pub vm_state_size: u32,
    /// 36, 4 bytes: length of the extra data.
    pub extra_size: u32,
}

impl SnapshotFields {
    /// Reads them.
    pub fn read(bytes: &[u8; SNAPSHOT_ENTRY]) -> Self {
        let u16_at = |at: usize| BigEndian::read_u16(&bytes[at..at + 2]);
        let u32_at = |at: usize| BigEndian::read_u32(&bytes[at..at + 4]);
        let u64_at = |at: usize| BigEndian::read_u64(&bytes[at..at + 8]);
        Self {
            l1_table_offset: u64_at(0),
            l1_size: u32_at(8),
            id_size: u16_at(12),
            name_size: u16_at(14),
            date_sec: u32_at(16),
            date_nsec: u32_at(20),
            vm_clock_nsec: u64_at(24),
            vm_state_size: u32_at(32),
            extra_size: u32_at(36),
        }
    }

    /// As they are stored.
    pub fn to_bytes(&self) -> [u8; SNAPSHOT_ENTRY] {
        let mut bytes = [0; SNAPSHOT_ENTRY];
        BigEndian::write_u64(&mut bytes[0..8], self.l1_table_offset);
        BigEndian::write_u32(&mut bytes[8..12], self.l1_size);
        BigEndian::write_u16(&mut bytes[12..14], self.id_size);
        BigEndian::write_u16(&mut bytes[14..16], self.name_size);
        BigEndian::write_u32(&mut bytes[16..20], self.date_sec);
        BigEndian::write_u32(&mut bytes[20..24], self.date_nsec);
        BigEndian::write_u64(&mut bytes[24..32], self.vm_clock_nsec);
        BigEndian::write_u32(&mut bytes[32..36], self.vm_state_size);
        BigEndian::write_u32(&mut bytes[36..40], self.extra_size);
        bytes
    }
}

/// Fixed part of a bitmap directory entry (section "Bitmap directory"); then extra data, name, padding to 8.
pub const BITMAP_ENTRY: usize = 24;
/// Bitmap flag bit 0: was not saved correctly.
pub const BITMAP_IN_USE: u32 = 1 << 0;
/// Bitmap flag bit 1: must reflect all changes.
pub const BITMAP_AUTO: u32 = 1 << 1;
/// Bitmap flag bit 2: may be used though its extra data is unknown.
pub const BITMAP_EXTRA_COMPATIBLE: u32 = 1 << 2;
/// The bitmap flags that there are.
pub const BITMAP_FLAGS: u32 = BITMAP_IN_USE | BITMAP_AUTO | BITMAP_EXTRA_COMPATIBLE;
/// The one type of bitmap: dirty tracking.
pub const BITMAP_DIRTY_TRACKING: u8 = 1;

/// The fixed fields of a bitmap directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BitmapFields {
    /// 0, 8 bytes: where the bitmap table is.
    pub table_offset: u64,
    /// 8, 4 bytes: entries in it.
    pub table_size: u32,
    /// 12, 4 bytes: see `BITMAP_*`.
    pub flags: u32,
    /// 16, 1 byte: the type.
    pub kind: u8,
    /// 17, 1 byte: log2 of the bytes for which one bit stands.
    pub granularity_bits: u8,
    /// 18, 2 bytes: length of the name.
    pub name_size: u16,
    /// 20, 4 bytes: length of the extra data.
    pub extra_size: u32,
}

impl BitmapFields {
    /// Reads them.
    pub fn read(bytes: &[u8; BITMAP_ENTRY]) -> Self {
        Self {
            table_offset: BigEndian::read_u64(&bytes[0..8]),
            table_size: BigEndian::read_u32(&bytes[8..12]),
            flags: BigEndian::read_u32(&bytes[12..16]),
            kind: bytes[16],
            granularity_bits: bytes[17],
            name_size: BigEndian::read_u16(&bytes[18..20]),
            extra_size: BigEndian::read_u32(&bytes[20..24]),
        }
    }

    /// As they are stored.
    pub fn to_bytes(&self) -> [u8; BITMAP_ENTRY] {
        let mut bytes = [0; BITMAP_ENTRY];
        BigEndian::write_u64(&mut bytes[0..8], self.table_offset);
        BigEndian::write_u32(&mut bytes[8..12], self.table_size);
        BigEndian::write_u32(&mut bytes[12..16], self.flags);
        bytes[16] = self.kind;
        bytes[17] = self.granularity_bits;
        BigEndian::write_u16(&mut bytes[18..20], self.name_size);
        BigEndian::write_u32(&mut bytes[20..24], self.extra_size);
        bytes
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

    /// L1 index of a guest offset.
    pub fn l1_index(&self, guest: u64) -> u64 {
        guest / self.l1_covers()
    }

    /// L2 index of a guest offset.
    pub fn l2_index(&self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) % self.l2_entries()
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

    /// Host offset and greatest length in bytes that a compressed L2 entry tells.
    pub fn compressed(&self, entry: u64) -> (u64, u64) {
        let shift = self.compressed_shift();
        let at = entry & ((1 << shift) - 1) & ((1 << 56) - 1);
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
    use super::*;

    #[test]
    fn header_round_trip_keeps_every_field() {
        let fields = HeaderFields {
            version: 3,
            backing_file_offset: 1,
            backing_file_size: 2,
            cluster_bits: 3,
            size: 4,
            crypt_method: 5,
            l1_size: 6,
            l1_table_offset: 7,
            refcount_table_offset: 8,
            refcount_table_clusters: 9,
            nb_snapshots: 10,
            snapshots_offset: 11,
            incompatible: 12,
            compatible: 13,
            autoclear: 14,
            refcount_order: 15,
            header_length: 112,
            compression_type: 1,
        };
        let bytes = fields.to_bytes();
        assert_eq!(bytes.len(), HEADER_FULL);
        let array: [u8; HEADER_FULL] = bytes.try_into().unwrap();
        assert_eq!(HeaderFields::read(&array), fields);
        assert_eq!(HeaderFields { version: 2, ..fields }.to_bytes().len(), HEADER_V2);
    }

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
