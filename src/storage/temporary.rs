//! Hidden, clearly temporary names for files that are not complete, and their removal when the program is
//! interrupted.
//!
//! Invariant: from before such a file exists until it is renamed or removed its name is in `SLOTS`, which the
//! handler of SIGINT, SIGTERM and SIGHUP reads. The handler does nothing but what a handler may: it loads
//! pointers, unlinks and lets the signal have its usual effect. A name's memory is never freed, so the handler
//! can never meet a dangling pointer. Nothing is installed before the first such name is needed, and nothing over
//! a handler of somebody else.
//!
//! No handler helps against SIGKILL. An unnamed file that takes the name of another one needs such a name for the
//! moment between two calls; [`replace`] has a process of its own for them, which no signal to this one stops.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

use nix::errno::Errno;
use nix::libc::{self, c_char, c_int};
use nix::sched::{CloneFlags, clone};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};

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

    /// Gives the file its final name, taking it away from another file.
    pub fn rename(&mut self, target: &Path) -> io::Result<()> {
        if let Some(path) = &self.path {
            fs::rename(path, target)?;
        }
        self.path = None;
        Ok(())
    }
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

fn hidden(target: &Path) -> PathBuf {
    target.with_file_name(format!(".vimg-{:016x}.tmp", fastrand::u64(..)))
}

/// Gives an unnamed file the name `target`, taking it away from another file.
///
/// The helper process shares this one's table of files, so that it holds no lock longer than this one, and has its
/// own session and no signals, so that what ends this process lets it finish. It needs a fraction of a millisecond.
/// Where no process can be made, this one does the same itself.
pub fn replace(file: &File, target: &Path) -> io::Result<()> {
    // All that is allocated is allocated before: a copy of a process with threads may not.
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let to = CString::new(target.as_os_str().as_bytes())?;
    let names = (0..8).map(|_| CString::new(hidden(target).as_os_str().as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let steps = || link_and_rename(&from, &names, &to);

    let mut stack = vec![0; 128 << 10];
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let child = || {
        // SAFETY: setsid takes nothing and touches no memory.
        unsafe { libc::setsid() };
        steps().err().map_or(0, |errno| errno as isize)
    };
    // SAFETY: memory is not shared (no CLONE_VM), and the child makes system calls on memory that is there already,
    // nothing else, which is what a copy of a process with threads may do. The stack is large enough for them.
    let made = unsafe { clone(Box::new(child), &mut stack, CloneFlags::CLONE_FILES, Some(libc::SIGCHLD)) };
    let _ = before.thread_set_mask();
    let Ok(pid) = made else {
        return Ok(steps()?);
    };
    loop {
        match waitpid(pid, None) {
            Err(Errno::EINTR) => {}
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(WaitStatus::Exited(_, errno)) => return Err(Errno::from_raw(errno).into()),
            // Killed, or its end went unseen because the caller has us ignore SIGCHLD: the name tells.
            _ => {
                let (is, should) = (fs::metadata(target)?, file.metadata()?);
                return match (is.dev(), is.ino()) == (should.dev(), should.ino()) {
                    true => Ok(()),
                    false => Err(io::ErrorKind::Interrupted.into()),
                };
            }
        }
    }
}

/// System calls only: this runs in a copy of the process.
fn link_and_rename(from: &CStr, names: &[CString], to: &CStr) -> Result<(), Errno> {
    let at = libc::AT_FDCWD;
    for name in names {
        // SAFETY: linkat reads two C strings.
        let linked = unsafe { libc::linkat(at, from.as_ptr(), at, name.as_ptr(), libc::AT_SYMLINK_FOLLOW) };
        match Errno::result(linked) {
            Ok(_) => {
                // SAFETY: rename reads two C strings.
                let renamed = Errno::result(unsafe { libc::rename(name.as_ptr(), to.as_ptr()) });
                if renamed.is_err() {
                    // SAFETY: unlink reads a C string.
                    unsafe { libc::unlink(name.as_ptr()) };
                }
                return renamed.map(drop);
            }
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::EEXIST)
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
        name.rename(&target).unwrap();
        drop(name);
        assert_eq!(fs::read(&target).unwrap(), b"y");
    }
}
