//! A real disk: an ext4 file system of the machine's own programs in a sparse 8 GiB file, converted there and back
//! through every kind of qcow2, and through every other format; equal by `qemu-img compare`, clean by `qemu-img check`, the same bytes at the end,
//! and a file system that `e2fsck` finds nothing wrong with.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{Scratch, assert_same_bytes, need, sh};
use crate::kinds::{KINDS, Kind, Program, assert_clean, assert_same};

/// So much real data at most: the disk is sparse, the time is not.
const DATA_MIB: u64 = 64;

/// A file system with part of `/usr/bin` and `/usr/share` in it.
fn build(scratch: &Scratch, name: &str, size: &str, mib: u64) {
    for program in ["mke2fs", "e2fsck", "qemu-img"] {
        need(program);
    }
    // File by file until there is enough; names with anything in them are fine.
    scratch.sh(&format!(
        "mkdir tree && find /usr/bin /usr/share -type f -size -20M -readable -print0 | LC_ALL=C sort -z | \
         python3 -c 'import os, sys
left = {mib} << 20
names = sys.stdin.buffer.read().split(b\"\\0\")[:-1]
# From both ends of the list in turn: programs and texts.
for pair in zip(names, reversed(names)):
  for name in pair:
    left -= os.path.getsize(name) if os.path.exists(name) else 0
    if left < 0: sys.exit()
    sys.stdout.buffer.write(name + b\"\\0\")' | \
         tar --null -T - -cf - 2>/dev/null | tar -C tree -xf - && \
         mke2fs -q -t ext4 -E root_owner=0:0 -d tree {name} {size} && rm -rf tree"
    ));
}

/// One way there and back.
fn round_trip(scratch: &Scratch, options: &[&str]) {
    let what = options.join(" ");
    let to = [&["convert", "-f", "raw", "-O", "qcow2"][..], options, &["disk.raw", "there.qcow2"]].concat();
    scratch.vimg(&to);
    scratch.assert_clean("qcow2", "there.qcow2");
    scratch.assert_same_content("qcow2", "there.qcow2", "raw", "disk.raw");
    scratch.vimg(&["convert", "-f", "qcow2", "-O", "raw", "there.qcow2", "back.raw"]);
    assert_same_bytes(&scratch.file("disk.raw"), &scratch.file("back.raw"));
    let fsck = sh("e2fsck -fn back.raw").dir(scratch.path()).run();
    assert_eq!(fsck.code, Some(0), "{what}: {fsck:?}");
    scratch.vimg(&["convert", "-f", "raw", "-O", "qcow2", "back.raw", "again.qcow2"]);
    scratch.assert_same_content("qcow2", "again.qcow2", "qcow2", "there.qcow2");
    for name in ["there.qcow2", "back.raw", "again.qcow2"] {
        fs::remove_file(scratch.file(name)).expect("remove");
    }
}

#[test]
fn a_real_disk_goes_there_and_back() {
    let scratch = Scratch::new();
    build(&scratch, "disk.raw", "8G", DATA_MIB);
    for options in [
        &[][..],
        &["-c"],
        &["-c", "-o", "compression_type=zstd"],
        &["-o", "preallocation=metadata"],
        &["-o", "cluster_size=4k"],
        &["-o", "cluster_size=2M"],
        &["-o", "extended_l2=on"],
        &["-o", "compat=0.10"],
        &["-c", "-o", "compression_type=zstd,cluster_size=4k"],
        &["-W", "-m", "16"],
    ] {
        round_trip(&scratch, options);
    }
}

#[test]
fn a_smaller_disk_with_all_its_space_reserved() {
    let scratch = Scratch::new();
    build(&scratch, "disk.raw", "256M", 60);
    round_trip(&scratch, &["-o", "preallocation=falloc"]);
    round_trip(&scratch, &["-o", "preallocation=full"]);
}

#[test]
fn an_overlay_of_a_real_disk_holds_the_difference_alone() {
    let scratch = Scratch::new();
    build(&scratch, "base.raw", "512M", 60);
    scratch.sh("cp --sparse=always base.raw disk.raw");
    scratch.qemu_io("raw", "disk.raw", &["write -P 1 300M 4M", "write -z 20M 1M"]);
    scratch.vimg(&["convert", "-f", "raw", "-O", "qcow2", "-B", "base.raw", "-F", "raw", "disk.raw", "overlay.qcow2"]);
    scratch.assert_clean("qcow2", "overlay.qcow2");
    scratch.assert_same_content("qcow2", "overlay.qcow2", "raw", "disk.raw");
    scratch.vimg(&["convert", "-f", "qcow2", "-O", "raw", "overlay.qcow2", "back.raw"]);
    assert_same_bytes(&scratch.file("disk.raw"), &scratch.file("back.raw"));
}

#[test]
fn the_same_bytes_whatever_the_number_of_threads() {
    let scratch = Scratch::new();
    build(&scratch, "disk.raw", "512M", 60);
    for (name, kind) in [("plain", &[][..]), ("zlib", &["-c"]), ("zstd", &["-c", "-o", "compression_type=zstd"])] {
        let mut first = None;
        for threads in ["1", "2", "8", "16"] {
            let out = format!("{name}-{threads}.qcow2");
            let to = ["convert", "-m", threads, "-f", "raw", "-O", "qcow2"];
            scratch.vimg(&[&to[..], kind, &["disk.raw", &out]].concat());
            match &first {
                None => first = Some(out),
                Some(first) => {
                    assert_same_bytes(&scratch.file(first), &scratch.file(&out));
                    fs::remove_file(scratch.file(&out)).expect("remove");
                }
            }
        }
        scratch.assert_same_content("qcow2", &first.expect("a first one"), "raw", "disk.raw");
    }
}

/// Every kind of image of that disk, made from raw; and from one kind of each format to every second other format.
#[test]
fn a_real_disk_goes_through_every_format() {
    let scratch = Scratch::new();
    build(&scratch, "disk.raw", "2G", DATA_MIB / 3);
    let raw = scratch.file("disk.raw");
    let made = |kind: &Kind, from: (&str, &Path), to: &str| {
        let (folder, what) = (scratch.file(to), format!("{} to {}", from.0, kind.name()));
        fs::create_dir(&folder).expect("folder");
        kind.convert(&folder, Program::Vimg, from, "image");
        let image = folder.join("image");
        assert_same(&what, (kind.format, &image), ("raw", &raw));
        assert_clean(&what, kind.format, &image);
        image
    };
    let mut firsts: Vec<(&Kind, PathBuf)> = Vec::new();
    for (index, kind) in KINDS.iter().enumerate() {
        let name = format!("kind-{index}");
        let image = made(kind, ("raw", &raw), &name);
        if !firsts.iter().any(|(first, _)| first.format == kind.format) {
            firsts.push((kind, image));
        } else {
            scratch.vimg(&["convert", "-f", kind.format, "-O", "raw", &image.to_string_lossy(), "back.raw"]);
            assert_same(&kind.name(), ("raw", &scratch.file("back.raw")), ("raw", &raw));
            fs::remove_dir_all(scratch.file(&name)).expect("remove");
        }
    }
    // Every second pair: of small disks all are gone through elsewhere.
    for (index, (from, image)) in firsts.iter().enumerate() {
        for (to, _) in firsts.iter().skip(index % 2).step_by(2).filter(|(to, _)| to.format != from.format) {
            made(to, (from.format, image), "other");
            fs::remove_dir_all(scratch.file("other")).expect("remove");
        }
    }
}
