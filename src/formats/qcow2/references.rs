//! How often each cluster of an image file is referred to, counted in memory.
//!
//! Memory grows with what is referred to, not with the file, and nothing at or past the limit that a count is made with
//! takes any: tables may say what they like. Clusters are counted in pages, one bit each while no cluster of the page
//! has more than one reference (16 TiB in clusters of 64 KiB cost 32 MiB), a byte each from then on, a word once one of
//! them has more than 255, and a page with a few of them costs these few alone.

use std::collections::BTreeMap;

use super::geometry::ClusterIndex;

/// Clusters in a page.
const PAGE: u64 = 4096;
/// Most entries of a page that is kept as a list.
const FEW: usize = 32;

#[derive(Debug)]
enum ReferencePage {
    /// Cluster and count, for a few.
    Few(Vec<(u16, u32)>),
    /// One reference or none.
    Bits(Box<[u64; 64]>),
    /// Up to 255.
    Bytes(Box<[u8]>),
    /// Any number.
    Words(Box<[u32]>),
}

impl ReferencePage {
    fn get(&self, index: u16) -> u32 {
        match self {
            Self::Few(list) => list.iter().find(|(at, _)| *at == index).map_or(0, |(_, count)| *count),
            Self::Bits(bits) => {
                let word = bits.get(usize::from(index / 64)).copied().unwrap_or(0);
                u32::from(word >> (index % 64) & 1 != 0)
            }
            Self::Bytes(bytes) => bytes.get(usize::from(index)).copied().unwrap_or(0).into(),
            Self::Words(words) => words.get(usize::from(index)).copied().unwrap_or(0),
        }
    }

    fn set(&mut self, index: u16, count: u32) {
        loop {
            match self {
                Self::Few(list) => {
                    if let Some(entry) = list.iter_mut().find(|(at, _)| *at == index) {
                        entry.1 = count;
                        return;
                    }
                    if list.len() < FEW {
                        list.push((index, count));
                        return;
                    }
                }
                Self::Bits(bits) if count <= 1 => {
                    if let Some(word) = bits.get_mut(usize::from(index / 64)) {
                        *word = *word & !(1 << (index % 64)) | u64::from(count) << (index % 64);
                    }
                    return;
                }
                Self::Bytes(bytes) if count <= 255 => {
                    if let Some(byte) = bytes.get_mut(usize::from(index)) {
                        *byte = count as u8;
                    }
                    return;
                }
                Self::Words(words) => {
                    if let Some(word) = words.get_mut(usize::from(index)) {
                        *word = count;
                    }
                    return;
                }
                _ => {}
            }
            self.widen(count);
        }
    }

    /// Makes room for a count.
    fn widen(&mut self, count: u32) {
        let most = match self {
            Self::Few(list) => list.iter().map(|(_, count)| *count).max().unwrap_or(0),
            Self::Bits(_) => 1,
            Self::Bytes(_) | Self::Words(_) => 255,
        };
        let counts = (0..PAGE as u16).map(|index| self.get(index));
        *self = match most.max(count) {
            0 | 1 => {
                let mut bits = Box::new([0; 64]);
                for (word, ones) in bits.iter_mut().zip(counts.collect::<Vec<_>>().chunks(64)) {
                    *word = ones.iter().rev().fold(0, |word, one| word << 1 | u64::from(*one));
                }
                Self::Bits(bits)
            }
            2..=255 => Self::Bytes(counts.map(|count| count as u8).collect()),
            _ => Self::Words(counts.collect()),
        };
    }

    /// One reference more for a run, if none of it has any and that is all that is to be noted.
    fn add_first(&mut self, first: u16, last: u16) -> bool {
        if matches!(self, Self::Few(list) if list.is_empty() && usize::from(last - first) >= FEW) {
            *self = Self::Bits(Box::new([0; 64]));
        }
        let Self::Bits(bits) = self else { return false };
        let masks = || {
            (first / 64..=last / 64).map(move |word| {
                let from = if word == first / 64 { first % 64 } else { 0 };
                let to = if word == last / 64 { last % 64 } else { 63 };
                (usize::from(word), u64::MAX << from & u64::MAX >> (63 - to))
            })
        };
        if masks().any(|(word, mask)| bits.get(word).is_none_or(|word| word & mask != 0)) {
            return false;
        }
        for (word, mask) in masks() {
            if let Some(word) = bits.get_mut(word) {
                *word |= mask;
            }
        }
        true
    }

    /// `times` more for a run, if there is a byte for each and no count gets higher than `most`.
    fn add_bytes(&mut self, first: u16, last: u16, times: u32, most: u32) -> bool {
        let Self::Bytes(bytes) = self else { return false };
        let Some(run) = bytes.get_mut(usize::from(first)..=usize::from(last)) else { return false };
        let room = most.min(255).checked_sub(times).and_then(|room| u8::try_from(room).ok());
        if room.is_none_or(|room| run.iter().any(|count| *count > room)) {
            return false;
        }
        run.iter_mut().for_each(|count| *count += times as u8);
        true
    }
}

/// See the module.
#[derive(Debug)]
pub struct References {
    /// What lies at this cluster or behind it is not counted.
    limit: ClusterIndex,
    /// No count gets higher.
    most: u32,
    pages: Vec<ReferencePage>,
    /// Where in `pages` a page is, by its number.
    slots: BTreeMap<u64, usize>,
    /// The page that was looked up last, and where it is.
    last: Option<(u64, usize)>,
}

impl References {
    /// Of the clusters below `limit`; counts stop at `most`.
    pub fn new(limit: ClusterIndex, most: u64) -> Self {
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        Self { limit, most, pages: Vec::new(), slots: BTreeMap::new(), last: None }
    }

    /// From now on every cluster counts, wherever it lies.
    pub fn lift_limit(&mut self) {
        self.limit = ClusterIndex::MAX;
    }

    /// Whether no cluster has more than one reference.
    pub fn is_single(&self) -> bool {
        self.pages.iter().all(|page| match page {
            ReferencePage::Few(list) => list.iter().all(|(_, count)| *count <= 1),
            ReferencePage::Bits(_) => true,
            ReferencePage::Bytes(_) | ReferencePage::Words(_) => false,
        })
    }

    /// References to a cluster.
    pub fn get(&self, ClusterIndex(cluster): ClusterIndex) -> u32 {
        let slot = self.slots.get(&(cluster / PAGE));
        slot.and_then(|slot| self.pages.get(*slot)).map_or(0, |page| page.get((cluster % PAGE) as u16))
    }

    fn page(&mut self, number: u64) -> Option<&mut ReferencePage> {
        let slot = match self.last {
            Some((last, slot)) if last == number => slot,
            _ => *self.slots.entry(number).or_insert_with(|| {
                self.pages.push(ReferencePage::Few(Vec::new()));
                self.pages.len() - 1
            }),
        };
        self.last = Some((number, slot));
        self.pages.get_mut(slot)
    }

    /// No reference any more to each cluster from `first` to `last`.
    pub fn clear(&mut self, first: ClusterIndex, last: ClusterIndex) {
        for cluster in first.0..=last.0 {
            if let Some(page) = self.page(cluster / PAGE) {
                page.set((cluster % PAGE) as u16, 0);
            }
        }
    }

    /// `times` more for each cluster from `first` to `last`, if it is below the limit.
    pub fn add(&mut self, first: ClusterIndex, last: ClusterIndex, times: u32) {
        self.add_each(first, last, times, &mut |_| {});
    }

    /// The same; `full` hears of each cluster whose count would be higher than counts get, once for each time.
    pub fn add_each(
        &mut self,
        ClusterIndex(first): ClusterIndex,
        last: ClusterIndex,
        times: u32,
        full: &mut dyn FnMut(ClusterIndex),
    ) {
        let ClusterIndex(limit) = self.limit;
        let last = last.0.min(limit.saturating_sub(1));
        let most = self.most;
        let mut at = first;
        while at <= last && at < limit {
            let end = last.min(at / PAGE * PAGE + (PAGE - 1));
            let (from, to) = ((at % PAGE) as u16, (end % PAGE) as u16);
            let Some(page) = self.page(at / PAGE) else { return };
            let added = times == 1 && most > 0 && page.add_first(from, to);
            if !added && !page.add_bytes(from, to, times, most) {
                for index in from..=to {
                    let count = page.get(index);
                    let more = times.min(most.saturating_sub(count));
                    (more..times).for_each(|_| full(ClusterIndex(at - u64::from(from) + u64::from(index))));
                    if more > 0 {
                        page.set(index, count + more);
                    }
                }
            }
            at = end + 1;
        }
    }

    /// The clusters from `first` on, below `end`, that are referred to, and how often.
    pub fn range(
        &self,
        ClusterIndex(first): ClusterIndex,
        ClusterIndex(end): ClusterIndex,
    ) -> impl Iterator<Item = (ClusterIndex, u32)> + '_ {
        let slots = self.slots.range(first / PAGE..end.div_ceil(PAGE).max(first / PAGE));
        slots.flat_map(move |(number, slot)| {
            let start = number * PAGE;
            let page = self.pages.get(*slot);
            let from = first.saturating_sub(start).min(PAGE);
            let to = end.saturating_sub(start).min(PAGE);
            let counted = (from..to)
                .map(move |index| (ClusterIndex(start + index), page.map_or(0, |page| page.get(index as u16))));
            counted.filter(|(_, count)| *count > 0)
        })
    }

    /// All clusters that are referred to, and how often.
    pub fn all(&self) -> impl Iterator<Item = (ClusterIndex, u32)> + '_ {
        self.range(ClusterIndex(0), ClusterIndex::MAX)
    }

    /// The cluster behind the last one that is referred to.
    pub fn end(&self) -> ClusterIndex {
        let Some(page) = self.slots.keys().next_back() else { return ClusterIndex(0) };
        let last = self.range(ClusterIndex(page * PAGE), ClusterIndex::MAX).last();
        last.map_or(ClusterIndex(0), |(cluster, _)| cluster + 1)
    }

    /// The first of `n` clusters in a row, from `from` on, to which nothing refers. There may be no end to the file.
    pub fn free_run(&self, from: ClusterIndex, n: u64) -> ClusterIndex {
        let mut start = from;
        for (used, _) in self.range(from, ClusterIndex::MAX) {
            if used.since(start) >= n {
                break;
            }
            start = used + 1;
        }
        start
    }

    /// The runs of `unit` clusters, numbered, in which any cluster is referred to.
    pub fn units(&self, unit: u64) -> Vec<u64> {
        let mut units: Vec<u64> = Vec::new();
        for (ClusterIndex(cluster), _) in self.all() {
            if units.last() != Some(&(cluster / unit)) {
                units.push(cluster / unit);
            }
        }
        units
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_kept_whatever_the_page() {
        let mut references = References::new(ClusterIndex(u64::MAX), u64::MAX);
        // A list, then bits, then bytes, then words; the last cluster of one page and the first of the next; far away.
        references.add(ClusterIndex(10), ClusterIndex(20), 1);
        references.add(ClusterIndex(100), ClusterIndex(300), 1);
        references.add(ClusterIndex(4090), ClusterIndex(4100), 2);
        references.add(ClusterIndex(15), ClusterIndex(15), 3);
        references.add(ClusterIndex(1 << 46), ClusterIndex(1 << 46), u32::MAX);
        references.add(ClusterIndex(1 << 46), ClusterIndex(1 << 46), 1);
        let all: Vec<_> = references.all().map(|(ClusterIndex(n), count)| (n, count)).collect();
        assert_eq!(all.len(), 11 + 201 + 11 + 1);
        assert_eq!(
            [9, 10, 15, 20, 21, 100, 300, 301, 4095, 4096].map(|n| references.get(ClusterIndex(n))),
            [0, 1, 4, 1, 0, 1, 1, 0, 2, 2]
        );
        assert_eq!(references.get(ClusterIndex(1 << 46)), u32::MAX);
        assert_eq!(
            references.range(ClusterIndex(299), ClusterIndex(4091)).collect::<Vec<_>>(),
            [(299, 1), (300, 1), (4090, 2)].map(|(n, count)| (ClusterIndex(n), count))
        );
        assert_eq!(references.units(4096), [0, 1, 1 << 34]);
        assert_eq!(references.free_run(ClusterIndex(0), 10), ClusterIndex(0));
        assert_eq!(references.free_run(ClusterIndex(0), 11), ClusterIndex(21));
        assert_eq!(references.free_run(ClusterIndex(0), 80), ClusterIndex(301));
    }

    #[test]
    fn long_runs_count_like_short_ones() {
        let mut references = References::new(ClusterIndex(20_000), u64::MAX);
        references.add(ClusterIndex(60), ClusterIndex(9000), 1);
        references.add(ClusterIndex(0), ClusterIndex(59), 1);
        references.add(ClusterIndex(63), ClusterIndex(64), 299);
        references.add(ClusterIndex(8000), ClusterIndex(u64::MAX), 1);
        references.add(ClusterIndex(12_288), ClusterIndex(16_383), 1);
        references.add(ClusterIndex(12_288), ClusterIndex(16_383), 1);
        references.add(ClusterIndex(12_288), ClusterIndex(16_383), 250);
        references.add(ClusterIndex(12_288), ClusterIndex(16_383), 10);
        let all: Vec<_> = references.all().map(|(ClusterIndex(n), count)| (n, count)).collect();
        assert_eq!(all.len(), 20_000);
        for (cluster, count) in all {
            let wanted = match cluster {
                63 | 64 => 300,
                8000..=9000 => 2,
                12_288..=16_383 => 263,
                _ => 1,
            };
            assert_eq!(count, wanted, "{cluster}");
        }
    }

    #[test]
    fn what_lies_past_the_limit_costs_nothing() {
        let mut references = References::new(ClusterIndex(100), 3);
        references.add(ClusterIndex(100), ClusterIndex(u64::MAX), 1);
        references.add(ClusterIndex(u64::MAX), ClusterIndex(u64::MAX), 1);
        assert!(references.pages.is_empty());
        let mut full = Vec::new();
        references.add_each(ClusterIndex(98), ClusterIndex(1000), 5, &mut |cluster| full.push(cluster.0));
        assert_eq!(full, [98, 98, 99, 99]);
        assert_eq!(references.all().collect::<Vec<_>>(), [(ClusterIndex(98), 3), (ClusterIndex(99), 3)]);
    }
}
