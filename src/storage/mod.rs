//! Bytes on the host, by position: regular files, block devices, memory.
//!
//! Everything above this stratum sees a [`Storage`]: no cursor, every method takes `&self`, so any number of
//! threads may read and write disjoint ranges at once. What a file system can or cannot do (punch holes,
//! reserve space, tell holes from data) is decided here and nowhere else.
//!
//! Invariants: reading past the end gives zeros; a method either does what its contract says or returns an
//! error, and "the file system cannot do it this way" is never an error when another way exists.

pub mod arranged;
pub mod confine;
pub mod direct;
pub mod error;
pub mod event;
pub mod fault;
pub mod file;
mod file_io;
pub mod holder;
pub mod host;
pub mod host_part;
pub mod in_order;
pub mod keyring;
mod kind;
pub mod lock;
pub mod memory;
pub mod offload;
pub mod outgoing;
pub mod paged;
pub mod pages;
pub mod pieces;
pub mod pipe;
pub mod reserve;
pub mod room;
pub mod sparse;
pub mod staging;
pub mod temporary;
pub mod trailing;
mod words;
pub mod writeback;
pub mod zeros;

use std::fmt;

pub use error::{Error, Result};
pub use event::Event;
pub use file::HostFile;
pub use kind::FileKind;

/// What is known of a run of bytes without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostKind {
    /// Anything.
    Data,
    /// Reads as zeros, and its space is kept.
    Zero,
    /// Reads as zeros, and takes no space.
    Hole,
    /// Anything, of which whoever keeps its map says that a layer below has it.
    Absent,
}

/// A run of bytes of the same kind, starting where it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostExtent {
    /// Length in bytes; at least 1 unless nothing was asked for.
    pub len: u64,
    /// What it is.
    pub kind: HostKind,
}

impl HostExtent {
    /// A run of data.
    pub fn data(len: u64) -> Self {
        Self { len, kind: HostKind::Data }
    }

    /// A hole.
    pub fn hole(len: u64) -> Self {
        Self { len, kind: HostKind::Hole }
    }

    /// Whether it need not be read to know that it reads as zeros.
    pub fn is_zero(&self) -> bool {
        matches!(self.kind, HostKind::Zero | HostKind::Hole)
    }
}

/// How a range is made to read as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// Give the space back to the host where it can be.
    Punch,
    /// Keep, or make, the space allocated.
    Allocate,
    /// Write zeros, byte by byte.
    Write,
}

/// What is done to the space of a file, or of an image, when it is made or grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing: the new range is a hole.
    #[default]
    Off,
    /// The format's tables are allocated, its data stays sparse. Means nothing to a plain file.
    Metadata,
    /// The space is reserved with `fallocate(2)`.
    Falloc,
    /// Zeros are written.
    Full,
}

impl Preallocation {
    /// Every mode, in the order of the type.
    pub const ALL: [Preallocation; 4] = [Self::Off, Self::Metadata, Self::Falloc, Self::Full];

    /// Their words on the command line, in that order.
    pub const NAMES: [&'static str; 4] = ["off", "metadata", "falloc", "full"];

    /// The word on the command line.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// The mode with that word, if there is one.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == word)
    }
}

/// The same file under two names has the same identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// What suits a storage, and what may be relied on. They do not change while it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Its length is its own (a device): [`Storage::set_len`] does not change it.
    pub fixed_len: bool,
    /// What whoever wants to give it another length is told, where it is no file of the host and can be asked for that.
    pub resize_refusal: Option<&'static str>,
    /// What it gains by growing reads as zeros; a new one reads as zeros. False for a device, which holds whatever
    /// was there before.
    pub new_reads_zero: bool,
    /// What offsets, lengths and buffers should be multiples of, to be fast, in bytes: 1, or the unit of `O_DIRECT`.
    /// Any will do.
    pub alignment: u32,
    /// Bytes at a time that suit it best; `None` where it does not matter.
    pub best_request: Option<u32>,
    /// Requests in flight at once that suit it; `None` where one a processor is best (a warm page cache). It may turn out
    /// later that more do.
    pub parallel: Option<u32>,
    /// Which file it is; `None` for what is no file of the host.
    pub identity: Option<Identity>,
    /// The kernel may copy from it and to it: nothing needs to see the bytes pass. If it has a [`Storage::host`], the same
    /// bytes are there, at the same offsets.
    pub offload: bool,
    /// Its offsets mean something to who has no more than its name. False for bytes that are put together here.
    pub addressed: bool,
    /// Where what is written lies in the files below is decided by who comes first: writes in another order leave other
    /// bytes there.
    pub ordered: bool,
    /// It is asked for run by run, each of which costs a while before it comes: long ones are better, and it wants to know
    /// of them before ([`Event::Reads`]).
    pub by_run: bool,
}

impl Facts {
    /// What holds of bytes that grow, with no wishes.
    pub const PLAIN: Facts = Facts {
        fixed_len: false,
        resize_refusal: None,
        new_reads_zero: true,
        alignment: 1,
        best_request: None,
        parallel: None,
        identity: None,
        offload: false,
        addressed: true,
        ordered: false,
        by_run: false,
    };
}

/// Bytes on the host, by position.
///
/// No method has a default: a storage before another one (a filter, a guard) says for each what becomes of it.
#[allow(clippy::len_without_is_empty)]
pub trait Storage: Send + Sync + fmt::Debug {
    /// Length in bytes.
    fn len(&self) -> Result<u64>;

    /// Fills `buf` from `at`; what lies past the end reads as zeros.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes all of `buf` at `at`, growing a regular file where needed.
    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()>;

    /// The run that starts at `at`, at most `max` bytes long. Past the end everything is a hole.
    fn extent(&self, at: u64, max: u64) -> Result<HostExtent>;

    /// Makes `len` bytes from `at` read as zeros, growing a regular file where needed.
    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()>;

    /// Gives the space of a range back if that is cheap. What it reads as afterwards is not defined.
    fn discard(&self, at: u64, len: u64) -> Result<()>;

    /// Sets the length. A longer file reads as zeros in its new part, whose space is treated as `fill` says.
    ///
    /// On a device: fine while it does not ask for more than there is.
    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()>;

    /// Returns once everything written is on stable storage.
    fn flush(&self) -> Result<()>;

    /// Bytes that the host has allocated for it; `None` where the host does not tell.
    fn allocated(&self) -> Result<Option<u64>>;

    /// What suits it.
    fn facts(&self) -> Facts;

    /// The file of the host that the bytes are in, where there is one: for locks and hints. Bytes are moved past a
    /// storage only where [`Facts::offload`] allows it.
    fn host(&self) -> Option<&HostFile>;

    /// Says what its user is about to do, for filters that act on it. What is no filter does nothing.
    fn announce(&self, event: Event);
}

/// Changes the permissions that are held on a storage, if it is a file of the host; on failure those it has stay.
pub fn lock(storage: &dyn Storage, access: lock::Access) -> Result<()> {
    storage.host().map_or(Ok(()), |file| file.lock(access))
}

/// The same on a file that `old` has open too, which is going to be closed.
pub fn lock_after(storage: &dyn Storage, old: &dyn Storage, access: lock::Access) -> Result<()> {
    match (storage.host(), old.host()) {
        (Some(file), Some(old)) => file.lock_after(old, access),
        _ => lock(storage, access),
    }
}

/// How a file is cached, in the reference's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// The page cache, flushed at the end.
    #[default]
    Writeback,
    /// `O_DIRECT`.
    None,
    /// The page cache; every write is on stable storage before the next.
    Writethrough,
    /// `O_DIRECT`; every write is on stable storage before the next.
    Directsync,
    /// The page cache, never flushed.
    Unsafe,
}

impl CacheMode {
    /// Their words.
    pub const NAMES: [&'static str; 5] = ["none", "writeback", "unsafe", "directsync", "writethrough"];

    /// The mode with that word (`off` is another word for `none`).
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "none" | "off" => Self::None,
            "writeback" => Self::Writeback,
            "writethrough" => Self::Writethrough,
            "directsync" => Self::Directsync,
            "unsafe" => Self::Unsafe,
            _ => return None,
        })
    }

    /// Whether the page cache is passed by.
    pub fn direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether each write waits for stable storage.
    pub fn write_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// Whether a flush at the end does anything.
    pub fn flushes(self) -> bool {
        self != Self::Unsafe
    }
}
