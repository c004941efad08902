//! Checks a dmg image: that its blocks lie in the file, can be decoded, and have the checksums that are told: of the data
//! fork, of each partition, and of all partitions' checksums.

use flate2::Crc;

use super::DmgDriver;
use super::layout::{EntryKind, SECTOR};
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{BlockDriver, Check, CheckReport, CompressedUnit, Findings, Fix, GuestOffset, HostPlace, Result};

/// How much is looked at at a time.
const PIECE: u64 = 256 << 10;

impl Check for DmgDriver {
    fn check(&self, _fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let mut tally = Tally::new(findings);
        let end = self.files[0].storage.len().context("Could not get the size of the file")?;
        for block in &self.blocks.all {
            let report = &mut tally.report;
            report.total_clusters += 1;
            let stored = !matches!(block.kind, EntryKind::Zero | EntryKind::Ignored);
            report.allocated_clusters += u64::from(stored);
            report.compressed_clusters += u64::from(matches!(block.kind, EntryKind::Packed(_)));
            if stored {
                let last = block.at.saturating_add(block.len);
                report.image_end = report.image_end.max(last.min(end));
                if last > end {
                    tally.wrong(format!("the block of sector {} lies past the end of the file", block.sector));
                }
            }
        }
        if tally.report.corruptions == 0 {
            self.data_fork(&mut tally)?;
            self.partitions(&mut tally)?;
        }
        Ok(tally.report)
    }
}

impl DmgDriver {
    fn data_fork(&self, tally: &mut Tally<'_>) -> Result<()> {
        let Some(told) = self.koly.data_checksum.crc() else { return Ok(()) };
        let storage = &*self.files[0].storage;
        let end = storage.len().context("Could not get the size of the file")?;
        let (mut at, len) = (self.koly.data_offset.get(), self.koly.data_len.get());
        let Some(last) = at.checked_add(len).filter(|last| *last <= end) else {
            tally.wrong("the data fork lies past the end of the file");
            return Ok(());
        };
        let (mut crc, mut buffer) = (Crc::new(), Vec::new());
        while at < last {
            buffer.resize(usize::try_from(PIECE.min(last - at)).unwrap_or(0), 0);
            storage.read_at(at, &mut buffer).context("Could not read the data fork")?;
            crc.update(&buffer);
            at += buffer.len() as u64;
        }
        compare(tally, "the data fork", told, crc.sum());
        Ok(())
    }

    fn partitions(&self, tally: &mut Tally<'_>) -> Result<()> {
        let mut all = Crc::new();
        let mut complete = true;
        for (number, part) in self.blocks.parts.iter().enumerate() {
            let Some(told) = part.crc else {
                complete = false;
                continue;
            };
            all.update(&told.to_be_bytes());
            let (from, to) = (part.first, part.first.saturating_add(part.sectors).min(self.size / SECTOR));
            match self.sum(from, to)? {
                Ok(sum) => compare(tally, &format!("partition {number}"), told, sum),
                Err(text) => tally.wrong(text),
            }
        }
        match self.koly.master_checksum.crc() {
            Some(told) if complete => compare(tally, "the partitions' checksums", told, all.sum()),
            _ => {}
        }
        Ok(())
    }

    /// The CRC-32 of these sectors, but for those of which nothing is kept; or what cannot be decoded.
    fn sum(&self, from: u64, to: u64) -> Result<std::result::Result<u32, String>> {
        let storage = &*self.files[0].storage;
        let (mut crc, mut plain, mut encoded) = (Crc::new(), Vec::new(), Vec::new());
        let first = self.blocks.all.partition_point(|block| block.end() <= from);
        for block in self.blocks.all.iter().skip(first).take_while(|block| block.sector < to) {
            let start = block.sector * SECTOR;
            let (mut at, last) = (from.max(block.sector) * SECTOR, to.min(block.end()) * SECTOR);
            match block.kind {
                EntryKind::Ignored | EntryKind::None => {}
                EntryKind::Packed(_) => {
                    encoded.resize(usize::try_from(block.len).unwrap_or(0), 0);
                    plain.resize(usize::try_from(block.sectors * SECTOR).unwrap_or(0), 0);
                    storage.read_at(block.at, &mut encoded).context("Could not read a block")?;
                    let (place, len) = (HostPlace::main(block.at), plain.len() as u64);
                    let unit = CompressedUnit { start: GuestOffset(start), len, place, host_len: block.len };
                    if let Err(error) = self.decode(&unit, &encoded, &mut plain) {
                        return Ok(Err(error.message()));
                    }
                    let range = usize::try_from(at - start).unwrap_or(0)..usize::try_from(last - start).unwrap_or(0);
                    crc.update(plain.get(range).unwrap_or_default());
                }
                EntryKind::Zero | EntryKind::Raw => {
                    while at < last {
                        plain.clear();
                        plain.resize(usize::try_from(PIECE.min(last - at)).unwrap_or(0), 0);
                        if block.kind == EntryKind::Raw {
                            storage.read_at(block.at + (at - start), &mut plain).context("Could not read a block")?;
                        }
                        crc.update(&plain);
                        at += plain.len() as u64;
                    }
                }
            }
        }
        Ok(Ok(crc.sum()))
    }
}

fn compare(tally: &mut Tally<'_>, what: &str, told: u32, sum: u32) {
    if told != sum {
        tally.wrong(format!("the checksum of {what} is {sum:#010x}, the image says {told:#010x}"));
    }
}
