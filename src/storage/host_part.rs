//! What the bytes of a file of the host lie in: the file itself; a device, the disk that it is a partition of, the file
//! behind a loop device.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::libc;

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

/// What an open file's bytes lie in.
pub fn parts_of(file: &File) -> Vec<HostPart> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    let mut all = vec![HostPart::whole(Identity { device: meta.dev(), inode: meta.ino() })];
    if !meta.file_type().is_block_device() {
        return all;
    }
    let (device, len) = (meta.rdev(), host::device_size(file).unwrap_or(u64::MAX));
    all.push(HostPart::of_device(device, 0, len));
    let mut start = 0;
    if let Some((disk, at)) = disk_of_partition(device) {
        start = at;
        all.push(HostPart::of_device(disk, at, len));
    }
    if let Some((of, offset)) = host::behind_loop(file) {
        let from = offset.saturating_add(start);
        all.push(HostPart { of, from, to: from.saturating_add(len) });
    }
    all
}

/// The same of what has a name; nothing where that cannot be told.
pub fn parts_at(path: &Path) -> Vec<HostPart> {
    let Ok(meta) = std::fs::metadata(path) else { return Vec::new() };
    match meta.file_type().is_block_device() {
        false => vec![HostPart::whole(Identity { device: meta.dev(), inode: meta.ino() })],
        true => {
            let flags = (OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits();
            let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
            file.map_or(Vec::new(), |file| parts_of(&file))
        }
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
