//! What an image's file lacks: things that tables place past its end. What is placed behind the end would make the file
//! long enough to hold them, and nobody could tell any more.

use super::super::Qcow2Driver;
use super::super::layout::MAX_L1_BYTES;
use super::super::walk::{Found, MetadataPart, Visitor};
use super::Survey;
use crate::block::error::Context;
use crate::block::{CompressedUnit, Error, GuestOffset, HostPlace, Result};

/// Compressed clusters that are decoded because their room ends past the end of the file.
pub const MOST_DECODED: u32 = 1024;

impl Survey<'_> {
    /// Notes what was found, if the file lacks it, or a part that nobody leaves out: of a table that is every byte. The
    /// rest of the last cluster of guest data, of a bitmap and of a LUKS header is zeros that need not be there.
    /// Refcounts are not missing: they follow from everything else.
    pub(super) fn look_for_missing(&mut self, found: &Found) -> Result<()> {
        let (at, end, geometry) = (found.at, found.at.saturating_add(found.len), self.driver.geometry);
        let lacks = match found.part {
            MetadataPart::Qcow2Header | MetadataPart::RefcountTable | MetadataPart::RefcountBlock => false,
            MetadataPart::SnapshotTable if self.snapshots_go => false,
            // An entry that cannot be one names nothing.
            MetadataPart::InactiveL1 if geometry.in_cluster(at) != 0 || found.len > MAX_L1_BYTES => false,
            MetadataPart::SnapshotTable
            | MetadataPart::ActiveL1
            | MetadataPart::ActiveL2
            | MetadataPart::InactiveL1
            | MetadataPart::InactiveL2
            | MetadataPart::BitmapDirectory
            | MetadataPart::BitmapTable => end > self.file,
            MetadataPart::LuksHeader => end.saturating_sub(self.file) >= geometry.cluster_size(),
            // A cluster of which nothing is read need not be there.
            MetadataPart::Data => {
                at - geometry.in_cluster(at) >= self.file && !found.entry.is_some_and(|entry| entry.reads_nothing())
            }
            MetadataPart::BitmapData => at >= self.file,
            MetadataPart::Compressed => {
                end > self.file && {
                    self.decoded += u32::from(self.decoded < MOST_DECODED);
                    self.decoded >= MOST_DECODED || !self.driver.decodes(at, found.len, self.file)?
                }
            }
        };
        if lacks {
            self.missing.get_or_insert((at, found.part.name()));
        }
        Ok(())
    }
}

impl Qcow2Driver {
    /// Whether the bytes that a file of that length has of a compressed cluster are all of it: the last ones may be
    /// padding.
    pub(in super::super) fn decodes(&self, at: u64, len: u64, file: u64) -> Result<bool> {
        if at >= file {
            return Ok(false);
        }
        let cluster = self.geometry.cluster_size();
        let mut encoded = vec![0; usize::try_from(len).unwrap_or(0)];
        let there = usize::try_from(len.min(file - at)).unwrap_or(0);
        self.file().read_metadata("compressed cluster", at, encoded.get_mut(..there).unwrap_or_default())?;
        encoded.truncate(there);
        let mut plain = vec![0; usize::try_from(cluster).unwrap_or(0)];
        let unit = CompressedUnit { start: GuestOffset(0), len: cluster, place: HostPlace::main(at), host_len: len };
        Ok(self.decode_unit(&unit, &encoded, &mut plain).is_ok())
    }

    /// How long the data file is, if there is one.
    pub(in super::super) fn data_file_len(&self) -> Result<Option<u64>> {
        let file = self.files.get(self.data_file()).filter(|_| self.external);
        file.map(|file| file.storage.len().context("Could not get the size of the data file")).transpose()
    }

    /// The error where the data file lacks a cluster that is not zeros.
    pub(super) fn data_file_lacks(&self) -> Result<Option<Error>> {
        let Some(len) = self.data_file_len()? else { return Ok(None) };
        if len >= self.header().fields.size {
            // Every cluster lies in it where it lies on the disk.
            return Ok(None);
        }
        let mut past = Past { len, found: None };
        self.walk_data_file(&mut past)?;
        Ok(past.found.map(|at| Error::truncated("a cluster of the data file", at, len)))
    }

    /// Whether a cluster past the end of the file has a refcount.
    pub(super) fn counts_past(&self, file: u64) -> Result<bool> {
        let first = self.geometry.cluster_of(file.saturating_add(self.geometry.cluster_size() - 1));
        let (index, within) = self.geometry.refcount_of(first);
        let entries = self.refcount_table().len / super::ENTRY;
        for block in index..entries {
            let Some(table) = self.block_of(block)? else { continue };
            let from = if block == index { within * u64::from(self.geometry.refcount_bits()) / 8 } else { 0 };
            let mut counted = false;
            self.each_piece(table, |at, piece| {
                let skip = usize::try_from(from.saturating_sub(at)).unwrap_or(usize::MAX);
                counted |= piece.iter().skip(skip).any(|byte| *byte != 0);
            })?;
            if counted {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Looks for guest data past an end.
struct Past {
    len: u64,
    found: Option<u64>,
}

impl Visitor for Past {
    fn found(&mut self, found: &Found) -> Result<()> {
        let reads_nothing = found.entry.is_some_and(|entry| entry.reads_nothing());
        if found.part == MetadataPart::Data && found.at >= self.len && !reads_nothing {
            self.found.get_or_insert(found.at);
        }
        Ok(())
    }

    fn contents(&self, _tables: u64) -> bool {
        true
    }

    fn too_many(&self) -> Result<()> {
        Ok(())
    }
}
