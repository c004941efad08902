//! New qcow2 images are, byte for byte and block for block, those of `qemu-img create`.

use std::path::Path;

use vimg::formats::qcow2::Qcow2;

use crate::common::inside::{self, size};
use crate::common::{Scratch, assert_same_bytes, judge};

/// Makes a qcow2 image through the library.
pub fn create(dir: &Path, name: &str, text: &str, bytes: u64) -> vimg::block::Result<()> {
    inside::create_in(dir, &Qcow2, name, bytes, text)
}

fn disk_usage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks()
}

/// Options and size.
const IMAGES: &[(&str, &str)] = &[
    ("", "0"),
    ("", "1"),
    ("", "1M"),
    ("", "1G"),
    ("", "64T"),
    ("compat=0.10", "1G"),
    ("compat=v2,cluster_size=512", "1G"),
    ("cluster_size=512", "64k"),
    ("cluster_size=512", "1G"),
    ("cluster_size=1k", "1G"),
    ("cluster_size=4k", "10G"),
    ("cluster_size=8k", "10G"),
    ("cluster_size=2M", "1T"),
    ("cluster_size=512,refcount_bits=64", "16G"),
    ("refcount_bits=1", "1G"),
    ("refcount_bits=2", "1G"),
    ("refcount_bits=4", "1G"),
    ("refcount_bits=8", "1G"),
    ("refcount_bits=32", "1G"),
    ("refcount_bits=64", "1G"),
    ("lazy_refcounts=on", "1G"),
    ("compression_type=zstd", "1G"),
    ("extended_l2=on", "1G"),
    ("extended_l2=on,cluster_size=16k", "1G"),
    ("extended_l2=on,cluster_size=2M", "1T"),
    ("backing_file=base,backing_fmt=raw", "1M"),
    ("backing_file=base,backing_fmt=raw,compat=v2", "1M"),
    ("backing_file=base,backing_fmt=raw,cluster_size=512", "1M"),
    ("backing_file=base,backing_fmt=raw,extended_l2=on,preallocation=metadata", "3M"),
    ("backing_file=base,backing_fmt=raw,extended_l2=on,preallocation=full", "3M"),
    ("data_file=DATA", "1G"),
    ("data_file=DATA", "1"),
    ("data_file=DATA", "0"),
    ("data_file=DATA,data_file_raw=on", "1G"),
    ("data_file=DATA,data_file_raw=on", "1048577"),
    ("data_file=DATA,preallocation=metadata", "100M"),
    ("data_file=DATA,preallocation=falloc,cluster_size=512", "5M"),
    ("data_file=DATA,preallocation=full,cluster_size=4k", "5M"),
    ("data_file=DATA,extended_l2=on,data_file_raw=on", "1G"),
    ("data_file=DATA,extended_l2=on,data_file_raw=on", "131584"),
    ("data_file=DATA,extended_l2=on,preallocation=metadata", "131584"),
    ("preallocation=off", "1G"),
    ("preallocation=metadata", "0"),
    ("preallocation=metadata", "1"),
    ("preallocation=metadata", "1G"),
    ("preallocation=metadata", "5G"),
    ("preallocation=metadata,compat=v2", "3G"),
    ("preallocation=metadata,cluster_size=512", "2M"),
    ("preallocation=metadata,cluster_size=512", "17M"),
    ("preallocation=metadata,cluster_size=512,refcount_bits=64", "4M"),
    ("preallocation=metadata,cluster_size=512,refcount_bits=1", "2M"),
    ("preallocation=metadata,cluster_size=128k,refcount_bits=64", "10G"),
    ("preallocation=metadata,cluster_size=2M,refcount_bits=64", "3T"),
    ("preallocation=metadata,extended_l2=on", "3G"),
    ("preallocation=metadata,extended_l2=on,cluster_size=16k", "2G"),
    ("preallocation=falloc", "0"),
    ("preallocation=falloc", "70M"),
    ("preallocation=falloc,cluster_size=512", "3M"),
    ("preallocation=falloc,cluster_size=512,refcount_bits=64", "2M"),
    ("preallocation=falloc,cluster_size=4k", "50M"),
    ("preallocation=full", "1048577"),
    ("preallocation=full,cluster_size=512", "1M"),
    ("preallocation=full,extended_l2=on", "9M"),
];

#[test]
fn new_images_are_the_references_byte_for_byte() {
    let scratch = Scratch::new();
    let dir = scratch.path();
    std::fs::write(scratch.file("base"), vec![0; 1 << 20]).unwrap();
    for (text, bytes) in IMAGES {
        let theirs = text.replace("DATA", "theirs.raw");
        let mut args = vec!["create", "-q", "-u", "-f", "qcow2"];
        if !theirs.is_empty() {
            args.extend(["-o", &theirs]);
        }
        args.extend(["image", bytes]);
        judge(&args).dir(dir).ok();
        std::fs::rename(scratch.file("image"), scratch.file("theirs")).unwrap();
        // Same length of name, so that the bytes can be compared after it was put in its place.
        create(dir, "image", &text.replace("DATA", "theirs.raw.ours"), size(bytes)).unwrap();
        let named = text.contains("DATA");
        if named {
            assert_same_bytes(&scratch.file("theirs.raw"), &scratch.file("theirs.raw.ours"));
            let usage = (disk_usage(&scratch.file("theirs.raw")), disk_usage(&scratch.file("theirs.raw.ours")));
            assert!(usage.0.abs_diff(usage.1) <= 32, "disk usage of the data file of '{text}' {bytes}: {usage:?}");
            create(dir, "image", &theirs, size(bytes)).unwrap();
        }
        assert_same_bytes(&scratch.file("theirs"), &scratch.file("image"));
        let (reference, ours) = (disk_usage(&scratch.file("theirs")), disk_usage(&scratch.file("image")));
        // The reference writes the zeros that round an odd size up to a cluster; we leave a hole there. The file
        // system's own blocks count too, and come and go.
        let odd = !size(bytes).is_multiple_of(1 << 20);
        assert!(
            ours <= reference + 32 && (odd || ours + 32 >= reference),
            "disk usage of '{text}' {bytes}: {ours}, not {reference}"
        );
        for name in ["theirs", "image", "theirs.raw", "theirs.raw.ours"] {
            let _ = std::fs::remove_file(scratch.file(name));
        }
    }
}

#[test]
fn refusals_are_the_references() {
    // Each alone, then in pairs, to see the order of the checks.
    let faults: &[&[(&str, &str)]] = &[
        &[("compat", "0.9")],
        &[("compression_type", "lzma")],
        &[("preallocation", "foo")],
        &[("encrypt.format", "foo")],
        &[("encrypt.iter-time", "7")],
        &[("cluster_size", "513")],
        &[("cluster_size", "4194304")],
        &[("extended_l2", "on"), ("cluster_size", "8192")],
        &[("extended_l2", "on"), ("compat", "v2")],
        &[("backing_file", "base"), ("backing_fmt", "raw"), ("preallocation", "metadata")],
        &[("backing_fmt", "raw")],
        &[("refcount_bits", "3")],
        &[("refcount_bits", "128")],
        &[("refcount_bits", "8"), ("compat", "0.10")],
        &[("lazy_refcounts", "on"), ("compat", "v2")],
        &[("data_file", "nodir/data")],
        &[("data_file", "data"), ("compat", "v2")],
        &[("data_file_raw", "on")],
        &[("data_file", "data"), ("data_file_raw", "on"), ("backing_file", "base"), ("backing_fmt", "raw")],
        &[("compression_type", "zstd"), ("compat", "v2")],
        &[("cluster_size", "512"), ("size", "129G")],
    ];
    let scratch = Scratch::new();
    std::fs::write(scratch.file("base"), vec![0; 1 << 20]).unwrap();
    let mut cases = 0;
    for (n, a) in faults.iter().enumerate() {
        for b in &faults[n..] {
            let mut pairs = a.to_vec();
            let clash = |(key, value): &(&str, &str)| a.iter().any(|(k, v)| k == key && v != value);
            if b.iter().any(clash) {
                continue;
            }
            // Every pair of a few, a part of the rest: each costs a process.
            cases += 1;
            if n > 0 && !std::ptr::eq(*a, *b) && cases % 3 != 0 {
                continue;
            }
            pairs.extend(b.iter().filter(|pair| !a.contains(pair)));
            let bytes = pairs.iter().find(|(key, _)| *key == "size").map_or("1M", |(_, value)| value);
            let text: Vec<String> =
                pairs.iter().filter(|(key, _)| *key != "size").map(|(key, value)| format!("{key}={value}")).collect();
            let text = text.join(",");
            let out =
                judge(&["create", "-q", "-u", "-f", "qcow2", "-o", &text, "image", bytes]).dir(scratch.path()).run();
            let error = create(scratch.path(), "image", &text, size(bytes)).expect_err(&text);
            let message = match error.kind {
                // What `create` says of it; the driver's own words are what `convert` says.
                vimg::block::ErrorKind::TooLarge => {
                    "The image size is too large for file format 'qcow2' (try using a larger cluster size)".to_owned()
                }
                _ => error.message(),
            };
            assert_eq!(format!("qemu-img: image: {message}\n"), out.stderr, "{text} {bytes}");
        }
    }
}

/// Holes inside clusters stay holes where every cluster has its place already.
#[test]
fn preallocated_metadata_takes_no_more_of_the_host_than_the_references() {
    let scratch = Scratch::new();
    for n in 0..64 {
        crate::common::write_pattern(&scratch.file("s"), n * 262_144 + n % 50 * 4096, n, 12_288);
    }
    let allocated = |name: &str| {
        let blocks =
            |name| std::fs::metadata(scratch.file(name)).map_or(0, |m| std::os::unix::fs::MetadataExt::blocks(&m));
        blocks(name) + blocks("d")
    };
    for options in ["", ",cluster_size=2M", ",extended_l2=on", ",data_file=d"] {
        let options = format!("preallocation=metadata{options}");
        let mut taken = Vec::new();
        for (run, name) in [(Scratch::vimg as fn(&Scratch, &[&str]) -> _, "ours"), (Scratch::judge, "theirs")] {
            let _ = std::fs::remove_file(scratch.file("d"));
            run(&scratch, &["convert", "-f", "raw", "-O", "qcow2", "-o", &options, "s", name]);
            taken.push(allocated(name));
            scratch.assert_same_content("qcow2", name, "raw", "s");
        }
        // The host's own blocks for where a file's pieces lie are not ours to choose.
        assert!(taken[0] <= taken[1] + taken[1] / 50, "{options}: {taken:?}");
    }
}
