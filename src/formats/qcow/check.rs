//! Checks the tables of a qcow image: all that they name lies in the file, and nothing over anything else.
//!
//! Mended is what lies behind all that is named: it is cut off. An entry that leads nowhere, or to where something else
//! is, says nothing of where the data would be.

use super::QcowDriver;
use super::layout::{HEADER_BYTES, QcowEntry};
use super::tables::QcowState;
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{Check, CheckReport, Error, Findings, Fix, Result};
use crate::formats::claims::Claims;
use crate::formats::runs::Runs;
use crate::storage::{Preallocation, Storage};

/// The most L2 tables that are looked at, in 32 MiB of memory: those of 4 TiB in the usual clusters.
const MOST_TABLES: usize = 1 << 21;
/// The longest file that is looked at: as many walks of its tables as it has windows.
const LONGEST: u64 = 64 << 40;

/// An L2 table that lies in the file, over no other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct L2Place {
    at: u64,
    /// Its L1 index.
    number: u64,
}

impl Check for QcowDriver {
    fn check(&self, fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let storage = self.storage();
        let mut state = self.state();
        let mut tally = Tally::new(findings);
        self.look(&mut state, storage, &mut tally)?;
        if fix.leaks() && tally.report.leaks > 0 {
            storage.flush().context("Could not flush")?;
            storage.set_len(tally.report.image_end, Preallocation::Off).context("Could not shorten the file")?;
            storage.flush().context("Could not flush")?;
            state.forget_end();
            tally.gave_back();
        }
        Ok(tally.report)
    }
}

impl QcowDriver {
    fn look(&self, state: &mut QcowState, storage: &dyn Storage, tally: &mut Tally<'_>) -> Result<()> {
        let length = storage.len().context("Could not get the size of the file")?;
        let (l1_at, l1_bytes) = (state.header.l1_offset(), state.l1_entries() * 8);
        let mut metadata = vec![(0, HEADER_BYTES as u64), (l1_at, l1_bytes)];
        metadata.extend(state.header.backing().map(|(at, length)| (at, length.into())));
        let mut runs = Runs::default();
        metadata.iter().for_each(|(at, len)| runs.add(*at, *len));
        if runs.disjoint().is_none() {
            tally.wrong("header, name of the backing file and L1 table overlap");
        }
        if l1_at + l1_bytes > length {
            tally.wrong(format!("L1 table at offset {l1_at} lies past the end of the file"));
            return Ok(());
        }
        let tables = l2_tables(state, storage, length, tally)?;
        let mut end = metadata.iter().map(|(at, len)| at.saturating_add(*len)).max().unwrap_or(0);
        self.look_at_clusters(state, storage, length, &tables, &mut end, tally)?;
        if end > LONGEST {
            return Err(Error::unsupported(format!("images of more than {} TiB cannot be checked", LONGEST >> 40)));
        }
        for mut claims in Claims::windows(end) {
            for (at, len) in &metadata {
                claims.claim(*at, *len);
            }
            for L2Place { at, number } in &tables {
                if !claims.claim(*at, state.table_entries() * 8) {
                    tally.wrong(format!("L2 table {number} at offset {at} overlaps what else is there"));
                }
            }
            each_cluster(state, storage, &tables, |index, entry| {
                let (at, len) = self.place(entry);
                if at.saturating_add(len) <= length && !claims.claim(at, len) {
                    tally.wrong(format!("cluster {index} at offset {at} overlaps what else is there"));
                }
            })?;
        }
        tally.report.image_end = end;
        let leaked = length.saturating_sub(end) / self.cluster;
        // Where something is wrong, what nothing names may be what an entry named.
        if leaked > 0 && tally.report.corruptions == 0 && !storage.facts().fixed_len {
            tally.leaked(leaked, format!("{leaked} clusters at the end of the file"));
        }
        Ok(())
    }

    fn place(&self, entry: QcowEntry) -> (u64, u64) {
        match entry {
            QcowEntry::Unallocated => (0, 0),
            QcowEntry::Plain(at) => (at, self.cluster),
            QcowEntry::Compressed(at, bytes) => (at, bytes),
        }
    }

    /// Counts the clusters, finds those that are not in the file, and the end of the others.
    fn look_at_clusters(
        &self,
        state: &mut QcowState,
        storage: &dyn Storage,
        length: u64,
        tables: &[L2Place],
        end: &mut u64,
        tally: &mut Tally<'_>,
    ) -> Result<()> {
        let table_bytes = state.table_entries() * 8;
        for table in tables {
            *end = (*end).max(table.at + table_bytes);
        }
        let total = self.virtual_size().div_ceil(self.cluster);
        let mut previous = None;
        tally.report.total_clusters = total;
        each_cluster(state, storage, tables, |index, entry| {
            let (at, len) = self.place(entry);
            let compressed = matches!(entry, QcowEntry::Compressed(..));
            if index < total {
                let apart = previous.is_some_and(|previous| previous != at);
                let report = &mut tally.report;
                report.allocated_clusters += 1;
                report.compressed_clusters += u64::from(compressed);
                report.fragmented_clusters += u64::from(compressed || apart);
                previous = Some(at.saturating_add(len));
            }
            let last = at.saturating_add(len);
            if len == 0 {
                tally.wrong(format!("compressed cluster {index} at offset {at} has no data"));
            } else if last > length {
                tally.wrong(format!("cluster {index} at offset {at} lies past the end of the file"));
            } else {
                if !compressed && !at.is_multiple_of(512) {
                    tally.wrong(format!("cluster {index} at offset {at} does not begin with a sector"));
                }
                *end = (*end).max(last);
            }
        })
    }
}

/// The L2 tables that can be walked. What is wrong with others is told: a table is walked once.
fn l2_tables(state: &mut QcowState, storage: &dyn Storage, length: u64, tally: &mut Tally<'_>) -> Result<Vec<L2Place>> {
    let (mut tables, bytes) = (Vec::new(), state.table_entries() * 8);
    for number in 0..state.l1_entries() {
        let at = state.l2_table(storage, number)?;
        if at == 0 {
            continue;
        }
        if at.checked_add(bytes).is_none_or(|end| end > length) {
            tally.wrong(format!("L2 table {number} at offset {at} lies past the end of the file"));
        } else if tables.len() == MOST_TABLES {
            return Err(Error::unsupported(format!("images of more than {MOST_TABLES} L2 tables cannot be checked")));
        } else {
            tables.push(L2Place { at, number });
        }
    }
    tables.sort_unstable();
    let mut end = 0;
    tables.retain(|L2Place { at, number }| {
        let apart = *at >= end;
        if apart {
            end = at + bytes;
        } else {
            tally.wrong(format!("L2 table {number} at offset {at} overlaps another one"));
        }
        apart
    });
    tables.sort_unstable_by_key(|table| table.number);
    Ok(tables)
}

/// Gives `see` every cluster that those tables have an entry for, with its number.
fn each_cluster(
    state: &mut QcowState,
    storage: &dyn Storage,
    tables: &[L2Place],
    mut see: impl FnMut(u64, QcowEntry),
) -> Result<()> {
    let (entries, cluster) = (state.table_entries(), 1u64 << state.header.cluster_bits());
    for L2Place { number, .. } in tables {
        let (mut index, last) = (number * entries, (number + 1) * entries);
        while index < last {
            let (entry, run) = state.run(storage, index, last - index)?;
            match entry {
                QcowEntry::Unallocated => {}
                QcowEntry::Plain(at) => {
                    for n in 0..run {
                        see(index + n, QcowEntry::Plain(at.saturating_add(n * cluster)));
                    }
                }
                entry => see(index, entry),
            }
            index += run;
        }
    }
    Ok(())
}
