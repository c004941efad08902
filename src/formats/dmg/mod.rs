//! dmg: macOS' disk image (UDIF), read-only: uncompressed, and in each of its codecs.
//!
//! `layout.rs` is what is on disk, `tables.rs` finds the block tables, `blocks.rs` takes them apart, `check.rs` looks at the
//! checksums. An image in several files, or an encrypted one, is refused.
//!
//! Invariant: a block of a codec is decoded as a whole, and never longer than its table says.

mod blocks;
mod check;
mod layout;
mod tables;

use zerocopy::FromBytes;

use self::blocks::{Block, Blocks};
use self::layout::{ENCRYPTED, ENCRYPTED_END, END, EntryKind, KOLY, KOLY_BYTES, Koly, Packing, SECTOR, find_trailer};
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    BlockDriver, Check, Child, CompressedUnit, Error, Extent, ExtentKind, Format, GuestOffset, HostPlace, OpenRequest,
    Result, Trailer,
};
use crate::codec::deflate::{self, Wrap};
use crate::codec::{adc, bzip2, lzfse, xz};
use crate::storage::Storage;

/// The format.
#[derive(Debug)]
pub struct Dmg;

impl Format for Dmg {
    fn name(&self) -> &'static str {
        "dmg"
    }

    fn probe(&self, head: &[u8], name: &str) -> u32 {
        if head.starts_with(KOLY) || head.starts_with(ENCRYPTED) {
            100
        } else if name.ends_with(".dmg") {
            // Without a trailer it may be half a download.
            2
        } else {
            0
        }
    }

    fn probe_end(&self, end: &Trailer<'_>) -> bool {
        end.bytes.ends_with(ENCRYPTED_END) || find_trailer(end.bytes, end.len).is_some()
    }

    fn writable(&self) -> bool {
        false
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let file = request.file;
        let koly = trailer(&*file.storage)?;
        if koly.segments.get() > 1 {
            let count = koly.segments;
            return Err(Error::unsupported(format!("A dmg image in {count} files is not supported: join it first")));
        }
        let tables = tables::read(&*file.storage, &koly)?;
        let blocks = Blocks::parse(&tables, koly.data_offset.get())?;
        let sectors = blocks.end().max(koly.sectors.get());
        let size = sectors.checked_mul(SECTOR).filter(|size| *size <= i64::MAX.unsigned_abs());
        let size = size.ok_or_else(|| Error::corrupt("the dmg trailer tells of more sectors than a disk can have"))?;
        Ok(Box::new(DmgDriver { files: [file], size, koly, blocks }))
    }
}

/// The trailer, which in some images stands in front.
fn trailer(file: &dyn Storage) -> Result<Koly> {
    let len = file.len().context("Could not get the size of the file")?;
    let start = len.saturating_sub(END);
    let mut end = vec![0; usize::try_from(len - start).unwrap_or(0)];
    file.read_at(start, &mut end).context("Could not read the dmg trailer")?;
    let mut head = [0; KOLY_BYTES];
    file.read_at(0, &mut head).context("Could not read the dmg trailer")?;
    if head.starts_with(ENCRYPTED) || end.ends_with(ENCRYPTED_END) {
        return Err(Error::unsupported(
            "Encrypted dmg images are not supported: decrypt it on macOS, with hdiutil convert",
        ));
    }
    let bytes = match find_trailer(&end, len) {
        Some(at) => {
            file.read_at(at, &mut head).context("Could not read the dmg trailer")?;
            head
        }
        None if head.starts_with(KOLY) => head,
        None => return Err(Error::corrupt("Could not locate UDIF trailer in dmg file")),
    };
    Koly::read_from_bytes(&bytes).map_err(|_| Error::corrupt("a dmg trailer of another size"))
}

#[derive(Debug)]
struct DmgDriver {
    files: [Child; 1],
    size: u64,
    koly: Koly,
    blocks: Blocks,
}

impl DmgDriver {
    fn block(&self, sector: u64) -> Option<&Block> {
        let index = self.blocks.all.partition_point(|block| block.end() <= sector);
        self.blocks.all.get(index)
    }
}

impl BlockDriver for DmgDriver {
    fn format(&self) -> &'static str {
        Dmg.name()
    }

    fn virtual_size(&self) -> u64 {
        self.size
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let offset = at.get();
        let max = max.min(self.size.saturating_sub(offset));
        let zeros = |len: u64| Ok(Extent { start: at, len: len.min(max), kind: ExtentKind::Zero(None) });
        let Some(block) = self.block(offset / SECTOR) else { return zeros(max) };
        let start = block.sector * SECTOR;
        if start > offset {
            return zeros(start - offset);
        }
        let (within, len) = (offset - start, block.end() * SECTOR - offset);
        let kind = match block.kind {
            EntryKind::Zero | EntryKind::Ignored | EntryKind::None => return zeros(len),
            EntryKind::Raw => ExtentKind::Data(HostPlace::main(block.at.saturating_add(within))),
            EntryKind::Packed(_) => ExtentKind::Compressed(CompressedUnit {
                start: GuestOffset(start),
                len: block.sectors * SECTOR,
                place: HostPlace::main(block.at),
                host_len: block.len,
            }),
        };
        Ok(Extent { start: at, len: len.min(max), kind })
    }

    fn short_unit(&self) -> Option<u64> {
        // The trailer lies behind all data.
        Some(1)
    }

    fn decode(&self, unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        let sector = unit.start.get() / SECTOR;
        let Some(EntryKind::Packed(packing)) = self.block(sector).map(|block| block.kind) else {
            return Err(Error::invalid(format!("sector {sector} is in no codec")));
        };
        let decoded = match packing {
            Packing::Adc => adc::decode(input, out),
            Packing::Zlib => deflate::decode(Wrap::Zlib, input, out),
            Packing::Bzip2 => bzip2::decode(input, out),
            Packing::Lzfse => lzfse::decode(input, out),
            Packing::Lzma => xz::decode(input, out),
        };
        decoded.map_err(|error| Error::corrupt(format!("block of sector {sector}: {error}")))
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::plain(None))
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }
}
