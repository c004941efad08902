//! `info`: what is known of an image without reading its data.
//!
//! Each layer of a chain is opened by itself, so a chain of any length is shown, and a broken one up to where it
//! breaks.

use std::cell::Cell;
use std::collections::HashSet;
use std::ffi::OsString;

use serde_json::{Map, Value};

use crate::block::info::SnapshotInfo;
use crate::block::node::Mapping;
use crate::block::{Child, Error, ExtentKind, GuestOffset, ImageRef, Node, Notice, OpenHow, Opener, Purpose, Result};

/// The backing file that an image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingInfo {
    /// As written in the image.
    pub name: OsString,
    /// Where it is; nothing if that cannot be told, because the image itself has no plain name.
    pub path: Option<OsString>,
    /// Its format, if that is written in the image.
    pub format: Option<String>,
}

/// One node: a layer, or a file of one.
#[derive(Debug, Clone, PartialEq)]
pub struct Info {
    /// Its name.
    pub filename: String,
    /// Its format, or protocol.
    pub format: String,
    /// Its size, as the guest sees it; of a file: its length rounded up to 512.
    pub virtual_size: u64,
    /// The space that it takes on the host.
    pub actual_size: Option<u64>,
    /// Its unit of allocation.
    pub cluster_size: Option<u64>,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Whether it was not closed cleanly.
    pub dirty: Option<bool>,
    /// The backing file it names.
    pub backing: Option<BackingInfo>,
    /// Its snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// Other files that it names: which part each plays, and its name.
    pub references: Vec<(&'static str, String)>,
    /// What only its format has: kind and members.
    pub specific: Option<(String, Map<String, Value>)>,
    /// What it is made of, last attached first: role and node.
    pub children: Vec<(String, Info)>,
}

/// What is known of one opened image. `asks`: what it names may be looked for, though not opened.
fn of(node: &Node, asks: bool) -> Result<Info> {
    let driver = node.driver();
    let format = driver.format();
    let mut image = driver.info()?;
    let inner = |role: &str| node.origin().inner.iter().find(|(known, _)| known == role).map(|(_, node)| node);
    // A window on another image, or on bytes, has their units; and what it takes on the host, it alone knows.
    let window = driver.backing().is_none() && image.specific.is_none();
    let mut actual_size = Some(0);
    let mut children = Vec::new();
    for child in driver.files() {
        let file = match inner(&child.role) {
            Some(node) => of(node, asks)?,
            None => of_file(child)?,
        };
        if window {
            image.cluster_size = image.cluster_size.or(file.cluster_size);
            image.dirty = image.dirty.and(file.dirty);
        }
        let allocated = child.storage.allocated().ok().flatten();
        actual_size = actual_size.zip(allocated).and_then(|(a, b): (u64, u64)| a.checked_add(b));
        children.push((child.role.clone(), file));
    }
    if node.origin().protocol {
        let mut file = children.pop().map(|(_, file)| file).ok_or_else(|| Error::invalid("no file"))?;
        file.filename = node.name().to_owned();
        return Ok(file);
    }
    // A filter's other children: its bytes are one file.
    for (role, node) in &node.origin().inner {
        if !children.iter().any(|(known, _)| known == role) {
            children.push((role.clone(), of(node, asks)?));
        }
    }
    if let Some(below) = node.backing() {
        children.push(("backing".to_owned(), of(below, asks)?));
    }
    children.reverse();
    let backing = driver.backing().map(|backing| BackingInfo {
        name: backing.name.clone(),
        path: if asks { node.backing_path() } else { node.backing_path_as_named() },
        format: backing.format.clone(),
    });
    let named = backing.iter().map(|backing| ("backing-file", backing.name.to_string_lossy().into_owned()));
    let references = named.chain(image.references).collect();
    Ok(Info {
        filename: node.name().to_owned(),
        format: format.to_owned(),
        virtual_size: driver.virtual_size(),
        actual_size,
        cluster_size: image.cluster_size,
        encrypted: image.encrypted,
        dirty: image.dirty,
        backing,
        snapshots: image.snapshots,
        references,
        specific: image.specific.map(|(kind, members)| (kind.to_owned(), members)),
        children,
    })
}

/// How many places of a map are looked at for what is missing: enough for most disks, and never slow.
const LOOKS: u64 = 512;

/// What of the image is past the end of its file, for a warning.
fn cut_off(opener: &Opener<'_>, image: &ImageRef, how: &OpenHow, node: &Node) -> Option<Error> {
    match missing(node)? {
        Missing::Part(error) => Some(error),
        Missing::File => {
            // What must not be opened, or cannot, is for those who read the image.
            let how = OpenHow { purpose: Purpose::Read, force_share: true, ..how.clone() };
            match missing(&*opener.open(image, &how).ok()?) {
                Some(Missing::Part(error)) => Some(error),
                _ => None,
            }
        }
    }
}

/// Why an image cannot be read to its end.
enum Missing {
    /// It is past the end of its file.
    Part(Error),
    /// It is in a file that is not open, as whoever looks at an image needs its own file alone.
    File,
}

/// What of the image is past the end of its file, if a few looks at its map find it: from the start on, then here and
/// there. Where not even the start of its map is there, that shows soon enough.
fn missing(node: &Node) -> Option<Missing> {
    let size = node.virtual_size();
    let mut at = 0;
    let stored = Cell::new(false);
    let look = |at: u64, max: u64| match node.map(GuestOffset(at), max, 1) {
        Ok(Mapping { kind: ExtentKind::Data(place), node, .. }) if place.file >= node.driver().files().len() => {
            Err(Some(Missing::File))
        }
        Ok(mapping) => match mapping.there() {
            Ok(there) if there < mapping.len => Err(Some(Missing::Part(mapping.after(there).missing()))),
            _ => {
                stored.set(stored.get() || !mapping.is_zero());
                Ok(mapping.len)
            }
        },
        // What is wrong besides is for those who read the image.
        Err(error) => {
            let cut = stored.get() && error.kind == crate::block::ErrorKind::Truncated;
            Err(cut.then(|| Missing::Part(error)))
        }
    };
    for _ in 0..LOOKS {
        if at >= size {
            return None;
        }
        match look(at, size - at) {
            Ok(len) => at += len,
            Err(found) => return found,
        }
    }
    let step = ((size - at) / LOOKS).max(1);
    while at < size {
        if let Err(found) = look(at, 1) {
            return found;
        }
        at = at.saturating_add(step);
    }
    None
}

/// A file, as the protocol that it was opened by shows it.
fn of_file(child: &Child) -> Result<Info> {
    use crate::block::error::Context;
    let Child { name, driver, storage, .. } = child;
    let length = storage.len().with_context(|| format!("Could not get size of '{name}'"))?;
    let specific = storage.host().map(|host| {
        let hint = host.extent_size_hint().map(|hint| ("extent-size-hint".to_owned(), hint.into()));
        ("file".to_owned(), Map::from_iter(hint))
    });
    Ok(Info {
        filename: name.clone(),
        format: (*driver).to_owned(),
        virtual_size: length.checked_next_multiple_of(512).unwrap_or(length),
        actual_size: storage.allocated().ok().flatten(),
        cluster_size: None,
        encrypted: false,
        dirty: storage.host().map(|_| false),
        backing: None,
        snapshots: Vec::new(),
        references: Vec::new(),
        specific,
        children: Vec::new(),
    })
}

/// The image and, if asked for, everything below it, each opened by itself.
pub fn chain(opener: &Opener<'_>, image: &ImageRef, how: &OpenHow, whole: bool) -> Result<Vec<Info>> {
    let mut infos = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some((image.clone(), OpenHow { no_backing: true, purpose: Purpose::Look, ..how.clone() }));
    while let Some((image, how)) = next.take() {
        let node = opener.open(&image, &how)?;
        if !seen.insert(node.identity()) && node.driver().backing().is_some() {
            return Err(Error::invalid(format!("Backing file '{}' creates an infinite loop.", image.shown())));
        }
        let info = of(&node, opener.follows())?;
        if let Some(error) = cut_off(opener, &image, &how, &node) {
            opener.notice(Notice::Warning(error.message()));
        }
        if let (true, Some(backing)) = (whole, &info.backing) {
            let name = backing.name.to_string_lossy();
            opener.may_open(&info.filename, &name, backing.path.as_deref())?;
            let path = backing
                .path
                .clone()
                .ok_or_else(|| Error::invalid(format!("Cannot tell where the backing file '{name}' is")))?;
            let below = OpenHow { format: backing.format.clone(), ..how.clone() };
            next = Some((ImageRef::Name(path), below));
        }
        infos.push(info);
    }
    Ok(infos)
}

/// Whether two names of a backing file are the same text.
pub fn same_name(backing: &BackingInfo) -> bool {
    backing.path.as_ref() == Some(&backing.name)
}

/// The tree that `--output=json` shows.
pub fn to_json(info: &Info) -> Value {
    let mut object = Map::new();
    let mut put = |key: &str, value: Value| object.insert(key.to_owned(), value);
    put("virtual-size", info.virtual_size.into());
    put("filename", info.filename.clone().into());
    put("format", info.format.clone().into());
    if let Some(size) = info.cluster_size {
        put("cluster-size", size.into());
    }
    if let Some(size) = info.actual_size {
        put("actual-size", size.into());
    }
    if info.encrypted {
        put("encrypted", true.into());
    }
    if let Some(dirty) = info.dirty {
        put("dirty-flag", dirty.into());
    }
    if let Some(backing) = &info.backing {
        put("backing-filename", backing.name.to_string_lossy().into());
        if let Some(path) = &backing.path {
            put("full-backing-filename", path.to_string_lossy().into());
        }
        if let Some(format) = &backing.format {
            put("backing-filename-format", format.clone().into());
        }
    }
    if !info.snapshots.is_empty() {
        put("snapshots", info.snapshots.iter().map(snapshot_json).collect());
    }
    if let Some((kind, members)) = &info.specific {
        let mut specific = Map::new();
        specific.insert("type".to_owned(), kind.clone().into());
        specific.insert("data".to_owned(), Value::Object(members.clone()));
        put("format-specific", Value::Object(specific));
    }
    let children = info.children.iter().map(|(role, info)| {
        let mut child = Map::new();
        child.insert("name".to_owned(), role.clone().into());
        child.insert("info".to_owned(), to_json(info));
        Value::Object(child)
    });
    put("children", children.collect());
    Value::Object(object)
}

/// The files that an image names, each with the part that it plays.
pub fn references_json(info: &Info) -> Value {
    let of = |(kind, name): &(&str, String)| serde_json::json!({"kind": kind, "filename": name});
    info.references.iter().map(of).collect()
}

/// A snapshot, as `--output=json` shows it.
pub fn snapshot_json(snapshot: &SnapshotInfo) -> Value {
    let mut object = Map::new();
    let mut put = |key: &str, value: Value| object.insert(key.to_owned(), value);
    if let Some(count) = snapshot.icount {
        put("icount", count.into());
    }
    put("id", snapshot.id.clone().into());
    put("name", snapshot.name.clone().into());
    put("vm-state-size", snapshot.vm_state_size.into());
    put("date-sec", snapshot.date_sec.into());
    put("date-nsec", snapshot.date_nsec.into());
    put("vm-clock-sec", (snapshot.vm_clock_nsec / 1_000_000_000).into());
    put("vm-clock-nsec", (snapshot.vm_clock_nsec % 1_000_000_000).into());
    Value::Object(object)
}
