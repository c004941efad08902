//! Everything that refers to a cluster, counted; and what is wrong with the entries themselves.

use std::collections::BTreeMap;

use crate::block::{Error, Result};

use super::super::bitmap::is_table_entry;
use super::super::geometry::ClusterIndex;
use super::super::guard::MOST_DECODED;
use super::super::layout::{
    self, COMPRESSED, COPIED, ENTRY, L1_RESERVED, L2_RESERVED, MAX_L1_BYTES, OFFSET_MASK, REFCOUNT_OFFSET_MASK,
    REFCOUNT_RESERVED, ZERO,
};
use super::super::references::References;
use super::Checker;

/// Most entries of L1 tables that are gone through.
const MOST_ENTRIES: u64 = 1 << 26;
/// How often a table with something wrong in it is gone through again, to tell of it again.
const MOST_REPEATS: u32 = 64;

/// What a count came to.
pub(super) struct Count {
    /// References to each cluster. Those of the refcount structures too.
    pub references: References,
    /// Clusters of what reaches past the end of the file, which are in no count.
    pub cut: References,
    /// Every entry of the active tables with a place for itself has the mark that says so.
    pub all_marked: bool,
}

/// A count that is under way.
struct Tally {
    references: References,
    cut: References,
    /// The first cluster of which the file lacks something that is not made anew from what else is there.
    missing: Option<ClusterIndex>,
    all_marked: bool,
    /// Clusters whose L2 table has nothing wrong in it.
    sound: References,
    /// How often other L2 tables were gone through, by their offsets.
    damaged: BTreeMap<u64, u32>,
    /// L2 tables that are still to be counted: how often for the active L1 table, and for snapshots.
    repeated: BTreeMap<u64, [u32; 2]>,
    entries: u64,
    /// Compressed clusters that were decoded.
    decoded: u32,
    table: Vec<u8>,
}

impl Tally {
    /// Something is missing from that cluster on.
    fn lacks(&mut self, cluster: ClusterIndex) {
        self.missing = Some(self.missing.map_or(cluster, |first| first.min(cluster)));
    }
}

/// Clusters in a row that are referred to one after the other.
#[derive(Default)]
struct Row {
    at: u64,
    len: u64,
}

/// How an L2 table is gone through.
#[derive(Clone, Copy)]
struct Pass {
    active: bool,
    times: u32,
    mend: bool,
}

impl Checker<'_> {
    /// Counts. With `mend`, entries that can be mended without a look at anything else are.
    pub(super) fn count(&mut self, mend: bool) -> Result<Count> {
        // A reference may reach into the cluster behind the last one of the file.
        let limit = self.clusters() + 1;
        let mut tally = Tally {
            references: References::new(limit, self.geometry.refcount_max()),
            cut: References::new(limit, 1),
            missing: None,
            all_marked: true,
            sound: References::new(limit, 1),
            damaged: BTreeMap::new(),
            repeated: BTreeMap::new(),
            entries: 0,
            decoded: 0,
            table: Vec::new(),
        };
        let header = self.driver.header().clone();
        let fields = header.fields;
        self.report.total_clusters = fields.size.div_ceil(self.geometry.cluster_size());
        self.region(&mut tally, 0, self.geometry.cluster_size(), 1);
        self.l1(&mut tally, fields.l1_table_offset, u64::from(fields.l1_size), true, mend)?;
        self.snapshot_l1s(&mut tally, mend)?;
        self.known_table(&mut tally, "Snapshot table", self.snapshots.at, self.snapshots.bytes);
        if let Some((at, len)) = header.crypto {
            self.region(&mut tally, at, len, 1);
        }
        let table = self.driver.refcount_table();
        self.known_table(&mut tally, "Refcount table", table.at, table.len);
        self.bitmaps(&mut tally)?;
        self.repeats(&mut tally)?;
        self.refcount_blocks(&mut tally, mend)?;
        let Tally { references, cut, missing, all_marked, .. } = tally;
        self.missing = missing;
        Ok(Count { references, cut, all_marked })
    }

    /// The cluster behind the last one that the file has, perhaps in part.
    pub(super) fn clusters(&self) -> ClusterIndex {
        ClusterIndex(self.file.div_ceil(self.geometry.cluster_size()))
    }

    /// The same, with the one behind them if anything reaches into it.
    pub(super) fn clusters_in_use(&self, references: &References) -> ClusterIndex {
        let clusters = self.clusters();
        clusters + u64::from(references.get(clusters) > 0)
    }

    /// A reference to each cluster of a run of bytes, which must lie in the file, all but less than a cluster of it.
    fn region(&mut self, tally: &mut Tally, at: u64, len: u64, times: u32) {
        if len == 0 {
            return;
        }
        let (geometry, cluster) = (self.geometry, self.geometry.cluster_size());
        let end = at.saturating_add(len);
        if end.saturating_sub(self.file) >= cluster {
            for _ in 0..times {
                self.wrong(&format!(
                    "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                     offset {at:#x} size {len:#x}"
                ));
            }
            let first = geometry.cluster_of(at);
            tally.cut.add(first, geometry.cluster_of(end - 1), 1);
            tally.lacks(first.max(self.clusters()));
            return;
        }
        let (findings, mut full) = (self.findings, 0);
        let (first, last) = (geometry.cluster_of(at), geometry.cluster_of(end - 1));
        let table = self.snapshots.clusters(&geometry);
        let crowded = &mut self.snapshots.crowded;
        tally.references.add_each(first, last, times, &mut |cluster| {
            full += 1;
            if table.contains(&cluster) {
                crowded.insert(cluster);
            }
            findings.line(&format!("ERROR: overflow cluster offset={:#x}", geometry.offset_of(cluster)));
            findings.line(
                "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy \
                 if the image cannot be opened for writing",
            );
        });
        self.lines += full;
        self.report.corruptions += full;
    }

    /// A reference to each cluster of a table, all of which must lie in the file: nobody leaves out a part of one.
    fn table(&mut self, tally: &mut Tally, what: &str, at: u64, len: u64) {
        self.region(tally, at, len, 1);
        if self.is_cut(at, len) {
            self.wrong(&format!("ERROR: {what} at offset {at:#x} is cut off by the end of the file"));
            tally.lacks(self.geometry.cluster_of(self.file));
        }
    }

    /// The same of one whose content is known, or will be: nothing is lost with it.
    fn known_table(&mut self, tally: &mut Tally, what: &str, at: u64, len: u64) {
        let missing = tally.missing;
        self.table(tally, what, at, len);
        tally.missing = missing;
    }

    /// Whether a run of bytes ends past the end of the file, by less than [`region`](Self::region) tells of.
    fn is_cut(&self, at: u64, len: u64) -> bool {
        let past = at.saturating_add(len).saturating_sub(self.file);
        len > 0 && past > 0 && past < self.geometry.cluster_size()
    }

    /// An L1 table's L2 tables.
    fn l1(&mut self, tally: &mut Tally, at: u64, entries: u64, active: bool, mend: bool) -> Result<()> {
        tally.entries = tally.entries.saturating_add(entries);
        if tally.entries > MOST_ENTRIES {
            return Err(Error::unsupported("The image has too many snapshots to be checked"));
        }
        self.table(tally, "L1 table", at, entries * ENTRY);
        let cluster = self.geometry.cluster_size();
        self.each_word(at, entries, |checker, _, word| {
            let l2 = word & OFFSET_MASK;
            if active {
                tally.all_marked &= word & COPIED != 0;
            }
            if word & L1_RESERVED != 0 {
                checker.wrong(&format!("ERROR found L1 entry with reserved bits set: {word:x}"));
            }
            checker.table(tally, "L2 table", l2, cluster);
            if checker.geometry.in_cluster(l2) != 0 {
                checker.wrong(&format!("ERROR l2_offset={l2:x}: Table is not cluster aligned; L1 entry corrupted"));
            }
            checker.l2(tally, l2, active, mend)
        })
    }

    /// An L2 table, now or, if it was gone through already and there is nothing to tell of it, later.
    fn l2(&mut self, tally: &mut Tally, at: u64, active: bool, mend: bool) -> Result<()> {
        if at >= self.file {
            return Ok(());
        }
        let aligned = self.geometry.in_cluster(at) == 0;
        let cluster = self.geometry.cluster_of(at);
        // In a narrow count a table that comes again may be what is too much.
        let roomy = self.geometry.refcount_order >= 4 || tally.repeated.len() as u64 > 4096;
        let known = tally.damaged.get(&at).copied().unwrap_or(0);
        if known >= MOST_REPEATS || aligned && roomy && known == 0 && tally.sound.get(cluster) > 0 {
            let times = tally.repeated.entry(at).or_default();
            let times = if active { &mut times[0] } else { &mut times[1] };
            *times = times.saturating_add(1);
            return Ok(());
        }
        let lines = self.lines;
        self.l2_entries(tally, at, Pass { active, times: 1, mend })?;
        if self.lines != lines || !aligned {
            *tally.damaged.entry(at).or_default() += 1;
        } else {
            tally.sound.add(cluster, cluster, 1);
        }
        Ok(())
    }

    /// The L2 tables that came again.
    fn repeats(&mut self, tally: &mut Tally) -> Result<()> {
        for (at, times) in std::mem::take(&mut tally.repeated) {
            for (active, times) in [(true, times[0]), (false, times[1])] {
                if times > 0 {
                    self.l2_entries(tally, at, Pass { active, times, mend: false })?;
                }
            }
        }
        Ok(())
    }

    fn l2_entries(&mut self, tally: &mut Tally, at: u64, pass: Pass) -> Result<()> {
        let (geometry, cluster) = (self.geometry, self.geometry.cluster_size());
        let mut table = std::mem::take(&mut tally.table);
        self.read(at, cluster, &mut table)?;
        let per_entry = usize::from(geometry.extended) + 1;
        let data_file = self.driver.data_file_len()?;
        let (mut row, mut next) = (Row::default(), 0);
        let words = table.as_chunks::<8>().0;
        for (index, entry) in words.chunks_exact(per_entry).enumerate() {
            let word = entry.first().map_or(0, |word| u64::from_be_bytes(*word));
            let bitmap = entry.get(1).map_or(0, |word| u64::from_be_bytes(*word));
            if word == 0 && bitmap == 0 {
                continue;
            }
            if word & COMPRESSED != 0 {
                self.end_row(tally, &mut row, pass);
                self.compressed(tally, index as u64, word, bitmap, pass)?;
                continue;
            }
            let offset = word & OFFSET_MASK;
            let simple = word & L2_RESERVED == 0 && geometry.in_cluster(offset) == 0 && bitmap & bitmap >> 32 == 0;
            if !simple {
                self.end_row(tally, &mut row, pass);
            }
            let entry_at = at + index as u64 * geometry.l2_entry();
            if !self.plain(word, bitmap, (at, entry_at), pass)? {
                continue;
            }
            if pass.active {
                tally.all_marked &= word & COPIED != 0;
                self.report.allocated_clusters += u64::from(pass.times);
                if next != 0 && offset != next {
                    self.report.fragmented_clusters += u64::from(pass.times);
                }
                next = offset + cluster;
            }
            if self.driver.external {
                let zeros = if geometry.extended { bitmap & u64::from(u32::MAX) == 0 } else { word & ZERO != 0 };
                if data_file.is_some_and(|len| offset >= len) && !zeros {
                    self.wrong(&format!("ERROR: cluster at offset {offset:#x} lies past the end of the data file"));
                }
                continue;
            }
            let inside = offset.saturating_add(cluster).saturating_sub(self.file) < cluster;
            if simple && inside && row.len > 0 && offset == row.at + row.len {
                row.len += cluster;
                continue;
            }
            self.end_row(tally, &mut row, pass);
            if simple && inside {
                row = Row { at: offset, len: cluster };
            } else {
                self.region(tally, offset, cluster, pass.times);
            }
        }
        self.end_row(tally, &mut row, pass);
        tally.table = table;
        Ok(())
    }

    fn end_row(&mut self, tally: &mut Tally, row: &mut Row, pass: Pass) {
        self.region(tally, row.at, row.len, pass.times);
        row.len = 0;
    }

    /// A compressed cluster's entry.
    fn compressed(&mut self, tally: &mut Tally, index: u64, word: u64, bitmap: u64, pass: Pass) -> Result<()> {
        let (at, len) = self.geometry.compressed_as_told(word);
        if word & COPIED != 0 {
            self.wrong(&format!("ERROR: coffset={at:#x}: copied flag must never be set for compressed clusters"));
        }
        let shown = word & !COPIED;
        if self.driver.external {
            self.wrong(&format!("ERROR compressed cluster {index} with data file, entry={shown:#x}"));
            return Ok(());
        }
        if bitmap != 0 {
            self.wrong(&format!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={shown:#x}"
            ));
            return Ok(());
        }
        self.region(tally, at, len, pass.times);
        let cut = self.is_cut(at, len);
        tally.decoded += u32::from(cut && tally.decoded < MOST_DECODED);
        if cut && (tally.decoded >= MOST_DECODED || !self.driver.decodes(at, len, self.file)?) {
            self.wrong(&format!("ERROR: compressed cluster at offset {at:#x} is cut off by the end of the file"));
            tally.lacks(self.geometry.cluster_of(self.file));
        }
        if pass.active {
            let times = u64::from(pass.times);
            self.report.allocated_clusters += times;
            self.report.compressed_clusters += times;
            self.report.fragmented_clusters += times;
        }
        Ok(())
    }

    /// What is wrong with the entry of a cluster that is not compressed; whether it has a place that counts.
    fn plain(&mut self, word: u64, bitmap: u64, (table_at, entry_at): (u64, u64), pass: Pass) -> Result<bool> {
        let geometry = self.geometry;
        let offset = word & OFFSET_MASK;
        if word & L2_RESERVED != 0 {
            self.wrong(&format!("ERROR found l2 entry with reserved bits set: {word:x}"));
        }
        // In an external data file a cluster may lie at the start.
        let placed = offset != 0 || self.driver.external && word & COPIED != 0;
        if !placed {
            if bitmap & 0xffff_ffff != 0 {
                self.wrong("ERROR: Unallocated cluster has non-zero subcluster allocation map");
            }
            return Ok(false);
        }
        if bitmap & bitmap >> 32 & 0xffff_ffff != 0 {
            self.wrong(&format!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
        if geometry.in_cluster(offset) == 0 {
            return Ok(true);
        }
        // Version 2 has no such mark, and the reference sees it all the same.
        let zeroed = if geometry.extended { bitmap & 0xffff_ffff == 0 } else { word & ZERO != 0 };
        if !zeroed {
            self.wrong(&format!("ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."));
            return Ok(true);
        }
        self.wrong_or_mended(
            pass.mend,
            &format!("offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."),
        );
        if pass.mend {
            self.may_write_l2(table_at)?;
            // It goes on reading as zeros, without a place.
            let word = if geometry.extended { 0 } else { ZERO };
            self.driver.file().write_metadata("L2 table", entry_at, &word.to_be_bytes())?;
        }
        Ok(!pass.mend)
    }

    fn snapshot_l1s(&mut self, tally: &mut Tally, mend: bool) -> Result<()> {
        if self.driver.external && !self.snapshots.entries.is_empty() {
            let line = format!("ERROR {} snapshots in image with data file", self.snapshots.entries.len());
            self.wrong(&line);
        }
        for n in 0..self.snapshots.entries.len() {
            let Some(snapshot) = self.snapshots.entries.get(n) else { break };
            let (at, size) = (snapshot.fields.l1_table_offset, u64::from(snapshot.fields.l1_size));
            let named = |what: &str| {
                format!("ERROR snapshot {} ({}) {what}; snapshot table entry corrupted", snapshot.id, snapshot.name)
            };
            if self.geometry.in_cluster(at) != 0 {
                let line = named(&format!("l1_offset={at:#x}: L1 table is not cluster aligned"));
                self.wrong(&line);
            } else if size * ENTRY > MAX_L1_BYTES {
                let line = named(&format!("l1_size={size:#x}: L1 table is too large"));
                self.wrong(&line);
            } else {
                self.l1(tally, at, size, false, mend)?;
            }
        }
        Ok(())
    }

    fn bitmaps(&mut self, tally: &mut Tally) -> Result<()> {
        let header = self.driver.header().clone();
        // Without the autoclear bit the directory is nothing.
        let Some(place) = header.bitmaps.filter(|_| header.fields.autoclear & layout::BITMAPS != 0) else {
            return Ok(());
        };
        self.table(tally, "Bitmap directory", place.directory_offset, place.directory_size);
        let cluster = self.geometry.cluster_size();
        for bitmap in self.driver.bitmap_list() {
            let (at, entries) = (bitmap.fields.table_offset, u64::from(bitmap.fields.table_size));
            self.table(tally, "Bitmap table", at, entries * ENTRY);
            if !self.geometry.places(at, entries * ENTRY) {
                return Err(Error::corrupt("Input/output error"));
            }
            self.each_word(at, entries, |checker, _, word| {
                let bits = word & OFFSET_MASK;
                if !is_table_entry(&checker.geometry, word) {
                    return Err(Error::corrupt("Invalid argument"));
                }
                if bits != 0 {
                    checker.region(tally, bits, cluster, 1);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn refcount_blocks(&mut self, tally: &mut Tally, mend: bool) -> Result<()> {
        let table = self.driver.refcount_table();
        let cluster = self.geometry.cluster_size();
        self.each_word(table.at, table.len / ENTRY, |checker, index, word| {
            let at = word & REFCOUNT_OFFSET_MASK;
            if word & REFCOUNT_RESERVED != 0 {
                checker.wrong(&format!("ERROR refcount table entry {index} has reserved bits set"));
                checker.give_up_refcounts();
                return Ok(());
            }
            if checker.geometry.in_cluster(at) != 0 {
                checker.wrong(&format!(
                    "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                ));
                checker.give_up_refcounts();
                return Ok(());
            }
            let own = checker.geometry.cluster_of(at);
            if own >= checker.clusters_in_use(&tally.references) {
                // It holds nothing: new refcounts do without.
                let word = if mend { "Repairing" } else { "ERROR" };
                checker.wrong(&format!("{word} refcount block {index} is outside image"));
                if mend {
                    checker.give_up_refcounts();
                }
                return Ok(());
            }
            checker.known_table(tally, "Refcount block", at, cluster);
            let times = tally.references.get(own);
            if times != 1 {
                checker.wrong(&format!("ERROR refcount block {index} refcount={times}"));
                checker.give_up_refcounts();
            }
            Ok(())
        })
    }
}
