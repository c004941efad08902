//! L2 tables that will be needed, fetched together where each of them costs a round trip: twice as many as the last time,
//! where one is looked at after the other.
//!
//! Nothing is fetched that lies past what was asked about, and what cannot be fetched is told when it is needed. Memory
//! is the cache's own. The lock of [`Ahead`] is a leaf.

use std::sync::{Mutex, PoisonError};

use crate::block::GuestOffset;

use super::Qcow2Driver;
use super::entry::L1Entry;
use super::layout::{ENTRY, words};

/// Tables that are fetched together, at first and at the most.
const TABLES: std::ops::RangeInclusive<usize> = 2..=16;
/// L1 entries that are looked at.
const MOST_ENTRIES: u64 = 64 << 10;
/// Bytes of a table that are fetched: those behind them follow each other.
const MOST_BYTES: u64 = 64 << 10;

/// How far tables were fetched.
#[derive(Debug, Default)]
pub struct Ahead(Mutex<Fetched>);

#[derive(Debug, Default)]
struct Fetched {
    /// The table that comes next, if there was one.
    next: Option<u64>,
    /// How many were fetched.
    count: usize,
}

impl Ahead {
    /// How many tables to fetch from that one on.
    fn plan(&self, first: Option<&u64>) -> usize {
        let fetched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let more = if fetched.next.as_ref() == first { fetched.count.saturating_mul(2) } else { 0 };
        more.clamp(*TABLES.start(), *TABLES.end())
    }

    fn done(&self, next: Option<u64>, count: usize) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Fetched { next, count };
    }
}

impl Qcow2Driver {
    /// Fetches the L2 tables of the disk from one offset to another. Not of a file of this host.
    pub(super) fn fetch_ahead(&self, from: u64, end: u64) {
        let facts = self.file().storage.facts();
        if self.write || facts.identity.is_some() || facts.parallel.is_none_or(|most| most < 2) {
            return;
        }
        let mut tables = self.tables_between(from, end);
        let count = self.ahead.plan(tables.first());
        self.ahead.done(tables.get(count).copied(), count);
        tables.truncate(count);
        if tables.len() < 2 {
            return;
        }
        std::thread::scope(|scope| {
            for table in tables {
                let fetch = move || {
                    let (table, mut at) = (self.l2(table), 0);
                    while at < table.len.min(MOST_BYTES) {
                        // At least a byte, unless there is an error.
                        at += self.tables.view(table, at, |bytes| bytes.len() as u64).unwrap_or(MOST_BYTES).max(1);
                    }
                };
                if std::thread::Builder::new().spawn_scoped(scope, fetch).is_err() {
                    break;
                }
            }
        });
    }

    /// Where the first of them are, and the one behind those that may be fetched.
    fn tables_between(&self, from: u64, end: u64) -> Vec<u64> {
        let (l1, mut index) = (self.l1(), self.geometry.l1_index(GuestOffset(from)));
        let last = end.saturating_sub(1) / self.geometry.l1_covers();
        let last = last.min(index.saturating_add(MOST_ENTRIES));
        let (mut found, most) = (Vec::new(), TABLES.end() + 1);
        while index <= last && found.len() < most {
            let left = usize::try_from(last - index + 1).unwrap_or(usize::MAX);
            let looked = self.tables.view(l1, index.saturating_mul(ENTRY), |bytes| {
                let mut looked = 0;
                for entry in words(bytes).take(left) {
                    looked += 1;
                    let table = L1Entry(entry).table().map(|table| table.get());
                    found.extend(table.filter(|table| self.geometry.in_cluster(*table) == 0));
                    if found.len() == most {
                        break;
                    }
                }
                looked
            });
            match looked {
                Ok(looked) if looked > 0 => index += looked,
                _ => break,
            }
        }
        found
    }
}
