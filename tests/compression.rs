//! Compressed images: readers that are as strict as can be, sizes against the reference's, and our own options.

use std::fs;

use crate::common::{Scratch, assert_same_bytes, judge, pattern, plain, vimg};

/// Files of this machine, programs and texts in turn, one behind the other.
fn real_files(scratch: &Scratch, name: &str, bytes: usize) {
    scratch.sh(&format!(
        "find /usr/bin /usr/share -type f -size -20M -readable -print0 | LC_ALL=C sort -z | python3 -c 'import sys
names = sys.stdin.buffer.read().split(b\"\\0\")[:-1]
data = bytearray()
for pair in zip(names, reversed(names)):
  for name in pair: data += open(name, \"rb\").read()
  if len(data) >= {bytes}: break
assert len(data) >= {bytes}
open(\"{name}\", \"wb\").write(data[:{bytes}])'"
    ));
    assert_eq!(fs::metadata(scratch.file(name)).unwrap().len(), bytes as u64);
}

/// Reads every compressed cluster of a qcow2 image with nothing but Python's zlib, its window set to so many bits, and
/// compares it to the raw image. A few bytes at a time: what was decoded in the same call could be gone back to even
/// where it is outside of the window. Prints how many there are.
const READER: &str = r#"
import struct, sys, zlib
image, raw, window = open(sys.argv[1], "rb").read(), open(sys.argv[2], "rb").read(), int(sys.argv[3])
bits, size = struct.unpack_from(">IQ", image, 20)
l1_size, = struct.unpack_from(">I", image, 36)
l1_at, = struct.unpack_from(">Q", image, 40)
cluster, mask, shift, count = 1 << bits, (1 << 56) - 512, 62 - (bits - 8), 0
def decoded(encoded):
    reader, parts, size, at, rest = zlib.decompressobj(-window), [], 0, 0, b""
    while size < cluster and not reader.eof:
        if not rest: rest, at = encoded[at:at + 256], at + 256
        if not rest: break
        part = reader.decompress(rest, min(128, cluster - size))
        rest = reader.unconsumed_tail
        size += len(part)
        parts.append(part)
    return b"".join(parts)
for n, l1 in enumerate(struct.unpack_from(">%dQ" % l1_size, image, l1_at)):
    if not l1 & mask: continue
    for m, l2 in enumerate(struct.unpack_from(">%dQ" % (cluster // 8), image, l1 & mask)):
        if not l2 >> 62 & 1: continue
        entry = l2 & ((1 << 62) - 1)
        at, sectors = entry & ((1 << shift) - 1), (entry >> shift) + 1
        encoded = image[at:at - at % 512 + sectors * 512]
        plain = decoded(encoded)
        start = (n * (cluster // 8) + m) * cluster
        assert plain == raw[start:start + cluster].ljust(cluster, b"\0"), start
        count += 1
print(count)
"#;

fn strictly(scratch: &Scratch, image: &str, raw: &str, window: &str) -> Result<u64, String> {
    let out = plain("python3", &["-c", READER, image, raw, window]).dir(scratch.path()).run();
    if out.code == Some(0) { Ok(out.stdout.trim().parse().unwrap()) } else { Err(out.stderr) }
}

fn len(scratch: &Scratch, name: &str) -> u64 {
    fs::metadata(scratch.file(name)).unwrap().len()
}

#[test]
fn strict_readers_read_compressed_images_and_they_are_small() {
    let scratch = Scratch::new();
    real_files(&scratch, "s.raw", (48 << 20) + 512);
    let convert = |program: fn(&[&str]) -> crate::common::Run, args: &[&str], target: &str| {
        program(&[&["convert", "-f", "raw"][..], args, &["s.raw", target]].concat()).dir(scratch.path()).ok();
        len(&scratch, target)
    };
    // What may be added to the reference's size, in hundredths.
    let cases: [(&[&str], u64); 3] = [
        (&["-O", "qcow2", "-c"], 4),
        (&["-O", "qcow2", "-c", "-o", "compression_type=zstd"], 0),
        (&["-O", "vmdk", "-o", "subformat=streamOptimized"], 0),
    ];
    for (args, more) in cases {
        let theirs = convert(|args| judge(args), args, "theirs");
        let ours = convert(|args| vimg(args), args, "ours");
        assert!(ours <= theirs + theirs * more / 100, "{args:?}: {ours} bytes, the reference's {theirs}");
        scratch.assert_same_content("raw", "s.raw", args[1], "ours");
        vimg(&["convert", "-f", args[1], "theirs", "back"]).dir(scratch.path()).ok();
        assert_same_bytes(&scratch.file("s.raw"), &scratch.file("back"));
    }
    for (args, window) in
        [(&["-O", "qcow2", "-c"][..], "12"), (&["-O", "qcow2", "-c", "-o", "compression_window=32k"], "15")]
    {
        convert(|args| vimg(args), args, "ours");
        let clusters = strictly(&scratch, "ours", "s.raw", window).unwrap();
        assert!(clusters > 500, "{clusters} clusters in {args:?}");
    }
    let wide = strictly(&scratch, "ours", "s.raw", "12").unwrap_err();
    assert!(wide.contains("invalid distance too far back"), "{wide}");
}

#[test]
fn compression_level_and_window_do_what_they_say() {
    let scratch = Scratch::new();
    real_files(&scratch, "s.raw", (3 << 20) + 512);
    let qcow2 = |options: &str, target: &str| {
        scratch.vimg(&["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", options, "s.raw", target]);
        scratch.assert_same_content("raw", "s.raw", "qcow2", target);
        scratch.assert_clean("qcow2", target);
        len(&scratch, target)
    };
    for (common, low, high, window) in [
        ("cluster_size=64k", "1", "9", Some("12")),
        ("cluster_size=4k", "1", "9", Some("12")),
        ("compression_window=4k,cluster_size=512", "1", "9", Some("12")),
        ("compression_window=32k", "1", "12", Some("15")),
        ("compression_window=32768,cluster_size=2M", "1", "12", Some("15")),
        ("compression_type=zstd", "1", "22", None),
    ] {
        let [large, small] = [low, high].map(|level| {
            let size = qcow2(&format!("compression_level={level},{common}"), "t");
            if let Some(window) = window {
                assert!(strictly(&scratch, "t", "s.raw", window).unwrap() > 0, "{common}");
            }
            size
        });
        // Clusters of 512 bytes leave little to choose from.
        assert!(small < large || common.ends_with("512"), "{common}: {small} at level {high}, {large} at {low}");
    }
    let stream = |level: &str| {
        let options = format!("subformat=streamOptimized,compression_level={level}");
        scratch.vimg(&["convert", "-f", "raw", "-O", "vmdk", "-o", &options, "s.raw", "t"]);
        scratch.assert_same_content("raw", "s.raw", "vmdk", "t");
        len(&scratch, "t")
    };
    assert!(stream("12") < stream("1"));
}

#[test]
fn compression_options_are_used_or_refused() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), pattern(1, 70_000)).unwrap();
    let convert = "convert -f raw -O";
    for (line, refusal) in [
        (
            format!("{convert} qcow2 -o compression_level=5"),
            "t: error while converting qcow2: 'compression_level' has no effect without compression (-c)",
        ),
        (
            format!("{convert} qcow2 -o compression_window=4k"),
            "t: error while converting qcow2: 'compression_window' has no effect without compression (-c)",
        ),
        (
            format!("{convert} qcow2 -c -o compression_level=0"),
            "t: error while converting qcow2: 'compression_level' must be a number from 1 to 9 here",
        ),
        (
            format!("{convert} qcow2 -c -o compression_level=12"),
            "t: error while converting qcow2: 'compression_level' must be a number from 1 to 9 here",
        ),
        (
            format!("{convert} qcow2 -c -o compression_level=13,compression_window=32k"),
            "t: error while converting qcow2: 'compression_level' must be a number from 1 to 12 here",
        ),
        (
            format!("{convert} qcow2 -c -o compression_level=23,compression_type=zstd"),
            "t: error while converting qcow2: 'compression_level' must be a number from 1 to 22 here",
        ),
        (
            format!("{convert} qcow2 -c -o compression_window=8k"),
            "t: error while converting qcow2: 'compression_window' must be 4k or 32k",
        ),
        (
            format!("{convert} qcow2 -c -o compression_window=32k,compression_type=zstd"),
            "t: error while converting qcow2: 'compression_window' has no effect on zstd",
        ),
        (
            format!("{convert} vmdk -o compression_level=5"),
            "t: error while converting vmdk: 'compression_level' has no effect unless the subformat is streamOptimized",
        ),
        (format!("{convert} raw -o compression_level=5"), "Invalid parameter 'compression_level'"),
        (format!("{convert} qcow2 -n -c -o compression_level=5"), "-o has no effect when skipping image creation"),
        (
            "create -f qcow2 -o compression_level=5,size=1M".to_owned(),
            "t: 'compression_level' is for convert: an image without data does not keep it",
        ),
    ] {
        let operands: &[&str] = if line.starts_with("create") { &["t"] } else { &["s.raw", "t"] };
        let args: Vec<&str> = line.split(' ').chain(operands.iter().copied()).collect();
        let out = vimg(&args).dir(scratch.path()).fails(1);
        assert_eq!(out.stderr, format!("qemu-img: {refusal}\n"), "{line}");
        assert_eq!(out.stdout, "", "{line}");
        assert!(!scratch.file("t").exists(), "{line}");
    }
    for format in ["qcow2", "vmdk"] {
        let args = ["create", "-f", format, "-o", "help"];
        assert_eq!(vimg(&args).ok().stdout, judge(&args).ok().stdout, "help of {format}");
        let own = plain(&crate::common::vimg_path().to_string_lossy(), &args);
        let out = own.ok().stdout;
        assert!(out.contains("compression_level=<num>"), "{out}");
    }
}

#[test]
fn a_partial_last_cluster_zeros_and_noise_compress_without_loss() {
    let scratch = Scratch::new();
    for (seed, size) in [(1, 512), (2, 65_536 + 512), (3, 3 * 65_536 - 512), (4, (2 << 20) + 1536)] {
        // Noise, one zero cluster that is not left out, text, and a tail that fills no cluster.
        let mut bytes = pattern(seed, size);
        let text = size / 2;
        bytes[text..].iter_mut().enumerate().for_each(|(n, byte)| *byte = (n / 9) as u8);
        bytes[size - size.min(700)..].fill(0);
        fs::write(scratch.file("s.raw"), &bytes).unwrap();
        for args in [
            &["-O", "qcow2", "-c"][..],
            &["-O", "qcow2", "-c", "-S", "0"],
            &["-O", "qcow2", "-c", "-S", "0", "-o", "compression_window=32k,cluster_size=2M"],
            &["-O", "qcow2", "-c", "-S", "0", "-o", "compression_type=zstd"],
            &["-O", "vmdk", "-S", "0", "-o", "subformat=streamOptimized"],
        ] {
            vimg(&[&["convert", "-f", "raw"][..], args, &["s.raw", "t"]].concat()).dir(scratch.path()).ok();
            scratch.assert_same_content("raw", "s.raw", args[1], "t");
            vimg(&["convert", "-f", args[1], "t", "back"]).dir(scratch.path()).ok();
            assert_same_bytes(&scratch.file("s.raw"), &scratch.file("back"));
            if args[1] == "qcow2" {
                scratch.assert_clean("qcow2", "t");
            }
        }
    }
}

#[test]
fn incompressible_clusters_alone_are_stored_as_they_are() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), pattern(1, 64 << 16)).unwrap();
    scratch.vimg(&["convert", "-f", "raw", "-O", "qcow2", "-c", "s.raw", "t"]);
    assert_eq!(strictly(&scratch, "t", "s.raw", "12"), Ok(0));
    // Seven eighths of noise: still worth it.
    let mut bytes = pattern(2, 64 << 16);
    bytes.chunks_mut(8192).for_each(|chunk| chunk[..1024].fill(b'x'));
    fs::write(scratch.file("s.raw"), &bytes).unwrap();
    scratch.vimg(&["convert", "-f", "raw", "-O", "qcow2", "-c", "s.raw", "t"]);
    assert_eq!(strictly(&scratch, "t", "s.raw", "12"), Ok(64));
    assert!(len(&scratch, "t") < 62 << 16);
}

/// Less memory than the encoder and the worker need for clusters of 2 MiB, and more than all that is small.
#[test]
fn a_lack_of_memory_is_an_error() {
    let scratch = Scratch::new();
    fs::write(scratch.file("s.raw"), pattern(1, 4 << 20)).unwrap();
    for (how, bytes) in [
        (&["-c", "-o", "cluster_size=2M"][..], 7 << 20),
        (&["-c", "-o", "cluster_size=2M,compression_window=32k"], 5 << 20),
        (&["-c", "-o", "cluster_size=2M,compression_type=zstd"], 5 << 20),
    ] {
        let args = [&["convert", "-m", "1", "-f", "raw", "-O", "qcow2"], how, &["s.raw", "t"]].concat();
        let out = crate::common::run::vimg_within_memory(bytes, &args).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("Cannot allocate memory"), "{how:?}: {out:?}");
        assert!(!scratch.file("t").exists());
    }
}

/// Beside two MiB for the stack of each.
#[test]
fn memory_stays_small_with_many_threads() {
    let scratch = Scratch::new();
    real_files(&scratch, "s.raw", 40 << 20);
    let secret = "secret,id=s,data=abc";
    for (how, most) in [
        (&["-c"][..], 100),
        (&["-c", "-o", "compression_type=zstd"], 100),
        (&["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"], 90),
    ] {
        let args = ["convert", "-m", "16", "--object", secret, "-f", "raw", "-O", "qcow2"];
        let args = [&args[..], how, &["s.raw", "t"]].concat();
        crate::common::run::vimg_within_memory(most << 20, &args).dir(scratch.path()).ok();
        let image = "driver=qcow2,encrypt.key-secret=s,file.filename=t";
        let image = if how.contains(&"-c") { "driver=qcow2,file.filename=t" } else { image };
        let source = "driver=raw,file.filename=s.raw";
        judge(&["compare", "--object", secret, "--image-opts", image, source]).dir(scratch.path()).ok();
    }
}

#[test]
fn memory_stays_small_with_large_clusters() {
    let scratch = Scratch::new();
    real_files(&scratch, "s.raw", 24 << 20);
    for options in
        ["cluster_size=2M", "cluster_size=2M,compression_window=32k", "cluster_size=2M,compression_type=zstd"]
    {
        let args = ["convert", "-m", "2", "-f", "raw", "-O", "qcow2", "-c", "-o", options, "s.raw", "t"];
        crate::common::run::vimg_within_memory(64 << 20, &args).dir(scratch.path()).ok();
        crate::common::run::vimg_within_memory(64 << 20, &["convert", "-m", "2", "-f", "qcow2", "t", "back"])
            .dir(scratch.path())
            .ok();
        assert_same_bytes(&scratch.file("s.raw"), &scratch.file("back"));
    }
}
