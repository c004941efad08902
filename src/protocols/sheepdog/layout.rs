//! What goes over the wire, and how a disk is described (the Sheepdog project: include/sheepdog_proto.h, versions 0.5 to
//! 1.0, and its wiki, "Sheepdog Design"): structures, numbers, object ids. All numbers are little-endian.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `SD_LISTEN_PORT`.
pub const PORT: u16 = 7000;

/// The protocol's version of a request. From version 2 on replies to reads may leave out zeros; those to version 1 are
/// whole, and every server knows it.
pub const VERSION: u8 = 1;

/// What is asked for.
pub mod opcode {
    #![allow(missing_docs)]
    pub const CREATE_AND_WRITE_OBJECT: u8 = 0x01;
    pub const READ_OBJECT: u8 = 0x02;
    pub const WRITE_OBJECT: u8 = 0x03;
    pub const NEW_VDI: u8 = 0x11;
    pub const LOCK_VDI: u8 = 0x12;
    pub const RELEASE_VDI: u8 = 0x13;
    pub const GET_VDI_INFO: u8 = 0x14;
    pub const DELETE_VDI: u8 = 0x17;
}

/// Flags of a request.
pub mod flag {
    /// Data follows it; otherwise data of that length follows the reply.
    pub const WRITE: u16 = 1;
    /// What a new object is not given it has of another one.
    pub const COPY_ON_WRITE: u16 = 2;
}

/// A request about an object; data may follow.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ObjectRequest {
    /// What all requests begin with.
    pub head: Head,
    /// Which.
    pub object: U64,
    /// With [`flag::COPY_ON_WRITE`]: the one that it is made from.
    pub from: U64,
    /// Of a new one: how many there are to be, or of which it is put together; 0 for what the disk's others have.
    pub copies: u8,
    /// The way in which it is put together from parts, if it is.
    pub copy_policy: u8,
    /// Part of which, and something unused; then an epoch that servers use among themselves.
    pub internal: [u8; 6],
    /// In the object.
    pub offset: U64,
}
const _: () = assert!(size_of::<ObjectRequest>() == LEN);

/// A request about a disk (a VDI); its name, or its name and tag, may follow.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DiskRequest {
    /// What all requests begin with.
    pub head: Head,
    /// Of a new one.
    pub size: U64,
    /// The snapshot that a new one begins with; the disk that is released.
    pub disk: U32,
    /// Of the objects of a new one; 0 for what is usual in the cluster.
    pub copies: u8,
    /// Likewise.
    pub copy_policy: u8,
    /// How its objects are listed.
    pub store_policy: u8,
    /// The size of its objects, as a power of two; 0 for what is usual.
    pub object_bits: u8,
    /// The snapshot that is asked for; 0 for the disk as it is now, or for one that is named by a tag.
    pub snapshot: U32,
    /// Whether others may have the lock too.
    pub lock: U32,
    /// To the length of all requests.
    pub unused: U64,
}
const _: () = assert!(size_of::<DiskRequest>() == LEN);

/// Of a request, and of a reply.
const LEN: usize = 48;

/// What all requests and replies begin with.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Head {
    /// [`VERSION`].
    pub version: u8,
    /// One of [`opcode`].
    pub opcode: u8,
    /// Of [`flag`].
    pub flags: U16,
    /// Which servers there are: for them alone.
    pub epoch: U32,
    /// Comes back in the reply.
    pub id: U32,
    /// Of the data.
    pub len: U32,
}
const _: () = assert!(size_of::<Head>() == 16);

/// A reply; data may follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Reply {
    /// What all replies begin with.
    pub head: Head,
    /// One of [`result`](self::result).
    pub result: U32,
    /// Of objects.
    pub reserved: U32,
    /// Which disk is meant, or was made.
    pub disk: U32,
    /// To the length of all replies: more that is not asked for.
    pub more: [u8; 20],
}
const _: () = assert!(size_of::<Reply>() == LEN);

/// Bytes of a name, and of a tag, with the zeros that end them and fill them up.
pub const NAME: usize = 256;

/// The object that describes a disk, as far as its table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Inode {
    /// The disk's. Empty if it is deleted.
    pub name: [u8; NAME],
    /// The snapshot's.
    pub tag: [u8; NAME],
    /// When it was made.
    pub created: U64,
    /// When it became a snapshot; 0 if it is none.
    pub became_snapshot: U64,
    /// The guest's clock then.
    pub guest_clock: U64,
    /// Bytes of the disk.
    pub size: U64,
    /// Bytes of the state of a guest.
    pub state_size: U64,
    /// For [`ObjectRequest::copy_policy`].
    pub copy_policy: u8,
    /// How objects are listed: 0 if in the table that follows.
    pub store_policy: u8,
    /// For [`ObjectRequest::copies`].
    pub copies: u8,
    /// The size of an object, as a power of two.
    pub object_bits: u8,
    /// The snapshot's number.
    pub snapshot: U32,
    /// Its own id.
    pub disk: U32,
    /// Of the snapshot that it began with.
    pub parent: U32,
    /// Older servers: the disks that began with it. Newer ones: something of their own.
    pub children: [U32; 1024],
}
const _: () = assert!(size_of::<Inode>() == 4664);

/// Where in that object the size is.
pub const SIZE_AT: u64 = std::mem::offset_of!(Inode, size) as u64;
const _: () = assert!(SIZE_AT == 536);

/// Where in it the table begins: for each of the disk's objects the id of the disk that it belongs to, or 0 if there is
/// none, and zeros are read.
pub const TABLE_AT: u64 = size_of::<Inode>() as u64;

/// The most objects of that table.
pub const MOST_OBJECTS: u64 = 1 << 20;

/// The most bits of a disk's id.
pub const DISK_BITS: u32 = 24;

/// Powers of two that objects can have as their size. 22 is usual.
pub const OBJECT_BITS: std::ops::RangeInclusive<u8> = 12..=31;

/// The id of the object that describes a disk.
pub fn inode(disk: u32) -> u64 {
    1 << 63 | u64::from(disk) << 32
}

/// The id of an object with data.
pub fn data(disk: u32, index: u32) -> u64 {
    u64::from(disk) << 32 | u64::from(index)
}

/// What a request comes to.
pub mod result {
    #![allow(missing_docs)]
    use nix::errno::Errno;

    pub const SUCCESS: u32 = 0x00;

    /// What it means, and the error number that fits.
    pub fn meaning(result: u32) -> (&'static str, Errno) {
        match result {
            0x02 => ("there is no such object", Errno::ENOENT),
            0x03 => ("an object could not be read or written", Errno::EIO),
            0x04 => ("a VDI of that name exists already", Errno::EEXIST),
            0x05 => ("the server does not take such a request", Errno::EINVAL),
            0x06 => ("the server's system has failed", Errno::EIO),
            0x07 => ("the VDI is locked: another client writes to it", Errno::EBUSY),
            0x08 => ("there is no such VDI", Errno::ENOENT),
            0x09 => ("there is no such VDI to begin with", Errno::ENOENT),
            0x0a => ("the VDI cannot be read", Errno::EIO),
            0x0b => ("the VDI cannot be written", Errno::EIO),
            0x0c => ("the VDI to begin with cannot be read", Errno::EIO),
            0x0d => ("the VDI to begin with cannot be written", Errno::EIO),
            0x0e => ("there is no such snapshot of the VDI", Errno::ENOENT),
            0x0f => ("the server is starting", Errno::EAGAIN),
            0x10 => ("the VDI is not locked", Errno::EINVAL),
            0x11 => ("the server is shutting down", Errno::ESHUTDOWN),
            0x12 => ("the server has no memory left", Errno::ENOMEM),
            0x13 => ("there are as many VDIs as there can be", Errno::ENOSPC),
            0x14 => ("the server speaks another version of the protocol", Errno::EPROTO),
            0x15 => ("the cluster has no room left", Errno::ENOSPC),
            0x16 => ("the cluster is not formatted yet", Errno::EAGAIN),
            0x17 => ("the cluster waits for other nodes to join", Errno::EAGAIN),
            0x18 => ("the server could not join the cluster", Errno::EIO),
            0x19 => ("the cluster has stopped", Errno::EIO),
            0x1a => ("the object is read-only: a snapshot was taken meanwhile", Errno::EROFS),
            0x1d => ("the VDI was changed meanwhile", Errno::ESTALE),
            _ => ("the server has failed", Errno::EIO),
        }
    }
}
