//! Bytes on the host, by position: regular files, block devices, memory.
//!
//! Everything above this stratum sees a [`Storage`]: no cursor, every method takes `&self`, so any number of
//! threads may read and write disjoint ranges at once. What a file system can or cannot do (punch holes,
//! reserve space, tell holes from data) is decided here and nowhere else.
//!
//! Invariants: reading past the end gives zeros; a method either does what its contract says or returns an
//! error, and "the file system cannot do it this way" is never an error when another way exists.

pub mod direct;
pub mod error;
pub mod fault;
pub mod file;
pub mod host;
pub mod lock;
pub mod memory;
pub mod offload;
pub mod pieces;
pub mod sparse;
pub mod staging;
pub mod temporary;

use std::fmt;
use std::fs::File;

pub use error::{Error, Result};

/// What kind of thing holds the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file: grows and shrinks, may have holes.
    Regular,
    /// A block device: fixed size, discard and zero-out by ioctl.
    BlockDevice,
    /// A character device; nothing but reading and writing is asked of it.
    CharDevice,
    /// A buffer in memory (tests, and images inside images).
    Memory,
}

impl Kind {
    /// A device's size is its own and not ours to change.
    pub fn is_device(self) -> bool {
        matches!(self, Kind::BlockDevice | Kind::CharDevice)
    }

    /// The name of the protocol that the reference gives to such a file.
    pub fn protocol(self) -> &'static str {
        if self.is_device() { "host_device" } else { "file" }
    }
}

/// A run of bytes of the same nature, starting where it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostExtent {
    /// Length in bytes; at least 1 unless nothing was asked for.
    pub len: u64,
    /// False where the host says that the run is a hole and so reads as zeros.
    pub data: bool,
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

    /// The word on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
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

/// Bytes on the host, by position.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Length in bytes.
    fn len(&self) -> Result<u64>;

    /// Whether it has no bytes.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

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

    /// Goes to other permissions than those it was opened with; on failure it keeps those it has.
    fn lock(&self, access: lock::Access) -> Result<()> {
        let _ = access;
        Ok(())
    }

    /// What kind of thing it is.
    fn kind(&self) -> Kind;

    /// What offsets, lengths and buffers must be multiples of: 1, or the sector size under `O_DIRECT`.
    fn alignment(&self) -> u32 {
        1
    }

    /// Bytes that the host has allocated for it; `None` where the host does not tell.
    fn allocated(&self) -> Result<Option<u64>>;

    /// Which file it is; `None` for memory.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// The open file itself, where it is one of the host's, goes through the page cache, and has these offsets.
    fn host_file(&self) -> Option<&File> {
        None
    }

    /// The host's extent size hint (XFS), where there is one.
    fn extent_size_hint(&self) -> Option<u64> {
        None
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
