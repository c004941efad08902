//! The virtual size of a QED image, which only grows.
//!
//! The switch is one write of the header. What lies past the old end is made nothing before, and what a longer backing
//! file holds there is covered by zero clusters.

use std::sync::atomic::Ordering;

use super::QedDriver;
use super::layout::{QedEntry, ZERO, largest_disk};
use super::tables::QedState;
use crate::block::{BlockDriver, Error, Resize, ResizeFiles, Result};
use crate::formats::one_file::{Tables, clear_last_unit};
use crate::storage::{Preallocation, Zeroing};

impl Resize for QedDriver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        if fill != Preallocation::Off {
            return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name())));
        }
        let mut state = self.state();
        let largest = largest_disk(self.cluster, state.header.table_bytes() / self.cluster);
        if !size.is_multiple_of(512) || size > largest {
            return Err(Error::invalid("Invalid image size specified"));
        }
        if size < self.virtual_size() {
            return Err(Error::unsupported("Shrinking images is currently not supported"));
        }
        state.prepare(self.storage())
    }

    fn check_over(&self, size: u64, fill: Preallocation, _covered: u64) -> Result<()> {
        match fill {
            Preallocation::Off => self.check(size, fill),
            // The reference's words: what it cannot do is to make zeros there in this way.
            _ => Err(Error::unsupported("Block driver does not support requested flags")),
        }
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.resize_over(size, fill, 0)
    }

    fn resize_with(&self, size: u64, fill: Preallocation, files: &dyn ResizeFiles) -> Result<()> {
        self.resize_over(size, fill, files.covered())
    }
}

impl QedDriver {
    /// The backing file covers the first `covered` bytes.
    fn resize_over(&self, size: u64, fill: Preallocation, covered: u64) -> Result<()> {
        self.check(size, fill)?;
        let (storage, old) = (self.storage(), self.virtual_size());
        let mut state = self.state();
        let covered = if self.backing.is_some() { covered.min(size) } else { 0 };
        self.clear_past(&mut state, old, covered)?;
        state.write_tables(storage)?;
        let mut header = state.header.clone();
        header.set_size(size);
        state.replace_header(storage, header)?;
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }

    /// Makes all that lies past the old end, in the tables and in the last cluster, read as zeros: it is about to come
    /// into view, and so is what the backing file has up to `covered`.
    fn clear_past(&self, state: &mut QedState, old: u64, covered: u64) -> Result<()> {
        let storage = self.storage();
        clear_last_unit(self, old, self.cluster, Zeroing::Write, |index| {
            Ok(match state.run(storage, index, 1)?.0 {
                QedEntry::Data(at) => Some(at),
                _ => None,
            })
        })?;
        let (first, covered) = (old.div_ceil(self.cluster), covered.div_ceil(self.cluster));
        let mut next = first;
        while next < covered {
            let (entry, run) = state.run(storage, next, (covered - next).min(state.left_in_table(next)))?;
            if entry != QedEntry::Zero {
                state.take(storage, next, 0)?;
                state.set(storage, next, run, ZERO)?;
                if state.wants_writing() {
                    state.write_tables(storage)?;
                }
            }
            next += run;
        }
        // What no disk of that size can have left there.
        let last = state.entries().saturating_mul(state.entries());
        while next < last {
            let (entry, run) = state.run(storage, next, last - next)?;
            if let QedEntry::Data(_) = entry {
                for index in next..next + run {
                    state.set(storage, index, 1, 0)?;
                }
                if state.wants_writing() {
                    state.write_tables(storage)?;
                }
            }
            next += run;
        }
        Ok(())
    }
}
