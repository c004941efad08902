//! What is written to images that were cut off: nothing that would make up for what is missing.

use std::fs;

use super::{KINDS, SIZE, cut, source};
use crate::common::{Scratch, judge, pattern, vimg};

/// What commit would move to the layer below is not all there: it moves nothing, and the overlay keeps what it has.
#[test]
fn a_cut_overlay_is_not_committed() {
    for (make, cut_file) in [
        ("qemu-img create -q -f qcow2 -b base -F qcow2 i", "i"),
        ("qemu-img create -q -f qcow2 -o extended_l2=on -b base -F qcow2 i", "i"),
        ("qemu-img create -q -f qcow2 -o data_file=d -b base -F qcow2 i", "d"),
        ("qemu-img create -q -f qed -b base -F qcow2 i", "i"),
    ] {
        let scratch = Scratch::new();
        scratch.sh(&format!("qemu-img create -q -f qcow2 base 4M; {make}; qemu-io -c 'write -P 9 0 4M' i"));
        let file = scratch.file(cut_file);
        cut(&file, 2 << 20);
        let (before, base) = (fs::read(&file).unwrap(), fs::read(scratch.file("base")).unwrap());
        let out = vimg(&["commit", "i"]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("the file is truncated") && out.stdout.is_empty(), "{make}: {out:?}");
        assert!(fs::read(&file).unwrap() == before, "{make}");
        scratch.judge(&["check", "-q", "base"]);
        if make.contains("qed") {
            assert!(fs::read(scratch.file("base")).unwrap() == base);
        }
        // Nor is it rebased, which looks at what lies below, and writes what differs behind the end.
        let out = vimg(&["rebase", "-b", "", "i"]).dir(scratch.path()).run();
        assert!(out.code == Some(1) || fs::metadata(&file).unwrap().len() <= before.len() as u64, "{make}: {out:?}");
    }
}

/// What is placed behind the end of a cut file would make it as long as it was, and nobody could tell any more.
#[test]
fn nothing_is_placed_behind_the_end_of_a_cut_qcow2() {
    ["off", "on"].into_iter().for_each(nothing_is_placed_behind_the_end);
}

fn nothing_is_placed_behind_the_end(extended_l2: &str) {
    let scratch = Scratch::new();
    scratch.sh(&format!(
        "qemu-img create -q -f qcow2 -o extended_l2={extended_l2} whole 4M; qemu-io -c 'write -P 9 0 3M' whole"
    ));
    let change: [&[&str]; 6] = [
        &["snapshot", "-c", "a", "i"],
        &["bitmap", "--add", "i", "b"],
        &["resize", "i", "8G"],
        &["amend", "-o", "refcount_bits=64", "i"],
        &["convert", "-n", "-f", "raw", "-O", "qcow2", "s", "i"],
        &["bench", "-w", "-c", "1", "-o", "3M", "i"],
    ];
    fs::write(scratch.file("s"), pattern(3, 4 << 20)).unwrap();
    for len in [2 << 20, 4 << 16] {
        let mut bytes = fs::read(scratch.file("whole")).unwrap();
        bytes.truncate(len);
        for (args, dirty) in change.iter().flat_map(|args| [(args, false), (args, true)]) {
            bytes[79] = u8::from(dirty) | bytes[79] & !1;
            fs::write(scratch.file("i"), &bytes).unwrap();
            let out = vimg(args).dir(scratch.path()).fails(1);
            assert!(out.stderr.contains("the file is truncated"), "{args:?}, dirty {dirty}: {out:?}");
            assert!(fs::read(scratch.file("i")).unwrap() == bytes, "{args:?}, dirty {dirty}");
            vimg(&["convert", "-O", "raw", "i", "o"]).dir(scratch.path()).fails(1);
        }
        bytes[79] &= !1;
        fs::write(scratch.file("i"), &bytes).unwrap();
        // The reference's check finds it too, and does not mend it. What is there can be had.
        let out = vimg(&["check", "-r", "all", "i"]).dir(scratch.path()).run();
        assert_eq!(out.code, judge(&["check", "-r", "all", "i"]).dir(scratch.path()).run().code, "{out:?}");
        scratch.vimg(&["convert", "--salvage", "-O", "qcow2", "i", "saved"]);
        vimg(&["snapshot", "-c", "a", "saved"]).dir(scratch.path()).ok();
    }
}

/// The same of a data file, where what reads as zeros need not be there.
#[test]
fn nothing_is_placed_behind_the_end_of_a_cut_data_file() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 -o data_file=d i 4M; qemu-io -c 'write -P 9 0 1M' -c 'write -z 2M 64k' i");
    for (len, whole) in [(4 << 20, true), (1 << 20, true), ((1 << 20) - 65536, false), (0, false)] {
        cut(&scratch.file("d"), len);
        let out = vimg(&["check", "i"]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(if whole { 0 } else { 2 }), "{len}: {out:?}");
        let text = format!("ERROR: cluster at offset {len:#x} lies past the end of the data file");
        assert_eq!(out.stderr.contains(&text), !whole, "{len}: {out:?}");
        if !whole {
            for args in [&["resize", "i", "8M"][..], &["bench", "-w", "-c", "1", "-o", "3M", "i"]] {
                let out = vimg(args).dir(scratch.path()).fails(1);
                assert!(out.stderr.contains("the file is truncated: a cluster of the data file"), "{out:?}");
                assert_eq!(fs::metadata(scratch.file("d")).unwrap().len(), len, "{args:?}");
            }
        }
    }
}

/// The same of tables that no guest data is in: each is named to lie where the file ends, or to end a little behind it.
#[test]
fn nothing_is_placed_over_missing_tables() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 whole 4M; qemu-io -c 'write -P 9 0 1M' whole; qemu-img snapshot -c a whole
         qemu-img bitmap --add whole b; qemu-io -c 'write -P 8 0 64k' whole");
    let whole = fs::read(scratch.file("whole")).unwrap();
    let word = |at: u64| u64::from_be_bytes(whole[at as usize..at as usize + 8].try_into().unwrap());
    let extension = whole.windows(8).position(|at| at == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap() as u64;
    let (snapshots, directory) = (word(64), word(extension + 24));
    // What the bitmap's first clusters are told by; bits that are all 0 have none.
    let places = [
        ("inactive L1 table", snapshots),
        ("inactive L2 table", word(snapshots)),
        ("bitmap table", directory),
        ("bitmap data", word(directory)),
        ("active L2 table", word(40)),
        ("active L1 table", 40),
    ];
    let change: [&[&str]; 4] = [
        &["resize", "i", "8G"],
        &["bench", "-w", "-c", "1", "-o", "3M", "i"],
        &["snapshot", "-c", "b", "i"],
        &["bitmap", "--add", "i", "c"],
    ];
    for (what, at) in places {
        for (args, dirty) in change.iter().flat_map(|args| [(args, 0), (args, 1)]) {
            let mut bytes = whole.clone();
            let end = bytes.len().next_multiple_of(65536) as u64;
            bytes.resize(end as usize, 0);
            bytes[at as usize..at as usize + 8].copy_from_slice(&end.to_be_bytes());
            bytes[79] |= dirty;
            fs::write(scratch.file("i"), &bytes).unwrap();
            let out = vimg(args).dir(scratch.path()).fails(1);
            let text = format!("the file is truncated: {what} at offset {end} lies past its end at {end}");
            assert!(out.stderr.contains(&text), "{what}, {args:?}, {dirty}: {out:?}");
            assert!(fs::read(scratch.file("i")).unwrap() == bytes, "{what}, {args:?}, {dirty}");
        }
    }
    // The last table of the file, less a byte; and what has more tables than are looked into at once.
    scratch.sh("qemu-img create -q -f qcow2 half 4M; qemu-io -c 'write -z 0 64k' half
         qemu-img create -q -f qcow2 -o cluster_size=2M large 5T
         qemu-io -c 'write 0 4k' -c 'write 1T 4k' -c 'write 2T 4k' -c 'write 3T 4k' -c 'write 4T 4k' large
         truncate -s -2M large");
    let mut bytes = fs::read(scratch.file("half")).unwrap();
    bytes.pop();
    fs::write(scratch.file("half"), bytes).unwrap();
    for (name, what) in [("half", "active L2 table"), ("large", "data cluster")] {
        let out = vimg(&["resize", name, "6T"]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains(&format!("the file is truncated: {what}")), "{name}: {out:?}");
    }
}

/// What is placed behind the end of such a file would be where its entries say that other data is.
#[test]
fn a_cut_vmdk_or_qcow_is_not_written_to() {
    for kind in KINDS.iter().filter(|kind| ["vmdk", "qcow"].contains(&kind.format) && kind.name != "flat vmdk") {
        let scratch = Scratch::new();
        source(&scratch);
        kind.make(&scratch);
        fs::write(scratch.file("other"), pattern(5, SIZE)).unwrap();
        let overlay = format!("qemu-img create -q -f {0} -b i -F {0} over", kind.format);
        scratch.sh(&format!("{overlay} && qemu-io -f {} -c 'write -P 9 64k 64k' over >/dev/null", kind.format));
        let file = scratch.file(kind.cut);
        let whole = fs::metadata(&file).unwrap().len();
        let format = kind.format;
        // More than the padding of the last cluster; a stream may lack that much behind its last grain.
        let first = usize::from(kind.name == "stream-optimized vmdk");
        for len in &[(whole - 20_480) / 512 * 512, whole / 3 * 2 / 512 * 512][first..] {
            let len = *len;
            cut(&file, len);
            let before = (fs::read(&file).unwrap(), fs::read(scratch.file("i")).unwrap());
            for args in [
                &["convert", "-n", "-f", "raw", "-O", format, "other", "i"][..],
                &["commit", "-q", "-f", format, "over"],
                &["commit", "-q", "-d", "-f", format, "over"],
                &["bench", "-q", "-w", "-c", "1", "-f", format, "i"],
                &["resize", "-q", "-f", format, "i", "1G"],
            ] {
                let out = vimg(args).dir(scratch.path()).run();
                assert_eq!(out.code, Some(1), "{}: {args:?}: {out:?}", kind.name);
                // A stream ends with its directory; a resize of a vmdk looks for more.
                let other = kind.name == "stream-optimized vmdk" || format == "vmdk" && args[0] == "resize";
                assert!(other || out.stderr.contains("the file is truncated: a "), "{}: {args:?}: {out:?}", kind.name);
                let after = (fs::read(&file).unwrap(), fs::read(scratch.file("i")).unwrap());
                assert!(before == after, "{}: {args:?} changed the image", kind.name);
            }
        }
    }
}

/// What is whole is written to: with a last cluster that the disk's end cuts, and in an extent that begins anywhere.
#[test]
fn a_whole_vmdk_or_qcow_is_written_to() {
    for kind in KINDS.iter().filter(|kind| ["vmdk", "qcow"].contains(&kind.format) && !kind.name.starts_with("stream"))
    {
        let scratch = Scratch::new();
        source(&scratch);
        kind.make(&scratch);
        fs::write(scratch.file("other"), pattern(5, SIZE)).unwrap();
        scratch.vimg(&["convert", "-n", "-f", "raw", "-O", kind.format, "other", "i"]);
        scratch.assert_same_content(kind.format, "i", "raw", "other");
    }
}
