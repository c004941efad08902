//! Checks a sparse image: its chunks, and the checksums of the disk that it carries.

use flate2::Crc;

use super::SimgDriver;
use super::chunks::{Fill, Run, Step, walk};
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{Check, CheckReport, ErrorKind, Findings, Fix, Result};
use crate::storage::Storage;

/// How much is looked at at a time.
const PIECE: usize = 256 << 10;

impl Check for SimgDriver {
    fn check(&self, _fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let storage = &*self.files[0].storage;
        let end = storage.len().context("Could not get the size of the file")?;
        let mut tally = Tally::new(findings);
        let (mut crc, mut buffer) = (Crc::new(), vec![0; PIECE]);
        let block = self.block();
        let mut missing = false;
        let walked = walk(storage, &self.header, |step| {
            match step {
                Step::Checksum(told) if missing || told == crc.sum() => {}
                Step::Checksum(told) => {
                    tally.wrong(format!("a checksum chunk says {told:#010x}, the disk so far has {:#010x}", crc.sum()));
                }
                Step::Run(run) => {
                    tally.report.total_clusters += run.count;
                    if let Fill::Stored(at) = run.fill {
                        tally.report.allocated_clusters += run.count;
                        let last = at.saturating_add(run.count * block);
                        if last > end {
                            tally.wrong(format!("the chunk of block {} lies past the end of the file", run.block));
                            missing = true;
                        }
                        tally.report.image_end = last.min(end);
                    }
                    if !missing {
                        sum(storage, run, block, &mut crc, &mut buffer)?;
                    }
                }
            }
            Ok(())
        });
        match walked {
            Err(error) if error.kind == ErrorKind::Corrupt || error.kind == ErrorKind::Truncated => {
                tally.wrong(error.message())
            }
            other => other?,
        }
        let told = self.header.checksum.get();
        if told != 0 && tally.report.corruptions == 0 && told != crc.sum() {
            tally.wrong(format!("the header says that the disk's checksum is {told:#010x}, it is {:#010x}", crc.sum()));
        }
        Ok(tally.report)
    }
}

/// Takes a run into the checksum.
fn sum(storage: &dyn Storage, run: Run, block: u64, crc: &mut Crc, buffer: &mut [u8]) -> Result<()> {
    let (mut done, all) = (0, run.count * block);
    match run.fill {
        Fill::Zeros => buffer.fill(0),
        Fill::Word(_, word) => buffer.chunks_exact_mut(4).for_each(|bytes| bytes.copy_from_slice(&word)),
        Fill::Stored(_) => {}
    }
    while done < all {
        let len = usize::try_from(all - done).unwrap_or(buffer.len()).min(buffer.len());
        let piece = buffer.get_mut(..len).unwrap_or_default();
        if let Fill::Stored(at) = run.fill {
            storage.read_at(at + done, piece).context("Could not read the image")?;
        }
        crc.update(piece);
        done += len as u64;
    }
    Ok(())
}
