//! One walk over all that the metadata of an image refers to: for whoever guards it, repairs it, or checks it.
//!
//! What is found is handed out as it is, wrong or not: the walk judges nothing, and follows no table that is not
//! aligned. Order: what the header and the directories place; the entries of L1 and bitmap tables; the refcount blocks; then, if the
//! visitor asks for them, the entries of L2 tables, in the order of their offsets and each table once, however many
//! snapshots share it. Memory is a few words for each L2 table. Nothing is locked while a visitor is called, so that
//! it may change tables.
//!
//! Source: specification, sections "Header", "Cluster mapping", "Snapshots", "Bitmaps".

use std::collections::{BTreeMap, BTreeSet};

use crate::block::Result;
use crate::block::error::{Context, Operation, Place};

use super::Qcow2Driver;
use super::bitmap::Bitmap;
use super::layout::{self, COMPRESSED, ENTRY, OFFSET_MASK, REFCOUNT_OFFSET_MASK};
use super::snapshot_table::Snapshot;
use super::tables::{Table, TableKind};

/// What lies at a place of the image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetadataPart {
    /// The first cluster.
    Qcow2Header,
    /// The active L1 table.
    ActiveL1,
    /// The refcount table.
    RefcountTable,
    /// The directory of bitmaps.
    BitmapDirectory,
    /// The snapshot table.
    SnapshotTable,
    /// The LUKS header.
    LuksHeader,
    /// A snapshot's L1 table.
    InactiveL1,
    /// The table of a bitmap.
    BitmapTable,
    /// The bits of a bitmap.
    BitmapData,
    /// An L2 table that the active L1 table refers to.
    ActiveL2,
    /// An L2 table that a snapshot's L1 table refers to.
    InactiveL2,
    /// A refcount block.
    RefcountBlock,
    /// A guest cluster.
    Data,
    /// A compressed guest cluster.
    Compressed,
}

impl MetadataPart {
    /// The reference's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2Header => "qcow2_header",
            Self::ActiveL1 => "active L1 table",
            Self::RefcountTable => "refcount table",
            Self::BitmapDirectory => "bitmap directory",
            Self::SnapshotTable => "snapshot table",
            Self::LuksHeader => "LUKS header",
            Self::InactiveL1 => "inactive L1 table",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap data",
            Self::ActiveL2 => "active L2 table",
            Self::InactiveL2 => "inactive L2 table",
            Self::RefcountBlock => "refcount block",
            Self::Data => "data cluster",
            Self::Compressed => "compressed cluster",
        }
    }
}

/// The entry of a table that refers to something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableEntry {
    /// The table.
    pub table: Table,
    /// Which entry.
    pub index: u64,
    /// At which word of the table it starts.
    pub word_index: u64,
    /// The entry itself.
    pub word: u64,
    /// The other word of an extended L2 entry, which tells of the subclusters.
    pub subclusters: Option<u64>,
}

impl TableEntry {
    /// Whether it is an L2 entry by which no byte of its cluster is read.
    pub fn reads_nothing(&self) -> bool {
        match self.subclusters {
            // The low half are those that are stored.
            Some(subclusters) => subclusters & u64::from(u32::MAX) == 0,
            None => self.word & layout::ZERO != 0,
        }
    }
}

/// A run of bytes of the image file that something refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// What it is.
    pub part: MetadataPart,
    /// Where it starts.
    pub at: u64,
    /// Its length in bytes, not 0.
    pub len: u64,
    /// How many times it is referred to in this way: once for each snapshot that shares the table.
    pub times: u32,
    /// Whether the active L1 table leads there.
    pub active: bool,
    /// What refers to it; `None` for the header's own fields.
    pub entry: Option<TableEntry>,
}

/// What looks on.
pub trait Visitor {
    /// Something was found.
    fn found(&mut self, found: &Found) -> Result<()>;

    /// Whether the entries of L2 tables are wanted; `tables` of them were found.
    fn contents(&self, tables: u64) -> bool;

    /// There are more snapshots than can be gone through. If this is no error their L1 tables are not read.
    fn too_many(&self) -> Result<()>;
}

/// Most entries of L1 tables that are gone through.
const MOST_ENTRIES: u64 = 1 << 26;

/// References to an L2 table.
#[derive(Debug, Clone, Copy, Default)]
struct Sharing {
    times: u32,
    active: bool,
}

/// Whether the L1 tables of snapshots (offset, length) have more entries than are gone through.
fn too_many(inactive: &BTreeMap<(u64, u64), u32>) -> bool {
    inactive.keys().map(|(_, len)| len / ENTRY).fold(0, u64::saturating_add) > MOST_ENTRIES
}

impl Qcow2Driver {
    /// See the module.
    pub(super) fn walk(&self, visitor: &mut dyn Visitor) -> Result<()> {
        let mut tables = BTreeMap::new();
        self.walk_header(visitor)?;
        let inactive = self.walk_directories(visitor)?;
        self.walk_l1s(visitor, inactive, &mut tables)?;
        self.walk_bitmaps(visitor)?;
        self.walk_refcounts(visitor)?;
        if !self.external && visitor.contents(tables.len() as u64) {
            for (at, sharing) in tables {
                self.walk_l2(visitor, at, sharing)?;
            }
        }
        Ok(())
    }

    /// The entries of the active L2 tables of an image with a data file: the places are in that.
    pub(super) fn walk_data_file(&self, visitor: &mut dyn Visitor) -> Result<()> {
        let mut tables = BTreeSet::new();
        self.each_word(self.l1(), |_, word| {
            let at = word & OFFSET_MASK;
            if at != 0 && self.geometry.in_cluster(at) == 0 {
                tables.insert(at);
            }
            Ok(())
        })?;
        tables.into_iter().try_for_each(|at| self.walk_l2(visitor, at, Sharing { times: 1, active: true }))
    }

    fn walk_header(&self, visitor: &mut dyn Visitor) -> Result<()> {
        let header = self.header().clone();
        let fields = &header.fields;
        let mut root = |part, at, len| {
            let found = Found { part, at, len, times: 1, active: true, entry: None };
            if at == 0 && part != MetadataPart::Qcow2Header || len == 0 { Ok(()) } else { visitor.found(&found) }
        };
        root(MetadataPart::Qcow2Header, 0, self.geometry.cluster_size())?;
        let (l1, refcounts) = (self.l1(), self.refcount_table());
        root(MetadataPart::ActiveL1, l1.at, l1.len)?;
        root(MetadataPart::RefcountTable, refcounts.at, refcounts.len)?;
        // Its last entry may be followed by nothing.
        let snapshots: u64 = self.snapshot_list().iter().map(Snapshot::bytes).sum();
        root(MetadataPart::SnapshotTable, fields.snapshots_offset, snapshots.saturating_sub(7))?;
        if let Some((at, len)) = header.crypto {
            root(MetadataPart::LuksHeader, at, len)?;
        }
        // Without the autoclear bit the directory is nothing.
        if let Some(bitmaps) = header.bitmaps.filter(|_| fields.autoclear & layout::BITMAPS != 0) {
            root(MetadataPart::BitmapDirectory, bitmaps.directory_offset, bitmaps.directory_size)?;
        }
        Ok(())
    }

    /// Tables that are entered in the snapshot table and in the directory of bitmaps.
    fn walk_directories(&self, visitor: &mut dyn Visitor) -> Result<BTreeMap<(u64, u64), u32>> {
        let mut inactive: BTreeMap<(u64, u64), u32> = BTreeMap::new();
        for snapshot in self.snapshot_list() {
            let len = u64::from(snapshot.fields.l1_size) * ENTRY;
            if len > 0 {
                *inactive.entry((snapshot.fields.l1_table_offset, len)).or_default() += 1;
            }
        }
        if too_many(&inactive) {
            visitor.too_many()?;
        }
        for ((at, len), times) in &inactive {
            let (at, len, times) = (*at, *len, *times);
            visitor.found(&Found { part: MetadataPart::InactiveL1, at, len, times, active: false, entry: None })?;
        }
        for bitmap in self.bitmap_list() {
            let Table { at, len, .. } = bitmap_table(&bitmap);
            visitor.found(&Found { part: MetadataPart::BitmapTable, at, len, times: 1, active: true, entry: None })?;
        }
        Ok(inactive)
    }

    fn walk_l1s(
        &self,
        visitor: &mut dyn Visitor,
        inactive: BTreeMap<(u64, u64), u32>,
        tables: &mut BTreeMap<u64, Sharing>,
    ) -> Result<()> {
        self.walk_l1(visitor, self.l1(), Sharing { times: 1, active: true }, tables)?;
        if too_many(&inactive) {
            return visitor.too_many();
        }
        for ((at, len), times) in inactive {
            if self.geometry.in_cluster(at) == 0 {
                self.walk_l1(
                    visitor,
                    Table { kind: TableKind::L1, at, len },
                    Sharing { times, active: false },
                    tables,
                )?;
            }
        }
        Ok(())
    }

    fn walk_l1(
        &self,
        visitor: &mut dyn Visitor,
        l1: Table,
        sharing: Sharing,
        tables: &mut BTreeMap<u64, Sharing>,
    ) -> Result<()> {
        let part = if sharing.active { MetadataPart::ActiveL2 } else { MetadataPart::InactiveL2 };
        let (len, Sharing { times, active }) = (self.geometry.cluster_size(), sharing);
        self.each_word(l1, |index, word| {
            let at = word & OFFSET_MASK;
            if at == 0 {
                return Ok(());
            }
            if self.geometry.in_cluster(at) == 0 {
                let seen = tables.entry(at).or_default();
                seen.times = seen.times.saturating_add(times);
                seen.active |= active;
            }
            visitor.found(&Found {
                part,
                at,
                len,
                times,
                active,
                entry: Some(TableEntry { table: l1, index, word_index: index, word, subclusters: None }),
            })
        })
    }

    fn walk_bitmaps(&self, visitor: &mut dyn Visitor) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        for bitmap in self.bitmap_list() {
            let table = bitmap_table(&bitmap);
            if !self.geometry.places(table.at, table.len) {
                continue;
            }
            let found = |part, at, len, entry| Found { part, at, len, times: 1, active: true, entry };
            self.each_word(table, |index, word| match word & OFFSET_MASK {
                0 => Ok(()),
                at => visitor.found(&found(
                    MetadataPart::BitmapData,
                    at,
                    cluster,
                    Some(TableEntry { table, index, word_index: index, word, subclusters: None }),
                )),
            })?;
        }
        Ok(())
    }

    fn walk_refcounts(&self, visitor: &mut dyn Visitor) -> Result<()> {
        let (table, len) = (self.refcount_table(), self.geometry.cluster_size());
        self.each_word(table, |index, word| match word & REFCOUNT_OFFSET_MASK {
            0 => Ok(()),
            at => {
                let entry = Some(TableEntry { table, index, word_index: index, word, subclusters: None });
                visitor.found(&Found { part: MetadataPart::RefcountBlock, at, len, times: 1, active: true, entry })
            }
        })
    }

    fn walk_l2(&self, visitor: &mut dyn Visitor, at: u64, sharing: Sharing) -> Result<()> {
        let (table, cluster) = (self.l2(at), self.geometry.cluster_size());
        let (words, per_entry) = if self.geometry.extended { (2, 2) } else { (1, 1) };
        let Sharing { times, active } = sharing;
        self.each_entry(table, words, |index, words| {
            let word = words[0];
            let (part, at, len) = match word {
                _ if word & COMPRESSED != 0 => {
                    let (at, len) = self.geometry.compressed(word);
                    (MetadataPart::Compressed, at, len)
                }
                _ if word & OFFSET_MASK != 0 => (MetadataPart::Data, word & OFFSET_MASK, cluster),
                _ => return Ok(()),
            };
            let subclusters = words.get(1).copied();
            let entry = Some(TableEntry { table, index, word_index: index * per_entry, word, subclusters });
            visitor.found(&Found { part, at, len, times, active, entry })
        })
    }

    /// The words of a table that are not zero, piece by piece, without a lock; a hole is passed over.
    pub(super) fn each_word(&self, table: Table, mut look: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        self.each_entry(table, 1, |index, words| look(index, words[0]))
    }

    /// The same, for entries of so many words, of which a piece holds whole ones.
    fn each_entry(&self, table: Table, words: usize, mut look: impl FnMut(u64, &[u64]) -> Result<()>) -> Result<()> {
        let file = self.file();
        let place = || Place::of_table(Operation::Status, &file.name, table.kind.name(), table.at);
        let extent = file.storage.extent(table.at, table.len.max(1)).at(place)?;
        if extent.is_zero() && extent.len >= table.len && !self.tables.is_dirty() {
            return Ok(());
        }
        let mut from = 0;
        let mut piece = Vec::new();
        while from < table.len {
            let len = self.tables.view(table, from, |bytes| {
                piece.clear();
                piece.extend(layout::words(bytes));
                bytes.len() as u64
            })?;
            let first = from / ENTRY / words as u64;
            for (index, entry) in (first..).zip(piece.chunks_exact(words)).filter(|(_, entry)| entry[0] != 0) {
                look(index, entry)?;
            }
            from += len.max(1);
        }
        Ok(())
    }
}

fn bitmap_table(bitmap: &Bitmap) -> Table {
    let fields = &bitmap.fields;
    Table { kind: TableKind::L1, at: fields.table_offset, len: u64::from(fields.table_size) * ENTRY }
}
