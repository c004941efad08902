//! simg: Android's sparse image, which `fastboot` flashes; read-only.
//!
//! Blocks of which the image says nothing read as zeros, as they do on a device that was erased.
//!
//! Invariant: the chunks are walked once, when guest data is first asked for.

mod check;
mod chunks;
mod layout;

use std::sync::OnceLock;

use zerocopy::FromBytes;

use self::chunks::{Fill, Run};
use self::layout::{CHUNK_BYTES, FileHeader, HEADER_BYTES, MAGIC, MAJOR, WORD_BYTES};
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    BlockDriver, Check, Child, CompressedUnit, Error, Extent, ExtentKind, Format, GuestOffset, HostPlace, OpenRequest,
    Result,
};

/// The format.
#[derive(Debug)]
pub struct Simg;

/// How much of a filled run is made at a time, at most.
const FILLED: u64 = 64 << 10;

impl Format for Simg {
    fn name(&self) -> &'static str {
        "simg"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        if head.starts_with(&MAGIC) { 100 } else { 0 }
    }

    fn writable(&self) -> bool {
        false
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let file = request.file;
        let mut head = [0; HEADER_BYTES];
        file.storage.read_at(0, &mut head).context("Could not read the header of the sparse image")?;
        let header = FileHeader::read_from_bytes(&head).map_err(|_| Error::corrupt("a header of another size"))?;
        if header.magic != MAGIC {
            return Err(Error::corrupt("Image not in simg format"));
        }
        if header.major.get() != MAJOR {
            let version = header.major;
            return Err(Error::unsupported(format!("Sparse images of version {version} are not supported")));
        }
        let short = |bytes: u16, least: usize| usize::from(bytes) < least;
        if short(header.header_bytes.get(), HEADER_BYTES) || short(header.chunk_bytes.get(), CHUNK_BYTES) {
            return Err(Error::corrupt("The headers of the sparse image are shorter than their fields"));
        }
        if header.block.get() == 0 || !header.block.get().is_multiple_of(4) {
            return Err(Error::corrupt(format!("The block size {} is not a multiple of 4", header.block)));
        }
        Ok(Box::new(SimgDriver { files: [file], header, runs: OnceLock::new() }))
    }
}

#[derive(Debug)]
struct SimgDriver {
    files: [Child; 1],
    header: FileHeader,
    runs: OnceLock<Vec<Run>>,
}

impl SimgDriver {
    fn block(&self) -> u64 {
        u64::from(self.header.block.get())
    }

    /// Bytes that the chunks hold: the disk but for what is missing of its last sector.
    fn stored(&self) -> u64 {
        self.block() * u64::from(self.header.blocks.get())
    }

    fn runs(&self) -> Result<&[Run]> {
        if let Some(runs) = self.runs.get() {
            return Ok(runs);
        }
        let runs = chunks::runs(&*self.files[0].storage, &self.header)
            .with_context(|| format!("Could not read the chunks of '{}'", self.files[0].name))?;
        Ok(self.runs.get_or_init(|| runs))
    }
}

impl BlockDriver for SimgDriver {
    fn format(&self) -> &'static str {
        Simg.name()
    }

    fn virtual_size(&self) -> u64 {
        self.stored().next_multiple_of(512)
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let (offset, block) = (at.get(), self.block());
        let max = max.min(self.virtual_size().saturating_sub(offset));
        let runs = self.runs()?;
        let index = runs.partition_point(|run| (run.block + run.count) * block <= offset);
        let Some(run) = runs.get(index) else {
            return Ok(Extent { start: at, len: max, kind: ExtentKind::Zero(None) });
        };
        let within = offset.saturating_sub(run.block * block);
        let left = max.min(run.count * block - within);
        let (len, kind) = match run.fill {
            Fill::Stored(host) => (left, ExtentKind::Data(HostPlace::main(host.saturating_add(within)))),
            Fill::Zeros => (left, ExtentKind::Zero(None)),
            Fill::Word(host, _) => {
                let unit = within / FILLED * FILLED;
                let unit_len = FILLED.min(run.count * block - unit);
                let kind = ExtentKind::Compressed(CompressedUnit {
                    start: GuestOffset(run.block * block + unit),
                    len: unit_len,
                    place: HostPlace::main(host),
                    host_len: WORD_BYTES,
                });
                (left.min(unit + unit_len - within), kind)
            }
        };
        Ok(Extent { start: at, len, kind })
    }

    fn short_unit(&self) -> Option<u64> {
        // Blocks are written whole.
        Some(1)
    }

    fn decode(&self, _unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        for (byte, word) in out.iter_mut().zip(input.iter().cycle()) {
            *byte = *word;
        }
        Ok(())
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::plain(Some(self.block())))
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }
}
