//! What goes over the wire (NetworkBlockDevice/nbd, doc/proto.md): structures, magic numbers, flags. All numbers are
//! big-endian.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The port assigned to the protocol ("Newstyle negotiation").
pub const PORT: u16 = 10809;

/// The first eight bytes of a server: `NBDMAGIC`.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: then it negotiates, and so begins every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Then it does not ("Oldstyle negotiation").
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// So begins every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// "Handshake flags".
pub const FIXED_NEWSTYLE: u16 = 1;
/// No 124 zeros after an export's flags.
pub const NO_ZEROES: u16 = 2;

/// "Oldstyle negotiation", and 124 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OldstyleExport {
    /// Bytes.
    pub size: U64,
    /// The lower half is the transmission flags.
    pub flags: U32,
}
const _: () = assert!(size_of::<OldstyleExport>() == 12);

/// What `NBD_OPT_EXPORT_NAME` is answered with, and what `NBD_INFO_EXPORT` says.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExportReply {
    /// Bytes.
    pub size: U64,
    /// Transmission flags.
    pub flags: U16,
}
const _: () = assert!(size_of::<ExportReply>() == 10);

/// Reserved bytes after an export, where [`NO_ZEROES`] was not agreed on.
pub const RESERVED: usize = 124;

/// An option's header; data follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// One of [`option`].
    pub option: U32,
    /// Of the data.
    pub len: U32,
}
const _: () = assert!(size_of::<OptionHeader>() == 16);

/// A reply to an option; data follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionReply {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// To which option.
    pub option: U32,
    /// One of [`reply`].
    pub kind: U32,
    /// Of the data.
    pub len: U32,
}
const _: () = assert!(size_of::<OptionReply>() == 20);

/// "Option types".
pub mod option {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// "Option reply types".
pub mod reply {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    /// Set in all that are errors.
    pub const ERROR: u32 = 1 << 31;
    pub const UNSUPPORTED: u32 = ERROR | 1;
    pub const POLICY: u32 = ERROR | 2;
    pub const INVALID: u32 = ERROR | 3;
    pub const PLATFORM: u32 = ERROR | 4;
    pub const TLS_REQUIRED: u32 = ERROR | 5;
    pub const UNKNOWN: u32 = ERROR | 6;
    pub const SHUTDOWN: u32 = ERROR | 7;
    pub const BLOCK_SIZE_REQUIRED: u32 = ERROR | 8;
    pub const TOO_BIG: u32 = ERROR | 9;
}

/// What an export tells of itself (`NBD_REP_INFO`).
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// `NBD_INFO_BLOCK_SIZE`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockSizes {
    /// What offsets and lengths are multiples of.
    pub minimum: U32,
    /// What is fastest.
    pub preferred: U32,
    /// The longest payload.
    pub maximum: U32,
}
const _: () = assert!(size_of::<BlockSizes>() == 12);

/// "Transmission flags".
pub mod flag {
    #![allow(missing_docs)]
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// "Request types".
pub mod command {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// "Command flags".
pub mod command_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    /// With extended headers: the length is that of a payload which follows.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// So begins a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// So begins one with an extended header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// So begins a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// So begins a chunk of a structured one.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// So begins one with an extended header.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// A request; what is written follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Request {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// Of [`command_flag`].
    pub flags: U16,
    /// One of [`command`].
    pub command: U16,
    /// Comes back in the reply.
    pub cookie: U64,
    /// Where.
    pub offset: U64,
    /// How long.
    pub len: U32,
}
const _: () = assert!(size_of::<Request>() == 28);

/// The same with an extended header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtendedRequest {
    /// [`EXTENDED_REQUEST_MAGIC`].
    pub magic: U32,
    /// Of [`command_flag`].
    pub flags: U16,
    /// One of [`command`].
    pub command: U16,
    /// Comes back in the reply.
    pub cookie: U64,
    /// Where.
    pub offset: U64,
    /// How long.
    pub len: U64,
}
const _: () = assert!(size_of::<ExtendedRequest>() == 32);

/// "Simple reply message", after its magic number; what was read follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// An error number of the protocol, or 0.
    pub error: U32,
    /// The request's.
    pub cookie: U64,
}
const _: () = assert!(size_of::<SimpleReply>() == 12);

/// "Structured reply chunk message", after its magic number; a payload follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkHeader {
    /// [`DONE`].
    pub flags: U16,
    /// One of [`chunk`].
    pub kind: U16,
    /// The request's.
    pub cookie: U64,
    /// Of the payload.
    pub len: U32,
}
const _: () = assert!(size_of::<ChunkHeader>() == 16);

/// "Extended reply chunk message", after its magic number.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtendedChunkHeader {
    /// [`DONE`].
    pub flags: U16,
    /// One of [`chunk`].
    pub kind: U16,
    /// The request's.
    pub cookie: U64,
    /// The request's.
    pub offset: U64,
    /// Of the payload.
    pub len: U64,
}
const _: () = assert!(size_of::<ExtendedChunkHeader>() == 28);

/// The last chunk of a reply ("Structured reply flags").
pub const DONE: u16 = 1;

/// "Structured reply types".
pub mod chunk {
    #![allow(missing_docs)]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in all that are errors.
    pub const ERROR: u16 = 1 << 15;
}

/// The payload of `NBD_REPLY_TYPE_OFFSET_HOLE`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Hole {
    /// Where.
    pub offset: U64,
    /// How long.
    pub len: U32,
}
const _: () = assert!(size_of::<Hole>() == 12);

/// Of an error's payload what a client must have: a message follows, and perhaps an offset.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ErrorPayload {
    /// An error number of the protocol.
    pub error: U32,
    /// Of the message.
    pub len: U16,
}
const _: () = assert!(size_of::<ErrorPayload>() == 6);

/// A run of `NBD_REPLY_TYPE_BLOCK_STATUS`, behind the number of the context.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Status {
    /// How long.
    pub len: U32,
    /// Of [`state`].
    pub flags: U32,
}
const _: () = assert!(size_of::<Status>() == 8);

/// The same of `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`, behind the numbers of the context and of the runs.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtendedStatus {
    /// How long.
    pub len: U64,
    /// Of [`state`].
    pub flags: U64,
}
const _: () = assert!(size_of::<ExtendedStatus>() == 16);

/// "Metadata contexts": what the context says of a run.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Flags of [`BASE_ALLOCATION`], and of a bitmap.
pub mod state {
    #![allow(missing_docs)]
    pub const HOLE: u64 = 1;
    pub const ZERO: u64 = 2;
    /// Of a bitmap, or of any other context of one bit.
    pub const MARKED: u64 = 1;
}

/// "Error values": the operating system's numbers where it is Linux.
pub mod error {
    #![allow(missing_docs)]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// The longest string ("Conventions").
pub const LONGEST_STRING: usize = 4096;
/// The longest payload where the server names none ("Block size constraints").
pub const DEFAULT_MAXIMUM: u32 = 32 << 20;
