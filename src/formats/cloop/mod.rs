//! cloop: Knoppix' compressed loop device, version 2.0; read-only.
//!
//! Invariant: the offsets of the blocks are in order: all of them are looked at when the image is opened (for a check, by
//! the check), and read again when they are needed, so memory does not grow with their number.

mod check;
mod layout;

use std::sync::Mutex;

use zerocopy::FromBytes;

use self::layout::{ANY_SCRIPT, FORMAT, HEADER_BYTES, Header, OFFSET_BYTES, SCRIPT};
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    BlockDriver, Check, Child, CompressedUnit, Error, Extent, ExtentKind, FileEnd, Format, GuestOffset, HostPlace,
    OpenRequest, Result,
};
use crate::codec::deflate::{self, Wrap};
use crate::formats::table::TableCache;
use crate::storage::Storage;

/// The format.
#[derive(Debug)]
pub struct Cloop;

/// The largest block, and the most bytes of a compressed one.
const LARGEST_BLOCK: u64 = 64 << 20;
const LARGEST_PACKED: u64 = 2 * LARGEST_BLOCK;
/// The most bytes of the offsets.
const MOST_OFFSETS: u64 = 512 << 20;
/// How much of them is looked at at a time.
const PIECE: usize = 64 << 10;
/// Memory for them.
const CACHE: usize = 256 << 10;

impl Format for Cloop {
    fn name(&self) -> &'static str {
        "cloop"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        let other = || head.strip_prefix(ANY_SCRIPT).and_then(|rest| rest.get(3..));
        if head.starts_with(SCRIPT) || other().is_some_and(|rest| rest.starts_with(FORMAT)) { 2 } else { 0 }
    }

    fn writable(&self) -> bool {
        false
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let OpenRequest { file, purpose, .. } = request;
        let mut head = [0; HEADER_BYTES];
        file.storage.read_at(0, &mut head).context("Could not read the header of the cloop image")?;
        let header = Header::read_from_bytes(&head).map_err(|_| Error::corrupt("a header of another size"))?;
        if let Some(version) = header.script.strip_prefix(ANY_SCRIPT).and_then(|rest| rest.first_chunk::<3>())
            && version != b"2.0"
        {
            let version = version.escape_ascii();
            return Err(Error::unsupported(format!(
                "cloop images of version {version} are not supported: unpack it first, with extract_compressed_fs"
            )));
        }
        let (block, blocks) = (u64::from(header.block.get()), u64::from(header.blocks.get()));
        if block == 0 {
            return Err(Error::corrupt("block_size cannot be zero"));
        }
        if block % 512 != 0 {
            return Err(Error::corrupt(format!("block_size {block} must be a multiple of 512")));
        }
        if block > LARGEST_BLOCK {
            return Err(Error::corrupt(format!("block_size {block} must be 64 MB or less")));
        }
        let most = u64::from(u32::MAX) / OFFSET_BYTES;
        if blocks > most {
            return Err(Error::corrupt(format!("n_blocks {blocks} must be {most} or less")));
        }
        if (blocks + 1) * OFFSET_BYTES > MOST_OFFSETS {
            return Err(Error::corrupt("image requires too many offsets, try increasing block size"));
        }
        let table = (blocks + 1) * OFFSET_BYTES;
        FileEnd::default().require(&*file.storage, "the table of offsets", HEADER_BYTES as u64, table)?;
        if !purpose.checks() {
            check_offsets(&*file.storage, blocks)?;
        }
        let table = TableCache::new(CACHE, &file.name, "offsets");
        Ok(Box::new(CloopDriver { files: [file], block, blocks, offsets: Mutex::new(table) }))
    }
}

/// Refuses offsets that are not in order.
fn check_offsets(file: &dyn Storage, blocks: u64) -> Result<()> {
    let (mut at, end) = (HEADER_BYTES as u64, HEADER_BYTES as u64 + (blocks + 1) * OFFSET_BYTES);
    let (mut piece, mut last, mut index) = (vec![0; PIECE], None, 0u64);
    while at < end {
        let len = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
        let piece = piece.get_mut(..len).unwrap_or_default();
        file.read_at(at, piece).context("Could not read the table of offsets")?;
        for bytes in piece.as_chunks::<8>().0 {
            let offset = u64::from_be_bytes(*bytes);
            if let Some(last) = last {
                let wrong = if offset < last {
                    "offsets not monotonically increasing"
                } else if offset - last > LARGEST_PACKED {
                    "invalid compressed block size"
                } else {
                    ""
                };
                if !wrong.is_empty() {
                    return Err(Error::corrupt(format!("{wrong} at index {index}, image file is corrupt")));
                }
            }
            (last, index) = (Some(offset), index + 1);
        }
        at += len as u64;
    }
    Ok(())
}

#[derive(Debug)]
struct CloopDriver {
    files: [Child; 1],
    /// Bytes of a block.
    block: u64,
    blocks: u64,
    offsets: Mutex<TableCache>,
}

impl CloopDriver {
    /// What the table says of where a block's bytes start and end.
    fn offsets(&self, index: u64) -> Result<(u64, u64)> {
        let mut bytes = [0; 16];
        let at = HEADER_BYTES as u64 + index * OFFSET_BYTES;
        let mut offsets = self.offsets.lock().unwrap_or_else(|e| e.into_inner());
        offsets.read(&*self.files[0].storage, at, &mut bytes)?;
        let [start, end] =
            [&bytes[..8], &bytes[8..]].map(|half| half.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes)));
        Ok((start, end))
    }
}

impl BlockDriver for CloopDriver {
    fn format(&self) -> &'static str {
        Cloop.name()
    }

    fn virtual_size(&self) -> u64 {
        self.block * self.blocks
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let index = at.get() / self.block;
        let (start, end) = self.offsets(index)?;
        let unit = CompressedUnit {
            start: GuestOffset(index * self.block),
            len: self.block,
            place: HostPlace::main(start),
            // No stream that gives a block is longer: deflate stores what it cannot make smaller.
            host_len: end.saturating_sub(start).min(2 * self.block),
        };
        let left = (index + 1) * self.block - at.get();
        Ok(Extent { start: at, len: left.min(max), kind: ExtentKind::Compressed(unit) })
    }

    fn decode(&self, unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        let index = unit.start.get() / self.block;
        deflate::decode(Wrap::Zlib, input, out).map_err(|error| Error::corrupt(format!("block {index}: {error}")))
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::default())
    }
}
