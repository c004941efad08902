//! What `measure` predicts is what `convert` writes, or a little more.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use fastrand::Rng;

use crate::common::{Scratch, files::pattern};

const GRAIN: u64 = 64 << 10;
/// What the name of an extent and a content id are shorter by than the longest ones.
const NAME: u64 = 255 + 8;

/// A kind of target: its format, its options, what its figures may be too large by for each extent, and whether what is
/// written is known but for that.
struct Kind {
    format: &'static str,
    options: &'static str,
    slack: u64,
    exact: bool,
}

const fn kind(format: &'static str, options: &'static str, slack: u64) -> Kind {
    Kind { format, options, slack, exact: true }
}

/// Of qcow2 the figures are the reference's, which count no refcount tables that were outgrown: clusters of 512 bytes have
/// some.
const KINDS: &[Kind] = &[
    kind("raw", "", 0),
    kind("qcow2", "", 0),
    kind("qcow2", "cluster_size=4k,refcount_bits=1", 0),
    kind("qcow2", "extended_l2=on,compression_type=zstd", 0),
    Kind { format: "qcow2", options: "preallocation=metadata", slack: 0, exact: false },
    kind("qcow", "", 0),
    kind("qed", "", 0),
    kind("parallels", "", 0),
    kind("parallels", "cluster_size=64k", 0),
    kind("qed", "cluster_size=4k", 0),
    kind("vdi", "", 0),
    kind("vdi", "static=on", 0),
    kind("vpc", "force_size=on", 0),
    kind("vpc", "", 0),
    kind("vpc", "subformat=fixed,force_size=on", 0),
    kind("vmdk", "", 0),
    kind("vmdk", "zeroed_grain=on", 0),
    kind("vmdk", "subformat=monolithicFlat", NAME),
    kind("vmdk", "subformat=twoGbMaxExtentSparse", NAME),
    kind("vmdk", "subformat=twoGbMaxExtentFlat", NAME),
    Kind { format: "vmdk", options: "subformat=streamOptimized", slack: 0, exact: false },
];

/// Bytes of all files of an image; of a file whose data is a hole until it is written, those that the host has stored.
fn written(folder: &Path, sparse: bool) -> u64 {
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap());
    files.map(|file| if sparse { file.blocks() * 512 } else { file.len() }).sum()
}

fn options(text: &str) -> Vec<&str> {
    if text.is_empty() { Vec::new() } else { vec!["-o", text] }
}

/// Measures and converts the raw file `a`; gives what was predicted, required and in full, and what was written.
fn measure_and_convert(scratch: &Scratch, kind: &Kind) -> (u64, u64, u64) {
    let Kind { format, options: text, .. } = kind;
    let mut args = vec!["measure", "--output=json", "-f", "raw", "-O", format];
    args.extend(options(text));
    args.push("a");
    let measured = scratch.vimg(&args).json();
    let folder = scratch.file("out");
    std::fs::create_dir(&folder).unwrap();
    let mut args = vec!["convert", "-f", "raw", "-O", format];
    args.extend(options(text));
    args.extend(["a", "out/disk.image"]);
    scratch.vimg(&args);
    let bytes = written(&folder, text.contains("preallocation"));
    std::fs::remove_dir_all(&folder).unwrap();
    let figure = |key: &str| measured[key].as_u64().unwrap();
    (figure("required"), figure("fully-allocated"), bytes)
}

fn make(scratch: &Scratch, size: u64, runs: &[(u64, usize)]) {
    let path = scratch.file("a");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for (at, len) in runs {
        std::os::unix::fs::FileExt::write_all_at(&file, &pattern(*at, *len), *at).unwrap();
    }
}

#[test]
fn what_is_written_was_predicted() {
    let scratch = Scratch::new();
    let mut rng = Rng::with_seed(50);
    for seed in 0..100 {
        let size = rng.u64(1..20_000) * 512;
        // The host stores what is written in blocks, which are what the source's map shows.
        let runs: Vec<_> = (0..rng.u64(0..6))
            .map(|_| {
                let at = rng.u64(0..size) / 4096 * 4096;
                (at, usize::try_from((4096 * rng.u64(1..200)).min(size - at)).unwrap())
            })
            .collect();
        make(&scratch, size, &runs);
        // Each kind meets 50 of them.
        for kind in KINDS.iter().skip(seed % 2).step_by(2) {
            let (required, full, bytes) = measure_and_convert(&scratch, kind);
            let Kind { format, options, slack, exact } = kind;
            let what =
                format!("{format} {options}: {size} bytes with {runs:?}: {required} and {full}, written {bytes}");
            assert!(bytes <= required && required <= full, "{what}");
            // The last unit of the disk may end where the disk does.
            // The reference counts all tables of a qcow2.
            let tables = if *format == "qcow2" { full - size } else { 0 };
            assert!(!exact || required - bytes <= slack + GRAIN + tables, "{what}");
        }
    }
}

#[test]
fn a_disk_that_is_full_takes_what_was_predicted() {
    let scratch = Scratch::new();
    for size in [GRAIN * 40, (8 << 20) + 512, 3 << 20] {
        make(&scratch, size, &[(0, usize::try_from(size).unwrap())]);
        for kind in KINDS {
            let (required, full, bytes) = measure_and_convert(&scratch, kind);
            let Kind { format, options, slack, exact } = kind;
            let what = format!("{format} {options}: {size} bytes: {required} and {full}, written {bytes}");
            assert!(bytes <= required && required <= full, "{what}");
            // The last cluster ends where the disk does.
            let open = if size % (1 << 20) == 0 { 0 } else { GRAIN };
            assert!(!exact || full - bytes <= slack + open, "{what}");
        }
    }
}

/// What the source's map shows is through all its layers, and in whatever format it is.
#[test]
fn overlays_and_compressed_images_are_measured_as_what_they_hold() {
    let scratch = Scratch::new();
    make(&scratch, 5 << 20, &[(1 << 20, 1 << 20)]);
    scratch.sh("qemu-img convert -f raw -O qcow2 -c a b; qemu-img create -q -f qcow2 -b b -F qcow2 c
        qemu-io -f qcow2 -c 'write 3M 128k' c >/dev/null");
    for (name, data) in [("a", 1 << 20), ("b", 1 << 20), ("c", (1 << 20) + (128 << 10))] {
        for (format, unit) in [("vmdk", GRAIN), ("vdi", 1 << 20)] {
            let figure = |args: &[&str]| scratch.vimg(args).json()["required"].as_u64().unwrap();
            let of_image = figure(&["measure", "--output=json", "-O", format, name]);
            let empty = figure(&["measure", "--output=json", "-O", format, "--size", "5M"]);
            assert_eq!(of_image - empty, u64::next_multiple_of(data, unit), "{name} to {format}");
        }
    }
}
