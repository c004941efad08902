//! What the host refuses to the program itself: threads, and output that can be written.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::common::run::{links, sh_with};
use crate::common::{Scratch, need, need_root, sh, write_pattern};

/// A user that may have one process, which is the program itself: its one thread does the work.
#[test]
fn no_thread_to_be_had_is_no_error() {
    need("prlimit");
    need("setpriv");
    need_root("running as another user");
    let dir = Scratch::new();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("chmod");
    fs::copy(crate::common::vimg_path(), dir.file("vimg")).expect("copy");
    write_pattern(&dir.file("disk.raw"), 0, 3, 9 << 20);
    // A user id of its own: the limit counts all processes of a user.
    let alone = "prlimit --nproc=1 setpriv --reuid 54321 --regid 54321 --clear-groups ./vimg";
    for options in ["-O qcow2", "-O qcow2 -c", "-O raw -m 16", "-O vdi -p"] {
        let line = format!("rm -f out; {alone} convert -f raw {options} disk.raw out");
        let out = sh(&line).dir(dir.path()).ok();
        assert_eq!(out.stderr, "", "{options}");
        let format = options.split(' ').nth(1).expect("a format");
        dir.assert_same_content("raw", "disk.raw", format, "out");
    }
    // An older file is replaced without the process that makes that sure.
    let out = sh(&format!("{alone} convert -f raw -O qcow2 disk.raw out && {alone} resize -q out 32M")).dir(dir.path());
    out.ok();
}

/// Each line is run with standard error that cannot be written, and one that is closed: the same code and files.
#[test]
fn standard_error_that_cannot_be_written_changes_nothing() {
    let dir = Scratch::new();
    dir.sh("seq 1 500000 | head -c 3000000 > disk.raw; qemu-img convert -c -f raw -O qcow2 disk.raw broken.qcow2");
    // The compressed clusters are damaged: --salvage warns of each sector.
    dir.sh("dd if=/dev/zero of=broken.qcow2 bs=1 seek=400000 count=20000 conv=notrunc status=none");
    dir.sh("qemu-img create -q -f qcow2 -b disk.raw -F raw top.qcow2");
    let run = |line: &str| {
        let line = format!("rm -f out; {line}; code=$?; cat out 2>/dev/null | md5sum; exit $code");
        sh_with(links(), &line).dir(dir.path()).run()
    };
    for (line, code) in [
        ("qemu-img convert --salvage -f qcow2 -O raw broken.qcow2 out", 0),
        ("qemu-img convert -f qcow2 -O raw broken.qcow2 out", 1),
        ("qemu-img convert --bogus", 1),
        ("qemu-img bogus", 1),
        ("qemu-img info missing", 1),
        ("qemu-img convert -l snapshot.id=1,snapshot.name -O raw top.qcow2 out", 1),
        ("qemu-img create -f bogus out 1M", 1),
        ("qemu-img resize top.qcow2 1k", 1),
        ("qemu-img info --trace '*' top.qcow2", 1),
        ("qemu-img -T bogus info top.qcow2", 0),
    ] {
        let plain = run(line);
        assert_eq!(plain.code, Some(code), "{plain:?}");
        assert_ne!(plain.stderr, "", "{line} says something");
        for redirection in ["2>/dev/full", "2>&-"] {
            let out = run(&format!("{line} {redirection}"));
            assert_eq!((out.code, &out.stdout, &*out.stderr), (plain.code, &plain.stdout, ""), "{line} {redirection}");
        }
    }
}

/// What was printed and got nowhere is a failure; a reader that went away, and a closed output, are the caller's wish.
#[test]
fn standard_output_that_cannot_be_written_is_a_failure() {
    let dir = Scratch::new();
    dir.sh("qemu-img create -q -f qcow2 a.qcow2 1M");
    let run = |line: &str| sh_with(links(), line).dir(dir.path()).run();
    for line in ["info a.qcow2", "--help", "--version", "create -f raw b 1M", "create -o help", "resize a.qcow2 2M"] {
        let full = run(&format!("qemu-img {line} >/dev/full"));
        let text = "qemu-img: Could not write to standard output: No space left on device\n";
        assert_eq!((full.code, &*full.stderr), (Some(1), text), "{line}");
        let both = run(&format!("qemu-img {line} >/dev/full 2>/dev/full"));
        assert_eq!(both.code, Some(1), "{line}");
        for line in [
            format!("qemu-img {line} >&-"),
            format!("{{ sleep 0.1; qemu-img {line}; echo $? >code; }} | true; exit $(cat code)"),
        ] {
            let out = run(&line);
            assert_eq!((out.code, &*out.stdout, &*out.stderr), (Some(0), "", ""), "{line}");
        }
    }
    // None of the files of a conversion takes the place of a closed stream; the image is whole in any case.
    dir.sh("head -c 3000000 /dev/urandom > disk.raw");
    for (streams, code) in [(">/dev/full", 1), (">&-", 0), (">&- 2>&-", 0), ("<&- >&- 2>&-", 0)] {
        let out = run(&format!("rm -f out; qemu-img convert -p -f raw -O qcow2 disk.raw out {streams}"));
        assert_eq!(out.code, Some(code), "{streams}: {out:?}");
        dir.assert_same_content("raw", "disk.raw", "qcow2", "out");
    }
}

#[test]
fn convert_writes_to_pipes() {
    let dir = Scratch::new();
    dir.sh("qemu-img create -q -f qcow2 a.qcow2 40M");
    dir.qemu_io("qcow2", "a.qcow2", &["write -P 7 1M 9M", "write -P 8 30M 100k"]);
    let run = |line: &str| sh_with(links(), line).dir(dir.path()).run();
    let piped = |arguments: &str| {
        run(&format!("{{ qemu-img convert {arguments} /dev/stdout; echo $? >code; }} | cat >out; exit $(cat code)"))
    };
    let out = piped("-m 16 -O raw a.qcow2");
    assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""));
    dir.assert_same_content("qcow2", "a.qcow2", "raw", "out");
    dir.sh("test $(stat -c %s out) = 41943040");
    // What has another order is the file that it would be.
    for (format, options) in [("qcow2", "-c"), ("vmdk", "-o subformat=streamOptimized"), ("vdi", "")] {
        let out = piped(&format!("-O {format} {options} a.qcow2"));
        assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{format}");
        dir.assert_same_content("qcow2", "a.qcow2", format, "out");
    }
    for (arguments, text) in [
        ("-O vmdk -o subformat=monolithicFlat a.qcow2", "the image would have several files"),
        ("-O raw -o preallocation=full a.qcow2", "the options of a new raw file mean nothing to it"),
        ("-p -O raw a.qcow2", "is where -p prints to"),
        ("-O qcow2 --verify a.qcow2", "is a pipe: it cannot be read back (--verify)"),
    ] {
        let out = piped(arguments);
        assert!(out.code == Some(1) && out.stderr.contains(text), "{arguments}: {out:?}");
    }
    // A file in its place too: what is printed would go over the image.
    for (arguments, text) in [
        ("-p -O raw a.qcow2", "is where -p prints to"),
        ("-p -O qcow2 a.qcow2", "is where -p prints to"),
        ("-p -n -O raw a.qcow2", "is where -p prints to"),
    ] {
        let out = run(&format!("truncate -s 40M x; qemu-img convert {arguments} /dev/stdout >>x"));
        assert!(out.code == Some(1) && out.stderr.contains(text), "{arguments}: {out:?}");
        dir.sh("test $(stat -c %s x) = 41943040 && rm x");
    }
    for (option, way) in [
        ("--digest=sha256", ">x"),
        ("--output=json", ">x"),
        ("--digest=sha256", "| cat >x"),
        ("--progress=json:1", ">x"),
        ("--progress=json:1", "| cat >x"),
        ("--progress=json:3", "3>&1 | cat >x"),
    ] {
        let told = option.starts_with("--output");
        let program = crate::common::vimg_path().display().to_string();
        let line = format!("{{ '{program}' convert {option} -O raw a.qcow2 /dev/stdout; echo $? >code; }} {way}");
        let out = run(&line);
        let wanted =
            format!("is where {} prints to", option.trim_end_matches("=sha256").trim_end_matches([':', '1', '3']));
        let said = if told { fs::read_to_string(dir.file("x")).unwrap() } else { out.stderr.clone() };
        assert!(
            said.contains(&wanted) && fs::read_to_string(dir.file("code")).unwrap() == "1\n",
            "{option}: {out:?} {said}"
        );
        if !told {
            dir.sh("test ! -s x");
        }
    }
    // Nobody waits for what will not come: the source is cut off, or the reader has gone.
    dir.sh("truncate -s 5M a.qcow2");
    let cut = piped("-m 16 -O raw a.qcow2");
    assert!(cut.code == Some(1) && cut.stderr.contains("truncated"), "{cut:?}");
    dir.sh("truncate -s 40M b");
    let gone = run(
        "{ qemu-img convert -m 16 -f raw -O raw b /dev/stdout; echo $? >code; } | head -c 1000 >out; exit $(cat code)",
    );
    assert!(gone.code == Some(1) && gone.stderr.contains("Broken pipe"), "{gone:?}");
}

/// Without a temporary file: there is no folder for one. Any number of threads.
#[test]
fn what_goes_through_a_pipe_is_the_file_that_goes_to_a_path() {
    let dir = Scratch::new();
    // Data, holes, zeros that are stored, and an end within a cluster.
    dir.sh("qemu-img create -q -f qcow2 a.qcow2 40000512; mkdir path pipe; mkfifo pipe/out");
    let data = ["write -P 7 1M 9M", "write -P 8 30M 100k", "write -P 9 31000k 3k", "write -z 2M 1M"];
    dir.qemu_io("qcow2", "a.qcow2", &[&data[..], &["write -P 3 39900160 100352", "write -P 0 3M 200k"]].concat());
    dir.sh("qemu-img bitmap --add a.qcow2 b0");
    dir.qemu_io("qcow2", "a.qcow2", &["write -P 10 20M 64k"]);
    let program = crate::common::vimg_path().display().to_string();
    // A run that is read at once and lies in two grain tables.
    dir.sh("truncate -s 40M b.raw; head -c 2M /dev/urandom | dd of=b.raw bs=64k seek=497 conv=notrunc status=none");
    let run = |folder: &str, threads: u32, options: &str| {
        let source = if options.ends_with("raw") && options.contains("stream") { "../b.raw" } else { "../a.qcow2" };
        let line = format!(
            "cd {folder}; {{ TMPDIR=/missing SOURCE_DATE_EPOCH=1000000000 '{program}' convert --reproducible -m {threads} \
             {options} {source} out; echo $? >code; [ $(cat code) = 0 ] || : <>out; }} {}; exit $(cat code)",
            if folder == "pipe" { "& cat <out >got; wait" } else { "" }
        );
        sh(&line).dir(dir.path()).run()
    };
    for options in [
        "-O raw",
        "-O raw -S 0",
        "-O vpc -o subformat=fixed",
        "-O vpc -o subformat=fixed,force_size=on",
        "-O vmdk -o subformat=streamOptimized",
        "-O vmdk -o subformat=streamOptimized -f raw",
        "-O qcow2",
        "-O qcow2 --bitmaps",
        "-O qcow2 -S 64k",
        // Its refcount table grows, and moves.
        "-O qcow2 -o cluster_size=512",
        "-O qcow2 -o cluster_size=2M",
        "-O qcow2 -o extended_l2=on",
        "-O qcow2 -o preallocation=metadata",
        "-O qcow2 -o compat=0.10",
        "-O vdi",
        "-O vdi -o static=on",
        "-O vhdx",
        "-O vpc",
        "-O vmdk",
        "-O qed",
        "-O parallels",
        "-O qcow",
    ] {
        let made = run("path", 1, options);
        assert_eq!((made.code, made.stderr.as_str()), (Some(0), ""), "{options}");
        for threads in [1, 8] {
            let out = run("pipe", threads, options);
            assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{options}");
            dir.sh("cmp path/out pipe/got");
        }
    }
    // Here the lengths of what is encoded would have to be found out twice.
    let out = run("pipe", 2, "--no-space-check -O qcow2 -c");
    assert!(out.code == Some(1) && out.stderr.contains("in a temporary file"), "{out:?}");
    // And here what is in a backing file told, which is named from where we are.
    let overlay = "-O qcow2 -B ../a.qcow2 -F qcow2";
    for (folder, threads) in [("path", 1), ("pipe", 8)] {
        let out = run(folder, threads, overlay);
        assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{folder}");
    }
    dir.sh("cmp path/out pipe/got; [ \"$(ls -A pipe | tr '\\n' ' ')\" = 'code got out ' ]");
}
