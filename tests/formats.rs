//! Every pair of formats, each in all its kinds: what vimg makes of one is, in the other, the same disk by
//! `qemu-img compare` both ways, clean by `qemu-img check`, and the same to readers that are neither vimg nor QEMU.
//!
//! Then the bytes: what qemu-img writes deterministically vimg writes too, and what has ids and times in it is the
//! same at every run under `SOURCE_DATE_EPOCH`.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::{Scratch, assert_same_bytes, judge, need, pattern, vimg};

/// A kind of image.
struct Kind {
    format: &'static str,
    options: &'static str,
    /// What the virtual size may be larger than the source's: a whole number of cylinders.
    rounds: bool,
    /// The largest disk, in GiB: the format's limit, or what the judge compares in a second or two (it goes
    /// through empty qcow and vmdk images cluster by cluster).
    most: u64,
    /// Readers of its own.
    readers: &'static [Reader],
}

/// Readers that are neither vimg nor QEMU.
#[derive(Clone, Copy, PartialEq)]
enum Reader {
    /// `7z -t` that type; the whole content.
    SevenZip(&'static str),
    /// libyal's information tool: it must know the image and its size.
    Info(&'static str),
}

use Reader::{Info, SevenZip};

const T: u64 = 1 << 10;

const KINDS: &[Kind] = &[
    Kind { format: "raw", options: "", rounds: false, most: 5 * T, readers: &[] },
    Kind { format: "qcow", options: "", rounds: false, most: 4, readers: &[SevenZip("qcow"), Info("qcowinfo")] },
    Kind { format: "qcow2", options: "", rounds: false, most: 5 * T, readers: &[SevenZip("qcow"), Info("qcowinfo")] },
    vmdk("subformat=monolithicSparse", 40, &[SevenZip("vmdk"), Info("vmdkinfo")]),
    vmdk("subformat=monolithicFlat", 5 * T, &[Info("vmdkinfo")]),
    vmdk("subformat=twoGbMaxExtentSparse", 40, &[SevenZip("vmdk"), Info("vmdkinfo")]),
    vmdk("subformat=twoGbMaxExtentFlat", 40, &[Info("vmdkinfo")]),
    vmdk("subformat=streamOptimized", 40, &[SevenZip("vmdk"), Info("vmdkinfo")]),
    Kind { format: "vdi", options: "", rounds: false, most: T / 2, readers: &[SevenZip("vdi")] },
    Kind { format: "vdi", options: "static=on", rounds: false, most: T / 2, readers: &[SevenZip("vdi")] },
    vpc("subformat=dynamic", true),
    vpc("subformat=fixed", true),
    vpc("subformat=dynamic,force_size=on", false),
    vpc("subformat=fixed,force_size=on", false),
];

const fn vmdk(options: &'static str, most: u64, readers: &'static [Reader]) -> Kind {
    Kind { format: "vmdk", options, rounds: false, most, readers }
}

const fn vpc(options: &'static str, rounds: bool) -> Kind {
    Kind { format: "vpc", options, rounds, most: 2040, readers: &[SevenZip("vhd"), Info("vhdiinfo")] }
}

impl Kind {
    fn convert(&self, scratch: &Scratch, program: Program, from: (&str, &str), to: &str) {
        let mut args = vec!["convert", "-f", from.0, "-O", self.format];
        if !self.options.is_empty() {
            args.extend(["-o", self.options]);
        }
        args.extend([from.1, to]);
        match program {
            Program::Vimg => scratch.vimg(&args),
            Program::Judge => scratch.judge(&args),
        };
    }

    fn name(&self) -> String {
        format!("{} {}", self.format, self.options)
    }
}

#[derive(Clone, Copy)]
enum Program {
    Vimg,
    Judge,
}

/// Both read the same, and what one has more is zeros.
fn assert_same(scratch: &Scratch, what: &str, a: (&str, &str), b: (&str, &str)) {
    for ((format, name), (other_format, other)) in [(a, b), (b, a)] {
        let out = judge(&["compare", "-f", format, "-F", other_format, name, other]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(0), "{what}: {out:?}");
        assert!(out.stdout.ends_with("Images are identical.\n"), "{what}: {out:?}");
    }
}

fn assert_clean(scratch: &Scratch, what: &str, format: &str, name: &str) {
    let out = judge(&["check", "-f", format, name]).dir(scratch.path()).run();
    // 63: the format has no check.
    assert!(matches!(out.code, Some(0 | 63)), "{what}: {out:?}");
}

fn virtual_size(scratch: &Scratch, format: &str, name: &str) -> u64 {
    let out = judge(&["info", "-f", format, "--output=json", name]).dir(scratch.path()).ok();
    out.json()["virtual-size"].as_u64().expect("a size")
}

/// What others say of an image.
fn assert_readers_agree(scratch: &Scratch, kind: &Kind, image: &str, raw: &str, whole: bool) {
    let size = virtual_size(scratch, kind.format, image);
    for reader in kind.readers {
        match *reader {
            SevenZip(name) if whole => {
                need("7z");
                scratch.sh(&format!("7z x -so -t{name} {image} 2>7z.log | cp --sparse=always /dev/stdin seven.raw"));
                assert_same(scratch, &format!("7z of {}", kind.name()), ("raw", "seven.raw"), ("raw", raw));
            }
            SevenZip(name) => {
                need("7z");
                let out = scratch.sh(&format!("7z l -slt -t{name} {image}"));
                let said = out.stdout.lines().any(|line| line == format!("Size = {size}"));
                assert!(said, "7z of {}: {out:?}", kind.name());
            }
            Info(tool) => {
                need(tool);
                let out = scratch.sh(&format!("{tool} {image}"));
                let said =
                    out.stdout.contains(&format!("({size} bytes)")) || out.stdout.contains(&format!(": {size} bytes"));
                assert!(said, "{tool} of {} ({size}): {out:?}", kind.name());
            }
        }
    }
}

/// Every kind from raw, then from each of these every other; `whole`: small enough to be read to the end.
fn all_pairs(raw_size: u64, whole: bool, fill: impl Fn(&fs::File, u64), from_everything: bool) {
    let scratch = Scratch::new();
    let gib = raw_size.div_ceil(1 << 30);
    for kind in KINDS {
        let size = if kind.most < gib { kind.most << 30 } else { raw_size };
        let raw = format!("{size}.raw");
        if !scratch.file(&raw).exists() {
            let file = fs::File::create(scratch.file(&raw)).expect("create");
            file.set_len(size).expect("length");
            fill(&file, size);
        }
        let what = format!("raw to {}", kind.name());
        fs::create_dir(scratch.file("a")).expect("folder");
        kind.convert(&scratch, Program::Vimg, ("raw", &raw), "a/image");
        assert_same(&scratch, &what, (kind.format, "a/image"), ("raw", &raw));
        assert_clean(&scratch, &what, kind.format, "a/image");
        let made = virtual_size(&scratch, kind.format, "a/image");
        let wanted = size.next_multiple_of(512);
        assert!(made == wanted || kind.rounds && made > wanted, "{what}: {made} for {wanted}");
        assert_readers_agree(&scratch, kind, "a/image", &raw, whole);
        for other in KINDS {
            // A huge disk goes to one kind of each format, if that takes it.
            let large = !from_everything
                && (other.most << 30 < size || other.options.contains("Flat") || other.options.contains("fixed"));
            if large {
                continue;
            }
            let what = format!("{} to {}", kind.name(), other.name());
            fs::create_dir(scratch.file("b")).expect("folder");
            other.convert(&scratch, Program::Vimg, (kind.format, "a/image"), "b/image");
            assert_same(&scratch, &what, (other.format, "b/image"), ("raw", &raw));
            assert_clean(&scratch, &what, other.format, "b/image");
            fs::remove_dir_all(scratch.file("b")).expect("remove");
        }
        fs::remove_dir_all(scratch.file("a")).expect("remove");
    }
}

/// Data at both ends, across units of every size, and in single sectors.
fn scatter(file: &fs::File, size: u64) {
    let put = |seed, at: u64, len| file.write_all_at(&pattern(seed, len), at).expect("write");
    put(1, 0, 100_000);
    put(2, size / 2 + 4096 - size / 2 % 4096 - 512, 70_000);
    for (seed, at) in [(3, 3 << 20), (4, (2 << 20) + 65_536), (5, 4_194_304 - 1024)] {
        put(seed, at % (size - 1024) / 512 * 512, 512);
    }
    put(6, size - 1300, 1300);
}

#[test]
fn every_pair_of_a_small_odd_disk() {
    all_pairs(5_003_776 + 512, true, scatter, true);
}

#[test]
fn five_tebibytes_go_through_the_formats_that_the_judge_is_slow_at() {
    let scratch = Scratch::new();
    let file =
        fs::OpenOptions::new().create_new(true).read(true).write(true).open(scratch.file("d.raw")).expect("create");
    file.set_len(5 << 40).expect("length");
    scatter(&file, 5 << 40);
    for kind in KINDS.iter().filter(|kind| kind.most < 2040 && !kind.options.contains("twoGb")) {
        kind.convert(&scratch, Program::Vimg, ("raw", "d.raw"), "image");
        assert_eq!(virtual_size(&scratch, kind.format, "image"), 5 << 40);
        // The judge reads the data, and zeros around it.
        let mut bytes = vec![0; 69_632];
        for at in [0, (5 << 39) + 3584, (5 << 40) - 69_632] {
            file.read_exact_at(&mut bytes, at).expect("read");
            let skip = format!("skip={}", at / 512);
            let count = format!("count={}", (at + bytes.len() as u64) / 512);
            scratch.judge(&["dd", "-f", kind.format, "-O", "raw", "bs=512", &skip, &count, "if=image", "of=piece"]);
            assert!(fs::read(scratch.file("piece")).expect("piece") == bytes, "{} at {at}", kind.name());
        }
        scratch.vimg(&["convert", "-f", kind.format, "-O", "raw", "image", "back.raw"]);
        assert_same(&scratch, &kind.name(), ("raw", "back.raw"), ("raw", "d.raw"));
        fs::remove_file(scratch.file("image")).expect("remove");
    }
}

#[test]
fn every_pair_of_an_almost_empty_huge_disk() {
    all_pairs(5 << 40, false, scatter, false);
}

/// Overwrites what differs from run to run: ids and times, and the checksums over them.
fn mask(kind: &Kind, path: &Path) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("open");
    let end = file.metadata().expect("metadata").len();
    let zero = |at: u64, len: usize| file.write_all_at(&vec![0; len], at).expect("write");
    match kind.format {
        "vdi" => zero(0x188, 32),
        "vpc" => {
            for at in if kind.options.contains("fixed") { vec![end - 512] } else { vec![0, end - 512] } {
                zero(at + 24, 4);
                zero(at + 64, 20);
            }
        }
        "vmdk" => {
            let mut head = vec![0; 2048.min(usize::try_from(end).expect("small"))];
            file.read_exact_at(&mut head, 0).expect("read");
            if let Some(at) = head.windows(5).position(|w| w == b"\nCID=") {
                let digits = head[at + 5..].iter().position(|b| *b == b'\n').expect("line");
                let rest: Vec<u8> = head[at + 5 + digits..].to_vec();
                let mut text = vec![b'0'; 8];
                text.extend(rest);
                // Without leading zeros the text's length varies: what follows it is zeros.
                text.truncate(head.len() - at - 5);
                file.write_all_at(&text, at as u64 + 5).expect("write");
            }
        }
        _ => {}
    }
}

#[test]
fn the_bytes_are_the_references() {
    for (number, size) in [512, 5_003_776, (64 << 20) + 512 * 7, 1_000_001].into_iter().enumerate() {
        let scratch = Scratch::new();
        let file = fs::File::create(scratch.file("d.raw")).expect("create");
        file.set_len(size).expect("length");
        let mut rng = fastrand::Rng::with_seed(number as u64);
        for seed in 0..24 {
            let at = rng.u64(..size);
            let len = rng.usize(1..200_000).min(usize::try_from(size - at).expect("small"));
            file.write_all_at(&pattern(seed, len), at / 512 * 512).expect("write");
        }
        file.set_len(size).expect("length");
        for kind in KINDS.iter().filter(|kind| !kind.options.contains("streamOptimized")) {
            for (program, folder) in [(Program::Vimg, "ours"), (Program::Judge, "theirs")] {
                fs::create_dir(scratch.file(folder)).expect("folder");
                kind.convert(&scratch, program, ("raw", "d.raw"), &format!("{folder}/image.x"));
            }
            let mut names: Vec<_> =
                fs::read_dir(scratch.file("theirs")).expect("list").map(|e| e.expect("entry").file_name()).collect();
            names.sort();
            assert_eq!(fs::read_dir(scratch.file("ours")).expect("list").count(), names.len(), "{}", kind.name());
            for name in names {
                let (ours, theirs) = (scratch.file("ours").join(&name), scratch.file("theirs").join(&name));
                if name == "image.x" {
                    mask(kind, &ours);
                    mask(kind, &theirs);
                }
                // A text's length follows the digits of its id.
                if name == "image.x" && kind.format == "vmdk" && fs::metadata(&theirs).expect("there").len() < 2048 {
                    let read = |path: &Path| fs::read_to_string(path).expect("text");
                    assert_eq!(read(&ours).trim_end_matches('\0'), read(&theirs).trim_end_matches('\0'));
                } else {
                    assert_same_bytes(&ours, &theirs);
                }
            }
            for folder in ["ours", "theirs"] {
                fs::remove_dir_all(scratch.file(folder)).expect("remove");
            }
        }
    }
}

#[test]
fn ids_and_times_are_the_same_under_source_date_epoch() {
    let scratch = Scratch::new();
    fs::write(scratch.file("d.raw"), pattern(1, 3 << 20)).expect("write");
    for kind in KINDS {
        let mut seen = Vec::new();
        for (folder, epoch) in [("a", "1700000000"), ("b", "1700000000"), ("c", "")] {
            fs::create_dir(scratch.file(folder)).expect("folder");
            let mut args = vec!["convert", "-f", "raw", "-O", kind.format];
            if !kind.options.is_empty() {
                args.extend(["-o", kind.options]);
            }
            args.extend(["../d.raw", "image"]);
            let run = vimg(&args).dir(scratch.file(folder));
            if epoch.is_empty() {
                run.ok()
            } else {
                run.env("SOURCE_DATE_EPOCH", epoch).ok()
            };
            seen.push(fs::read(scratch.file(folder).join("image")).expect("image"));
        }
        assert!(seen[0] == seen[1], "{}", kind.name());
        let has_ids = !matches!(kind.format, "raw" | "qcow" | "qcow2");
        assert_eq!(seen[0] != seen[2], has_ids, "{}", kind.name());
        for folder in ["a", "b", "c"] {
            fs::remove_dir_all(scratch.file(folder)).expect("remove");
        }
    }
}
