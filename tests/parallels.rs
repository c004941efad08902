//! Parallels images against qemu-img.

use std::sync::Arc;

use vimg::block::GuestOffset;
use vimg::storage::Preallocation;
use vimg::storage::memory::Memory;

use crate::common::{Scratch, judge, vimg};
use crate::rig::{
    Pair, assert_resizes_change_nothing, assert_survives_mutations, assert_writes_change_nothing, create, open_bytes,
    open_on, walk,
};

const M: u64 = 1 << 20;
/// Where the header says that the image is in use.
const MARK: usize = 44;
/// Where the BAT is.
const BAT: usize = 64;
const IN_USE: &[u8] = b"Ynot";

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn set(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// The same disk in the older kind, whose entries count in sectors.
fn older(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[..16].copy_from_slice(b"WithoutFreeSpace");
    let (cluster, entries) = (word(&bytes, 28), word(&bytes, 32));
    for n in 0..entries as usize {
        let entry = word(&bytes, BAT + n * 4);
        set(&mut bytes, BAT + n * 4, entry * cluster);
    }
    bytes
}

/// An image of the older kind with some data in it, and what it must read as.
fn older_pair<'a>(scratch: &'a Scratch, data_offset: u32) -> Pair<'a> {
    create(&scratch.file("old"), "parallels", "cluster_size=32256", 9 * M + 1536).unwrap();
    let mut bytes = older(std::fs::read(scratch.file("old")).unwrap());
    set(&mut bytes, 48, data_offset);
    std::fs::write(scratch.file("old"), bytes).unwrap();
    Pair::of(scratch, "parallels", "old")
}

#[test]
fn what_is_written_is_what_others_read() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=4096"] {
        let mut pair = Pair::new(&scratch, "parallels", options, 9 * M + 1536);
        pair.exercise(120, M / 2);
        pair.assert_good();
        assert_eq!(word(&std::fs::read(pair.path()).unwrap(), MARK), 0);
    }
    for data_offset in [0, 63] {
        let mut pair = older_pair(&scratch, data_offset);
        pair.exercise(120, M / 2);
        pair.assert_good();
    }
}

/// The reference finds damage in its own where the clusters of the newer kind are of other sizes than powers of two.
#[test]
fn clusters_may_have_any_number_of_sectors() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "parallels", "cluster_size=32256", 9 * M + 1536);
    pair.exercise(120, M / 2);
    let (name, model) = (pair.name.clone(), format!("{}.model", pair.name));
    scratch.assert_same_content("parallels", &name, "raw", &model);
    scratch.vimg(&["check", &name]);
    scratch.judge(&["convert", "-f", "raw", "-O", "parallels", "-o", "cluster_size=32256", &model, "theirs"]);
    vimg(&["check", "theirs"]).dir(scratch.path()).fails(2);
    scratch.vimg(&["check", "-r", "all", "theirs"]);
    scratch.assert_same_content("parallels", "theirs", "raw", &model);
}

#[test]
fn resized_images_keep_their_content() {
    let scratch = Scratch::new();
    let new = Pair::new(&scratch, "parallels", "cluster_size=4096", 9 * M + 512);
    for mut pair in [new, older_pair(&scratch, 0)] {
        pair.exercise(30, M);
        // Beyond what the first BAT has room for, several times.
        for size in [9 * M + 1024, 10 * M, 70 * M, 1100 * M + 512, 20 * M, 3 * M + 512, 4 * M, 5 * M] {
            pair.resize(size);
            pair.assert_good();
            pair.exercise(10, M);
            pair.assert_good();
        }
    }
}

#[test]
fn a_resize_stopped_at_any_write_leaves_the_old_or_the_new_disk() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "parallels", "cluster_size=4096", 9 * M + 512);
    pair.exercise(20, M / 4);
    pair.assert_resize_is_safe(30 * M, Preallocation::Off);
    pair.assert_resize_is_safe(9 * M + 4096, Preallocation::Off);
    pair.assert_resize_is_safe(3 * M + 512, Preallocation::Off);
}

/// From before the first change until the image is closed.
#[test]
fn an_image_that_is_written_to_is_marked() {
    let scratch = Scratch::new();
    create(&scratch.file("a"), "parallels", "", 4 * M).unwrap();
    let memory = Arc::new(Memory::new(std::fs::read(scratch.file("a")).unwrap()));
    for at in [0, 100] {
        let node = open_on(memory.clone(), "parallels", true).unwrap();
        let marked = || &memory.to_vec()[MARK..MARK + 4] == IN_USE;
        assert!(!marked());
        node.write(GuestOffset(at), &[1; 512], &mut Default::default()).unwrap();
        assert!(marked());
        node.driver().flush().unwrap();
        assert!(marked());
        node.driver().close().unwrap();
        assert!(!marked());
    }
    let node = open_on(memory.clone(), "parallels", true).unwrap();
    node.driver().close().unwrap();
}

/// By who only reads it is read as it is.
#[test]
fn an_image_left_in_use_is_repaired_by_who_writes() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "parallels", "a", "10M"]);
    scratch.qemu_io("parallels", "a", &["write -P 3 0 1M", "write -P 4 5M 2M"]);
    let mut bytes = std::fs::read(scratch.file("a")).unwrap();
    bytes[MARK..MARK + 4].copy_from_slice(IN_USE);
    // Two share a place, one leads outside, and something is left at the end.
    set(&mut bytes, BAT + 24, 1);
    set(&mut bytes, BAT + 4, 1000);
    bytes.resize(bytes.len() + 5000, 7);
    std::fs::write(scratch.file("a"), &bytes).unwrap();
    scratch.assert_same_info("a");
    assert!(std::fs::read(scratch.file("a")).unwrap() == bytes);
    let out = vimg(&["resize", "-q", "a", "+1M"]).dir(scratch.path()).ok();
    let told: Vec<&str> = out.stderr.lines().collect();
    let wanted = [
        "Repairing image was not closed correctly",
        "Repairing cluster 1 is outside image",
        "Repairing space leaked at the end of the image 1053696",
        "Repairing duplicate offset in BAT entry 6",
    ];
    assert_eq!(told, wanted);
    let out = scratch.judge(&["check", "a"]);
    assert!(out.stdout.starts_with("No errors"), "{out:?}");
    scratch.qemu_io("parallels", "a", &["read -P 3 0 1M", "read -P 0 1M 1M", "read -P 4 5M 1M", "read -P 3 6M 1M"]);
}

/// Whatever may be mended, an image of which nothing else is wrong was looked at, and can be used again.
#[test]
fn check_of_leaks_takes_the_mark_away_if_nothing_else_is_wrong() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "parallels", "a", "10M"]);
    scratch.qemu_io("parallels", "a", &["write -P 3 0 1M"]);
    let mut bytes = std::fs::read(scratch.file("a")).unwrap();
    bytes[MARK..MARK + 4].copy_from_slice(IN_USE);
    let mut outside = bytes.clone();
    set(&mut outside, BAT + 4, 1000);
    for (bytes, leaked, marked) in [(&bytes, 0, false), (&bytes, 5000, false), (&outside, 0, true)] {
        let mut bytes = bytes.clone();
        bytes.resize(bytes.len() + leaked, 7);
        let run = |ours: bool| {
            std::fs::write(scratch.file("a"), &bytes).unwrap();
            let args = ["check", "-r", "leaks", "a"];
            let out = if ours { vimg(&args) } else { judge(&args) }.dir(scratch.path()).run();
            (out, std::fs::read(scratch.file("a")).unwrap())
        };
        let ((ours, left), (theirs, theirs_left)) = (run(true), run(false));
        assert_eq!(left[MARK..MARK + 4] == *IN_USE, marked, "{ours:?}");
        if !marked {
            assert!(left == theirs_left);
        }
        // It takes the mark away when all is done, and still finds it where it looks again.
        if !marked && leaked == 0 {
            assert_eq!((ours.code, ours.stdout, ours.stderr), (theirs.code, theirs.stdout, theirs.stderr));
        }
    }
}

#[test]
fn what_overlaps_or_lies_outside_is_not_written_to() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "parallels", "-o", "cluster_size=4096", "a", "10M"]);
    scratch.qemu_io("parallels", "a", &["write -P 5 0 1M", "write -P 6 5M 8k"]);
    let good = std::fs::read(scratch.file("a")).unwrap();
    let first = word(&good, BAT);
    for value in [first + 1, 1, u32::try_from(good.len() / 4096).unwrap(), u32::MAX] {
        let mut bad = good.clone();
        set(&mut bad, BAT, value);
        assert_writes_change_nothing("parallels", bad.clone());
        assert_resizes_change_nothing("parallels", bad, &[16 * M, 2 * M]);
    }
    let mut bad = older(good.clone());
    let shifted = word(&bad, BAT) + 1;
    set(&mut bad, BAT, shifted);
    assert_writes_change_nothing("parallels", bad);
}

/// Clusters that do not lie at whole clusters are in the reference's eyes where they end, rounded down.
#[test]
fn check_finds_and_mends_clusters_of_the_older_kind_that_overlap() {
    let scratch = Scratch::new();
    let mut pair = older_pair(&scratch, 63);
    pair.exercise(60, M / 2);
    let mut bytes = std::fs::read(pair.path()).unwrap();
    let at = |bytes: &[u8], n: usize| word(bytes, BAT + n * 4);
    let there: Vec<usize> = (0..word(&bytes, 32) as usize).filter(|n| at(&bytes, *n) != 0).collect();
    let (one, two) = (there[0], there[1]);
    let shifted = at(&bytes, one) + 1;
    set(&mut bytes, BAT + two * 4, shifted);
    std::fs::write(scratch.file("bad"), bytes).unwrap();
    let run = |args: &[&str]| vimg(args).dir(scratch.path()).run();
    let out = run(&["check", "bad"]);
    let told: Vec<&str> = out.stderr.lines().collect();
    assert!(out.code == Some(2) && told == [format!("ERROR duplicate offset in BAT entry {two}")], "{out:?}");
    let before = run(&["convert", "-O", "raw", "bad", "before"]);
    assert_eq!(before.code, Some(0));
    let out = run(&["check", "-r", "all", "bad"]);
    assert_eq!(out.code, Some(0), "{out:?}");
    scratch.judge(&["check", "bad"]);
    scratch.assert_same_content("parallels", "bad", "raw", "before");
}

/// Words of the header and the BAT, and what they become.
type Changes<'a> = &'a [(usize, u32)];

/// The reference gives up: at the last entry, or by an assertion.
#[test]
fn check_goes_on_where_the_reference_ends() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "parallels", "a", "10M"]);
    scratch.qemu_io("parallels", "a", &["write -P 3 0 1M", "write -P 4 5M 2M"]);
    let good = std::fs::read(scratch.file("a")).unwrap();
    let cases: &[(Changes, &[&str])] = &[
        // The last one is a duplicate.
        (&[(BAT, 3)], &["duplicate offset in BAT entry 6"]),
        (&[(BAT + 20, 100)], &["cluster 5 is outside image"]),
        (&[(BAT + 24, 100)], &["cluster 6 is outside image", "space leaked at the end of the image 1048576"]),
        // The data is said to start behind the first cluster.
        (&[(48, 4096)], &["data_off field has incorrect value"]),
    ];
    for (changes, wanted) in cases {
        let mut bad = good.clone();
        changes.iter().for_each(|(at, value)| set(&mut bad, *at, *value));
        std::fs::write(scratch.file("bad"), &bad).unwrap();
        judge(&["check", "bad"]).dir(scratch.path()).run();
        let run = |args: &[&str]| vimg(args).dir(scratch.path()).run();
        std::fs::write(scratch.file("bad"), &bad).unwrap();
        let told = |out: &crate::common::Output, word: &str| {
            let lines: Vec<String> = out.stderr.lines().map(str::to_owned).collect();
            assert_eq!(lines, wanted.iter().map(|line| format!("{word} {line}")).collect::<Vec<_>>(), "{out:?}");
        };
        let out = run(&["check", "bad"]);
        assert_eq!(out.code, Some(2));
        told(&out, "ERROR");
        // What is left of a cluster that leads outside is not cut off as a leak.
        if wanted.len() > 1 {
            told(&run(&["check", "-r", "leaks", "bad"]), "ERROR");
            assert!(std::fs::read(scratch.file("bad")).unwrap() == bad);
        }
        let out = run(&["check", "-r", "all", "bad"]);
        assert_eq!(out.code, Some(0), "{out:?}");
        told(&out, "Repairing");
        scratch.judge(&["check", "bad"]);
    }
}

/// A new image with a format extension that holds nothing.
fn extended(scratch: &Scratch) -> Vec<u8> {
    scratch.judge(&["create", "-q", "-f", "parallels", "-o", "cluster_size=4096", "e", "1M"]);
    let mut bytes = std::fs::read(scratch.file("e")).unwrap();
    let at = bytes.len();
    bytes.resize(at + 4096, 0);
    bytes[at..at + 8].copy_from_slice(&0xab23_4cef_23dc_ea87u64.to_le_bytes());
    let sum = vimg::crypto::hash::HashAlgorithm::Md5.digest(&[&bytes[at + 24..]]);
    bytes[at + 8..at + 24].copy_from_slice(&sum);
    bytes[MARK..MARK + 4].copy_from_slice(b"v2.1");
    let sector = u32::try_from(at / 512).unwrap();
    set(&mut bytes, 56, sector);
    bytes
}

/// Bitmaps of other programs are looked at, and dropped by who writes: the reference leaves an image that it then cannot
/// open.
#[test]
fn a_format_extension_is_checked_and_dropped() {
    let scratch = Scratch::new();
    let good = extended(&scratch);
    let at = good.len() - 4096;
    for wrong in [at, at + 8, at + 100] {
        let mut bad = good.clone();
        bad[wrong] ^= 0xff;
        std::fs::write(scratch.file("bad"), &bad).unwrap();
        let ours = vimg(&["info", "bad"]).dir(scratch.path()).fails(1);
        let theirs = judge(&["info", "bad"]).dir(scratch.path()).fails(1);
        assert_eq!(ours.stderr, theirs.stderr);
    }
    std::fs::write(scratch.file("e"), &good).unwrap();
    scratch.assert_same_info("e");
    let out = vimg(&["resize", "e", "2M"]).dir(scratch.path()).ok();
    assert_eq!(out.stderr, "qemu-img: warning: Format Extension ignored in RW mode\n");
    scratch.assert_same_info("e");
    let bytes = std::fs::read(scratch.file("e")).unwrap();
    assert_eq!((word(&bytes, 56), word(&bytes, MARK)), (0, 0));
    scratch.judge(&["check", "e"]);
}

#[test]
fn mutated_headers_are_read_or_refused() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "parallels", "cluster_size=4096", 4 * M);
    let node = pair.open();
    pair.write(&node, 2 * M, 5000);
    node.driver().close().unwrap();
    drop(node);
    for bytes in [std::fs::read(pair.path()).unwrap(), older(std::fs::read(pair.path()).unwrap()), extended(&scratch)] {
        assert_survives_mutations("parallels", &bytes, 64);
        let mut cases = 0;
        for at in (64..bytes.len()).step_by(3).take(1000) {
            let mut changed = bytes.clone();
            changed[at] ^= 0xff;
            if let Ok(node) = open_bytes(changed, "parallels", true) {
                walk(&node);
                cases += 1;
            }
        }
        assert!(cases > 500);
    }
}
