//! Stops vimg at a system call that is counted, by tracing it: what is tested there depends on no clock.
//!
//! The threads of vimg are traced with it, and their calls count together; a process that it starts is not.

use std::path::Path;

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::run::plain;
use super::vimg_path;

/// How a traced run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was killed at that call.
    Killed,
    /// It came to its end, well, before it made so many: this many.
    Done(usize),
}

/// Runs vimg and kills it when it enters or leaves a system call for the `n`th time.
pub fn killed_at(folder: &Path, args: &[&str], n: usize) -> Ended {
    let mut killed = false;
    let (code, calls) = traced(folder, args, |calls, pid| {
        killed = calls == n;
        if killed {
            kill(pid, Signal::SIGKILL).expect("kill");
        }
        !killed
    });
    assert!(killed || code == Some(0), "{args:?}: {code:?}");
    if killed { Ended::Killed } else { Ended::Done(calls) }
}

/// Runs vimg and sends it SIGTERM when it enters or leaves a system call for the `n`th time. Nothing if it made fewer
/// calls; else whether the signal ended it.
pub fn terminated_at(folder: &Path, args: &[&str], n: usize) -> Option<bool> {
    let (code, calls) = traced(folder, args, |calls, pid| {
        if calls == n {
            kill(pid, Signal::SIGTERM).expect("kill");
        }
        true
    });
    assert!(code.is_none_or(|code| code == 0), "{args:?}: {code:?}");
    (calls >= n).then_some(code.is_none())
}

/// Runs vimg and does something else when it enters or leaves a system call for the `n`th time. Gives its exit code
/// and what it said, or nothing if it made fewer calls.
pub fn disturbed_at(folder: &Path, args: &[&str], n: usize, disturb: impl FnOnce()) -> Option<(i32, String)> {
    let mut disturb = Some(disturb);
    let (code, _) = traced(folder, args, |calls, _| {
        if calls == n
            && let Some(disturb) = disturb.take()
        {
            disturb();
        }
        true
    });
    let said = std::fs::read_to_string(folder.join("../stderr")).expect("what it said");
    disturb.is_none().then(|| (code.expect("nobody kills it"), said))
}

/// Runs vimg in that folder, with its standard error in the file `stderr` of the folder above, and calls `at_call` with
/// the number of its system calls so far at each of them until that gives false: it has killed it. Gives its exit
/// code, unless a signal ended it, and the number of its calls.
fn traced(folder: &Path, args: &[&str], mut at_call: impl FnMut(usize, Pid) -> bool) -> (Option<i32>, usize) {
    let program = vimg_path();
    let line = ["-c", "kill -STOP $$; exec \"$@\" 2>../stderr", "sh", program.to_str().expect("a path")];
    #[allow(clippy::zombie_processes, reason = "tracing waits for it by its number")]
    let child = plain("sh", &[&line, args].concat()).dir(folder).spawn();
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process number"));
    waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("it stops itself");
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(pid, options).expect("tracing is allowed");
    kill(pid, Signal::SIGCONT).expect("it goes on");
    let mut calls = None;
    loop {
        let status = next();
        let Some(who) = status.pid() else { continue };
        // A thread that is gone by now needs no leave to go on.
        let go_on = |signal| ptrace::syscall(who, signal).unwrap_or_default();
        match status {
            WaitStatus::PtraceEvent(_, _, event) if event == ptrace::Event::PTRACE_EVENT_EXEC as i32 => {
                calls = Some(0);
                go_on(None);
            }
            WaitStatus::PtraceSyscall(_) => {
                calls = calls.map(|calls| calls + 1);
                if calls.is_some_and(|calls| !at_call(calls, pid)) {
                    while !matches!(next(), WaitStatus::Signaled(who, ..) | WaitStatus::Exited(who, _) if who == pid) {}
                    return (None, calls.unwrap_or_default());
                }
                go_on(None);
            }
            WaitStatus::Exited(_, code) if who == pid => return (Some(code), calls.unwrap_or_default()),
            WaitStatus::Signaled(_, Signal::SIGTERM, _) if who == pid => return (None, calls.unwrap_or_default()),
            WaitStatus::Signaled(_, signal, _) if who == pid => panic!("{args:?} was ended by {signal}"),
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {}
            WaitStatus::Stopped(_, signal @ (Signal::SIGCHLD | Signal::SIGBUS | Signal::SIGTERM)) => {
                go_on(Some(signal))
            }
            _ => go_on(None),
        }
    }
}

/// What happens next to one of the threads that this one traces. Other tests' children are other threads' own.
fn next() -> WaitStatus {
    waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)).expect("wait")
}
