//! The walk-throughs that users know, as black-box tests: figures by `stat`, `du` and `qemu-img info`, guest data by
//! `qemu-io`, block devices and full disks.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::common::run::plain;
use crate::common::{Scratch, assert_same_bytes, judge, pattern, sh, vimg, vimg_path, write_pattern};

/// Length and blocks of a file.
fn figures(path: &Path) -> (u64, u64) {
    let meta = fs::metadata(path).expect("metadata");
    (meta.len(), meta.blocks() * 512)
}

#[test]
fn create_takes_the_space_that_qemu_img_takes() {
    let scratch = Scratch::new();
    for (format, options, size) in [
        ("raw", "", "1G"),
        ("raw", "preallocation=falloc", "64M"),
        ("raw", "preallocation=full", "64M"),
        ("qcow2", "", "1G"),
        ("qcow2", "", "5G"),
        ("qcow2", "preallocation=metadata", "1G"),
        ("qcow2", "preallocation=metadata", "5G"),
        ("qcow2", "preallocation=falloc", "256M"),
        ("qcow2", "preallocation=full", "256M"),
    ] {
        let mut args = vec!["create", "-f", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        let what = format!("{format} {options} {size}");
        // One after the other under the same name, so that the outputs must be the same.
        args.extend(["image", size]);
        let theirs = scratch.judge(&args);
        fs::rename(scratch.file("image"), scratch.file("theirs")).expect("rename");
        let ours = scratch.vimg(&args);
        assert_eq!(ours.stdout, theirs.stdout, "{what}");
        let ((length, used), (their_length, their_used)) =
            (figures(&scratch.file("image")), figures(&scratch.file("theirs")));
        assert_eq!(length, their_length, "{what}: length");
        // The file system's own blocks for extents come and go: a few are no difference.
        assert!(used.abs_diff(their_used) <= 64 << 10, "{what}: {used} bytes used, qemu-img's {their_used}");
        let du = |name: &str| sh(&format!("du -k {name}")).dir(scratch.path()).ok().stdout;
        let kib = |text: String| text.split('\t').next().and_then(|n| n.parse::<u64>().ok()).expect("du");
        assert!(kib(du("image")).abs_diff(kib(du("theirs"))) <= 64, "{what}");
        assert_same_bytes(&scratch.file("image"), &scratch.file("theirs"));
        let info = scratch.judge(&["info", "--output=json", "image"]).json();
        assert_eq!(info["virtual-size"], scratch.judge(&["info", "--output=json", "theirs"]).json()["virtual-size"]);
        assert_eq!(info["format"], format);
    }
}

/// Data on the guest's disk that has a bit of everything: at the start, across clusters, at the end.
const INSTALL: &[&str] = &[
    "write -P 0x11 0 64k",
    "write -P 0x22 1000k 3000k",
    "write -P 0x33 20M 512",
    "write -z 2M 128k",
    "write -P 0x44 33553920 512",
    "discard 1100k 200k",
];

#[test]
fn qemu_io_and_vimg_read_each_other() {
    let scratch = Scratch::new();
    let kinds = [
        ("qcow2", ""),
        ("qcow2", "preallocation=metadata"),
        ("qcow2", "preallocation=falloc"),
        ("qcow2", "preallocation=full"),
        ("qcow2", "compat=0.10"),
        ("qcow2", "cluster_size=4k"),
        ("qcow2", "cluster_size=2M"),
        ("qcow2", "extended_l2=on"),
        ("qcow2", "lazy_refcounts=on"),
        ("qcow2", "data_file=image.data"),
        ("qcow2", "refcount_bits=1,cluster_size=1k"),
    ];
    scratch.judge(&["create", "-q", "-f", "raw", "model", "32M"]);
    scratch.qemu_io("raw", "model", INSTALL);
    for (format, options) in kinds {
        // What a discard leaves depends on the image: only images without are equal to the model.
        let install = &INSTALL[..5];
        let mut create = vec!["create", "-q", "-f", format];
        let mut convert = vec!["convert", "-f", format, "-O", format];
        if !options.is_empty() {
            create.extend(["-o", options]);
            if !options.contains("data_file") {
                convert.extend(["-o", options]);
            }
        }
        create.extend(["image", "32M"]);
        convert.extend(["image", "copy"]);
        scratch.vimg(&create);
        scratch.qemu_io(format, "image", install);
        if format == "qcow2" {
            scratch.assert_clean(format, "image");
        }
        // vimg reads what qemu-io wrote into what vimg made ...
        scratch.vimg(&["convert", "-f", format, "-O", "raw", "image", "flat"]);
        scratch.judge(&["convert", "-f", format, "-O", "raw", "image", "flat.judge"]);
        assert_same_bytes(&scratch.file("flat"), &scratch.file("flat.judge"));
        // ... and the other way: into a new image of that kind, and over one that is there.
        scratch.vimg(&convert);
        scratch.assert_same_content(format, "copy", "raw", "flat");
        fs::remove_file(scratch.file("copy")).expect("remove");
        scratch.judge(&create);
        scratch.qemu_io(format, "image", &["write -P 0x77 3M 20M"]);
        scratch.vimg(&["convert", "-n", "-f", "raw", "-O", format, "model", "image"]);
        scratch.assert_same_content(format, "image", "raw", "model");
        if format == "qcow2" {
            scratch.assert_clean(format, "image");
        }
        // Grown, written at its new end, shrunk: still what it was.
        scratch.vimg(&["resize", "-q", "-f", format, "image", "700M"]);
        scratch.qemu_io(format, "image", &["write -P 0x55 699M 1M"]);
        scratch.vimg(&["resize", "-q", "-f", format, "--shrink", "image", "32M"]);
        scratch.assert_same_content(format, "image", "raw", "model");
        if format == "qcow2" {
            scratch.assert_clean(format, "image");
        }
        fs::remove_file(scratch.file("image")).expect("remove");
    }
}

#[test]
fn raw_converted_to_qcow2_is_as_small_as_qemu_imgs() {
    let scratch = Scratch::new();
    scratch.vimg(&["create", "-q", "-f", "raw", "disk.raw", "1G"]);
    scratch.qemu_io("raw", "disk.raw", &["write -P 1 10M 30M", "write -P 2 800M 5M"]);
    scratch.vimg(&["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "ours"]);
    scratch.judge(&["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "theirs"]);
    assert_eq!(figures(&scratch.file("ours")).0, figures(&scratch.file("theirs")).0);
    assert!(figures(&scratch.file("ours")).1 <= figures(&scratch.file("theirs")).1 + (64 << 10));
    scratch.assert_same_content("qcow2", "ours", "raw", "disk.raw");
    // An image that exists, converted to one whose tables are all there.
    let args = ["convert", "-f", "qcow2", "-O", "qcow2", "-o", "preallocation=metadata", "ours"];
    scratch.vimg(&[&args[..], &["full"]].concat());
    scratch.judge(&[&args[..], &["full.judge"]].concat());
    assert_eq!(figures(&scratch.file("full")).0, figures(&scratch.file("full.judge")).0);
    scratch.assert_same_content("qcow2", "full", "raw", "disk.raw");
    scratch.assert_clean("qcow2", "full");
}

#[test]
fn growing_the_old_way_and_the_new_way_is_the_same() {
    let scratch = Scratch::new();
    scratch.vimg(&["create", "-q", "-f", "qcow2", "disk.qcow2", "32M"]);
    scratch.qemu_io("qcow2", "disk.qcow2", &INSTALL[..5]);
    fs::copy(scratch.file("disk.qcow2"), scratch.file("new.qcow2")).expect("copy");
    // The old way: to raw, zeros appended, back.
    scratch.vimg(&["convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "old.raw"]);
    scratch.sh("dd if=/dev/zero bs=1M count=40 status=none >> old.raw");
    scratch.vimg(&["convert", "-f", "raw", "-O", "qcow2", "old.raw", "old.qcow2"]);
    // The new way.
    let out = scratch.vimg(&["resize", "new.qcow2", "+40M"]);
    assert_eq!(out.stdout, "Image resized.\n");
    scratch.assert_same_content("qcow2", "old.qcow2", "qcow2", "new.qcow2");
    let size = |name: &str| scratch.vimg(&["info", "--output=json", name]).json()["virtual-size"].clone();
    assert_eq!(size("old.qcow2"), 72 << 20);
    assert_eq!(size("new.qcow2"), 72 << 20);
    scratch.assert_clean("qcow2", "new.qcow2");
}

/// Runs a program as root: as it is, or by way of `sudo`.
fn root(program: &str, args: &[&str]) -> crate::common::Output {
    if plain("id", &["-u"]).ok().stdout.trim() == "0" {
        return plain(program, args).run();
    }
    let mut all = vec!["-n", program];
    all.extend(args);
    let out = plain("sudo", &all).run();
    assert!(!out.stderr.contains("password"), "this test needs root, or sudo without a password: {out:?}");
    out
}

/// A block device over a file, until it is dropped.
struct Loop {
    device: String,
}

impl Loop {
    fn new(file: &Path) -> Self {
        let out = root("losetup", &["--find", "--show", &file.to_string_lossy()]);
        assert_eq!(out.code, Some(0), "loop devices are needed (root, in a container that allows them): {out:?}");
        let device = out.stdout.trim().to_owned();
        let user = plain("id", &["-u"]).ok().stdout.trim().to_owned();
        assert_eq!(root("chown", &[&user, &device]).code, Some(0), "chown {device}");
        Self { device }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        root("losetup", &["--detach", &self.device]);
    }
}

#[test]
fn block_devices_are_sources_and_targets() {
    let scratch = Scratch::new();
    for (name, mib) in [("source", 16), ("target", 20), ("small", 8)] {
        fs::File::create(scratch.file(name)).and_then(|f| f.set_len(mib << 20)).expect("backing file");
    }
    write_pattern(&scratch.file("source"), 1 << 20, 1, 3 << 20);
    write_pattern(&scratch.file("target"), 0, 2, 20 << 20);
    write_pattern(&scratch.file("small"), 0, 3, 8 << 20);
    let expected = fs::read(scratch.file("source")).expect("read");
    let (source, target, small) =
        (Loop::new(&scratch.file("source")), Loop::new(&scratch.file("target")), Loop::new(&scratch.file("small")));

    // As a source: to a file, through a symlink too, and described as qemu-img does.
    scratch.vimg(&["convert", "-f", "raw", "-O", "qcow2", &source.device, "out.qcow2"]);
    scratch.assert_same_content("qcow2", "out.qcow2", "raw", &source.device);
    std::os::unix::fs::symlink(&source.device, scratch.file("link")).expect("symlink");
    scratch.vimg(&["convert", "-f", "raw", "-O", "raw", "link", "out.raw"]);
    assert!(fs::read(scratch.file("out.raw")).expect("read") == expected);
    let args = ["info", "-f", "raw", &source.device];
    assert_eq!(scratch.vimg(&args).stdout, scratch.judge(&args).stdout);

    // Too small: refused before anything is written, with -n and without.
    let before = fs::read(scratch.file("small")).expect("read");
    for more in [&["-n"][..], &[]] {
        let args = [&["convert", "-f", "raw", "-O", "raw"][..], more, &[&source.device, &small.device]].concat();
        let (ours, theirs) = (vimg(&args).dir(scratch.path()).run(), judge(&args).dir(scratch.path()).run());
        assert_eq!((ours.code, &ours.stderr), (Some(1), &theirs.stderr), "{args:?}");
        root("blockdev", &["--flushbufs", &small.device]);
        if more == ["-n"] {
            assert!(fs::read(scratch.file("small")).expect("read") == before, "{args:?} wrote");
        }
    }

    // As a target: -n leaves what lies behind the source's end alone.
    let behind = pattern(2, 20 << 20)[16 << 20..].to_vec();
    scratch.vimg(&["convert", "-n", "-f", "qcow2", "-O", "raw", "out.qcow2", &target.device]);
    let got = fs::read(&target.device).expect("read device");
    assert!(got[..16 << 20] == expected[..], "-n: content");
    assert!(got[16 << 20..] == behind[..], "-n: behind the end");
    write_pattern(Path::new(&target.device), 0, 4, 20 << 20);
    scratch.vimg(&["convert", "-f", "qcow2", "-O", "raw", "out.qcow2", &target.device]);
    assert!(fs::read(&target.device).expect("read device")[..16 << 20] == expected[..], "content");
    // qcow2 lies on a device as well as in a file.
    scratch.vimg(&["convert", "-f", "raw", "-O", "qcow2", "out.raw", &target.device]);
    scratch.assert_same_content("qcow2", &target.device, "raw", "out.raw");
    // A device has the size that it has.
    let args = ["resize", "-f", "raw", &target.device, "40M"];
    let (ours, theirs) = (vimg(&args).dir(scratch.path()).run(), judge(&args).dir(scratch.path()).run());
    assert_eq!((ours.code, ours.stderr), (theirs.code, theirs.stderr));
}

/// What a device held before shows through nowhere: not in holes, not beside small runs of data, not in what is mapped
/// from the start.
#[test]
fn a_new_image_on_a_used_device_reads_as_its_source() {
    let scratch = Scratch::new();
    let raw = scratch.file("disk.raw");
    fs::File::create(&raw).and_then(|f| f.set_len((24 << 20) + 512)).expect("source");
    for (at, len) in [(0, 4096), (70 << 10, 512), (3 << 20, 2 << 20), ((9 << 20) + 4096, 8192), (24 << 20, 512)] {
        write_pattern(&raw, at, at, usize::try_from(len).expect("small"));
    }
    fs::write(scratch.file("used"), vec![0xaa; 64 << 20]).expect("used");
    let device = Loop::new(&scratch.file("used"));
    let data = format!("data_file={}", device.device);
    let on_device = [
        ("qcow2", ""),
        ("qcow2", "-c"),
        ("qcow2", "-S 0"),
        ("qcow2", "-o preallocation=metadata"),
        ("qcow2", "-o preallocation=metadata,extended_l2=on"),
        ("qcow2", "-o extended_l2=on"),
        ("qcow2", "-o cluster_size=2M,extended_l2=on"),
        ("qcow", ""),
        ("vdi", ""),
        ("vdi", "-o static=on"),
        ("vpc", "-o force_size=on"),
    ];
    let in_file = [
        format!("-o {data}"),
        format!("-o {data},data_file_raw=on"),
        format!("-o {data},preallocation=metadata"),
        format!("-o {data},data_file_raw=on,preallocation=metadata"),
        format!("-o {data},extended_l2=on"),
    ];
    let on_device = on_device.map(|(format, options)| (format, options.to_owned(), &*device.device));
    let in_file = in_file.map(|options| ("qcow2", options, "image"));
    for (format, options, target) in on_device.into_iter().chain(in_file) {
        for threads in ["1", "4"] {
            write_aa(Path::new(&device.device), 64 << 20);
            let args = ["convert", "-m", threads, "-f", "raw", "-O", format];
            let args = [&args[..], &options.split_whitespace().collect::<Vec<_>>(), &["disk.raw", target]].concat();
            scratch.vimg(&args);
            let out =
                judge(&["compare", "-U", "-f", "raw", "-F", format, "disk.raw", target]).dir(scratch.path()).run();
            assert_eq!(out.code, Some(0), "{args:?}: {out:?}");
        }
    }
}

/// Fills a device with 0xaa.
fn write_aa(device: &Path, len: usize) {
    fs::OpenOptions::new().write(true).open(device).and_then(|mut f| f.write_all(&vec![0xaa; len])).expect("fill");
}

/// A small file system in memory, until it is dropped.
struct Small {
    at: PathBuf,
}

impl Small {
    fn new(at: PathBuf, mib: u32) -> Self {
        fs::create_dir(&at).expect("mount point");
        let options = format!("size={mib}m,mode=1777");
        let out = root("mount", &["-t", "tmpfs", "-o", &options, "tmpfs", &at.to_string_lossy()]);
        assert_eq!(out.code, Some(0), "a mount is needed (root, in a container that allows it): {out:?}");
        Self { at }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        root("umount", &[&self.at.to_string_lossy()]);
    }
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk.raw"), 0, 1, 32 << 20);
    let small = Small::new(scratch.file("small"), 8);
    fs::write(small.at.join("older"), "precious").expect("write");
    for format in ["raw", "qcow2"] {
        for target in ["small/new", "small/older"] {
            let out = vimg(&["convert", "--no-space-check", "-f", "raw", "-O", format, "disk.raw", target])
                .dir(scratch.path())
                .fails(1);
            assert!(out.stderr.contains("No space left on device"), "{out:?}");
            assert_eq!(out.stdout, "");
            let left: Vec<_> = fs::read_dir(&small.at).expect("list").flatten().map(|e| e.file_name()).collect();
            assert_eq!(left, ["older"], "{format} {target}");
            assert_eq!(fs::read(small.at.join("older")).expect("read"), b"precious");
        }
    }
    for args in [
        &["create", "-f", "raw", "-o", "preallocation=full", "small/new", "32M"][..],
        &["create", "-f", "raw", "-o", "preallocation=falloc", "small/new", "32M"],
        &["create", "-f", "qcow2", "-o", "preallocation=full", "small/new", "32M"],
    ] {
        let out = vimg(args).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("No space left on device"), "{out:?}");
        assert!(!small.at.join("new").exists(), "{args:?}");
    }
}

#[test]
fn a_limit_on_file_sizes_is_said_and_leaves_nothing() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk.raw"), 0, 1, 4 << 20);
    let line = format!("ulimit -f 2000; '{}' convert -f raw -O qcow2 disk.raw new", vimg_path().display());
    let out = sh(&line).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("new: ") && out.stderr.contains("File too large"), "{out:?}");
    assert!(!scratch.file("new").exists());
}
