//! Internal snapshots: seeded sequences of changes against a model in memory, and what is left where storage fails or
//! loses writes while one is taken, applied or deleted. The judge reads and checks every image.

use std::collections::HashMap;
use std::sync::Arc;

use fastrand::Rng;
use nix::errno::Errno;
use vimg::block::driver::{NewSnapshot, SnapshotKey};
use vimg::block::io::Scratch as Buffers;
use vimg::block::{Format, GuestOffset, Node, Snapshots, format};
use vimg::formats::FORMATS;
use vimg::ops::snapshot::{self, SnapshotChange};
use vimg::storage::fault::{Fault, Faulty, FaultyOperation};
use vimg::storage::memory::Memory;
use vimg::storage::{Preallocation, Storage};

use crate::common::inside::{self, Files};
use crate::common::{Scratch, judge, pattern, vimg};

const NAME: &str = "image";

fn qcow2() -> &'static dyn Format {
    format::find(FORMATS, "qcow2").expect("qcow2")
}

fn open(files: &Files) -> Node {
    inside::open(files, qcow2(), NAME, true, None).expect("open")
}

fn snapshots(node: &Node) -> &dyn Snapshots {
    node.driver().snapshots().expect("qcow2 has snapshots")
}

fn take(node: &Node, name: &str) {
    let new = NewSnapshot { name: name.to_owned(), date_sec: 1_700_000_000, date_nsec: 5 };
    snapshots(node).create(&new).expect("take a snapshot");
}

/// The disk and its snapshots as the judge reads them, by name; the disk's is empty. The image is consistent.
fn judged(scratch: &Scratch, files: &Files, what: &str) -> Vec<(String, Vec<u8>)> {
    files.save(scratch.path());
    let out = judge(&["check", "-f", "qcow2", NAME]).dir(scratch.path()).run();
    assert!(matches!(out.code, Some(0 | 3)), "{what}: {out:#?}");
    let info = scratch.judge(&["info", "-f", "qcow2", "--output=json", NAME]).stdout;
    let info: serde_json::Value = serde_json::from_str(&info).expect("json");
    let listed = info["snapshots"].as_array().cloned().unwrap_or_default();
    let names = listed.iter().map(|one| one["name"].as_str().expect("name").to_owned());
    let read = |name: String| {
        let which = format!("snapshot.name={name}");
        let from = if name.is_empty() { vec![] } else { vec!["-l", &which] };
        let out = scratch.judge(&[&["convert", "-f", "qcow2", "-O", "raw"], &from[..], &[NAME, "raw"]].concat());
        assert_eq!(out.code, Some(0), "{what}: {out:#?}");
        let bytes = std::fs::read(scratch.file("raw")).expect("raw");
        (name, bytes)
    };
    std::iter::once(String::new()).chain(names).map(read).collect()
}

/// An image with two snapshots, the second of them and the disk larger than the first.
fn prepared(options: &str) -> Files {
    let files = inside::create(qcow2(), NAME, 1 << 20, options);
    let (node, mut buffers) = (open(&files), Buffers::default());
    let mut write = |at: u64, seed: u64, len: usize| {
        node.write(GuestOffset(at), &pattern(seed, len), &mut buffers).expect("write");
    };
    write(64 << 10, 1, 300_000);
    take(&node, "old");
    write(100_000, 2, 100_000);
    if !options.contains("0.10") {
        node.driver().resizing().expect("resizes").resize(2 << 20, Preallocation::Off).expect("resize");
    }
    take(&node, "mid");
    write(250_000, 3, 200_000);
    write(900_000, 4, 100_000);
    node.driver().close().expect("close");
    drop(node);
    files
}

fn changes() -> [SnapshotChange; 4] {
    [
        SnapshotChange::Create("new".to_owned()),
        SnapshotChange::Apply("old".to_owned()),
        SnapshotChange::Delete("old".to_owned()),
        SnapshotChange::Delete("mid".to_owned()),
    ]
}

/// Does it on a copy of the image with a fault.
fn run(
    files: &Files,
    change: &SnapshotChange,
    faulty: impl FnOnce(Arc<dyn Storage>) -> Faulty,
) -> (Faulty, bool, Files) {
    let plain = files.copy();
    let file = plain.get(NAME).expect("image");
    let faulty = faulty(file.clone());
    let wrapped = Files::default();
    wrapped.put(NAME, Arc::new(faulty.beside(file)));
    let worked = snapshot::change(&open(&wrapped), change).is_ok();
    (faulty, worked, plain)
}

#[test]
fn a_failed_change_of_snapshots_leaves_the_old_state_or_the_new() {
    let scratch = Scratch::new();
    for options in ["cluster_size=4096", "cluster_size=4096,compat=0.10", "extended_l2=on,cluster_size=16384"] {
        let files = prepared(options);
        let old = judged(&scratch, &files, options);
        for change in changes() {
            let (recorded, worked, after) = run(&files, &change, Faulty::recording);
            let (operations, label) = (recorded.operations(), format!("{options}: {change:?}"));
            assert!(worked, "{label}");
            let new = judged(&scratch, &after, &label);
            assert_ne!(new, old, "{label}");
            let mut seen: HashMap<Vec<u8>, bool> = HashMap::new();
            let (mut olds, mut news) = (0, 0);
            for fault in [Fault::Fail(Errno::EIO), Fault::FailFrom(Errno::ENOSPC), Fault::Shorten, Fault::Stop] {
                for (at, operation) in operations.iter().enumerate() {
                    let what = format!("{label}: {fault:?} at {operation:?}, {at} of {}", operations.len());
                    let header = matches!(operation, FaultyOperation::Write { at: 0, .. });
                    if header && fault == Fault::Shorten {
                        // Half of a header is more than a sector only where it is longer than two.
                        continue;
                    }
                    let (_, worked, after) = run(&files, &change, |inner| Faulty::new(inner, at, fault));
                    let offer = matches!(operation, FaultyOperation::Discard { .. });
                    assert!(!(worked && fault != Fault::Stop && !offer), "{what}: the failure is not reported");
                    let bytes = inside::bytes_of(&*after.get(NAME).expect("image"));
                    let is_new = *seen.entry(bytes).or_insert_with(|| {
                        let is = judged(&scratch, &after, &what);
                        assert!(is == old || is == new, "{what}: neither the old state nor the new");
                        is == new
                    });
                    if is_new { news += 1 } else { olds += 1 }
                }
            }
            assert!(olds > 0 && news > 0, "{label}: {olds} old, {news} new");
        }
    }
}

/// A power cut: of what was written since the last flush, any part may be lost.
#[test]
fn lost_writes_of_a_change_of_snapshots_leave_the_old_state_or_the_new() {
    let (scratch, mut rng) = (Scratch::new(), Rng::with_seed(11));
    let files = prepared("cluster_size=4096");
    let before = inside::bytes_of(&*files.get(NAME).expect("image"));
    let old = judged(&scratch, &files, "before");
    for change in changes() {
        let (recorded, worked, after) = run(&files, &change, Faulty::recording);
        assert!(worked, "{change:?}");
        let operations = recorded.operations();
        let done = inside::bytes_of(&*after.get(NAME).expect("image"));
        let new = judged(&scratch, &after, "after");
        let header = operations.iter().position(|one| matches!(one, FaultyOperation::Write { at: 0, .. }));
        let header = header.expect("a header is written");
        assert_eq!(operations.get(header - 1), Some(&FaultyOperation::Flush), "{change:?}");
        assert_eq!(operations.get(header + 1), Some(&FaultyOperation::Flush), "{change:?}");
        // What is written before the header is not written again, so the end has it.
        for (whole, with_header, wanted) in [(false, false, &old), (true, true, &new)] {
            for round in 0..6 {
                let mut bytes = before.clone();
                let mut put = |at: u64, len: u64| {
                    let (from, to) = (at as usize, (at + len) as usize);
                    bytes.resize(bytes.len().max(to), 0);
                    bytes[from..to].copy_from_slice(&done[from..to]);
                };
                for (n, operation) in operations.iter().enumerate() {
                    let lost = rng.bool();
                    match operation {
                        FaultyOperation::Write { at, len } if n < header && (whole || !lost) => put(*at, *len),
                        FaultyOperation::Write { at: 0, len } if n == header && with_header => put(0, *len),
                        FaultyOperation::Discard { at, len } if with_header && !lost => put(*at, *len),
                        FaultyOperation::Write { .. } if n > header => panic!("{change:?}: a write behind the header"),
                        _ => {}
                    }
                }
                let cut = Files::default();
                cut.put(NAME, Arc::new(Memory::new(bytes)));
                let what = format!("{change:?}, header {with_header}, {round}");
                assert!(judged(&scratch, &cut, &what) == *wanted, "{what}");
            }
        }
    }
}

/// What a disk and its snapshots hold.
struct Model {
    disk: Vec<u8>,
    kept: Vec<(String, Vec<u8>)>,
}

#[test]
fn sequences_of_snapshots_and_writes_are_as_the_model() {
    let scratch = Scratch::new();
    for (seed, options) in
        ["", "cluster_size=512", "extended_l2=on", "compat=0.10", "cluster_size=4096,refcount_bits=8"]
            .into_iter()
            .enumerate()
    {
        let mut rng = Rng::with_seed(seed as u64);
        let files = inside::create(qcow2(), NAME, 1 << 20, options);
        let (node, mut buffers) = (open(&files), Buffers::default());
        let mut model = Model { disk: vec![0; 1 << 20], kept: Vec::new() };
        for step in 0..60 {
            let size = model.disk.len();
            match rng.u32(..12) {
                0..5 => {
                    let len = rng.usize(1..200_000).min(size);
                    let at = rng.usize(..size - len + 1);
                    let bytes = pattern(step, len);
                    node.write(GuestOffset(at as u64), &bytes, &mut buffers).expect("write");
                    model.disk[at..at + len].copy_from_slice(&bytes);
                }
                5 => {
                    let len = rng.usize(1..300_000).min(size);
                    let at = rng.usize(..size - len + 1);
                    node.write_zeroes(GuestOffset(at as u64), len as u64, rng.bool(), &mut buffers).expect("zeros");
                    model.disk[at..at + len].fill(0);
                }
                6..9 => {
                    let name = format!("s{step}");
                    take(&node, &name);
                    model.kept.push((name, model.disk.clone()));
                }
                9 if !model.kept.is_empty() => {
                    let (name, bytes) = &model.kept[rng.usize(..model.kept.len())];
                    snapshots(&node).apply(&SnapshotKey::IdOrName(name.clone())).expect("apply");
                    model.disk.clone_from(bytes);
                }
                10 if !model.kept.is_empty() => {
                    let index = rng.usize(..model.kept.len());
                    snapshots(&node).delete(index).expect("delete");
                    model.kept.remove(index);
                }
                _ if !options.contains("0.10") => {
                    let size = rng.usize(1..5) << 19;
                    node.driver().flush().expect("flush");
                    node.driver().resizing().expect("resizes").resize(size as u64, Preallocation::Off).expect("resize");
                    model.disk.resize(size, 0);
                }
                _ => {}
            }
            if step % 15 == 14 {
                node.driver().flush().expect("flush");
                let found = judged(&scratch, &files, &format!("{options}, step {step}"));
                assert!(found[0].1 == model.disk, "{options}, step {step}: the disk differs");
                assert_eq!(found.len() - 1, model.kept.len(), "{options}, step {step}");
                for ((name, is), (wanted, bytes)) in found[1..].iter().zip(&model.kept) {
                    assert_eq!(name, wanted, "{options}, step {step}");
                    // The judge gives a snapshot the size of the disk.
                    let common = is.len().min(bytes.len());
                    assert!(is[..common] == bytes[..common], "{options}, step {step}: snapshot {name} differs");
                    let ours = snapshots(&node).open(&SnapshotKey::IdOrName(name.clone())).expect("open");
                    assert_eq!(ours.virtual_size(), bytes.len() as u64, "{options}, step {step}: {name}");
                }
            }
        }
        node.driver().close().expect("close");
        files.save(scratch.path());
        let out = judge(&["check", "-f", "qcow2", NAME]).dir(scratch.path()).run();
        assert!(out.code == Some(0), "{options}: leaks: {out:#?}");
    }
}

/// What fails is told with the file, once.
#[test]
fn a_flush_that_fails_names_the_file() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "i", "1M"]);
    for event in ["flush_to_os", "flush_to_disk"] {
        let rules = format!("file.inject-error.0.event={event},file.inject-error.0.errno=5");
        let image = format!("driver=qcow2,file.driver=blkdebug,{rules},file.image.filename=i");
        for args in
            [&["snapshot", "--image-opts", "-c", "a", &image], &["bitmap", "--image-opts", "--add", &image, "b"]]
        {
            let out = vimg(args).dir(scratch.path()).fails(1);
            let told = out.stderr.matches(r#""filename": "i""#).count();
            assert!(told == 1 && out.stderr.ends_with("could not flush: Input/output error\n"), "{args:?}: {out:?}");
        }
    }
}
