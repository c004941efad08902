//! What the drivers of images in one file have in common, those whose tables stand behind one lock.
//!
//! The lock is held for tables alone, never while guest data moves.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::block::error::Context;
use crate::block::io::clear_stored;
use crate::block::{BlockDriver, Child, GuestOffset, HostPlace, Result};
use crate::storage::{Storage, Zeroing};

/// Tables in memory.
pub trait Tables: Debug + Send {
    /// Writes what waits, in an order that leaves the image consistent at every moment.
    fn write_tables(&mut self, storage: &dyn Storage) -> Result<()>;
}

/// An open image: its file, its size and its tables.
#[derive(Debug)]
pub struct OneFile<S> {
    /// The file alone.
    pub files: [Child; 1],
    /// The virtual size in bytes.
    pub size: AtomicU64,
    state: Mutex<S>,
    /// Whether it is open for writing.
    pub write: bool,
}

impl<S: Tables> OneFile<S> {
    /// An image of that virtual size.
    pub fn new(file: Child, size: u64, state: S, write: bool) -> Self {
        Self { files: [file], size: AtomicU64::new(size), state: Mutex::new(state), write }
    }

    /// The file's bytes.
    pub fn storage(&self) -> &dyn Storage {
        &*self.files[0].storage
    }

    /// The tables, for the caller alone.
    pub fn state(&self) -> MutexGuard<'_, S> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The virtual size in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Writes the tables out and flushes the file.
    pub fn flush(&self) -> Result<()> {
        if self.write {
            self.state().write_tables(self.storage())?;
        }
        self.files[0].flush()
    }
}

/// Makes the unit in which a disk of `size` bytes ends read as zeros from there on: that part may come into view.
/// `place` says where in the main file the unit with an index starts, if it has a place.
pub fn clear_last_unit(
    driver: &dyn BlockDriver,
    size: u64,
    unit: u64,
    how: Zeroing,
    place: impl FnOnce(u64) -> Result<Option<u64>>,
) -> Result<()> {
    let within = size % unit;
    if within == 0 {
        return Ok(());
    }
    let Some(at) = place(size / unit)? else { return Ok(()) };
    let from = HostPlace::main(at.saturating_add(within));
    clear_stored(driver, from, GuestOffset(size), unit - within, how).context("Could not clear the end of the disk")
}
