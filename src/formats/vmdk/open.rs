//! Opening an image: which files it is made of, and where its descriptor is.
//!
//! A file that is one extent of several, or an image whose descriptor leaves a part of the disk out, is refused: as a
//! disk it would be another, shorter one.

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

use crate::block::error::Context;
use crate::block::{
    BackingRef, Child, Error, ErrorKind, GuestOffset, HostOffset, OpenRequest, Related, Result, metadata,
};
use crate::storage::{Identity, Storage};

use super::descriptor::{self, Descriptor, ExtentAccess, ExtentLine, ExtentType};
use super::layout::*;
use super::sesparse::SeSparse;
use super::sparse::Sparse;
use super::{Body, VmdkDriver, VmdkPart};

/// Where a descriptor is in its file, and how long it may get; `None` for as long as it likes.
pub(super) type TextAt = (u64, Option<u64>);

impl VmdkDriver {
    pub(super) fn open(request: OpenRequest<'_>) -> Result<Self> {
        let OpenRequest { file, purpose, related, .. } = request;
        let (write, look_only) = (purpose.writes(), purpose.only_looks());
        let mut head = vec![0; 512];
        file.read_metadata("the header", 0, &mut head)?;
        let mut files = vec![file];
        let (descriptor, text_at, parts) = if head.starts_with(MAGIC) {
            open_alone(&files[0], &head)?
        } else if head.starts_with(COWD_MAGIC) || is_sesparse(&head) {
            return Err(no_disk());
        } else {
            open_row(&mut files, related, (write, look_only))?
        };
        if write && parts.iter().any(|part| part.grain().is_some_and(|grain| !part.start.get().is_multiple_of(grain))) {
            return Err(Error::unsupported("An extent that begins within a grain can be read, but not written"));
        }
        let size = parts.last().map_or(0, VmdkPart::end);
        let backing = descriptor.parent_name().map(|name| BackingRef {
            name: name.into(),
            format: Some("vmdk".to_owned()),
            elsewhere: descriptor.names(name),
        });
        let (renewed, keeps_zeros) = (Mutex::default(), AtomicBool::new(false));
        let (size, replaced) = (AtomicU64::new(size), Mutex::default());
        let whole = Mutex::default();
        Ok(Self { files, parts, descriptor, text_at, replaced, backing, size, write, renewed, keeps_zeros, whole })
    }
}

/// The refusal of a file that is a part of a disk.
fn no_disk() -> Error {
    Error::unsupported("This is one extent of a disk: the descriptor, which names all of them, is needed")
}

/// Sectors in bytes, as far as a disk can reach.
pub(super) fn bytes(sectors: Sectors) -> Result<u64> {
    sectors.checked_bytes().filter(|n| i64::try_from(*n).is_ok()).ok_or_else(|| Error::corrupt("Extent too long"))
}

/// Opens a sparse file with its descriptor in it.
fn open_alone(file: &Child, head: &[u8]) -> Result<(Descriptor, TextAt, Vec<VmdkPart>)> {
    let storage = &file.storage;
    let sparse = Sparse::open(&file.name, storage.clone(), head)?;
    let (at, len, text) = match embedded(&sparse, head)? {
        Some(found) => found,
        None => return Err(no_disk()),
    };
    let mut descriptor = Descriptor::of_disk(&text)?;
    if descriptor.extents.len() > 1 {
        return Err(no_disk());
    }
    if let Some(line) = descriptor.extents.first() {
        check_capacity(&sparse, line.sectors)?;
    }
    // The header says which of the two it is; the text may be copied from elsewhere, and its line tells nothing.
    descriptor.create_type = if sparse.shape.compressed { "streamOptimized" } else { "monolithicSparse" }.to_owned();
    let len_of_disk = bytes(sparse.state().capacity)?;
    let body = Body::Sparse { file: 0, sparse: Box::new(sparse) };
    Ok((
        descriptor,
        (at, Some(len)),
        vec![VmdkPart::new(GuestOffset(0), len_of_disk, ExtentAccess::ReadWrite, "", body)],
    ))
}

/// The descriptor within a sparse file: its place, the room for it, its bytes. It is where the header says, where the
/// first of two headers says, or, if there is none, behind the header.
pub(super) fn embedded(sparse: &Sparse, head: &[u8]) -> Result<Option<(u64, u64, Vec<u8>)>> {
    let headers = [sparse.state().header, SparseHeader::parse(head)];
    let told = headers
        .into_iter()
        .flatten()
        .map(|header| (header.descriptor_at.get().bytes(), header.descriptor_sectors.get().bytes()));
    let mut places: Vec<(u64, u64)> = told.filter(|(at, _)| *at != 0).collect();
    places.push((SECTOR, DESCRIPTOR_SECTORS.bytes()));
    places.dedup();
    for (at, len) in places {
        let text = read_text(&*sparse.storage, &sparse.name, at, len)?;
        if descriptor::is_one(&text) {
            return Ok(Some((at, len, text)));
        }
    }
    Ok(None)
}

/// The bytes of a descriptor that is at most `len` long.
pub(super) fn read_text(storage: &dyn Storage, file: &str, at: u64, len: u64) -> Result<Vec<u8>> {
    let len = len.min(MAX_DESCRIPTOR).min(storage.len().context("Could not get the length")?.saturating_sub(at));
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    metadata::read(storage, file, "the descriptor", at, &mut bytes)?;
    Ok(bytes)
}

/// Opens a row of extents by their descriptor, which is a file of its own.
fn open_row(
    files: &mut Vec<Child>,
    related: &dyn Related,
    (write, look_only): (bool, bool),
) -> Result<(Descriptor, TextAt, Vec<VmdkPart>)> {
    let main = files[0].storage.clone();
    let len = main.len().context("Could not get the length of the descriptor")?;
    if len == 0 {
        return Err(Error::corrupt("File is too small, not a valid image"));
    }
    let text = read_text(&*main, &files[0].name, 0, len)?;
    if !descriptor::is_one(&text) {
        return Err(Error::corrupt("invalid VMDK image descriptor"));
    }
    if len > MAX_DESCRIPTOR && !text.contains(&0) {
        return Err(Error::corrupt("The descriptor is longer than 1 MiB"));
    }
    let descriptor = Descriptor::of_disk(&text)?;
    if descriptor.create_type.is_empty() {
        return Err(Error::corrupt("invalid VMDK image descriptor"));
    }
    let (mut parts, mut start, mut entries) = (Vec::new(), 0u64, 0);
    let mut opened = Opened { related, shared: (!write).then(HashMap::new), by_identity: HashMap::new() };
    for (index, line) in descriptor.extents.iter().enumerate() {
        let body = open_extent(index, line, &descriptor, files, &mut opened, look_only)?;
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
        parts.push(VmdkPart::new(GuestOffset(start), len, line.access, &line.word, body));
        start = start.checked_add(len).ok_or_else(|| Error::corrupt("The extents are too long"))?;
    }
    if let Some(line) = &descriptor.malformed {
        return Err(Error::corrupt(format!("Invalid extent line: {line}")));
    }
    if descriptor.is_cut() {
        return Err(Error::corrupt("The descriptor ends behind an extent: it is not complete"));
    }
    // A disk of 0 bytes has no extents; that it is one is said elsewhere in the text.
    if parts.is_empty() && descriptor.cylinders.as_deref() != Some("0") {
        return Err(Error::corrupt("The descriptor names no extents: it is not complete"));
    }
    Ok((descriptor, (0, None), parts))
}

fn open_extent(
    index: usize,
    line: &ExtentLine,
    descriptor: &Descriptor,
    files: &mut Vec<Child>,
    opened: &mut Opened<'_>,
    look_only: bool,
) -> Result<Body> {
    match (line.access, line.kind) {
        (ExtentAccess::None, _) => return Ok(Body::Forbidden),
        (_, ExtentType::Zero) => return Ok(Body::Zero),
        _ => {}
    }
    let names = descriptor.names(&line.file);
    let related = opened.related;
    let child = match opened.open(format!("extents.{index}"), &names) {
        Err(error) if look_only && error.kind == ErrorKind::Forbidden => {
            return Ok(Body::Closed { name: names.first().map(|name| related.shown(name)).unwrap_or_default() });
        }
        opened => opened?,
    };
    let (name, storage) = (child.name.clone(), child.storage.clone());
    files.push(child);
    let file = files.len() - 1;
    if line.kind == ExtentType::Flat {
        let offset = HostOffset(bytes(line.offset)?);
        let raw = ["fulldevice", "partitioneddevice"].contains(&&*descriptor.create_type.to_ascii_lowercase());
        if raw || storage.facts().fixed_len {
            check_device(&name, &*storage, (offset + bytes(line.sectors)?).get())?;
        }
        return Ok(Body::Flat { file, offset });
    }
    if line.kind == ExtentType::SeSparse {
        return Ok(Body::SeSparse { file, sparse: Box::new(SeSparse::open(&name, storage)?) });
    }
    let mut head = vec![0; 512];
    metadata::read(&*storage, &name, "the header", 0, &mut head)?;
    let sparse = Sparse::open(&name, storage, &head)?;
    check_capacity(&sparse, line.sectors)?;
    Ok(Body::Sparse { file, sparse: Box::new(sparse) })
}

/// Refuses an extent of which the header says that it is empty, or the footer that it is shorter, and the descriptor that
/// it is not: what is missing would be missed by nobody.
fn check_capacity(sparse: &Sparse, line: Sectors) -> Result<()> {
    let state = sparse.state();
    let capacity = state.capacity;
    match capacity < line && (capacity == Sectors(0) || state.stream.is_some()) {
        true => Err(Error::corrupt(format!(
            "{}: the header has a capacity of {} sectors, the descriptor an extent of {}",
            sparse.name, capacity.0, line.0
        ))),
        false => Ok(()),
    }
}

/// The files of extents. Where they are only read, extents of one file share it, as it is open and locked, whatever they
/// call it: there may be tens of thousands of them, and the host looks at all locks of a file for each that it takes.
/// For a writer each extent has its own, and with them the locks by which two of one file are refused.
struct Opened<'a> {
    related: &'a dyn Related,
    /// By the names that the file may have; nothing for a writer.
    shared: Option<HashMap<Vec<OsString>, Child>>,
    by_identity: HashMap<Identity, Arc<dyn Storage>>,
}

impl Opened<'_> {
    /// Opens the first file of these names that is there.
    fn open(&mut self, role: String, names: &[OsString]) -> Result<Child> {
        if let Some(child) = self.shared.as_ref().and_then(|shared| shared.get(names)) {
            return Ok(Child { role, ..child.clone() });
        }
        let mut child = open_first(&role, names, self.related)?;
        if let Some(shared) = &mut self.shared {
            if let Some(identity) = child.storage.facts().identity {
                child.storage = self.by_identity.entry(identity).or_insert_with(|| child.storage.clone()).clone();
            }
            shared.insert(names.to_vec(), child.clone());
        }
        Ok(child)
    }
}

/// Opens the first file of these names that is there.
fn open_first(role: &str, names: &[OsString], related: &dyn Related) -> Result<Child> {
    let mut missing = None;
    for name in names {
        match related.open(role, name) {
            Err(error) if matches!(error.kind, ErrorKind::NotFound | ErrorKind::Forbidden) => {
                missing = missing.or(Some(error))
            }
            other => return other,
        }
    }
    Err(missing.unwrap_or_else(|| Error::corrupt("An extent has no name")))
}

/// Refuses a device that ends before its extent does: it is not the one that was meant.
fn check_device(name: &str, storage: &dyn Storage, end: u64) -> Result<()> {
    match storage.len().with_context(|| format!("Could not get the length of '{name}'"))? {
        len if len < end => Err(Error::corrupt(format!(
            "'{name}' has {len} bytes, and its extent ends at {end}: it is not the device that the image was made of"
        ))),
        _ => Ok(()),
    }
}
