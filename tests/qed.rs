//! QED against qemu-img.

use std::sync::Arc;

use vimg::block::{GuestOffset, Store};
use vimg::storage::Preallocation;
use vimg::storage::memory::Memory;

use crate::common::{Scratch, judge, pattern, vimg, write_pattern};
use crate::rig::{
    Pair, assert_resizes_change_nothing, assert_survives_mutations, assert_writes_change_nothing, create, open_bytes,
    open_on, walk,
};

const M: u64 = 1 << 20;
/// Where the header says that the tables need a check.
const MARK: usize = 16;
/// The L1 table of a new image with clusters of 64 KiB.
const L1: usize = 65536;

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn what_is_written_is_what_others_read() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=4096,table_size=2"] {
        let mut pair = Pair::new(&scratch, "qed", options, 9 * M + 1536);
        pair.exercise(120, M / 2);
        pair.assert_good();
        assert_eq!(std::fs::read(pair.path()).unwrap()[MARK], 0);
    }
}

#[test]
fn resized_images_keep_their_content() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "qed", "cluster_size=4096,table_size=2", 9 * M + 512);
    pair.exercise(30, M);
    for size in [9 * M + 1024, 10 * M, 70 * M, 1100 * M + 512] {
        pair.resize(size);
        pair.assert_good();
        pair.exercise(10, M);
        pair.assert_good();
    }
}

#[test]
fn a_resize_stopped_at_any_write_leaves_the_old_or_the_new_disk() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "qed", "", 9 * M + 512);
    pair.exercise(20, M / 4);
    pair.assert_resize_is_safe(2000 * M, Preallocation::Off);
    pair.assert_resize_is_safe(9 * M + 4096, Preallocation::Off);
}

/// From before the first cluster is taken until the image is closed.
#[test]
fn an_image_that_grows_is_marked() {
    let scratch = Scratch::new();
    create(&scratch.file("a"), "qed", "", 4 * M).unwrap();
    let memory = Arc::new(Memory::new(std::fs::read(scratch.file("a")).unwrap()));
    let node = open_on(memory.clone(), "qed", true).unwrap();
    let marked = || memory.to_vec()[MARK] == 2;
    assert!(!marked());
    let placement = node.place(GuestOffset(0), 512, Store::Data).unwrap();
    assert!(marked());
    placement.write(&[1; 512], &mut Default::default()).unwrap();
    placement.publish().unwrap();
    node.driver().flush().unwrap();
    assert!(marked());
    std::fs::write(scratch.file("a"), memory.to_vec()).unwrap();
    scratch.judge(&["check", "a"]);
    node.driver().close().unwrap();
    assert!(!marked());
    // What has its place can be written to as it is.
    node.write(GuestOffset(100), &[2; 512], &mut Default::default()).unwrap();
    assert!(!marked());
}

/// The reference takes the mark away, and lets two clusters share a place.
#[test]
fn a_marked_image_that_cannot_be_mended_stays_marked() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qed", "a", "4M"]);
    scratch.qemu_io("qed", "a", &["write -P 5 0 192k"]);
    let mut bytes = std::fs::read(scratch.file("a")).unwrap();
    let l2 = usize::try_from(word(&bytes, L1)).unwrap();
    bytes.copy_within(l2..l2 + 8, l2 + 8);
    bytes[MARK] = 2;
    assert_writes_change_nothing("qed", bytes.clone());
    std::fs::write(scratch.file("a"), &bytes).unwrap();
    let run = |args: &[&str], code| vimg(args).dir(scratch.path()).fails(code);
    let out = run(&["resize", "-q", "a", "8M"], 1);
    assert!(out.stderr.contains("tables and clusters of the image overlap"), "{out:?}");
    run(&["check", "-r", "all", "a"], 2);
    assert!(std::fs::read(scratch.file("a")).unwrap() == bytes);
}

#[test]
fn what_overlaps_or_lies_outside_is_not_written_to() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qed", "-o", "cluster_size=4096,table_size=2", "a", "10M"]);
    scratch.qemu_io("qed", "a", &["write -P 5 0 1M", "write -P 6 5M 8k"]);
    let good = std::fs::read(scratch.file("a")).unwrap();
    let (first, second) = (word(&good, 4096), word(&good, 4096 + 8));
    let entry = usize::try_from(first).unwrap();
    let data = word(&good, entry);
    for (at, value) in [
        (4096, second),
        (4096, 4096),
        (4096, data),
        (4096, first + 512),
        (4096, 1 << 40),
        (entry, second),
        (entry, first),
        (entry, 4096),
        (entry, data + 4096),
        (entry, data + 512),
        (entry, good.len() as u64),
        (entry, 1 << 63),
    ] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
        assert_writes_change_nothing("qed", bad.clone());
        assert_resizes_change_nothing("qed", bad, &[16 * M]);
    }
}

#[test]
fn a_backing_file_shows_through() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("back"), 0, 5, 3 << 20);
    scratch.judge(&["create", "-q", "-f", "qed", "-b", "back", "-F", "raw", "a.qed", "4M"]);
    std::fs::copy(scratch.file("back"), scratch.file("model")).unwrap();
    let writes =
        ["write -P 7 1M 64k", "write -P 8 100k 300", "write -z 2M 128k", "write -z 2500k 5k", "write -P 9 3M 700"];
    scratch.qemu_io("raw", "model", &["truncate 4M"]);
    scratch.qemu_io("qed", "a.qed", &writes[..2]);
    scratch.qemu_io("raw", "model", &writes);

    use vimg::block::{ImageRef, NO_SECRETS, OpenHow, Opener, Policy, Purpose};
    let opener = Opener::new(vimg::drivers::DRIVERS, Policy::Follow, &NO_SECRETS);
    let how = OpenHow { format: Some("qed".to_owned()), purpose: Purpose::Write, ..OpenHow::default() };
    let node = opener.open(&ImageRef::name(scratch.file("a.qed")), &how).unwrap();
    let mut buffers = Default::default();
    let length = || std::fs::metadata(scratch.file("a.qed")).unwrap().len();
    let before = length();
    node.write_zeroes(GuestOffset(2 << 20), 128 << 10, true, &mut buffers).unwrap();
    assert_eq!(length(), before, "zero clusters take no room");
    node.write_zeroes(GuestOffset(2500 << 10), 5 << 10, true, &mut buffers).unwrap();
    node.write(GuestOffset(3 << 20), &[9; 700], &mut buffers).unwrap();
    node.driver().close().unwrap();
    drop(node);
    scratch.assert_same_content("qed", "a.qed", "raw", "model");
    scratch.judge(&["check", "a.qed"]);
}

/// The reference makes such an image and then opens none.
#[test]
fn tables_of_one_cluster_are_read_and_written() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qed", "-o", "table_size=1", "a", "10M"]);
    create(&scratch.file("b"), "qed", "table_size=1", 10 * M).unwrap();
    assert!(std::fs::read(scratch.file("a")).unwrap() == std::fs::read(scratch.file("b")).unwrap());
    judge(&["info", "-f", "qed", "a"]).dir(scratch.path()).fails(1);
    let data = pattern(4, 3 << 20);
    let memory = Arc::new(Memory::new(std::fs::read(scratch.file("a")).unwrap()));
    let node = open_on(memory.clone(), "qed", true).unwrap();
    node.write(GuestOffset(M), &data, &mut Default::default()).unwrap();
    node.driver().close().unwrap();
    let node = open_bytes(memory.to_vec(), "qed", false).unwrap();
    let mut read = vec![0; data.len()];
    node.read(GuestOffset(M), &mut read, &mut Default::default()).unwrap();
    assert!(read == data);
}

/// The reference lets it run into the L1 table.
#[test]
fn a_name_that_is_longer_than_a_cluster_gets_another_one() {
    let scratch = Scratch::new();
    let name = "./".repeat(2020) + "back";
    scratch.sh("truncate -s 1M back; qemu-io -f raw -c 'write -P 7 0 1M' back > log");
    let made = ["create", "-q", "-f", "qed", "-o", "cluster_size=4096", "-b", &name, "-F", "raw", "a"];
    vimg(&made).dir(scratch.path()).ok();
    scratch.assert_same_content("qed", "a", "raw", "back");
}

#[test]
fn mutated_headers_are_read_or_refused() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "qed", "cluster_size=4096,table_size=2", 4 * M);
    let node = pair.open();
    pair.write(&node, 2 * M, 5000);
    node.driver().close().unwrap();
    drop(node);
    let bytes = std::fs::read(pair.path()).unwrap();
    assert_survives_mutations("qed", &bytes, 64);
    let mut cases = 0;
    for at in (4096..bytes.len()).step_by(3).take(3000) {
        let mut changed = bytes.clone();
        changed[at] ^= 0xff;
        let node = open_bytes(changed, "qed", true).unwrap();
        walk(&node);
        cases += 1;
    }
    assert!(cases > 1000);
}

/// Of the last L2 table only what stands for the disk has to be there. A part of that, or of data, is missing: that is
/// found, and not written over.
#[test]
fn the_unused_end_of_the_last_table_need_not_be_there() {
    let scratch = Scratch::new();
    let cut = |missing: u64| {
        let file = std::fs::OpenOptions::new().write(true).open(scratch.file("i")).unwrap();
        file.set_len(file.metadata().unwrap().len() - missing).unwrap();
    };
    // Tables of 32768 entries: of the last sector's 64 all are used, or none.
    for (size, used) in [("10M", false), ("2G", true)] {
        for missing in [1, 511] {
            scratch.judge(&["create", "-q", "-f", "qed", "i", size]);
            scratch.qemu_io("qed", "i", &["write -z 0 64k"]);
            cut(missing);
            for repair in [&[][..], &["-r", "all"]] {
                let out = vimg(&[&["check"], repair, &["i"]].concat()).dir(scratch.path()).run();
                assert_eq!(out.code, Some(if used { 2 } else { 0 }), "{size} {missing} {repair:?}: {out:?}");
            }
            let out = vimg(&["bench", "-w", "-c", "1", "-o", "1M", "i"]).dir(scratch.path()).run();
            assert_eq!(out.code, Some(i32::from(used)), "{size} {missing}: {out:?}");
            if !used {
                scratch.assert_clean("qed", "i");
            }
        }
    }
    scratch.judge(&["create", "-q", "-f", "qed", "i", "10M"]);
    scratch.qemu_io("qed", "i", &["write -z 0 64k", "write -P 1 1M 64k"]);
    cut(1);
    vimg(&["check", "-r", "all", "i"]).dir(scratch.path()).fails(2);
    let before = std::fs::read(scratch.file("i")).unwrap();
    vimg(&["bench", "-w", "-c", "1", "-o", "3M", "i"]).dir(scratch.path()).fails(1);
    assert!(std::fs::read(scratch.file("i")).unwrap() == before);
}
