//! Images whose entries point at their own tables: writing and shrinking must not destroy more than is lost already.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vimg::storage::Preallocation;
use vimg::storage::fault::{Fault, Faulty};
use vimg::storage::memory::Memory;

use crate::common::{Scratch, judge, vimg};

const CLUSTER: u64 = 65_536;
const COPIED: u64 = 1 << 63;

/// Writes words into a file.
fn poke(scratch: &Scratch, at: u64, word: u64) {
    let file = fs::OpenOptions::new().write(true).open(scratch.file("i")).unwrap();
    file.write_all_at(&word.to_be_bytes(), at).unwrap();
}

/// Fails with that in its words, and changes nothing of the image but its mark. Gives the words.
fn assert_refused(scratch: &Scratch, args: &[&str], text: &str) -> String {
    let before = fs::read(scratch.file("i")).unwrap();
    let out = vimg(args).dir(scratch.path()).run();
    assert_eq!(out.code, Some(1), "{args:?}: {out:?}");
    assert!(out.stderr.contains(text), "{args:?}, {text}: {out:?}");
    let mut after = fs::read(scratch.file("i")).unwrap();
    after[79] = before[79];
    assert!(after == before, "{args:?}, {text}: nothing but the mark has changed");
    out.stderr
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
fn a_resize_refuses_guest_data_that_lies_in_a_table() {
    let scratch = Scratch::new();
    for (table, what) in [(3, "active L1 table"), (4, "active L2 table")] {
        for args in [&["resize", "i", "2G"][..], &["resize", "i", "+1M"], &["resize", "--shrink", "i", "192k"]] {
            judge(&["create", "-q", "-f", "qcow2", "i", "1M"]).dir(scratch.path()).ok();
            scratch.qemu_io("qcow2", "i", &["write -P 1 0 64k", "write -P 2 128k 64k"]);
            // Data that stays: what it shares with the table would change with the size.
            poke(&scratch, 4 * CLUSTER + 16, COPIED | (table * CLUSTER));
            let text = format!("Preventing invalid write on metadata (overlaps with {what}); image marked as corrupt");
            assert_refused(&scratch, args, &text);
        }
    }
}

/// However many tables there are, all of them are looked into.
#[test]
fn a_resize_of_a_large_disk_refuses_guest_data_that_lies_in_a_table() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "i", "36T"]);
    // 72 tables of 2 MiB.
    let writes: Vec<String> = (0..72).map(|n| format!("write -P 1 {}G 4k", n * 512)).collect();
    scratch.qemu_io("qcow2", "i", &writes.iter().map(String::as_str).collect::<Vec<_>>());
    let file = fs::File::open(scratch.file("i")).unwrap();
    let word = |at: u64| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, at).unwrap();
        u64::from_be_bytes(word)
    };
    let l1 = word(40);
    let last = word(l1 + 71 * 8) & 0x00ff_ffff_ffff_fe00;
    poke(&scratch, last + 8, COPIED | l1);
    let out = vimg(&["resize", "i", "37T"]).dir(scratch.path()).run();
    assert_eq!(out.code, Some(1), "{out:?}");
    assert!(out.stderr.contains("overlaps with active L1 table"), "{out:?}");
    poke(&scratch, last + 8, 0);
    poke(&scratch, 72, 0);
    scratch.vimg(&["resize", "i", "37T"]);
    scratch.assert_clean("qcow2", "i");
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
            let text = format!("Preventing invalid write on metadata (overlaps with {what})");
            assert_refused(&scratch, &["resize", "i", "2G"], &text);
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

/// An image of two guest clusters with a snapshot, bitmaps and a LUKS-free header: what lies where, for a refcount
/// block to be put there.
fn places_for_a_block(scratch: &Scratch) -> Vec<(u64, &'static str)> {
    let mut places = with_everything(scratch);
    let file = fs::read(scratch.file("i")).unwrap();
    let offset = |at: u64| word(&file, at) & 0x00ff_ffff_ffff_fe00;
    let l1 = word(&file, 40);
    let (l2, inactive) = (offset(l1), offset(places[1].0));
    places.extend([
        (0, "qcow2_header"),
        (l1, "active L1 table"),
        (word(&file, 48), "refcount table"),
        (l2, "active L2 table"),
        (inactive, "inactive L2 table"),
        (offset(places[4].0), "bitmap data"),
        (offset(l2), "refcount block"),
        (offset(inactive), "refcount block"),
        (1 << 30, "past the end of the file"),
        (2 * CLUSTER + 512, "unaligned"),
        (0xffff_ffff_ffff_0000, "past the end of the file"),
    ]);
    places
}

/// A refcount block that lies somewhere else is not written there: after an unclean end new ones are made.
#[test]
fn repair_writes_no_refcounts_where_something_else_is() {
    let scratch = Scratch::new();
    let places = places_for_a_block(&scratch);
    let honest = fs::read(scratch.file("i")).unwrap();
    for twice in [false, true] {
        for (place, what) in &places {
            fs::write(scratch.file("i"), &honest).unwrap();
            poke(&scratch, 72, 1);
            // The only block, or one more. (An entry of 0 is no block.)
            poke(&scratch, word(&honest, 48) + if twice { 8 } else { 0 }, *place);
            scratch.vimg(&["resize", "-q", "-f", "qcow2", "i", "3M"]);
            scratch.assert_clean("qcow2", "i");
            scratch.qemu_io("qcow2", "i", &["read -P 3 0 64k", "read -P 0 64k 64k", "read -P 4 128k 64k"]);
            scratch.judge(&["convert", "-l", "snapshot.name=older", "-O", "raw", "i", "o"]);
            let old = fs::read(scratch.file("o")).unwrap();
            assert!(old[..65536].iter().all(|byte| *byte == 1), "{what}");
            assert!(old[131_072..196_608].iter().all(|byte| *byte == 2), "{what}");
            let listed = scratch.judge(&["info", "i"]).stdout;
            assert!(listed.contains("name: still") && listed.contains("name: b"), "{what}: {listed}");
        }
    }
}

/// A repair that stops at any write leaves an image that is still dirty, or consistent: the disk is there for the
/// judge, and the next repair makes all good.
#[test]
fn a_repair_that_is_stopped_can_be_done_again() {
    let scratch = Scratch::new();
    for options in ["cluster_size=512,refcount_bits=64", "cluster_size=64k"] {
        scratch.judge(&["create", "-q", "-f", "qcow2", "-o", options, "i", "2M"]);
        scratch.qemu_io("qcow2", "i", &["write -P 1 0 200k", "write -P 2 1M 100k"]);
        let shown = |size: usize| {
            scratch.judge(&["convert", "-f", "qcow2", "-O", "raw", "i", "shown"]);
            let mut bytes = fs::read(scratch.file("shown")).unwrap();
            assert!(bytes.len() == 2 << 20 || bytes.len() == size, "{} bytes", bytes.len());
            let rest = bytes.split_off(2 << 20);
            assert!(rest.iter().all(|byte| *byte == 0));
            bytes
        };
        let disk = shown(2 << 20);
        let honest = fs::read(scratch.file("i")).unwrap();
        let (l1, table) = (word(&honest, 40), word(&honest, 48));
        // The first refcount block over the L1 table, over the first data, lost, and just out of date.
        let data = word(&honest, word(&honest, l1) & 0x00ff_ffff_ffff_fe00) & 0x00ff_ffff_ffff_fe00;
        for place in [l1, data, 0, word(&honest, table)] {
            fs::write(scratch.file("i"), &honest).unwrap();
            poke(&scratch, 72, 1);
            poke(&scratch, table, place);
            let bad = fs::read(scratch.file("i")).unwrap();
            let stopped = |at: usize| {
                let memory = Arc::new(Memory::new(bad.clone()));
                let faulty = Arc::new(Faulty::new(memory.clone(), at, Fault::Stop));
                if let Ok(node) = crate::rig::open_on(faulty.clone(), "qcow2", true) {
                    let done = vimg::ops::resize::resize(&node, 3 << 20, Preallocation::Off);
                    assert!(done.is_ok() || faulty.tripped(), "{options} {place:#x}: {done:?}");
                }
                (faulty.operations().len(), memory.to_vec())
            };
            let count = stopped(usize::MAX).0;
            assert!(count > 3, "{count} operations");
            for at in (0..=count).rev().step_by(count / 16 + 1) {
                let what = format!("{options} {place:#x}: stopped at {at} of {count}");
                let after = stopped(at).1;
                fs::write(scratch.file("i"), &after).unwrap();
                if after[79] & 1 == 0 {
                    let out = judge(&["check", "-f", "qcow2", "i"]).dir(scratch.path()).run();
                    assert!(matches!(out.code, Some(0 | 3)), "{what}: {out:?}");
                }
                assert!(shown(3 << 20) == disk, "{what}");
                scratch.vimg(&["resize", "-q", "-f", "qcow2", "i", "4M"]);
                // What was stopped after the repair may have left a leak.
                let out = judge(&["check", "-f", "qcow2", "i"]).dir(scratch.path()).run();
                assert!(matches!(out.code, Some(0 | 3)), "{what}: {out:?}");
                assert!(shown(4 << 20) == disk, "{what}: after the next repair");
            }
        }
    }
}

/// The same block twice, in an image that was left dirty.
#[test]
fn repair_sees_a_refcount_block_that_is_entered_twice() {
    let scratch = Scratch::new();
    for options in ["cluster_size=512", "cluster_size=512,refcount_bits=64", "cluster_size=64k,refcount_bits=1"] {
        scratch.judge(&["create", "-q", "-f", "qcow2", "-o", options, "i", "4M"]);
        scratch.qemu_io("qcow2", "i", &["write -P 1 0 1M", "write -P 2 2M 1M"]);
        let file = fs::read(scratch.file("i")).unwrap();
        let table = word(&file, 48);
        for (from, to) in [(0, 8), (8, 0), (0, 56)] {
            fs::write(scratch.file("i"), &file).unwrap();
            poke(&scratch, 72, 1);
            poke(&scratch, table + to, word(&file, table + from));
            scratch.vimg(&["resize", "-q", "-f", "qcow2", "i", "9M"]);
            scratch.assert_clean("qcow2", "i");
            scratch.qemu_io("qcow2", "i", &["read -P 1 0 1M", "read -P 0 1M 1M", "read -P 2 2M 1M", "read -P 0 3M 6M"]);
        }
    }
}

/// Tables of other kinds that share a place cannot be put right: nothing is changed, not even a mark.
#[test]
fn repair_changes_nothing_where_tables_share_a_place() {
    let scratch = Scratch::new();
    let places = with_everything(&scratch);
    let honest = fs::read(scratch.file("i")).unwrap();
    for (place, what) in places {
        for (at, word) in [(word(&honest, 40), COPIED | place), (40, place)] {
            fs::write(scratch.file("i"), &honest).unwrap();
            poke(&scratch, 72, 1);
            poke(&scratch, at, word);
            let before = fs::read(scratch.file("i")).unwrap();
            let out = vimg(&["resize", "i", "2G"]).dir(scratch.path()).fails(1);
            assert!(out.stderr.contains("cannot be repaired"), "{what}: {out:?}");
            assert!(fs::read(scratch.file("i")).unwrap() == before, "{at:#x} {word:#x}");
        }
    }
}

/// As many entries as a snapshot's L1 table says it has are not counted one by one.
#[test]
fn a_snapshot_that_claims_a_huge_l1_table_costs_a_repair_nothing() {
    let scratch = Scratch::new();
    with_everything(&scratch);
    let honest = fs::read(scratch.file("i")).unwrap();
    let table = word(&honest, 64);
    // The entry begins with the L1 table's offset (8 bytes) and its number of entries (4), then the id's length (2).
    let after = word(&honest, table + 8) & 0xffff_ffff;
    poke(&scratch, table + 8, (0xffff_fff0 << 32) | after);
    poke(&scratch, 72, 1);
    let before = fs::read(scratch.file("i")).unwrap();
    let out = vimg(&["resize", "i", "2G"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("too many snapshots to be repaired"), "{out:?}");
    assert!(fs::read(scratch.file("i")).unwrap() == before);
}

/// The same, closed cleanly: refused before a refcount is written.
#[test]
fn refcounts_are_not_written_where_something_else_is() {
    let scratch = Scratch::new();
    let places = places_for_a_block(&scratch);
    let honest = fs::read(scratch.file("i")).unwrap();
    for (place, what) in places.into_iter().filter(|(at, _)| *at != 0) {
        for more in [0, 8] {
            fs::write(scratch.file("i"), &honest).unwrap();
            poke(&scratch, word(&honest, 48) + more, place);
            let stderr = assert_refused(&scratch, &["resize", "i", "2G"], "image marked as corrupt");
            assert!(stderr.contains(what), "{place:#x} {what}: {stderr}");
        }
    }
}

/// After an unclean end the marks of entries say what the refcounts say.
#[test]
fn repair_mends_marks() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "i", "1M"]);
    scratch.qemu_io("qcow2", "i", &["write -P 1 0 192k"]);
    let file = fs::read(scratch.file("i")).unwrap();
    let l2 = word(&file, word(&file, 40)) & 0x00ff_ffff_ffff_fe00;
    // Guest cluster 1 lies where 0 does, marked as its own; 2 is not marked.
    poke(&scratch, l2 + 8, word(&file, l2));
    poke(&scratch, l2 + 16, word(&file, l2 + 16) & !COPIED);
    poke(&scratch, 72, 1);
    scratch.vimg(&["resize", "-q", "i", "2G"]);
    scratch.qemu_io("qcow2", "i", &["write -P 7 1G 128k", "write -P 8 1M 640k"]);
    scratch.assert_clean("qcow2", "i");
    scratch.qemu_io("qcow2", "i", &["write -P 9 64k 64k"]);
    let reads =
        ["read -P 1 0 64k", "read -P 9 64k 64k", "read -P 1 128k 64k", "read -P 7 1G 128k", "read -P 8 1M 640k"];
    scratch.qemu_io("qcow2", "i", &reads);
    scratch.qemu_io("qcow2", "i", &["read -P 0 192k 832k"]);
}
