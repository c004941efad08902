//! The calls that give files their names: one by one, each with the one that takes it back, in a process of its own.
//!
//! Invariant: what runs in that process makes system calls on memory that is there already, and nothing else.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

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

fn is_at(file: &CString, name: &CString) -> bool {
    let stat = |name: &CString| nix::sys::stat::stat(name.as_c_str()).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    stat(file).is_some_and(|file| stat(name) == Some(file))
}

fn is_gone(name: &CString) -> bool {
    nix::sys::stat::lstat(name.as_c_str()) == Err(Errno::ENOENT)
}

impl Call {
    /// Whether it has been made, where all before it have and none behind it, seen from its traces. Names that are moved
    /// or taken away were there before.
    fn is_made(&self) -> bool {
        match self {
            Self::Link { file, to } => is_at(file, to),
            Self::Move { from: name, .. } | Self::MoveToFree { from: name, .. } | Self::Remove { name } => {
                is_gone(name)
            }
            Self::Sync { .. } => false,
        }
    }

    /// Takes something back: why that had to be is what is told.
    fn run_if_it_can(&self) {
        let _ = self.run();
    }

    /// Cannot fail: what it does is done once the names are given.
    fn tidies(&self) -> bool {
        matches!(self, Self::Remove { .. } | Self::Sync { .. })
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

/// What is said of a plan while it is under way: so much for each call that was made, and so much when taking back
/// begins, and for each call that takes one back.
const MADE: u64 = 1;
const BACK: u64 = 1 << 32;

/// Makes the calls; one that fails has those before it taken back, and is told by its number. How far it is goes to
/// `say`: [`MADE`], [`BACK`].
fn run(steps: &[Step], say: impl Fn(u64)) -> std::result::Result<(), (usize, Errno)> {
    for (index, step) in steps.iter().enumerate() {
        if let Err(errno) = step.call.run() {
            say(BACK);
            for undo in undoing(steps.get(..index).unwrap_or_default()) {
                undo.run_if_it_can();
                say(BACK);
            }
            return Err((index, errno));
        }
        say(MADE);
    }
    Ok(())
}

/// What takes calls back, in that order.
fn undoing(made: &[Step]) -> impl Iterator<Item = &Call> {
    made.iter().rev().filter_map(|step| step.undo.as_ref())
}

/// What is left of a plan whose process was killed when it had `said` so much: what it did is taken back, unless all
/// names are given by then, and what remains is done here.
fn after_a_kill(steps: &[Step], said: u64) -> std::result::Result<(), (usize, io::Error)> {
    let number = |said: u64| usize::try_from(said).unwrap_or(usize::MAX);
    let killed = Err((0, io::Error::other("the process that gives files their names was killed")));
    let (before, behind) = steps.split_at(number(said % BACK).min(steps.len()));
    if let Some(back) = number(said / BACK).checked_sub(1) {
        // A call had failed. What has been taken back once is not what it was: the older file may be there again.
        let mut rest = undoing(before).skip(back);
        let next = rest.next().filter(|undo| !undo.is_made());
        next.into_iter().chain(rest).for_each(Call::run_if_it_can);
        return killed;
    }
    let unsaid = behind.first().filter(|step| step.call.is_made());
    let rest = behind.get(usize::from(unsaid.is_some())..).unwrap_or_default();
    if rest.iter().all(|step| step.call.tidies()) {
        return run(rest, |_| {}).map_err(|(index, errno)| (index, errno.into()));
    }
    if let Some(Step { call: Call::MoveToFree { from, to }, .. }) = rest.first()
        && is_at(from, to)
    {
        // On a file system where that takes two calls it has both names.
        let _ = remove(to);
    }
    let made = before.len() + usize::from(unsaid.is_some());
    undoing(steps.get(..made).unwrap_or_default()).for_each(Call::run_if_it_can);
    killed
}

/// Older files that are still called otherwise, after a plan that failed: the name, and the one they have.
pub(super) fn left_aside(steps: &[Step]) -> impl Iterator<Item = (&CStr, &CStr)> {
    steps.iter().filter_map(|step| match (&step.call, &step.undo) {
        (Call::MoveToFree { from, to }, Some(Call::MoveToFree { .. })) if !is_gone(to) && !is_at(to, from) => {
            Some((from.as_c_str(), to.as_c_str()))
        }
        _ => None,
    })
}

/// How far a plan is, told by one process to another: an event counter (eventfd(2)), which never fills.
struct Counter(File);

impl Counter {
    fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes two numbers and touches no memory.
        let number = Errno::result(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(Self(unsafe { File::from_raw_fd(number) }))
    }

    /// Adds so much. Nothing is allocated.
    fn add(&self, so_much: u64) {
        let bytes = so_much.to_ne_bytes();
        // SAFETY: these are eight bytes, and write reads no more.
        unsafe { libc::write(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    }

    /// All that was added.
    fn sum(&self) -> u64 {
        let mut bytes = [0; 8];
        // Nothing can be read where nothing was added.
        match (&self.0).read_exact(&mut bytes) {
            Ok(()) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }
}

/// Makes the calls of a plan, the number of the one that failed beside its error. More than one is for a process of its
/// own, which no signal to this one stops.
///
/// The helper shares this one's table of files, so that it holds no lock longer than this one, and has its own session
/// and no signals, so that what ends this process lets it finish. It needs a fraction of a millisecond, or the time of
/// a folder's sync. Where no process can be made, this one does the same itself.
pub(super) fn run_apart(steps: &[Step]) -> std::result::Result<(), (usize, io::Error)> {
    let here = || run(steps, |_| {}).map_err(|(index, errno)| (index, errno.into()));
    if steps.len() < 2 {
        return here();
    }
    let whole = |errno: Errno| (0, io::Error::from(errno));
    // All that is allocated is allocated before: a copy of a process with threads may not.
    let Ok((answer, tell)) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK) else { return here() };
    let Ok(counter) = Counter::new() else { return here() };
    let told = tell.as_raw_fd();
    let mut stack = vec![0; 128 << 10];
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK).map_err(whole)?;
    let child = || {
        // SAFETY: setsid takes nothing and touches no memory.
        unsafe { libc::setsid() };
        let (index, errno) = run(steps, |so_much| counter.add(so_much)).err().unwrap_or((0, Errno::UnknownErrno));
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
        Err(_) => return after_a_kill(steps, counter.sum()),
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

    /// What is there and what it holds, but for the scratch folder's own file.
    fn held(dir: &Path) -> Vec<(String, String)> {
        let mut all: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read_to_string(path).unwrap()))
            .filter(|(name, _)| name != "new")
            .collect();
        all.sort_unstable();
        all
    }

    /// Kills a plan after each number of calls, before and after the last of them was counted: all of it is there, or
    /// nothing.
    fn kill_anywhere(older: &[(&str, &str)], newer: &[(&str, &str)], plan: impl Fn(&Path, &CString) -> Vec<Step>) {
        let (mut calls, mut last) = (0, false);
        while !last {
            for uncounted in 0..=calls.min(1) {
                let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
                older.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
                fs::write(dir.path().join("new"), "new").unwrap();
                let file = File::open(dir.path().join("new")).unwrap();
                let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
                let steps = plan(dir.path(), &from);
                run(&steps[..calls], |_| {}).unwrap();
                let done = after_a_kill(&steps, (calls - uncounted) as u64);
                let wanted = if done.is_ok() { newer } else { older };
                let wanted: Vec<_> =
                    wanted.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
                assert_eq!(held(dir.path()), wanted, "{calls} calls, {uncounted} not counted: {done:?}");
                assert_eq!(left_aside(&steps).count(), 0);
                assert!(done.is_err() || calls > 0);
                last = calls == steps.len();
                assert!(done.is_ok() || !last, "{done:?}");
            }
            calls += 1;
        }
    }

    #[test]
    fn a_killed_plan_leaves_the_older_file_or_the_newer() {
        kill_anywhere(&[("target", "old")], &[("target", "new")], |dir, from| {
            let (target, hidden) = (c(&dir.join("target")), c(&dir.join(".vimg-1.tmp")));
            let undo = Some(Call::Remove { name: hidden.clone() });
            vec![
                Step { call: Call::Link { file: from.clone(), to: hidden.clone() }, undo, file: 0 },
                Step { call: Call::Move { from: hidden, to: target }, undo: None, file: 0 },
            ]
        });
    }

    #[test]
    fn a_killed_plan_of_several_files_leaves_all_of_the_older_ones_or_of_the_newer() {
        let older = [("head", "old head"), ("part", "old part")];
        kill_anywhere(&older, &[("head", "new"), ("more", "new"), ("part", "new")], |dir, from| {
            let name = |name: &str| c(&dir.join(name));
            let aside = |from: &str, to: &str| {
                let undo = Some(Call::MoveToFree { from: name(to), to: name(from) });
                Step { call: Call::MoveToFree { from: name(from), to: name(to) }, undo, file: 0 }
            };
            let put = |to: &str| {
                let undo = Some(Call::Remove { name: name(to) });
                Step { call: Call::Link { file: from.clone(), to: name(to) }, undo, file: 0 }
            };
            let remove = |from: &str| Step { call: Call::Remove { name: name(from) }, undo: None, file: 0 };
            vec![
                aside("head", ".vimg-1.tmp"),
                put("more"),
                aside("part", ".vimg-2.tmp"),
                put("part"),
                put("head"),
                remove(".vimg-1.tmp"),
                remove(".vimg-2.tmp"),
            ]
        });
    }

    /// A call fails, and the process is killed at each point of taking the others back, before and after that was said.
    #[test]
    fn what_was_taken_back_is_not_taken_back_again() {
        for killed_at in 0..=3 {
            for unsaid in 0..=1 {
                let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
                let name = |name: &str| c(&dir.path().join(name));
                for (name, text) in [("head", "old head"), ("part", "old part"), ("new", "new")] {
                    fs::write(dir.path().join(name), text).unwrap();
                }
                let file = File::open(dir.path().join("new")).unwrap();
                let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
                let aside = |from: &str, to: &str| {
                    let undo = Some(Call::MoveToFree { from: name(to), to: name(from) });
                    Step { call: Call::MoveToFree { from: name(from), to: name(to) }, undo, file: 0 }
                };
                let undo = Some(Call::Remove { name: name("part") });
                let steps = [
                    aside("head", ".vimg-1.tmp"),
                    aside("part", ".vimg-2.tmp"),
                    Step { call: Call::Link { file: from, to: name("part") }, undo, file: 0 },
                    aside("nothing", ".vimg-3.tmp"),
                ];
                run(&steps[..3], |_| {}).unwrap();
                steps[3].call.run().unwrap_err();
                let undone = undoing(&steps[..3]).take(killed_at).map(|undo| undo.run().unwrap()).count() as u64;
                let said = 3 * MADE + BACK + undone.saturating_sub(unsaid) * BACK;
                assert!(after_a_kill(&steps, said).is_err());
                let wanted = [("head", "old head"), ("part", "old part")];
                assert_eq!(held(dir.path()), wanted.map(|(name, text)| (name.to_owned(), text.to_owned())));
            }
        }
    }

    #[test]
    fn what_could_not_be_taken_back_is_known() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (name, hidden) = (c(&dir.path().join("head")), c(&dir.path().join(".vimg-1.tmp")));
        fs::write(dir.path().join("head"), "old").unwrap();
        let undo = Some(Call::MoveToFree { from: hidden.clone(), to: name.clone() });
        let call = Call::MoveToFree { from: name.clone(), to: hidden.clone() };
        let steps = [Step { call, undo, file: 0 }];
        run(&steps, |_| {}).unwrap();
        assert_eq!(left_aside(&steps).collect::<Vec<_>>(), [(name.as_c_str(), hidden.as_c_str())]);
    }
}
