//! What every opened layer can do, and what some can: the block-driver trait and its abilities.
//!
//! A driver maps; it does not move guest data. Every method takes `&self`: a driver keeps its tables behind its
//! own lock and never holds that lock across data I/O.
//!
//! An ability is a trait here and a method of [`BlockDriver`] that answers `None`; a format that has it implements the
//! trait in a file named for it (`resize.rs`). What makes use of it is one file of `ops`, one of `cli` and a row of the
//! list of subcommands.

use std::fmt;
use std::num::NonZero;

use super::check::Check;
use super::files::{BackingRef, Child, ResizeFiles};
use super::info::{ImageInfo, SnapshotInfo};
use super::{
    BackingChange, CompressedUnit, CreateOptions, Emptying, Error, Extent, GuestOffset, HostOffset, HostPlace, Result,
    Secrets,
};
use crate::storage::Preallocation;

/// One opened layer of an image. Knows nothing of its backing file except the name written in its header.
pub trait BlockDriver: Send + Sync + fmt::Debug {
    /// The name of its driver.
    fn format(&self) -> &'static str;

    /// The guest's disk size in bytes; a multiple of 512.
    fn virtual_size(&self) -> u64;

    /// The run that starts at `at` (below the virtual size) and is at most `max` (≥ 1) bytes long.
    ///
    /// It ends at the virtual size at the latest. As long as is cheap: it covers a whole unallocated L1 entry,
    /// or a run of contiguous clusters.
    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent>;

    /// A file may end within the last unit of so many bytes: writers leave out the rest of it, which reads as zeros.
    /// What else lies past the end of a file is missing. `None` where the disk ends with the file.
    fn short_unit(&self) -> Option<u64> {
        // Lengths are counted in whole sectors.
        Some(512)
    }

    /// Whether its tables may name that place in a file, where the run starts that is at `at`. What lies at another one
    /// is shown where it is, but is not the guest's, and reading it fails.
    fn may_be_at(&self, at: GuestOffset, place: HostPlace) -> bool {
        let _ = (at, place);
        true
    }

    /// Whose word counts for what has a place in a file, in the run at `at`.
    fn stored_word(&self, at: GuestOffset) -> Result<StoredWord> {
        let _ = at;
        Ok(StoredWord::Layer)
    }

    /// Decodes one compressed unit: `input` is its encoded bytes, `out` has the unit's length.
    fn decode(&self, unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        let _ = (unit, input, out);
        Err(Error::unsupported("this format has no compressed data"))
    }

    /// Its files. The first is the one that was opened by name.
    fn files(&self) -> &[Child];

    /// The backing file named in the header.
    fn backing(&self) -> Option<&BackingRef> {
        None
    }

    /// What a layer on top remembers, to find out whether this one has changed since; `None` where the format has
    /// no such thing.
    fn content_id(&self) -> Option<u128> {
        None
    }

    /// What it has for that is what it is to be known by, and stays while it is filled.
    fn keep_content_id(&self) {}

    /// Refuses a backing layer that is not the one this layer was made on, where the format can tell.
    fn accept_backing(&self, below: &dyn BlockDriver) -> Result<()> {
        let _ = below;
        Ok(())
    }

    /// What `info` shows beyond name, format and size.
    fn info(&self) -> Result<ImageInfo>;

    /// Writes out all tables, in an order that leaves the image consistent at every moment, and flushes the
    /// files unless their cache mode says otherwise.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// The last call on an image that was written to: flushes and takes back marks such as the dirty bit.
    fn close(&self) -> Result<()> {
        self.flush()
    }

    /// Able to be written to. `None` for a layer opened read-only, and for a format that cannot be written: whoever
    /// writes then refuses, opening need not.
    fn writing(&self) -> Option<&dyn Write> {
        None
    }

    /// Able to change the virtual size.
    fn resizing(&self) -> Option<&dyn Resize> {
        None
    }

    /// Able to check its tables.
    fn checking(&self) -> Option<&dyn Check> {
        None
    }

    /// Able to hold internal snapshots.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }

    /// Able to hold persistent bitmaps.
    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        None
    }

    /// Able to name another backing file.
    fn backing_change(&self) -> Option<&dyn BackingChange> {
        None
    }

    /// Able to give up what it stores over its backing file.
    fn emptying(&self) -> Option<&dyn Emptying> {
        None
    }

    /// Whether its format has bitmaps, be they read here or not.
    fn knows_bitmaps(&self) -> bool {
        self.bitmaps().is_some()
    }

    /// Why it cannot hold bitmaps, where other images of its format can.
    fn no_bitmaps(&self) -> Option<&'static str> {
        None
    }

    /// Able to change options that it was made with.
    fn amending(&self) -> Option<&dyn Amend> {
        None
    }

    /// Whether the reference lets the host copy from it and to it, where that is asked for, and then looks for no zeros.
    fn lets_host_copy(&self) -> bool {
        false
    }

    /// Keeps guest data encrypted, and has the key.
    fn cipher(&self) -> Option<&dyn Cipher> {
        None
    }
}

/// Whose word counts for what has a place in a file: of what reads as zeros, `map` tells data from zeros by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StoredWord {
    /// The layer's tables alone: zeros that have a place are no data.
    #[default]
    Layer,
    /// The layer's, and the file's: zeros are data in a hole of the file.
    Both,
    /// The file's: the disk is the file.
    File,
}

/// What encrypts a layer's plain data. Compressed units do not pass here.
///
/// Both places are given because what a sector's bytes depend on differs: its number on the guest's disk, or in the
/// file. A unit's place in the file and on the disk are the same, counted within a sector.
pub trait Cipher: Send + Sync {
    /// Bytes that are encrypted on their own; what is given is whole ones.
    fn sector(&self) -> NonZero<u32>;

    /// Decrypts what was read.
    fn decrypt(&self, guest: GuestOffset, host: HostOffset, buf: &mut [u8]) -> Result<()>;

    /// Encrypts what is about to be written.
    fn encrypt(&self, guest: GuestOffset, host: HostOffset, buf: &mut [u8]) -> Result<()>;
}

/// What is to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Guest data as it is.
    Data,
    /// One whole unit, encoded to that many bytes by [`Compress::encode`].
    Compressed {
        /// Encoded length.
        bytes: u64,
    },
    /// Zeros; `unmap` allows the space to be given back.
    Zero {
        /// True where the space need not be kept.
        unmap: bool,
    },
}

impl Store {
    /// Whether it is zeros. Refuses an encoded unit: asked by formats that have none.
    pub fn is_zeros(self) -> Result<bool> {
        match self {
            Self::Data => Ok(false),
            Self::Zero { .. } => Ok(true),
            Self::Compressed { .. } => Err(Error::unsupported("Compression not supported for this file format")),
        }
    }
}

/// What has to be done to the files before [`Write::publish`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The bytes for [`Placed::start`] go to `place`. The `before` guest bytes that precede the range and the
    /// `after` ones that follow it must be filled with what they read as now (they share a new unit with it).
    Write {
        /// Where the first byte of the range goes.
        place: HostPlace,
        /// Guest bytes before the range to fill, stored just before `place`.
        before: u64,
        /// Guest bytes after the range to fill, stored just after the range.
        after: u64,
    },
    /// The range's own bytes in the file must read as zeros.
    Zero {
        /// Where the range starts in the file.
        place: HostPlace,
    },
    /// Nothing: the tables say it all.
    Nothing,
}

/// What the tables say of a range once it is published. Means nothing to anybody but the driver.
///
/// Units are counted from the start of the disk (in a vmdk: of the extent). An `entry` is what the table says of the
/// first unit, in the format's own counting: a host offset, a sector, a block of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ticket {
    /// What they say already.
    #[default]
    Nothing,
    /// Units that have new room, one after the other; what is not written of them is not there.
    New {
        /// The first.
        unit: u64,
        /// How many.
        count: u64,
        /// The entry of the first.
        entry: u64,
    },
    /// The same, but all of their content is there: it is written, or filled around what is.
    Whole {
        /// The first.
        unit: u64,
        /// How many.
        count: u64,
        /// The entry of the first.
        entry: u64,
    },
    /// A unit that is stored compressed.
    Packed {
        /// Which.
        unit: u64,
        /// Its entry.
        entry: u64,
    },
    /// Units that have their room: the marks of what is there within them change.
    Marks {
        /// The first.
        unit: u64,
        /// The entry of the first.
        entry: u64,
    },
    /// Units, or marked parts of one, that read as zeros by the tables alone.
    Zeros {
        /// The first.
        unit: u64,
        /// How many.
        count: u64,
        /// What becomes of their room.
        room: ZeroedRoom,
    },
}

/// What becomes of the room of units that read as zeros from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroedRoom {
    /// They keep it.
    Keep,
    /// They give it up.
    GiveUp,
    /// They give it up, and no entry says that they are zeros: there is no backing file that would show.
    Forget,
}

/// Where a range may be put. Not visible until it is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Where the range starts: always where it was asked for.
    pub start: GuestOffset,
    /// How much of it was placed, at least 1 byte; the caller asks again for the rest.
    pub len: u64,
    /// What was to be stored.
    pub store: Store,
    /// What has to be done to the files.
    pub action: Action,
    /// The driver's own note.
    pub ticket: Ticket,
}

impl Placed {
    /// A range that the tables need not learn of: there is nothing to publish.
    pub fn known(start: GuestOffset, len: u64, store: Store, action: Action) -> Self {
        Self { start, len, store, action, ticket: Ticket::default() }
    }

    /// A range that has its place, from `place` on: data is written over what is there, zeros are made there.
    pub fn over(start: GuestOffset, len: u64, store: Store, place: HostPlace) -> Result<Self> {
        let action =
            if store.is_zeros()? { Action::Zero { place } } else { Action::Write { place, before: 0, after: 0 } };
        Ok(Self::known(start, len, store, action))
    }
}

/// Able to be written to.
///
/// Calls may come from several threads. Two placements that are not published yet must not share a unit
/// ([`Write::unit`]). Space is given out in the order of the calls to `place`, so the order of those calls, and
/// nothing else, decides where data lies.
pub trait Write: Send + Sync {
    /// The size of the piece that is allocated as a whole (cluster, grain, block), in bytes; 1 where there is none.
    fn unit(&self) -> u64;

    /// The alignment below which a write has to fill around itself (the subcluster, or the unit).
    fn fill_unit(&self) -> u64 {
        self.unit()
    }

    /// The same for an image in which nothing but data is written from now on: 1 if all of the disk has its place
    /// already, so that no write has anything to fill.
    fn granule(&self) -> u64 {
        self.fill_unit()
    }

    /// Content is about to change: from here on the layer has the [`content_id`](BlockDriver::content_id) that it will
    /// have then.
    fn begin(&self) -> Result<()> {
        Ok(())
    }

    /// Finds room for the start of a guest range (≤ `len`, ≥ 1 byte). Cheap; does no data I/O.
    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed>;

    /// Makes a placement visible, after what [`Placed::action`] asks for has been done.
    /// Nothing where placing allocates nothing.
    fn publish(&self, placed: &Placed) -> Result<()> {
        let _ = placed;
        Ok(())
    }

    /// Room that is withdrawn is lost to the file unless it is the last that was given: none is to be given before what
    /// was given is published.
    fn only_appends(&self) -> bool {
        false
    }

    /// Gives back a placement that will not be published.
    fn withdraw(&self, placed: &Placed) {
        let _ = placed;
    }

    /// This range was to be written and holds that already: nothing was placed, but bitmaps count it as written.
    fn wrote_the_same(&self, at: GuestOffset, len: u64) -> Result<()> {
        let _ = (at, len);
        Ok(())
    }

    /// The guest no longer needs this range (whole units alone are affected). What it then reads as: zeros, or
    /// the backing file where `Zero` was not asked for.
    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        let _ = (at, len);
        Ok(())
    }

    /// Able to store compressed units.
    fn compressing(&self) -> Option<&dyn Compress> {
        None
    }
}

/// The outcome of encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoded {
    /// The encoded bytes, framing and all, are in the output buffer.
    Smaller,
    /// It did not get smaller: store it as it is.
    Incompressible,
}

/// How hard an encoder tries. What is not said is the format's own choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Effort {
    /// The codec's level: more is smaller and slower.
    pub level: Option<u8>,
    /// References may go back further than the format's strictest readers look.
    pub wide: bool,
}

/// Able to store compressed units.
pub trait Compress: Send + Sync {
    /// Encodes one unit (`plain` is a whole unit, zero-filled past the end of the disk) to `out`, which is
    /// cleared first. Runs on many threads at once and allocates no space in the image.
    fn encode(&self, at: GuestOffset, plain: &[u8], effort: Effort, out: &mut Vec<u8>) -> Result<Encoded>;

    /// Called once, before any unit, by whoever is going to store compressed units (perhaps none).
    fn begin(&self) {}

    /// True if [`Store::Compressed`] is the only way in: every unit is encoded, asked for or not, smaller or not.
    fn always(&self) -> bool {
        false
    }
}

/// Able to change the virtual size.
pub trait Resize {
    /// Refuses, before anything is changed, what cannot be done.
    fn check(&self, size: u64, fill: Preallocation) -> Result<()>;

    /// The same, in depth, where something is written before [`Resize::resize_with`]; the backing file covers the
    /// first `covered` bytes of the disk.
    fn check_over(&self, size: u64, fill: Preallocation, covered: u64) -> Result<()> {
        let _ = covered;
        self.check(size, fill)
    }

    /// Sets the virtual size (a multiple of 512 except for raw).
    fn resize(&self, size: u64, fill: Preallocation) -> Result<()>;

    /// The same for an image that may get further files, or a new main file in place of the one that it has.
    fn resize_with(&self, size: u64, fill: Preallocation, files: &dyn ResizeFiles) -> Result<()> {
        let _ = files;
        self.resize(size, fill)
    }
}

/// Able to hold internal snapshots.
pub trait Snapshots {
    /// All of them, in the order of the table.
    fn list(&self) -> Result<Vec<SnapshotInfo>>;

    /// The layer as it was at that snapshot, read-only. `key` matches an id or a name as `by` says.
    fn open(&self, key: &SnapshotKey) -> Result<Box<dyn BlockDriver>>;

    /// Keeps the disk as it is now in a snapshot of its own. Names may repeat.
    fn create(&self, new: &NewSnapshot) -> Result<()>;

    /// Gives the disk the content and the size that it had; a saved machine's state is not looked at.
    fn apply(&self, key: &SnapshotKey) -> Result<()>;

    /// Gives up the one at that place in the list.
    fn delete(&self, index: usize) -> Result<()>;
}

/// A snapshot that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name.
    pub name: String,
    /// When it is taken: seconds since the epoch.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u32,
}

/// What is known of a persistent bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// log2 of the bytes for which one bit stands.
    pub granularity_bits: u8,
    /// Whether it follows what is written.
    pub enabled: bool,
    /// Whether it says what it ought to.
    pub consistent: bool,
    /// The size of the disk that it is for.
    pub disk: u64,
    /// Bytes of the file that it takes beside its bits.
    pub stored: u64,
}

/// Able to hold persistent bitmaps: which parts of the disk were written since.
///
/// A layer keeps those that are enabled up to date by itself. A bitmap is known by its place in the list; bit 0 of
/// byte 0 stands for the disk's start.
pub trait Bitmaps {
    /// All of them, in the order of the directory.
    fn list(&self) -> Vec<BitmapInfo>;

    /// Reads bytes from `at` on (which the disk's size must ask for); gives how many of them lie in the file.
    fn read(&self, index: usize, at: u64, bits: &mut [u8]) -> Result<u64>;

    /// Adds bitmaps with no bit set, for the disk's size; gives the first one's place. They are there for good once
    /// the layer is closed.
    fn add(&self, new: &[BitmapInfo]) -> Result<usize>;

    /// Sets what is set in `bits`, from the byte `at` on.
    fn set(&self, index: usize, at: u64, bits: &[u8]) -> Result<()>;

    /// Refuses a new one that cannot be kept beside `others` bitmaps.
    fn check_new(&self, name: &str, granularity_bits: u8, others: usize) -> Result<()>;

    /// From now on there are these bitmaps, in that order: at once, and for good.
    fn arrange(&self, wanted: &[WantedBitmap<'_>]) -> Result<()>;
}

/// A bitmap that there shall be.
pub struct WantedBitmap<'a> {
    /// Its name.
    pub name: String,
    /// log2 of the bytes for which one bit stands.
    pub granularity_bits: u8,
    /// Whether it follows what is written.
    pub enabled: bool,
    /// Its bits.
    pub bits: WantedBits<'a>,
}

/// Where the bits of a bitmap come from.
#[derive(Clone, Copy)]
pub enum WantedBits<'a> {
    /// It is the one at that place of the list, with the granularity that it has.
    Kept(usize),
    /// They are new.
    Made(&'a dyn MakeBits),
}

/// Makes the bits of a bitmap.
pub trait MakeBits {
    /// Fills `bits`, which are zeros, with the bitmap's bytes from `at` on.
    fn fill(&self, at: u64, bits: &mut [u8]) -> Result<()>;
}

/// Hears how much of how much is done; what it fails with ends the work, where the image is consistent.
pub type AmendProgress<'a> = &'a dyn Fn(u64, u64) -> Result<()>;

/// What shall be otherwise in an image that is there.
pub struct AmendRequest<'a> {
    /// All `-o` options, checked against [`super::Format::amend_options`].
    pub options: &'a CreateOptions,
    /// Where keys are that the options name.
    pub secrets: &'a Secrets,
    /// What makes all data unreadable is done too.
    pub force: bool,
    /// How far it is.
    pub progress: AmendProgress<'a>,
}

/// Able to change options that an image was made with. Its size is one of them in some formats, and is changed, as in any
/// other case, by [`Resize`], between the two parts.
pub trait Amend {
    /// Refuses, before anything is changed, what cannot be done, and does what comes before a change of size. Gives the
    /// layer as it is from then on, if what has changed never changes in an open layer.
    fn begin(&self, request: &AmendRequest<'_>) -> Result<Option<Box<dyn BlockDriver>>>;

    /// Does the rest. It is the last call: the layer has nothing to write any more.
    fn finish(&self, request: &AmendRequest<'_>) -> Result<()>;
}

/// Which snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotKey {
    /// By id, or failing that by name.
    IdOrName(String),
    /// By what is given of the two.
    Exact {
        /// The id.
        id: Option<String>,
        /// The name.
        name: Option<String>,
    },
}
