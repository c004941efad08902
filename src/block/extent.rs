//! Where guest data is: offsets as types, extents, host places.

use std::fmt;
use std::ops::Add;

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The number of bytes from the start.
            pub fn get(self) -> u64 {
                self.0
            }

            /// The offset `n` bytes further, unless that overflows.
            pub fn checked_add(self, n: u64) -> Option<Self> {
                self.0.checked_add(n).map(Self)
            }
        }

        impl Add<u64> for $name {
            type Output = Self;

            /// Saturates: an offset that an image made overflow lies past every end.
            fn add(self, n: u64) -> Self {
                Self(self.0.saturating_add(n))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset! {
    /// A position on the guest's disk, in bytes.
    GuestOffset
}
offset! {
    /// A position in a file of the host, in bytes.
    HostOffset
}

/// A place in one of a driver's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPlace {
    /// Index into [`BlockDriver::files`](super::BlockDriver::files).
    pub file: usize,
    /// Where in that file.
    pub at: HostOffset,
}

impl HostPlace {
    /// In the first file, the one that was opened by name.
    pub fn main(at: u64) -> Self {
        Self { file: 0, at: HostOffset(at) }
    }
}

/// A unit that is stored compressed: it is read and decoded as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedUnit {
    /// Where the whole unit starts on the guest's disk.
    pub start: GuestOffset,
    /// How many guest bytes the whole unit decodes to.
    pub len: u64,
    /// Where its encoded bytes start.
    pub place: HostPlace,
    /// How many encoded bytes there are at most (the last ones may be padding). Drivers cap it.
    pub host_len: u64,
}

/// What a layer says of a run of guest bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Stored as it is, contiguously, from that place on.
    Data(HostPlace),
    /// Stored compressed; the extent lies within this unit.
    Compressed(CompressedUnit),
    /// Reads as zeros by this layer's own word, with or without space kept for it.
    Zero(Option<HostPlace>),
    /// This layer does not say: ask the backing layer. There may be space kept for it (subclusters).
    Unallocated(Option<HostPlace>),
}

impl ExtentKind {
    /// The same for what is left of the run without its first `n` bytes.
    pub fn after(mut self, n: u64) -> Self {
        if let Self::Data(place) | Self::Zero(Some(place)) | Self::Unallocated(Some(place)) = &mut self {
            place.at = place.at + n;
        }
        self
    }
}

/// A run of guest bytes and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts: always where it was asked for.
    pub start: GuestOffset,
    /// Its length in bytes, at least 1.
    pub len: u64,
    /// What and where it is.
    pub kind: ExtentKind,
}
