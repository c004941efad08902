//! VDI on disk, version 1.1, little endian, as VirtualBox's public documentation describes it.
//!
//! The header is one sector that is read, kept and written back whole, so fields that mean nothing to us
//! survive. Then come the block map (a `u32` for each block) and, from the data offset on, the blocks.

use std::mem::{offset_of, size_of};
use std::ops::Add;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{Error, Result};

/// What errors call the header.
pub const HEADER: &str = "the VDI header";
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
/// Entry of a block that was never written, as it is stored.
pub const UNALLOCATED: u32 = 0xffff_ffff;
/// Entry of a block that was given back.
const DISCARDED: u32 = 0xffff_fffe;
/// Signature, at [`SIGNATURE_AT`].
pub const SIGNATURE: u32 = 0xbeda_107f;
/// Offset 0x40, 4 bytes.
pub const SIGNATURE_AT: usize = 0x40;

/// Offset of the counter of blocks, a `u32`.
pub const ALLOCATED_AT: usize = offset_of!(Sector, allocated);

const TEXT: &[u8] = b"<<< QEMU VM Virtual Disk Image >>>\n";

/// A block of the file: so many blocks behind the data offset. Guest blocks have indices of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostBlock(pub u64);

impl Add<u64> for HostBlock {
    type Output = Self;

    fn add(self, n: u64) -> Self {
        Self(self.0.saturating_add(n))
    }
}

/// What an entry of the map says of a guest block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapEntry {
    /// Never written: zeros, or the parent's.
    Unallocated,
    /// Given back: zeros.
    Discarded,
    /// It lies in that block of the file.
    At(HostBlock),
}

impl MapEntry {
    /// What a stored entry says.
    pub fn parse(stored: u32) -> Self {
        match stored {
            UNALLOCATED => Self::Unallocated,
            DISCARDED => Self::Discarded,
            index => Self::At(HostBlock(index.into())),
        }
    }

    /// As it is stored.
    pub fn stored(self) -> Result<u32> {
        match self {
            Self::Unallocated => Ok(UNALLOCATED),
            Self::Discarded => Ok(DISCARDED),
            Self::At(HostBlock(index)) => u32::try_from(index)
                .ok()
                .filter(|index| *index < DISCARDED)
                .ok_or_else(|| Error::corrupt("block index too large")),
        }
    }
}

/// The header's sector.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Sector {
    text: [u8; 64],
    signature: U32,
    /// Major in the high half, minor in the low one.
    version: U32,
    /// Bytes of the fields from here to the parent's UUID.
    header_size: U32,
    /// 1 dynamic, 2 static, 3 undo, 4 differencing.
    kind: U32,
    flags: U32,
    comment: [u8; 256],
    map_offset: U32,
    data_offset: U32,
    cylinders: U32,
    heads: U32,
    sectors: U32,
    sector_size: U32,
    unused: U32,
    disk_size: U64,
    block_size: U32,
    /// Bytes kept before each block's data.
    extra: U32,
    /// Entries of the map.
    blocks: U32,
    /// Blocks in the file.
    allocated: U32,
    image: [u8; 16],
    snapshot: [u8; 16],
    /// Zero unless differencing.
    link: [u8; 16],
    /// Zero unless differencing.
    parent: [u8; 16],
    rest: [u8; 56],
}

const _: () = {
    assert!(size_of::<Sector>() == HEADER_BYTES);
    assert!(offset_of!(Sector, signature) == SIGNATURE_AT);
    assert!(offset_of!(Sector, map_offset) == 0x154);
    assert!(offset_of!(Sector, sector_size) == 0x168);
    assert!(offset_of!(Sector, disk_size) == 0x170);
    assert!(ALLOCATED_AT == 0x184);
    assert!(offset_of!(Sector, rest) == 0x48 + 0x180);
    assert!(MAX_BLOCKS as u64 * BLOCK_SIZE as u64 == MAX_SIZE);
};

/// What the data of a new image starts at a multiple of: the sector.
pub const SECTOR_START: u32 = 512;
/// The same where files can share bytes on the disk: in blocks of the file system.
pub const SHARED_START: u32 = 4096;

const VERSION_1_1: u32 = 0x0001_0001;
/// Image type: blocks are added as they are written.
pub const DYNAMIC: u32 = 1;
/// Image type: all blocks are there.
pub const STATIC: u32 = 2;
/// Image type: what was never written is the parent's.
pub const DIFFERENCING: u32 = 4;

/// The header sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdiHeader {
    raw: Sector,
}

impl VdiHeader {
    /// That of a new image, whose block size is 1 MiB, and whose data starts at a multiple of `start`.
    pub fn new(size: u64, fixed: bool, blocks: u32, start: u32, image: [u8; 16], snapshot: [u8; 16]) -> Self {
        let mut raw = Sector::new_zeroed();
        raw.text[..TEXT.len()].copy_from_slice(TEXT);
        raw.signature = SIGNATURE.into();
        raw.version = VERSION_1_1.into();
        raw.header_size = 0x180.into();
        raw.kind = if fixed { STATIC } else { DYNAMIC }.into();
        raw.map_offset = MAP_OFFSET.into();
        raw.data_offset = (MAP_OFFSET + blocks * 4).next_multiple_of(start).into();
        raw.sector_size = 512.into();
        raw.disk_size = size.into();
        raw.block_size = BLOCK_SIZE.into();
        raw.blocks = blocks.into();
        raw.allocated = if fixed { blocks } else { 0 }.into();
        (raw.image, raw.snapshot) = (image, snapshot);
        Self { raw }
    }

    /// Takes the sector in after having checked everything but the map.
    pub fn parse(raw: [u8; HEADER_BYTES]) -> Result<Self> {
        let header = Self { raw: zerocopy::transmute!(raw) };
        let fields = &header.raw;
        let refuse = |field: usize, what: String| {
            Err(Error::unsupported(format!("unsupported VDI image ({what})")).in_field(field))
        };
        if header.size() > MAX_SIZE {
            return Err(too_large(header.size()).in_field(offset_of!(Sector, disk_size)));
        }
        let signature = fields.signature.get();
        if signature != SIGNATURE {
            let error = Error::corrupt(format!("Image not in VDI format (bad signature {signature:08x})"));
            return Err(error.in_field(SIGNATURE_AT));
        }
        let version = fields.version.get();
        if version != VERSION_1_1 {
            return refuse(offset_of!(Sector, version), format!("version {}.{}", version >> 16, version & 0xffff));
        }
        if !header.map_offset().is_multiple_of(512) {
            return refuse(
                offset_of!(Sector, map_offset),
                format!("unaligned block map offset {:#x}", header.map_offset()),
            );
        }
        if !header.data_offset().is_multiple_of(512) {
            return refuse(
                offset_of!(Sector, data_offset),
                format!("unaligned data offset {:#x}", header.data_offset()),
            );
        }
        if fields.sector_size.get() != 512 {
            return refuse(
                offset_of!(Sector, sector_size),
                format!("sector size {} is not 512", fields.sector_size.get()),
            );
        }
        let block = header.block_size();
        if !block.is_power_of_two() || !(512..=MAX_BLOCK_SIZE).contains(&block) {
            return refuse(offset_of!(Sector, block_size), format!("block size {block} is not {BLOCK_SIZE}"));
        }
        let room = u64::from(header.blocks()) * u64::from(block);
        let size = header.size().next_multiple_of(512);
        if size > room {
            return refuse(
                offset_of!(Sector, disk_size),
                format!("disk size {size}, image bitmap has room for {room}"),
            );
        }
        let differencing = header.kind() == DIFFERENCING;
        if fields.link != [0; 16] && !differencing {
            return refuse(offset_of!(Sector, link), "non-NULL link UUID".to_owned());
        }
        if fields.parent != [0; 16] && !differencing {
            return refuse(offset_of!(Sector, parent), "non-NULL parent UUID".to_owned());
        }
        if header.blocks() > MAX_BLOCKS {
            return refuse(
                offset_of!(Sector, blocks),
                format!("too many blocks {}, max is {MAX_BLOCKS}", header.blocks()),
            );
        }
        // A hole of such an image means "ask the parent", which has to be known.
        match header.kind() {
            3 => return refuse(offset_of!(Sector, kind), "undo image".to_owned()),
            DIFFERENCING if header.link().is_none() => {
                return refuse(offset_of!(Sector, link), "differencing image".to_owned());
            }
            _ => {}
        }
        if fields.extra.get() != 0 {
            return refuse(offset_of!(Sector, extra), format!("{} extra bytes before each block", fields.extra.get()));
        }
        Ok(header)
    }

    /// The sector as it is written.
    pub fn bytes(&self) -> &[u8; HEADER_BYTES] {
        zerocopy::transmute_ref!(&self.raw)
    }

    /// The virtual size as it stands there.
    pub fn size(&self) -> u64 {
        self.raw.disk_size.get()
    }

    /// Sets the virtual size.
    pub fn set_size(&mut self, size: u64) {
        self.raw.disk_size = size.into();
    }

    /// The image type.
    pub fn kind(&self) -> u32 {
        self.raw.kind.get()
    }

    /// The image's UUID, as the number that its text spells.
    pub fn image(&self) -> u128 {
        number_of(self.raw.image)
    }

    /// That of the parent of a differencing image.
    pub fn link(&self) -> Option<u128> {
        (self.raw.link != [0; 16]).then(|| number_of(self.raw.link))
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u32 {
        self.raw.block_size.get()
    }

    /// Where the map is in the file.
    pub fn map_offset(&self) -> u32 {
        self.raw.map_offset.get()
    }

    /// Sets where the map is.
    pub fn set_map_offset(&mut self, value: u32) {
        self.raw.map_offset = value.into();
    }

    /// Where block 0 is in the file.
    pub fn data_offset(&self) -> u32 {
        self.raw.data_offset.get()
    }

    /// Sets where block 0 is.
    pub fn set_data_offset(&mut self, value: u32) {
        self.raw.data_offset = value.into();
    }

    /// Entries of the map.
    pub fn blocks(&self) -> u32 {
        self.raw.blocks.get()
    }

    /// Sets how many entries the map has.
    pub fn set_blocks(&mut self, value: u32) {
        self.raw.blocks = value.into();
    }

    /// Blocks in the file. QEMU takes it for the index of the next new block.
    pub fn allocated(&self) -> u32 {
        self.raw.allocated.get()
    }

    /// Sets how many blocks are in the file.
    pub fn set_allocated(&mut self, value: u32) {
        self.raw.allocated = value.into();
    }
}

/// A UUID in the order of RFC 9562 as it lies on the disk, or the other way round: its first three fields have their
/// lowest byte first there.
pub fn on_disk(mut uuid: [u8; 16]) -> [u8; 16] {
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    uuid
}

/// A UUID's number. Its first three fields are stored little-endian.
fn number_of(uuid: [u8; 16]) -> u128 {
    u128::from_be_bytes(on_disk(uuid))
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
    fn what_is_written_is_read() {
        let header = VdiHeader::new(5 << 20, true, 5, SHARED_START, [1; 16], [2; 16]);
        let read = VdiHeader::parse(*header.bytes()).unwrap();
        assert_eq!((read.size(), read.kind(), read.blocks(), read.allocated()), (5 << 20, STATIC, 5, 5));
        assert_eq!((read.map_offset(), read.data_offset()), (0x200, 0x1000));
    }
}
