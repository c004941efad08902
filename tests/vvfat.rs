//! Folders read as FAT disks: by mtools and fsck.fat, and byte for byte as qemu-img makes them, but for what changes
//! from run to run there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::common::run::vimg;
use crate::common::{Scratch, assert_same_bytes, need, pattern};

/// Files of many sizes and names, in folders.
fn fill(folder: &Path) {
    let file = |name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes).unwrap();
    fs::create_dir_all(folder.join("sub folder/deeper/still deeper")).unwrap();
    fs::create_dir(folder.join("empty")).unwrap();
    file("zero", &[]);
    file("UPPER.TXT", b"up");
    file("Long File Name.text", &pattern(1, 100_001));
    file("Long File Name.texu", &pattern(2, 8192));
    file("thirteenchars", &pattern(3, 8193));
    file("ümlaut €.txt", b"letters");
    file("sub folder/a+b,c;=[x].t", &pattern(4, 30_000));
    file("sub folder/deeper/still deeper/x", &pattern(5, 511));
    for n in 0..300 {
        file(&format!("sub folder/deeper/one of many {n}"), &pattern(n, 20));
    }
    symlink("UPPER.TXT", folder.join("link")).unwrap();
    symlink("nowhere", folder.join("dangling")).unwrap();
}

/// The file system in a disk.
fn partition(scratch: &Scratch, disk: &str, floppy: bool) {
    let skip = u8::from(!floppy);
    scratch.sh(&format!("dd if={disk} of=part bs=32256 skip={skip} conv=sparse status=none"));
}

#[test]
fn mtools_copies_out_what_is_in_the_folder() {
    for tool in ["mcopy", "fsck.fat"] {
        need(tool);
    }
    let scratch = Scratch::new();
    fs::create_dir(scratch.file("d")).unwrap();
    fill(&scratch.file("d"));
    for (name, kind, floppy) in [
        ("fat:d", "FAT16", false),
        ("fat:12:d", "FAT12", false),
        ("fat:32:d", "FAT32", false),
        ("fat:floppy:d", "FAT12", true),
        ("fat:floppy:12:d", "FAT12", true),
        ("fat:floppy:16:d", "FAT16", true),
    ] {
        if name == "fat:floppy:12:d" {
            // It has but 178 clusters.
            fs::remove_dir_all(scratch.file("d/sub folder/deeper")).unwrap();
        }
        if name == "fat:floppy:d" {
            for n in 0..200 {
                fs::remove_file(scratch.file(&format!("d/sub folder/deeper/one of many {n}"))).unwrap();
            }
        }
        scratch.vimg(&["convert", "-O", "raw", name, "disk"]);
        partition(&scratch, "disk", floppy);
        let bits = &kind[3..];
        scratch.sh(&format!("fsck.fat -n -v part > report; grep -q ', {bits} bit entries' report"));
        scratch.sh(
            "rm -rf out; mkdir out; LC_ALL=C.UTF-8 mcopy -s -i part ::/* out/ && rm -f d/dangling && diff -r d out",
        );
    }
}

/// But for when a file was made and read, which is when it was changed. (What qemu-img shows behind a file that ends
/// within a cluster is what it read before.)
#[test]
fn the_bytes_are_qemu_imgs() {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.file("d/a folder")).unwrap();
    fs::write(scratch.file("d/a folder/a file of some length"), pattern(1, 6 * 8192)).unwrap();
    scratch.sh("touch -d @1000000000 'd/a folder/a file of some length'; touch -d @1100000001 'd/a folder' d");
    for name in ["fat:12:d", "fat:16:d", "fat:floppy:d", "fat:12:floppy:d"] {
        scratch.vimg(&["convert", "-O", "raw", name, "ours"]);
        scratch.judge(&["convert", "-O", "raw", name, "theirs"]);
        let differing = scratch.sh("cmp -l ours theirs || [ $? = 1 ]").stdout;
        for line in differing.lines() {
            let at: u64 = line.split_whitespace().next().unwrap().parse().unwrap();
            assert!((14..20).contains(&((at - 1) % 32)), "{name} differs at {at}");
        }
    }
    let named = "driver=vvfat,dir=d,label=MY DISK,fat-type=16";
    scratch.vimg(&["convert", "--image-opts", "-O", "raw", named, "ours"]);
    assert!(fs::read(scratch.file("ours")).unwrap()[0x47000..].starts_with(b"MY DISK    \x28"));
}

#[test]
fn a_disk_is_the_same_whatever_order_the_folder_has() {
    let scratch = Scratch::new();
    for (folder, names) in [("a/d", ["one", "two", "three"]), ("b/d", ["three", "one", "two"])] {
        fs::create_dir_all(scratch.file(folder)).unwrap();
        for name in names {
            fs::write(scratch.file(folder).join(name), name).unwrap();
        }
        scratch.sh(&format!("touch -d @1000000000 {folder}/* {folder}"));
        let disk = format!("{folder}.img");
        scratch.vimg(&["convert", "-O", "raw", &format!("fat:floppy:{folder}"), &disk]);
    }
    assert_same_bytes(&scratch.file("a/d.img"), &scratch.file("b/d.img"));
}

#[test]
fn what_does_not_fit_is_refused() {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.file("loop/x")).unwrap();
    symlink("..", scratch.file("loop/x/up")).unwrap();
    fs::create_dir(scratch.file("many")).unwrap();
    for n in 0..300 {
        fs::write(scratch.file(&format!("many/file{n}")), []).unwrap();
    }
    fs::create_dir(scratch.file("big")).unwrap();
    fs::File::create(scratch.file("big/file")).unwrap().set_len(600 << 20).unwrap();
    for (name, words) in [
        ("fat:loop", "Could not open 'fat:loop': The directory loop/x/up leads into itself, or too deep"),
        ("fat:many", "Could not open 'fat:many': Too many entries in root directory"),
        ("fat:big", "Could not open 'fat:big': Directory does not fit in FAT16 (capacity 516.06 MB)"),
        ("fat:12:big", "Could not open 'fat:12:big': Directory does not fit in FAT12 (capacity 32.22 MB)"),
    ] {
        let error = vimg(&["convert", "-O", "raw", name, "b"]).dir(scratch.path()).fails(1).stderr;
        assert!(error.contains(words), "{error}");
    }
    // The root folder of FAT32 is as long as it has to be.
    scratch.vimg(&["info", "fat:32:many"]);
}
