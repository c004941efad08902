//! Giving names to files that are complete: all of them, or none.
//!
//! What is to be done is a list of calls, each with the one that takes it back, made before anything happens
//! (`plan`). Where it is more than one call, a process of its own makes them, which no signal to this one stops: so
//! even SIGKILL leaves all of it done or nothing.
//!
//! A power cut can fall between two of them. So the order is: where another image's data is replaced, its header's
//! name goes first, away to a hidden one; then come the names of the data; the header's own name comes last. Whatever
//! part is done, an older header never lies beside newer data. File systems keep no order among each other: other
//! folders are synced before the header gets its name, and older files go when all of them are.
//!
//! Where the host's policy allows the very name alone (a profile that lists files), the bytes are copied into a file
//! of that name, which is removed if that fails.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, copy_file_range, fcntl};
use nix::unistd::{Whence, lseek};

use super::make::{create_new, errno, folder_of, is_policy, named};
use super::steps::{Call, Step, left_aside, run_apart};
use super::{Naming, Staged};
use crate::storage::file::{FileHow, HostFile};
use crate::storage::lock::Access;
use crate::storage::temporary::{self, TemporaryName};
use crate::storage::{Error, Identity, Result};

/// Gives all of them their names, in that order: the one with the header is the last. `durable` says whether the
/// names shall be on stable storage too.
pub(super) fn publish(files: &mut [Staged], durable: bool) -> Result<()> {
    let folders = folders(files);
    match plan(files, durable.then_some(&folders)) {
        Ok(steps) => match run_apart(&steps) {
            Ok(()) => {}
            Err((index, cause)) => {
                let file = steps.get(index).and_then(|step| files.get(step.file));
                let Some(target) = file.map(|staged| staged.target.clone()) else { return Err(cause.into()) };
                match errno(&cause) {
                    Errno::EEXIST => return Err(taken(&target)),
                    // A project that files cannot be moved out of is a policy too.
                    Errno::EXDEV => copy_all(files, durable)?,
                    _ if is_policy(&cause) => copy_all(files, durable)?,
                    _ => return Err(not_named(&target, cause, &steps)),
                }
            }
        },
        Err((target, cause)) if errno(&cause) == Errno::EEXIST => return Err(taken(&target)),
        Err((target, cause)) => return Err(named("create", &target, cause)),
    }
    for staged in files.iter() {
        staged.finish_head(durable)?;
    }
    for staged in files.iter_mut() {
        staged.committed = true;
        if let Some(temporary) = &mut staged.temporary {
            temporary.forget();
        }
    }
    if durable {
        for (_, folder) in &folders {
            let _ = folder.sync_all();
        }
    }
    Ok(())
}

/// Why a file has not got its name, and where older ones are that have not got theirs back.
fn not_named(target: &Path, cause: io::Error, steps: &[Step]) -> Error {
    let error = named("create", target, cause);
    let aside: String = left_aside(steps)
        .map(|(name, hidden)| format!("; what was '{}' is '{}' now", name.to_string_lossy(), hidden.to_string_lossy()))
        .collect();
    if aside.is_empty() { error } else { Error::Other(format!("{error}{aside}")) }
}

/// The folders in which names are given. One that cannot be opened for reading cannot be asked.
fn folders(files: &[Staged]) -> Vec<(PathBuf, File)> {
    let names: BTreeSet<_> = files.iter().map(|staged| folder_of(&staged.target).to_owned()).collect();
    names.into_iter().filter_map(|name| File::open(&name).ok().map(|file| (name, file))).collect()
}

fn c(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn is_at(path: &Path, identity: Identity) -> io::Result<bool> {
    let meta = fs::symlink_metadata(path)?;
    Ok(Identity { device: meta.dev(), inode: meta.ino() } == identity)
}

/// What is to be done, or which name cannot be given.
fn plan(
    files: &[Staged],
    durable: Option<&Vec<(PathBuf, File)>>,
) -> std::result::Result<Vec<Step>, (PathBuf, io::Error)> {
    let replaces = |staged: &Staged| matches!(staged.way, Naming::Replace { .. });
    let last = files.len().saturating_sub(1);
    let header_first = files.iter().take(last).any(replaces) && files.last().is_some_and(replaces);
    let sync = |folder: &File| Step { call: Call::Sync { folder: folder.as_raw_fd() }, undo: None, file: last };
    let synced = durable.map(Vec::as_slice).unwrap_or_default();
    let mut steps = Vec::new();
    let mut aside = Vec::new();
    if let Some(header) = files.last().filter(|_| header_first) {
        let at = |cause| (header.target.clone(), cause);
        aside.extend(move_aside(header, last, &mut steps).map_err(at)?);
        let own = synced.iter().find(|(name, _)| name == folder_of(&header.target));
        steps.extend(own.map(|(_, folder)| sync(folder)));
    }
    for (index, staged) in files.iter().enumerate() {
        let at = |cause| (staged.target.clone(), cause);
        if index == last {
            let others = synced.iter().filter(|(name, _)| name != folder_of(&staged.target));
            steps.extend(others.map(|(_, folder)| sync(folder)));
        }
        match &staged.way {
            Naming::InPlace | Naming::VeryName => {}
            Naming::Replace { old } => match (is_at(&staged.target, old.identity()), index == last) {
                // Somebody has put another file there.
                (Ok(false), _) => return Err(at(Errno::EEXIST.into())),
                (Ok(true), true) if !header_first => put_over(staged, index, &mut steps).map_err(at)?,
                (Ok(true), false) => {
                    aside.extend(move_aside(staged, index, &mut steps).map_err(at)?);
                    put(staged, index, &mut steps).map_err(at)?;
                }
                // It has gone, or will have.
                _ => put(staged, index, &mut steps).map_err(at)?,
            },
            Naming::Link { .. } => put(staged, index, &mut steps).map_err(at)?,
        }
    }
    if !aside.is_empty() {
        steps.extend(synced.iter().map(|(_, folder)| sync(folder)));
    }
    steps.extend(aside.into_iter().map(|name| Step { call: Call::Remove { name }, undo: None, file: last }));
    Ok(steps)
}

/// The older file's name becomes a hidden one.
fn move_aside(staged: &Staged, file: usize, steps: &mut Vec<Step>) -> io::Result<Option<CString>> {
    let Naming::Replace { old } = &staged.way else { return Ok(None) };
    if !is_at(&staged.target, old.identity()).unwrap_or(false) {
        return Ok(None);
    }
    let (name, hidden) = (c(&staged.target)?, c(&temporary::hidden(&staged.target))?);
    let undo = Some(Call::MoveToFree { from: hidden.clone(), to: name.clone() });
    steps.push(Step { call: Call::MoveToFree { from: name, to: hidden.clone() }, undo, file });
    Ok(Some(hidden))
}

fn unnamed(staged: &Staged) -> io::Result<CString> {
    Ok(CString::new(format!("/proc/self/fd/{}", staged.storage.file().as_raw_fd()))?)
}

/// The new file gets its name, which is free.
fn put(staged: &Staged, file: usize, steps: &mut Vec<Step>) -> io::Result<()> {
    let to = c(&staged.target)?;
    let (call, undo) = match staged.temporary.as_ref().and_then(TemporaryName::path) {
        Some(path) => {
            let from = c(path)?;
            let undo = Call::Move { from: to.clone(), to: from.clone() };
            (Call::MoveToFree { from, to }, undo)
        }
        None => (Call::Link { file: unnamed(staged)?, to: to.clone() }, Call::Remove { name: to }),
    };
    steps.push(Step { call, undo: Some(undo), file });
    Ok(())
}

/// The new file takes the name of the older one.
fn put_over(staged: &Staged, file: usize, steps: &mut Vec<Step>) -> io::Result<()> {
    let to = c(&staged.target)?;
    let from = match staged.temporary.as_ref().and_then(TemporaryName::path) {
        Some(path) => c(path)?,
        None => {
            let hidden = c(&temporary::hidden(&staged.target))?;
            let call = Call::Link { file: unnamed(staged)?, to: hidden.clone() };
            steps.push(Step { call, undo: Some(Call::Remove { name: hidden.clone() }), file });
            hidden
        }
    };
    steps.push(Step { call: Call::Move { from, to }, undo: None, file });
    Ok(())
}

/// Why a name cannot be given that somebody else gave meanwhile: a lock, if they hold one.
fn taken(target: &Path) -> Error {
    let how = FileHow { write: true, access: Access::CREATE, ..FileHow::default() };
    match HostFile::open(target, &how) {
        Err(error @ (Error::Locked { .. } | Error::LockByte(_))) => error,
        _ => named("create", target, Errno::EEXIST.into()),
    }
}

/// Copies each into a file of its very name.
fn copy_all(files: &mut [Staged], sync: bool) -> Result<()> {
    if files.iter().rev().skip(1).any(|staged| matches!(staged.way, Naming::Replace { .. }))
        && let Some(Staged { way: Naming::Replace { .. }, target, .. }) = files.last()
    {
        // The older header must not be seen with what is copied next.
        let header = OpenOptions::new().write(true).open(target);
        let gone = header.and_then(|file| {
            file.set_len(0)?;
            if sync { file.sync_all() } else { Ok(()) }
        });
        gone.map_err(|cause| named("create", target, cause))?;
    }
    let mut made = Vec::new();
    for staged in files.iter() {
        let failed = |cause| named("create", &staged.target, cause);
        let to = match &staged.way {
            Naming::InPlace | Naming::VeryName => continue,
            Naming::Link { .. } => match create_new(&staged.target, 0o644, OFlag::O_CLOEXEC) {
                Ok(file) => {
                    made.push(TemporaryName::adopt(&staged.target));
                    file
                }
                Err(cause) if errno(&cause) == Errno::EEXIST => return Err(taken(&staged.target)),
                Err(cause) => return Err(failed(cause)),
            },
            Naming::Replace { .. } => OpenOptions::new().read(true).write(true).open(&staged.target).map_err(failed)?,
        };
        if let Err(cause) = copy(staged.storage.file(), &to, sync) {
            // Half an image must not look like one.
            let _ = to.set_len(0);
            return Err(failed(cause));
        }
    }
    made.iter_mut().for_each(TemporaryName::forget);
    Ok(())
}

/// The same bytes and holes.
fn copy(from: &File, to: &File, sync: bool) -> io::Result<()> {
    for file in [from, to] {
        let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
        fcntl(file, FcntlArg::F_SETFL(flags & !OFlag::O_DIRECT))?;
    }
    let len = from.metadata()?.len();
    to.set_len(0)?;
    to.set_len(len)?;
    let signed = |at: u64| i64::try_from(at).map_err(|_| io::Error::from(Errno::EFBIG));
    let seek = |at: u64, whence| match lseek(from, signed(at)?, whence) {
        Ok(to) => Ok(u64::try_from(to).unwrap_or(len).min(len)),
        Err(Errno::ENXIO) => Ok(len),
        Err(errno) => Err(io::Error::from(errno)),
    };
    let mut at = 0;
    while at < len {
        at = seek(at, Whence::SeekData)?;
        let end = if at < len { seek(at, Whence::SeekHole)? } else { len };
        while at < end {
            at += copy_some(from, to, at, end - at)?;
        }
    }
    if sync { to.sync_all() } else { Ok(()) }
}

fn copy_some(from: &File, to: &File, at: u64, len: u64) -> io::Result<u64> {
    let signed = i64::try_from(at).map_err(|_| io::Error::from(Errno::EFBIG))?;
    let wanted = usize::try_from(len).unwrap_or(usize::MAX).min(64 << 20);
    match copy_file_range(from, Some(&mut signed.clone()), to, Some(&mut signed.clone()), wanted) {
        Ok(n) if n > 0 => Ok(n as u64),
        Err(errno @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EIO)) => Err(errno.into()),
        _ => {
            let mut buf = vec![0; wanted.min(1 << 20)];
            let n = from.read_at(&mut buf, at)?;
            let bytes = buf.get(..n).filter(|bytes| !bytes.is_empty());
            to.write_all_at(bytes.ok_or(io::ErrorKind::UnexpectedEof)?, at)?;
            Ok(n as u64)
        }
    }
}
