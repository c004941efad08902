//! Images whose entries point at their own tables: writing and shrinking must not destroy more than is lost already.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::common::{Scratch, judge, vimg};

const CLUSTER: u64 = 65_536;
const COPIED: u64 = 1 << 63;

/// Writes words into a file.
fn poke(scratch: &Scratch, at: u64, word: u64) {
    let file = fs::OpenOptions::new().write(true).open(scratch.file("i")).unwrap();
    file.write_all_at(&word.to_be_bytes(), at).unwrap();
}

#[test]
fn tables_are_not_guest_data() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), vec![0x55; 200_000 / 512 * 512]).unwrap();
    // Header, refcount table, refcount block, L1 table, L2 table: clusters 0 to 4.
    for (entry, what) in [
        (CLUSTER, "refcount table"),
        (2 * CLUSTER, "refcount block"),
        (3 * CLUSTER, "active L1 table"),
        (4 * CLUSTER, "active L2 table"),
    ] {
        for command in [&["convert", "-n", "-O", "qcow2", "s.raw", "i"][..], &["resize", "--shrink", "i", "64k"]] {
            judge(&["create", "-q", "-f", "qcow2", "i", "1M"]).dir(scratch.path()).ok();
            scratch.qemu_io("qcow2", "i", &["write -P 1 0 64k", "write -P 2 128k 64k"]);
            poke(&scratch, 4 * CLUSTER + 16, COPIED | entry);
            let before = fs::read(scratch.file("i")).unwrap();
            let out = vimg(command).dir(scratch.path()).run();
            assert_eq!(out.code, Some(1), "{command:?}, {what}: {out:?}");
            let text = format!("Preventing invalid write on metadata (overlaps with {what}); image marked as corrupt");
            assert!(out.stderr.contains(&text), "{command:?}: {out:?}");
            let after = fs::read(scratch.file("i")).unwrap();
            let tables = CLUSTER as usize..4 * CLUSTER as usize;
            // Clusters may have been given out; nothing else changes in the tables.
            let held = |bytes: &[u8]| bytes[tables.clone()].iter().filter(|byte| **byte != 0).count();
            assert!(held(&after) >= held(&before), "{command:?}, {what}");
            assert_eq!(after[CLUSTER as usize..2 * CLUSTER as usize], before[CLUSTER as usize..2 * CLUSTER as usize]);
            assert_eq!(after[79], before[79] | 2, "marked as corrupt");
        }
    }
}

#[test]
fn tables_that_share_a_place_are_not_changed() {
    let scratch = Scratch::new();
    for (at, word) in [(3 * CLUSTER, COPIED | (3 * CLUSTER)), (3 * CLUSTER, COPIED | (2 * CLUSTER)), (CLUSTER, CLUSTER)]
    {
        judge(&["create", "-q", "-f", "qcow2", "i", "1M"]).dir(scratch.path()).ok();
        scratch.qemu_io("qcow2", "i", &["write -P 1 0 64k"]);
        poke(&scratch, at, word);
        let before = fs::read(scratch.file("i")).unwrap();
        let out = vimg(&["resize", "i", "2G"]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(1), "{at:#x} {word:#x}: {out:?}");
        assert!(out.stderr.contains("Preventing invalid write on metadata"), "{out:?}");
        let mut after = fs::read(scratch.file("i")).unwrap();
        after[79] &= !2;
        assert!(after == before, "{at:#x} {word:#x}");
    }
}

/// A word of the file.
fn word(file: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(file[at as usize..at as usize + 8].try_into().unwrap())
}

/// An image with snapshots and bitmaps; and where their tables are, by the reference's names.
fn with_everything(scratch: &Scratch) -> Vec<(u64, &'static str)> {
    judge(&["create", "-q", "-f", "qcow2", "i", "1M"]).dir(scratch.path()).ok();
    scratch.qemu_io("qcow2", "i", &["write -P 1 0 64k", "write -P 2 128k 64k"]);
    scratch.judge(&["snapshot", "-c", "old", "i"]);
    scratch.judge(&["snapshot", "-c", "older", "i"]);
    scratch.judge(&["bitmap", "--add", "i", "b"]);
    scratch.judge(&["bitmap", "--add", "--disable", "i", "still"]);
    scratch.qemu_io("qcow2", "i", &["write -P 3 0 64k", "write -P 4 128k 64k"]);
    let file = fs::read(scratch.file("i")).unwrap();
    let snapshots = word(&file, 64);
    let second = snapshots + (40 + 24 + 1 + 3u64).next_multiple_of(8);
    // The bitmaps extension is the second one, behind the feature names.
    let directory = word(&file, 112 + 8 + 384 + 8 + 16);
    assert_eq!(word(&file, 112 + 8 + 384) >> 32, 0x2385_2875);
    vec![
        (snapshots, "snapshot table"),
        (word(&file, snapshots), "inactive L1 table"),
        (word(&file, second), "inactive L1 table"),
        (directory, "bitmap directory"),
        (word(&file, directory), "bitmap table"),
        (word(&file, directory + 32), "bitmap table"),
    ]
}

#[test]
fn tables_of_snapshots_and_bitmaps_are_not_guest_data() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), vec![0x55; 200_000 / 512 * 512]).unwrap();
    let places = with_everything(&scratch);
    let honest = fs::read(scratch.file("i")).unwrap();
    for (entry, what) in places {
        for command in [&["convert", "-n", "-O", "qcow2", "s.raw", "i"][..], &["resize", "--shrink", "i", "64k"]] {
            fs::write(scratch.file("i"), &honest).unwrap();
            let l2 = word(&honest, word(&honest, 40)) & 0x00ff_ffff_ffff_fe00;
            poke(&scratch, l2 + 16, COPIED | entry);
            let before = fs::read(scratch.file("i")).unwrap();
            let out = vimg(command).dir(scratch.path()).run();
            assert_eq!(out.code, Some(1), "{command:?}, {what}: {out:?}");
            let text = format!("Preventing invalid write on metadata (overlaps with {what}); image marked as corrupt");
            assert!(out.stderr.contains(&text), "{command:?}: {out:?}");
            let after = fs::read(scratch.file("i")).unwrap();
            assert_eq!(after[79], before[79] | 2, "marked as corrupt");
            let table = entry as usize..entry as usize + CLUSTER as usize;
            // A bitmap that does not follow is marked so in the directory.
            if what != "bitmap directory" {
                assert_eq!(after[table.clone()], before[table], "{command:?}, {what}");
            }
        }
    }
}

#[test]
fn tables_of_snapshots_and_bitmaps_share_no_place_with_active_ones() {
    let scratch = Scratch::new();
    let places = with_everything(&scratch);
    let honest = fs::read(scratch.file("i")).unwrap();
    for (place, what) in places {
        // The L2 table, the L1 table.
        for (at, word) in [(word(&honest, 40), COPIED | place), (40, place)] {
            fs::write(scratch.file("i"), &honest).unwrap();
            poke(&scratch, at, word);
            let before = fs::read(scratch.file("i")).unwrap();
            let out = vimg(&["resize", "i", "2G"]).dir(scratch.path()).run();
            assert_eq!(out.code, Some(1), "{what}: {out:?}");
            let text = format!("Preventing invalid write on metadata (overlaps with {what})");
            assert!(out.stderr.contains(&text), "{out:?}");
            let mut after = fs::read(scratch.file("i")).unwrap();
            after[79] &= !2;
            assert!(after == before, "{at:#x} {word:#x}");
        }
    }
}

#[test]
fn snapshots_and_bitmaps_do_not_stand_in_the_way() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), vec![0x55; 200_000 / 512 * 512]).unwrap();
    with_everything(&scratch);
    for size in ["3M", "1G", "5M", "1M"] {
        scratch.vimg(&["resize", "--shrink", "i", size]);
        scratch.assert_clean("qcow2", "i");
        scratch.vimg(&["convert", "-n", "-O", "qcow2", "s.raw", "i"]);
        scratch.judge(&["bitmap", "--remove", "i", "b"]);
        scratch.judge(&["bitmap", "--add", "i", "b"]);
    }
    scratch.assert_clean("qcow2", "i");
}
