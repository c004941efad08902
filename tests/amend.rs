//! `amend` and `bitmap`: what is left where storage fails or loses writes, seeded sequences by both programs, and key
//! slots. The judge reads and checks every image.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;

use fastrand::Rng;
use nix::errno::Errno;
use serde_json::{Value, json};
use vimg::block::driver::{AmendRequest, NewSnapshot, SnapshotKey};
use vimg::block::io::Scratch as Buffers;
use vimg::block::{CreateOptions, Format, GuestOffset, Node, Secrets, format};
use vimg::crypto::luks::{HEADER, LuksError, LuksHeader};
use vimg::formats::FORMATS;
use vimg::ops::amend;
use vimg::ops::bitmap::{self, BitmapAction};
use vimg::storage::Storage;
use vimg::storage::fault::{Fault, Faulty, FaultyOperation};
use vimg::storage::memory::Memory;

use crate::bitmaps::bitmaps;
use crate::common::inside::{self, Files, PASSPHRASE};
use crate::common::{Scratch, judge, need, pattern, sh, vimg};

const NAME: &str = "image";
const BASE: &str = "base";

fn named(name: &str) -> &'static dyn Format {
    format::find(FORMATS, name).expect("format")
}

/// The backing file, if there is one.
fn below(files: &Files) -> Option<Arc<Node>> {
    files.get(BASE).map(|_| Arc::new(inside::open(files, named("raw"), BASE, false, None).expect("base")))
}

/// The image, on top of its backing file.
fn open(files: &Files) -> Node {
    inside::open(files, named("qcow2"), NAME, true, below(files)).expect("open")
}

/// Amends the options of an open image, as the text says.
pub fn amend_node(node: &Node, text: &str, secrets: &Secrets, force: bool) -> vimg::block::Result<()> {
    let format = named(node.driver().format());
    let options = inside::given(CreateOptions::new(&[format.amend_options()]), text);
    amend::amend(node, &AmendRequest { options: &options, secrets, force, progress: &|_, _| Ok(()) })
}

/// What is done to an image.
enum Change {
    Amend(&'static str),
    Bitmap(&'static str, Vec<BitmapAction>),
}

impl Change {
    fn run(&self, node: &Node) -> vimg::block::Result<()> {
        match self {
            Self::Amend(text) => amend_node(node, text, &Secrets::default(), false),
            Self::Bitmap(name, actions) => bitmap::change(node, name, actions, None),
        }
    }

    fn label(&self) -> String {
        match self {
            Self::Amend(text) => (*text).to_owned(),
            Self::Bitmap(name, actions) => format!("{name}: {actions:?}"),
        }
    }
}

/// What `info` says of an image, but for what depends on the host and on the time.
fn facts(info: &Value) -> Value {
    let names = |one: &Value| json!([one["name"], one["id"], one["vm-state-size"]]);
    let snapshots: Vec<Value> = info["snapshots"].as_array().into_iter().flatten().map(names).collect();
    json!([info["virtual-size"], info["format-specific"], info["full-backing-filename"], info["dirty-flag"], snapshots])
}

/// What the disk and its snapshots hold.
fn contents(files: &Files) -> Vec<Vec<u8>> {
    let (below, mut buffers) = (below(files), Buffers::default());
    let mut read = |node: &Node| {
        let mut bytes = vec![0; node.virtual_size() as usize];
        node.read(GuestOffset(0), &mut bytes, &mut buffers).expect("read");
        bytes
    };
    let node = inside::open(files, named("qcow2"), NAME, false, below.clone()).expect("open");
    let snapshots = node.driver().snapshots().expect("snapshots");
    let mut found = vec![read(&node)];
    for one in snapshots.list().expect("snapshots") {
        let driver = snapshots.open(&SnapshotKey::IdOrName(one.id)).expect("snapshot");
        found.push(read(&Node::new(driver, below.clone(), one.name)));
    }
    found
}

/// What the image is: what the judge says of it, its bitmaps' bits, and what the disk and its snapshots hold. It is
/// consistent.
fn judged(scratch: &Scratch, files: &Files, what: &str) -> (Value, Vec<Vec<u8>>) {
    files.save(scratch.path());
    let out = judge(&["check", "-f", "qcow2", NAME]).dir(scratch.path()).run();
    assert!(matches!(out.code, Some(0 | 3)), "{what}: {out:#?}");
    let info: Value = scratch.judge(&["info", "-f", "qcow2", "--output=json", NAME]).json();
    let mut contents = contents(files);
    if info["format-specific"]["data"]["bitmaps"].is_array() {
        contents.extend(bitmaps(&image(files)).into_iter().map(|(_, _, bits)| bits));
    }
    (facts(&info), contents)
}

/// An image of 1 MiB on a backing file, with data, zeros of all kinds, and snapshots that share some of them.
fn prepared(options: &str, snapshots: bool) -> Files {
    let options = format!("{options},backing_file={BASE},backing_fmt=raw");
    let files = inside::create(named("qcow2"), NAME, 1 << 20, &options);
    files.put(BASE, Arc::new(Memory::new(pattern(9, 1 << 20))));
    let (node, mut buffers) = (open(&files), Buffers::default());
    let mut write = |at: u64, seed: u64, len: usize| match seed {
        0 => node.write_zeroes(GuestOffset(at), len as u64, at & 4096 == 0, &mut buffers).expect("zeros"),
        _ => node.write(GuestOffset(at), &pattern(seed, len), &mut buffers).expect("write"),
    };
    let take = |name: &str| {
        let new = NewSnapshot { name: name.to_owned(), date_sec: 1_700_000_000, date_nsec: 5 };
        node.driver().snapshots().expect("snapshots").create(&new).expect("snapshot");
    };
    write(64 << 10, 1, 60_000);
    write(80 << 10, 0, 8192);
    write(600 << 10, 0, 12288);
    if snapshots {
        take("one");
    }
    write(100 << 10, 0, 4096);
    write(84 << 10, 2, 5000);
    write(700 << 10, 0, 8192);
    if snapshots {
        take("two");
        write(700 << 10, 3, 4096);
        write(110 << 10, 0, 8192);
    }
    node.driver().close().expect("close");
    drop(node);
    files
}

/// Takes the extra data of the only snapshot away, as the first programs wrote it.
fn without_extra_data(files: &Files) {
    let storage = files.get(NAME).expect("image");
    let mut bytes = inside::bytes_of(&*storage);
    let at = u64::from_be_bytes(bytes[64..72].try_into().expect("8 bytes")) as usize;
    bytes[at + 36..at + 40].fill(0);
    bytes.copy_within(at + 64..at + 68, at + 40);
    bytes[at + 44..at + 68].fill(0);
    storage.write_at(0, &bytes).expect("write");
}

fn with_one_snapshot(options: &str) -> Files {
    let files = inside::create(named("qcow2"), NAME, 1 << 20, options);
    let node = open(&files);
    node.write(GuestOffset(5000), &pattern(4, 100_000), &mut Buffers::default()).expect("write");
    let new = NewSnapshot { name: "one".to_owned(), date_sec: 1_700_000_000, date_nsec: 5 };
    node.driver().snapshots().expect("snapshots").create(&new).expect("snapshot");
    node.driver().close().expect("close");
    files
}

/// Three bitmaps with some bits.
fn with_bitmaps(options: &str) -> Files {
    let files = inside::create(named("qcow2"), NAME, 1 << 20, options);
    let add = |name: &str, granularity| {
        let actions = [BitmapAction::Add(Some(granularity))];
        bitmap::change(&open(&files), name, &actions, None).expect("add");
    };
    add("fine", 512);
    add("coarse", 65536);
    let node = open(&files);
    node.write(GuestOffset(5000), &pattern(4, 100_000), &mut Buffers::default()).expect("write");
    node.driver().close().expect("close");
    drop(node);
    add("other", 4096);
    files
}

/// Images, and what is done to each.
fn changes() -> Vec<(Files, Change)> {
    use BitmapAction::{Add, Clear, Disable, Enable, Merge, Remove};
    let mut all = Vec::new();
    let mut add = |files: Files, change: Change| all.push((files, change));
    add(prepared("cluster_size=4096,compat=0.10", true), Change::Amend("compat=1.1"));
    let old = with_one_snapshot("cluster_size=4096,compat=0.10");
    without_extra_data(&old);
    add(old, Change::Amend("compat=1.1"));
    add(prepared("cluster_size=4096", false), Change::Amend("compat=0.10"));
    add(prepared("cluster_size=4096", true), Change::Amend("compat=0.10"));
    add(prepared("cluster_size=4096,refcount_bits=8", true), Change::Amend("compat=0.10,refcount_bits=16"));
    add(prepared("cluster_size=512", true), Change::Amend("refcount_bits=64"));
    add(prepared("cluster_size=512,refcount_bits=64", true), Change::Amend("refcount_bits=4"));
    add(prepared("cluster_size=65536", false), Change::Amend("refcount_bits=1"));
    add(prepared("cluster_size=65536", false), Change::Amend("lazy_refcounts=on"));
    for (name, actions) in [
        ("new", vec![Add(None)]),
        ("fine", vec![Remove]),
        ("fine", vec![Clear]),
        ("coarse", vec![Disable, Merge("fine".to_owned())]),
        ("other", vec![Merge("coarse".to_owned()), Disable, Enable]),
        ("fine", vec![Remove, Add(Some(1 << 20)), Merge("other".to_owned())]),
    ] {
        add(with_bitmaps("cluster_size=512"), Change::Bitmap(name, actions));
    }
    add(inside::create(named("qcow2"), NAME, 1 << 20, ""), Change::Bitmap("new", vec![Add(None)]));
    all
}

/// Does it on a copy of the image with a fault.
fn run(files: &Files, change: &Change, faulty: impl FnOnce(Arc<dyn Storage>) -> Faulty) -> (Faulty, bool, Files) {
    let plain = files.copy();
    let file = plain.get(NAME).expect("image");
    let faulty = faulty(file.clone());
    let wrapped = Files::default();
    if let Some(base) = plain.get(BASE) {
        wrapped.put(BASE, base);
    }
    wrapped.put(NAME, Arc::new(faulty.beside(file)));
    let worked = change.run(&open(&wrapped)).is_ok();
    (faulty, worked, plain)
}

fn image(files: &Files) -> Vec<u8> {
    inside::bytes_of(&*files.get(NAME).expect("image"))
}

#[test]
fn a_failed_amendment_leaves_the_old_state_or_the_new() {
    let scratch = Scratch::new();
    for (files, change) in changes() {
        let label = change.label();
        let old = judged(&scratch, &files, &label);
        let (recorded, worked, after) = run(&files, &change, Faulty::recording);
        let operations = recorded.operations();
        assert!(worked, "{label}");
        let new = judged(&scratch, &after, &label);
        assert!(old != new, "{label}: nothing changes");
        let out = judge(&["check", "-f", "qcow2", NAME]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(0), "{label}: {out:#?}");
        let mut seen: HashMap<Vec<u8>, bool> = HashMap::new();
        let (mut olds, mut news) = (0, 0);
        for fault in [Fault::Fail(Errno::EIO), Fault::FailFrom(Errno::ENOSPC), Fault::Shorten, Fault::Stop] {
            for (at, operation) in operations.iter().enumerate() {
                let what = format!("{label}: {fault:?} at {operation:?}, {at} of {}", operations.len());
                if fault == Fault::Shorten && matches!(operation, FaultyOperation::Write { at: 0, .. }) {
                    // A header is written in one go, or not at all.
                    continue;
                }
                let (_, worked, after) = run(&files, &change, |inner| Faulty::new(inner, at, fault));
                let offer = matches!(operation, FaultyOperation::Discard { .. });
                assert!(!(worked && fault != Fault::Stop && !offer), "{what}: the failure is not reported");
                let is_new = *seen.entry(image(&after)).or_insert_with(|| {
                    let is = judged(&scratch, &after, &what);
                    assert!(is == old || is == new, "{what}: neither the old state nor the new: {:#?}", is.0);
                    is == new
                });
                if is_new { news += 1 } else { olds += 1 }
            }
        }
        assert!(olds > 0 && news > 0, "{label}: {olds} old, {news} new");
    }
}

/// A power cut: of what was written since the last flush, any part may be lost.
#[test]
fn lost_writes_of_an_amendment_leave_the_old_state_or_the_new() {
    let (scratch, mut rng) = (Scratch::new(), Rng::with_seed(12));
    for (files, change) in changes() {
        let label = change.label();
        let old = judged(&scratch, &files, &label);
        let (recorded, _, after) = run(&files, &change, Faulty::recording);
        let (operations, new) = (recorded.operations(), judged(&scratch, &after, &label));
        let prefix = |n: usize| image(&run(&files, &change, |inner| Faulty::new(inner, n, Fault::Stop)).2);
        // The image before each operation, and after the last.
        let prefixes: Vec<Vec<u8>> = (0..operations.len()).map(prefix).chain([image(&after)]).collect();
        for _ in 0..12 {
            let cut = rng.usize(1..=operations.len());
            let flushed = operations[..cut].iter().rposition(|one| *one == FaultyOperation::Flush).map_or(0, |n| n + 1);
            let mut bytes = prefixes[flushed].clone();
            for n in flushed..cut {
                let (at, len) = match operations[n] {
                    FaultyOperation::Write { at, len }
                    | FaultyOperation::Zero { at, len }
                    | FaultyOperation::Discard { at, len } => (at as usize, len as usize),
                    FaultyOperation::SetLen(_) | FaultyOperation::Flush => continue,
                };
                let end = (at + len).min(prefixes[n + 1].len());
                if rng.bool() && at < end {
                    bytes.resize(bytes.len().max(end), 0);
                    bytes[at..end].copy_from_slice(&prefixes[n + 1][at..end]);
                }
            }
            let lost = files.copy();
            lost.put(NAME, Arc::new(Memory::new(bytes)));
            let what = format!("{label}: cut at {cut} of {}", operations.len());
            let is = judged(&scratch, &lost, &what);
            assert!(is == old || is == new, "{what}: neither the old state nor the new: {:#?}", is.0);
        }
    }
}

/// One step of a sequence: the words behind the program's name, and the file's name among them.
fn step(rng: &mut Rng, number: usize, state: &mut Sequence) -> Vec<String> {
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let names = ["a", "b", "c"];
    let name = names[rng.usize(..3)];
    let amend = |options: String| words(&format!("amend -o {options} FILE"));
    match rng.u32(..20) {
        0..4 => {
            let granularity = 512u64 << rng.u32(..12);
            words(&format!("bitmap --add -g {granularity} FILE {name}"))
        }
        4..8 => {
            let actions = ["--remove", "--clear", "--enable", "--disable", "--clear --disable", "--disable --enable"];
            words(&format!("bitmap {} FILE {name}", actions[rng.usize(..6)]))
        }
        8..11 => words(&format!("bitmap --merge {} FILE {name}", names[rng.usize(..3)])),
        11 => amend(format!("refcount_bits={}", 1 << rng.u32(2..7))),
        12 => amend(format!("lazy_refcounts={}", if rng.bool() { "on" } else { "off" })),
        13 => amend("compat=1.1".to_owned()),
        // Version 2 cannot hold bitmaps: the programs differ there.
        14 if state.bitmaps.is_empty() => amend("compat=0.10".to_owned()),
        15 => amend(format!("size={}k", 4 * rng.u32(200..800))),
        16 => words(&format!("resize -q --shrink FILE {}k", 4 * rng.u32(200..800))),
        17 => words(&format!("snapshot -c s{number} FILE")),
        18 => words(&format!("snapshot -d s{} FILE", rng.usize(..number + 1))),
        _ => amend(format!("refcount_bits={},lazy_refcounts=on,size={}k", 8 << rng.u32(..4), 4 * rng.u32(200..800))),
    }
}

/// What is known of the images of a sequence.
#[derive(Default)]
struct Sequence {
    bitmaps: Vec<Value>,
}

#[test]
fn sequences_of_changes_leave_what_qemu_img_leaves() {
    for (seed, options) in ["", "cluster_size=512", "extended_l2=on,cluster_size=16k", "compat=0.10,cluster_size=4k"]
        .into_iter()
        .enumerate()
    {
        let (s, mut rng, mut state) = (Scratch::new(), Rng::with_seed(seed as u64), Sequence::default());
        let size = ["-o", options];
        let size = if options.is_empty() { &[][..] } else { &size[..] };
        s.judge(&[&["create", "-q", "-f", "qcow2"], size, &["ours", "2M"]].concat());
        fs::copy(s.file("ours"), s.file("theirs")).expect("copy");
        let (mut done, mut refused) = (0, 0);
        for number in 0..45 {
            if rng.u32(..4) == 0 {
                let at = rng.u32(..700);
                let write = format!("write -P {} {at}k {}k", number + 1, rng.u32(1..90));
                for file in ["ours", "theirs"] {
                    s.qemu_io("qcow2", file, &[&write]);
                }
            }
            let words = step(&mut rng, number, &mut state);
            let line = |file: &str| words.iter().map(|w| w.replace("FILE", file)).collect::<Vec<_>>();
            let ours = vimg(&line("ours")).dir(s.path()).run();
            let theirs = judge(&line("theirs")).dir(s.path()).run();
            let what = format!("{options}, {number}: {words:?}: {ours:?} {theirs:?}");
            assert_eq!(ours.code, theirs.code, "{what}");
            if ours.code == Some(0) {
                done += 1
            } else {
                refused += 1
            }
            let info = |file: &str| facts(&s.judge(&["info", "--output=json", file]).json());
            let (is, wanted) = (info("ours"), info("theirs"));
            assert_eq!(is, wanted, "{what}");
            state.bitmaps = is[1]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
            if number % 10 == 9 {
                s.assert_clean("qcow2", "ours");
                s.assert_same_content("qcow2", "ours", "qcow2", "theirs");
                assert_eq!(vimg(&["check", "ours"]).dir(s.path()).run().code, Some(0), "{what}");
            }
        }
        assert!(done > 15 && refused > 2, "{options}: {done} done, {refused} refused");
    }
}

/// What is refused changes nothing, whatever else is asked for; a size of 0 asks for nothing.
#[test]
fn a_refused_amendment_leaves_all_of_the_disk() {
    let s = Scratch::new();
    s.judge(&["create", "-q", "-f", "qcow2", "a", "4M"]);
    // Two compressed clusters in one of the host's: a refcount of 2.
    s.qemu_io("qcow2", "a", &["write -c 0 64k", "write -c 64k 64k", "write -P 9 3M 64k"]);
    fs::copy(s.file("a"), s.file("b")).expect("copy");
    let before = fs::read(s.file("a")).expect("read");
    for (options, code) in [
        ("size=2M,refcount_bits=1", 1),
        ("size=8M,lazy_refcounts=on,refcount_bits=1", 1),
        ("lazy_refcounts=on,compat=0.10", 1),
        ("refcount_bits=8,compat=0.10", 1),
        ("size=0", 0),
    ] {
        let out = vimg(&["amend", "-o", options, "a"]).dir(s.path()).run();
        let theirs = judge(&["amend", "-o", options, "b"]).dir(s.path()).run();
        assert_eq!((out.code, out.code, &out.stderr), (Some(code), theirs.code, &theirs.stderr), "{options}");
        assert!(fs::read(s.file("a")).expect("read") == before, "{options}");
    }
}

/// Whether a passphrase opens the header of a volume.
fn opens(volume: &[u8], passphrase: &[u8]) -> bool {
    let header = LuksHeader::parse(volume.first_chunk::<HEADER>().expect("header"), false).expect("header");
    let read = |at: u64, buf: &mut [u8]| {
        buf.copy_from_slice(&volume[at as usize..at as usize + buf.len()]);
        Ok::<(), LuksError>(())
    };
    header.unlock(passphrase, read).is_ok()
}

#[test]
fn a_stopped_change_of_key_slots_leaves_one_that_opens() {
    let mut secrets = Secrets::default();
    secrets.add("new", b"another".to_vec().into());
    secrets.add("old", PASSPHRASE.as_bytes().to_vec().into());
    let luks = || inside::create(named("luks"), NAME, 4096, "iter-time=0");
    let volume = |files: &Files| image(files);
    let open = |storage: Arc<dyn Storage>| inside::open_alone(storage, named("luks"), true).expect("open");
    let run = |files: &Files, text: &str, faulty: &dyn Fn(Arc<dyn Storage>) -> Faulty| {
        let plain = files.copy();
        let file = plain.get(NAME).expect("image");
        let faulty = Arc::new(faulty(file));
        let worked = amend_node(&open(faulty.clone()), text, &secrets, true).is_ok();
        (faulty, worked, plain)
    };
    let two = {
        let text = "state=active,new-secret=new,iter-time=0";
        run(&luks(), text, &Faulty::recording).2
    };
    assert!(opens(&volume(&two), b"another") && opens(&volume(&two), PASSPHRASE.as_bytes()));
    for (files, text, old, new) in [
        (luks(), "state=active,new-secret=new,iter-time=0", (true, false), (true, true)),
        (luks(), "state=active,new-secret=new,iter-time=0,keyslot=7", (true, false), (true, true)),
        (luks(), "state=active,new-secret=new,iter-time=0,keyslot=0", (true, false), (false, true)),
        (two.copy(), "state=inactive,old-secret=new", (true, true), (true, false)),
        (two.copy(), "state=inactive,old-secret=old", (true, true), (false, true)),
        (two.copy(), "state=inactive,keyslot=0", (true, true), (false, true)),
    ] {
        let found = |files: &Files| {
            let volume = volume(files);
            (opens(&volume, PASSPHRASE.as_bytes()), opens(&volume, b"another"))
        };
        assert_eq!(found(&files), old, "{text}");
        let (recorded, worked, after) = run(&files, text, &Faulty::recording);
        assert!(worked && found(&after) == new, "{text}");
        for fault in [Fault::FailFrom(Errno::ENOSPC), Fault::Shorten, Fault::Stop] {
            for (at, operation) in recorded.operations().iter().enumerate() {
                let header = matches!(operation, FaultyOperation::Write { at: 0, .. });
                if header && fault == Fault::Shorten {
                    continue;
                }
                let (_, worked, after) = run(&files, text, &|inner| Faulty::new(inner, at, fault));
                let what = format!("{text}: {fault:?} at {operation:?}, {at}");
                assert!(!worked || fault == Fault::Stop, "{what}: the failure is not reported");
                let is = found(&after);
                assert!(is.0 || is.1, "{what}: no key opens it any more");
            }
        }
        // At the end no more slots are used than have to be.
        let header = LuksHeader::parse(volume(&after).first_chunk().expect("header"), false).expect("header");
        let active = header.slots().iter().filter(|slot| slot.active).count();
        assert_eq!(active, usize::from(new.0) + usize::from(new.1), "{text}");
    }
}

#[test]
fn cryptsetup_opens_amended_volumes() {
    need("cryptsetup");
    let s = Scratch::new();
    s.sh("printf one > one; printf two > two; printf three > three");
    let secrets = ["one", "two", "three"].map(|name| format!("secret,id={name},file={name}"));
    let amend = |key: &str, options: &str| {
        let objects: Vec<&str> = secrets.iter().flat_map(|secret| ["--object", secret]).collect();
        let image = format!("driver=luks,key-secret={key},file.filename=a");
        s.vimg(&[&["amend", "--force"], &objects[..], &["--image-opts", "-o", options, &image]].concat());
    };
    s.sh("truncate -s 6M a; cryptsetup -q luksFormat --type luks1 --iter-time 1 a one");
    let test =
        |key: &str| sh(&format!("cryptsetup open --test-passphrase --key-file {key} a")).dir(s.path()).run().code;
    amend("one", "state=active,new-secret=two,iter-time=1");
    amend("two", "state=active,new-secret=three,iter-time=1,keyslot=7");
    assert_eq!(["one", "two", "three"].map(test), [Some(0); 3]);
    amend("three", "state=inactive,old-secret=one");
    assert_eq!(["one", "two", "three"].map(test), [Some(2), Some(0), Some(0)]);
    amend("two", "state=active,new-secret=one,iter-time=1,keyslot=7");
    amend("one", "state=inactive,keyslot=1");
    assert_eq!(["one", "two", "three"].map(test), [Some(0), Some(2), Some(2)]);
    s.sh("cryptsetup luksDump a && cryptsetup -q luksAddKey --iter-time 1 --key-file one a two");
    assert_eq!(test("two"), Some(0));
}
