//! vmdk: VMware's disk format, in all its subformats.
//!
//! A disk is a row of extents, each a file of its own (or the rest of the file that holds the descriptor), each
//! stored flat, sparse, as zeros, or compressed. What is where: `layout.rs` the structures, `descriptor.rs` the
//! text, `open.rs` which files there are, `sparse.rs` one extent behind grain tables, `tables.rs` those, `stream.rs` the
//! open end of a stream-optimized one, `grain.rs` one compressed grain, `sesparse.rs` the extents of vSphere's snapshots, `write.rs` placing, `whole.rs` what has to hold before, `text.rs`
//! changes of the text, `layering.rs` another parent, `create.rs`, `resize.rs` and, for one sparse extent, `length.rs`, with
//! `intact.rs` for what has to hold before; `check.rs` and, for one sparse extent, `inspect.rs`.
//!
//! Source: VMware, *Virtual Disk Format 5.0* (technical note).

mod check;
mod create;
mod descriptor;
mod grain;
mod inspect;
mod intact;
mod layering;
mod layout;
mod length;
mod measure;
mod open;
mod resize;
mod sesparse;
mod sparse;
mod stream;
mod tables;
mod text;
mod whole;
mod write;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value, json};

use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    BackingChange, BackingRef, BlockDriver, Check, Child, CompressedUnit, Create, Error, ErrorKind, Extent, ExtentKind,
    Format, GuestOffset, HostOffset, HostPlace, OpenRequest, Resize, Result, StoredWord, Write,
};
use crate::storage::Storage;

use descriptor::{Descriptor, ExtentAccess};
use layout::*;
use open::TextAt;
use sesparse::SeSparse;
use sparse::Sparse;
use tables::Grain;

/// The format.
#[derive(Debug)]
pub struct Vmdk;

impl Format for Vmdk {
    fn name(&self) -> &'static str {
        "vmdk"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        // Extents that are no disks of their own are recognised too, to be refused by what they are.
        let extent = head.starts_with(COWD_MAGIC) || is_sesparse(head);
        let known = head.starts_with(MAGIC) || extent || descriptor::looks_like(head);
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
    /// In a file, from an offset on.
    Flat { file: usize, offset: HostOffset },
    /// Behind grain tables.
    Sparse { file: usize, sparse: Box<Sparse> },
    /// Behind the tables of a space-efficient extent; read only.
    SeSparse { file: usize, sparse: Box<SeSparse> },
    /// In a file that must not be opened, so that nothing but its name is known.
    Closed { name: String },
    /// Nowhere: zeros.
    Zero,
    /// The guest has no access.
    Forbidden,
}

/// A run of the guest's disk.
#[derive(Debug)]
struct VmdkPart {
    start: GuestOffset,
    len: AtomicU64,
    access: ExtentAccess,
    /// The type's word in the descriptor; empty where the descriptor is within the extent itself.
    word: String,
    body: Body,
}

impl VmdkPart {
    fn new(start: GuestOffset, len: u64, access: ExtentAccess, word: &str, body: Body) -> Self {
        Self { start, len: AtomicU64::new(len), access, word: word.to_owned(), body }
    }

    /// Its length in bytes.
    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// Where it ends on the guest's disk. The sum was checked when the image was opened.
    fn end(&self) -> u64 {
        (self.start + self.len()).get()
    }

    /// How far behind its start a place of the guest's disk is that lies in it.
    fn inside(&self, at: GuestOffset) -> u64 {
        at.get() - self.start.get()
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
    parts: Vec<VmdkPart>,
    descriptor: Descriptor,
    /// Where the descriptor's text is in the first file.
    text_at: TextAt,
    /// The file that has taken the first one's place since the image was opened.
    replaced: Mutex<Option<Arc<dyn Storage>>>,
    backing: Option<BackingRef>,
    size: AtomicU64,
    write: bool,
    /// The content id that it has got since it was opened.
    renewed: Mutex<Option<u32>>,
    /// Whether zeros are kept as such though nothing lies below.
    keeps_zeros: AtomicBool,
    /// Whether the files were found to hold all that the tables name.
    whole: Mutex<bool>,
}

impl VmdkDriver {
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

impl BlockDriver for VmdkDriver {
    fn format(&self) -> &'static str {
        Vmdk.name()
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Grains are written as a whole; a flat extent is counted in sectors.
    fn short_unit(&self) -> Option<u64> {
        let whole = self.parts.iter().all(|part| matches!(part.body, Body::Sparse { .. }));
        Some(if whole { 1 } else { 512 })
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let part = &self.parts[self.part_at(at.get())?];
        let inside = part.inside(at);
        let max = max.min(part.end().saturating_sub(at.get()));
        let (kind, len) = match &part.body {
            Body::Zero => (ExtentKind::Zero(None), max),
            Body::Closed { name } => return Err(Error::new(ErrorKind::Forbidden, format!("'{name}' was not opened"))),
            Body::Forbidden => {
                return Err(Error::unsupported(format!("offset {at} lies in an extent that is marked NOACCESS")));
            }
            Body::Flat { file, offset } => {
                let place = HostPlace { file: *file, at: *offset + inside };
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
                        ExtentKind::Data(HostPlace { file: *file, at: HostOffset(sector.bytes()) + skip })
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
                        ExtentKind::Data(HostPlace { file: *file, at: HostOffset(sector.bytes()) + skip })
                    }
                };
                (kind, len)
            }
        };
        Ok(Extent { start: at, len, kind })
    }

    fn stored_word(&self, at: GuestOffset) -> Result<StoredWord> {
        let flat = matches!(self.parts[self.part_at(at.get())?].body, Body::Flat { .. });
        Ok(if flat { StoredWord::Both } else { StoredWord::Layer })
    }

    fn decode(&self, unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        let damaged = |error: Error| error.in_file_at(unit.place.at.get());
        let done = grain::decode(input, out).map_err(damaged)? as u64;
        // An encoder may store what the disk has of its last grain alone.
        let part = &self.parts[self.part_at(unit.start.get())?];
        let least = unit.len.min(part.end().saturating_sub(unit.start.get()));
        match done < least {
            true => Err(damaged(Error::corrupt(format!("Compressed grain has {done} bytes, not {least}")))),
            false => Ok(()),
        }
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn backing(&self) -> Option<&BackingRef> {
        self.backing.as_ref()
    }

    fn content_id(&self) -> Option<u128> {
        Some(self.renewed.lock().unwrap_or_else(|e| e.into_inner()).unwrap_or(self.descriptor.cid).into())
    }

    fn keep_content_id(&self) {
        self.renewed.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(self.descriptor.cid);
    }

    fn accept_backing(&self, below: &dyn BlockDriver) -> Result<()> {
        match below.content_id() {
            Some(cid) if cid == u128::from(self.descriptor.parent_cid) => Ok(()),
            Some(cid) => Err(Error::corrupt(format!(
                "The parent has changed since this image was made: its CID is {cid:x}, not {:x}",
                self.descriptor.parent_cid
            ))
            .advise("where that was a commit of this image that was stopped, 'rebase -u' names the parent again")),
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
                let name = match &part.body {
                    Body::Closed { name } => name,
                    _ => file.map_or("", |file| file.name.as_str()),
                };
                extent.insert("filename".into(), json!(name));
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
        let cluster_size = self.parts.first().and_then(VmdkPart::grain);
        let references = self.parts.iter().filter_map(|part| match &part.body {
            Body::Closed { name } => Some(name.clone()),
            Body::Flat { file, .. } | Body::Sparse { file, .. } | Body::SeSparse { file, .. } if *file > 0 => {
                self.files.get(*file).map(|file| file.name.clone())
            }
            _ => None,
        });
        Ok(ImageInfo {
            cluster_size,
            dirty: Some(false),
            references: references.map(|name| ("extent", name)).collect(),
            specific: Some(("vmdk", data)),
            ..ImageInfo::default()
        })
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

    fn backing_change(&self) -> Option<&dyn BackingChange> {
        self.write.then_some(self)
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }
}

impl VmdkDriver {
    fn unit(
        &self,
        file: usize,
        sparse: &Sparse,
        sector: Sectors,
        at: GuestOffset,
        inside: u64,
        part: &VmdkPart,
    ) -> Result<CompressedUnit> {
        let grain = sparse.shape.grain;
        let marker_at = sector.checked_bytes().ok_or_else(|| Error::corrupt("grain past every end"))?;
        let cap = grain::longest(grain);
        let failed = || format!("{}: could not read a grain marker", sparse.name);
        let end = || sparse.storage.len().with_context(failed);
        let (skip, host_len) = if sparse.shape.markers {
            let marker: GrainMarker = read(&*sparse.storage, &sparse.name, "a grain marker", marker_at)?;
            let skip = size_of::<GrainMarker>() as u64;
            let (told, here) = (marker.sector.get(), Sectors::within(inside / grain * grain));
            let missing = marker.bytes.get() == 0 && end()? <= marker_at + skip;
            // On the extent or on the disk.
            if told != here && told != Sectors::within(part.start.get()) + here && !missing {
                let name = &sparse.name;
                let text = format!("{name}: the grain at {at} has the marker of sector {}, not of {}", told.0, here.0);
                return Err(Error::corrupt(text).in_file_at(marker_at));
            }
            match u64::from(marker.bytes.get()) {
                // The whole grain is missing, as its reader will find.
                0 if end()? <= marker_at + skip => (skip, 1),
                size if size == 0 || size > cap => {
                    let name = &sparse.name;
                    let text = format!("{name}: the grain at {at} has a compressed size of {size} bytes");
                    return Err(Error::corrupt(text).in_file_at(marker_at));
                }
                size => (skip, size),
            }
        } else {
            (0, cap.min(end()?.saturating_sub(marker_at)).max(1))
        };
        let start = part.start + inside / grain * grain;
        let place = HostPlace { file, at: HostOffset(marker_at) + skip };
        Ok(CompressedUnit { start, len: grain, place, host_len })
    }
}
