//! SIGKILL, which no program can answer: what it leaves is a whole image or nothing, and an older file as it was.
//!
//! Once at each system call of a short job, so that no gap between two of them is too short to be seen, and at some
//! calls all along longer ones with several threads.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::trace::{Ended, killed_at};
use crate::common::{Scratch, write_pattern};

/// What goes on after a kill hangs if it takes longer.
const WATCHDOG: Duration = Duration::from_secs(5 * 60);

/// Waits until the folder holds that many files: the last step may be under way in a process of its own.
fn settles(folder: &Path, files: usize, when: &str) {
    let end = Instant::now() + WATCHDOG;
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
fn a_conversion_killed_at_any_point_leaves_nothing() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk.raw"), 0, 1, 12 << 20);
    for (format, options) in [("qcow2", &["-c"][..]), ("raw", &[])] {
        let args = |target| [&["convert", "-f", "raw", "-O", format][..], options, &["../disk.raw", target]].concat();
        let folder = scratch.file(format);
        fs::create_dir(&folder).expect("a folder");
        let Ended::Done(calls) = killed_at(&folder, &args("new"), usize::MAX) else { panic!("nothing kills it") };
        fs::remove_file(folder.join("new")).expect("remove");
        fs::write(folder.join("older"), "precious").expect("write");
        let mut killed = 0;
        for (point, target) in (1..24).zip(["new", "older"].into_iter().cycle()) {
            // The threads' calls are not the same in number each time: some runs may come to their end before.
            let when = format!("{format} at call {} of {calls}", calls * point / 24);
            let done = killed_at(&folder, &args(target), calls * point / 24) != Ended::Killed;
            killed += usize::from(!done);
            let new = folder.join("new").exists();
            settles(&folder, 1 + usize::from(new), &when);
            let whole = |name| scratch.assert_same_content(format, &format!("{format}/{name}"), "raw", "disk.raw");
            // The name may have been given just before the kill; then too it is whole.
            if new {
                whole("new");
                fs::remove_file(folder.join("new")).expect("remove");
            }
            assert!(new || !done || target != "new", "{when}");
            if fs::read(folder.join("older")).expect("read") != b"precious" {
                whole("older");
                fs::write(folder.join("older"), "precious").expect("write");
            }
        }
        assert!(killed >= 8, "only {killed} of 23 were killed in time");
    }
}

#[test]
fn a_creation_killed_at_each_system_call_leaves_nothing() {
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
            if killed_at(&folder, &args, n) != Ended::Killed {
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
