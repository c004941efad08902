//! The calls that give files their names: one by one, each with the one that takes it back, in a process of its own.
//!
//! Invariant: what runs in that process makes system calls on memory that is there already, and nothing else.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::libc;
use nix::sched::{CloneFlags, clone};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::wait::waitpid;
use nix::unistd::{linkat, pipe2};

/// A call that gives, moves or takes a name. Made of memory that is there already: it runs in a copy of the process.
#[derive(Debug)]
pub(super) enum Call {
    /// Gives an open file without a name one that is free.
    Link { file: CString, to: CString },
    /// Moves a name, taking the new one away from another file.
    Move { from: CString, to: CString },
    /// Moves a name to one that is free.
    MoveToFree { from: CString, to: CString },
    /// Takes a name away. A failure is ignored: it is a hidden one by then.
    Remove { name: CString },
    /// Brings a folder's names to stable storage. A file system that cannot promise it says so here, to no use.
    Sync { folder: RawFd },
}

/// One call of a plan.
#[derive(Debug)]
pub(super) struct Step {
    /// The call.
    pub(super) call: Call,
    /// What takes it back.
    pub(super) undo: Option<Call>,
    /// Which file it is about.
    pub(super) file: usize,
}

impl Call {
    fn run(&self) -> std::result::Result<(), Errno> {
        match self {
            Call::Link { file, to } => {
                linkat(AT_FDCWD, file.as_c_str(), AT_FDCWD, to.as_c_str(), AtFlags::AT_SYMLINK_FOLLOW)
            }
            Call::Move { from, to } => rename(from, to),
            Call::MoveToFree { from, to } => move_to_free(from, to),
            Call::Remove { name } => {
                let _ = remove(name);
                Ok(())
            }
            Call::Sync { folder } => {
                // SAFETY: fsync takes a number and touches no memory.
                let _ = unsafe { libc::fsync(*folder) };
                Ok(())
            }
        }
    }
}

/// Whether a step of a plan has been made, seen from its traces. Names that are taken away were there before.
fn is_done(steps: &[Step], step: &Step) -> bool {
    let stat = |name: &CString| nix::sys::stat::stat(name.as_c_str()).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    let is_at = |file: &CString, name: &CString| stat(file).is_some_and(|file| stat(name) == Some(file));
    let is_gone = |name: &CString| nix::sys::stat::lstat(name.as_c_str()) == Err(Errno::ENOENT);
    // What has got a name may have got another one since.
    let mut moves = steps.iter().filter_map(|step| match &step.call {
        Call::Move { from, to } | Call::MoveToFree { from, to } => Some((from, to)),
        _ => None,
    });
    let linked = |name: &CString| {
        steps.iter().find_map(|step| match &step.call {
            Call::Link { file, to } if to == name => Some(file),
            _ => None,
        })
    };
    match &step.call {
        Call::Link { file, to } => is_at(file, to) || moves.any(|(from, next)| from == to && is_at(file, next)),
        Call::Move { from, to } | Call::MoveToFree { from, to } => match linked(from) {
            Some(file) => is_at(file, to),
            None => is_gone(from),
        },
        Call::Remove { name } => is_gone(name),
        Call::Sync { .. } => true,
    }
}

fn rename(from: &CString, to: &CString) -> std::result::Result<(), Errno> {
    // SAFETY: rename reads two C strings.
    Errno::result(unsafe { libc::rename(from.as_ptr(), to.as_ptr()) }).map(drop)
}

fn remove(name: &CString) -> std::result::Result<(), Errno> {
    // SAFETY: unlink reads a C string.
    Errno::result(unsafe { libc::unlink(name.as_ptr()) }).map(drop)
}

fn move_to_free(from: &CString, to: &CString) -> std::result::Result<(), Errno> {
    // `RENAME_NOREPLACE` of rename(2). By number, because not every C library has a function for it.
    const FREE_ONLY: libc::c_uint = 1;
    let (here, from_name, to_name) = (libc::AT_FDCWD, from.as_ptr(), to.as_ptr());
    // SAFETY: both names are C strings that outlive the call.
    let moved = unsafe { libc::syscall(libc::SYS_renameat2, here, from_name, here, to_name, FREE_ONLY) };
    let moved = Errno::result(moved).map(drop);
    if !matches!(moved, Err(Errno::EINVAL | Errno::ENOSYS)) {
        return moved;
    }
    // A second name fails where there is one already.
    match linkat(AT_FDCWD, from.as_c_str(), AT_FDCWD, to.as_c_str(), AtFlags::empty()) {
        Ok(()) => remove(from),
        Err(Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
            // No second names either: nothing is left but to look first.
            // SAFETY: access reads a C string.
            match Errno::result(unsafe { libc::access(to.as_ptr(), libc::F_OK) }) {
                Ok(_) => Err(Errno::EEXIST),
                Err(_) => rename(from, to),
            }
        }
        Err(errno) => Err(errno),
    }
}

/// Makes the calls; one that fails has those before it taken back, and is told by its number.
fn run(steps: &[Step]) -> std::result::Result<(), (usize, Errno)> {
    for (index, step) in steps.iter().enumerate() {
        if let Err(errno) = step.call.run() {
            for undo in steps.iter().take(index).rev().filter_map(|step| step.undo.as_ref()) {
                // The first failure is the one to tell.
                let _ = undo.run();
            }
            return Err((index, errno));
        }
    }
    Ok(())
}

/// What is left of a plan whose process was killed: what it did is taken back, unless that is all of it.
fn after_a_kill(steps: &[Step]) -> std::result::Result<(), (usize, io::Error)> {
    let done: Vec<bool> = steps.iter().map(|step| is_done(steps, step)).collect();
    let Some(first) = done.iter().position(|done| !done) else { return Ok(()) };
    let before = steps.iter().zip(done).take(first).rev().filter(|(_, done)| *done);
    for undo in before.filter_map(|(step, _)| step.undo.as_ref()) {
        // The kill is what is told.
        let _ = undo.run();
    }
    Err((0, io::Error::other("the process that gives files their names was killed")))
}

/// Makes the calls of a plan, the number of the one that failed beside its error. More than one is for a process of its
/// own, which no signal to this one stops.
///
/// The helper shares this one's table of files, so that it holds no lock longer than this one, and has its own session
/// and no signals, so that what ends this process lets it finish. It needs a fraction of a millisecond, or the time of
/// a folder's sync. Where no process can be made, this one does the same itself.
pub(super) fn run_apart(steps: &[Step]) -> std::result::Result<(), (usize, io::Error)> {
    let here = || run(steps).map_err(|(index, errno)| (index, errno.into()));
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
        let (index, errno) = run(steps).err().unwrap_or((0, Errno::UnknownErrno));
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
        Err(_) => return after_a_kill(steps),
    };
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, usize::from_le_bytes);
    match i32::try_from(number(errno)) {
        Ok(0) => Ok(()),
        Ok(errno) => Err((number(index), Errno::from_raw(errno).into())),
        Err(_) => Err((number(index), io::ErrorKind::Other.into())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    use super::*;

    fn c(path: &Path) -> CString {
        CString::new(path.as_os_str().as_bytes()).unwrap()
    }

    /// A new file goes over an older one: the calls, and the names in the folder and the bytes under `target` afterwards.
    fn killed_after(calls: usize) -> (bool, Vec<String>, Vec<u8>) {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (target, hidden) = (dir.path().join("target"), dir.path().join(".vimg-1.tmp"));
        fs::write(&target, b"old").unwrap();
        fs::write(dir.path().join("new"), b"new").unwrap();
        let file = File::open(dir.path().join("new")).unwrap();
        let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let (link, back) = (Call::Link { file: from, to: c(&hidden) }, Call::Remove { name: c(&hidden) });
        let steps = [
            Step { call: link, undo: Some(back), file: 0 },
            Step { call: Call::Move { from: c(&hidden), to: c(&target) }, undo: None, file: 0 },
        ];
        run(&steps[..calls]).unwrap();
        let done = after_a_kill(&steps);
        assert!(done.as_ref().is_err_and(|(_, error)| error.to_string().ends_with("was killed")) || done.is_ok());
        let names = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort_unstable();
        (done.is_ok(), names, fs::read(&target).unwrap())
    }

    #[test]
    fn a_killed_plan_leaves_no_hidden_name() {
        let names = vec!["new".to_owned(), "target".to_owned()];
        assert_eq!(killed_after(0), (false, names.clone(), b"old".to_vec()));
        assert_eq!(killed_after(1), (false, names.clone(), b"old".to_vec()));
        assert_eq!(killed_after(2), (true, names, b"new".to_vec()));
    }
}
