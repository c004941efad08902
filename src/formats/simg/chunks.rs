//! The chunks of a sparse image, found by one walk over their headers.
//!
//! Invariant: runs lie one behind the other, from block 0 to the last, none of them empty.

use zerocopy::FromBytes;

use super::layout::{CHECKSUM, CHUNK_BYTES, ChunkHeader, FILL, FileHeader, RAW, SKIP, WORD_BYTES};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::storage::Storage;

/// The most chunks that are kept, in 128 MiB of memory: of 64 KiB each, those of 256 GiB.
const MOST: u32 = 4 << 20;
/// How much of the file is read at a time, where headers lie close to each other.
const WINDOW: usize = 64 << 10;

/// What blocks hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// What lies in the file from there on.
    Stored(u64),
    /// The 4 bytes that lie there, over and over.
    Word(u64, [u8; 4]),
    /// Zeros, or nobody cares.
    Zeros,
}

/// Blocks that one chunk gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub block: u64,
    /// How many.
    pub count: u64,
    /// What they hold.
    pub fill: Fill,
}

/// What a walk comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Blocks.
    Run(Run),
    /// The CRC-32 of all blocks so far.
    Checksum(u32),
}

/// Reads small pieces that lie close to each other.
struct Pieces<'a> {
    file: &'a dyn Storage,
    at: u64,
    bytes: Vec<u8>,
}

impl Pieces<'_> {
    fn read<const N: usize>(&mut self, at: u64) -> Result<[u8; N]> {
        let inside = |window: &Self| {
            let from = usize::try_from(at.checked_sub(window.at)?).ok()?;
            window.bytes.get(from..)?.first_chunk::<N>().copied()
        };
        if let Some(piece) = inside(self) {
            return Ok(piece);
        }
        (self.at, self.bytes) = (at, vec![0; WINDOW.max(N)]);
        self.file.read_at(at, &mut self.bytes).with_context(|| format!("Could not read the chunk at offset {at}"))?;
        inside(self).ok_or_else(|| Error::invalid("a piece outside of its window"))
    }
}

/// Shows `see` every chunk, in order. Chunks that do not fit the disk or the file are an error.
pub fn walk(file: &dyn Storage, header: &FileHeader, mut see: impl FnMut(Step) -> Result<()>) -> Result<()> {
    let block_bytes = u64::from(header.block.get());
    let own = u64::from(header.chunk_bytes.get());
    let (blocks, end) = (u64::from(header.blocks.get()), file.len().context("Could not get the size of the file")?);
    if header.chunks.get() > MOST {
        return Err(Error::unsupported(format!("sparse images of more than {MOST} chunks are not read")));
    }
    let mut pieces = Pieces { file, at: 0, bytes: Vec::new() };
    let (mut at, mut block) = (u64::from(header.header_bytes.get()), 0);
    for number in 0..header.chunks.get() {
        if at.saturating_add(own) > end {
            return Err(Error::truncated("the header of a chunk", at, end));
        }
        let bytes: [u8; CHUNK_BYTES] = pieces.read(at)?;
        let chunk =
            ChunkHeader::read_from_bytes(&bytes).map_err(|_| Error::corrupt("a chunk header of another size"))?;
        let (count, carried) = (u64::from(chunk.blocks.get()), u64::from(chunk.bytes.get()).checked_sub(own));
        let data = at.saturating_add(own);
        let wrong = |what: &str| Error::corrupt(format!("chunk {number} at offset {at} {what}"));
        let expected = match chunk.kind.get() {
            RAW => count * block_bytes,
            FILL | CHECKSUM => WORD_BYTES,
            SKIP => 0,
            kind => return Err(wrong(&format!("is of the unknown type {kind:#06x}"))),
        };
        if carried != Some(expected) {
            return Err(wrong("has another size than its type and its blocks ask for"));
        }
        if chunk.kind.get() == CHECKSUM {
            see(Step::Checksum(u32::from_le_bytes(pieces.read(data)?)))?;
        } else if blocks - block < count {
            return Err(wrong("goes past the end of the disk"));
        } else if count > 0 {
            let fill = match chunk.kind.get() {
                RAW => Fill::Stored(data),
                FILL => match pieces.read(data)? {
                    [0, 0, 0, 0] => Fill::Zeros,
                    word => Fill::Word(data, word),
                },
                _ => Fill::Zeros,
            };
            see(Step::Run(Run { block, count, fill }))?;
            block += count;
        }
        at = data + expected;
    }
    if block < blocks {
        return Err(Error::corrupt(format!("the chunks hold {block} of the disk's {blocks} blocks")));
    }
    Ok(())
}

/// All runs.
pub fn runs(file: &dyn Storage, header: &FileHeader) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    walk(file, header, |step| {
        match (step, runs.last_mut()) {
            (Step::Run(run), Some(last)) if run.fill == Fill::Zeros && last.fill == Fill::Zeros => {
                last.count += run.count;
            }
            (Step::Run(run), _) => runs.push(run),
            (Step::Checksum(_), _) => {}
        }
        Ok(())
    })?;
    Ok(runs)
}
