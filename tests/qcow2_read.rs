//! Reading qcow2: images that the judge's programs made, read through the library, must have the content that the
//! judge finds in them, and everything that is refused must be refused in its words.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use vimg::block::driver::SnapshotKey;
use vimg::block::io::Scratch as Buffers;
use vimg::block::{ErrorKind, ExtentKind, GuestOffset, ImageRef, NO_SECRETS, Node, OpenHow, Opener, Policy};
use vimg::drivers::DRIVERS;

use crate::common::inside::{self, Capped, Reads};
use crate::common::{Scratch, judge, vimg};

const MIB: u64 = 1 << 20;

fn open(path: &Path, format: &str) -> Arc<Node> {
    let how = OpenHow { format: Some(format.to_owned()), ..OpenHow::default() };
    Opener::new(DRIVERS, Policy::Follow, &NO_SECRETS).open(&ImageRef::name(path), &how).unwrap()
}

/// All guest bytes, read in pieces of odd lengths.
fn content(node: &Node) -> Vec<u8> {
    let mut out = vec![0xee; usize::try_from(node.virtual_size()).unwrap()];
    let mut buffers = Buffers::default();
    let mut at = 0;
    for piece in out.chunks_mut(777_216 + 512) {
        node.read(GuestOffset(at), piece, &mut buffers).unwrap();
        at += piece.len() as u64;
    }
    out
}

/// Reads the image and has the judge convert it; both must be the same, and so must a walk over the extents.
fn assert_reads_right(t: &Scratch, image: &str) {
    t.judge(&["convert", "-f", "qcow2", "-O", "raw", image, "judged.raw"]);
    let judged = fs::read(t.file("judged.raw")).unwrap();
    let node = open(&t.file(image), "qcow2");
    assert_eq!(node.virtual_size(), judged.len() as u64, "{image}");
    let ours = content(&node);
    if ours != judged {
        let at = ours.iter().zip(&judged).position(|(a, b)| a != b);
        panic!("{image}: differs at {at:?}");
    }
    let mut at = 0;
    while at < node.virtual_size() {
        let run = node.map(GuestOffset(at), node.virtual_size() - at, usize::MAX).unwrap();
        if run.is_zero() {
            let range = usize::try_from(at).unwrap()..usize::try_from(at + run.len).unwrap();
            assert!(judged[range].iter().all(|byte| *byte == 0), "{image}: {at}+{} is not zero", run.len);
        }
        at += run.len;
    }
}

/// Data, odd pieces, zeros of both kinds, discarded clusters, and compressed ones where the image may have them.
fn fill(t: &Scratch, image: &str, compressed: bool) {
    let mut commands = vec![
        "write -P 17 0 300k",
        "write -P 34 777k 5k",
        "write -P 51 1M 1M",
        "write -z 1100k 200k",
        "write -z -u 1500k 100k",
        "discard 1700k 100k",
        "write -P 68 3000k 1",
        "write -z 5M 900k",
        "write -P 85 5200k 3k",
    ];
    if compressed {
        commands.extend(["write -c -P 102 6M 1M", "write -P 119 6500k 3k", "write -c -P 136 8M 64k"]);
    }
    t.qemu_io("qcow2", image, &commands);
}

#[test]
fn every_cluster_size_refcount_width_and_version_is_read() {
    let t = Scratch::new();
    for options in [
        "cluster_size=512",
        "cluster_size=1k,refcount_bits=1",
        "cluster_size=4k,refcount_bits=2",
        "cluster_size=16k,refcount_bits=4,extended_l2=on",
        "cluster_size=64k,refcount_bits=8",
        "cluster_size=64k,compat=0.10",
        "cluster_size=64k,refcount_bits=32,extended_l2=on",
        "cluster_size=256k,refcount_bits=64,lazy_refcounts=on",
        "cluster_size=2M",
        "cluster_size=2M,extended_l2=on,refcount_bits=1",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=4k,compression_type=zstd",
    ] {
        t.judge(&["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "9M"]);
        // Compressed pieces of qemu-io must be whole clusters.
        fill(&t, "a.qcow2", !options.contains("2M") && !options.contains("256k"));
        assert_reads_right(&t, "a.qcow2");
    }
}

#[test]
fn compressed_images_are_read() {
    let t = Scratch::new();
    // Text that shrinks, a part that does not, zeros, and an end inside a cluster.
    let mut plain = Vec::new();
    while plain.len() < 3 << 20 {
        plain.extend_from_slice(format!("line {} of a text\n", plain.len()).as_bytes());
    }
    let mut state = 1u64;
    plain.extend((0..1 << 20).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    }));
    plain.resize((5 << 20) + 1536, 0);
    plain.extend_from_slice(&[7; 512]);
    fs::write(t.file("plain.raw"), &plain).unwrap();
    for options in [
        "cluster_size=512",
        "cluster_size=64k",
        "cluster_size=2M",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=2M,compression_type=zstd,extended_l2=on",
        "compat=0.10",
    ] {
        t.judge(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "plain.raw", "c.qcow2"]);
        assert_eq!(content(&open(&t.file("c.qcow2"), "qcow2")), plain, "{options}");
    }
}

#[test]
fn shorter_and_longer_backing_files_are_read() {
    let t = Scratch::new();
    t.judge(&["create", "-q", "-f", "qcow2", "base.qcow2", "3M"]);
    t.qemu_io("qcow2", "base.qcow2", &["write -P 1 0 3M", "write -z 1M 64k"]);
    for (size, options) in [("9M", "extended_l2=on"), ("9M", "cluster_size=4k"), ("2M", "cluster_size=64k")] {
        t.judge(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "-o", options, "top.qcow2", size]);
        t.qemu_io("qcow2", "top.qcow2", &["write -P 2 700k 3k", "write -z 1500k 128k", "write -P 3 1999k 1k"]);
        assert_reads_right(&t, "top.qcow2");
    }
}

#[test]
fn external_data_files_are_read() {
    let t = Scratch::new();
    for (name, options) in [("d", "data_file=d.raw"), ("r", "data_file=r.raw,data_file_raw=on")] {
        let image = format!("{name}.qcow2");
        t.judge(&["create", "-q", "-f", "qcow2", "-o", options, &image, "9M"]);
        fill(&t, &image, false);
        assert_reads_right(&t, &image);
        let node = open(&t.file(&image), "qcow2");
        let run = node.map(GuestOffset(0), MIB, 1).unwrap();
        assert!(matches!(run.kind, ExtentKind::Data(place) if place.file == 1 && place.at.get() == 0));
    }
    fs::remove_file(t.file("d.raw")).unwrap();
    let out = vimg(&["info", "d.qcow2"]).dir(t.path()).run();
    assert_eq!(out.stdout, t.judge(&["info", "d.qcow2"]).stdout);
    assert_eq!(out.code, Some(0));
}

#[test]
fn snapshots_are_layers_of_their_own() {
    let t = Scratch::new();
    t.judge(&["create", "-q", "-f", "qcow2", "s.qcow2", "3M"]);
    t.qemu_io("qcow2", "s.qcow2", &["write -P 1 0 2M"]);
    t.judge(&["snapshot", "-c", "one", "s.qcow2"]);
    t.qemu_io("qcow2", "s.qcow2", &["write -P 2 1M 2M"]);
    t.judge(&["snapshot", "-c", "two", "s.qcow2"]);
    t.qemu_io("qcow2", "s.qcow2", &["write -z 0 3M"]);
    assert_reads_right(&t, "s.qcow2");
    let node = open(&t.file("s.qcow2"), "qcow2");
    let snapshots = node.driver().snapshots().unwrap();
    let names: Vec<_> = snapshots.list().unwrap().into_iter().map(|one| (one.id, one.name)).collect();
    assert_eq!(names, [("1".into(), "one".into()), ("2".into(), "two".into())]);
    for (key, judged) in [
        (SnapshotKey::IdOrName("one".into()), "one"),
        (SnapshotKey::IdOrName("2".into()), "two"),
        (SnapshotKey::Exact { id: Some("2".into()), name: Some("two".into()) }, "two"),
    ] {
        t.judge(&["convert", "-l", judged, "-O", "raw", "s.qcow2", "judged.raw"]);
        let layer = Node::new(snapshots.open(&key).unwrap(), None, "s.qcow2".into());
        assert_eq!(content(&layer), fs::read(t.file("judged.raw")).unwrap(), "{judged}");
    }
    for key in [
        SnapshotKey::IdOrName("three".into()),
        SnapshotKey::Exact { id: Some("1".into()), name: Some("two".into()) },
        SnapshotKey::Exact { id: None, name: None },
    ] {
        assert_eq!(snapshots.open(&key).unwrap_err().message(), "Can't find snapshot");
    }
}

#[test]
fn an_empty_disk_of_16_tib_is_one_extent() {
    let t = Scratch::new();
    t.judge(&["create", "-q", "-f", "qcow2", "e.qcow2", "16T"]);
    let reads = Arc::<Reads>::default();
    let storage = Arc::new(Capped::counted(fs::read(t.file("e.qcow2")).unwrap(), u64::MAX, reads.clone()));
    let node = inside::open_alone(storage, &vimg::formats::qcow2::Qcow2, false).unwrap();
    let run = node.map(GuestOffset(0), u64::MAX, 1).unwrap();
    assert_eq!((run.len, run.kind), (16 << 40, ExtentKind::Unallocated(None)));
    // The L1 table of 256 KiB and little else.
    assert!(reads.calls() < 100 && reads.bytes() < 1 << 20, "{reads:?}");
}

/// Puts big-endian bytes somewhere in a file.
fn patch(t: &Scratch, image: &str, at: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(t.file(image)).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

/// `info` of both programs must say the same.
fn assert_same_info(t: &Scratch, image: &str, what: &str) {
    for output in ["human", "json"] {
        let args = ["info", "-f", "qcow2", "--output", output, image];
        let judged = judge(&args).dir(t.path()).run();
        let ours = vimg(&args).dir(t.path()).run();
        let said = |text: &str| text.trim_end().replacen("qemu-img: ", "", 1).replacen("vimg: ", "", 1);
        assert_eq!((ours.code, said(&ours.stderr)), (judged.code, said(&judged.stderr)), "{what}");
        assert_eq!(ours.stdout, judged.stdout, "{what}");
    }
}

#[test]
fn wrong_headers_are_refused_in_the_same_words() {
    let t = Scratch::new();
    t.judge(&["create", "-q", "-f", "qcow2", "good.qcow2", "64M"]);
    let word = |n: u32| n.to_be_bytes().to_vec();
    let long = |n: u64| n.to_be_bytes().to_vec();
    let extension = |kind: u32, len: u32| [word(kind), word(len)].concat();
    let cases: Vec<(&str, u64, Vec<u8>)> = vec![
        ("magic", 0, word(0)),
        ("version", 4, word(4)),
        ("cluster size", 20, word(8)),
        ("cluster size", 20, word(22)),
        ("refcount width", 96, word(7)),
        ("short header", 100, word(96)),
        ("header length", 100, word(106)),
        ("long header", 100, word(65544)),
        ("feature", 72, long(1 << 5)),
        ("features", 72, long(1 << 5 | 1 << 63)),
        ("dirty", 72, long(1)),
        ("corrupt", 72, long(2)),
        ("compression bit", 72, long(8)),
        ("compression type", 104, vec![1]),
        ("encryption", 32, word(3)),
        ("aes", 32, word(1)),
        ("luks", 32, word(2)),
        ("no L1", 36, word(0)),
        ("large L1", 36, word(4_194_305)),
        ("odd L1", 40, long(0x30200)),
        ("far L1", 40, long(1 << 40)),
        ("large disk", 24, long((1 << 63) - 512)),
        ("odd disk", 24, long(64 * MIB + 100)),
        ("larger disk", 24, long(1 << 40)),
        ("odd refcount table", 48, long(0x10200)),
        ("no refcount table", 56, word(0)),
        ("large refcount table", 56, word(129)),
        ("snapshots", 60, word(65537)),
        ("a snapshot nowhere", 60, word(1)),
        ("extension", 112, extension(0xe279_2aca, 70000)),
        ("format", 112, extension(0xe279_2aca, 16)),
        ("crypto", 112, extension(0x0537_be77, 16)),
        ("bitmaps", 112, extension(0x2385_2875, 8)),
        ("autoclear", 88, long(1 << 5)),
    ];
    for (what, at, bytes) in cases {
        fs::copy(t.file("good.qcow2"), t.file("x.qcow2")).unwrap();
        patch(&t, "x.qcow2", at, &bytes);
        assert_same_info(&t, "x.qcow2", what);
    }
    for length in [0, 3, 50, 72, 103, 104, 400, 65537] {
        fs::copy(t.file("good.qcow2"), t.file("x.qcow2")).unwrap();
        fs::File::options().write(true).open(t.file("x.qcow2")).unwrap().set_len(length).unwrap();
        assert_same_info(&t, "x.qcow2", &format!("length {length}"));
    }
}

#[test]
fn wrong_tables_are_errors_where_they_matter() {
    let t = Scratch::new();
    t.judge(&["create", "-q", "-f", "qcow2", "good.qcow2", "64M"]);
    t.qemu_io("qcow2", "good.qcow2", &["write -P 1 0 192k"]);
    // 3: L1, 4: L2, 5 to 7: data.
    for (what, at, entry, said) in [
        ("L2 table", 0x30000, 0x8000_0000_0004_0200, "L2 table offset 0x40200 unaligned (L1 index: 0)"),
        ("cluster", 0x40008, 0x8000_0000_0005_0200, "offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0x1)"),
    ] {
        fs::copy(t.file("good.qcow2"), t.file("x.qcow2")).unwrap();
        patch(&t, "x.qcow2", at, &u64::to_be_bytes(entry));
        let node = open(&t.file("x.qcow2"), "qcow2");
        let mut buffer = vec![0; 192 << 10];
        let error = node.read(GuestOffset(0), &mut buffer, &mut Buffers::default()).unwrap_err();
        assert_eq!(error.message(), "Input/output error", "{what}");
        assert!(error.all_notes()[0].contains(said), "{what}: {:?}", error.all_notes());
    }
    // Data past the end of the file is missing, and garbage where compressed data should be is none.
    for (entry, kind) in [(0x8000_0100_0000_0000u64, ErrorKind::Truncated), (0x4000_0000_0005_0000, ErrorKind::Corrupt)]
    {
        fs::copy(t.file("good.qcow2"), t.file("x.qcow2")).unwrap();
        patch(&t, "x.qcow2", 0x40000, &entry.to_be_bytes());
        let node = open(&t.file("x.qcow2"), "qcow2");
        let mut buffer = vec![1; 512];
        assert_eq!(node.read(GuestOffset(0), &mut buffer, &mut Buffers::default()).unwrap_err().kind, kind);
    }
}

#[test]
fn info_of_every_feature_is_the_references() {
    let t = Scratch::new();
    t.judge(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "extended_l2=on,lazy_refcounts=on,refcount_bits=64",
        "a.qcow2",
        "1M",
    ]);
    t.judge(&["bitmap", "--add", "a.qcow2", "first"]);
    t.judge(&["bitmap", "--add", "--disable", "-g", "1M", "a.qcow2", "second"]);
    t.judge(&["snapshot", "-c", "one", "a.qcow2"]);
    assert_same_info(&t, "a.qcow2", "bitmaps and a snapshot");
    t.judge(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1M"]);
    assert_same_info(&t, "old.qcow2", "version 2");
    for (format, name) in [("luks", "l.qcow2"), ("aes", "k.qcow2")] {
        let options = format!("encrypt.format={format},encrypt.key-secret=s,encrypt.iter-time=10");
        let options = if format == "aes" { options.replace(",encrypt.iter-time=10", "") } else { options };
        let secret = ["--object", "secret,id=s,data=abc"];
        t.judge(&["create", "-q", "-f", "qcow2", secret[0], secret[1], "-o", &options, name, "1M"]);
        assert_same_info(&t, name, format);
        let how = OpenHow { format: Some("qcow2".into()), ..OpenHow::default() };
        let image = ImageRef::name(t.file(name));
        let error = Opener::new(DRIVERS, Policy::Follow, &NO_SECRETS).open(&image, &how).unwrap_err();
        assert!(error.message().ends_with("Parameter 'encrypt.key-secret' is required for cipher"), "{error:?}");
    }
}

/// The last name in the table of feature names may be shorter than an entry.
#[test]
fn feature_names_that_are_cut_short_are_shown() {
    let scratch = Scratch::new();
    let first = |rest: &[u8]| [&[0, 62][..], b"first", &[0; 41], rest].concat();
    let tables =
        [b"\0\x3fsome feature".to_vec(), first(b"\0\x3fother"), first(b"\0\x3f"), first(b"\0"), vec![0], vec![]];
    for table in tables {
        scratch.judge(&["create", "-q", "-f", "qcow2", "i", "1M"]);
        let mut file = std::fs::read(scratch.file("i")).unwrap();
        file[72] = 0xc0;
        let mut names = [0x6803_f857u32.to_be_bytes(), (table.len() as u32).to_be_bytes()].concat();
        names.extend_from_slice(&table);
        names.resize(names.len().next_multiple_of(8) + 8, 0);
        file[112..112 + names.len()].copy_from_slice(&names);
        std::fs::write(scratch.file("i"), &file).unwrap();
        let ours = vimg(&["info", "i"]).dir(scratch.path()).fails(1).stderr;
        let theirs = judge(&["info", "i"]).dir(scratch.path()).fails(1).stderr;
        assert_eq!(ours.split_once(' ').unwrap().1, theirs.split_once(' ').unwrap().1, "{table:?}");
    }
}

/// What an L2 table mapped that a cut has taken away is not zeros; what lies before it can be read.
#[test]
fn a_lost_l2_table_is_an_error() {
    let scratch = Scratch::new();
    for options in ["cluster_size=64k", "cluster_size=4k", "cluster_size=2M", "extended_l2=on"] {
        scratch.judge(&["create", "-q", "-f", "qcow2", "-o", options, "i", "1G"]);
        scratch.qemu_io("qcow2", "i", &["write -P 3 0 64k", "write -P 4 700M 64k"]);
        let file = std::fs::read(scratch.file("i")).unwrap();
        let word = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
        let (l1, entries) = (word(40) as usize, word(32) as usize & 0xffff_ffff);
        let tables: Vec<u64> = (0..entries).map(|n| word(l1 + n * 8)).filter(|word| word >> 63 != 0).collect();
        let last = tables.iter().max().unwrap() & 0x00ff_ffff_ffff_fe00;
        std::fs::write(scratch.file("cut"), &file[..last as usize + 512]).unwrap();
        let out = vimg(&["convert", "-f", "qcow2", "-O", "raw", "cut", "o"]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("L2 table at offset"), "{options}: {out:?}");
        assert!(!scratch.file("o").exists());
        vimg(&["info", "cut"]).dir(scratch.path()).ok();
    }
}
