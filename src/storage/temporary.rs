//! Hidden, clearly temporary names for files that are not complete, and their removal when the program is
//! interrupted.
//!
//! Invariant: from before such a file exists until it is renamed or removed its name is in `SLOTS`, which the
//! handler of SIGINT, SIGTERM and SIGHUP reads. The handler does nothing but what a handler may: it loads
//! pointers, unlinks and lets the signal have its usual effect. A name's memory is never freed, so the handler
//! can never meet a dangling pointer. Nothing is installed before the first such name is needed, and nothing over
//! a handler of somebody else.
//!
//! No handler helps against SIGKILL. Where names are moved in more than one call, files have such names in between;
//! [`staging`](super::staging) has a process of its own for them, which no signal to this one stops.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use nix::libc::{self, c_char, c_int};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// More files than this at once are not removed by a signal.
static SLOTS: [AtomicPtr<c_char>; 64] = [const { AtomicPtr::new(ptr::null_mut()) }; 64];
static INSTALL: Once = Once::new();

/// A name that goes with this value, unless the file was renamed.
#[derive(Debug)]
pub struct TemporaryName {
    path: Option<PathBuf>,
    slot: Option<&'static AtomicPtr<c_char>>,
}

impl TemporaryName {
    /// Makes a file, by `make`, under a new name in the folder of `target`.
    pub fn beside<T>(target: &Path, mut make: impl FnMut(&Path) -> io::Result<T>) -> io::Result<(T, Self)> {
        INSTALL.call_once(install);
        for _ in 0..100 {
            let path = hidden(target);
            let mut name = Self { slot: register(&path), path: None };
            match make(&path) {
                Ok(made) => {
                    name.path = Some(path);
                    return Ok((made, name));
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// The same for a file that has just been made with that name, which is its own.
    pub fn adopt(path: &Path) -> Self {
        INSTALL.call_once(install);
        Self { slot: register(path), path: Some(path.to_owned()) }
    }

    /// The name, as long as it goes with this value.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The name stays, or is another's by now.
    pub fn forget(&mut self) {
        self.path = None;
        if let Some(slot) = self.slot.take() {
            slot.store(ptr::null_mut(), Ordering::SeqCst);
        }
    }
}

/// The host's folder for large temporary files; not that for small ones, which may be memory.
pub fn large_folder() -> PathBuf {
    std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map_or("/var/tmp".into(), PathBuf::from)
}

/// A file of nobody else, empty, in the host's folder for large temporary files: what has come to be in it goes with the
/// name.
pub fn large_file() -> io::Result<TemporaryName> {
    let make = |path: &Path| OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop);
    TemporaryName::beside(&large_folder().join("pipe"), make).map(|((), name)| name)
}

/// Files that were made before they are needed.
static AHEAD: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Makes a file for a later [`unnamed_file`], which may not be able to any more.
pub fn make_ahead() -> io::Result<()> {
    let file = make_unnamed()?;
    AHEAD.lock().unwrap_or_else(PoisonError::into_inner).push(file);
    Ok(())
}

/// A file that nobody can find, in the host's folder for such: it goes with its handle.
pub fn unnamed_file() -> io::Result<File> {
    let ahead = AHEAD.lock().unwrap_or_else(PoisonError::into_inner).pop();
    ahead.map_or_else(make_unnamed, Ok)
}

fn make_unnamed() -> io::Result<File> {
    let make = |path: &Path| OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    // The name goes at once.
    TemporaryName::beside(&std::env::temp_dir().join("vimg"), make).map(|(file, _)| file)
}

impl Drop for TemporaryName {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // What cannot be removed stays, hidden and recognisable.
            let _ = fs::remove_file(path);
        }
        if let Some(slot) = self.slot {
            slot.store(ptr::null_mut(), Ordering::SeqCst);
        }
    }
}

/// A hidden name beside `target`.
pub fn hidden(target: &Path) -> PathBuf {
    target.with_file_name(format!(".vimg-{:016x}.tmp", fastrand::u64(..)))
}

fn register(path: &Path) -> Option<&'static AtomicPtr<c_char>> {
    let name = CString::new(path.as_os_str().as_bytes()).ok()?;
    // Never freed: see the module.
    let name = name.into_raw();
    SLOTS.iter().find(|slot| slot.compare_exchange(ptr::null_mut(), name, Ordering::SeqCst, Ordering::SeqCst).is_ok())
}

fn install() {
    let ours = SigAction::new(SigHandler::Handler(remove_all), SaFlags::SA_RESETHAND, SigSet::empty());
    for signal in SIGNALS {
        // SAFETY: the handler calls only functions that are safe in a handler and touches only atomics and memory
        // that is never freed.
        let before = unsafe { sigaction(signal, &ours) };
        if let Ok(before) = before
            && !matches!(before.handler(), SigHandler::SigDfl)
        {
            // SAFETY: puts back what was there.
            let _ = unsafe { sigaction(signal, &before) };
        }
    }
}

extern "C" fn remove_all(signal: c_int) {
    for slot in &SLOTS {
        let name = slot.load(Ordering::SeqCst);
        if !name.is_null() {
            // SAFETY: a slot holds null or a C string that is never freed; unlink may be called in a handler.
            unsafe { libc::unlink(name) };
        }
    }
    // SAFETY: raise may be called in a handler. The default action is back already (SA_RESETHAND) and takes place
    // when the handler returns.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_goes_with_the_value_or_is_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let (_, name) = TemporaryName::beside(&target, |path| fs::write(path, b"x")).unwrap();
        let entry = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().file_name();
        assert!(entry.to_str().unwrap().starts_with(".vimg-"));
        drop(name);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let (_, mut name) = TemporaryName::beside(&target, |path| fs::write(path, b"y")).unwrap();
        fs::rename(name.path().unwrap(), &target).unwrap();
        name.forget();
        drop(name);
        assert_eq!(fs::read(&target).unwrap(), b"y");
        drop(TemporaryName::adopt(&target));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
