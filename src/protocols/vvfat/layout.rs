//! A partition table and a FAT file system on disk, little endian, as Microsoft's *FAT32 File System Specification* 1.03
//! (`fatgen103`) has it; the numbers that it leaves open, and the one partition, are the reference's.

use std::mem::size_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// What the boot sectors end with.
pub const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// The disk's and the file system's number.
pub const SERIAL: u32 = 0xfabe_1afd;
/// Bytes of an entry of a folder.
pub const ENTRY_BYTES: usize = 32;

/// A place on a disk as the BIOS once counted: head, then sector and the upper bits of the cylinder, then the rest.
pub type Chs = [u8; 3];

/// The first sector of a partitioned disk.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PartitionTable {
    pub code: [u8; 440],
    pub serial: U32,
    pub zero: [u8; 2],
    pub partition: Partition,
    pub others: [u8; 48],
    pub signature: [u8; 2],
}

/// A partition.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Partition {
    /// 0x80: to be started from.
    pub active: u8,
    pub first: Chs,
    pub kind: u8,
    pub last: Chs,
    pub start: U32,
    pub sectors: U32,
}

/// The first sector of a file system, up to where the kinds differ.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Boot {
    pub jump: [u8; 3],
    pub system: [u8; 8],
    pub sector_bytes: U16,
    pub cluster_sectors: u8,
    pub reserved: U16,
    pub fats: u8,
    pub root_entries: U16,
    /// 0: [`Boot::sectors`] says it.
    pub few_sectors: U16,
    pub media: u8,
    /// 0 in FAT32.
    pub fat_sectors: U16,
    pub track_sectors: U16,
    pub heads: U16,
    pub hidden: U32,
    pub sectors: U32,
}

/// What follows in FAT12 and FAT16, and behind [`Boot32`].
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BootEnd {
    pub drive: u8,
    pub zero: u8,
    /// 0x29: what follows is there.
    pub mark: u8,
    pub serial: U32,
    pub label: [u8; 11],
    /// `FAT16   `.
    pub kind: [u8; 8],
}

/// What stands before it in FAT32.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Boot32 {
    pub fat_sectors: U32,
    pub flags: U16,
    pub version: U16,
    pub root: U32,
    /// Sector of [`FreeSpace`].
    pub free_space: U16,
    /// Sector of the copy of this one.
    pub copy: U16,
    pub zeros: [u8; 12],
}

/// FAT32: what is free.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FreeSpace {
    /// `RRaA`.
    pub mark: [u8; 4],
    pub zeros: [u8; 480],
    /// `rrAa`.
    pub second_mark: [u8; 4],
    pub free: U32,
    pub next: U32,
    pub more_zeros: [u8; 12],
    pub signature: [u8; 4],
}

/// A file or a folder.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Entry {
    pub name: [u8; 11],
    /// [`FOLDER`], [`FILE`] or [`LABEL`].
    pub kind: u8,
    pub zero: u8,
    pub made_hundredths: u8,
    pub made_time: U16,
    pub made_date: U16,
    pub read_date: U16,
    pub cluster_high: U16,
    pub time: U16,
    pub date: U16,
    pub cluster: U16,
    pub size: U32,
}

/// The kind of a folder.
pub const FOLDER: u8 = 0x10;
/// The kind of a file.
pub const FILE: u8 = 0x20;
/// The kind of the disk's label, as the reference marks it.
pub const LABEL: u8 = 0x28;

/// A part of a long name: 13 units of UTF-16, in an entry before the short one's.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LongEntry {
    /// Counted from 1; [`LAST_PART`] is set in the last, which comes first.
    pub part: u8,
    pub first: [U16; 5],
    /// 15.
    pub kind: u8,
    pub zero: u8,
    pub checksum: u8,
    pub second: [U16; 6],
    pub no_cluster: U16,
    pub third: [U16; 2],
}

/// Marks the last part of a long name.
pub const LAST_PART: u8 = 0x40;
/// The kind of a [`LongEntry`].
pub const LONG: u8 = 15;

const _: () = {
    assert!(size_of::<PartitionTable>() == 512);
    assert!(size_of::<Boot>() == 36);
    assert!(size_of::<Boot32>() == 28);
    assert!(size_of::<BootEnd>() == 26);
    assert!(size_of::<FreeSpace>() == 512);
    assert!(size_of::<Entry>() == ENTRY_BYTES);
    assert!(size_of::<LongEntry>() == ENTRY_BYTES);
};
