//! The disk's bytes: tables and folders from memory, files from the host when they are asked for.
//!
//! One lock, over the file that was opened last; it is held for no I/O but the opening of another one.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::libc::O_NONBLOCK;

use super::shape::{FIRST_CLUSTER, Fat, Shape};
use super::tree::{Content, Part, Tree};
use crate::storage::{Error, Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// See the module.
#[derive(Debug)]
pub struct FatDisk {
    size: u64,
    cluster: u64,
    clusters_at: u64,
    /// All that lies before the clusters.
    head: Vec<u8>,
    parts: Vec<Part>,
    last: Mutex<Option<(usize, Arc<File>)>>,
}

impl FatDisk {
    /// The disk of that shape with these files.
    pub fn new(shape: &Shape, tree: Tree, label: &[u8; 11]) -> Self {
        let used = tree.parts.last().map_or(FIRST_CLUSTER, |part| part.cluster + part.count);
        let mut head = shape.boot(label, FIRST_CLUSTER, shape.cluster_end() - used, used);
        let table = table(shape, &tree.parts);
        head.extend(&table);
        head.extend(&table);
        head.extend(&tree.root);
        head.resize(usize::try_from(shape.clusters_at()).unwrap_or(0), 0);
        Self {
            size: shape.size(),
            cluster: shape.cluster(),
            clusters_at: shape.clusters_at(),
            head,
            parts: tree.parts,
            last: Mutex::default(),
        }
    }

    /// Bytes of one part, from `within` on. What lies behind its content is zeros.
    fn read_part(&self, index: usize, part: &Part, within: u64, buf: &mut [u8]) -> Result<()> {
        match &part.content {
            Content::Entries(entries) => copy(entries, within, buf),
            Content::File(path, len) => {
                let there = usize::try_from(len.saturating_sub(within)).unwrap_or(usize::MAX).min(buf.len());
                let (data, rest) = buf.split_at_mut(there);
                rest.fill(0);
                if !data.is_empty() {
                    let file = self.file(index, path).map_err(|cause| failed(path, cause))?;
                    file.read_exact_at(data, within).map_err(|cause| failed(path, cause))?;
                }
            }
        }
        Ok(())
    }

    fn file(&self, index: usize, path: &Path) -> std::io::Result<Arc<File>> {
        let mut last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, file)) = last.as_ref().filter(|(open, _)| *open == index) {
            return Ok(file.clone());
        }
        // Without it a pipe that stands there by now would be waited for.
        let file = Arc::new(OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path)?);
        *last = Some((index, file.clone()));
        Ok(file)
    }
}

fn failed(path: &Path, cause: std::io::Error) -> Error {
    let shown = path.display();
    Error::Other(match cause.kind() {
        std::io::ErrorKind::UnexpectedEof => format!("The file '{shown}' is shorter than it was"),
        _ => format!("Could not read '{shown}': {}", Error::from(cause)),
    })
}

/// What `bytes` has from `from` on; zeros follow.
fn copy(bytes: &[u8], from: u64, buf: &mut [u8]) {
    let rest = usize::try_from(from).ok().and_then(|from| bytes.get(from..)).unwrap_or_default();
    let (there, behind) = buf.split_at_mut(rest.len().min(buf.len()));
    there.copy_from_slice(rest.get(..there.len()).unwrap_or_default());
    behind.fill(0);
}

/// The table: a chain for each part.
fn table(shape: &Shape, parts: &[Part]) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(shape.table_bytes()).unwrap_or(0)];
    let end = match shape.fat {
        Fat::Fat12 => 0xfff,
        Fat::Fat16 => 0xffff,
        Fat::Fat32 => 0x0fff_ffff,
    };
    let mut set = |cluster: u64, value: u64| {
        let (at, width, value) = match shape.fat {
            Fat::Fat12 => (cluster * 3 / 2, 2, value << (4 * (cluster % 2))),
            Fat::Fat16 => (cluster * 2, 2, value),
            Fat::Fat32 => (cluster * 4, 4, value),
        };
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        for (byte, new) in bytes.iter_mut().skip(at).zip(value.to_le_bytes()).take(width) {
            // Entries of 12 bits share a byte.
            *byte |= new;
        }
    };
    set(0, end & !0xff | u64::from(shape.media()));
    set(1, end);
    for part in parts {
        for n in 0..part.count {
            let next = if n + 1 == part.count { end } else { part.cluster + n + 1 };
            set(part.cluster + n, next);
        }
    }
    bytes
}

impl Storage for FatDisk {
    fn len(&self) -> Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let most = rest.len() as u64;
            let (until, part) = match at.checked_sub(self.clusters_at) {
                None => (self.clusters_at - at, None),
                Some(offset) => {
                    let cluster = offset / self.cluster + FIRST_CLUSTER;
                    let index = self.parts.partition_point(|part| part.cluster + part.count <= cluster);
                    match self.parts.get(index) {
                        None => (most, None),
                        Some(part) => {
                            let within = offset - (part.cluster - FIRST_CLUSTER) * self.cluster;
                            (part.count * self.cluster - within, Some((index, part, within)))
                        }
                    }
                }
            };
            let len = usize::try_from(until.min(most)).unwrap_or(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match part {
                Some((index, part, within)) => self.read_part(index, part, within, now)?,
                None => copy(&self.head, at, now),
            }
            (at, rest) = (at + len as u64, later);
        }
        Ok(())
    }

    fn write_at(&self, _at: u64, _buf: &[u8]) -> Result<()> {
        Err(Errno::EROFS.into())
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        Ok(match self.size.saturating_sub(at) {
            0 => HostExtent::hole(max),
            left => HostExtent::data(max.min(left)),
        })
    }

    fn zero(&self, _at: u64, _len: u64, _how: Zeroing) -> Result<()> {
        Err(Errno::EROFS.into())
    }

    fn discard(&self, _at: u64, _len: u64) -> Result<()> {
        Err(Errno::EROFS.into())
    }

    fn set_len(&self, _len: u64, _fill: Preallocation) -> Result<()> {
        Err(Errno::EROFS.into())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn facts(&self) -> Facts {
        Facts { fixed_len: true, addressed: false, ..Facts::PLAIN }
    }

    fn host(&self) -> Option<&HostFile> {
        None
    }

    fn announce(&self, _event: Event) {}
}
