//! What can go wrong with bytes on the host, in the host's own words.

use std::io;

use nix::errno::Errno;

use super::Preallocation;
use super::words::words;

/// Result of a storage operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A storage failure. Says what is wrong, not with which file: the caller knows the file's name and adds it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused; the text is `strerror`'s, without the number.
    #[error("{}", strerror(.0))]
    Io(io::Error),
    /// Somebody else holds what we need.
    #[error("Failed to get {}\"{permission}\" lock", if *.shared { "shared " } else { "" })]
    Locked {
        /// The permission that could not be had.
        permission: &'static str,
        /// True if others use a permission that we cannot share, false if others do not share one we use.
        shared: bool,
        /// The file, for the hint that another process may be using it.
        name: String,
        /// Where the lock is that is in the way.
        lock: Option<super::holder::LockPlace>,
    },
    /// A lock byte itself could not be locked: somebody locks in another way.
    #[error("Failed to lock byte {0}")]
    LockByte(i64),
    /// A file could not be opened or created.
    #[error("Could not {doing} '{name}': {}", strerror(.cause))]
    File {
        /// `open` or `create`.
        doing: &'static str,
        /// Its name.
        name: String,
        /// The host's reason.
        cause: io::Error,
    },
    /// A step failed whose name tells more than the file's.
    #[error("{what}: {}", strerror(.cause))]
    Step {
        /// What could not be done.
        what: &'static str,
        /// The host's reason.
        cause: io::Error,
    },
    /// A directory, socket or pipe where a file was wanted.
    #[error("'{driver}' driver requires '{name}' to be {wanted}")]
    WrongKind {
        /// The protocol that was to open it.
        driver: &'static str,
        /// Its name.
        name: String,
        /// What that protocol takes.
        wanted: &'static str,
    },
    /// What is there and has to be taken for the new file cannot be opened.
    #[error(
        "Protocol driver 'host_device' does not support creating new images, so an existing image must be selected as \
         the target; however, opening the given target as an existing image failed: {0}"
    )]
    Existing(Box<Error>),
    /// A device has the size that it has.
    #[error("Cannot grow device files")]
    GrowDevice,
    /// A mode that a plain file cannot have.
    #[error("Unsupported preallocation mode: {}", .0.name())]
    UnsupportedPreallocation(Preallocation),
    /// A mode that a device cannot have.
    #[error("Preallocation mode '{}' unsupported for this non-regular file", .0.name())]
    DevicePreallocation(Preallocation),
    /// The image in whose disk the bytes lie says why.
    #[error("{text}")]
    Image {
        /// All that it says.
        text: String,
        /// The host's reason, or the one that fits.
        errno: Option<Errno>,
        /// The error itself.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A server, or the way to it, failed.
    #[error("{text}")]
    Remote {
        /// All that is known of it.
        text: String,
        /// The error number that fits.
        errno: Errno,
    },
    /// Anything else, in full.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// The operating system's error number, where there is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Io(error) | Error::File { cause: error, .. } | Error::Step { cause: error, .. } => {
                error.raw_os_error().map(Errno::from_raw)
            }
            Error::Locked { .. } | Error::LockByte(_) => Some(Errno::EAGAIN),
            Error::WrongKind { .. } | Error::GrowDevice => Some(Errno::EINVAL),
            Error::UnsupportedPreallocation(_) | Error::DevicePreallocation(_) => Some(Errno::ENOTSUP),
            Error::Image { errno, .. } => *errno,
            Error::Existing(cause) => cause.errno(),
            Error::Remote { errno, .. } => Some(*errno),
            Error::Other(_) => None,
        }
    }

    /// The same failure of the host, said to be that of a step. Other errors have a text of their own.
    pub fn step(self, what: &'static str) -> Self {
        match self {
            Error::Io(cause) | Error::Step { cause, .. } => Error::Step { what, cause },
            other => other,
        }
    }

    /// True where the disk, or the user's share of it, is full.
    pub fn is_full(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENOSPC | Errno::EDQUOT))
    }

    /// True where the file system has no way to do what was asked, so that another way must be taken.
    pub fn is_unsupported(&self) -> bool {
        matches!(self.errno(), Some(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENOTTY | Errno::EINVAL | Errno::ENODEV))
    }
}

// Not thiserror's `from`: that would make it the source too, and its text be shown twice.
impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Error::Io(error)
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Error::Io(errno.into())
    }
}

/// The text for an error, without Rust's `(os error N)`.
pub fn strerror(error: &io::Error) -> String {
    if let Some(words) = error.raw_os_error().and_then(words) {
        return words.to_owned();
    }
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
