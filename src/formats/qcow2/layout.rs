//! qcow2 on disk: every structure's fields with offset, width and meaning (`on_disk!`). All numbers are big endian.
//!
//! The source is the published specification "Qcow2 Image File Format"; the section is named at each structure.
//! Nothing here decides anything: values are read and written as they are.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, transmute};

/// A structure as it is on disk, its offsets and its length checked when this is compiled, and the same in the
/// machine's own numbers.
macro_rules! on_disk {
    ($(#[$about:meta])* $name:ident as $disk:ident, $size:literal bytes {
        $($(#[$field_about:meta])* $offset:literal $field:ident: $number:ty as $stored:ty,)*
    }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name {
            $($(#[$field_about])* pub $field: $number,)*
        }

        #[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub(super) struct $disk {
            $(pub(super) $field: $stored,)*
        }

        const _: () = assert!(size_of::<$disk>() == $size);
        $(const _: () = assert!(std::mem::offset_of!($disk, $field) == $offset);)*

        impl $name {
            /// Reads it.
            pub fn read(bytes: &[u8; $size]) -> Self {
                let stored: $disk = transmute!(*bytes);
                Self { $($field: stored.$field.into(),)* }
            }

            /// As it is stored.
            pub fn to_bytes(&self) -> [u8; $size] {
                transmute!($disk { $($field: self.$field.into(),)* })
            }
        }
    };
}

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

on_disk! {
    /// The fixed fields (section "Header" and "Additional fields").
    HeaderFields as StoredHeader, 112 bytes {
        /// Always [`MAGIC`].
        0 magic: u32 as U32,
        /// 2 or 3.
        4 version: u32 as U32,
        /// Where the backing file's name is; 0 without one.
        8 backing_file_offset: u64 as U64,
        /// Its length.
        16 backing_file_size: u32 as U32,
        /// log2 of the cluster size.
        20 cluster_bits: u32 as U32,
        /// Virtual size in bytes.
        24 size: u64 as U64,
        /// See `CRYPT_*`.
        32 crypt_method: u32 as U32,
        /// Entries in the active L1 table.
        36 l1_size: u32 as U32,
        /// Where it is.
        40 l1_table_offset: u64 as U64,
        /// Where the refcount table is.
        48 refcount_table_offset: u64 as U64,
        /// Its length in clusters.
        56 refcount_table_clusters: u32 as U32,
        /// Number of snapshots.
        60 nb_snapshots: u32 as U32,
        /// Where the snapshot table is.
        64 snapshots_offset: u64 as U64,
        /// Version 3 from here on.
        72 incompatible: u64 as U64,
        /// Features that may be ignored.
        80 compatible: u64 as U64,
        /// Features that a writer who does not know them clears.
        88 autoclear: u64 as U64,
        /// log2 of the refcount width in bits.
        96 refcount_order: u32 as U32,
        /// Length of the header, a multiple of 8.
        100 header_length: u32 as U32,
        /// If the header is that long: see `ZLIB`, `ZSTD`.
        104 compression_type: u8 as u8,
        /// Up to the length that we write.
        105 padding: [u8; 7] as [u8; 7],
    }
}

impl HeaderFields {
    /// Reads the fields; `bytes` is the start of the file, missing bytes are zeros. What version 2 does not have
    /// gets the value that it means there.
    pub fn of_any_version(bytes: &[u8; HEADER_FULL]) -> Self {
        let mut fields = Self::read(bytes);
        if fields.version < 3 {
            (fields.incompatible, fields.compatible, fields.autoclear) = (0, 0, 0);
            fields.refcount_order = V2_REFCOUNT_ORDER;
            fields.header_length = HEADER_V2 as u32;
        }
        if fields.header_length <= HEADER_V3 as u32 {
            fields.compression_type = ZLIB;
        }
        fields.padding = [0; 7];
        fields
    }

    /// The fields as they are stored: 72 bytes for version 2, 112 for version 3.
    pub fn stored(&self) -> Vec<u8> {
        let mut bytes = Self { magic: MAGIC, ..*self }.to_bytes().to_vec();
        if self.version < 3 {
            bytes.truncate(HEADER_V2);
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

on_disk! {
    /// Section "Bitmaps extension".
    BitmapsExtension as StoredBitmaps, 24 bytes {
        /// Number of bitmaps, at least 1.
        0 count: u32 as U32,
        /// Reserved, zero.
        4 reserved: u32 as U32,
        /// Length of the directory in bytes.
        8 directory_size: u64 as U64,
        /// Where the directory is.
        16 directory_offset: u64 as U64,
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
/// Bits of a bitmap table entry that must be 0.
pub const BITMAP_TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Width of an L1, refcount table or bitmap table entry, and of an L2 entry without subclusters.
pub const ENTRY: u64 = 8;
/// Width of an L2 entry with subclusters: the entry, then the allocation bitmap (bits 0 to 31 allocated, bits 32
/// to 63 reads as zeros; subcluster 0 is the least significant bit of each half).
pub const EXTENDED_ENTRY: u64 = 16;

/// Fixed part of a snapshot table entry (section "Snapshots"); then extra data, id, name, padding to 8.
pub const SNAPSHOT_ENTRY: usize = 40;
/// Length of the extra data that we write: VM state size (8), virtual size (8), instruction count (8).
pub const SNAPSHOT_EXTRA: usize = 24;

on_disk! {
    /// The fixed fields of a snapshot table entry.
    SnapshotFields as StoredSnapshot, 40 bytes {
        /// Where its L1 table is.
        0 l1_table_offset: u64 as U64,
        /// Entries in it.
        8 l1_size: u32 as U32,
        /// Length of the id.
        12 id_size: u16 as U16,
        /// Length of the name.
        14 name_size: u16 as U16,
        /// When it was taken, seconds since the epoch.
        16 date_sec: u32 as U32,
        /// And nanoseconds.
        20 date_nsec: u32 as U32,
        /// The guest's clock in nanoseconds.
        24 vm_clock_nsec: u64 as U64,
        /// Size of the VM state; superseded by the extra data.
        32 vm_state_size: u32 as U32,
        /// Length of the extra data.
        36 extra_size: u32 as U32,
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
/// The one type of bitmap: dirty tracking.
pub const BITMAP_DIRTY_TRACKING: u8 = 1;

on_disk! {
    /// The fixed fields of a bitmap directory entry.
    BitmapFields as StoredBitmap, 24 bytes {
        /// Where the bitmap table is.
        0 table_offset: u64 as U64,
        /// Entries in it.
        8 table_size: u32 as U32,
        /// See `BITMAP_*`.
        12 flags: u32 as U32,
        /// The type.
        16 kind: u8 as u8,
        /// log2 of the bytes for which one bit stands.
        17 granularity_bits: u8 as u8,
        /// Length of the name.
        18 name_size: u16 as U16,
        /// Length of the extra data.
        20 extra_size: u32 as U32,
    }
}

/// The entries of a table: big-endian words of 8 bytes. What is left over at the end is none.
pub fn words(bytes: &[u8]) -> impl ExactSizeIterator<Item = u64> {
    bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word))
}

/// The big-endian word of 8 bytes at `at`.
pub fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|word| u64::from_be_bytes(*word))
}

/// The big-endian word of 4 bytes at `at`.
pub fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_be_bytes(*word))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trip_keeps_every_field() {
        let fields = HeaderFields {
            magic: MAGIC,
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
            padding: [0; 7],
        };
        let bytes = fields.stored();
        assert_eq!(bytes.len(), HEADER_FULL);
        let array: [u8; HEADER_FULL] = bytes.try_into().unwrap();
        assert_eq!(HeaderFields::of_any_version(&array), fields);
        assert_eq!(HeaderFields { version: 2, ..fields }.stored().len(), HEADER_V2);
    }
}
