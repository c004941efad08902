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
//! [`run_apart`] has a process of its own for them, which no signal to this one stops.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{self, c_char, c_int};
use nix::sched::{CloneFlags, clone};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction};
use nix::sys::wait::waitpid;
use nix::unistd::pipe2;

use super::staging::publish::{self, Step};

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
pub(super) fn hidden(target: &Path) -> PathBuf {
    target.with_file_name(format!(".vimg-{:016x}.tmp", fastrand::u64(..)))
}

/// Makes the calls of a plan, the number of the one that failed beside its error. More than one is for a process of its
/// own, which no signal to this one stops.
///
/// The helper shares this one's table of files, so that it holds no lock longer than this one, and has its own session
/// and no signals, so that what ends this process lets it finish. It needs a fraction of a millisecond, or the time of
/// a folder's sync. Where no process can be made, this one does the same itself.
pub(super) fn run_apart(steps: &[Step]) -> Result<(), (usize, io::Error)> {
    let here = || publish::run(steps).map_err(|(index, errno)| (index, errno.into()));
    if steps.len() < 2 {
        return here();
    }
    let whole = |errno: Errno| (0, io::Error::from(errno));
    // All that is allocated is allocated before: a copy of a process with threads may not.
    let Ok((answer, tell)) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK) else { return here() };
    let told = tell.as_raw_fd();
    let mut stack = vec![0; 128 << 10];
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK).map_err(whole)?;
    let child = || {
        // SAFETY: setsid takes nothing and touches no memory.
        unsafe { libc::setsid() };
        let (index, errno) = publish::run(steps).err().unwrap_or((0, Errno::UnknownErrno));
        let text = [index.to_le_bytes(), (errno as usize).to_le_bytes()];
        // SAFETY: `text` is that long, and write reads no more.
        unsafe { libc::write(told, text.as_ptr().cast(), size_of_val(&text)) };
        0
    };
    // SAFETY: memory is not shared (no CLONE_VM), and the child makes system calls on memory that is there already,
    // nothing else, which is what a copy of a process with threads may do. The stack is large enough for them.
    let made = unsafe { clone(Box::new(child), &mut stack, CloneFlags::CLONE_FILES, Some(libc::SIGCHLD)) };
    let _ = before.thread_set_mask();
    let Ok(pid) = made else { return here() };
    // How it ended may go unseen (the caller has us ignore SIGCHLD); what it told does not.
    while waitpid(pid, None) == Err(Errno::EINTR) {}
    let mut text = [0; 2 * size_of::<usize>()];
    let (index, errno) = match File::from(answer).read_exact(&mut text) {
        Ok(()) => text.split_at(size_of::<usize>()),
        // It was killed.
        Err(_) => return Err((0, io::ErrorKind::Interrupted.into())),
    };
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, usize::from_le_bytes);
    match i32::try_from(number(errno)) {
        Ok(0) => Ok(()),
        Ok(errno) => Err((number(index), Errno::from_raw(errno).into())),
        Err(_) => Err((number(index), io::ErrorKind::Other.into())),
    }
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
