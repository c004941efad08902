//! The bytes of a disk, from front to back, become those of a file in which their places are known: between them lies
//! what is kept.
//!
//! Invariant: what the disk holds where it has no place is zeros, or it is not the disk that was looked at.

use std::sync::Arc;

use super::outgoing::Outgoing;
use super::paged::PagedMemory;
use super::zeros::is_zero;
use super::{Error, Result};

/// A run of the disk, and where it lies in the file. Runs are in order in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRun {
    /// Where it starts on the disk.
    pub disk: u64,
    /// Where in the file.
    pub file: u64,
    /// Its length.
    pub len: u64,
}

/// A file to be.
#[derive(Debug)]
pub struct FilePlan {
    /// All of it but the disk's data.
    pub kept: Arc<PagedMemory>,
    /// Where these are.
    pub runs: Vec<DiskRun>,
    /// Its length.
    pub len: u64,
}

/// See the module.
pub struct Arranged {
    sink: Box<dyn Outgoing>,
    plan: FilePlan,
    /// The run that comes next, or that we are in.
    run: usize,
    disk: u64,
    file: u64,
}

impl Arranged {
    /// Takes the disk, and sends the file.
    pub fn new(sink: Box<dyn Outgoing>, plan: FilePlan) -> Self {
        Self { sink, plan, run: 0, disk: 0, file: 0 }
    }

    /// How many of the next `max` bytes of the disk have one fate, and whether they have a place.
    fn next(&mut self, max: u64) -> Result<(u64, bool)> {
        while self.plan.runs.get(self.run).is_some_and(|run| run.disk + run.len <= self.disk) {
            self.run += 1;
        }
        let Some(run) = self.plan.runs.get(self.run) else { return Ok((max, false)) };
        if self.disk < run.disk {
            return Ok((max.min(run.disk - self.disk), false));
        }
        let inside = self.disk - run.disk;
        if inside == 0 {
            self.plan.kept.send(self.file, run.file, &mut *self.sink)?;
            self.file = run.file;
        }
        Ok((max.min(run.len - inside), true))
    }

    fn pass(&mut self, len: u64, placed: bool) {
        self.disk += len;
        self.file += if placed { len } else { 0 };
    }
}

impl Outgoing for Arranged {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let mut bytes = bytes;
        while !bytes.is_empty() {
            let (len, placed) = self.next(bytes.len() as u64)?;
            let (now, later) = bytes.split_at(usize::try_from(len).unwrap_or(usize::MAX));
            if placed {
                self.sink.put(now)?;
            } else if !is_zero(now) {
                return Err(Error::Other("what is read has changed since it was looked at".to_owned()));
            }
            self.pass(len, placed);
            bytes = later;
        }
        Ok(())
    }

    fn put_zeros(&mut self, len: u64) -> Result<()> {
        let mut left = len;
        while left > 0 {
            let (len, placed) = self.next(left)?;
            if placed {
                self.sink.put_zeros(len)?;
            }
            self.pass(len, placed);
            left -= len;
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<()> {
        self.plan.kept.send(self.file, self.plan.len, &mut *self.sink)?;
        self.sink.complete()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Storage;
    use crate::storage::outgoing::Taken;

    fn arranged(taken: &Taken) -> Arranged {
        let kept = Arc::new(PagedMemory::new(1 << 20));
        kept.write_at(0, b"head").unwrap();
        kept.write_at(14, b"mid").unwrap();
        kept.write_at(29, b"end").unwrap();
        let runs = vec![DiskRun { disk: 5, file: 4, len: 10 }, DiskRun { disk: 20, file: 17, len: 10 }];
        Arranged::new(Box::new(taken.clone()), FilePlan { kept, runs, len: 32 })
    }

    #[test]
    fn the_file_has_the_disks_data_in_their_places() {
        for piece in [1, 3, 7, 26] {
            let taken = Taken::default();
            let mut sink = arranged(&taken);
            // The disk ends within a run.
            let disk = b"\0\0\0\0\0abcdefghij\0\0\0\0\0ABCDEF";
            for part in disk.chunks(piece) {
                match is_zero(part) {
                    true => sink.put_zeros(part.len() as u64).unwrap(),
                    false => sink.put(part).unwrap(),
                }
            }
            sink.complete().unwrap();
            assert_eq!(taken.0.lock().unwrap().0, b"headabcdefghijmidABCDEF\0\0\0\0\0\0end", "{piece}");
        }
    }

    #[test]
    fn data_without_a_place_are_an_error() {
        let taken = Taken::default();
        let error = arranged(&taken).put(b"\0\0\0\0x").unwrap_err();
        assert_eq!(error.to_string(), "what is read has changed since it was looked at");
    }
}
