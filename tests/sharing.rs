//! Data that a conversion shares on the disk instead of writing it: on XFS and Btrfs a new image is its tables alone.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::trace::{Ended, killed_at};
use crate::common::{Scratch, assert_same_bytes, judge, need, need_root, pattern, sh, vimg, write_pattern};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Bytes of data on the disk.
const DATA: u64 = 40 * MIB;

/// A file system of its own on a loop device; what was written to it can be counted.
struct FileSystem {
    at: PathBuf,
    written: PathBuf,
}

impl FileSystem {
    fn new(scratch: &Scratch, kind: &str) -> Self {
        need_root("mounting XFS and Btrfs");
        need(&format!("mkfs.{kind}"));
        let at = scratch.file(kind);
        fs::create_dir(&at).expect("a folder");
        let line = format!(
            "truncate -s 600M {kind}.fs && PATH=$PATH:/sbin:/usr/sbin mkfs.{kind} -q {kind}.fs >/dev/null && \
             mount -o loop {kind}.fs {kind} && findmnt -no SOURCE -M $PWD/{kind}"
        );
        let device = scratch.sh(&line).stdout;
        let device = device.trim().trim_start_matches("/dev/");
        Self { at, written: Path::new("/sys/block").join(device).join("stat") }
    }

    /// Bytes that reached the device so far.
    fn written(&self) -> u64 {
        sh("sync -f .").dir(&self.at).ok();
        let stat = fs::read_to_string(&self.written).expect("statistics");
        stat.split_whitespace().nth(6).and_then(|sectors| sectors.parse::<u64>().ok()).expect("sectors") * 512
    }

    /// Runs vimg there, and says how much it wrote.
    fn vimg(&self, args: &[&str]) -> u64 {
        let before = self.written();
        vimg(args).dir(&self.at).ok();
        self.written() - before
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        sh(&format!("umount {}", self.at.display())).run();
    }
}

/// A sparse disk of 8 GiB: runs of data of many lengths, with holes and zeros between them.
fn make_disk(path: &Path) {
    let file = fs::File::create(path).expect("create");
    file.set_len(8 << 30).expect("a length");
    let (mut at, mut left, mut n) = (0, DATA, 0);
    while left > 0 {
        let len = left.min((n * 37 % 97 + 1) * 64 * KIB);
        write_pattern(path, at, n, usize::try_from(len).expect("a length"));
        at += len + (n % 3) * 192 * KIB;
        (left, n) = (left - len, n + 1);
    }
    write_pattern(path, (8 << 30) - 5 * KIB, 77, 5 << 10);
    write_pattern(path, 7 << 30, 78, 3000);
}

#[test]
fn only_tables_are_written() {
    let scratch = Scratch::new();
    for kind in ["xfs", "btrfs"] {
        let on = FileSystem::new(&scratch, kind);
        make_disk(&on.at.join("disk.raw"));
        let to = |format, options: &[&'static str], from: (&'static str, &'static str), name: &'static str| {
            let args = [&["convert", "-f", from.0, "-O", format][..], options, &[from.1, name]].concat();
            let written = on.vimg(&args);
            judge(&["compare", "-f", format, "-F", "raw", name, "disk.raw"]).dir(&on.at).ok();
            written
        };
        let raw = ("raw", "disk.raw");
        let tables = |what: &str, written: u64| assert!(written < 8 * MIB, "{kind}: {what}: {written} bytes");
        tables("raw to qcow2", to("qcow2", &[], raw, "a.qcow2"));
        tables("qcow2 to raw", to("raw", &["-m", "1"], ("qcow2", "a.qcow2"), "a.raw"));
        tables("raw to vdi", to("vdi", &[], raw, "a.vdi"));
        tables("vdi to qcow2", to("qcow2", &["-m", "1"], ("vdi", "a.vdi"), "b.qcow2"));
        tables("raw to vmdk", to("vmdk", &[], raw, "a.vmdk"));
        tables("raw to vhdx", to("vhdx", &[], raw, "a.vhdx"));
        tables("vhdx to raw", to("raw", &["-m", "1"], ("vhdx", "a.vhdx"), "d.raw"));
        tables("raw to parallels", to("parallels", &[], raw, "a.hds"));
        tables("parallels to qcow2", to("qcow2", &["-m", "1"], ("parallels", "a.hds"), "d.qcow2"));
        tables("qcow2 to raw, -C", to("raw", &["-C"], ("qcow2", "a.qcow2"), "c.raw"));
        tables("raw to qcow2, -C", to("qcow2", &["-C"], raw, "c.qcow2"));
        // Past the cache too, and where zeros are looked for in spite of -C.
        tables("raw to qcow2, -t none", to("qcow2", &["-t", "none", "-T", "none"], raw, "e.qcow2"));
        tables("vdi to raw, -C", to("raw", &["-C"], ("vdi", "a.vdi"), "e.raw"));
        // The same bytes with and without sharing, whatever the number of threads. (Here the file system cannot.)
        let from = on.at.join("disk.raw");
        for (format, shared) in [("qcow2", "a.qcow2"), ("raw", "a.raw")] {
            let from = from.to_str().expect("a path");
            vimg(&["convert", "-m", "3", "-f", "raw", "-O", format, from, "alone"]).dir(scratch.path()).ok();
            assert_same_bytes(&scratch.file("alone"), &on.at.join(shared));
        }
        assert_same_bytes(&on.at.join("a.qcow2"), &on.at.join("b.qcow2"));
        // Space of its own is asked for, or the bytes on the disk are others.
        write_pattern(&on.at.join("small.raw"), 0, 9, 16 << 20);
        for options in [
            "preallocation=falloc",
            "preallocation=full",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ] {
            let secret = ["--object", "secret,id=s,data=abc"];
            let args = [&["convert"], &secret[..], &["-f", "raw", "-O", "qcow2", "-o", options, "small.raw", "own"]];
            let written = on.vimg(&args.concat());
            assert!(written > 15 * MIB, "{kind}: {options}: {written} bytes");
            let asked = on.vimg(&[&args.concat()[..], &["-C"]].concat());
            assert!(asked > 15 * MIB, "{kind}: {options} -C: {asked} bytes");
            fs::remove_file(on.at.join("own")).expect("remove");
        }
        if kind == "btrfs" {
            let written = on.vimg(&["convert", "-f", "raw", "-O", "raw", "-o", "nocow=on", "small.raw", "own"]);
            assert!(written > 15 * MIB, "nocow: {written} bytes");
            assert!(sh("lsattr own").dir(&on.at).ok().stdout.contains('C'));
            assert_same_bytes(&on.at.join("small.raw"), &on.at.join("own"));
        }
    }
}

#[test]
fn what_is_shared_needs_no_room_and_may_be_killed() {
    let scratch = Scratch::new();
    let on = FileSystem::new(&scratch, "xfs");
    fs::write(on.at.join("disk.raw"), pattern(3, 60 << 20)).expect("write");
    on.written();
    // Less is left than a copy needs.
    let left = sh("stat -f -c '%a %S' .").dir(&on.at).ok().stdout;
    let numbers: Vec<u64> = left.split_whitespace().map(|n| n.parse().expect("a number")).collect();
    sh(&format!("fallocate -l {} filler", numbers[0] * numbers[1] - 30 * MIB)).dir(&on.at).ok();
    let convert = |target| ["convert", "-f", "raw", "-O", "qcow2", "disk.raw", target];
    vimg(&convert("whole")).dir(&on.at).ok();
    let Ended::Done(calls) = killed_at(&on.at, &convert("new"), usize::MAX) else { panic!("nothing kills it") };
    assert_same_bytes(&on.at.join("whole"), &on.at.join("new"));
    let mut killed = 0;
    for point in 1..12 {
        fs::remove_file(on.at.join("new")).unwrap_or_default();
        killed += usize::from(killed_at(&on.at, &convert("new"), calls * point / 12) == Ended::Killed);
        if on.at.join("new").exists() {
            assert_same_bytes(&on.at.join("whole"), &on.at.join("new"));
        }
    }
    assert!(killed > 5, "{killed} killed");
    // A copy does not fit, and leaves nothing.
    fs::remove_file(on.at.join("new")).unwrap_or_default();
    let full =
        ["convert", "--no-space-check", "-f", "raw", "-O", "qcow2", "-o", "preallocation=full", "disk.raw", "new"];
    let out = vimg(&full).dir(&on.at).fails(1);
    assert!(out.stderr.contains("No space left on device") && !on.at.join("new").exists(), "{out:?}");
    // What can be shared is, then there is no room for what cannot.
    let line = "yes 'a line' | head -c 60M >text && qemu-img convert -c -f raw -O qcow2 text text.qcow2 && rm text";
    sh(line).dir(scratch.file(".")).ok();
    fs::rename(scratch.file("text.qcow2"), scratch.file("packed")).expect("rename");
    let packed = scratch.file("packed");
    let both = ["convert", "-m", "1", "-O", "raw", "whole", packed.to_str().expect("a path"), "new"];
    let out = vimg(&both).dir(&on.at).fails(1);
    assert!(out.stderr.contains("No space left on device") && !on.at.join("new").exists(), "{out:?}");
    judge(&["check", "-q", "-f", "qcow2", "whole"]).dir(&on.at).ok();
    vimg(&convert("new")).dir(&on.at).ok();
    assert_same_bytes(&on.at.join("whole"), &on.at.join("new"));
}
