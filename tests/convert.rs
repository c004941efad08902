//! `convert`: contents against `qemu-img compare`, bytes against what `qemu-img convert` writes, and what is left
//! behind when it fails.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::{Scratch, assert_same_bytes, judge, need, need_root, pattern, qemu_io, sh, vimg, write_pattern};

/// A sparse raw disk: runs of noise and of allocated zeros at random places, sometimes to the very end.
fn disk(path: &Path, size: u64, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let file = fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    for n in 0..rng.u64(8..24) {
        let at = rng.u64(0..size.div_ceil(512)) * 512;
        let len = [512, 4096, 20_480, 65_536, 300_000, 1 << 20][rng.usize(0..6)].min((size - at.min(size)) as usize);
        let bytes = if rng.u8(..) < 64 { vec![0; len] } else { pattern(seed * 100 + n, len) };
        file.write_all_at(&bytes, at).unwrap();
    }
    if seed.is_multiple_of(2) {
        file.write_all_at(&[7], size - 1).unwrap();
    }
}

#[test]
fn qcow2_is_the_same_bytes_as_the_reference_writes() {
    let scratch = Scratch::new();
    let sizes = [9 << 20, (5 << 20) + 512, (3 << 20) + 4096 + 1536, 65_536 * 33];
    let options = [
        "cluster_size=512",
        "cluster_size=1k",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=256k",
        "cluster_size=2M",
        "compat=0.10",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on",
        "refcount_bits=1,cluster_size=512",
        "preallocation=metadata",
        "preallocation=metadata,cluster_size=512",
    ];
    for (seed, size) in sizes.into_iter().enumerate() {
        disk(&scratch.file("s.raw"), size, seed as u64 + 1);
        for options in options {
            let args = |target| ["convert", "-f", "raw", "-O", "qcow2", "-o", options, "s.raw", target];
            judge(&args("theirs")).dir(scratch.path()).ok();
            vimg(&args("ours")).dir(scratch.path()).ok();
            if let Some(at) = crate::common::first_difference(&scratch.file("theirs"), &scratch.file("ours")) {
                panic!("{options}, {size} bytes: differs at {at:#x}");
            }
        }
    }
}

#[test]
fn zeros_are_left_out_as_the_reference_leaves_them_out() {
    let scratch = Scratch::new();
    disk(&scratch.file("s.raw"), (7 << 20) + 512, 4);
    for sparse in ["0", "512", "1536", "4k", "12k", "64k", "1M"] {
        let args =
            |target| ["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", "-S", sparse, "s.raw", target];
        judge(&args("theirs")).dir(scratch.path()).ok();
        vimg(&args("ours")).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("theirs"), &scratch.file("ours"));
        let args = |target| ["convert", "-f", "raw", "-S", sparse, "s.raw", target];
        judge(&args("theirs")).dir(scratch.path()).ok();
        vimg(&args("ours")).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("theirs"), &scratch.file("ours"));
        let map = |image| judge(&["map", "--output=json", "-f", "raw", image]).dir(scratch.path()).ok().stdout;
        assert_eq!(map("theirs"), map("ours"), "-S {sparse}");
    }
}

#[test]
fn the_number_of_threads_does_not_show() {
    let scratch = Scratch::new();
    disk(&scratch.file("s.raw"), (33 << 20) + 512, 6);
    let cases: [&[&str]; 7] = [
        &["-O", "raw"],
        &["-O", "qcow2", "-o", "cluster_size=4k"],
        &["-O", "qcow2", "-c"],
        &["-O", "qcow2", "-c", "-o", "compression_type=zstd,cluster_size=16k"],
        &["-O", "qcow2", "-c", "-o", "compression_window=32k,compression_level=6"],
        &["-O", "qcow2", "-c", "-o", "compression_level=1,cluster_size=2M"],
        &["-O", "vmdk", "-o", "subformat=streamOptimized"],
    ];
    for case in cases {
        for threads in ["1", "2", "16"] {
            let mut args = vec!["convert", "-f", "raw", "-m", threads];
            args.extend(case);
            args.extend(["s.raw", threads]);
            vimg(&args).dir(scratch.path()).env("SOURCE_DATE_EPOCH", "1").ok();
        }
        scratch.assert_same_content("raw", "s.raw", case[1], "1");
        if case[1] != "vmdk" {
            assert_same_bytes(&scratch.file("1"), &scratch.file("2"));
            assert_same_bytes(&scratch.file("1"), &scratch.file("16"));
        }
        let mut args = vec!["convert", "-f", "raw", "-W"];
        args.extend(case);
        vimg(&[&args[..], &["s.raw", "any"]].concat()).dir(scratch.path()).ok();
        scratch.assert_same_content("raw", "s.raw", case[1], "any");
    }
}

/// A stream goes on from where it ends: there is no other order in which it could be written, whatever the user allows.
/// (The reference loses data so now and then.)
#[test]
fn a_stream_is_in_order_whatever_is_allowed() {
    let scratch = Scratch::new();
    // Runs of several grain tables, some of which take longer to encode.
    let file = fs::File::create(scratch.file("s.raw")).unwrap();
    file.set_len(70 << 20).unwrap();
    for i in 0..69u64 {
        let len = if i % 3 == 0 { 700_000 } else { 30_000 };
        file.write_all_at(&pattern(i, len), (i << 20) + (i % 5) * 65536).unwrap();
    }
    for _ in 0..8 {
        let args =
            ["convert", "-f", "raw", "-W", "-m", "8", "-O", "vmdk", "-o", "subformat=streamOptimized", "s.raw", "o"];
        vimg(&args).dir(scratch.path()).ok();
        scratch.assert_same_content("raw", "s.raw", "vmdk", "o");
    }
}

#[test]
fn every_kind_of_source_converts_to_equal_content() {
    let scratch = Scratch::new();
    disk(&scratch.file("s.raw"), (9 << 20) + 1024, 8);
    let kinds: [(&str, &[&str]); 7] = [
        ("qcow2", &["-o", "cluster_size=512"]),
        ("qcow2", &["-o", "extended_l2=on"]),
        ("qcow2", &["-c"]),
        ("qcow2", &["-c", "-o", "compression_type=zstd,cluster_size=2M"]),
        ("qcow2", &["-o", "compat=0.10"]),
        ("vdi", &[]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
    ];
    for (format, options) in kinds {
        let args = [&["convert", "-f", "raw", "-O", format][..], options, &["s.raw", "i"]].concat();
        judge(&args).dir(scratch.path()).ok();
        vimg(&["convert", "-f", format, "i", "back"]).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("s.raw"), &scratch.file("back"));
        // On top of what was there: every byte is replaced.
        fs::write(scratch.file("back"), vec![0xaa; (9 << 20) + 1024]).unwrap();
        vimg(&["convert", "-n", "-f", format, "i", "back"]).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("s.raw"), &scratch.file("back"));
    }
}

#[test]
fn several_sources_are_joined() {
    let scratch = Scratch::new();
    fs::write(scratch.file("a"), pattern(1, 1000)).unwrap();
    disk(&scratch.file("b"), 1 << 20, 2);
    fs::write(scratch.file("c"), pattern(3, 70_001)).unwrap();
    for format in ["raw", "qcow2"] {
        let args = |target| ["convert", "-f", "raw", "-O", format, "a", "b", "c", target];
        judge(&args("theirs")).dir(scratch.path()).ok();
        vimg(&args("ours")).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("theirs"), &scratch.file("ours"));
    }
}

#[test]
fn a_backing_file_is_not_copied() {
    let scratch = Scratch::new();
    let create = |args: &[&str]| judge(&[&["create", "-q", "-f", "qcow2"], args].concat()).dir(scratch.path()).ok();
    let write = |image: &str, commands: &[&str]| qemu_io("qcow2", image, commands).dir(scratch.path()).ok();
    create(&["base", "2M"]);
    write("base", &["write -P 1 0 300k"]);
    create(&["-b", "base", "-F", "qcow2", "mid", "3M"]);
    write("mid", &["write -P 2 100k 64k"]);
    create(&["-b", "mid", "-F", "qcow2", "top", "4M"]);
    write("top", &["write -P 3 131000 70000", "write -z 256k 64k", "write -z 3500k 64k", "write -P 4 3900k 10k"]);
    for (backing, options) in [("mid", ""), ("mid", "extended_l2=on"), ("mid", "cluster_size=2M"), ("base", "")] {
        let options = format!("size=4M,{options}");
        let options = options.trim_end_matches(',');
        let args = ["convert", "-O", "qcow2", "-o", options, "-B", backing, "-F", "qcow2", "top", "out"];
        vimg(&args).dir(scratch.path()).ok();
        scratch.assert_same_content("qcow2", "top", "qcow2", "out");
        scratch.assert_clean("qcow2", "out");
        if options == "size=4M" && backing == "mid" {
            judge(&["convert", "-O", "qcow2", "-B", "mid", "-F", "qcow2", "top", "theirs"]).dir(scratch.path()).ok();
            let map = |image| judge(&["map", "--output=json", image]).dir(scratch.path()).ok().stdout;
            assert_eq!(map("theirs"), map("out"));
        }
    }
    vimg(&["convert", "-c", "-O", "qcow2", "-B", "mid", "-F", "qcow2", "top", "out"]).dir(scratch.path()).ok();
    scratch.assert_same_content("qcow2", "top", "qcow2", "out");
}

#[test]
fn snapshots_are_converted() {
    let scratch = Scratch::new();
    judge(&["create", "-q", "-f", "qcow2", "i", "2M"]).dir(scratch.path()).ok();
    for (n, name) in ["one", "two"].iter().enumerate() {
        let fill = format!("write -P {} {}k 100k", n + 1, n * 50);
        qemu_io("qcow2", "i", &[&fill]).dir(scratch.path()).ok();
        judge(&["snapshot", "-c", name, "i"]).dir(scratch.path()).ok();
    }
    qemu_io("qcow2", "i", &["write -P 9 0 2M"]).dir(scratch.path()).ok();
    for which in ["one", "2", "snapshot.name=two", "snapshot.id=1", "snapshot.id=2,snapshot.name=two"] {
        judge(&["convert", "-l", which, "i", "theirs"]).dir(scratch.path()).ok();
        vimg(&["convert", "-l", which, "i", "ours"]).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("theirs"), &scratch.file("ours"));
    }
    for which in ["none", "snapshot.id=1,snapshot.name=two", "snapshot.bad=1"] {
        let args = ["convert", "-l", which, "i", "none"];
        let (ours, theirs) = (vimg(&args).dir(scratch.path()).run(), judge(&args).dir(scratch.path()).run());
        assert_eq!((ours.code, ours.stderr), (theirs.code, theirs.stderr), "{which}");
    }
}

#[test]
fn an_existing_target_is_written_to() {
    let scratch = Scratch::new();
    disk(&scratch.file("s.raw"), 5 << 20, 10);
    for options in ["cluster_size=64k", "extended_l2=on", "compat=0.10"] {
        judge(&["create", "-q", "-f", "qcow2", "-o", options, "t", "6M"]).dir(scratch.path()).ok();
        qemu_io("qcow2", "t", &["write -P 5 0 6M"]).dir(scratch.path()).ok();
        vimg(&["convert", "-n", "-f", "raw", "-O", "qcow2", "s.raw", "t"]).dir(scratch.path()).ok();
        scratch.assert_clean("qcow2", "t");
        vimg(&["convert", "-f", "qcow2", "t", "back"]).dir(scratch.path()).ok();
        judge(&["convert", "-f", "qcow2", "t", "theirs"]).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("back"), &scratch.file("theirs"));
        let back = fs::read(scratch.file("back")).unwrap();
        assert!(back[..5 << 20] == fs::read(scratch.file("s.raw")).unwrap(), "{options}");
        assert!(back[5 << 20..].iter().all(|byte| *byte == 5), "{options}");
    }
    fs::write(scratch.file("small"), [1; 512]).unwrap();
    let refused = vimg(&["convert", "-n", "-f", "raw", "s.raw", "small"]).dir(scratch.path()).fails(1);
    assert_eq!(refused.stderr, "qemu-img: output file is smaller than input file\n");
    assert_eq!(fs::read(scratch.file("small")).unwrap(), [1; 512]);
}

/// The outer image's threads share units of the inner one.
#[test]
fn an_image_in_an_image_is_written_to_by_many_threads() {
    let scratch = Scratch::new();
    fs::File::create(scratch.file("s.raw")).and_then(|f| f.set_len(48 << 20)).unwrap();
    write_pattern(&scratch.file("s.raw"), (1 << 20) + 4096, 1, 44 << 20);
    for (format, options) in [
        ("qcow2", "cluster_size=2M"),
        ("qcow2", "cluster_size=2M,extended_l2=on"),
        ("vdi", "static=off"),
        ("vpc", "subformat=dynamic"),
        ("vmdk", "compat6=off"),
    ] {
        for (size, outer) in [("49M", "driver=raw"), ("49M", "driver=raw,offset=512,size=50331648")] {
            for _ in 0..3 {
                judge(&["create", "-q", "-f", format, "-o", options, "t", size]).dir(scratch.path()).ok();
                let target = format!("{outer},file.driver={format},file.file.driver=file,file.file.filename=t");
                vimg(&["convert", "-n", "-m", "8", "-f", "raw", "--target-image-opts", "s.raw", &target])
                    .dir(scratch.path())
                    .ok();
                let image = target.replace("driver=raw,file", "driver=raw,size=50331648,file");
                let out =
                    judge(&["compare", "--image-opts", &image, "driver=raw,file.filename=s.raw,file.driver=file"])
                        .dir(scratch.path())
                        .run();
                assert_eq!(out.code, Some(0), "{target} {options}: {out:?}");
            }
        }
    }
}

#[test]
fn a_full_disk_says_which_file_and_leaves_nothing() {
    need_root("mounting a small tmpfs");
    let scratch = Scratch::new();
    let full = scratch.file("full");
    fs::create_dir(&full).unwrap();
    fs::write(scratch.file("s.raw"), pattern(1, 8 << 20)).unwrap();
    sh(&format!("mount -t tmpfs -o size=4m none {}", full.display())).ok();
    fs::write(full.join("old"), b"old").unwrap();
    let data = ["-O", "qcow2", "-o", "data_file=full/new"];
    let outcomes: Vec<_> =
        [("full/new", &data[..0], "full/new"), ("full/old", &[], "full/old"), ("full/q", &data, "full/new")]
            .into_iter()
            .map(|(target, options, named)| {
                let args = [&["convert", "--no-space-check", "-f", "raw"], options, &["s.raw", target]].concat();
                let out = vimg(&args).dir(scratch.path()).run();
                (named, out, fs::read(full.join("old")), fs::read_dir(&full).map(|dir| dir.count()))
            })
            .collect();
    sh(&format!("umount {}", full.display())).ok();
    for (named, out, old, count) in outcomes {
        let stderr = out.stderr;
        assert_eq!(out.code, Some(1), "{stderr}");
        assert!(stderr.starts_with(&format!("qemu-img: {named}: error while writing at byte ")), "{stderr}");
        assert!(stderr.ends_with(": No space left on device\n"), "{stderr}");
        assert_eq!((old.unwrap(), count.unwrap()), (b"old".to_vec(), 1));
    }
}

#[test]
fn a_full_disk_leaves_no_leaks_in_an_image_that_was_there() {
    need_root("mounting a small tmpfs");
    let scratch = Scratch::new();
    fs::create_dir(scratch.file("full")).unwrap();
    fs::write(scratch.file("data"), pattern(1, 6 << 20)).unwrap();
    scratch.sh("qemu-img create -q -f raw empty 6M; qemu-img convert -f raw -O qcow2 data top");
    scratch.sh("mount -t tmpfs -o size=4m none full");
    let rebase = "create -q -f FMT -b ../data -F raw full/image";
    let fresh = "create -q -f FMT full/image 6M";
    let commit = "rebase -u -b full/image -F FMT top";
    // Alone where space is taken at the end of the file only: what others placed behind it keeps it there.
    let cases = [
        ("qcow2", &[rebase][..], "rebase -b ../empty -F raw full/image"),
        ("qcow2", &[rebase], "rebase -b  full/image"),
        ("qcow2", &[fresh, commit], "commit top"),
        ("qcow2", &[fresh], "convert -n -f raw -O qcow2 data full/image"),
        ("qcow2", &[fresh], "convert -c -n -f raw -O qcow2 data full/image"),
        ("qed", &[fresh], "convert -m 1 -n -f raw -O qed data full/image"),
    ];
    let mut outcomes = Vec::new();
    for (format, before, line) in cases {
        for line in before {
            judge(&line.replace("FMT", format).split(' ').collect::<Vec<_>>()).dir(scratch.path()).ok();
        }
        let out = vimg(&line.split(' ').collect::<Vec<_>>()).dir(scratch.path()).run();
        let check = judge(&["check", "-f", format, "full/image"]).dir(scratch.path()).run();
        outcomes.push((format, line, out, check));
    }
    scratch.sh("umount full");
    for (format, line, out, check) in outcomes {
        assert_eq!(out.code, Some(1), "{format}, {line}: {out:?}");
        assert!(out.stderr.ends_with(": No space left on device\n"), "{format}, {line}: {out:?}");
        assert_eq!(check.code, Some(0), "{format}, {line}: {}", check.stdout);
    }
}

#[test]
fn a_lack_of_room_is_told_before_anything_is_written() {
    need_root("mounting a small tmpfs");
    let scratch = Scratch::new();
    let full = scratch.file("full");
    fs::create_dir(&full).unwrap();
    fs::write(scratch.file("data"), pattern(1, 8 << 20)).unwrap();
    // Half of it is zeros that the map does not know of.
    fs::write(scratch.file("half"), [pattern(2, 3 << 20), vec![0; 5 << 20]].concat()).unwrap();
    sh("truncate -s 8M sparse; qemu-img create -q -f qcow2 -b data -F raw over").dir(scratch.path()).ok();
    sh(&format!("mount -t tmpfs -o size=4m none {}", full.display())).ok();
    fs::write(full.join("old"), b"old").unwrap();
    let run = |options: &str, source: &str, target: &str| {
        let args: Vec<&str> = options.split_whitespace().chain([source, target]).collect();
        let out = vimg(&[&["convert"], &args[..]].concat()).dir(scratch.path()).run();
        let (old, count) = (fs::read(full.join("old")), fs::read_dir(&full).map(|dir| dir.count()));
        let _ = fs::remove_file(full.join("new"));
        (options.to_owned(), out, old.unwrap(), count.unwrap())
    };
    let lacking = [
        run("-O qcow2", "data", "full/new"),
        run("-O raw", "data", "full/old"),
        run("-O vdi", "over", "full/new"),
        run("-O raw -S 0", "sparse", "full/new"),
        run("-O raw -o preallocation=falloc", "sparse", "full/new"),
        run("-O qcow2 -o preallocation=full", "sparse", "full/new"),
    ];
    let fits = [
        run("-O raw", "half", "full/new"),
        run("-O qcow2", "sparse", "full/new"),
        run("-O qcow2 -o preallocation=metadata", "sparse", "full/new"),
        run("-O qcow2 -B ../data -F raw", "over", "full/new"),
    ];
    let tried = run("-O raw --no-space-check", "data", "full/new");
    // An older file in whose place it would fit, unless that stays until the new one is complete.
    fs::write(full.join("older"), pattern(3, 3 << 20)).unwrap();
    let beside = run("-O raw", "half", "full/older");
    let linked = {
        sh("ln older link").dir(&full).ok();
        run("-O raw", "half", "full/older")
    };
    sh(&format!("umount {}", full.display())).ok();
    for (options, out, old, count) in lacking {
        assert_eq!((out.code, old, count), (Some(1), b"old".to_vec(), 1), "{options}: {}", out.stderr);
        assert!(out.stderr.contains(": not enough room: "), "{options}: {}", out.stderr);
        assert!(out.stderr.contains(" MiB are needed at least, and 4 MiB are free in '"), "{options}: {}", out.stderr);
    }
    for (options, out, _, _) in fits {
        assert_eq!(out.code, Some(0), "{options}: {}", out.stderr);
    }
    assert!(tried.1.stderr.ends_with(": No space left on device\n"), "{}", tried.1.stderr);
    for said in
        ["full/older: not enough room: ", " MiB are needed at least, and 0.996 MiB are free in '", "stays until"]
    {
        assert!(beside.1.stderr.contains(said), "{}", beside.1.stderr);
    }
    assert_eq!(linked.1.code, Some(0), "{}", linked.1.stderr);
}

#[test]
fn progress_is_printed_as_the_reference_prints_it() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), pattern(1, 11 << 20)).unwrap();
    fs::write(scratch.file("empty"), b"").unwrap();
    for args in [
        &["convert", "-p", "-m", "1", "s.raw", "t"][..],
        &["convert", "-p", "empty", "t"],
        &["convert", "-p", "-q", "s.raw", "t"],
        &["convert", "-p", "none", "t"],
    ] {
        let (ours, theirs) = (vimg(args).dir(scratch.path()).run(), judge(args).dir(scratch.path()).run());
        assert_eq!((ours.code, &ours.stdout), (theirs.code, &theirs.stdout), "{args:?}");
    }
}

#[test]
fn copy_offloading_shares_the_data_where_the_file_system_can() {
    need_root("mounting XFS and Btrfs");
    for kind in ["xfs", "btrfs"] {
        need(&format!("mkfs.{kind}"));
        let scratch = Scratch::new();
        let at = scratch.file("mounted");
        fs::create_dir(&at).unwrap();
        scratch.sh(&format!("truncate -s 512M fs.img && PATH=$PATH:/sbin:/usr/sbin mkfs.{kind} -q fs.img && mount -o loop fs.img mounted"));
        fs::write(scratch.file("small"), [1; 4096]).unwrap();
        let made = sh("head -c 48M /dev/urandom > a && sync && stat -f -c %f . > ../before").dir(&at).run();
        let out = vimg(&["convert", "-C", "-f", "raw", "-O", "raw", "a", "b"]).dir(&at).run();
        let odd = |program: fn(&[&'static str]) -> crate::common::Run, target| {
            let out =
                program(&["convert", "-f", "raw", "-o", "extent_size_hint=1000", "../small", target]).dir(&at).run();
            (out.code, out.stderr)
        };
        let hints = (odd(vimg, "ours"), odd(judge, "theirs"));
        sh("rm -f ours theirs").dir(&at).run();
        let after = sh("sync && cmp a b && stat -f -c '%f %S' .").dir(&at).run();
        scratch.sh("umount mounted");
        assert_eq!((made.code, out.code, after.code), (Some(0), Some(0), Some(0)), "{kind}: {out:?} {after:?}");
        assert_eq!(hints.0, hints.1, "{kind}");
        assert!(hints.0.1.contains("Failed to set extent size hint"), "{hints:?}");
        let before: u64 = fs::read_to_string(scratch.file("before")).unwrap().trim().parse().unwrap();
        let numbers: Vec<u64> = after.stdout.split_whitespace().map(|n| n.parse().unwrap()).collect();
        let used = before.saturating_sub(numbers[0]) * numbers[1];
        assert!(used < 8 << 20, "{kind}: {used} bytes were written for a copy of 48 MiB");
    }
}

#[test]
fn the_host_copies_where_it_can() {
    let scratch = Scratch::new();
    disk(&scratch.file("s.raw"), (6 << 20) + 512, 12);
    vimg(&["convert", "-C", "-f", "raw", "s.raw", "t"]).dir(scratch.path()).ok();
    assert_same_bytes(&scratch.file("s.raw"), &scratch.file("t"));
    // The same when all has to be read on the way, and by any number of threads.
    for options in [&["-m", "1"][..], &["-m", "5"], &["--verify"], &["--digest", "sha256"]] {
        let args = [&["convert", "-C", "-f", "raw", "-O", "qcow2"], options, &["s.raw", "u"]].concat();
        vimg(&["convert", "-C", "-f", "raw", "-O", "qcow2", "s.raw", "t"]).dir(scratch.path()).ok();
        vimg(&args).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("t"), &scratch.file("u"));
    }
    for (cache, source) in [("none", "none"), ("writeback", "directsync"), ("directsync", "writeback")] {
        vimg(&["convert", "-f", "raw", "-t", cache, "-T", source, "s.raw", "t"]).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("s.raw"), &scratch.file("t"));
    }
}

#[test]
fn an_overlay_hides_what_the_source_never_had() {
    let scratch = Scratch::new();
    fs::write(scratch.file("full.raw"), vec![0xaa; 1 << 20]).unwrap();
    fs::write(scratch.file("short.raw"), vec![0xbb; 300 * 512]).unwrap();
    judge(&["create", "-q", "-f", "qcow2", "alone", "1M"]).dir(scratch.path()).ok();
    judge(&["create", "-q", "-f", "qcow2", "-b", "short.raw", "-F", "raw", "over", "1M"]).dir(scratch.path()).ok();
    for source in ["alone", "over"] {
        scratch.qemu_io("qcow2", source, &["write -P 1 64k 64k"]);
        for args in [&["-o", "cluster_size=4k"][..], &["-o", "compat=0.10"], &["-c"]] {
            let args = [&["convert", "-O", "qcow2", "-B", "full.raw", "-F", "raw"], args, &[source]].concat();
            vimg(&[&args[..], &["ours"]].concat()).dir(scratch.path()).ok();
            // What the short file has there is kept: by asking for it the user says that the two are equal.
            judge(&["convert", "-O", "raw", source, "wanted"]).dir(scratch.path()).ok();
            judge(&["convert", "-O", "raw", "ours", "got"]).dir(scratch.path()).ok();
            let (wanted, got) = (fs::read(scratch.file("wanted")).unwrap(), fs::read(scratch.file("got")).unwrap());
            // Of a unit that is compressed nothing is.
            let kept_to = if args.contains(&"-c") { 128 << 10 } else { 300 * 512 };
            let kept = if source == "over" { 0..kept_to } else { 0..0 };
            let differ = (0..wanted.len()).find(|at| {
                let keeps = kept.contains(at) && !(1 << 16..2 << 16).contains(at);
                got[*at] != if keeps { 0xaa } else { wanted[*at] }
            });
            assert_eq!(differ, None, "{source} {args:?}");
        }
    }
}

#[test]
fn a_longer_target_keeps_its_end_when_compressed() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), pattern(3, 70_000 / 512 * 512)).unwrap();
    judge(&["create", "-q", "-f", "qcow2", "t", "1M"]).dir(scratch.path()).ok();
    scratch.qemu_io("qcow2", "t", &["write -P 170 0 1M"]);
    vimg(&["convert", "-n", "-c", "-O", "qcow2", "s.raw", "t"]).dir(scratch.path()).ok();
    judge(&["convert", "-O", "raw", "t", "flat"]).dir(scratch.path()).ok();
    let (flat, source) = (fs::read(scratch.file("flat")).unwrap(), fs::read(scratch.file("s.raw")).unwrap());
    assert!(flat[..source.len()] == source);
    assert!(flat[source.len()..].iter().all(|byte| *byte == 170));
}

/// Blocks that are new at the end of a file read as zeros: what is zero in them is not written. The images are the
/// judge's to the byte (times and ids apart), and take no more of the host's space.
#[test]
fn new_blocks_hold_no_more_than_the_source() {
    use std::os::unix::fs::FileExt;
    let scratch = Scratch::new();
    let source = std::fs::File::create(scratch.file("raw")).unwrap();
    source.set_len(40 << 20).unwrap();
    // Small runs and small holes, then a run that starts and ends within blocks, then a block with one page in it.
    for n in 0..100 {
        source.write_all_at(&pattern(n, 8192), n * 73_728).unwrap();
    }
    source.write_all_at(&pattern(7, 5_500_000), (21 << 20) + 300_000).unwrap();
    source.write_all_at(&pattern(8, 4096), (37 << 20) + 4096).unwrap();
    source.sync_all().unwrap();
    let space = |name: &str| {
        scratch.sh(&format!("sync '{name}'"));
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(scratch.file(name)).unwrap())
    };
    for (format, options, masked) in [
        ("vpc", "subformat=dynamic,force_size=on", "24-27 64-83"),
        ("vpc", "subformat=fixed,force_size=on", "24-27 64-83"),
        ("vdi", "static=off", "392-423"),
        ("vdi", "static=on", "392-423"),
        ("qcow", "size=40M", ""),
    ] {
        for least in ["4k", "512"] {
            let what = format!("{format} {options} -S {least}");
            let args = ["convert", "-S", least, "-f", "raw", "-O", format, "-o", options, "raw"];
            scratch.vimg(&[&args[..], &["ours"]].concat());
            scratch.judge(&[&args[..], &["theirs"]].concat());
            scratch.assert_same_content("raw", "raw", format, "ours");
            let (ours, theirs) = (space("ours"), space("theirs"));
            assert!(ours <= theirs, "{what}: {ours} sectors of the host, qemu-img {theirs}");
            for name in ["ours", "theirs"] {
                let file = std::fs::OpenOptions::new().read(true).write(true).open(scratch.file(name)).unwrap();
                let end = file.metadata().unwrap().len() - 512;
                for range in masked.split_ascii_whitespace() {
                    let (from, to) = range.split_once('-').unwrap();
                    let (from, to): (u64, u64) = (from.parse().unwrap(), to.parse().unwrap());
                    let zeros = vec![0; usize::try_from(to - from + 1).unwrap()];
                    let starts: &[u64] = match (format, options) {
                        ("vpc", "subformat=fixed,force_size=on") => &[end],
                        ("vpc", _) => &[0, end],
                        _ => &[0],
                    };
                    starts.iter().for_each(|start| file.write_all_at(&zeros, start + from).unwrap());
                }
            }
            assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
        }
    }
}

/// Units that are written as a whole hold zeros that their file has already, where it is new.
#[test]
fn zeros_in_large_units_are_not_written() {
    const MIB: u64 = 1 << 20;
    let scratch = Scratch::new();
    let source = fs::File::create(scratch.file("raw")).unwrap();
    source.set_len(64 * MIB).unwrap();
    for n in 0..32 {
        source.write_all_at(&pattern(n, 4096), n * 2 * MIB + n % 5 * 100_000 / 512 * 512).unwrap();
    }
    // Zeros that are no hole.
    source.write_all_at(&vec![0; 3 << 20], 20 * MIB + 4096).unwrap();
    source.write_all_at(&pattern(40, 1 << 20), 50 * MIB + 512).unwrap();
    let space = |name: &str| {
        scratch.sh(&format!("sync '{name}'"));
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(scratch.file(name)).unwrap()) * 512
    };
    for (format, options, tables) in [
        ("qcow2", "cluster_size=2M", 16 * MIB),
        ("qed", "cluster_size=1M,table_size=2", 6 * MIB),
        ("parallels", "cluster_size=1M", 2 * MIB),
        // More than a worker holds.
        ("parallels", "cluster_size=16M", 16 * MIB),
    ] {
        let to = ["-f", "raw", "-O", format];
        let convert = |more: &[&'static str], name| {
            scratch.vimg(&[&["convert"], &to[..], more, &["raw", name]].concat());
            scratch.assert_same_content("raw", "raw", format, name);
            space(name)
        };
        let made = convert(&["-o", options], "made");
        assert!(made < 5 * MIB + tables, "{format} {options}: {made} bytes");
        scratch.vimg(&["create", "-q", "-f", format, "-o", options, "old", "64M"]);
        let old = convert(&["-n"], "old");
        assert!(old < 5 * MIB + tables, "{format} {options}, -n: {old} bytes");
        assert!(convert(&["-n"], "old") <= old, "{format} {options}, -n, twice");
        // Who wants every byte written gets it.
        let full = convert(&["-S", "0", "-o", options], "full");
        assert!(full >= 64 * MIB, "{format} {options}, -S 0: {full} bytes");
    }
}

/// What salvage says, without how often: the reference looks at a map twice.
fn told(stderr: &str) -> Vec<String> {
    let mut lines: Vec<_> = stderr.lines().filter(|line| !line.contains("error while reading offset")).collect();
    lines.sort_unstable();
    lines.dedup();
    lines.into_iter().map(str::to_owned).collect()
}

#[test]
fn salvage_goes_on_where_a_map_cannot_be_read() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), pattern(5, 1 << 20)).unwrap();
    judge(&["convert", "-f", "raw", "-O", "qcow2", "s.raw", "good"]).dir(scratch.path()).ok();
    let header = fs::read(scratch.file("good")).unwrap();
    let l1 = u64::from_be_bytes(header[40..48].try_into().unwrap());
    let entry = usize::try_from(l1).unwrap();
    let l2 = u64::from_be_bytes(header[entry..entry + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    // The third cluster, then all of them.
    for at in [l2 + 16, l1] {
        fs::copy(scratch.file("good"), scratch.file("bad")).unwrap();
        let file = fs::OpenOptions::new().write(true).open(scratch.file("bad")).unwrap();
        file.write_all_at(&0x8000_0000_0012_3456u64.to_be_bytes(), at).unwrap();
        let run = |program: fn(&[&'static str]) -> crate::common::Run, target: &'static str| {
            program(&["convert", "--salvage", "-f", "qcow2", "bad", target]).dir(scratch.path()).ok()
        };
        let (theirs, ours) = (run(judge, "theirs"), run(vimg, "ours"));
        assert_eq!(told(&ours.stderr), told(&theirs.stderr));
        assert_same_bytes(&scratch.file("theirs"), &scratch.file("ours"));
        // On top of something else what is lost becomes zeros too.
        fs::write(scratch.file("ours"), vec![7; 1 << 20]).unwrap();
        vimg(&["convert", "-q", "-n", "--salvage", "-f", "qcow2", "bad", "ours"]).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("theirs"), &scratch.file("ours"));
    }
}

/// What lies below a filter, or within an image that is the file of another, is placed in the guest's order too.
#[test]
fn the_bytes_below_a_filter_are_the_same_for_any_number_of_threads() {
    let scratch = Scratch::new();
    let mut source = pattern(7, 9 << 20);
    source.resize(12 << 20, 0);
    source.extend(pattern(8, 5 << 20).iter().map(|byte| byte & 1));
    fs::write(scratch.file("s.raw"), source).unwrap();
    for driver in ["compress", "raw", "copy-on-read", "preallocate"] {
        let mut files = Vec::new();
        for threads in ["1", "5", "5", "16"] {
            vimg(&["create", "-q", "-f", "qcow2", "t", "17M"]).dir(scratch.path()).ok();
            let target = format!("driver={driver},file.driver=qcow2,file.file.filename=t");
            let args = ["convert", "-n", "-m", threads, "-f", "raw", "--target-image-opts", "s.raw", &target];
            vimg(&args).dir(scratch.path()).ok();
            judge(&["compare", "-f", "raw", "-F", "qcow2", "s.raw", "t"]).dir(scratch.path()).ok();
            files.push(fs::read(scratch.file("t")).unwrap());
        }
        assert!(files.iter().all(|file| *file == files[0]), "{driver}");
    }
}
