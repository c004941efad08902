//! VDI on disk, version 1.1, little endian, as VirtualBox's public documentation describes it.
//!
//! The header is one sector that is read, kept and written back whole, so fields that mean nothing to us
//! survive. Then come the block map (a `u32` for each block) and, from the data offset on, the blocks.

use byteorder::{ByteOrder, LittleEndian as Le};

use crate::block::{Error, Result};

/// Bytes of the header that are read and written at once.
pub const HEADER_BYTES: usize = 512;
/// The largest virtual size: that of a map with [`MAX_BLOCKS`] entries.
pub const MAX_SIZE: u64 = 0x0001_ffff_f800_0000;
/// The most entries a map may have.
pub const MAX_BLOCKS: u32 = 0x1fff_ff80;
/// The largest block that is read: the usual one is 1 MiB.
pub const MAX_BLOCK_SIZE: u32 = 64 << 20;
/// The block size that is written.
pub const BLOCK_SIZE: u32 = 1 << 20;
/// Where the map starts in a new image.
pub const MAP_OFFSET: u32 = 0x200;
/// Entry of a block that was never written: reads as zeros.
pub const UNALLOCATED: u32 = 0xffff_ffff;
/// Entry of a block that was given back: reads as zeros.
pub const DISCARDED: u32 = 0xffff_fffe;
/// Signature, at [`SIGNATURE_AT`].
pub const SIGNATURE: u32 = 0xbeda_107f;
/// Offset 0x40, 4 bytes.
pub const SIGNATURE_AT: usize = 0x40;

const TEXT: &[u8] = b"<<< QEMU VM Virtual Disk Image >>>\n"; // 0x000, 64 bytes
const VERSION: usize = 0x44; // 4 bytes: major << 16 | minor
const HEADER_SIZE: usize = 0x48; // 4 bytes: of the fields from here to the end
const KIND: usize = 0x4c; // 4 bytes: 1 dynamic, 2 static, 3 undo, 4 differencing
const MAP_OFF: usize = 0x154; // 4 bytes
const DATA_OFF: usize = 0x158; // 4 bytes
const SECTOR_SIZE: usize = 0x168; // 4 bytes
const DISK_SIZE: usize = 0x170; // 8 bytes
const BLOCK: usize = 0x178; // 4 bytes
const EXTRA: usize = 0x17c; // 4 bytes: kept before each block's data
const BLOCKS: usize = 0x180; // 4 bytes: entries of the map
const ALLOCATED: usize = 0x184; // 4 bytes: blocks in the file
const UUID_IMAGE: usize = 0x188; // 16 bytes
const UUID_SNAPSHOT: usize = 0x198; // 16 bytes
const UUID_LINK: usize = 0x1a8; // 16 bytes: zero unless differencing
const UUID_PARENT: usize = 0x1b8; // 16 bytes: zero unless differencing

const VERSION_1_1: u32 = 0x0001_0001;
/// Image type: blocks are added as they are written.
pub const DYNAMIC: u32 = 1;
/// Image type: all blocks are there.
pub const STATIC: u32 = 2;

/// The header sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    raw: [u8; HEADER_BYTES],
}

macro_rules! word {
    ($(#[$doc:meta])* $get:ident, $set:ident, $at:ident) => {
        $(#[$doc])*
        pub fn $get(&self) -> u32 {
            Le::read_u32(&self.raw[$at..])
        }

        $(#[$doc])*
        pub fn $set(&mut self, value: u32) {
            Le::write_u32(&mut self.raw[$at..], value);
        }
    };
}

impl Header {
    /// That of a new image, whose block size is 1 MiB.
    pub fn new(size: u64, fixed: bool, blocks: u32, image: [u8; 16], snapshot: [u8; 16]) -> Self {
        let mut header = Self { raw: [0; HEADER_BYTES] };
        header.raw[..TEXT.len()].copy_from_slice(TEXT);
        Le::write_u32(&mut header.raw[SIGNATURE_AT..], SIGNATURE);
        Le::write_u32(&mut header.raw[VERSION..], VERSION_1_1);
        Le::write_u32(&mut header.raw[HEADER_SIZE..], 0x180);
        Le::write_u32(&mut header.raw[KIND..], if fixed { STATIC } else { DYNAMIC });
        header.set_map_offset(MAP_OFFSET);
        header.set_data_offset(MAP_OFFSET + (blocks * 4).next_multiple_of(512));
        Le::write_u32(&mut header.raw[SECTOR_SIZE..], 512);
        header.set_size(size);
        Le::write_u32(&mut header.raw[BLOCK..], BLOCK_SIZE);
        header.set_blocks(blocks);
        header.set_allocated(if fixed { blocks } else { 0 });
        header.raw[UUID_IMAGE..UUID_IMAGE + 16].copy_from_slice(&image);
        header.raw[UUID_SNAPSHOT..UUID_SNAPSHOT + 16].copy_from_slice(&snapshot);
        header
    }

    /// Takes the sector in after having checked everything but the map.
    pub fn parse(raw: [u8; HEADER_BYTES]) -> Result<Self> {
        let header = Self { raw };
        let word = |at: usize| Le::read_u32(&header.raw[at..]);
        let refuse = |what: String| Err(Error::unsupported(format!("unsupported VDI image ({what})")));
        if header.size() > MAX_SIZE {
            return Err(too_large(header.size()));
        }
        let signature = word(SIGNATURE_AT);
        if signature != SIGNATURE {
            return Err(Error::corrupt(format!("Image not in VDI format (bad signature {signature:08x})")));
        }
        let version = word(VERSION);
        if version != VERSION_1_1 {
            return refuse(format!("version {}.{}", version >> 16, version & 0xffff));
        }
        if !header.map_offset().is_multiple_of(512) {
            return refuse(format!("unaligned block map offset {:#x}", header.map_offset()));
        }
        if !header.data_offset().is_multiple_of(512) {
            return refuse(format!("unaligned data offset {:#x}", header.data_offset()));
        }
        if word(SECTOR_SIZE) != 512 {
            return refuse(format!("sector size {} is not 512", word(SECTOR_SIZE)));
        }
        let block = header.block_size();
        if !block.is_power_of_two() || !(512..=MAX_BLOCK_SIZE).contains(&block) {
            return refuse(format!("block size {block} is not {BLOCK_SIZE}"));
        }
        let room = u64::from(header.blocks()) * u64::from(block);
        let size = header.size().next_multiple_of(512);
        if size > room {
            return refuse(format!("disk size {size}, image bitmap has room for {room}"));
        }
        if header.raw[UUID_LINK..UUID_LINK + 16] != [0; 16] {
            return refuse("non-NULL link UUID".to_owned());
        }
        if header.raw[UUID_PARENT..UUID_PARENT + 16] != [0; 16] {
            return refuse("non-NULL parent UUID".to_owned());
        }
        if header.blocks() > MAX_BLOCKS {
            return refuse(format!("too many blocks {}, max is {MAX_BLOCKS}", header.blocks()));
        }
        // A hole of such an image means "ask the parent", which is not known.
        match header.kind() {
            3 => return refuse("undo image".to_owned()),
            4 => return refuse("differencing image".to_owned()),
            _ => {}
        }
        if word(EXTRA) != 0 {
            return refuse(format!("{} extra bytes before each block", word(EXTRA)));
        }
        Ok(header)
    }

    /// The sector as it is written.
    pub fn bytes(&self) -> &[u8; HEADER_BYTES] {
        &self.raw
    }

    /// The virtual size as it stands there.
    pub fn size(&self) -> u64 {
        Le::read_u64(&self.raw[DISK_SIZE..])
    }

    /// Sets the virtual size.
    pub fn set_size(&mut self, size: u64) {
        Le::write_u64(&mut self.raw[DISK_SIZE..], size);
    }

    /// The image type.
    pub fn kind(&self) -> u32 {
        Le::read_u32(&self.raw[KIND..])
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u32 {
        Le::read_u32(&self.raw[BLOCK..])
    }

    word!(
        /// Where the map is in the file.
        map_offset, set_map_offset, MAP_OFF
    );
    word!(
        /// Where block 0 is in the file.
        data_offset, set_data_offset, DATA_OFF
    );
    word!(
        /// Entries of the map.
        blocks, set_blocks, BLOCKS
    );
    word!(
        /// Blocks in the file. QEMU takes it for the index of the next new block.
        allocated, set_allocated, ALLOCATED
    );
}

/// The error for a virtual size past what the map can hold.
pub fn too_large(size: u64) -> Error {
    Error::unsupported(format!("Unsupported VDI image size (size is {size:#x}, max supported is {MAX_SIZE:#x})"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn fields_do_not_overlap() {
        let fields = [
            (0, 64),
            (SIGNATURE_AT, 4),
            (VERSION, 4),
            (HEADER_SIZE, 4),
            (KIND, 4),
            (0x50, 4),
            (0x54, 256),
            (MAP_OFF, 4),
            (DATA_OFF, 4),
            (0x15c, 12),
            (SECTOR_SIZE, 4),
            (0x16c, 4),
            (DISK_SIZE, 8),
            (BLOCK, 4),
            (EXTRA, 4),
            (BLOCKS, 4),
            (ALLOCATED, 4),
            (UUID_IMAGE, 16),
            (UUID_SNAPSHOT, 16),
            (UUID_LINK, 16),
            (UUID_PARENT, 16),
        ];
        let mut end = 0;
        for (at, len) in fields {
            assert_eq!(at, end);
            end = at + len;
        }
        assert_eq!(end, 0x48 + 0x180);
        assert_eq!(u64::from(MAX_BLOCKS) * u64::from(BLOCK_SIZE), MAX_SIZE);
    }

    #[test]
    fn what_is_written_is_read() {
        let header = Header::new(5 << 20, true, 5, [1; 16], [2; 16]);
        let read = Header::parse(*header.bytes()).unwrap();
        assert_eq!((read.size(), read.kind(), read.blocks(), read.allocated()), (5 << 20, STATIC, 5, 5));
        assert_eq!((read.map_offset(), read.data_offset()), (0x200, 0x400));
    }
}
