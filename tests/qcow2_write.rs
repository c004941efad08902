//! Writing to qcow2 images: seeded random changes against a model, then the judge reads and checks them.

use std::path::Path;

use vimg::block::io::Scratch as Buffers;
use vimg::block::{
    Effort, ErrorKind, GuestOffset, ImageRef, NO_SECRETS, Node, OpenHow, Opener, Policy, Purpose, Store,
};
use vimg::drivers::DRIVERS;
use vimg::storage::Preallocation;

use crate::common::inside::size;
use crate::common::{Scratch, assert_same_bytes, judge, pattern};
use crate::qcow2_create::create;

fn open(path: &Path) -> std::sync::Arc<Node> {
    let opener = Opener::new(DRIVERS, Policy::Follow, &NO_SECRETS);
    let how = OpenHow { format: Some("qcow2".to_owned()), purpose: Purpose::Write, ..OpenHow::default() };
    // A program that another test is just starting has, until it is loaded, what was open here and was closed since.
    for _ in 0..600 {
        match opener.open(&ImageRef::name(path.as_os_str()), &how) {
            Err(error) if error.kind == ErrorKind::Locked => std::thread::sleep(std::time::Duration::from_millis(100)),
            opened => return opened.unwrap(),
        }
    }
    panic!("{} stays locked", path.display());
}

/// Changes an image and the model alike.
fn change(node: &Node, model: &mut [u8], rng: &mut fastrand::Rng, rounds: usize) {
    let mut buffers = Buffers::default();
    let unit = node.writing().unwrap().unit();
    let len = model.len() as u64;
    for _ in 0..rounds {
        let at = rng.u64(0..len / 512) * 512;
        let n = (rng.u64(1..400) * 512).min(len - at);
        let range = at as usize..(at + n) as usize;
        match rng.u8(0..10) {
            0..=4 => {
                let bytes = pattern(rng.u64(..), n as usize);
                node.write(GuestOffset(at), &bytes, &mut buffers).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            5 | 6 => {
                node.write_zeroes(GuestOffset(at), n, rng.bool(), &mut buffers).unwrap();
                model[range].fill(0);
            }
            7 => {
                // Given back unused: nothing changes.
                drop(node.place(GuestOffset(at), n, Store::Data).unwrap());
            }
            8 => {
                let Some(compress) = node.writing().unwrap().compressing() else { continue };
                let at = at - at % unit;
                let end = (at + unit).min(len);
                let mut plain = vec![0; unit as usize];
                plain[..32].copy_from_slice(&pattern(rng.u64(..), 32));
                plain[(end - at) as usize..].fill(0);
                let mut encoded = Vec::new();
                compress.encode(GuestOffset(at), &plain, Effort::default(), &mut encoded).unwrap();
                let store = Store::Compressed { bytes: encoded.len() as u64 };
                let placement = node.place(GuestOffset(at), unit, store).unwrap();
                placement.write_encoded(&encoded).unwrap();
                placement.publish().unwrap();
                model[at as usize..end as usize].copy_from_slice(&plain[..(end - at) as usize]);
            }
            _ => node.driver().flush().unwrap(),
        }
    }
    let mut read = vec![0; model.len()];
    node.read(GuestOffset(0), &mut read, &mut buffers).unwrap();
    assert!(read == model, "what was written reads back");
}

const IMAGES: &[&str] = &[
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k",
    "",
    "refcount_bits=1",
    "cluster_size=2M",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k,compression_type=zstd",
    "compat=v2",
    "data_file=data",
    "data_file=data,data_file_raw=on",
    "data_file=data,extended_l2=on",
    "lazy_refcounts=on",
    "backing_file=base,backing_fmt=raw",
    "backing_file=base,backing_fmt=raw,compat=v2",
    "backing_file=base,backing_fmt=raw,extended_l2=on",
];

/// Changes the image and the model alike: the judge finds the one sound and reads the other.
fn change_as_the_judge_reads(scratch: &Scratch, model: &mut [u8], rng: &mut fastrand::Rng) {
    let node = open(&scratch.file("image"));
    change(&node, model, rng, 60);
    node.driver().close().unwrap();
    drop(node);
    scratch.assert_clean("qcow2", "image");
    std::fs::write(scratch.file("model"), &*model).unwrap();
    scratch.assert_same_content("qcow2", "image", "raw", "model");
}

#[test]
fn random_changes_are_what_the_judge_reads() {
    for (seed, text) in (1u64..).zip(IMAGES) {
        let scratch = Scratch::new();
        let len = 5 * 1024 * 1024 + 512 * 3;
        let mut model = vec![0; len];
        if text.contains("base") {
            model[..3 << 20].copy_from_slice(&pattern(99, 3 << 20));
            std::fs::write(scratch.file("base"), &model[..3 << 20]).unwrap();
        }
        create(scratch.path(), "image", text, len as u64).unwrap();
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..2 {
            change_as_the_judge_reads(&scratch, &mut model, &mut rng);
        }
        if text.contains("data_file_raw") {
            let data = std::fs::read(scratch.file("data")).unwrap();
            assert!(data[..len] == model, "the data file is the disk");
        }
        if !text.contains("data_file") && !text.contains("refcount_bits=1") {
            // A snapshot shares everything; what is written then must leave it as it is.
            std::fs::write(scratch.file("then"), &model).unwrap();
            scratch.judge(&["snapshot", "-c", "one", "image"]);
            change_as_the_judge_reads(&scratch, &mut model, &mut rng);
            scratch.judge(&["convert", "-l", "one", "-f", "qcow2", "-O", "raw", "image", "old"]);
            scratch.assert_same_content("raw", "old", "raw", "then");
        }
    }
}

#[test]
fn clusters_of_every_kind_that_the_judge_wrote_are_changed() {
    for text in ["", "extended_l2=on", "cluster_size=4k", "compat=v2"] {
        let scratch = Scratch::new();
        create(scratch.path(), "image", text, 5 << 20).unwrap();
        let commands = [
            "write -P 1 0 1M",
            "write -c -P 2 1M 64k",
            "write -c -P 3 1088k 64k",
            "write -z 2M 256k",
            "write -P 4 3M 100k",
            "write -z -u 3M 64k",
            "write -z 3136k 4k",
            "discard 512k 128k",
        ];
        scratch.qemu_io("qcow2", "image", &commands);
        scratch.judge(&["convert", "-f", "qcow2", "-O", "raw", "image", "raw"]);
        let mut model = std::fs::read(scratch.file("raw")).unwrap();
        let mut rng = fastrand::Rng::with_seed(7);
        let node = open(&scratch.file("image"));
        change(&node, &mut model, &mut rng, 80);
        node.driver().close().unwrap();
        drop(node);
        scratch.assert_clean("qcow2", "image");
        std::fs::write(scratch.file("model"), &model).unwrap();
        scratch.assert_same_content("qcow2", "image", "raw", "model");
    }
}

#[test]
fn resized_images_are_the_references_byte_for_byte() {
    const SIZES: &[(&str, Preallocation)] = &[
        ("5M", Preallocation::Off),
        ("9M", Preallocation::Off),
        ("100G", Preallocation::Off),
        ("12M", Preallocation::Metadata),
        ("12M", Preallocation::Falloc),
        ("13M", Preallocation::Full),
    ];
    let images =
        ["", "compat=v2", "cluster_size=512", "extended_l2=on", "data_file=data", "data_file=data,data_file_raw=on"];
    for text in images {
        let scratch = Scratch::new();
        create(scratch.path(), "image", text, 8 << 20).unwrap();
        scratch.qemu_io("qcow2", "image", &["write -P 1 0 1M", "write -P 2 3M 1M", "write -P 3 6M 512k"]);
        scratch.sh("cp --sparse=always image start; test ! -e data || cp --sparse=always data start.data");
        for (to, fill) in SIZES {
            if text.contains("512") && *to == "100G" {
                continue;
            }
            let restore = "cp --sparse=always start image; test ! -e data || cp --sparse=always start.data data";
            scratch.sh(restore);
            let grown = if *fill == Preallocation::Off {
                "--shrink".to_owned()
            } else {
                format!("--preallocation={}", fill.name())
            };
            judge(&["resize", "-q", "-f", "qcow2", &grown, "image", to]).dir(scratch.path()).ok();
            scratch.sh("mv image theirs; test ! -e data || cp --sparse=always data theirs.data");
            scratch.sh(restore);
            let node = open(&scratch.file("image"));
            let resize = node.driver().resizing().unwrap();
            resize.check(size(to), *fill).unwrap();
            resize.resize(size(to), *fill).unwrap();
            node.driver().close().unwrap();
            drop(node);
            assert_same_bytes(&scratch.file("theirs"), &scratch.file("image"));
            if text.contains("data") {
                assert_same_bytes(&scratch.file("theirs.data"), &scratch.file("data"));
            }
        }
    }
}

#[test]
fn an_image_left_dirty_is_put_right_before_it_is_written() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "image", "64M"]);
    // The judge dies with postponed refcounts.
    let line = "qemu-io -f qcow2 -c 'write -P 5 1M 3M' -c 'sleep 1' -c 'abort' image >/dev/null 2>&1; true";
    scratch.sh(line);
    assert_eq!(std::fs::read(scratch.file("image")).unwrap()[79] & 1, 1, "the dirty bit is set");
    let node = open(&scratch.file("image"));
    node.write(GuestOffset(0), &pattern(1, 70_000 / 512 * 512), &mut Buffers::default()).unwrap();
    node.driver().close().unwrap();
    drop(node);
    scratch.assert_clean("qcow2", "image");
    scratch.qemu_io("qcow2", "image", &["read -P 5 1M 3M"]);
}

/// Clusters that a resize maps from the start hold nothing of what lay there before.
#[test]
fn preallocation_by_resize_shows_nothing_old() {
    let scratch = Scratch::new();
    let grown = |name: &str, size: u64| {
        scratch.vimg(&["resize", "-q", "-f", "qcow2", "--preallocation=metadata", name, &size.to_string()]);
        scratch.vimg(&["convert", "-f", "qcow2", "-O", "raw", name, "out"]);
        scratch.judge(&["convert", "-f", "qcow2", "-O", "raw", name, "theirs"]);
        crate::common::assert_same_bytes(&scratch.file("out"), &scratch.file("theirs"));
        scratch.assert_clean("qcow2", name);
    };
    // The L1 table moves, and what it leaves is given out.
    scratch.judge(&["create", "-q", "-f", "qcow2", "a", "536805888"]);
    std::fs::File::create(scratch.file("zeros")).and_then(|f| f.set_len(1_100_000_256)).expect("zeros");
    grown("a", 1_100_000_256);
    assert!(crate::common::first_difference(&scratch.file("out"), &scratch.file("zeros")).is_none());
    // Discarded clusters.
    scratch.judge(&["create", "-q", "-f", "qcow2", "b", "8M"]);
    scratch.qemu_io("qcow2", "b", &["write -P 5 0 8M", "discard 0 4M"]);
    grown("b", 10 << 20);
    scratch.qemu_io("qcow2", "b", &["read -P 0 8M 2M"]);
    // What the backing file shows goes on showing, and no more of it.
    for (options, below) in [("compat=1.1", 1_100_000), ("compat=1.1", 3 << 20), ("extended_l2=on", 3 << 20)] {
        std::fs::write(scratch.file("base"), vec![7; below]).expect("base");
        scratch.judge(&["create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", "c", "1040384"]);
        grown("c", 2 << 20);
        scratch.qemu_io("qcow2", "c", &["read -P 7 0 1040384", "read -P 0 1040384 1056768"]);
    }
}

/// The names of files are bytes, on the command line and in headers: what one program names, the other finds.
#[test]
fn names_that_are_no_text_are_followed() {
    let scratch = Scratch::new();
    let script = r#"
        b=$(printf 'b\344se'); d=$(printf 'd\377,t'); o=$(printf 'd\377,,t')
        "$OTHER" create -q -f qcow2 "$b" 1M && qemu-io -c 'write -P 5 0 64k' "$b" >/dev/null
        "$MAKER" create -q -f qcow2 -b "$b" -F qcow2 top
        "$MAKER" create -q -f qcow2 -o "backing_file=$b,backing_fmt=qcow2" top2
        "$MAKER" create -q -f qcow -b "$b" -F qcow2 old
        "$MAKER" convert -O qcow2 -o "data_file=$o" "$b" data && test -e "$d"
        "$MAKER" convert -O qcow2 -B "$b" -F qcow2 top over
        # The header is written back.
        test "$MAKER" = qemu-img || "$MAKER" resize -q top 2M
        "$OTHER" resize -q top 3M
        for image in top top2 data over; do
            "$OTHER" convert -f qcow2 -O raw $image out && qemu-io -f raw -c 'read -P 5 0 64k' out | grep -q 65536/65536
            "$OTHER" info --output=json $image > info; "$MAKER" info --output=json $image | cmp - info
        done
        "$OTHER" convert -f qcow -O raw old out && qemu-io -f raw -c 'read -P 5 0 64k' out | grep -q 65536/65536"#;
    let ours = crate::common::vimg_path();
    for (maker, other) in [("qemu-img", ours.to_str().expect("a path")), (ours.to_str().expect("a path"), "qemu-img")] {
        scratch.sh(&format!("rm -rf t && mkdir t && cd t && set -e; MAKER='{maker}'; OTHER='{other}'; {script}"));
    }
}
