//! Checks the tables of a QED image: every table and every cluster that they name lies in the file, behind the header,
//! and nothing over anything else. What is wrong is counted, as the reference counts it, and not told one by one.
//!
//! Mended, as by the reference, is an entry that leads where nothing can be: it becomes unallocated. Where two lead to
//! the same place nothing is mended. The mark that a check is needed goes once nothing is wrong but leaks.

use super::QedDriver;
use super::tables::QedState;
use crate::block::error::Context;
use crate::block::{Check, CheckReport, Error, Findings, Fix, Result};
use crate::formats::one_file::Tables;

/// The most clusters of a file that are looked at, in 128 MiB of bits: 64 TiB of the usual ones.
const MOST_CLUSTERS: u64 = 1 << 30;

/// Which clusters of a file are in use. Memory is taken as far as they are.
struct Clusters {
    count: u64,
    bits: Vec<u64>,
    used: u64,
}

impl Clusters {
    /// Marks clusters of the file; returns how many of them were marked before.
    fn mark(&mut self, first: u64, count: u64) -> u64 {
        let mut twice = 0;
        for cluster in first..first.saturating_add(count).min(self.count) {
            let Ok(word) = usize::try_from(cluster / 64) else { break };
            if word >= self.bits.len() {
                self.bits.resize(word + 1, 0);
            }
            let bit = 1 << (cluster % 64);
            twice += u64::from(self.bits[word] & bit != 0);
            self.used += u64::from(self.bits[word] & bit == 0);
            self.bits[word] |= bit;
        }
        twice
    }
}

impl Check for QedDriver {
    fn check(&self, fix: Fix, _findings: &dyn Findings) -> Result<CheckReport> {
        let storage = self.storage();
        let mut state = self.state();
        state.write_tables(storage)?;
        state.forget();
        let report = self.look(&mut state, fix)?;
        state.write_tables(storage)?;
        if report.corruptions_fixed > 0 {
            storage.flush().context("Could not flush")?;
        }
        if fix.is_asked_for() && report.corruptions == 0 && state.header.needs_check() {
            let mut header = state.header.clone();
            header.set_needs_check(false);
            state.replace_header(storage, header)?;
        }
        Ok(report)
    }
}

impl QedDriver {
    /// Counts, and clears the entries that lead nowhere if anything may be mended.
    fn look(&self, state: &mut QedState, fix: Fix) -> Result<CheckReport> {
        let (storage, cluster) = (self.storage(), self.cluster);
        let length = storage.len().context("Could not get the size of the file")?;
        // Lengths are counted in whole sectors. A cluster that ends within the last one is there, though not as a whole.
        let sectors = length.checked_next_multiple_of(512).unwrap_or(length);
        let count = sectors / cluster;
        if count > MOST_CLUSTERS {
            let text = format!("images of more than {MOST_CLUSTERS} clusters cannot be checked");
            return Err(Error::unsupported(text));
        }
        let header = state.header.clone();
        let is_there = |at: u64, clusters: u64| {
            header.is_place(at) && (at / cluster).checked_add(clusters).is_some_and(|end| end <= count)
        };
        let mut clusters = Clusters { count, bits: Vec::new(), used: 0 };
        let table_clusters = header.table_bytes() / cluster;
        let is_cut = |at: u64, used: u64| at.saturating_add(used) > length;
        clusters.mark(0, header.end() / cluster);
        clusters.mark(header.l1_offset() / cluster, table_clusters);
        let mut report = CheckReport { total_clusters: header.size().div_ceil(cluster), ..CheckReport::default() };
        let wrong = |report: &mut CheckReport| match fix.is_asked_for() {
            true => report.corruptions_fixed += 1,
            false => report.corruptions += 1,
        };
        let mut next = None;
        state.each_table(storage, |state, number, at| {
            if !is_there(at, table_clusters) {
                wrong(&mut report);
                if fix.is_asked_for() {
                    state.set_l2_table(storage, number, 0)?;
                }
                return Ok(true);
            }
            let twice = clusters.mark(at / cluster, table_clusters);
            report.corruptions += twice + u64::from(is_cut(at, state.used_table(number)));
            if twice > 0 {
                return Ok(true);
            }
            let mut lost = Vec::new();
            state.each_run(storage, number, |index, at, run| {
                for n in 0..run {
                    let at = at.saturating_add(n * cluster);
                    report.allocated_clusters += 1;
                    report.fragmented_clusters += u64::from(next.is_some_and(|next| next != at));
                    next = Some(at.saturating_add(cluster));
                    if is_there(at, 1) {
                        let cut = is_cut(at, header.used_cluster(index + n));
                        report.corruptions += clusters.mark(at / cluster, 1) + u64::from(cut);
                    } else {
                        wrong(&mut report);
                        lost.push(index + n);
                    }
                }
                true
            })?;
            if fix.is_asked_for() {
                for index in lost {
                    state.set(storage, index, 1, 0)?;
                }
            }
            Ok(true)
        })?;
        if !storage.facts().fixed_len {
            report.leaks = count.saturating_sub(clusters.used);
        }
        Ok(report)
    }
}
