//! `compare` finds what differs first, whatever the formats and the number of threads, and reads no more than it must.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use fastrand::Rng;
use vimg::block::{ImageRef, NO_SECRETS, OpenHow, Opener, Policy};
use vimg::drivers::DRIVERS;
use vimg::ops::compare::{CompareOptions, Comparison, Difference};
use vimg::ops::copy::Silent;

use crate::common::{Scratch, judge, need, pattern, vimg, vimg_path};

const SIZE: u64 = 9 << 20;

/// What differs first, by that many threads.
fn first(scratch: &Scratch, a: (&str, &str), b: (&str, &str), threads: usize) -> Option<Difference> {
    let opener = Opener::new(DRIVERS, Policy::Follow, &NO_SECRETS);
    let open = |(format, name): (&str, &str)| {
        let how = OpenHow { format: Some(format.to_owned()), ..OpenHow::default() };
        opener.open(&ImageRef::name(scratch.file(name)), &how).unwrap()
    };
    let (a, b) = (open(a), open(b));
    let options = CompareOptions { strict: false, threads: Some(threads) };
    let comparison = Comparison::new(&a, &b, options, &Silent);
    let found = comparison.common().unwrap();
    found.or_else(|| comparison.rest().unwrap())
}

/// A sparse disk, and the same in every format.
fn images(scratch: &Scratch) -> Vec<(&'static str, &'static str)> {
    let disk = File::create(scratch.file("a")).unwrap();
    disk.set_len(SIZE).unwrap();
    for (at, len) in [(0, 70_000), (1 << 20, 3 << 20), ((5 << 20) + 512, 4096), (SIZE - 300_000, 300_000)] {
        disk.write_all_at(&pattern(at, len), at).unwrap();
        // Something to compress.
        disk.write_all_at(&vec![7; len / 2], at).unwrap();
    }
    scratch.sh(
        "set -e; cp --sparse=always a b; c() { qemu-img convert -f raw -O \"$@\"; }; c qcow a qcow; c qcow2 a qcow2
        c qcow2 -c -o cluster_size=2M a zlib; c qcow2 -c -o compression_type=zstd a zstd; c vdi a vdi; c vmdk a vmdk
        c vmdk -o subformat=streamOptimized a stream; c vpc -o force_size=on a vpc; c vpc -o subformat=fixed,force_size=on a fixed
        qemu-img create -q -f qcow2 -b qcow2 -F qcow2 overlay; qemu-io -f qcow2 -c 'write -z 6M 1M' overlay >/dev/null",
    );
    vec![
        ("raw", "b"),
        ("qcow", "qcow"),
        ("qcow2", "qcow2"),
        ("qcow2", "zlib"),
        ("qcow2", "zstd"),
        ("vdi", "vdi"),
        ("vmdk", "vmdk"),
        ("vmdk", "stream"),
        ("vpc", "vpc"),
        ("vpc", "fixed"),
        ("qcow2", "overlay"),
    ]
}

#[test]
fn the_first_difference_is_found_by_any_number_of_threads() {
    let scratch = Scratch::new();
    let others = images(&scratch);
    let disk = OpenOptions::new().read(true).write(true).open(scratch.file("a")).unwrap();
    for other in &others {
        assert_eq!(first(&scratch, ("raw", "a"), *other, 2), None, "{other:?}");
    }
    let mut rng = Rng::with_seed(8);
    for round in 0..24 {
        let other = others[round % others.len()];
        let places: Vec<u64> = (0..rng.usize(1..4)).map(|_| rng.u64(0..SIZE)).collect();
        let old: Vec<u8> = places
            .iter()
            .map(|at| {
                let mut byte = [0];
                disk.read_exact_at(&mut byte, *at).unwrap();
                byte[0]
            })
            .collect();
        for (at, old) in places.iter().zip(&old) {
            disk.write_all_at(&[old ^ 1], *at).unwrap();
        }
        let wanted = places.iter().min().unwrap() / 512 * 512;
        for threads in [1, 2, 8] {
            let found = first(&scratch, ("raw", "a"), other, threads);
            assert_eq!(found, Some(Difference::Content(wanted)), "{other:?}, {places:?}, {threads} threads");
            let found = first(&scratch, other, ("raw", "a"), threads);
            assert_eq!(found, Some(Difference::Content(wanted)), "{other:?}, {places:?}, {threads} threads");
        }
        let args = ["compare", "-f", "raw", "-F", other.0, "a", other.1];
        let (ours, theirs) = (vimg(&args).dir(scratch.path()).fails(1), judge(&args).dir(scratch.path()).fails(1));
        assert_eq!((&ours.stdout, &ours.stderr), (&theirs.stdout, &theirs.stderr), "{args:?}");
        for (at, old) in places.iter().zip(&old) {
            disk.write_all_at(&[*old], *at).unwrap();
        }
    }
}

/// It is where a filter is in between, which may answer something else.
#[test]
fn what_two_overlays_share_is_not_read() {
    need("strace");
    let scratch = Scratch::new();
    scratch.sh(
        "head -c 3M /dev/zero | tr '\\0' x > base; for i in a b; do qemu-img create -q -f qcow2 -b base -F raw $i
        qemu-io -f qcow2 -c 'write -P 3 1M 64k' $i >/dev/null; done
        printf '[inject-error]\nevent = \"none\"\niotype = \"read\"\nerrno = \"5\"\n' > rules",
    );
    let plain = |name: &str| format!("driver=qcow2,file.filename={name},backing.driver=raw,backing.file.filename=base");
    let over = |name: &str| {
        format!(
            "driver=qcow2,file.filename={name},backing.driver=raw,backing.file.driver=blkdebug,\
             backing.file.config=rules,backing.file.image.driver=file,backing.file.image.filename=base"
        )
    };
    let trace = "strace -f -qq -y -o trace -e trace=pread64,preadv,read,readv,mmap";
    let line = format!("{trace} {} compare --image-opts {} {}", vimg_path().display(), plain("a"), plain("b"));
    assert_eq!(scratch.sh(&line).stdout, "Images are identical.\n");
    let trace = std::fs::read_to_string(scratch.file("trace")).unwrap();
    assert!(trace.contains("/a>") && !trace.contains("/base>"), "{trace}");
    for images in [(over("a"), over("b")), (plain("a"), over("b")), (over("a"), plain("b"))] {
        let out = vimg(&["compare", "--image-opts", &images.0, &images.1]).dir(scratch.path()).fails(4);
        assert!(out.stderr.contains("Error while reading offset 0 of "), "{out:?}");
    }
}

/// Compressed units, and runs of the other side that cut them: each unit is decoded once, and memory is bounded.
#[test]
fn memory_does_not_grow_with_the_images() {
    let scratch = Scratch::new();
    scratch.sh("head -c 200M /dev/zero | tr '\\0' x > a; qemu-img convert -f raw -O qcow2 -c -o cluster_size=2M a b
        qemu-img convert -f raw -O vmdk -o subformat=streamOptimized a c");
    for (a, b) in [("a", "b"), ("b", "c")] {
        let args = ["compare", a, b];
        let out = crate::common::run::vimg_within_memory(128 << 20, &args).dir(scratch.path()).ok();
        assert_eq!(out.stdout, "Images are identical.\n");
    }
}
