//! Images that were cut off: what is missing is an error, never zeros that nobody asked for. What is written to them is in
//! `written`.

mod written;

use std::fs;
use std::io::Read;
use std::path::Path;

use crate::common::trace::disturbed_at;
use crate::common::{Scratch, judge, pattern, vimg, vimg_path, write_pattern};

/// A kind of image: format, how qemu-img makes it of `s.raw`, the file that is cut, and the unit of the last part of
/// a file that writers may leave out.
struct ErrorKind {
    name: &'static str,
    format: &'static str,
    make: &'static str,
    cut: &'static str,
    unit: u64,
}

const fn kind(name: &'static str, format: &'static str, make: &'static str, cut: &'static str, unit: u64) -> ErrorKind {
    ErrorKind { name, format, make, cut, unit }
}

impl ErrorKind {
    fn make(&self, scratch: &Scratch) {
        // The reference cannot make every kind.
        scratch.sh(&format!("vimg() {{ '{}' \"$@\"; }}; {}", vimg_path().display(), self.make));
    }
}

const KINDS: [ErrorKind; 19] = [
    kind("qcow2", "qcow2", "qemu-img convert -f raw -O qcow2 s.raw i", "i", 65536),
    kind("small clusters", "qcow2", "qemu-img convert -f raw -O qcow2 -o cluster_size=512 s.raw i", "i", 512),
    kind("subclusters", "qcow2", "qemu-img convert -f raw -O qcow2 -o extended_l2=on s.raw i", "i", 65536),
    kind("compressed qcow2", "qcow2", "qemu-img convert -c -f raw -O qcow2 s.raw i", "i", 512),
    kind("data file", "qcow2", "qemu-img convert -f raw -O qcow2 -o data_file=d s.raw i", "d", 65536),
    kind(
        "raw data file",
        "qcow2",
        "qemu-img convert -f raw -O qcow2 -o data_file=d,data_file_raw=on s.raw i",
        "d",
        65536,
    ),
    kind("qcow", "qcow", "qemu-img convert -f raw -O qcow s.raw i", "i", 512),
    kind("compressed qcow", "qcow", "vimg convert -c -f raw -O qcow s.raw i", "i", 512),
    kind("qed", "qed", "qemu-img convert -f raw -O qed s.raw i", "i", 512),
    kind("parallels", "parallels", "qemu-img convert -f raw -O parallels s.raw i", "i", 512),
    kind("vdi", "vdi", "qemu-img convert -f raw -O vdi s.raw i", "i", 512),
    kind("static vdi", "vdi", "qemu-img convert -f raw -O vdi -o static=on s.raw i", "i", 512),
    kind("vpc", "vpc", "qemu-img convert -f raw -O vpc s.raw i", "i", 512),
    kind("vhdx", "vhdx", "qemu-img convert -f raw -O vhdx -o block_size=1M s.raw i", "i", 512),
    kind("fixed vhdx", "vhdx", "qemu-img convert -f raw -O vhdx -o subformat=fixed,block_size=1M s.raw i", "i", 512),
    kind("vmdk", "vmdk", "qemu-img convert -f raw -O vmdk s.raw i", "i", 512),
    kind(
        "split vmdk",
        "vmdk",
        "qemu-img convert -f raw -O vmdk -o subformat=twoGbMaxExtentSparse s.raw i",
        "i-s001",
        512,
    ),
    kind("flat vmdk", "vmdk", "qemu-img convert -f raw -O vmdk -o subformat=monolithicFlat s.raw i", "i-flat", 512),
    kind(
        "stream-optimized vmdk",
        "vmdk",
        "qemu-img convert -f raw -O vmdk -o subformat=streamOptimized s.raw i",
        "i",
        512,
    ),
];

const SIZE: usize = 3_000_320;

/// Data that compresses to about half.
fn source(scratch: &Scratch) -> Vec<u8> {
    let mut disk = pattern(3, SIZE);
    disk.chunks_mut(128).for_each(|chunk| chunk[64..].fill(b'z'));
    fs::write(scratch.file("s.raw"), &disk).unwrap();
    disk
}

fn cut(file: &Path, len: u64) {
    fs::OpenOptions::new().write(true).open(file).unwrap().set_len(len).unwrap();
}

#[test]
fn a_cut_source_is_refused_or_complete_wherever_it_is_cut() {
    for kind in &KINDS {
        let scratch = Scratch::new();
        let disk = source(&scratch);
        kind.make(&scratch);
        let file = scratch.file(kind.cut);
        let whole = fs::metadata(&file).unwrap().len();
        let (mut refused, mut named) = (0, 0);
        for part in (0..=16).rev() {
            cut(&file, (whole * part / 16).next_multiple_of(kind.unit).min(whole));
            let out = vimg(&["convert", "-f", kind.format, "-O", "raw", "i", "o"]).dir(scratch.path()).run();
            if out.code == Some(0) {
                let mut read = fs::read(scratch.file("o")).unwrap();
                assert!(read[SIZE..].iter().all(|byte| *byte == 0));
                read.truncate(SIZE);
                assert!(read == disk, "{}: {part}/16 of the file give another disk", kind.name);
                fs::remove_file(scratch.file("o")).unwrap();
                continue;
            }
            assert!(!scratch.file("o").exists());
            refused += 1;
            let said = format!("{}: error while", kind.cut);
            named += usize::from(out.stderr.contains(&said) && out.stderr.contains("the file is truncated"));
        }
        assert!(refused >= 15, "{}: {refused} of 16 cuts were refused", kind.name);
        // vpc says it when it is opened, and so do others where tables or the footer are gone.
        let opens = !matches!(kind.name, "vpc" | "stream-optimized vmdk");
        assert!(!opens || named >= 8, "{}: {named} of {refused} say which file, and why", kind.name);
    }
}

#[test]
fn what_writers_leave_short_is_whole() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), pattern(3, 1_000_448)).unwrap();
    // The last cluster is written as far as the guest wrote: a subcluster of it.
    scratch.sh("qemu-img create -q -f qcow2 -o extended_l2=on i 1M && qemu-io -c 'write -P 7 512k 512' i");
    let len = fs::metadata(scratch.file("i")).unwrap().len();
    assert_ne!(len % 65536, 0);
    let out = scratch.vimg(&["convert", "-O", "raw", "i", "o"]);
    assert_eq!(out.stderr, "");
    scratch.assert_same_content("qcow2", "i", "raw", "o");
    // A whole cluster of which only the first bytes are there.
    scratch.sh("qemu-img create -q -f qcow2 j 1M && qemu-io -c 'write -P 7 512k 64k' j");
    cut(&scratch.file("j"), fs::metadata(scratch.file("j")).unwrap().len() - 60000);
    scratch.vimg(&["convert", "-O", "raw", "j", "p"]);
    scratch.assert_same_content("qcow2", "j", "raw", "p");
    // raw ends inside a sector.
    fs::write(scratch.file("r"), pattern(1, 100_001)).unwrap();
    assert_eq!(scratch.vimg(&["convert", "-f", "raw", "-O", "raw", "r", "q"]).stderr, "");
    scratch.assert_same_content("raw", "r", "raw", "q");
}

/// Where units are written as a whole, a part of a sector is missing too.
#[test]
fn a_cut_within_the_last_sector_is_seen() {
    for format in ["vdi", "qed", "parallels", "qcow", "vmdk", "vhdx"] {
        let scratch = Scratch::new();
        fs::write(scratch.file("s.raw"), pattern(3, 4 << 20)).unwrap();
        // Its blocks may be longer than the disk.
        let options = if format == "vhdx" { "-o block_size=1M" } else { "" };
        scratch.sh(&format!("qemu-img convert -f raw -O {format} {options} s.raw i"));
        let len = fs::metadata(scratch.file("i")).unwrap().len();
        for missing in [1, 511] {
            cut(&scratch.file("i"), len - missing);
            let out = vimg(&["convert", "-f", format, "-O", "raw", "i", "o"]).dir(scratch.path()).fails(1);
            assert!(
                out.stderr.contains("i: error while reading at byte") && out.stderr.contains("the file is truncated")
            );
            assert!(!scratch.file("o").exists(), "{format}: {missing}");
            vimg(&["compare", "-f", format, "-F", "raw", "i", "s.raw"]).dir(scratch.path()).fails(4);
            // Nothing can be made of a part.
            let before = fs::read(scratch.file("i")).unwrap();
            for repair in [&[][..], &["-r", "leaks"], &["-r", "all"]] {
                vimg(&[&["check", "-q"], repair, &["i"]].concat()).dir(scratch.path()).fails(2);
            }
            assert!(fs::read(scratch.file("i")).unwrap() == before, "{format}: {missing}");
        }
    }
}

/// How the judge makes an encrypted image, and how it is opened.
const ENCRYPTED: [(&str, &str); 5] = [
    ("luks -o key-secret=s,iter-time=1", "driver=luks,key-secret=s,file.filename=i"),
    (
        "qcow2 -o encrypt.format=luks,encrypt.iter-time=1,encrypt.key-secret=s",
        "driver=qcow2,encrypt.key-secret=s,file.filename=i",
    ),
    ("qcow2 -o encrypt.format=aes,encrypt.key-secret=s", "driver=qcow2,encrypt.key-secret=s,file.filename=i"),
    (
        "qcow2 -o extended_l2=on,encrypt.format=aes,encrypt.key-secret=s",
        "driver=qcow2,encrypt.key-secret=s,file.filename=i",
    ),
    ("qcow -o encrypt.format=aes,encrypt.key-secret=s", "driver=qcow,encrypt.key-secret=s,file.filename=i"),
];

/// What is missing of an encrypted sector would read as anything.
#[test]
fn a_cut_within_the_last_sector_of_an_encrypted_source_is_refused() {
    let secret = ["--object", "secret,id=s,data=abc"];
    for (make, image) in ENCRYPTED {
        let scratch = Scratch::new();
        let disk = pattern(3, 256 << 10);
        fs::write(scratch.file("s.raw"), &disk).unwrap();
        scratch.sh(&format!("qemu-img convert --object {} -f raw -O {make} s.raw i", secret[1]));
        let len = fs::metadata(scratch.file("i")).unwrap().len();
        // At the end of a sector nothing is seen in luks: it has the length of its file. Nor where all that is left of
        // the sector happens to be zeros, as one byte often is.
        let cuts: &[u64] = if make.starts_with("luks") { &[1, 100, 480] } else { &[1, 100, 511, 512, 700] };
        for &missing in cuts {
            cut(&scratch.file("i"), len - missing);
            let convert = |more: &[&str]| {
                let args = [&["convert"], more, &secret, &["--image-opts", image, "-O", "raw", "o"]].concat();
                vimg(&args).dir(scratch.path()).run()
            };
            let out = convert(&[]);
            assert!(out.code == Some(1) && !scratch.file("o").exists(), "{make}: {missing}: {out:?}");
            assert!(out.stderr.contains("i: error while") && out.stderr.contains("the file is truncated"), "{out:?}");
            let out = convert(&["--salvage"]);
            assert!(out.code == Some(0) && out.stderr.contains("it is read as zeros"), "{make}: {missing}: {out:?}");
            let read = fs::read(scratch.file("o")).unwrap();
            let (there, gone) = disk.split_at(disk.len() - missing.next_multiple_of(512) as usize);
            assert!(read[..there.len()] == *there && read[there.len()..] == vec![0; gone.len()], "{make}: {missing}");
            fs::remove_file(scratch.file("o")).unwrap();
        }
    }
}

/// The last sector of a new disk, and that where a disk is cut off by its user.
#[test]
fn a_luks_disk_that_does_not_end_with_a_sector_is_whole() {
    let scratch = Scratch::new();
    let secret = ["--object", "secret,id=s,data=abc"];
    let image = "driver=luks,key-secret=s,file.filename=i";
    let convert = || {
        let args = [&["convert"], &secret[..], &["--image-opts", image, "-O", "raw", "o"]].concat();
        assert_eq!(vimg(&args).dir(scratch.path()).ok().stderr, "");
        fs::read(scratch.file("o")).unwrap()
    };
    let options = ["-q", "-f", "luks", "-o", "key-secret=s,iter-time=1", "i", "5000"];
    scratch.judge(&[&["create"], &secret[..], &options].concat());
    assert_eq!(convert().len(), 5120);
    let disk = pattern(3, 10 << 10);
    fs::write(scratch.file("s"), &disk).unwrap();
    let onto = ["-n", "--target-image-opts", "-f", "raw", "s"];
    let resize = |args: &[&str]| {
        vimg(&[&["resize", "-q", "--image-opts"], &secret[..], args].concat()).dir(scratch.path()).run()
    };
    assert_eq!(resize(&[image, "10k"]).code, Some(0));
    vimg(&[&["convert"], &secret[..], &onto, &[image]].concat()).dir(scratch.path()).ok();
    assert_eq!(resize(&["--shrink", image, "5000"]).code, Some(0));
    assert!(convert() == disk[..5120]);
    // What was cut does not become whole by growing; it can be given up.
    let file = scratch.file("i");
    cut(&file, fs::metadata(&file).unwrap().len() - 1);
    let out = resize(&[image, "10k"]);
    assert!(out.code == Some(1) && out.stderr.contains("the file is truncated"), "{out:?}");
    assert_eq!(resize(&["--shrink", image, "4608"]).code, Some(0));
    assert!(convert() == disk[..4608]);
}

#[test]
fn salvage_reads_a_cut_source_with_a_warning_for_each_range() {
    // Half a qed has data, and no table that names it. The reference does not open half a vhdx.
    let not = |kind: &ErrorKind| kind.format == "vhdx" || matches!(kind.name, "vpc" | "stream-optimized vmdk" | "qed");
    for kind in KINDS.iter().filter(|kind| !not(kind)) {
        let scratch = Scratch::new();
        source(&scratch);
        kind.make(&scratch);
        let file = scratch.file(kind.cut);
        cut(&file, (fs::metadata(&file).unwrap().len() / 2).next_multiple_of(kind.unit));
        let out = scratch.vimg(&["convert", "--salvage", "-f", kind.format, "-O", "raw", "i", "o"]);
        let lines: Vec<&str> = out.stderr.lines().collect();
        assert!((1..=2).contains(&lines.len()) || kind.name.starts_with("compressed"), "{}: {lines:?}", kind.name);
        let warned = |line: &str| line.starts_with("qemu-img: warning: ") && line.contains("it is read as zeros");
        assert!(lines.iter().all(|line| warned(line)), "{}: {lines:?}", kind.name);
        // What the reference reads, which takes what is missing for zeros, but cannot decode half a unit.
        if !kind.name.starts_with("compressed") {
            scratch.judge(&["convert", "-f", kind.format, "-O", "raw", "i", "theirs"]);
            assert!(fs::read(scratch.file("o")).unwrap() == fs::read(scratch.file("theirs")).unwrap(), "{}", kind.name);
        }
    }
}

#[test]
fn info_warns_of_a_cut_image_and_prints_what_the_reference_prints() {
    let not = |kind: &ErrorKind| kind.format == "vhdx" || matches!(kind.name, "vpc" | "stream-optimized vmdk" | "qed");
    for kind in KINDS.iter().filter(|kind| !not(kind)) {
        let scratch = Scratch::new();
        source(&scratch);
        kind.make(&scratch);
        assert_eq!(scratch.vimg(&["info", "-f", kind.format, "i"]).stderr, "", "{}", kind.name);
        let file = scratch.file(kind.cut);
        cut(&file, (fs::metadata(&file).unwrap().len() / 2).next_multiple_of(kind.unit));
        let ours = scratch.vimg(&["info", "-f", kind.format, "i"]);
        let theirs = judge(&["info", "-f", kind.format, "i"]).dir(scratch.path()).ok();
        assert_eq!(ours.stdout, theirs.stdout, "{}", kind.name);
        let warned = ours.stderr.starts_with("qemu-img: warning: ") && ours.stderr.contains("the file is truncated");
        assert!(warned && ours.stderr.lines().count() == 1, "{}: {}", kind.name, ours.stderr);
    }
}

/// The map itself is past the end: who asks for it is told of which file. (`info` needs the header alone.)
#[test]
fn a_missing_table_is_told_with_its_file() {
    let scratch = Scratch::new();
    source(&scratch);
    scratch.sh("qemu-img convert -f raw -O qcow2 s.raw base && qemu-img create -q -f qcow2 -b base -F qcow2 i");
    let bytes = fs::read(scratch.file("base")).unwrap();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let first = word(40);
    let second = word(first as usize) & 0x00ff_ffff_ffff_fe00;
    for (end, what) in [(second, "L2 table"), (first, "L1 table")] {
        cut(&scratch.file("base"), end);
        let told = format!(
            "base: error while reading block status at offset 0: the file is truncated: {what} at offset {end} lies past its end at {end}\n"
        );
        for image in ["base", "i"] {
            for (args, before) in
                [(&["map", "--output=json"][..], "Could not read file metadata: "), (&["measure", "-O", "qcow2"], "")]
            {
                let out = vimg(&[args, &[image]].concat()).dir(scratch.path()).run();
                assert_eq!((out.code, out.stderr), (Some(1), format!("qemu-img: {before}{told}")), "{args:?} {image}");
            }
            let out = vimg(&["convert", "-O", "raw", image, "o"]).dir(scratch.path()).run();
            assert_eq!((out.code, out.stderr), (Some(1), format!("qemu-img: {told}")));
        }
    }
}

#[test]
fn a_cut_backing_file_is_an_error_too() {
    let scratch = Scratch::new();
    source(&scratch);
    scratch.sh("qemu-img convert -f raw -O qcow2 s.raw base && qemu-img create -q -f qcow2 -b base -F qcow2 i");
    let file = scratch.file("base");
    cut(&file, 20 * 65536);
    let out = vimg(&["convert", "-O", "qcow2", "i", "o"]).dir(scratch.path()).run();
    assert_eq!(out.code, Some(1));
    assert!(
        out.stderr.contains("base: error while reading at byte 983040: the file is truncated: data at offset 1310720"),
        "{}",
        out.stderr
    );
    assert!(!scratch.file("o").exists());
}

/// A source that somebody cuts short while it is converted, at any time: an error that names it and where it ends, and
/// no target; never a crash, and never zeros in place of what is gone.
#[test]
fn cut_while_it_is_converted() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk.raw"), 0, 5, 9 << 20);
    scratch.judge(&["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let folder = scratch.file("work");
    fs::create_dir(&folder).expect("a folder");
    for (format, threads, target) in [("raw", "1", "qcow2"), ("qcow2", "3", "raw"), ("raw", "4", "raw")] {
        let (whole, source) = (scratch.file(&format!("disk.{format}")), folder.join("source"));
        let args = ["convert", "-m", threads, "-f", format, "-O", target, "source", "target"];
        let (mut whole_ones, mut told) = (0, 0);
        for end in [0, (4 << 20) + 1000] {
            let mut n = 1;
            loop {
                let _ = fs::remove_file(folder.join("target"));
                fs::copy(&whole, &source).expect("copy");
                let cut = || fs::OpenOptions::new().write(true).open(&source).expect("open").set_len(end).expect("cut");
                let Some((code, said)) = disturbed_at(&folder, &args, n, cut) else { break };
                let when = format!("{format} cut to {end} at call {n}: {said}");
                if code == 0 {
                    // All of it was read before; or it was not opened yet, and is a disk of that size.
                    let shorter = vimg(&["convert", "-f", format, "-O", "raw", "source", "shorter"]).dir(&folder).run();
                    vimg(&["convert", "-f", target, "-O", "raw", "target", "got"]).dir(&folder).ok();
                    let got = fs::read(folder.join("got")).expect("read");
                    let is_shorter = shorter.code == Some(0) && got == fs::read(folder.join("shorter")).expect("read");
                    assert!(is_shorter || got == fs::read(scratch.file("disk.raw")).expect("read"), "{when}");
                    whole_ones += 1;
                } else {
                    assert!(code == 1 && !folder.join("target").exists(), "{code}: {when}");
                    told += usize::from(said.contains("source: the file was cut short at offset"));
                    assert!(said.contains("source"), "{when}");
                }
                n += 13;
            }
        }
        assert!(whole_ones > 0 && told > 3, "{format}: {whole_ones} whole, {told} told");
    }
}

/// The same where nothing is written: neither are the disks identical, since zeros are read in place of what is gone,
/// nor do they differ for that.
#[test]
fn cut_while_it_is_compared_or_piped() {
    const END: u64 = (4 << 20) + 1000;
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk.raw"), 0, 5, 9 << 20);
    scratch.sh("cp disk.raw half.raw && truncate -s 4195304 half.raw && truncate -s 9M half.raw");
    scratch.judge(&["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let folder = scratch.file("work");
    fs::create_dir(&folder).expect("a folder");
    let source = folder.join("source");
    let compare = |format, other| vec!["compare", "-f", format, "-F", "raw", "source", other];
    let pipe = vec!["dd", "-f", "raw", "bs=1M", "if=source", "of=../pipe"];
    scratch.sh("mkfifo pipe");
    // It is never without a reader, nor without a writer: that is open for both.
    let mut end = fs::OpenOptions::new().read(true).write(true).open(scratch.file("pipe")).expect("open");
    std::thread::spawn(move || while end.read(&mut [0; 1 << 16]).is_ok() {});
    // What nobody may be told of a source that was open when it was cut.
    for (format, args, wrong) in [
        ("raw", compare("raw", "../disk.raw"), 1),
        ("raw", compare("raw", "../half.raw"), 0),
        ("qcow2", compare("qcow2", "../disk.raw"), 1),
        ("raw", pipe, i32::MAX),
    ] {
        let (mut n, mut told) = (1, 0);
        loop {
            fs::copy(scratch.file(&format!("disk.{format}")), &source).expect("copy");
            let cut = || cut(&source, END);
            let Some((code, said)) = disturbed_at(&folder, &args, n, cut) else { break };
            let when = format!("{args:?} cut at call {n}: {code}: {said}");
            assert!(told == 0 || code != wrong, "{when}");
            if said.contains("source: the file was cut short at offset 4195304 while it was read") {
                assert_eq!(code, if args[0] == "dd" { 1 } else { 4 }, "{when}");
                told += 1;
            }
            assert!(code < 2 || said.contains("source"), "{when}");
            n += 11;
        }
        assert!(told > 2, "{args:?}: {told} told");
    }
}
