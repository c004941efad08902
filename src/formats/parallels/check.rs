//! Checks the header and the BAT of a Parallels image, in the reference's words: it was closed, its data offset can be
//! one, every cluster lies in the file behind the BAT, none over another, and nothing lies behind the last one.
//!
//! Mended is all of it: the mark goes, the offset is set, an entry that leads outside becomes unallocated, of two guest
//! clusters that share a place one gets a copy of its own, what nothing names at the end is cut off. A copy is made
//! before its entry changes.

use super::ParallelsDriver;
use super::layout::SECTOR;
use super::table::ParallelsState;
use crate::block::error::Context;
use crate::block::io::move_stored;
use crate::block::{Check, CheckReport, Error, Findings, Fix, GuestOffset, HostPlace, Result};
use crate::formats::claims::Claims;
use crate::formats::one_file::Tables;
use crate::storage::{Preallocation, Storage};

/// The most clusters of a file that are looked at, in 128 MiB of bits: 1 PiB of the usual ones.
const MOST_CLUSTERS: u64 = 1 << 30;

/// The places of clusters in the file, counted from where the data starts.
#[derive(Debug, Default)]
struct Slots {
    used: Vec<u64>,
}

impl Slots {
    fn mark(&mut self, slot: u64) {
        let Ok(word) = usize::try_from(slot / 64) else { return };
        if word >= self.used.len() {
            self.used.resize(word + 1, 0);
        }
        self.used[word] |= 1 << (slot % 64);
    }

    /// The lowest free one, which is taken.
    fn take(&mut self) -> u64 {
        let word = self.used.iter().position(|word| *word != u64::MAX).unwrap_or(self.used.len());
        let bit = self.used.get(word).map_or(0, |word| word.trailing_ones());
        let slot = word as u64 * 64 + u64::from(bit);
        self.mark(slot);
        slot
    }
}

/// What was found, and is to be mended.
#[derive(Debug, Default)]
struct ParallelsLook {
    report: CheckReport,
    /// The mark that it was not closed is all that is wrong.
    only_in_use: bool,
    /// What may be mended is mended: nothing is cut within a sector, of which nothing can be made.
    mends: bool,
    /// The data offset that there should be, in sectors.
    data_offset: Option<u64>,
    /// Where the data starts, in bytes.
    start: u64,
    /// Clusters of the disk that lie outside the file.
    outside: Vec<u64>,
    /// Those that lie over others.
    duplicates: Vec<u64>,
    slots: Slots,
}

impl Check for ParallelsDriver {
    fn check(&self, fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let storage = self.storage();
        let mut state = self.state();
        state.write_tables(storage)?;
        state.forget();
        let look = self.look(&mut state, fix, findings)?;
        let (mut report, only_in_use) = (look.report, look.only_in_use);
        if look.mends && report.corruptions > 0 {
            self.mend(&mut state, look)?;
            report.corruptions_fixed = std::mem::take(&mut report.corruptions);
        }
        if report.leaks_fixed > 0 {
            state.mark(storage)?;
            let end = self.end(&mut state)?;
            storage.set_len(end, Preallocation::Off).context("Could not shorten the file")?;
        }
        if fix.is_asked_for() {
            state.forget();
            state.unmark(storage)?;
            if only_in_use && state.header.is_in_use() {
                let mut header = state.header.clone();
                header.set_in_use(false);
                state.replace_header(storage, header)?;
            }
            storage.flush().context("Could not flush")?;
        }
        Ok(report)
    }
}

/// What is wrong, or is going to be mended.
fn tell(findings: &dyn Findings, mended: bool, text: &str) {
    findings.line(&format!("{} {text}", if mended { "Repairing" } else { "ERROR" }));
}

impl ParallelsDriver {
    fn look(&self, state: &mut ParallelsState, fix: Fix, findings: &dyn Findings) -> Result<ParallelsLook> {
        let (storage, cluster) = (self.storage(), self.cluster);
        let there = storage.len().context("Could not get the size of the file")?;
        let length = there.checked_next_multiple_of(SECTOR).unwrap_or(there);
        let cut = cut_cluster(state, storage, there, length)?;
        let mends = fix.corruptions() && cut.is_none();
        let mut look = ParallelsLook { mends, ..ParallelsLook::default() };
        look.report.total_clusters = state.header.entries();
        if let Some(index) = cut {
            tell(findings, false, &format!("cluster {index} is cut off by the end of the file"));
            look.report.corruptions += 1;
        }
        let in_use = state.header.is_in_use();
        if in_use {
            tell(findings, mends, "image was not closed correctly");
            look.report.corruptions += 1;
        }
        look.data_offset = wrong_data_offset(state, storage, length)?;
        if look.data_offset.is_some() {
            tell(findings, mends, "data_off field has incorrect value");
            look.report.corruptions += 1;
        }
        look.start = look.data_offset.map_or_else(|| state.header.data_start(length), |sectors| sectors * SECTOR);
        if length.saturating_sub(look.start) / cluster > MOST_CLUSTERS {
            return Err(Error::unsupported(format!("images of more than {MOST_CLUSTERS} clusters cannot be checked")));
        }
        let is_inside = |at: u64| at >= look.start && at.checked_add(cluster).is_some_and(|end| end <= length);
        let (report, outside, slots) = (&mut look.report, &mut look.outside, &mut look.slots);
        let (mut end, mut previous) = (0, None);
        state.each_run(storage, |index, at, run| {
            report.allocated_clusters += run;
            // Those behind a cluster that is not there are not apart from anything.
            let apart = previous.is_some_and(|(next, end)| next == index && end != at);
            report.fragmented_clusters += u64::from(apart);
            previous = Some((index + run, at.saturating_add(run * cluster)));
            for n in 0..run {
                let at = at + n * cluster;
                if is_inside(at) {
                    end = end.max(at + cluster);
                    // One that does not lie at a whole cluster is in two places.
                    slots.mark((at - look.start) / cluster);
                    slots.mark((at - look.start).div_ceil(cluster));
                } else {
                    tell(findings, mends, &format!("cluster {} is outside image", index + n));
                    report.corruptions += 1;
                    outside.push(index + n);
                }
            }
            true
        })?;
        let end = if end == 0 { look.start } else { end };
        report.image_end = end;
        if length > end && !storage.facts().fixed_len {
            // Of a cluster that is not there as a whole, that is what there is.
            let gives_back = fix.leaks() && (look.outside.is_empty() || mends);
            tell(findings, gives_back, &format!("space leaked at the end of the image {}", length - end));
            let leaks = (length - end).div_ceil(cluster);
            if gives_back {
                report.leaks_fixed += leaks;
            } else {
                report.leaks += leaks;
            }
        }
        let duplicates = &mut look.duplicates;
        for mut claims in Claims::windows(end) {
            state.each_run(storage, |index, at, run| {
                for n in 0..run {
                    let at = at + n * cluster;
                    if is_inside(at) && !claims.claim(at, cluster) {
                        tell(findings, mends, &format!("duplicate offset in BAT entry {}", index + n));
                        report.corruptions += 1;
                        duplicates.push(index + n);
                    }
                }
                true
            })?;
        }
        look.only_in_use = in_use && look.report.corruptions == 1;
        Ok(look)
    }

    fn mend(&self, state: &mut ParallelsState, mut look: ParallelsLook) -> Result<()> {
        let (storage, cluster) = (self.storage(), self.cluster);
        state.mark(storage)?;
        for index in look.outside {
            state.set(storage, index, 1, 0)?;
        }
        state.write_tables(storage)?;
        for index in look.duplicates {
            let (from, _) = state.run(storage, index, 1)?;
            let to = look.start + look.slots.take() * cluster;
            let end = to + cluster;
            if !storage.facts().fixed_len && storage.len().context("Could not get the size of the file")? < end {
                storage.set_len(end, Preallocation::Off).context("Could not extend the file")?;
            }
            move_stored(self, HostPlace::main(from), HostPlace::main(to), GuestOffset(index * cluster), cluster)
                .context("Could not move a cluster")?;
            state.set(storage, index, 1, to)?;
            state.write_tables(storage)?;
        }
        storage.flush().context("Could not flush")?;
        let mut header = state.header.clone();
        if let Some(sectors) = look.data_offset {
            header.set_data_offset(sectors);
        }
        header.set_in_use(false);
        state.replace_header(storage, header)
    }

    /// Where the last cluster ends.
    fn end(&self, state: &mut ParallelsState) -> Result<u64> {
        let (mut end, cluster) = (state.data_start(self.storage())?, self.cluster);
        state.each_run(self.storage(), |_, at, run| {
            end = end.max(at.saturating_add(run * cluster));
            true
        })?;
        Ok(end)
    }
}

/// The cluster that ends within the last sector of the file, of which a part is missing.
fn cut_cluster(state: &mut ParallelsState, storage: &dyn Storage, there: u64, length: u64) -> Result<Option<u64>> {
    let mut cut = None;
    if there < length {
        let cluster = state.header.cluster();
        state.each_run(storage, |index, at, run| {
            for n in 0..run {
                let end = at.saturating_add((n + 1).saturating_mul(cluster));
                if there < end && end <= length {
                    cut = Some(index + n);
                }
            }
            cut.is_none()
        })?;
    }
    Ok(cut)
}

/// The data offset that there should be, in sectors, where it is another one: it cannot be one, or clusters lie before it
/// that lie behind the BAT.
fn wrong_data_offset(state: &mut ParallelsState, storage: &dyn Storage, length: u64) -> Result<Option<u64>> {
    let header = state.header.clone();
    let least = header.least_data_offset();
    if !header.is_data_offset_right(length) {
        return Ok(Some(least));
    }
    let (start, mut lowest) = (header.data_start(length), u64::MAX);
    state.each_run(storage, |_, at, _| {
        if at >= least * SECTOR {
            lowest = lowest.min(at);
        }
        true
    })?;
    Ok((lowest < start).then_some(if header.counts_clusters() { least } else { lowest / SECTOR }))
}
