//! How often each cluster of an image file is referred to, counted in memory.
//!
//! Memory grows with what is referred to, not with the file: clusters are counted in pages, one bit each while no
//! cluster of the page has more than one reference (16 TiB in clusters of 64 KiB cost 32 MiB), a word each from then
//! on, and a page with a few of them costs these few alone.

use std::collections::BTreeMap;

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
                Self::Bits(bits) if count == 1 => {
                    if let Some(word) = bits.get_mut(usize::from(index / 64)) {
                        *word |= 1 << (index % 64);
                    }
                    return;
                }
                Self::Bits(_) => {}
                Self::Words(words) => {
                    if let Some(word) = words.get_mut(usize::from(index)) {
                        *word = count;
                    }
                    return;
                }
            }
            self.widen();
        }
    }

    fn widen(&mut self) {
        *self = match self {
            Self::Few(list) if list.iter().all(|(_, count)| *count == 1) => {
                let mut bits = Box::new([0; 64]);
                for (index, _) in list {
                    if let Some(word) = bits.get_mut(usize::from(*index / 64)) {
                        *word |= 1 << (*index % 64);
                    }
                }
                Self::Bits(bits)
            }
            ref narrow => Self::Words((0..PAGE as u16).map(|index| narrow.get(index)).collect()),
        };
    }
}

/// See the module. Counts stop at `u32::MAX`.
#[derive(Debug, Default)]
pub struct References {
    pages: BTreeMap<u64, ReferencePage>,
}

impl References {
    /// References to a cluster.
    pub fn get(&self, cluster: u64) -> u32 {
        self.pages.get(&(cluster / PAGE)).map_or(0, |page| page.get((cluster % PAGE) as u16))
    }

    /// `times` more for each cluster from `first` to `last`.
    pub fn add(&mut self, first: u64, last: u64, times: u32) {
        for cluster in first..=last {
            let page = self.pages.entry(cluster / PAGE).or_insert_with(|| ReferencePage::Few(Vec::new()));
            let index = (cluster % PAGE) as u16;
            let count = page.get(index).saturating_add(times);
            page.set(index, count);
        }
    }

    /// The clusters from `first` on, below `end`, that are referred to, and how often.
    pub fn range(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, u32)> + '_ {
        let pages = self.pages.range(first / PAGE..end.div_ceil(PAGE).max(first / PAGE));
        pages.flat_map(move |(number, page)| {
            let start = number * PAGE;
            let counted = (0..PAGE).map(move |index| (start + index, page.get(index as u16)));
            counted.filter(move |(cluster, count)| *count > 0 && (first..end).contains(cluster))
        })
    }

    /// The runs of `unit` clusters, numbered, in which any cluster is referred to.
    pub fn units(&self, unit: u64) -> Vec<u64> {
        let mut units: Vec<u64> = Vec::new();
        for (cluster, _) in self.range(0, u64::MAX) {
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
        let mut references = References::default();
        // A list, then bits, then words; the last cluster of one page and the first of the next; far away.
        references.add(10, 20, 1);
        references.add(100, 300, 1);
        references.add(4090, 4100, 2);
        references.add(15, 15, 3);
        references.add(1 << 46, 1 << 46, u32::MAX);
        references.add(1 << 46, 1 << 46, 1);
        let all: Vec<_> = references.range(0, u64::MAX).collect();
        assert_eq!(all.len(), 11 + 201 + 11 + 1);
        assert_eq!(
            [9, 10, 15, 20, 21, 100, 300, 301, 4095, 4096].map(|n| references.get(n)),
            [0, 1, 4, 1, 0, 1, 1, 0, 2, 2]
        );
        assert_eq!(references.get(1 << 46), u32::MAX);
        assert_eq!(references.range(299, 4091).collect::<Vec<_>>(), [(299, 1), (300, 1), (4090, 2)]);
        assert_eq!(references.units(4096), [0, 1, 1 << 34]);
    }
}
