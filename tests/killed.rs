//! SIGKILL, which no program can answer: what it leaves is a whole image or nothing, and an older file as it was.
//!
//! Once at each system call of a short job, so that no gap between two of them is too short to be seen, and at some
//! calls all along longer ones with several threads.

use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::run::plain;
use crate::common::trace::{Ended, killed_at};
use crate::common::{Scratch, need, pattern, sh, vimg, write_pattern};

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

/// Waits until no process works in that folder: the one for the last step outlives a kill.
fn ends(folder: &Path) {
    let works_there = |entry: fs::DirEntry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == folder);
    let end = Instant::now() + WATCHDOG;
    while fs::read_dir("/proc").expect("list").flatten().any(works_there) {
        assert!(Instant::now() < end, "a process does not end");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_conversion_killed_at_any_point_leaves_nothing() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk.raw"), 0, 1, 12 << 20);
    for (format, options) in [("qcow2", &["-c"][..]), ("raw", &[]), ("vhdx", &[]), ("qed", &[]), ("parallels", &[])] {
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

/// What goes through a pipe is the beginning of the file that a path would hold, in whichever phase it is killed: while
/// the disk is looked at, while it is sent, and while a temporary file stands in.
#[test]
fn a_conversion_to_a_pipe_killed_at_any_point_leaves_nothing() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk.raw"), 0, 1, 3 << 20);
    let based = ["-o", "backing_file=../disk.raw,backing_fmt=raw"];
    for (n, (format, options)) in
        [("qcow2", &[][..]), ("vhdx", &["--reproducible"]), ("vmdk", &["--reproducible"]), ("qcow2", &based)]
            .iter()
            .enumerate()
    {
        let folder = scratch.file(&n.to_string());
        fs::create_dir(&folder).expect("a folder");
        let args = [&["convert", "-f", "raw", "-O", format][..], options, &["../disk.raw", "pipe"]].concat();
        // Ids follow from the name.
        vimg(&args).dir(&folder).ok();
        let whole = fs::read(folder.join("pipe")).expect("read");
        fs::remove_file(folder.join("pipe")).expect("remove");
        let pipe = folder.join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let through = |point: usize| {
            let mut reader =
                fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&pipe).expect("open");
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                let got = scope.spawn(|| {
                    let (mut got, mut piece) = (Vec::new(), vec![0; 1 << 16]);
                    loop {
                        let last = over.load(Ordering::SeqCst);
                        match reader.read(&mut piece) {
                            Ok(0) | Err(_) if last => return got,
                            Ok(0) | Err(_) => thread::sleep(Duration::from_millis(1)),
                            Ok(more) => got.extend(&piece[..more]),
                        }
                    }
                });
                let ended = killed_at(&folder, &args, point);
                over.store(true, Ordering::SeqCst);
                (ended, got.join().expect("what came"))
            })
        };
        let (Ended::Done(calls), got) = through(usize::MAX) else { panic!("nothing kills it") };
        assert!(got == whole, "{format}");
        let (mut killed, mut silent) = (0, 0);
        for point in 1..16 {
            let (ended, got) = through(calls * point / 16);
            killed += usize::from(ended == Ended::Killed);
            silent += usize::from(got.is_empty());
            assert!(whole.starts_with(&got) && (ended == Ended::Killed || got == whole), "{format} at {point}/16");
            settles(&folder, 1, &format!("{format} at {point}/16"));
        }
        assert!(killed >= 8 && silent >= 2, "{format}: {killed} of 15 were killed, {silent} before anything was sent");
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

/// A header and its data are of one image, whenever it is killed.
#[test]
fn killed_at_each_system_call_leaves_no_mixture_of_two_images() {
    let scratch = Scratch::new();
    let flat = ["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "disk.vmdk"];
    let sizes = |folder: &Path| {
        let descriptor = fs::read_to_string(folder.join("disk.vmdk")).expect("a descriptor");
        let line = descriptor.lines().find(|line| line.starts_with("RW ")).expect("an extent");
        let sectors: u64 = line.split(' ').nth(1).expect("a size").parse().expect("a number");
        (sectors * 512, fs::metadata(folder.join("disk-flat.vmdk")).expect("data").len())
    };
    let (mut n, mut before, mut after) = (0, 0, 0);
    loop {
        n += 1;
        let folder = scratch.file(&n.to_string());
        fs::create_dir(&folder).expect("a folder");
        vimg(&[flat.as_slice(), &["2M"]].concat()).dir(&folder).ok();
        if killed_at(&folder, &[flat.as_slice(), &["1M"]].concat(), n) != Ended::Killed {
            break;
        }
        ends(&folder);
        settles(&folder, 2, &format!("at call {n}"));
        match sizes(&folder) {
            (0x20_0000, 0x20_0000) => before += 1,
            (0x10_0000, 0x10_0000) => after += 1,
            other => panic!("killed at call {n}: {other:x?}"),
        }
        fs::remove_dir_all(&folder).expect("remove");
    }
    assert!(before > 50 && after > 2, "{before} before, {after} after");
}

/// What gives files their names is a process of its own. If that alone is killed, the program takes back what it did.
#[test]
fn the_process_that_names_files_may_be_killed() {
    need("strace");
    let scratch = Scratch::new();
    let create = ["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "disk.vmdk"];
    let mut killed = 0;
    for (call, most) in [("renameat2", 4), ("linkat", 3)] {
        for n in 1..=most {
            let folder = scratch.file(&format!("{call}-{n}"));
            fs::create_dir(&folder).expect("a folder");
            vimg(&[create.as_slice(), &["2M"]].concat()).dir(&folder).ok();
            let line = format!(
                "strace -f -qq -o ../trace -e trace={call} -e inject={call}:signal=KILL:when={n} {} {} 1M",
                crate::common::vimg_path().display(),
                create.join(" ")
            );
            let out = sh(&line).dir(&folder).run();
            let names: Vec<_> = fs::read_dir(&folder).expect("folder").map(|e| e.expect("entry").file_name()).collect();
            assert_eq!(names.len(), 2, "{call} {n}: {names:?}, {out:?}");
            let wanted = match out.code {
                Some(0) => 1 << 20,
                Some(1) => 2 << 20,
                other => panic!("{call} {n}: {other:?}: {out:?}"),
            };
            let info = vimg(&["info", "--output=json", "disk.vmdk"]).dir(&folder).ok().stdout;
            assert!(info.contains(&format!("\"virtual-size\": {wanted},")), "{call} {n}: {out:?}, {info}");
            assert_eq!(fs::metadata(folder.join("disk-flat.vmdk")).expect("data").len(), wanted, "{call} {n}: {out:?}");
            let was = fs::read_to_string(scratch.file("trace")).expect("trace").contains("killed by SIGKILL");
            assert_eq!(out.code == Some(1), was, "{call} {n}: {out:?}");
            killed += u32::from(was);
        }
    }
    assert!(killed >= 3, "{killed}");
}

/// A raw disk has the length of its file, which grows in one step.
#[test]
fn a_growth_killed_at_each_system_call_leaves_the_old_or_the_new_size() {
    let scratch = Scratch::new();
    for fill in ["off", "falloc", "full"] {
        let (mut n, mut before, mut after) = (0, 0, 0);
        loop {
            n += 1;
            let folder = scratch.file(&format!("{fill}-{n}"));
            fs::create_dir(&folder).expect("a folder");
            let old = pattern(1, 1 << 20);
            fs::write(folder.join("disk"), &old).expect("write");
            let args = ["resize", "-f", "raw", &format!("--preallocation={fill}"), "disk", "4M"];
            if killed_at(&folder, &args, n) != Ended::Killed {
                break;
            }
            ends(&folder);
            let got = fs::read(folder.join("disk")).expect("read");
            assert!(got.starts_with(&old) && got[old.len()..].iter().all(|byte| *byte == 0), "{fill}, call {n}");
            match got.len() >> 20 {
                1 => before += 1,
                4 => after += 1,
                _ => panic!("{fill}: {} bytes at call {n}", got.len()),
            }
            fs::remove_dir_all(&folder).expect("remove");
        }
        assert!(before > 20 && after > 0, "{fill}: {before} before, {after} after");
    }
}

/// A disk that is written in place is the older one, none, or the newer one, also where the format has its mark at the end.
#[test]
fn killed_in_place_leaves_no_disk_that_is_not_complete() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("old.raw"), 0, 1, 1 << 20);
    write_pattern(&scratch.file("new.raw"), 0, 2, 1 << 20);
    for (row, (format, options)) in [
        ("vpc", "subformat=dynamic,force_size=on"),
        ("vpc", "subformat=fixed,force_size=on"),
        ("vhdx", "subformat=dynamic"),
        ("vhdx", "subformat=fixed"),
        ("qed", "cluster_size=4096"),
        ("parallels", "cluster_size=65536"),
    ]
    .into_iter()
    .enumerate()
    {
        let subformat = format!("{format} {options}");
        let convert = |from| ["convert", "-f", "raw", "-O", format, "-o", options, from, "disk"].map(str::to_owned);
        let (mut n, mut none, mut after) = (0, 0, 0);
        loop {
            n += 11;
            let folder = scratch.file(&format!("{row}-{n}"));
            fs::create_dir(&folder).expect("a folder");
            let (old, new) = (convert("../old.raw"), convert("../new.raw"));
            vimg(&old.each_ref().map(String::as_str)).dir(&folder).ok();
            fs::hard_link(folder.join("disk"), folder.join("link")).expect("link");
            if killed_at(&folder, &new.each_ref().map(String::as_str), n) != Ended::Killed {
                break;
            }
            ends(&folder);
            let shown = ["convert", "-f", format, "-O", "raw", "disk", "seen.raw"];
            for read in [vimg(&shown), plain("qemu-img", &shown)] {
                let opens = read.dir(&folder).run().code == Some(0);
                let seen = opens.then(|| fs::read(folder.join("seen.raw")).expect("read"));
                let is = |name: &str| seen.as_ref() == Some(&fs::read(scratch.file(name)).expect("read"));
                assert!(seen.is_none() || is("old.raw") || is("new.raw"), "{subformat}: a mixture at call {n}");
                none += usize::from(seen.is_none());
                after += usize::from(is("new.raw"));
            }
            fs::remove_dir_all(&folder).expect("remove");
        }
        assert!(none > 5 && after > 0, "{subformat}: {none} none, {after} after");
    }
}

/// The disk has one of the two sizes and what it had, and nothing is wrong with it, or nothing that is not mended.
#[test]
fn a_resize_killed_at_any_system_call_leaves_the_old_or_the_new_disk() {
    let scratch = Scratch::new();
    let old = pattern(1, 2 << 20);
    fs::write(scratch.file("old.raw"), &old).expect("write");
    // qed does not shrink.
    for (row, (format, options, size)) in [
        ("vhdx", "block_size=1048576", 5 << 20),
        ("vhdx", "block_size=1048576", 1 << 20),
        ("vhdx", "subformat=fixed", 5 << 20),
        ("qed", "cluster_size=4096", 300 << 20),
        ("parallels", "cluster_size=4096", 5 << 20),
        ("parallels", "cluster_size=4096", 1 << 20),
    ]
    .into_iter()
    .enumerate()
    {
        scratch.vimg(&["convert", "-f", "raw", "-O", format, "-o", options, "old.raw", "whole"]);
        let text = size.to_string();
        let args = ["resize", "-f", format, "--shrink", "disk", &text];
        let whole = scratch.file(&row.to_string());
        fs::create_dir(&whole).expect("a folder");
        fs::copy(scratch.file("whole"), whole.join("disk")).expect("copy");
        let Ended::Done(calls) = killed_at(&whole, &args, usize::MAX) else { panic!("nothing kills it") };
        let mut sizes = [0; 2];
        // Each of the last ones, up to one that is not killed: the new size comes late, and the calls are not the same in
        // number each time.
        let late = calls.saturating_sub(16).max(1);
        for n in (1..late).step_by(6).chain(late..) {
            let (folder, when) = (scratch.file(&format!("{row}-{n}")), format!("{format} to {size}: call {n}"));
            fs::create_dir(&folder).expect("a folder");
            fs::copy(scratch.file("whole"), folder.join("disk")).expect("copy");
            let killed = killed_at(&folder, &args, n) == Ended::Killed;
            ends(&folder);
            let run = |args: &[&str]| plain("qemu-img", args).dir(&folder).run();
            let mended = run(&["check", "-q", "-f", format, "-r", "all", "disk"]);
            assert_eq!(mended.code, Some(0), "{when}: {mended:#?}");
            let is = run(&["info", "--output=json", "-f", format, "disk"]).json()["virtual-size"].as_u64();
            let which = [2 << 20, size].iter().position(|size| is == Some(*size));
            sizes[which.unwrap_or_else(|| panic!("{when}: {is:?}"))] += 1;
            assert!(killed || which == Some(1), "{when}: {is:?}");
            let kept = size.min(2 << 20);
            let part = format!("driver=raw,size={kept},file.driver={format},file.file.filename=disk");
            let shown = run(&["convert", "--image-opts", "-O", "raw", &part, "seen"]);
            assert_eq!(shown.code, Some(0), "{when}: {shown:#?}");
            assert!(fs::read(folder.join("seen")).expect("read") == old[..kept as usize], "{when}");
            fs::remove_dir_all(&folder).expect("remove");
            if !killed {
                break;
            }
        }
        assert!(sizes[0] > 5 && sizes[1] > 0, "{format} to {size}: {sizes:?}");
    }
}
