//! SIGKILL, which no program can answer: what it leaves is a whole image or nothing, and an older file as it was.
//!
//! Once at random moments of a long job, and once at each system call of a short one, so that no gap between two of
//! them is too short to be seen.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::common::run::plain;
use crate::common::{Scratch, vimg, vimg_path, write_pattern};

/// Waits until the folder holds that many files: the last step may be under way in a process of its own.
fn settles(folder: &Path, files: usize, when: &str) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let left: Vec<_> = fs::read_dir(folder).expect("list").flatten().map(|e| e.file_name()).collect();
        if left.len() == files {
            return;
        }
        assert!(Instant::now() < end, "killed {when}: {left:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn killed_at_any_moment_leaves_nothing() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk.raw"), 0, 1, 96 << 20);
    fs::write(scratch.file("older"), "precious").expect("write");
    let mut rng = fastrand::Rng::with_seed(9);
    let args = |target: &'static str| ["convert", "-f", "raw", "-O", "qcow2", "-c", "disk.raw", target];
    let mut killed = 0;
    for round in 0..24 {
        let target = if round % 2 == 0 { "new" } else { "older" };
        let mut child = vimg(&args(target)).dir(scratch.path()).spawn();
        thread::sleep(Duration::from_micros(rng.u64(500..120_000)));
        let _ = child.kill();
        if child.wait().expect("wait").success() {
            // It was done before: then it is whole.
            scratch.assert_same_content("qcow2", target, "raw", "disk.raw");
            let _ = fs::remove_file(scratch.file("new"));
            fs::write(scratch.file("older"), "precious").expect("write");
            continue;
        }
        killed += 1;
        let new = usize::from(scratch.file("new").exists());
        settles(scratch.path(), 2 + new, &format!("in round {round}"));
        // The name may have been given just before the kill; then too it is whole.
        if new == 1 {
            scratch.assert_same_content("qcow2", "new", "raw", "disk.raw");
            fs::remove_file(scratch.file("new")).expect("remove");
        }
        if fs::read(scratch.file("older")).expect("read") != b"precious" {
            scratch.assert_same_content("qcow2", "older", "raw", "disk.raw");
            fs::write(scratch.file("older"), "precious").expect("write");
        }
    }
    assert!(killed >= 8, "only {killed} of 24 were killed in time");
}

/// Runs vimg and kills it when its first thread enters or leaves a system call for the `n`th time. False if it came
/// to its end before.
fn killed_at(folder: &Path, args: &[&str], n: usize) -> bool {
    let program = vimg_path();
    let line = ["-c", "kill -STOP $$; exec \"$@\"", "sh", program.to_str().expect("a path")];
    #[allow(clippy::zombie_processes, reason = "tracing waits for it by its number")]
    let child = plain("sh", &[&line, args].concat()).dir(folder).spawn();
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process number"));
    waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("it stops itself");
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACEEXEC | Options::PTRACE_O_EXITKILL;
    ptrace::seize(pid, options).expect("tracing is allowed");
    kill(pid, Signal::SIGCONT).expect("it goes on");
    let mut calls = None;
    loop {
        match waitpid(pid, None).expect("wait") {
            WaitStatus::PtraceEvent(_, _, event) if event == ptrace::Event::PTRACE_EVENT_EXEC as i32 => {
                calls = Some(0);
                ptrace::syscall(pid, None).expect("go on");
            }
            WaitStatus::PtraceSyscall(_) => {
                calls = calls.map(|calls| calls + 1);
                if calls == Some(n) {
                    kill(pid, Signal::SIGKILL).expect("kill");
                    while !matches!(waitpid(pid, None), Ok(WaitStatus::Signaled(..)) | Err(_)) {}
                    return true;
                }
                ptrace::syscall(pid, None).expect("go on");
            }
            WaitStatus::Exited(_, code) => {
                assert_eq!(code, 0, "{args:?}");
                return false;
            }
            WaitStatus::Stopped(_, Signal::SIGCHLD) => ptrace::syscall(pid, Signal::SIGCHLD).expect("go on"),
            WaitStatus::Signaled(_, signal, _) => panic!("{args:?} was ended by {signal}"),
            _ => ptrace::syscall(pid, None).expect("go on"),
        }
    }
}

#[test]
fn killed_at_each_system_call_leaves_nothing() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "image", "1M"]);
    let whole = fs::read(scratch.file("image")).expect("read");
    for target in ["new", "older"] {
        let args = ["create", "-q", "-f", "qcow2", target, "1M"];
        let (mut n, mut before, mut after) = (0, 0, 0);
        loop {
            n += 1;
            // A folder for each: what the one before has under way does not matter here.
            let folder = scratch.file(&format!("{target}-{n}"));
            fs::create_dir(&folder).expect("a folder");
            fs::write(folder.join("older"), "precious").expect("write");
            if !killed_at(&folder, &args, n) {
                break;
            }
            let new = usize::from(folder.join("new").exists());
            settles(&folder, 1 + new, &format!("at call {n}"));
            match fs::read(folder.join(target)).ok() {
                Some(got) if got == whole => after += 1,
                Some(got) => {
                    assert!(target == "older" && got == b"precious", "{target}, call {n}");
                    before += 1;
                }
                None => {
                    assert_eq!(target, "new", "call {n}");
                    before += 1;
                }
            }
        }
        assert!(before > 50 && after > 2, "{target}: {before} before, {after} after");
    }
}
