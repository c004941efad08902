//! qcow against qemu-img.

use vimg::storage::Preallocation;

use crate::common::run::vimg;
use crate::common::{Scratch, assert_same_bytes, judge, write_pattern};
use crate::rig::{Pair, assert_survives_mutations, create, open_bytes};

const M: u64 = 1 << 20;

#[test]
fn new_images_are_the_references() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "raw", "back", "1M"]);
    scratch.judge(&["create", "-q", "-f", "raw", "longer-name", "1M"]);
    for size in [1, 512, M, 3 << 30, 5 << 40] {
        for backing in ["", "back", "longer-name"] {
            let text = size.to_string();
            let options = if backing.is_empty() { String::new() } else { format!("backing_file={backing}") };
            create(&scratch.file("ours"), "qcow", &options, size).unwrap();
            if backing.is_empty() {
                scratch.judge(&["create", "-q", "-f", "qcow", "theirs", &text]);
            } else {
                scratch.judge(&["create", "-q", "-f", "qcow", "-b", backing, "-F", "raw", "theirs", &text]);
            }
            assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
        }
    }
    let error = create(&scratch.file("ours"), "qcow", "", 0).unwrap_err();
    assert_eq!(error.message(), "Image size is too small, cannot be zero length");
}

#[test]
fn writes_in_guest_order_are_the_references_bytes() {
    let scratch = Scratch::new();
    create(&scratch.file("ours"), "qcow", "", 9 * M + 512).unwrap();
    scratch.judge(&["create", "-q", "-f", "qcow", "theirs", &(9 * M + 512).to_string()]);
    let mut pair = Pair::of(&scratch, "qcow", "ours");
    let node = pair.open();
    for (at, len) in [(0, 4096), (8192, 65536), (2 * M - 8192, 16384), (6 * M + 4096, 4096), (9 * M, 512)] {
        pair.write(&node, at, len);
    }
    node.driver().close().unwrap();
    drop(node);
    pair.assert_good();
    scratch.judge(&["convert", "-f", "raw", "-O", "qcow", "ours.model", "theirs"]);
    assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
}

#[test]
fn what_is_written_is_what_others_read() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "qcow", "", 9 * M + 1536);
    pair.exercise(120, M / 2);
    pair.assert_good();
    pair.write_compressed(4 * M, 40, 3);
    pair.write_compressed(9 * M, 1, 4);
    pair.assert_good();
    pair.exercise(60, M / 2);
    pair.assert_good();
}

#[test]
fn a_backing_file_shows_through() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("back"), 0, 5, 3 << 20);
    scratch.judge(&["create", "-q", "-f", "qcow", "-b", "back", "-F", "raw", "a.qcow", "4M"]);
    std::fs::copy(scratch.file("back"), scratch.file("model")).unwrap();
    let writes = ["write -P 7 1M 64k", "write -P 8 100k 300", "write -z 2M 5k", "write -P 9 3M 700"];
    scratch.qemu_io("raw", "model", &["truncate 4M"]);
    scratch.qemu_io("qcow", "a.qcow", &writes[..2]);
    scratch.qemu_io("raw", "model", &writes);

    use vimg::block::{GuestOffset, ImageRef, NO_SECRETS, OpenHow, Opener, Policy, Purpose};
    let opener = Opener::new(vimg::drivers::DRIVERS, Policy::Follow, &NO_SECRETS);
    let how = OpenHow { format: Some("qcow".to_owned()), purpose: Purpose::Write, ..OpenHow::default() };
    let node = opener.open(&ImageRef::name(scratch.file("a.qcow")), &how).unwrap();
    let mut buffers = Default::default();
    node.write_zeroes(GuestOffset(2 << 20), 5 << 10, true, &mut buffers).unwrap();
    node.write(GuestOffset(3 << 20), &[9; 700], &mut buffers).unwrap();
    node.driver().close().unwrap();
    drop(node);
    scratch.assert_same_content("qcow", "a.qcow", "raw", "model");
}

#[test]
fn resized_images_keep_their_content() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "qcow", "", 9 * M + 512);
    pair.exercise(30, M);
    pair.write_compressed(9 * M, 1, 77);
    for size in [9 * M + 1024, 10 * M, 70 * M, 1100 * M + 512, 20 * M, 3 * M + 512, 4 * M, 5 * M] {
        pair.resize(size);
        pair.assert_good();
        pair.exercise(10, M);
        pair.assert_good();
    }
}

#[test]
fn a_resize_stopped_at_any_write_leaves_the_old_or_the_new_disk() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "qcow", "", 9 * M + 512);
    pair.exercise(20, M / 4);
    pair.assert_resize_is_safe(2000 * M, Preallocation::Off);
    pair.assert_resize_is_safe(9 * M + 4096, Preallocation::Off);
    pair.assert_resize_is_safe(3 * M + 512, Preallocation::Off);
}

#[test]
fn wrong_images_are_refused_in_the_references_words() {
    let scratch = Scratch::new();
    create(&scratch.file("a.qcow"), "qcow", "", 4 * M).unwrap();
    let good = std::fs::read(scratch.file("a.qcow")).unwrap();
    for (at, bytes) in [
        (0, &b"x"[..]),
        (4, &[0, 0, 0, 0]),
        (24, &[0; 8]),
        (24, &[0, 4, 0, 0]),
        (24, &[0xff; 8]),
        (32, &[8]),
        (32, &[17]),
        (33, &[5]),
        (33, &[14]),
        (36, &[0, 0, 0, 2]),
        (8, &[0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 4, 0]),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(scratch.file("bad"), &bad).unwrap();
        let theirs = judge(&["map", "-f", "qcow", "bad"]).dir(scratch.path()).run();
        let ours = open_bytes(bad, "qcow", false).map(|_| ()).unwrap_err().message();
        assert_eq!(theirs.stderr, format!("qemu-img: Could not open 'bad': {ours}\n"));
    }
}

#[test]
fn mutated_headers_are_read_or_refused() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "qcow", "", 4 * M);
    let node = pair.open();
    pair.write(&node, 2 * M, 512);
    node.driver().close().unwrap();
    drop(node);
    pair.write_compressed(3 * M, 2, 9);
    let bytes = std::fs::read(pair.path()).unwrap();
    assert_survives_mutations("qcow", &bytes, 80);
    let mut cases = 0;
    for at in (4096..bytes.len()).step_by(3).take(3000) {
        let mut changed = bytes.clone();
        changed[at] ^= 0xff;
        let node = open_bytes(changed, "qcow", true).unwrap();
        crate::rig::walk(&node);
        cases += 1;
    }
    assert!(cases > 1000);
}

#[test]
fn converting_is_the_references_bytes_and_survives_what_does_not_shrink() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("src"), 100 * 1024, 9, 600 * 1024);
    write_pattern(&scratch.file("src"), 5 * M + 512, 10, 512);
    scratch.sh("yes vimg | head -c 300000 | dd of=src bs=1M seek=3 conv=notrunc && truncate -s 7M src");
    scratch.vimg(&["convert", "-f", "raw", "-O", "qcow", "src", "ours"]);
    scratch.judge(&["convert", "-f", "raw", "-O", "qcow", "src", "theirs"]);
    assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
    scratch.vimg(&["convert", "-c", "-f", "raw", "-O", "qcow", "src", "packed"]);
    scratch.assert_same_content("qcow", "packed", "raw", "src");
    assert!(scratch.file("packed").metadata().unwrap().len() < scratch.file("ours").metadata().unwrap().len());
    scratch.vimg(&["convert", "-f", "qcow", "-O", "raw", "packed", "back"]);
    assert_same_bytes(&scratch.file("back"), &scratch.file("src"));
}

/// The tables are read when they are used.
#[test]
fn info_shows_what_the_header_alone_says() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow", "a.qcow", "100G"]);
    let whole = std::fs::read(scratch.file("a.qcow")).unwrap();
    std::fs::write(scratch.file("h.qcow"), &whole[..512]).unwrap();
    let mut far = whole.clone();
    far[40..48].copy_from_slice(&(1u64 << 40).to_be_bytes());
    std::fs::write(scratch.file("f.qcow"), &far).unwrap();
    for name in ["h.qcow", "f.qcow"] {
        scratch.assert_same_info(name);
        let out = crate::common::run::vimg(&["convert", "-O", "raw", name, "out"]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(1));
        assert!(out.stderr.contains(name) && out.stderr.contains("the L1 table"), "{out:?}");
        assert!(!scratch.file("out").exists());
        let out = crate::common::run::vimg(&["resize", "-q", name, "+1G"]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(1), "{name}: {out:?}");
    }
    assert_eq!(std::fs::read(scratch.file("h.qcow")).unwrap(), whole[..512]);
    assert_eq!(std::fs::read(scratch.file("f.qcow")).unwrap(), far);
}

/// The tables that the file does not have are no zeros, and a name that it does not have is no empty one.
#[test]
fn tables_that_are_cut_off_are_missed() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow", "a.qcow", "4M"]);
    scratch.qemu_io("qcow", "a.qcow", &["write 0 4096"]);
    let whole = std::fs::read(scratch.file("a.qcow")).unwrap();
    std::fs::write(scratch.file("c.qcow"), &whole[..4096 + 512]).unwrap();
    scratch.judge(&["create", "-q", "-f", "raw", "a-base-with-a-name", "1M"]);
    scratch.judge(&["create", "-q", "-f", "qcow", "-F", "raw", "-b", "a-base-with-a-name", "b.qcow", "4M"]);
    let backed = std::fs::read(scratch.file("b.qcow")).unwrap();
    std::fs::write(scratch.file("n.qcow"), &backed[..50]).unwrap();
    for (name, what) in [("c.qcow", "an L2 table"), ("n.qcow", "the backing file's name")] {
        scratch.assert_same_info(name);
        let out = crate::common::run::vimg(&["convert", "-O", "raw", name, "out"]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(1));
        assert!(out.stderr.contains(name) && out.stderr.contains(what), "{out:?}");
    }
}

#[test]
fn what_overlaps_is_not_written_to() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow", "a.qcow", "6M"]);
    scratch.qemu_io("qcow", "a.qcow", &["write -P 5 0 2M", "write -P 6 2M 8k", "write -P 7 4M 8k"]);
    let good = std::fs::read(scratch.file("a.qcow")).unwrap();
    let word = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let (first, second) = (word(48), word(56));
    // The L1 table over the header, in a table, in a cluster; an L2 table over the header, over another, in a cluster;
    // a cluster over a table, over the header, over the one whose end is cut off.
    let (far, cut) = (word(first as usize + 80), word(second as usize + 8));
    let entry = first as usize;
    for (at, value) in [
        (40, 8),
        (40, second - 16),
        (40, far),
        (56, 0x10),
        (56, first + 512),
        (56, far),
        (entry, second),
        (entry, 1),
        (entry, cut),
    ] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&value.to_be_bytes());
        crate::rig::assert_writes_change_nothing("qcow", bad.clone());
        crate::rig::assert_resizes_change_nothing("qcow", bad, &[2 * M + 4096 + 512]);
    }
}

/// Whatever it lies in: the header's sector, a table, what is free or another cluster.
#[test]
fn a_cluster_that_does_not_begin_with_a_sector_is_not_read() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow", "a.qcow", "2M"]);
    scratch.qemu_io("qcow", "a.qcow", &["write -P 5 0 4k", "write -P 6 8k 4k", "write -P 7 64k 4k"]);
    let good = std::fs::read(scratch.file("a.qcow")).unwrap();
    let entry = u64::from_be_bytes(good[48..56].try_into().unwrap());
    write_pattern(&scratch.file("new"), 0, 3, 8192);
    let (mut read, mut refused) = (0, 0);
    for at in [1, 48, 511, 512, 513, 1024, entry - 1, entry, entry + 1, entry + 512, entry + 4097, entry + 8192 + 256] {
        let mut bad = good.clone();
        bad[entry as usize + 8..][..8].copy_from_slice(&at.to_be_bytes());
        std::fs::write(scratch.file("a.qcow"), &bad).unwrap();
        let convert = |to| ["convert", "-f", "qcow", "-O", "raw", "a.qcow", to];
        let theirs = judge(&convert("theirs")).dir(scratch.path()).run();
        let ours = vimg(&convert("ours")).dir(scratch.path()).run();
        assert_eq!(ours.code, theirs.code, "{at}: {ours:?}");
        if ours.code == Some(0) {
            assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
            read += 1;
            continue;
        }
        let said = format!("a.qcow: error while reading at byte 4096: no data can be at offset {at}");
        assert!(ours.stderr.contains(&said), "{ours:?}");
        refused += 1;
        let map = ["map", "--output=json", "a.qcow"];
        assert_eq!(scratch.vimg(&map).stdout, scratch.judge(&map).stdout);
        for run in [vimg, judge] {
            let compared = run(&["compare", "a.qcow", "a.qcow"]).dir(scratch.path()).fails(4);
            assert!(compared.stderr.contains("Error while reading offset 4096 of a.qcow"), "{compared:?}");
        }
        let checked = vimg(&["check", "a.qcow"]).dir(scratch.path()).fails(2);
        assert!(checked.stderr.contains(&format!("cluster 1 at offset {at} does not begin with a sector")));
        for run in [judge, vimg] {
            run(&["convert", "-n", "-f", "raw", "-O", "qcow", "new", "a.qcow"]).dir(scratch.path()).fails(1);
        }
    }
    assert_eq!((read, refused), (4, 8));
}
