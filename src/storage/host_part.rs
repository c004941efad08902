//! What the bytes of a file of the host lie in: the file itself; a device, the disk that it is a partition of, the file
//! behind a loop device.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::libc;

use super::host::BehindLoop;
use super::{Identity, host};

/// A part of a file of the host, or of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPart {
    /// The file; a device, whichever file names it, is inode 0.
    pub of: Identity,
    /// Its first byte there.
    pub from: u64,
    /// Where it ends there.
    pub to: u64,
}

/// Bytes of a sector in what sysfs says, whatever the device's own are.
const SECTOR: u64 = 512;

impl HostPart {
    /// All of it.
    pub fn whole(of: Identity) -> Self {
        Self { of, from: 0, to: u64::MAX }
    }

    /// Whether there is a byte in both.
    pub fn meets(&self, other: &Self) -> bool {
        self.of == other.of && self.from < other.to && other.from < self.to
    }

    fn of_device(device: u64, from: u64, len: u64) -> Self {
        Self { of: Identity { device, inode: 0 }, from, to: from.saturating_add(len) }
    }
}

/// How many loop devices over each other are looked through.
const MOST_LOOPS: usize = 8;

/// What an open file's bytes lie in.
pub fn parts_of(file: &File) -> Vec<HostPart> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    let mut all = vec![HostPart::whole(Identity { device: meta.dev(), inode: meta.ino() })];
    if meta.file_type().is_block_device() {
        let len = host::device_size(file).unwrap_or(u64::MAX);
        add_device(&mut all, (meta.rdev(), Some(file)), 0, len, MOST_LOOPS);
    }
    all
}

/// Adds `len` bytes from `from` of a device, which may be open already, and what they lie in.
fn add_device(all: &mut Vec<HostPart>, device: (u64, Option<&File>), from: u64, len: u64, loops: usize) {
    let (number, file) = device;
    all.push(HostPart::of_device(number, from, len));
    let mut start = from;
    if let Some((disk, at)) = disk_of_partition(number) {
        start = start.saturating_add(at);
        all.push(HostPart::of_device(disk, start, len));
    }
    let opened = if file.is_none() { open_device(number) } else { None };
    let Some((behind, offset)) = file.or(opened.as_ref()).and_then(host::behind_loop) else { return };
    let from = offset.saturating_add(start);
    match behind {
        BehindLoop::File(of) => all.push(HostPart { of, from, to: from.saturating_add(len) }),
        BehindLoop::Device(number) if loops > 0 => add_device(all, (number, None), from, len, loops - 1),
        BehindLoop::Device(_) => {}
    }
}

/// A block device by its number, under the name that the kernel gives it.
fn open_device(number: u64) -> Option<File> {
    let folder = format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number));
    let path = Path::new("/dev").join(std::fs::canonicalize(folder).ok()?.file_name()?);
    let file = open_quietly(&path).ok()?;
    (file.metadata().ok()?.rdev() == number).then_some(file)
}

fn open_quietly(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags((OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits()).open(path)
}

/// The same of what has a name; nothing where that cannot be told.
pub fn parts_at(path: &Path) -> Vec<HostPart> {
    let Ok(meta) = std::fs::metadata(path) else { return Vec::new() };
    match meta.file_type().is_block_device() {
        false => vec![HostPart::whole(Identity { device: meta.dev(), inode: meta.ino() })],
        true => open_quietly(path).map_or(Vec::new(), |file| parts_of(&file)),
    }
}

/// The disk that a device is a partition of, and where on it that begins (sysfs, `Documentation/ABI/stable/sysfs-block`).
fn disk_of_partition(device: u64) -> Option<(u64, u64)> {
    let folder = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let start: u64 = std::fs::read_to_string(format!("{folder}/start")).ok()?.trim().parse().ok()?;
    let disk = std::fs::read_to_string(format!("{folder}/../dev")).ok()?;
    let (major, minor) = disk.trim().split_once(':')?;
    Some((libc::makedev(major.parse().ok()?, minor.parse().ok()?), start.checked_mul(SECTOR)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_meet_where_they_have_a_byte_in_common() {
        let of = Identity { device: 1, inode: 2 };
        let part = |from, to| HostPart { of, from, to };
        assert!(part(0, 10).meets(&part(9, 20)) && part(5, 6).meets(&HostPart::whole(of)));
        assert!(!part(0, 10).meets(&part(10, 20)) && !part(10, 20).meets(&part(0, 10)));
        assert!(!part(0, 10).meets(&HostPart::whole(Identity { device: 1, inode: 3 })));
    }
}
