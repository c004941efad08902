//! vmdk: VMware's disk format, in all its subformats.
//!
//! A disk is a row of extents, each a file of its own (or the rest of the file that holds the descriptor), each
//! stored flat, sparse, as zeros, or compressed. What is where: `layout.rs` the structures, `descriptor.rs` the
//! text, `sparse.rs` grain tables, `sesparse.rs` those of vSphere's snapshots, `stream.rs` the front-to-back writing of stream-optimized extents, `write.rs`
//! placing, `text.rs` changes of the text, `create.rs`, `resize.rs`.
//!
//! Source: VMware, *Virtual Disk Format 5.0* (technical note).

mod create;
mod descriptor;
mod layout;
mod resize;
mod sesparse;
mod sparse;
mod stream;
mod text;
mod write;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value, json};

use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    BackingRef, BlockDriver, Child, CompressedUnit, Create, Error, Extent, ExtentKind, Format, GuestOffset, HostOffset,
    HostPlace, OpenRequest, Resize, Result, Write,
};
use crate::codec;
use crate::codec::deflate::{self, Wrap};
use crate::storage::Storage;

use descriptor::{Access, Descriptor, ExtentType};
use layout::*;
use sesparse::SeSparse;
use sparse::{Grain, Sparse};

/// The format.
#[derive(Debug)]
pub struct Vmdk;

impl Format for Vmdk {
    fn name(&self) -> &'static str {
        "vmdk"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        let known = head.starts_with(MAGIC) || head.starts_with(COWD_MAGIC) || descriptor::looks_like(head);
        if known { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        Ok(Box::new(VmdkDriver::open(request)?))
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }
}

/// How the guest bytes of an extent are stored.
#[derive(Debug)]
enum Body {
    /// In a file, from an offset in bytes on.
    Flat { file: usize, offset: u64 },
    /// Behind grain tables.
    Sparse { file: usize, sparse: Box<Sparse> },
    /// Behind the tables of a space-efficient extent; read only.
    SeSparse { file: usize, sparse: Box<SeSparse> },
    /// Nowhere: zeros.
    Zero,
    /// The guest has no access.
    Forbidden,
}

/// A run of the guest's disk.
#[derive(Debug)]
struct Part {
    start: u64,
    len: AtomicU64,
    access: Access,
    /// The type's word in the descriptor; empty where the descriptor is within the extent itself.
    word: String,
    body: Body,
}

impl Part {
    fn new(start: u64, len: u64, access: Access, word: &str, body: Body) -> Self {
        Self { start, len: AtomicU64::new(len), access, word: word.to_owned(), body }
    }

    /// Its length in bytes.
    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// Where it ends on the guest's disk. The sum was checked when the image was opened.
    fn end(&self) -> u64 {
        self.start.saturating_add(self.len())
    }

    /// Bytes in a grain, where there are grains.
    fn grain(&self) -> Option<u64> {
        match &self.body {
            Body::Sparse { sparse, .. } => Some(sparse.shape.grain),
            Body::SeSparse { .. } => Some(SeSparse::GRAIN),
            _ => None,
        }
    }
}

/// An opened image.
#[derive(Debug)]
struct VmdkDriver {
    files: Vec<Child>,
    parts: Vec<Part>,
    descriptor: Descriptor,
    /// Where the descriptor's text is in the first file, and how long it may get; `None` for none.
    text_at: Option<(u64, Option<u64>)>,
    /// The file that has taken the first one's place since the image was opened.
    replaced: Mutex<Option<Arc<dyn Storage>>>,
    backing: Option<BackingRef>,
    size: AtomicU64,
    write: bool,
    /// Whether the content id has been changed since the image was opened.
    renewed: Mutex<bool>,
}

impl VmdkDriver {
    fn open(request: OpenRequest<'_>) -> Result<Self> {
        let OpenRequest { file, write, related, .. } = request;
        let mut head = vec![0; 2048];
        file.storage.read_at(0, &mut head).context("Could not read the header")?;
        let mut files = vec![file];
        let mut parts = Vec::new();
        let main = files[0].storage.clone();
        let (descriptor, text_at);
        if head.starts_with(MAGIC) || head.starts_with(COWD_MAGIC) {
            let sparse = Sparse::open(main.clone(), &head)?;
            let sectors = sparse.state().capacity;
            let header = sparse.state().header;
            let place = header.and_then(|header| descriptor_place(&header, &head));
            let mut parsed = match place {
                Some((at, len)) => Descriptor::parse(&read_text(&*main, at, len)?)?,
                None => Descriptor { parent_cid: descriptor::NO_PARENT, ..Descriptor::default() },
            };
            if sparse.hosted {
                // The header says which of the two it is; the text may be missing or copied from elsewhere.
                let kind = if sparse.shape.compressed { "streamOptimized" } else { "monolithicSparse" };
                parsed.create_type = kind.to_owned();
            }
            descriptor = parsed;
            text_at = place.map(|(at, len)| (at, Some(len)));
            let access = if sparse.hosted { Access::ReadWrite } else { Access::ReadOnly };
            let body = Body::Sparse { file: 0, sparse: Box::new(sparse) };
            parts.push(Part::new(0, bytes(sectors)?, access, "", body));
        } else if descriptor::looks_like(&head) {
            let len = main.len().context("Could not get the length of the descriptor")?;
            if len > MAX_DESCRIPTOR {
                return Err(Error::corrupt("The descriptor is longer than 1 MiB"));
            }
            descriptor = Descriptor::parse(&read_text(&*main, 0, len)?)?;
            if descriptor.create_type.is_empty() {
                return Err(Error::corrupt("invalid VMDK image descriptor"));
            }
            text_at = Some((0, None));
            let (mut start, mut entries) = (0u64, 0);
            for (index, line) in descriptor.extents.iter().enumerate() {
                let body = open_extent(index, line, &mut files, related)?;
                if let Body::Sparse { sparse, .. } = &body {
                    entries += sparse.directory_entries();
                }
                // A line costs nothing: the extent that all of them name may be large.
                if entries > 2 * MAX_TABLES {
                    return Err(Error::corrupt("The extents have too many grain tables"));
                }
                // A sparse extent knows its own length; the line is a copy of it.
                let len = match &body {
                    Body::Sparse { sparse, .. } => bytes(sparse.state().capacity)?,
                    _ => bytes(line.sectors)?,
                };
                parts.push(Part::new(start, len, line.access, &line.word, body));
                start = start.checked_add(len).ok_or_else(|| Error::corrupt("The extents are too long"))?;
            }
        } else if main.len().context("Could not get the length of the image")? == 0 {
            return Err(Error::corrupt("File is too small, not a valid image"));
        } else {
            return Err(Error::corrupt("invalid VMDK image descriptor"));
        }
        if write && parts.iter().any(|part| part.grain().is_some_and(|grain| !part.start.is_multiple_of(grain))) {
            return Err(Error::unsupported("An extent that begins within a grain can be read, but not written"));
        }
        let size = parts.last().map_or(0, Part::end);
        let backing =
            descriptor.parent_name().map(|name| BackingRef { name: name.to_owned(), format: Some("vmdk".to_owned()) });
        let renewed = Mutex::new(false);
        let (size, replaced) = (AtomicU64::new(size), Mutex::default());
        Ok(Self { files, parts, descriptor, text_at, replaced, backing, size, write, renewed })
    }

    /// The index of the extent that holds `at`.
    fn part_at(&self, at: u64) -> Result<usize> {
        let index = self.parts.partition_point(|part| part.end() <= at);
        match index < self.parts.len() {
            true => Ok(index),
            // Extents that were added by a resize are not opened here.
            false if at < self.virtual_size() => Err(Error::unsupported(format!(
                "offset {at} lies in an extent that is new: the image has to be opened again"
            ))),
            false => Err(Error::corrupt(format!("no extent at offset {at}"))),
        }
    }
}

fn bytes(sectors: u64) -> Result<u64> {
    sectors.checked_mul(SECTOR).filter(|n| i64::try_from(*n).is_ok()).ok_or_else(|| Error::corrupt("Extent too long"))
}

/// Where the descriptor within a sparse file is: where the header says, or, if that says nothing, behind it.
fn descriptor_place(header: &SparseHeader, head: &[u8]) -> Option<(u64, u64)> {
    if header.descriptor_at != 0 {
        return Some((header.descriptor_at.saturating_mul(SECTOR), header.descriptor_sectors.saturating_mul(SECTOR)));
    }
    let behind = head.get(SparseHeader::SIZE..).is_some_and(descriptor::looks_like);
    behind.then_some((SECTOR, DESCRIPTOR_SECTORS * SECTOR))
}

fn read_text(storage: &dyn Storage, at: u64, len: u64) -> Result<String> {
    let len = len.min(MAX_DESCRIPTOR).min(storage.len().context("Could not get the length")?.saturating_sub(at));
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    storage.read_at(at, &mut bytes).context("Could not read the descriptor")?;
    Ok(descriptor::text(&bytes))
}

fn open_extent(
    index: usize,
    line: &descriptor::ExtentLine,
    files: &mut Vec<Child>,
    related: &dyn crate::block::Related,
) -> Result<Body> {
    match (line.access, line.kind) {
        (Access::None, _) => return Ok(Body::Forbidden),
        (_, ExtentType::Zero) => return Ok(Body::Zero),
        _ => {}
    }
    let child = related.open(&format!("extents.{index}"), &line.file)?;
    let storage = child.storage.clone();
    files.push(child);
    let file = files.len() - 1;
    if line.kind == ExtentType::Flat {
        return Ok(Body::Flat { file, offset: bytes(line.offset)? });
    }
    if line.kind == ExtentType::SeSparse {
        return Ok(Body::SeSparse { file, sparse: Box::new(SeSparse::open(storage)?) });
    }
    let mut head = vec![0; 512];
    storage.read_at(0, &mut head).context("Could not read the extent's header")?;
    let sparse = Sparse::open(storage, &head)?;
    Ok(Body::Sparse { file, sparse: Box::new(sparse) })
}

impl BlockDriver for VmdkDriver {
    fn format(&self) -> &'static str {
        Vmdk.name()
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let part = &self.parts[self.part_at(at.get())?];
        let inside = at.get() - part.start;
        let max = max.min(part.end().saturating_sub(at.get()));
        let (kind, len) = match &part.body {
            Body::Zero => (ExtentKind::Zero(None), max),
            Body::Forbidden => {
                return Err(Error::unsupported(format!("offset {at} lies in an extent that is marked NOACCESS")));
            }
            Body::Flat { file, offset } => {
                let place = HostPlace { file: *file, at: HostOffset(*offset) + inside };
                let stored = self.files[*file].stored_extent(at, place, max)?;
                (stored.kind, stored.len)
            }
            Body::SeSparse { file, sparse } => {
                let (grain, len) = sparse.map(inside, max)?;
                let kind = match grain {
                    Grain::Unallocated => ExtentKind::Unallocated(None),
                    Grain::Zeroed => ExtentKind::Zero(None),
                    Grain::At(sector) => {
                        let skip = inside % SeSparse::GRAIN;
                        ExtentKind::Data(HostPlace { file: *file, at: HostOffset(sector * SECTOR) + skip })
                    }
                };
                (kind, len)
            }
            Body::Sparse { file, sparse } => {
                let (grain, len) = sparse.map(inside, max)?;
                let kind = match grain {
                    Grain::Unallocated => ExtentKind::Unallocated(None),
                    Grain::Zeroed => ExtentKind::Zero(None),
                    Grain::At(sector) if sparse.shape.compressed => {
                        ExtentKind::Compressed(self.unit(*file, sparse, sector, at, inside, part)?)
                    }
                    Grain::At(sector) => {
                        let skip = inside % sparse.shape.grain;
                        ExtentKind::Data(HostPlace { file: *file, at: HostOffset(sector * SECTOR) + skip })
                    }
                };
                (kind, len)
            }
        };
        Ok(Extent { start: at, len, kind })
    }

    fn decode(&self, _unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        inflate(input, out)
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn backing(&self) -> Option<&BackingRef> {
        self.backing.as_ref()
    }

    fn accept_backing(&self, below: &dyn BlockDriver) -> Result<()> {
        let info = below.info()?;
        let cid = info.specific.as_ref().and_then(|(_, data)| data.get("cid")).and_then(Value::as_u64);
        match cid {
            Some(cid) if cid == u64::from(self.descriptor.parent_cid) => Ok(()),
            Some(cid) => Err(Error::corrupt(format!(
                "The parent has changed since this image was made: its CID is {cid:x}, not {:x}",
                self.descriptor.parent_cid
            ))),
            None => Err(Error::corrupt("The parent is not a vmdk image")),
        }
    }

    fn info(&self) -> Result<ImageInfo> {
        let extents: Vec<Value> = self
            .parts
            .iter()
            .map(|part| {
                let mut extent = Map::new();
                let file = match &part.body {
                    Body::Flat { file, .. } | Body::Sparse { file, .. } | Body::SeSparse { file, .. } => {
                        self.files.get(*file)
                    }
                    _ => None,
                };
                extent.insert("filename".into(), json!(file.map_or("", |file| file.name.as_str())));
                extent.insert("format".into(), json!(part.word));
                extent.insert("virtual-size".into(), json!(part.len()));
                if let Some(grain) = part.grain() {
                    extent.insert("cluster-size".into(), json!(grain));
                }
                if let Body::Sparse { sparse, .. } = &part.body
                    && sparse.shape.compressed
                {
                    extent.insert("compressed".into(), json!(true));
                }
                Value::Object(extent)
            })
            .collect();
        let mut data = Map::new();
        data.insert("create-type".into(), json!(self.descriptor.create_type));
        data.insert("cid".into(), json!(self.descriptor.cid));
        data.insert("parent-cid".into(), json!(self.descriptor.parent_cid));
        data.insert("extents".into(), Value::Array(extents));
        let cluster_size = self.parts.first().and_then(Part::grain);
        Ok(ImageInfo { cluster_size, dirty: Some(false), specific: Some(("vmdk", data)), ..ImageInfo::default() })
    }

    fn flush(&self) -> Result<()> {
        self.write_out()
    }

    fn writing(&self) -> Option<&dyn Write> {
        self.write.then_some(self)
    }

    fn resizing(&self) -> Option<&dyn Resize> {
        Some(self)
    }
}

impl VmdkDriver {
    fn unit(
        &self,
        file: usize,
        sparse: &Sparse,
        sector: u64,
        at: GuestOffset,
        inside: u64,
        part: &Part,
    ) -> Result<CompressedUnit> {
        let grain = sparse.shape.grain;
        let marker_at = sector.checked_mul(SECTOR).ok_or_else(|| Error::corrupt("grain past every end"))?;
        // The worst that deflate does to a grain, with room for a sloppy encoder.
        let cap = grain + grain / 512 + 1024;
        let (skip, host_len) = if sparse.shape.markers {
            let mut marker = [0; GRAIN_MARKER];
            sparse.storage.read_at(marker_at, &mut marker).context("Could not read a grain marker")?;
            let size = u64::from(u32::from_le_bytes([marker[8], marker[9], marker[10], marker[11]]));
            if size == 0 || size > cap {
                return Err(Error::corrupt(format!("The grain at {at} has a compressed size of {size} bytes")));
            }
            (GRAIN_MARKER as u64, size)
        } else {
            let end = sparse.storage.len().context("Could not get the length")?;
            (0, cap.min(end.saturating_sub(marker_at)))
        };
        let start = part.start + inside / grain * grain;
        let place = HostPlace { file, at: HostOffset(marker_at) + skip };
        Ok(CompressedUnit { start: GuestOffset(start), len: grain, place, host_len })
    }
}

/// Decodes a zlib stream; what it leaves of a last, short grain is zero.
fn inflate(input: &[u8], out: &mut [u8]) -> Result<()> {
    let done = deflate::decode_some(Wrap::Zlib, input, out).map_err(|error| match error {
        codec::Error::Short => Error::corrupt("Compressed grain is cut off"),
        error => Error::corrupt(format!("Compressed grain is damaged: {error}")),
    })?;
    if let Some(rest) = out.get_mut(done..) {
        rest.fill(0);
    }
    Ok(())
}
