//! Who holds a lock that is in the way, as `/proc` tells (proc(5): `fdinfo` has a line for each lock by that
//! descriptor; `/proc/locks` names no process for locks of open files).
//!
//! Nothing here is relied on: what cannot be looked at (a process of somebody else) is not told.

use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::fstat;

use super::Identity;

/// A byte of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockPlace {
    identity: Identity,
    byte: i64,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// The name of its program.
    pub name: String,
}

impl LockPlace {
    /// That byte of an open file.
    pub(super) fn of(fd: BorrowedFd<'_>, byte: i64) -> Option<Self> {
        let stat = fstat(fd).ok()?;
        Some(Self { identity: Identity { device: stat.st_dev, inode: stat.st_ino }, byte })
    }

    /// Who has it locked now, as far as we can see.
    pub fn holders(&self) -> Vec<Holder> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let mut holders: Vec<Holder> = pids.filter(|pid| self.is_held_by(*pid)).map(Holder::of).collect();
        holders.sort_by_key(|holder| holder.pid);
        holders
    }

    fn is_held_by(&self, pid: u32) -> bool {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let of_the_file = files.filter(|file| {
            let identity = |meta: fs::Metadata| Identity { device: meta.dev(), inode: meta.ino() };
            fs::metadata(file.path()).is_ok_and(|meta| identity(meta) == self.identity)
        });
        of_the_file
            .map(|file| Path::new("/proc").join(pid.to_string()).join("fdinfo").join(file.file_name()))
            .any(|info| fs::read_to_string(info).is_ok_and(|text| text.lines().any(|line| covers(line, self.byte))))
    }
}

impl Holder {
    fn of(pid: u32) -> Self {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Self { pid, name: name.trim_end().to_owned() }
    }
}

/// Whether a line of `fdinfo` is that of a lock on the byte: `lock: 1: OFDLCK ADVISORY READ -1 fe:00:77 100 101`.
fn covers(line: &str, byte: i64) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else { return false };
    let mut last = lock.split_whitespace().rev();
    let (Some(end), Some(start)) = (last.next(), last.next()) else { return false };
    let end = if end == "EOF" { Some(i64::MAX) } else { end.parse().ok() };
    let start: Option<i64> = start.parse().ok();
    start.zip(end).is_some_and(|(start, end)| (start..=end).contains(&byte))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::storage::lock::{self, Access};

    #[test]
    fn lines_of_locks_are_read() {
        let line = "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:77 100 101";
        assert!(covers(line, 100) && covers(line, 101) && !covers(line, 102) && !covers(line, 99));
        assert!(covers("lock:\t1: FLOCK  ADVISORY  WRITE 9 fe:00:77 0 EOF", 1 << 61));
        for other in ["pos:\t0", "lock:", "lock:\t1: a b", "flags:\t0100000 0 EOF"] {
            assert!(!covers(other, 0), "{other}");
        }
    }

    #[test]
    fn the_holder_of_a_lock_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (held, other) = (file.reopen().unwrap(), file.reopen().unwrap());
        let place = |byte| LockPlace::of(other.as_fd(), byte).unwrap();
        assert_eq!(place(201).holders(), []);
        lock::take(held.as_fd(), Access::READ, "x").unwrap();
        assert!(place(201).holders().iter().any(|holder| holder.pid == std::process::id()));
        assert_eq!(place(205).holders(), []);
    }
}
