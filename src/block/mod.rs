//! One vocabulary for every image.
//!
//! A [`Format`] is what is known of a format without an image; a [`BlockDriver`] is one opened layer of an image (in
//! QEMU's words a *node* is such an instance, and its *block driver* what is here the `Format`); a [`Node`] is a layer
//! with what lies below it; the [`Opener`] is the only way to any of them. Drivers answer *where*
//! data is and *where* new data may go; guest bytes move in one place, [`io`].
//!
//! This stratum names no driver: the table of those that exist, [`Drivers`], is handed to the [`Opener`]. Only
//! `open` knows, by their first bytes, some that do not exist here.

mod bare;
pub mod bytes;
pub mod check;
pub mod cursor;
pub mod driver;
pub mod drivers;
pub mod error;
pub mod extent;
pub mod files;
pub mod filter;
pub mod format;
pub mod info;
pub mod io;
pub mod jsonish;
pub mod keys;
mod last_unit;
pub mod layering;
pub mod measure;
pub mod metadata;
pub mod name;
pub mod nearest;
pub mod node;
pub mod notice;
pub mod number;
pub mod open;
pub mod options;
pub mod protocol;
pub mod purpose;
mod sealed;
pub mod secrets;
pub mod throttle;

pub use check::{Check, CheckReport, Findings, Fix};
pub use cursor::MapCursor;
pub use driver::{
    Action, BlockDriver, Cipher, Compress, Effort, Encoded, Placed, Resize, Snapshots, Store, StoredWord, Ticket,
    Write, ZeroedRoom,
};
pub use drivers::{Driver, Drivers, Named};
pub use error::{Error, ErrorKind, Result};
pub use extent::{CompressedUnit, Extent, ExtentKind, GuestOffset, HostOffset, HostPlace};
pub use files::{BackingRef, Child, FileEnd, NoFiles, ResizeFiles};
pub use format::{
    Create, CreateFiles, CreateRequest, FileOrder, Format, Ids, OpenRequest, Related, TRAILER_BYTES, Trailer,
};
pub use keys::OptionTree;
pub use layering::{BackingChange, Emptying, keeps_its_parent};
pub use name::ImageRef;
pub use node::{Layer, Mapping, Node};
pub use notice::Notice;
pub use open::{Allowed, MadeFiles, OpenHow, Opener, Policy, files_named};
pub use options::{CreateOptions, OptionKind, OptionSpec, OptionValue};
pub use purpose::Purpose;
pub use secrets::{KeyUse, NO_SECRETS, SecretBytes, Secrets, TlsCredentials, TlsKind};
