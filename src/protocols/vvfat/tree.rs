//! The folder as it is when the disk is opened: which clusters are whose.
//!
//! Entries are in the order of their names, clusters in the order of folders, level by level, so the same folder is the
//! same disk whatever file system it is on. What is neither file nor folder is left out; links are followed.
//!
//! Invariants: the parts follow on each other without a gap, from the first cluster on; a folder within itself, and more
//! entries than a disk of this size can hold, are an error.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use chrono::{Datelike, Local, TimeZone, Timelike};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use super::layout::{ENTRY_BYTES, Entry, FILE, FOLDER, LABEL};
use super::names::{Short, ShortNames, long_entries};
use super::shape::{FIRST_CLUSTER, Shape};
use crate::block::{Error, Result};

/// The most entries, of whatever folders.
const MOST: usize = 1 << 20;
/// The deepest folder.
const DEEPEST: usize = 64;

/// What lies in some clusters.
#[derive(Debug)]
pub struct Part {
    /// The first of them.
    pub cluster: u64,
    /// How many.
    pub count: u64,
    /// What is there; zeros follow.
    pub content: Content,
}

/// See [`Part`].
#[derive(Debug)]
pub enum Content {
    /// A folder's entries.
    Entries(Vec<u8>),
    /// So many bytes of a file.
    File(PathBuf, u64),
}

/// All that is on the disk but for its tables.
#[derive(Debug)]
pub struct Tree {
    /// The entries of the root folder that has a place of its own.
    pub root: Vec<u8>,
    /// Everything else, in the order of clusters.
    pub parts: Vec<Part>,
}

/// When something was last written to.
#[derive(Debug, Clone, Copy, Default)]
struct Stamp {
    time: u16,
    date: u16,
}

impl Stamp {
    /// In local time, as FAT has it. Times that it does not have become the nearest.
    fn of(meta: &Metadata) -> Self {
        let Some(at) = Local.timestamp_opt(meta.mtime(), 0).single() else { return Self::default() };
        let (time, date) = ((at.hour(), at.minute(), at.second()), (at.year(), at.month(), at.day()));
        let ((hour, minute, second), (year, month, day)) = match at.year() {
            ..1980 => ((0, 0, 0), (1980, 1, 1)),
            1980..2108 => (time, date),
            _ => ((23, 59, 59), (2107, 12, 31)),
        };
        let word = |value: u32| u16::try_from(value).unwrap_or(0);
        Self {
            time: word(hour << 11 | minute << 5 | (second / 2)),
            date: word(year.abs_diff(1980) << 9 | month << 5 | day),
        }
    }
}

/// An entry of a folder.
fn entry(name: Short, kind: u8, stamp: Stamp) -> Entry {
    let (time, date) = (U16::new(stamp.time), U16::new(stamp.date));
    Entry {
        name,
        kind,
        zero: 0,
        made_hundredths: 0,
        made_time: time,
        made_date: date,
        read_date: date,
        cluster_high: U16::ZERO,
        time,
        date,
        cluster: U16::ZERO,
        size: U32::ZERO,
    }
}

/// A folder or file that waits for its clusters.
struct Waiting {
    path: PathBuf,
    /// `Some` for a folder: those that it lies in, from the root on.
    above: Option<Vec<(u64, u64)>>,
    stamp: Stamp,
    size: u64,
    /// Where its entry is: the part (or the root folder that has a place of its own), and the byte there.
    entry: Option<(Option<usize>, usize)>,
    /// The first cluster of the folder that it is in, and that one's time.
    parent: (u64, Stamp),
}

/// Reads the folder.
pub fn read(folder: &Path, shape: &Shape, label: &[u8; 11]) -> Result<Tree> {
    let unreadable = |folder: &Path| Error::invalid(format!("Could not read directory {}", folder.display()));
    let meta = fs::metadata(folder).map_err(|_| unreadable(folder))?;
    let mut tree = Tree { root: Vec::new(), parts: Vec::new() };
    let mut waiting = VecDeque::from([Waiting {
        path: folder.to_owned(),
        above: Some(Vec::new()),
        stamp: Stamp::of(&meta),
        size: 0,
        entry: None,
        parent: (0, Stamp::default()),
    }]);
    let (mut next, mut count) = (FIRST_CLUSTER, 0);
    while let Some(now) = waiting.pop_front() {
        let is_root = now.entry.is_none();
        let own_place = is_root && shape.root_entries() > 0;
        let content = match &now.above {
            None => Content::File(now.path.clone(), now.size),
            Some(above) => {
                let meta = fs::metadata(&now.path).map_err(|_| unreadable(&now.path))?;
                let identity = (meta.dev(), meta.ino());
                if above.contains(&identity) || above.len() >= DEEPEST {
                    let path = now.path.display();
                    return Err(Error::invalid(format!("The directory {path} leads into itself, or too deep")));
                }
                let above: Vec<_> = above.iter().copied().chain([identity]).collect();
                let part = if own_place { None } else { Some(tree.parts.len()) };
                let own = if own_place { 0 } else { next };
                let mut entries = match is_root {
                    true => entry(*label, LABEL, Stamp::default()).as_bytes().to_vec(),
                    false => dots(own, now.stamp, now.parent),
                };
                if is_root {
                    // The reference's label has no time.
                    entries.truncate(ENTRY_BYTES);
                }
                let listed = list(&now.path).map_err(|_| unreadable(&now.path))?;
                count += listed.len();
                if count > MOST {
                    return Err(Error::invalid(format!("There are more than {MOST} entries in {}", folder.display())));
                }
                let mut names = ShortNames::default();
                for (name, path, meta) in listed {
                    let shown = name.to_string_lossy();
                    let short = names.add(&shown);
                    // A long name is Unicode.
                    if let Some(name) = name.to_str() {
                        entries.extend(long_entries(name, &short));
                    }
                    let (stamp, is_folder) = (Stamp::of(&meta), meta.is_dir());
                    let (at, size) = (entries.len(), if is_folder { 0 } else { meta.len() });
                    let mut entry = entry(short, if is_folder { FOLDER } else { FILE }, stamp);
                    entry.size = U32::new(u32::try_from(size).unwrap_or(u32::MAX));
                    entries.extend(entry.as_bytes());
                    if is_folder || size > 0 {
                        waiting.push_back(Waiting {
                            path,
                            above: is_folder.then(|| above.clone()),
                            stamp,
                            size,
                            entry: Some((part, at)),
                            // The root folder is cluster 0 to those in it.
                            parent: (if is_root { 0 } else { own }, now.stamp),
                        });
                    }
                }
                if own_place {
                    if entries.len() > shape.root_entries() * ENTRY_BYTES {
                        return Err(Error::invalid("Too many entries in root directory"));
                    }
                    tree.root = entries;
                    continue;
                }
                Content::Entries(entries)
            }
        };
        let bytes = match &content {
            Content::Entries(entries) => entries.len() as u64,
            Content::File(_, len) => *len,
        };
        let clusters = bytes.div_ceil(shape.cluster());
        if clusters > shape.cluster_end().saturating_sub(next) {
            let (name, room) = (shape.name(), shape.sectors());
            let megabytes = format!("{}.{:02}", room / 2000, room % 2000 / 20);
            return Err(Error::invalid(format!("Directory does not fit in {name} (capacity {megabytes} MB)")));
        }
        if let Some((part, at)) = now.entry {
            let entries = match part {
                None => Some(&mut tree.root),
                Some(part) => tree.parts.get_mut(part).and_then(|part| match &mut part.content {
                    Content::Entries(entries) => Some(entries),
                    Content::File(..) => None,
                }),
            };
            if let Some(entry) = entries.and_then(|entries| entries.get_mut(at..at + ENTRY_BYTES))
                && let Ok(entry) = Entry::mut_from_bytes(entry)
            {
                place(entry, next);
            }
        }
        tree.parts.push(Part { cluster: next, count: clusters, content });
        next += clusters;
    }
    Ok(tree)
}

fn place(entry: &mut Entry, cluster: u64) {
    entry.cluster = U16::new((cluster & 0xffff) as u16);
    entry.cluster_high = U16::new((cluster >> 16 & 0xffff) as u16);
}

/// A folder's entries for itself and the one that it is in.
fn dots(own: u64, stamp: Stamp, (parent, parents): (u64, Stamp)) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, cluster, stamp) in [(*b".          ", own, stamp), (*b"..         ", parent, parents)] {
        let mut entry = entry(name, FOLDER, stamp);
        place(&mut entry, cluster);
        bytes.extend(entry.as_bytes());
    }
    bytes
}

/// The files and folders in a folder, in the order of their names.
fn list(folder: &Path) -> std::io::Result<Vec<(OsString, PathBuf, Metadata)>> {
    let mut listed = Vec::new();
    for found in fs::read_dir(folder)?.take(MOST + 1) {
        let found = found?;
        // A link that leads nowhere is nothing.
        let Ok(meta) = fs::metadata(found.path()) else { continue };
        if meta.is_file() || meta.is_dir() {
            listed.push((found.file_name(), found.path(), meta));
        }
    }
    listed.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(listed)
}
