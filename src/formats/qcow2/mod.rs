//! qcow2, versions 2 and 3.
//!
//! What is where, from the ground up (nothing uses what stands below it in this list):
//!
//! * `layout.rs` the on-disk structures, `entry.rs` and `geometry.rs` what follows from them; `header.rs` the header from and to bytes; `window.rs`
//!   directories read piece by piece; `refcount.rs` refcounts in bytes; `references.rs` references counted in memory;
//! * `tables.rs` the cache of L1, L2 and refcount tables and the order in which changes reach the file;
//! * `snapshot.rs`, `bitmap.rs` and `dirty.rs`: snapshots, the directory of bitmaps, and what bitmaps have to be told;
//! * `space.rs` which cluster comes next; `plan.rs`, `prealloc.rs` and `create.rs` new images, `measure.rs` how large they become; `map.rs` guest offset →
//!   extent; `holes.rs` what of it the host does not hold; `codec.rs` compressed clusters, `crypt.rs` encrypted ones; `info.rs` what info shows;
//! * `walk.rs` everything that the metadata refers to, one after the other, for `guard.rs` (where tables are) and
//!   `repair.rs` (after an unclean end);
//! * `counts.rs` refcounts of an open image; `alloc.rs` clusters given out and taken back; `flush.rs` changes on their
//!   way to the file; `place.rs` guest data; `fit.rs` and `tracking.rs`: bitmaps follow the size and what is written; `arrange.rs` those
//!   that are added, changed and removed; `tail.rs` what lies past the end of the disk; `resize.rs` its size; `state.rs` snapshots taken,
//!   applied and deleted; `layering.rs` another backing file, and nothing stored over it; `amend.rs` other options, `expand.rs` without
//!   marks that version 2 lacks, `width.rs` with refcounts of another width; `check.rs` what is wrong, and mending it; `open.rs`
//!   opening: refusals, options.
//!
//! Lock order: `alloc` → `header` → the cache's own. Whoever changes a table or the header holds `alloc`. No lock is
//! held across data I/O; mapping takes `header` for reading, for a moment, and the cache's locks.

mod ahead;
pub mod alloc;
pub mod amend;
pub mod arrange;
pub mod bitmap;
pub mod check;
pub mod codec;
pub mod counts;
pub mod create;
pub mod crypt;
pub mod dirty;
pub mod entry;
pub mod expand;
pub mod fit;
pub mod flush;
pub mod geometry;
pub mod guard;
pub mod header;
pub mod holes;
pub mod info;
pub mod layering;
pub mod layout;
pub mod map;
pub mod measure;
pub mod open;
pub mod place;
pub mod plan;
pub mod prealloc;
pub mod refcount;
pub mod references;
pub mod repair;
pub mod resize;
pub mod snapshot;
mod snapshot_table;
pub mod space;
pub mod state;
pub mod tables;
pub mod tail;
pub mod tracking;
pub mod walk;
pub mod width;
pub mod window;

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard};

use crate::block::driver::{Amend, Bitmaps};
use crate::block::info::ImageInfo;
use crate::block::{
    BackingChange, BackingRef, BlockDriver, Check, Child, Cipher, CompressedUnit, Create, Emptying, Extent, Format,
    GuestOffset, OpenRequest, OptionSpec, Resize, Result, SecretBytes, Snapshots, StoredWord, Write,
};
use crate::crypto::luks;
use crate::formats::encryption::KEY_SECRET;
use crate::formats::sector_cipher::ImageCipher;

use alloc::Allocator;
use entry::{L1Entry, L2Entry};
use geometry::Geometry;
use header::Qcow2Header;
use layout::ENTRY;
use tables::{Table, TableKind, Tables};

/// The format.
#[derive(Debug)]
pub struct Qcow2;

impl Format for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn also_called(&self) -> &'static [&'static str] {
        &["qcow3", "qc2"]
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        let magic = layout::word32(head, 0) == Some(layout::MAGIC);
        let version = layout::word32(head, 4).unwrap_or(0);
        if magic && version >= 2 { 100 } else { 0 }
    }

    fn strong_options(&self) -> &'static [&'static str] {
        &[KEY_SECRET]
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        Ok(Box::new(open::open(request)?))
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }

    fn amend_options(&self) -> &'static [OptionSpec] {
        amend::OPTIONS
    }
}

/// An opened qcow2 layer.
#[derive(Debug)]
pub struct Qcow2Driver {
    /// 0: the image; 1: the external data file, if there is one.
    files: Vec<Child>,
    geometry: Geometry,
    /// Whether guest clusters lie in an external data file (which has no refcounts).
    external: bool,
    /// Whether guest clusters are encrypted.
    encrypted: bool,
    /// What those are encrypted with that are not compressed. Nothing where the header alone is looked at.
    cipher: Option<ImageCipher>,
    /// How compressed clusters are encoded: [`layout::ZLIB`] or [`layout::ZSTD`].
    compression: u8,
    /// The header as it is in the file (or, for an opened snapshot, with the snapshot's L1 table and size).
    header: RwLock<Qcow2Header>,
    tables: Tables,
    alloc: Mutex<Allocator>,
    /// Where tables are, known from the first change on (see `guard.rs`).
    places: Mutex<guard::Places>,
    /// As they are in the file.
    snapshots: RwLock<Vec<snapshot_table::Snapshot>>,
    /// As they will be when the image is closed.
    bitmaps: RwLock<Vec<bitmap::Bitmap>>,
    /// The LUKS header.
    luks: Option<luks::LuksHeader>,
    /// The master key that is kept in it. Nothing where the header alone is looked at.
    key: Option<SecretBytes>,
    backing: Option<BackingRef>,
    /// Whether zeros are kept as such though nothing lies below.
    keeps_zeros: AtomicBool,
    write: bool,
    /// Whether the host has holes under data clusters; found out once (see `holes.rs`).
    host_holes: OnceLock<bool>,
    /// Whether wrong tables were reported already.
    told_corrupt: AtomicBool,
    /// Which tables were fetched before they were needed.
    ahead: ahead::Ahead,
}

impl BlockDriver for Qcow2Driver {
    fn format(&self) -> &'static str {
        Qcow2.name()
    }

    fn virtual_size(&self) -> u64 {
        self.header().fields.size
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.extent_on_host(at, max)
    }

    fn stored_word(&self, at: GuestOffset) -> Result<StoredWord> {
        self.word_on_host(at)
    }

    /// Of the last cluster of the file that much is written as the guest wrote.
    fn short_unit(&self) -> Option<u64> {
        Some(self.geometry.cluster_size())
    }

    fn lets_host_copy(&self) -> bool {
        self.cipher.is_none()
    }

    fn decode(&self, unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        self.decode_unit(unit, input, out)
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn backing(&self) -> Option<&BackingRef> {
        self.backing.as_ref()
    }

    fn info(&self) -> Result<ImageInfo> {
        self.image_info()
    }

    fn flush(&self) -> Result<()> {
        self.flush_all(false)
    }

    fn close(&self) -> Result<()> {
        self.flush_all(true)
    }

    fn writing(&self) -> Option<&dyn Write> {
        if self.write { Some(self) } else { None }
    }

    fn resizing(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn backing_change(&self) -> Option<&dyn BackingChange> {
        self.write.then_some(self)
    }

    fn emptying(&self) -> Option<&dyn Emptying> {
        self.write.then_some(self)
    }

    fn amending(&self) -> Option<&dyn Amend> {
        Some(self)
    }

    fn cipher(&self) -> Option<&dyn Cipher> {
        self.cipher.as_ref().map(|cipher| cipher as &dyn Cipher)
    }

    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        if self.geometry.version < 3 { None } else { Some(self) }
    }

    fn no_bitmaps(&self) -> Option<&'static str> {
        (self.geometry.version < 3).then_some("Cannot store dirty bitmaps in qcow2 v2 files")
    }
}

impl Qcow2Driver {
    /// The image file.
    fn file(&self) -> &Child {
        &self.files[0]
    }

    /// Index in `files` of the file that guest clusters lie in.
    fn data_file(&self) -> usize {
        usize::from(self.external)
    }

    fn header(&self) -> RwLockReadGuard<'_, Qcow2Header> {
        self.header.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Held by whoever changes tables or the header.
    fn lock_alloc(&self) -> MutexGuard<'_, Allocator> {
        self.alloc.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Changes the header in memory and in the file, at once. Tables are not written back first. (A change of a
    /// feature bit needs no allocator lock.)
    fn update_header(&self, change: impl FnOnce(&mut Qcow2Header)) -> Result<()> {
        let mut header = self.header.write().unwrap_or_else(|e| e.into_inner());
        let mut changed = header.clone();
        change(&mut changed);
        let mut bytes = changed.to_bytes()?;
        // Nothing of a longer one may stay behind it.
        let old = header.to_bytes().map_or(0, |old| old.len());
        bytes.resize(bytes.len().max(old), 0);
        self.file().write_metadata(header::HEADER, 0, &bytes)?;
        *header = changed;
        Ok(())
    }

    /// The active L1 table.
    fn l1(&self) -> Table {
        let fields = self.header().fields;
        Table { kind: TableKind::L1, at: fields.l1_table_offset, len: u64::from(fields.l1_size) * ENTRY }
    }

    /// The L2 table at a host offset.
    fn l2(&self, at: u64) -> Table {
        Table { kind: TableKind::L2, at, len: self.geometry.cluster_size() }
    }

    /// The refcount table.
    fn refcount_table(&self) -> Table {
        let fields = self.header().fields;
        let len = u64::from(fields.refcount_table_clusters) << self.geometry.cluster_bits;
        Table { kind: TableKind::RefcountTable, at: fields.refcount_table_offset, len }
    }

    /// The refcount block at a host offset.
    fn refcount_block(&self, at: u64) -> Table {
        Table { kind: TableKind::RefcountBlock, at, len: self.geometry.cluster_size() }
    }

    /// The L2 entry of a guest cluster: the entry and, with subclusters, its bitmap (else 0).
    fn l2_entry(&self, table: Table, index: u64) -> Result<(L2Entry, u64)> {
        if self.geometry.extended {
            self.tables.get_pair(table, index).map(|(entry, bitmap)| (L2Entry(entry), bitmap))
        } else {
            Ok((L2Entry(self.tables.get(table, index)?), 0))
        }
    }

    /// The entry of an L1 table with that index.
    fn l1_entry(&self, l1: Table, index: u64) -> Result<L1Entry> {
        self.tables.get(l1, index).map(L1Entry)
    }

    /// Whether an entry's cluster is there: it refers to one, or has one in the external data file.
    fn is_there(&self, entry: L2Entry) -> bool {
        entry.refers() || (self.external && entry.is_own())
    }

    /// Sets it (the caller holds the allocator).
    fn set_l2_entry(&self, table: Table, index: u64, entry: L2Entry, bitmap: u64) -> Result<()> {
        if self.geometry.extended {
            self.tables.set_pair(table, index, (entry.0, bitmap))
        } else {
            self.tables.set(table, index, entry.0)
        }
    }
}
