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
    let program = vimg_path();
    let line = ["-c", "kill -STOP $$; exec \"$@\"", "sh", program.to_str().expect("a path")];
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
                if calls == Some(n) {
                    kill(pid, Signal::SIGKILL).expect("kill");
                    while !matches!(next(), WaitStatus::Signaled(who, ..) | WaitStatus::Exited(who, _) if who == pid) {}
                    return Ended::Killed;
                }
                go_on(None);
            }
            WaitStatus::Exited(_, code) if who == pid => {
                assert_eq!(code, 0, "{args:?}");
                return Ended::Done(calls.unwrap_or_default());
            }
            WaitStatus::Signaled(_, signal, _) if who == pid => panic!("{args:?} was ended by {signal}"),
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {}
            WaitStatus::Stopped(_, Signal::SIGCHLD) => go_on(Some(Signal::SIGCHLD)),
            _ => go_on(None),
        }
    }
}

/// What happens next to one of the threads that this one traces. Other tests' children are other threads' own.
fn next() -> WaitStatus {
    waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)).expect("wait")
}
