//! VMDK's on-disk structures, and nothing else.
//!
//! Source: VMware, *Virtual Disk Format 5.0* (technical note), sections "Hosted Sparse Extents" (`KDMV`), "ESXi
//! Host Sparse Extents" (`COWD`) and "Stream-Optimized Compressed Sparse Extents" (markers). All numbers are
//! little-endian; offsets and sizes in the structures are in sectors of 512 bytes.

use byteorder::{ByteOrder, LittleEndian as LE};

/// Bytes in a sector.
pub const SECTOR: u64 = 512;
/// Sparse extent magic, `KDMV`.
pub const MAGIC: &[u8; 4] = b"KDMV";
/// ESXi host sparse extent magic.
pub const COWD_MAGIC: &[u8; 4] = b"COWD";

/// Header flag: the newline detection bytes are valid.
pub const FLAG_NEWLINES: u32 = 1 << 0;
/// Header flag: there is a redundant grain directory.
pub const FLAG_REDUNDANT: u32 = 1 << 1;
/// Header flag: a grain table entry of 1 is a zeroed grain (version 2).
pub const FLAG_ZERO_GRAIN: u32 = 1 << 2;
/// Header flag: grains are compressed.
pub const FLAG_COMPRESSED: u32 = 1 << 16;
/// Header flag: there are markers.
pub const FLAG_MARKERS: u32 = 1 << 17;

/// `gdOffset` of a stream-optimized extent whose directory is found through the footer.
pub const GD_AT_END: u64 = u64::MAX;
/// `compressAlgorithm`: deflate (RFC 1951 in a zlib frame, RFC 1950).
pub const COMPRESSION_DEFLATE: u16 = 1;
/// `singleEndLineChar`, `nonEndLineChar`, `doubleEndLineChar1`, `doubleEndLineChar2`.
pub const NEWLINES: [u8; 4] = *b"\n \r\n";

/// Grain table entry of a zeroed grain.
pub const GTE_ZEROED: u32 = 1;
/// Entries in a hosted grain table: the only number the format allows.
pub const HOSTED_GTES: u32 = 512;
/// Entries in an ESXi host grain table.
pub const COWD_GTES: u32 = 4096;
/// Sectors of a hosted grain table.
pub const GT_SECTORS: u64 = HOSTED_GTES as u64 * 4 / SECTOR;
/// Sectors of a grain as written by everybody.
pub const GRAIN_SECTORS: u64 = 128;
/// The largest grain we read: 16 MiB. Bounds the buffers that a header can ask for.
pub const MAX_GRAIN_SECTORS: u64 = 1 << 15;
/// Sectors kept for the embedded descriptor.
pub const DESCRIPTOR_SECTORS: u64 = 20;
/// The longest descriptor we read.
pub const MAX_DESCRIPTOR: u64 = 1 << 20;
/// The most grain tables we map: 64 TiB of 64 KiB grains.
pub const MAX_TABLES: u64 = 1 << 21;
/// The most extents of one image.
pub const MAX_EXTENTS: usize = 1 << 15;

/// `SparseExtentHeader`: one sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseHeader {
    /// 0x04, u32: 1; 2 with zeroed grains; 3 stream-optimized.
    pub version: u32,
    /// 0x08, u32: `FLAG_*`.
    pub flags: u32,
    /// 0x0c, u64: capacity in sectors.
    pub capacity: u64,
    /// 0x14, u64: sectors in a grain.
    pub grain_sectors: u64,
    /// 0x1c, u64: first sector of the embedded descriptor, 0 for none.
    pub descriptor_at: u64,
    /// 0x24, u64: its length in sectors.
    pub descriptor_sectors: u64,
    /// 0x2c, u32: entries in a grain table.
    pub gtes: u32,
    /// 0x30, u64: first sector of the redundant grain directory.
    pub rgd_at: u64,
    /// 0x38, u64: first sector of the grain directory, or [`GD_AT_END`].
    pub gd_at: u64,
    /// 0x40, u64: sectors before the first grain.
    pub overhead: u64,
    /// 0x48, u8: not closed cleanly.
    pub unclean: bool,
    /// 0x4d, u16: 0 none, 1 deflate.
    pub compression: u16,
}

impl SparseHeader {
    /// Bytes of the header.
    pub const SIZE: usize = 512;

    /// Reads the fields; the magic has been checked. `None` if there are too few bytes.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let b = bytes.get(..79)?;
        Some(Self {
            version: LE::read_u32(&b[4..]),
            flags: LE::read_u32(&b[8..]),
            capacity: LE::read_u64(&b[12..]),
            grain_sectors: LE::read_u64(&b[20..]),
            descriptor_at: LE::read_u64(&b[28..]),
            descriptor_sectors: LE::read_u64(&b[36..]),
            gtes: LE::read_u32(&b[44..]),
            rgd_at: LE::read_u64(&b[48..]),
            gd_at: LE::read_u64(&b[56..]),
            overhead: LE::read_u64(&b[64..]),
            unclean: b[72] != 0,
            compression: LE::read_u16(&b[77..]),
        })
    }

    /// The sector.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut b = [0; Self::SIZE];
        b[..4].copy_from_slice(MAGIC);
        LE::write_u32(&mut b[4..], self.version);
        LE::write_u32(&mut b[8..], self.flags);
        LE::write_u64(&mut b[12..], self.capacity);
        LE::write_u64(&mut b[20..], self.grain_sectors);
        LE::write_u64(&mut b[28..], self.descriptor_at);
        LE::write_u64(&mut b[36..], self.descriptor_sectors);
        LE::write_u32(&mut b[44..], self.gtes);
        LE::write_u64(&mut b[48..], self.rgd_at);
        LE::write_u64(&mut b[56..], self.gd_at);
        LE::write_u64(&mut b[64..], self.overhead);
        b[72] = u8::from(self.unclean);
        b[73..77].copy_from_slice(&NEWLINES);
        LE::write_u16(&mut b[77..], self.compression);
        b
    }

    /// Whether grains are compressed: the algorithm says it, whatever the flag.
    pub fn compressed(&self) -> bool {
        self.compression == COMPRESSION_DEFLATE
    }
}

/// `COWDisk_Header`, the part that matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CowdHeader {
    /// 0x0c, u32: capacity in sectors.
    pub capacity: u32,
    /// 0x10, u32: sectors in a grain.
    pub grain_sectors: u32,
    /// 0x14, u32: first sector of the grain directory.
    pub gd_at: u32,
    /// 0x18, u32: entries of the grain directory.
    pub gd_entries: u32,
}

impl CowdHeader {
    /// Reads the fields; the magic has been checked.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let b = bytes.get(..32)?;
        Some(Self {
            capacity: LE::read_u32(&b[12..]),
            grain_sectors: LE::read_u32(&b[16..]),
            gd_at: LE::read_u32(&b[20..]),
            gd_entries: LE::read_u32(&b[24..]),
        })
    }
}

/// Bytes before the data of a compressed grain: u64 sector on the guest's disk, u32 length of the data.
pub const GRAIN_MARKER: usize = 12;

/// What a metadata marker announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// Nothing more.
    EndOfStream,
    /// A grain table.
    GrainTable,
    /// The grain directory.
    GrainDirectory,
    /// The footer: the header again, with the directory's place.
    Footer,
}

impl Marker {
    /// The sector: u64 number of sectors that follow, u32 zero, u32 type, padding.
    pub fn to_bytes(self, sectors: u64) -> [u8; 512] {
        let mut b = [0; 512];
        LE::write_u64(&mut b[..], sectors);
        LE::write_u32(
            &mut b[12..],
            match self {
                Marker::EndOfStream => 0,
                Marker::GrainTable => 1,
                Marker::GrainDirectory => 2,
                Marker::Footer => 3,
            },
        );
        b
    }
}

/// The marker of a compressed grain.
pub fn grain_marker(sector: u64, bytes: u32) -> [u8; GRAIN_MARKER] {
    let mut b = [0; GRAIN_MARKER];
    LE::write_u64(&mut b[..], sector);
    LE::write_u32(&mut b[8..], bytes);
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_its_bytes() {
        let header = SparseHeader {
            version: 3,
            flags: FLAG_NEWLINES | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity: 0x1234_5678_9abc,
            grain_sectors: 128,
            descriptor_at: 1,
            descriptor_sectors: 20,
            gtes: 512,
            rgd_at: 0x21,
            gd_at: GD_AT_END,
            overhead: 128,
            unclean: true,
            compression: COMPRESSION_DEFLATE,
        };
        let bytes = header.to_bytes();
        assert_eq!(&bytes[..4], b"KDMV");
        assert_eq!(bytes[72..79], [1, b'\n', b' ', b'\r', b'\n', 1, 0]);
        assert_eq!(SparseHeader::parse(&bytes), Some(header));
    }
}
