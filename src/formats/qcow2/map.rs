//! Guest offset → extent: what the L1 and L2 tables say.
//!
//! Source: specification, sections "Cluster mapping" and "Extended L2 Entries". An answer merges neighbours that
//! continue each other, over slices and tables; it looks at a bounded number of entries. Wrong entries are an error
//! where the answer starts, and end it where they come later.

use std::sync::atomic::Ordering;

use crate::block::{CompressedUnit, Error, Extent, ExtentKind, GuestOffset, HostOffset, HostPlace, Result};

use super::Qcow2Driver;
use super::entry::{L1Entry, L2Entry};
use super::geometry::Geometry;
use super::layout::{ENTRY, SUBCLUSTERS, word, words};

/// Most L2 entries that one answer looks at.
const MOST_ENTRIES: u64 = 64 << 10;

/// What the entries of an image may mean.
#[derive(Debug, Clone, Copy)]
struct Rules {
    geometry: Geometry,
    /// Index of the file with the guest clusters, if it is an external one.
    external: bool,
}

/// Where an L2 entry was found.
#[derive(Debug, Clone, Copy)]
struct Position {
    /// Where the guest's cluster starts.
    guest: u64,
    /// Where the L2 table is.
    table: u64,
    /// The entry's index in it.
    index: u64,
}

/// Why there is no answer.
#[derive(Debug)]
enum Trouble {
    /// A table cannot be read.
    Unreadable(Error),
    /// A table is wrong: how, in the reference's words, and at what offset of the file its entry is.
    Wrong(String, u64),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Unreadable(error)
    }
}

/// As C writes `%#x`: a zero has no prefix.
fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}

/// A run that starts at a position and has one kind.
#[derive(Debug, Clone, Copy)]
struct ClusterRun {
    kind: ExtentKind,
    len: u64,
}

impl ClusterRun {
    /// Adds a run that follows, if it continues this one.
    fn join(&mut self, next: ClusterRun) -> bool {
        let follows = |a: HostPlace, b: HostPlace| a.file == b.file && a.at + self.len == b.at;
        let joins = match (self.kind, next.kind) {
            (ExtentKind::Data(a), ExtentKind::Data(b))
            | (ExtentKind::Zero(Some(a)), ExtentKind::Zero(Some(b)))
            | (ExtentKind::Unallocated(Some(a)), ExtentKind::Unallocated(Some(b))) => follows(a, b),
            (ExtentKind::Zero(None), ExtentKind::Zero(None))
            | (ExtentKind::Unallocated(None), ExtentKind::Unallocated(None)) => true,
            _ => false,
        };
        if joins {
            self.len = self.len.saturating_add(next.len);
        }
        joins
    }
}

impl Rules {
    /// What an entry says from `within` bytes into its cluster on. The error is the reference's sentence.
    fn run(&self, at: Position, entry: L2Entry, bitmap: u64, within: u64) -> std::result::Result<ClusterRun, String> {
        let cluster = self.geometry.cluster_size();
        let rest = cluster - within;
        let place = |of: String| format!("{of} (L2 offset: {}, L2 index: {})", hex(at.table), hex(at.index));
        if entry.is_compressed() {
            if self.external {
                let text = "Compressed cluster entry found in image with external data file";
                return Err(place(text.to_owned()));
            }
            let (host, host_len) = self.geometry.compressed(entry.0);
            let unit = CompressedUnit {
                start: GuestOffset(at.guest),
                len: cluster,
                place: HostPlace { file: 0, at: HostOffset(host) },
                host_len,
            };
            return Ok(ClusterRun { kind: ExtentKind::Compressed(unit), len: rest });
        }
        let offset = entry.host().unwrap_or_default();
        let there = entry.refers() || (self.external && entry.is_own());
        let host = there.then(|| HostPlace { file: usize::from(self.external), at: offset + within });
        let offset = offset.get();
        let (kind, len) = if self.geometry.extended {
            self.subclusters(host, bitmap, within).ok_or_else(|| place("Invalid cluster entry found ".to_owned()))?
        } else if entry.reads_zero() {
            if self.geometry.version < 3 {
                return Err(place("Zero cluster entry found in pre-v3 image".to_owned()));
            }
            (ExtentKind::Zero(host), rest)
        } else {
            (host.map_or(ExtentKind::Unallocated(None), ExtentKind::Data), rest)
        };
        if there && self.geometry.in_cluster(offset) != 0 {
            return Err(place(format!("Cluster allocation offset {offset:#x} unaligned")));
        }
        if there && self.external && offset != at.guest {
            // The reference closes a bracket that it did not open.
            return Err(format!(
                "External data file host cluster offset {} does not match guest cluster offset: {}, L2 index: {})",
                hex(offset),
                hex(at.guest),
                hex(at.index)
            ));
        }
        Ok(ClusterRun { kind, len })
    }

    /// The run of equal subclusters from `within` on; `None` for a combination that means nothing.
    fn subclusters(&self, host: Option<HostPlace>, bitmap: u64, within: u64) -> Option<(ExtentKind, u64)> {
        let size = self.geometry.subcluster_size();
        let first = u32::try_from(within / size).ok()?.min(SUBCLUSTERS - 1);
        let state = |n: u32| (bitmap >> n & 1 != 0, bitmap >> (n + SUBCLUSTERS) & 1 != 0);
        let wanted = state(first);
        let kind = match (wanted, host) {
            ((true, true), _) | ((true, false), None) => return None,
            ((true, false), Some(host)) => ExtentKind::Data(host),
            ((false, true), host) => ExtentKind::Zero(host),
            ((false, false), host) => ExtentKind::Unallocated(host),
        };
        let end = (first + 1..SUBCLUSTERS).find(|n| state(*n) != wanted).unwrap_or(SUBCLUSTERS);
        Some((kind, u64::from(end) * size - within))
    }
}

impl Qcow2Driver {
    /// See [`BlockDriver::extent`](crate::block::BlockDriver::extent).
    pub(super) fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let start = at.get();
        let end = start.saturating_add(max).min(self.header().fields.size);
        let rules = Rules { geometry: self.geometry, external: self.external };
        let mut found: Option<ClusterRun> = None;
        let (mut pos, mut looked) = (start, 0);
        while pos < end && looked < MOST_ENTRIES {
            let next = match self.map_table(&rules, pos, end, &mut looked) {
                Ok(next) => next,
                Err(trouble) if found.is_none() => return Err(self.tell(trouble)),
                Err(_) => break,
            };
            pos += next.len;
            match &mut found {
                None => found = Some(next),
                Some(run) => {
                    if !run.join(next) {
                        break;
                    }
                }
            }
        }
        let run = found.ok_or_else(|| Error::invalid(format!("{at} is past the end of the disk")))?;
        if self.encrypted && self.cipher.is_none() && matches!(run.kind, ExtentKind::Data(_)) {
            return Err(Error::unsupported("The image was opened without its key"));
        }
        Ok(Extent { start: at, len: run.len.min(end - start), kind: run.kind })
    }

    /// One run from `pos` on: of one L2 table, or of L1 entries without one.
    fn map_table(
        &self,
        rules: &Rules,
        pos: u64,
        end: u64,
        looked: &mut u64,
    ) -> std::result::Result<ClusterRun, Trouble> {
        let geometry = &self.geometry;
        let (l1, covers) = (self.l1(), geometry.l1_covers());
        if !self.write {
            self.tables.require(l1)?;
        }
        let first = geometry.l1_index(GuestOffset(pos));
        let last = (end - 1) / covers;
        // Unallocated L1 entries from here on, as far as the slice goes.
        let (entry, empty) = self.tables.view(l1, first.saturating_mul(ENTRY), |bytes| {
            let entries = words(bytes);
            let empty = entries.take_while(|entry| L1Entry(*entry).table().is_none()).count() as u64;
            (word(bytes, 0), empty)
        })?;
        let unallocated = |len: u64| ClusterRun { kind: ExtentKind::Unallocated(None), len };
        let Some(entry) = entry else {
            // A snapshot may have a shorter table than its size asks for.
            return Ok(unallocated(end - pos));
        };
        if empty > 0 {
            let until = first.saturating_add(empty).min(last + 1).saturating_mul(covers);
            *looked += 1;
            return Ok(unallocated(until.min(end) - pos));
        }
        let table = L1Entry(entry).table().unwrap_or_default().get();
        if geometry.in_cluster(table) != 0 {
            let text = format!("L2 table offset {table:#x} unaligned (L1 index: {})", hex(first));
            return Err(Trouble::Wrong(text, l1.at.saturating_add(first.saturating_mul(ENTRY))));
        }
        if !self.write {
            self.tables.require(self.l2(table))?;
        }
        let index = geometry.l2_index(GuestOffset(pos));
        let width = geometry.l2_entry();
        if !self.tables.holds(self.l2(table), index * width) {
            self.fetch_ahead(pos, end);
        }
        let found = self.tables.view(self.l2(table), index * width, |bytes| {
            let mut found: Option<ClusterRun> = None;
            let mut guest = pos - geometry.in_cluster(pos);
            for (n, words) in (0u64..).zip(bytes.chunks_exact(width as usize)) {
                *looked += 1;
                let (entry, bitmap) = (L2Entry(word(words, 0).unwrap_or(0)), word(words, 8).unwrap_or(0));
                let place = Position { guest, table, index: index + n };
                let mut within = if n == 0 { geometry.in_cluster(pos) } else { 0 };
                while within < geometry.cluster_size() {
                    let next = match rules.run(place, entry, bitmap, within) {
                        Ok(next) => next,
                        Err(text) => return found.ok_or(text),
                    };
                    within += next.len.max(1);
                    match &mut found {
                        None => found = Some(next),
                        Some(run) => {
                            if !run.join(next) {
                                return Ok(*run);
                            }
                        }
                    }
                }
                guest = guest.saturating_add(geometry.cluster_size());
                if guest >= end || *looked >= MOST_ENTRIES {
                    break;
                }
            }
            found.ok_or_else(|| format!("L2 table at {table:#x} has no entry {index}"))
        })?;
        found.map_err(|text| Trouble::Wrong(text, table.saturating_add(index * width)))
    }

    /// Told only where an answer starts: what comes later is asked for again.
    fn tell(&self, trouble: Trouble) -> Error {
        match trouble {
            Trouble::Unreadable(error) => error,
            Trouble::Wrong(text, at) => self.corruption(&text).in_file_at(at),
        }
    }

    /// What is returned for wrong tables; an image that is open for writing is marked.
    fn corruption(&self, text: &str) -> Error {
        let error = Error::corrupt("Input/output error");
        if self.told_corrupt.swap(true, Ordering::Relaxed) {
            return error;
        }
        if !self.write {
            return error.note(format!(
                "qcow2: Image is corrupt: {text}; further non-fatal corruption events will be suppressed"
            ));
        }
        if self.geometry.version >= 3 {
            // A failure to mark it must not hide what is wrong with it.
            let _ = self.update_header(|header| header.fields.incompatible |= super::layout::CORRUPT);
        }
        error.note(format!("qcow2: Marking image as corrupt: {text}; further corruption events will be suppressed"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::layout::{COMPRESSED, COPIED, ZERO};
    use super::*;

    fn rules(extended: bool, version: u32, external: bool) -> Rules {
        Rules { geometry: Geometry { version, cluster_bits: 16, refcount_order: 4, extended }, external }
    }

    const AT: Position = Position { guest: 0x20000, table: 0x40000, index: 2 };

    fn host(at: u64) -> HostPlace {
        HostPlace { file: 0, at: HostOffset(at) }
    }

    #[test]
    fn standard_entries() {
        let rules = rules(false, 3, false);
        let run = |entry, within| rules.run(AT, L2Entry(entry), 0, within).unwrap();
        let data = run(COPIED | 0x50000, 512);
        assert_eq!((data.kind, data.len), (ExtentKind::Data(host(0x50200)), 65536 - 512));
        assert_eq!(run(0, 0).kind, ExtentKind::Unallocated(None));
        assert_eq!(run(COPIED, 0).kind, ExtentKind::Unallocated(None));
        assert_eq!(run(ZERO, 0).kind, ExtentKind::Zero(None));
        assert_eq!(run(COPIED | 0x50000 | ZERO, 0).kind, ExtentKind::Zero(Some(host(0x50000))));
        assert!(
            rules
                .run(AT, L2Entry(0x50200), 0, 0)
                .unwrap_err()
                .starts_with("Cluster allocation offset 0x50200 unaligned")
        );
        let old = self::rules(false, 2, false);
        assert!(old.run(AT, L2Entry(ZERO), 0, 0).unwrap_err().starts_with("Zero cluster entry"));
    }

    #[test]
    fn subclusters_end_runs() {
        let rules = rules(true, 3, false);
        let bitmap = 0x0000_000f_ffff_f000;
        let kinds: Vec<_> = [0, 4 * 2048, 12 * 2048]
            .map(|within| {
                let run = rules.run(AT, L2Entry(COPIED | 0x50000), bitmap, within).unwrap();
                (run.kind, run.len / 2048)
            })
            .into();
        assert_eq!(
            kinds,
            [
                (ExtentKind::Zero(Some(host(0x50000))), 4),
                (ExtentKind::Unallocated(Some(host(0x52000))), 8),
                (ExtentKind::Data(host(0x56000)), 20)
            ]
        );
        assert!(rules.run(AT, L2Entry(COPIED | 0x50000), 0x0000_0001_0000_0001, 0).is_err());
        assert!(rules.run(AT, L2Entry(0), 1, 0).is_err());
    }

    #[test]
    fn external_data_lies_where_the_guest_sees_it() {
        let rules = rules(false, 3, true);
        let there = HostPlace { file: 1, at: HostOffset(0x20000) };
        assert_eq!(rules.run(AT, L2Entry(COPIED | 0x20000), 0, 0).unwrap().kind, ExtentKind::Data(there));
        assert!(
            rules.run(AT, L2Entry(COPIED | 0x30000), 0, 0).unwrap_err().contains("does not match guest cluster offset")
        );
        assert!(rules.run(AT, L2Entry(COMPRESSED | 0x30000), 0, 0).is_err());
        let first = Position { guest: 0, index: 0, ..AT };
        assert!(matches!(rules.run(first, L2Entry(COPIED), 0, 0).unwrap().kind, ExtentKind::Data(_)));
        assert_eq!(rules.run(first, L2Entry(0), 0, 0).unwrap().kind, ExtentKind::Unallocated(None));
    }
}
