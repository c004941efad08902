//! What a qcow2 shows after it was resized, and after a resize that was stopped: the old disk or the new one, and
//! never what lay past an end.

use std::fs;
use std::sync::Arc;

use vimg::block::io::Scratch as Buffers;
use vimg::block::{GuestOffset, Node, format};
use vimg::formats::FORMATS;
use vimg::ops::resize::resize;
use vimg::storage::Preallocation;
use vimg::storage::fault::{Fault, Faulty, FaultyOperation};
use vimg::storage::memory::Memory;

use crate::common::inside::{self, Files};
use crate::common::{Scratch, judge};

/// Bytes of a disk of 2 MiB in which each sector can be told from the others, none of them zero.
fn disk() -> Vec<u8> {
    (0..2u32 << 20).map(|n| ((n / 512 % 251) + 1) as u8).collect()
}

/// How an image of that disk is made, as `i`, from `disk` (raw).
const KINDS: [(&str, &str); 9] = [
    ("plain", "qemu-img convert -f raw -O qcow2 disk i"),
    ("version 2", "qemu-img convert -f raw -O qcow2 -o compat=0.10 disk i"),
    ("small clusters", "qemu-img convert -f raw -O qcow2 -o cluster_size=4k disk i"),
    ("one cluster", "qemu-img convert -f raw -O qcow2 -o cluster_size=2M disk i"),
    ("compressed", "qemu-img convert -c -f raw -O qcow2 disk i"),
    ("subclusters", "qemu-img convert -f raw -O qcow2 -o extended_l2=on disk i"),
    ("compressed, subclusters", "qemu-img convert -c -f raw -O qcow2 -o extended_l2=on disk i"),
    ("a snapshot", "qemu-img convert -f raw -O qcow2 disk i; qemu-img snapshot -c s i"),
    (
        "subclusters, a snapshot",
        "qemu-img convert -f raw -O qcow2 -o extended_l2=on,cluster_size=128k disk i; qemu-img snapshot -c s i",
    ),
];

/// What only files on the host can show.
const MORE: [(&str, &str); 3] = [
    ("a data file", "rm -f d; qemu-img convert -f raw -O qcow2 -o data_file=d disk i"),
    ("a raw data file", "rm -f d; qemu-img convert -f raw -O qcow2 -o data_file=d,data_file_raw=on disk i"),
    (
        "a backing file",
        "qemu-img create -q -f qcow2 -b disk -F raw i; qemu-io -f qcow2 -c 'write -P 5 960k 64k' i >/dev/null",
    ),
];

/// The disk as the judge reads it.
fn shown(s: &Scratch, image: &str) -> Vec<u8> {
    s.judge(&["convert", "-f", "qcow2", "-O", "raw", image, "shown"]);
    fs::read(s.file("shown")).unwrap()
}

/// Ends inside a cluster, inside a subcluster, and at the end of one.
const CUTS: [usize; 4] = [1_000_448, 999_936, 983_040 + 512, 983_040 + 2048];

#[test]
fn what_a_shrink_cut_off_reads_as_zeros_when_the_disk_grows_again() {
    let s = Scratch::new();
    fs::write(s.file("disk"), disk()).unwrap();
    for (n, (kind, line)) in KINDS.iter().chain(&MORE).enumerate() {
        let cut = CUTS[n % CUTS.len()];
        for (shrink, grow) in [(true, false), (true, true), (false, true)] {
            s.sh(&format!("rm -f i; {line}"));
            let before = shown(&s, "i");
            let run = |ours: bool, args: &[&str]| if ours { s.vimg(args) } else { s.judge(args) };
            run(shrink, &["resize", "-q", "--shrink", "-f", "qcow2", "i", &cut.to_string()]);
            assert!(shown(&s, "i") == before[..cut], "{kind}: {shrink} {grow}");
            s.assert_clean("qcow2", "i");
            // Grown over a longer backing file is another test.
            let size = if kind.contains("backing") { cut + 512 } else { 3 << 20 };
            run(grow, &["resize", "-q", "-f", "qcow2", "i", &size.to_string()]);
            let after = shown(&s, "i");
            assert_eq!(after.len(), size);
            assert!(after[..cut] == before[..cut], "{kind}: {shrink} {grow}");
            let old = after[cut..].iter().position(|byte| *byte != 0);
            assert!(old.is_none(), "{kind}: {shrink} {grow}: {old:?} past {cut}");
            s.assert_clean("qcow2", "i");
            if kind.contains("snapshot") {
                s.vimg(&["convert", "-l", "snapshot.name=s", "-O", "raw", "i", "old"]);
                assert!(fs::read(s.file("old")).unwrap() == disk(), "{kind}: the snapshot is as it was");
            }
        }
    }
}

/// Resizes a copy of `files` in memory, up to a write that is the last one, if any.
fn resized(files: &Files, stop: Option<usize>, size: u64, fill: Preallocation) -> (Vec<FaultyOperation>, bool, Files) {
    let files = files.copy();
    let plain = files.get("i").unwrap();
    let faulty = Arc::new(match stop {
        Some(at) => Faulty::new(plain.clone(), at, Fault::Stop),
        None => Faulty::recording(plain.clone()),
    });
    files.put("i", faulty.clone());
    let worked = opened(&files).and_then(|node| resize(&node, size, fill)).is_ok();
    files.put("i", plain);
    (faulty.operations(), worked, files)
}

fn opened(files: &Files) -> vimg::block::Result<Node> {
    let find = |name| format::find(FORMATS, name).unwrap();
    let backing = match files.get("base") {
        Some(_) => Some(Arc::new(inside::open(files, find("raw"), "base", false, None)?)),
        None => None,
    };
    inside::open(files, find("qcow2"), "i", true, backing)
}

/// Stops a resize at each write, or at a dozen of them: the judge finds the old disk or the new one, clean but for leaks, and what is past
/// the end of either does not show later.
fn stopped_anywhere(s: &Scratch, kind: &str, line: &str, size: usize, fill: Preallocation) {
    s.sh(&format!("rm -f i base; {line}"));
    let files = Files::default();
    for name in ["i", "base"] {
        if let Ok(bytes) = fs::read(s.file(name)) {
            files.put(name, Arc::new(Memory::new(bytes)));
        }
    }
    let old = shown(s, "i");
    let mut new = old.clone();
    new.resize(size, 0);
    let (operations, worked, _) = resized(&files, None, size as u64, fill);
    assert!(worked && operations.len() > 2, "{kind}: {operations:?}");
    let mut found = [0; 2];
    for at in (0..operations.len()).rev().step_by(operations.len() / 12 + 1) {
        let what = format!("{kind} to {size}, {fill:?}: stopped at {at}, {:?}", operations[at]);
        let (_, _, after) = resized(&files, Some(at), size as u64, fill);
        after.save(s.path());
        let out = judge(&["check", "-f", "qcow2", "i"]).dir(s.path()).run();
        assert!(matches!(out.code, Some(0 | 3)), "{what}: {out:?}");
        let is = shown(s, "i");
        assert!(is == old || is == new, "{what}: neither the old disk nor the new one");
        found[usize::from(is.len() == new.len())] += 1;
        s.vimg(&["resize", "-q", "-f", "qcow2", "i", "4M"]);
        let grown = shown(s, "i");
        assert!(grown[..is.len()] == is, "{what}");
        assert!(grown[is.len()..].iter().all(|byte| *byte == 0), "{what}: something shows that was cut off");
    }
    assert!(found[0] > 0 && found[1] > 0, "{kind}: {found:?}");
}

#[test]
fn a_shrink_that_is_stopped_leaves_the_old_disk_or_the_new_one() {
    let s = Scratch::new();
    fs::write(s.file("disk"), disk()).unwrap();
    for (n, (kind, line)) in KINDS.iter().enumerate() {
        stopped_anywhere(&s, kind, line, CUTS[n % CUTS.len()], Preallocation::Off);
    }
    let line = "qemu-img convert -f raw -O qcow2 -o cluster_size=1k disk i; qemu-img bitmap --add -g 512 i b";
    stopped_anywhere(&s, "a bitmap", line, 300 * 1024, Preallocation::Off);
}

#[test]
fn a_growth_that_is_stopped_leaves_the_old_disk_or_the_new_one() {
    let s = Scratch::new();
    let short = disk();
    fs::write(s.file("disk"), &short[..1_000_448]).unwrap();
    let mut long = disk();
    long.reverse();
    let fills = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    for (n, (kind, line)) in KINDS.iter().enumerate() {
        stopped_anywhere(&s, kind, line, 3 << 20, fills[n % 4]);
    }
    // A backing file that is longer than the disk.
    fs::write(s.file("long"), &long).unwrap();
    for options in ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=4k"] {
        let line = format!(
            "cp long base; qemu-img create -q -f qcow2 -o {options} -b base -F raw i 1000448; \
             qemu-io -f qcow2 -c 'write -P 5 960k 512' i >/dev/null"
        );
        stopped_anywhere(&s, options, &line, 3 << 20, Preallocation::Off);
        if options != "compat=0.10" {
            stopped_anywhere(&s, options, &line, 1_700_352, Preallocation::Metadata);
        }
    }
}

/// The rest of a cluster in which the disk ended is reserved like what follows it.
#[test]
fn a_growth_reserves_the_rest_of_the_last_cluster() {
    let s = Scratch::new();
    for made in ["off", "metadata"] {
        for mode in ["falloc", "full"] {
            for more in ["+16384", "+200k"] {
                let option = format!("preallocation={made}");
                s.judge(&["create", "-q", "-f", "qcow2", "-o", &option, "i", "2048000"]);
                s.vimg(&["resize", "-q", "-f", "qcow2", &format!("--preallocation={mode}"), "i", more]);
                s.assert_clean("qcow2", "i");
                let blocks = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(s.file("i")).unwrap());
                let before = blocks();
                s.qemu_io("qcow2", "i", &["read -P 0 0 2000k", "write -P 7 2048000 16384"]);
                // The host may need a block to tell written space from reserved space.
                assert!(blocks() <= before + 8, "{made} {mode} {more}: {} {before}", blocks());
            }
        }
    }
}

/// A table that is still in memory lies past the end of the file, and nothing is wrong with it.
#[test]
fn a_disk_grows_right_after_a_write() {
    let format = format::find(FORMATS, "qcow2").expect("qcow2");
    let files = inside::create(format, "i", 1 << 20, "");
    let node = inside::open(&files, format, "i", true, None).expect("open");
    node.write_zeroes(GuestOffset(0), 65536, true, &mut Buffers::default()).expect("zeros");
    resize(&node, 2 << 20, Preallocation::Off).expect("resize");
    drop(node);
    let s = Scratch::new();
    files.save(s.path());
    assert_eq!(judge(&["check", "-f", "qcow2", "i"]).dir(s.path()).run().code, Some(0));
}
