//! What each preallocation mode and each way of zeroing does to a range of a file: the sparse layer.
//!
//! One table of ways with their fallbacks: `fallocate(2)` first, then what the device can, then by hand.
//! `EOPNOTSUPP` is a way to take, not an error to show; `ENOSPC` is an error to show, at once.
//!
//! | kind | `Punch` | `Allocate` | `Write` |
//! |---|---|---|---|
//! | regular | punch hole, zero range, by hand | zero range, punch + allocate, by hand | by hand |
//! | block device | punch hole, zero range, zero-out, by hand | zero range, zero-out, by hand | by hand |
//! | other | by hand | by hand | by hand |
//!
//! Invariants: a range past the end of a regular file makes it longer; a growth that fails puts the old length
//! back.

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::file::HostFile;
use super::{Error, FileKind, Preallocation, Result, Storage, Zeroing, host};

const PUNCH: FallocateFlags = FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::FALLOC_FL_ZERO_RANGE;
const ZERO_DEVICE: FallocateFlags = ZERO.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);
const RESERVE: FallocateFlags = FallocateFlags::empty();

/// Zeros are written in pieces of this size.
const PIECE: u64 = 1 << 20;
static ZEROS: [u8; PIECE as usize] = [0; PIECE as usize];

/// Runs a way; `Ok(false)` if it is not there and the next must be taken.
fn way(result: Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.is_unsupported() => Ok(false),
        Err(error) => Err(error),
    }
}

fn allocate(file: &HostFile, flags: FallocateFlags, at: u64, len: u64) -> Result<()> {
    let signed = |value| i64::try_from(value).map_err(|_| Error::from(Errno::EFBIG));
    loop {
        match fallocate(file.file(), flags, signed(at)?, signed(len)?) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// See [`Storage::zero`].
pub fn zero(file: &HostFile, at: u64, len: u64, how: Zeroing) -> Result<()> {
    let end = at.checked_add(len).filter(|end| i64::try_from(*end).is_ok()).ok_or(Errno::EFBIG)?;
    if len == 0 {
        return Ok(());
    }
    match (file.kind(), how) {
        (FileKind::Regular, Zeroing::Punch) => punch(file, at, end),
        (FileKind::Regular, Zeroing::Allocate) => zero_allocated(file, at, end),
        (FileKind::BlockDevice, Zeroing::Punch | Zeroing::Allocate) => zero_device(file, at, end, how),
        _ => write_zeros(file, at, len),
    }
}

fn punch(file: &HostFile, at: u64, end: u64) -> Result<()> {
    let inside = file.len()?.min(end).saturating_sub(at);
    let done = inside == 0 || way(allocate(file, PUNCH, at, inside))? || way(allocate(file, ZERO_DEVICE, at, inside))?;
    if !done {
        write_zeros(file, at, inside)?;
    }
    file.grow(end)
}

fn zero_allocated(file: &HostFile, at: u64, end: u64) -> Result<()> {
    if way(allocate(file, ZERO, at, end - at))? {
        return Ok(());
    }
    let inside = file.len()?.min(end).saturating_sub(at);
    let hole = inside == 0 || way(allocate(file, PUNCH, at, inside))?;
    if hole && way(allocate(file, RESERVE, at, end - at))? {
        return Ok(());
    }
    write_zeros(file, at, end - at)
}

fn zero_device(file: &HostFile, at: u64, end: u64, how: Zeroing) -> Result<()> {
    // The kernel would zero what there is and say nothing.
    if end > file.len()? {
        return Err(Errno::ENOSPC.into());
    }
    let sector = host::sector(file.file());
    let first = at.next_multiple_of(sector).min(end);
    let last = (end / sector * sector).max(first);
    write_zeros(file, at, first - at)?;
    if last > first {
        let len = last - first;
        let done = (how == Zeroing::Punch && way(allocate(file, PUNCH, first, len))?)
            || way(allocate(file, ZERO_DEVICE, first, len))?
            || way(host::zero_device(file.file(), first, len))?;
        if !done {
            write_zeros(file, first, len)?;
        }
    }
    write_zeros(file, last, end - last)
}

fn write_zeros(file: &HostFile, at: u64, len: u64) -> Result<()> {
    let mut done = 0;
    while done < len {
        let n = (len - done).min(PIECE);
        file.write_at(at + done, ZEROS.get(..n as usize).unwrap_or(&ZEROS))?;
        done += n;
    }
    Ok(())
}

/// See [`Storage::discard`].
pub fn discard(file: &HostFile, at: u64, len: u64) -> Result<()> {
    let Some(end) = at.checked_add(len).map(|end| end.min(i64::MAX as u64)) else { return Ok(()) };
    let end = end.min(file.len()?);
    match file.kind() {
        FileKind::Regular if end > at => way(allocate(file, PUNCH, at, end - at)).map(drop),
        FileKind::BlockDevice => {
            let sector = host::sector(file.file());
            let (first, last) = (at.next_multiple_of(sector), end / sector * sector);
            match last > first {
                true => way(host::discard_device(file.file(), first, last - first)).map(drop),
                false => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

/// See [`Storage::set_len`].
pub fn set_len(file: &HostFile, len: u64, fill: Preallocation) -> Result<()> {
    let old = file.len()?;
    if file.kind() != FileKind::Regular {
        return match fill {
            Preallocation::Off if len <= old => Ok(()),
            Preallocation::Off => Err(Error::GrowDevice),
            _ => Err(Error::DevicePreallocation(fill)),
        };
    }
    if i64::try_from(len).is_err() {
        return Err(Error::from(nix::errno::Errno::EINVAL).step("Could not resize file"));
    }
    let grown = match fill {
        Preallocation::Metadata => return Err(Error::UnsupportedPreallocation(fill)),
        Preallocation::Falloc if len > old => reserve(file, old, len),
        Preallocation::Full if len > old => fill_with_zeros(file, old, len),
        _ => return file.file().set_len(len).map_err(|e| Error::from(e).step("Could not resize file")),
    };
    if grown.is_err() {
        // Also frees what was reserved past the end. If this fails too, the first error is the one to show.
        let _ = file.file().set_len(old);
    }
    grown
}

fn reserve(file: &HostFile, old: u64, len: u64) -> Result<()> {
    let reserved = way(allocate(file, RESERVE, old, len - old));
    let done = match reserved {
        Ok(false) => grow_with_zeros(file, old, len),
        other => other.map(drop),
    };
    done.map_err(|e| e.step("Could not preallocate new data"))
}

fn fill_with_zeros(file: &HostFile, old: u64, len: u64) -> Result<()> {
    grow_with_zeros(file, old, len).map_err(|e| e.step("Could not write zeros for preallocation"))?;
    file.file().sync_all().map_err(|e| Error::from(e).step("Could not flush file to disk"))
}

/// The length goes from the old one to the new one in one step: whoever is killed leaves no disk of a size in between.
fn grow_with_zeros(file: &HostFile, old: u64, len: u64) -> Result<()> {
    file.file().set_len(len)?;
    write_zeros(file, old, len - old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::file::FileHow;

    fn file() -> (tempfile::TempDir, HostFile) {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![7u8; 1 << 20]).unwrap();
        let how = FileHow { write: true, ..FileHow::default() };
        let file = HostFile::open(&path, &how).unwrap();
        (dir, file)
    }

    fn allocated(file: &HostFile) -> u64 {
        file.allocated().unwrap().unwrap()
    }

    #[test]
    fn each_way_of_zeroing_gives_zeros() {
        for how in [Zeroing::Punch, Zeroing::Allocate, Zeroing::Write] {
            for (at, len) in [(5u64, 3u64), (4096, 65536), (1000, 200_001), (1_000_000, 300_000), (3 << 20, 70_000)] {
                let (_dir, file) = file();
                zero(&file, at, len, how).unwrap();
                assert_eq!(file.len().unwrap(), (at + len).max(1 << 20), "grows, {how:?}");
                let mut got = vec![0; file.len().unwrap() as usize];
                file.read_at(0, &mut got).unwrap();
                let zeroed = |i: usize| (at..at + len).contains(&(i as u64)) || i >= 1 << 20;
                assert!(got.iter().enumerate().all(|(i, b)| *b == if zeroed(i) { 0 } else { 7 }), "{at}+{len} {how:?}");
            }
        }
        assert!(zero(&file().1, u64::MAX, 2, Zeroing::Punch).is_err());
    }

    #[test]
    fn punching_frees_and_allocating_keeps() {
        let (_dir, file) = file();
        file.flush().unwrap();
        let before = allocated(&file);
        zero(&file, 0, 1 << 19, Zeroing::Allocate).unwrap();
        assert_eq!(allocated(&file), before);
        zero(&file, 0, 1 << 19, Zeroing::Punch).unwrap();
        assert!(allocated(&file) <= before - (1 << 19));
        zero(&file, 1 << 20, 1 << 20, Zeroing::Allocate).unwrap();
        assert!(allocated(&file) >= (1 << 19) + (1 << 20));
        discard(&file, 1 << 20, 9 << 20).unwrap();
        assert_eq!(file.len().unwrap(), 2 << 20, "giving space back does not grow");
        assert!(allocated(&file) < 1 << 20);
    }

    #[test]
    fn each_preallocation_has_its_length_and_its_space() {
        for (fill, least) in [(Preallocation::Off, 0), (Preallocation::Falloc, 3 << 20), (Preallocation::Full, 3 << 20)]
        {
            let (_dir, file) = file();
            set_len(&file, 4 << 20, fill).unwrap();
            assert_eq!(file.len().unwrap(), 4 << 20);
            assert!(allocated(&file) >= (1 << 20) + least);
            assert!(fill != Preallocation::Off || allocated(&file) < 2 << 20);
            let mut got = vec![1; 3 << 20];
            file.read_at(1 << 20, &mut got).unwrap();
            assert!(got.iter().all(|b| *b == 0));
            set_len(&file, 100, fill).unwrap();
            assert_eq!(file.len().unwrap(), 100);
        }
        let text = set_len(&file().1, 4 << 20, Preallocation::Metadata).unwrap_err().to_string();
        assert_eq!(text, "Unsupported preallocation mode: metadata");
    }
}
