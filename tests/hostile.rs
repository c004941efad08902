//! Mutated images: no panic, no hang, no memory that grows with a number in a header.
//!
//! Every fixture is changed in thousands of deterministic ways: each field of its first bytes set to telling values,
//! entries of its tables sent to wild places, bits flipped, the file cut. Most cases run in process, on memory
//! (opened, described, mapped, read, written to, resized); a sample runs through the program, whose time and memory
//! are limited by the kernel.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use vimg::block::io::Scratch as Buffers;
use vimg::block::{Fix, Format, GuestOffset, Node};
use vimg::formats::FORMATS;
use vimg::storage::Preallocation;
use vimg::storage::memory::Memory;

use crate::common::inside::{self, Capped, Files, Reads};
use crate::common::run::vimg_within_memory;
use crate::common::{Output, Scratch};
use crate::fixtures;

/// A case that takes longer hangs. How much work one may be is counted, not timed: see [`CALLS`].
const WATCHDOG: Duration = Duration::from_secs(20 * 60);
/// How often a case in process may read.
const CALLS: u64 = 5_000;
/// How many bytes it may read.
const BYTES: u64 = 128 << 20;
/// Private memory (heap and stacks) that the program may use.
const MEMORY: u64 = 256 << 20;

/// One change of a file.
#[derive(Debug, Clone)]
enum Mutation {
    /// `width` bytes at `at`, big-endian or little, set to `value`.
    Set { at: usize, width: usize, value: u64, little: bool },
    /// One bit the other way.
    Flip { at: usize, bit: u8 },
    /// Cut to that length.
    Cut { len: usize },
    /// Several of them.
    All(Vec<Mutation>),
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Set { at, width, value, little } => {
                let whole = if *little { value.to_le_bytes() } else { (value << (64 - 8 * width)).to_be_bytes() };
                for (i, byte) in whole.iter().take(*width).enumerate() {
                    if let Some(slot) = bytes.get_mut(at + i) {
                        *slot = *byte;
                    }
                }
            }
            Self::Flip { at, bit } => {
                if let Some(slot) = bytes.get_mut(*at) {
                    *slot ^= 1 << bit;
                }
            }
            Self::Cut { len } => bytes.truncate(*len),
            Self::All(all) => all.iter().for_each(|one| one.apply(bytes)),
        }
    }
}

const TELLING: &[u64] = &[
    0,
    1,
    2,
    3,
    8,
    9,
    16,
    21,
    22,
    31,
    32,
    63,
    64,
    0x1ff,
    0x200,
    0xfff,
    0x1000,
    0xffff,
    0x10000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fe00,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 40,
    (1 << 56) - 512,
    1 << 62,
    (1 << 62) + 512,
    i64::MAX as u64,
    1 << 63,
    (1 << 63) + (1 << 40),
    u64::MAX - 511,
    u64::MAX,
];

/// All the ways in which a file is changed: deterministic, about `count` of them.
fn mutations(bytes: &[u8], name: &str, count: usize) -> Vec<Mutation> {
    let mut all = Vec::new();
    // Every aligned field of the header, as 4 and as 8 bytes, with every telling value.
    let big = [".qcow2", ".qcow", ".vhd", ".cloop"].iter().any(|end| name.ends_with(end));
    let little = !big;
    for at in (0..bytes.len().min(512)).step_by(4) {
        for value in TELLING {
            all.push(Mutation::Set { at, width: 4, value: *value & 0xffff_ffff, little });
            if at % 8 == 0 {
                all.push(Mutation::Set { at, width: 8, value: *value, little });
            }
        }
    }
    // Cut at the edges of sectors and near the end, and anywhere.
    let mut rng = fastrand::Rng::with_seed(bytes.len() as u64);
    for len in [0, 1, 4, 8, 71, 72, 103, 104, 111, 112, 511, 512, 513, 1024, 65535, 65536, 65537, 131072, 196608] {
        all.push(Mutation::Cut { len });
    }
    for _ in 0..60 {
        all.push(Mutation::Cut { len: rng.usize(..bytes.len().max(1)) });
    }
    // What is not zero is where tables and data are: wild entries, flipped bits.
    let busy: Vec<usize> =
        (0..bytes.len()).step_by(8).filter(|at| bytes[*at..].iter().take(8).any(|b| *b != 0)).collect();
    let tables: Vec<usize> = busy.iter().copied().filter(|at| looks_like_an_entry(&bytes[*at..], little)).collect();
    for _ in 0..count / 3 {
        let at = *pick(&mut rng, if tables.is_empty() { &busy } else { &tables });
        let mut value = TELLING[rng.usize(..TELLING.len())];
        if rng.bool() {
            value ^= rng.u64(..) & 0xffff_ffff_ffff >> rng.u32(..40);
        }
        let width = if little { 4 } else { 8 };
        all.push(Mutation::Set { at, width, value, little });
    }
    for _ in 0..count / 3 {
        let near = if rng.bool() { rng.usize(..bytes.len().clamp(1, 1024)) } else { *pick(&mut rng, &busy) };
        all.push(Mutation::Flip { at: near + rng.usize(..8), bit: rng.u8(..8) });
    }
    // Combinations find what one change alone is caught early for.
    for _ in 0..count / 4 {
        let n = 2 + rng.usize(..4);
        let some = (0..n).map(|_| all[rng.usize(..all.len())].clone()).collect();
        all.push(Mutation::All(some));
    }
    rng.shuffle(&mut all);
    all.truncate(count);
    all
}

fn pick<'a, T>(rng: &mut fastrand::Rng, from: &'a [T]) -> &'a T {
    &from[rng.usize(..from.len())]
}

/// A table's entry has empty bytes beside a small number; text and random data do not.
fn looks_like_an_entry(bytes: &[u8], little: bool) -> bool {
    let width = if little { 4 } else { 8 };
    bytes.len() >= width && bytes[..width].iter().filter(|byte| **byte == 0).count() * 2 >= width
}

/// The files of all fixtures, unpacked.
fn unpacked() -> Scratch {
    let scratch = Scratch::new();
    fixtures::unpack(scratch.path());
    scratch
}

fn load(folder: &Path) -> Files {
    let files = Files::default();
    for entry in std::fs::read_dir(folder).expect("read folder").flatten() {
        let bytes = std::fs::read(entry.path()).expect("read fixture");
        files.put(&entry.file_name().to_string_lossy(), Arc::new(Memory::new(bytes)));
    }
    files
}

/// Everything that a mutated image goes through, in process. Errors are fine; the tests look for what is not.
fn exercise(files: &Files, format: &'static dyn Format, name: &str, sizes: [u64; 2], reads: &Arc<Reads>) {
    let mut buffers = Buffers::default();
    let looked_at = files.copy_capped(64 << 20, reads);
    if let Ok(node) = inside::open(&looked_at, format, name, false, None) {
        let _ = node.driver().info();
        read_some(&node, &mut buffers);
        if let Some(snapshots) = node.driver().snapshots() {
            for snapshot in snapshots.list().unwrap_or_default() {
                let key = vimg::block::driver::SnapshotKey::IdOrName(snapshot.id);
                if let Ok(driver) = snapshots.open(&key) {
                    read_some(&Node::new(driver, None, name.to_owned()), &mut buffers);
                }
            }
        }
    }
    for size in sizes {
        let files = files.copy_capped(64 << 20, reads);
        let Ok(node) = inside::open(&files, format, name, true, None) else { return };
        if node.writing().is_ok() {
            for at in [0, 70_000, node.virtual_size().saturating_sub(9000)] {
                let len = node.virtual_size().saturating_sub(at).min(9000);
                let _ = node.write(GuestOffset(at), &vec![7; usize::try_from(len).unwrap_or(0)], &mut buffers);
                let _ = node.write_zeroes(GuestOffset(at), len, true, &mut buffers);
            }
        }
        if let Some(resizing) = node.driver().resizing() {
            // A disk that says it is huge may be cut at will; to grow one further proves nothing.
            if resizing.check(size, Preallocation::Off).is_ok() && node.virtual_size() < 1 << 40 {
                let _ = resizing.resize(size, Preallocation::Off);
            }
        }
        if size == sizes[1] {
            if let Some(emptying) = node.driver().emptying().filter(|_| node.virtual_size() < 1 << 40) {
                let _ = emptying.make_empty();
            }
            let _ = node.driver().backing_change().map(|change| change.change(None, None));
        }
        let _ = node.driver().close();
    }
}

/// Its options are amended, and its bitmaps changed.
fn amend(files: &Files, format: &'static dyn Format, name: &str, reads: &Arc<Reads>) {
    use vimg::ops::bitmap::BitmapAction::{Add, Disable, Merge, Remove};
    for text in ["compat=0.10,refcount_bits=16", "compat=1.1,refcount_bits=32,lazy_refcounts=on"] {
        if let Ok(node) = inside::open(&files.copy_capped(64 << 20, reads), format, name, true, None) {
            let _ = crate::amend::amend_node(&node, text, &vimg::block::Secrets::default(), false);
        }
    }
    if let Ok(node) = inside::open(&files.copy_capped(64 << 20, reads), format, name, true, None) {
        let all = node.driver().bitmaps().map_or(Vec::new(), |bitmaps| bitmaps.list());
        let merge = all.iter().map(|one| Merge(one.name.clone()));
        let actions: Vec<_> = [Add(Some(4096)), Disable].into_iter().chain(merge).collect();
        let _ = vimg::ops::bitmap::change(&node, "new", &actions, None);
        for one in all {
            let _ = vimg::ops::bitmap::change(&node, &one.name, &[Remove], None);
        }
    }
}

/// Its tables are checked, and what is wrong with them is mended as far as that can be.
fn check(files: &Files, format: &'static dyn Format, name: &str, reads: &Arc<Reads>) {
    for fix in [Fix::Nothing, Fix::Leaks, Fix::All] {
        let _ = inside::check(&files.copy_capped(64 << 20, reads), format, name, fix);
    }
}

/// Maps and reads, with a budget: a mutated image may say that it is exabytes large.
fn read_some(node: &Node, buffers: &mut Buffers) {
    let size = node.virtual_size();
    let mut at = 0;
    let mut buf = vec![0; 1 << 16];
    for _ in 0..300 {
        if at >= size {
            break;
        }
        let Ok(mapping) = node.map(GuestOffset(at), size - at, usize::MAX) else {
            at += 65536;
            continue;
        };
        let n = usize::try_from(mapping.len).unwrap_or(usize::MAX).min(buf.len());
        let _ = mapping.read(&mut buf[..n], buffers);
        at += mapping.len;
    }
    let last = size.saturating_sub(65536);
    let _ = node.read(GuestOffset(last), &mut buf, buffers);
}

/// A case, for the one who watches the clock.
struct Watch {
    since: Instant,
    what: String,
}

#[test]
fn mutated_images_in_process() {
    let scratch = unpacked();
    let files = load(scratch.path());
    let mut cases = Vec::new();
    for fixture in fixtures::all() {
        let format = vimg::block::format::find(FORMATS, &fixture.format).expect("a format of ours");
        let bytes = inside::bytes_of(&*files.get(&fixture.name).expect("fixture"));
        // Large ones cost more and tell no more.
        let count = if bytes.len() > 3 << 20 { 15 } else { 75 };
        for mutation in mutations(&bytes, &fixture.name, count) {
            cases.push((format, fixture.name.clone(), mutation));
        }
    }
    assert!(cases.len() >= 2000, "only {} cases", cases.len());
    let next = AtomicUsize::new(0);
    let (tell, told) = mpsc::channel();
    let workers = 2;
    thread::scope(|scope| {
        for worker in 0..workers {
            let (tell, cases, files, next) = (tell.clone(), &cases, &files, &next);
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some((format, name, mutation)) = cases.get(number) else { break };
                    // What each is resized to: the cases of an image are in no order.
                    let sizes = [[3 << 20, 512], [1 << 30, 100 << 10]][number % 2];
                    let what = format!("{name}: {mutation:?}");
                    let _ = tell.send((worker, Some(Watch { since: Instant::now(), what: what.clone() })));
                    let mut bytes = inside::bytes_of(&*files.get(name).expect("fixture"));
                    mutation.apply(&mut bytes);
                    let mutated = Files::default();
                    // Its other files bear the same name in front.
                    let stem = name.split('.').next().unwrap_or(name);
                    for other in files.names().iter().filter(|other| other.starts_with(stem)) {
                        mutated.put(other, files.get(other).expect("fixture"));
                    }
                    mutated.put(name, Arc::new(Memory::new(bytes)));
                    let (reads, checks, amends) = (Arc::default(), Arc::default(), Arc::default());
                    let run = || {
                        if format.name() == "qcow2" {
                            amend(&mutated, *format, name, &amends);
                        }
                        exercise(&mutated, *format, name, sizes, &reads);
                        check(&mutated, *format, name, &checks);
                    };
                    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err() {
                        // The panic's own message went to stderr; this is the case that caused it.
                        panic!("a panic: {what}");
                    }
                    for reads in [reads, checks, amends] {
                        assert!(reads.calls() <= CALLS && reads.bytes() <= BYTES, "{reads:?}: {what}");
                    }
                }
                let _ = tell.send((worker, None));
            });
        }
        drop(tell);
        watch(&told, workers);
    });
}

/// Encrypted ones, opened with their key: the header, the tables, and the LUKS header in its clusters.
#[test]
fn mutated_encrypted_images_in_process() {
    let luks = "encrypt.format=luks,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.iter-time=1";
    let mut cases = 0;
    for (name, options) in [("qcow", "encryption=on"), ("qcow2", "encryption=on"), ("qcow2", luks)] {
        let format = vimg::block::format::find(FORMATS, name).expect("a format of ours");
        let files = inside::create(format, "image", 3 << 20, options);
        let node = inside::open(&files, format, "image", true, None).expect("open");
        node.write(GuestOffset(70_000), &[7; 9000], &mut Buffers::default()).expect("write");
        node.driver().close().expect("close");
        drop(node);
        let bytes = inside::bytes_of(&*files.get("image").expect("image"));
        let header = (0..bytes.len()).step_by(512).find(|at| bytes[*at..].starts_with(b"LUKS\xba\xbe"));
        let header = header.map_or(0..0, |at| at..at + 592);
        // Iteration counts in between would only take long: those below are few, or refused.
        let elsewhere = |mutation: &Mutation| match mutation {
            Mutation::Set { at, .. } | Mutation::Flip { at, .. } => !header.contains(at),
            _ => true,
        };
        let mut all = mutations(&bytes, &format!("image.{name}"), 150);
        all.retain(elsewhere);
        for at in header.clone().step_by(4) {
            for value in [0, 1, 0x7fff_ffff, 0xffff_ffff] {
                all.push(Mutation::Set { at, width: 4, value, little: false });
            }
        }
        cases += all.len();
        for mutation in all {
            let mut mutated = bytes.clone();
            mutation.apply(&mut mutated);
            let files = Files::default();
            files.put("image", Arc::new(Memory::new(mutated)));
            let (run, reads) = (|reads| exercise(&files, format, "image", [3 << 20, 512], reads), Arc::default());
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&reads))).is_err() {
                panic!("a panic: {name} {options}: {mutation:?}");
            }
            assert!(reads.calls() <= CALLS && reads.bytes() <= BYTES, "{reads:?}: {name} {options}: {mutation:?}");
        }
    }
    assert!(cases > 700, "only {cases} cases");
}

/// Every field of a LUKS header with every telling value. What a case costs is counted too: of iterations those that
/// are many are refused, whatever the field's value.
#[test]
fn mutated_luks_headers_in_process() {
    const NAME: &str = "image";
    let luks = vimg::block::format::find(FORMATS, "luks").expect("luks");
    let options = "iter-time=0,cipher-alg=aes-128,cipher-mode=cbc";
    let whole = inside::bytes_of(&*inside::create(luks, NAME, 100 << 10, options).get(NAME).expect("made"));
    let fields = (4..592).step_by(4);
    let sets = fields.flat_map(|at| TELLING.iter().map(move |value| (at, *value)));
    let sets = sets.filter(|(at, value)| *value <= 0xffff_ffff && (at / 4 + (*value % 61) as usize).is_multiple_of(3));
    let set = |(at, value)| Mutation::Set { at, width: 4, value, little: false };
    let cuts = [0, 7, 8, 591, 592, 4095, 4096, 70_000, 528_383, 528_384, 528_385].map(|len| Mutation::Cut { len });
    let cases: Vec<_> = sets.map(set).chain(cuts).collect();
    assert!(cases.len() >= 1000, "only {} cases", cases.len());
    for mutation in cases {
        let mut bytes = whole.clone();
        mutation.apply(&mut bytes);
        let (mutated, reads) = (Files::default(), Arc::default());
        mutated.put(NAME, Arc::new(Memory::new(bytes)));
        exercise(&mutated, luks, NAME, [3 << 20, 512], &reads);
        assert!(reads.calls() <= CALLS && reads.bytes() <= BYTES, "{reads:?}: {mutation:?}");
    }
}

/// Ends the whole run where one case takes too long: a thread that hangs cannot be ended otherwise.
fn watch(told: &mpsc::Receiver<(usize, Option<Watch>)>, workers: usize) {
    let mut busy: Vec<Option<Watch>> = (0..workers).map(|_| None).collect();
    loop {
        match told.recv_timeout(Duration::from_millis(500)) {
            Ok((worker, watch)) => busy[worker] = watch,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
        if let Some(slow) = busy.iter().flatten().find(|watch| watch.since.elapsed() > WATCHDOG) {
            // Not by a macro: what those print is kept back until the test ends, and it never does.
            let _ = writeln!(std::io::stderr(), "no end: {}", slow.what);
            std::process::abort();
        }
    }
}

/// Ends well or with an error of ours.
fn assert_sane(out: &Output, what: &str) {
    assert_ends(out, &[0, 1], what);
}

fn assert_ends(out: &Output, codes: &[i32], what: &str) {
    assert!(!out.timed_out, "{what}: no end: {out:#?}");
    assert!(out.code.is_some_and(|code| codes.contains(&code)), "{what}: {out:#?}");
    assert!(!out.stderr.contains("panicked"), "{what}: {out:#?}");
    if out.code == Some(1) {
        // What differs is said on standard output.
        let words = [&out.stderr, &out.stdout];
        assert!(words.iter().any(|text| !text.trim().is_empty()), "{what}: fails without a word");
    }
}

#[test]
fn mutated_images_through_the_program() {
    let scratch = unpacked();
    let mut cases = Vec::new();
    for fixture in fixtures::all() {
        let bytes = std::fs::read(scratch.file(&fixture.name)).expect("fixture");
        let mut all = mutations(&bytes, &fixture.name, 400);
        // Others than those that start the list that runs in process.
        all.reverse();
        for mutation in all.into_iter().take(5) {
            cases.push((fixture.name.clone(), fixture.format.clone(), bytes.clone(), mutation));
        }
    }
    assert!(cases.len() >= 120, "only {} cases", cases.len());
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                // A folder of its own: some cases write.
                let mine = unpacked();
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some((name, format, bytes, mutation)) = cases.get(n) else { return };
                    let mut mutated = bytes.clone();
                    mutation.apply(&mut mutated);
                    std::fs::write(mine.file(name), &mutated).expect("write");
                    through_the_program(&mine, name, format, &format!("{name}: {mutation:?}"));
                    std::fs::write(mine.file(name), bytes).expect("write");
                }
            });
        }
    });
}

fn through_the_program(scratch: &Scratch, name: &str, format: &str, what: &str) {
    let run = |args: &[&str]| vimg_within_memory(MEMORY, args).dir(scratch.path()).run();
    let info = run(&["info", "-f", format, "--output=json", name]);
    assert_sane(&info, what);
    assert_sane(&run(&["info", name]), what);
    // An image that says it is huge may take as long as it likes to convert, if it is full; so only small ones.
    let size = serde_json::from_str::<serde_json::Value>(&info.stdout)
        .ok()
        .and_then(|json| json["virtual-size"].as_u64())
        .unwrap_or(0);
    if size <= 1 << 30 {
        assert_sane(&run(&["convert", "-f", format, "-O", "raw", name, "out.raw"]), what);
        let _ = std::fs::remove_file(scratch.file("out.raw"));
    }
    if size <= 1 << 40 {
        assert_sane(&run(&["map", "-f", format, name]), what);
        assert_sane(&run(&["map", "-f", format, "--output=json", name]), what);
        assert_sane(&run(&["measure", "-f", format, "-O", "qcow2", name]), what);
        assert_ends(&run(&["compare", "-f", format, "-F", format, name, name]), &[0, 2, 3, 4], what);
    }
    if size <= 1 << 30 {
        std::fs::write(scratch.file("zeros"), []).expect("an empty disk");
        assert_ends(&run(&["compare", "-f", format, "-F", "raw", name, "zeros"]), &[0, 1, 2, 3, 4], what);
    }
    for fix in [&[][..], &["-r", "all"]] {
        let out = run(&[&["check", "-f", format], fix, &[name]].concat());
        assert_ends(&out, &[0, 1, 2, 3, 63], what);
    }
    assert_sane(&run(&["bench", "-w", "-c", "20", "-s", "512", "-S", "3k", "-f", format, name]), what);
    if format == "qcow2" {
        for change in [["-c", "x"], ["-a", "1"], ["-d", "x"]] {
            assert_sane(&run(&["snapshot", change[0], change[1], "-f", format, name]), what);
        }
    }
    assert_sane(&run(&["rebase", "-u", "-f", format, name]), what);
    assert_sane(&run(&["resize", "-q", "-f", format, name, "+1M"]), what);
    assert_sane(&run(&["resize", "-q", "-f", format, "--shrink", name, "64k"]), what);
}

#[test]
fn huge_claims_cost_no_memory_and_no_reading() {
    // A disk of 16 TiB and one of 256 TiB, empty: mapped and read as what they are.
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "huge.qcow2", "16T"]);
    scratch.judge(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "vast.qcow2", "256T"]);
    for name in ["huge.qcow2", "vast.qcow2"] {
        let out = vimg_within_memory(MEMORY, &["convert", "-O", "qcow2", "-o", "cluster_size=2M", name, "out.qcow2"])
            .dir(scratch.path())
            .run();
        assert_eq!(out.code, Some(0), "{name}: {out:#?}");
        for args in [&["info", name][..], &["map", "--output=json", name], &["measure", "-O", "vdi", name]] {
            let out = vimg_within_memory(64 << 20, args).dir(scratch.path()).run();
            assert_eq!(out.code, Some(0), "{name}: {out:#?}");
        }
    }
    let args = ["compare", "huge.qcow2", "vast.qcow2"];
    let out = vimg_within_memory(64 << 20, &args).dir(scratch.path()).run();
    assert_eq!(out.stdout, "Warning: Image size mismatch!\nImages are identical.\n", "{out:#?}");
}

#[test]
fn backing_loops_end() {
    let scratch = Scratch::new();
    for (image, below) in [("a", "b"), ("b", "c"), ("c", "a"), ("self", "./self")] {
        scratch.judge(&["create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", image, "1M"]);
    }
    for image in ["a", "self"] {
        for args in [&["convert", "-O", "raw", image, "out"][..], &["info", "--backing-chain", image]] {
            let out = vimg_within_memory(MEMORY, args).dir(scratch.path()).run();
            assert_eq!(out.code, Some(1), "{out:#?}");
            assert!(out.stderr.contains("infinite loop"), "{out:#?}");
        }
        assert!(!scratch.file("out").exists());
    }
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if file.len() < at + bytes.len() {
        file.resize(at + bytes.len(), 0);
    }
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// What a header claims costs nothing where the file has nothing to show for it.
#[test]
fn small_files_that_claim_much_cost_little() {
    let scratch = Scratch::new();
    let run = |code: i32, args: &[&str]| {
        let out = vimg_within_memory(MEMORY, args).dir(scratch.path()).run();
        assert_eq!(out.code, Some(code), "{args:?}: {out:#?}");
        out
    };
    let descriptor = |create_type: &str, lines: &str| {
        format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n{lines}")
    };

    // A seSparse extent of 80 sectors, in a line of an exbibyte; a directory as long as it can be, 200 times over.
    let mut file = vec![0; 4096];
    for (index, word) in [(0, 0xcafe_babe), (1, 0x2_0000_0001), (2, 80), (3, 8), (4, 64), (10, 1), (16, 2), (17, 1)] {
        put(&mut file, index * 8, &u64::to_le_bytes(word));
    }
    put(&mut file, 512, &u64::to_le_bytes(0xcafe_cafe));
    std::fs::write(scratch.file("s.bin"), &file).expect("write");
    let line = format!("RW {} SESPARSE \"s.bin\"\n", 1u64 << 51);
    std::fs::write(scratch.file("s.vmdk"), descriptor("seSparse", &line)).expect("write");
    run(0, &["convert", "-f", "vmdk", "-O", "qcow2", "-o", "cluster_size=2M", "s.vmdk", "out"]);
    put(&mut file, 2 * 8, &u64::to_le_bytes(1 << 38));
    put(&mut file, 17 * 8, &u64::to_le_bytes(1 << 40));
    std::fs::write(scratch.file("s.bin"), &file).expect("write");
    scratch.sh("truncate -s 1G s.bin");
    std::fs::write(scratch.file("s.vmdk"), descriptor("seSparse", &"RW 80 SESPARSE \"s.bin\"\n".repeat(200)))
        .expect("write");
    run(0, &["info", "s.vmdk"]);

    // The directory of one hosted extent, in 200 lines.
    scratch.judge(&["create", "-q", "-f", "vmdk", "big.vmdk", "60T"]);
    std::fs::write(
        scratch.file("many.vmdk"),
        descriptor("twoGbMaxExtentSparse", &"RW 80 SPARSE \"big.vmdk\"\n".repeat(200)),
    )
    .expect("write");
    let out = run(1, &["info", "many.vmdk"]);
    assert!(out.stderr.contains("The extents have too many grain tables"), "{out:?}");

    // A COWD extent of 2 TiB with grains of a sector and no directory.
    let mut file = vec![0; 4096];
    put(&mut file, 0, b"COWD");
    for (index, word) in [(1, 1), (2, 3), (3, u32::MAX), (4, 1), (5, 4), (6, 0)] {
        put(&mut file, index * 4, &u32::to_le_bytes(word));
    }
    std::fs::write(scratch.file("c.bin"), &file).expect("write");
    let line = format!("RW {} VMFSSPARSE \"c.bin\"\n", u32::MAX);
    std::fs::write(scratch.file("c.vmdk"), descriptor("vmfsSparse", &line)).expect("write");
    run(0, &["convert", "-f", "vmdk", "-O", "qcow2", "c.vmdk", "out"]);

    // Blocks of 512 bytes, one of them where the file ends, 2 TiB away.
    scratch.judge(&["create", "-q", "-f", "vdi", "d.vdi", "1M"]);
    let mut file = std::fs::read(scratch.file("d.vdi")).expect("read");
    let at = |file: &[u8], at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("4")) as usize;
    let (map, data) = (at(&file, 0x154), at(&file, 0x158));
    for (at, word) in [(0x170, 1 << 10), (0x178, 512), (0x180, 2)] {
        put(&mut file, at, &u32::to_le_bytes(word));
    }
    put(&mut file, map, &[0xff; 8]);
    put(&mut file, map, &u32::to_le_bytes(0xffff_fff0));
    std::fs::write(scratch.file("d.vdi"), &file).expect("write");
    let end = data as u64 + (0xffff_fff1u64 << 9);
    scratch.sh(&format!("truncate -s {end} d.vdi"));
    let out = run(1, &["resize", "-f", "vdi", "d.vdi", "2M"]);
    assert!(out.stderr.contains("too many blocks") || out.stderr.contains("nsupported"), "{out:?}");

    // The longest table of a vpc, all in a hole: every block at the file's start.
    scratch.judge(&["create", "-q", "-f", "vpc", "v.vhd", "16M"]);
    let mut file = std::fs::read(scratch.file("v.vhd")).expect("read");
    put(&mut file, 512 + 28, &u32::to_be_bytes(1 << 24));
    put(&mut file, 512 + 16, &u64::to_be_bytes(1 << 20));
    put(&mut file, 512 + 36, &[0; 4]);
    let sum = !file[512..1536].iter().map(|byte| u32::from(*byte)).sum::<u32>();
    put(&mut file, 512 + 36, &sum.to_be_bytes());
    std::fs::write(scratch.file("v.vhd"), &file).expect("write");
    scratch.sh("truncate -s 128M v.vhd && head -c 512 v.vhd >> v.vhd");
    let out = run(1, &["resize", "-f", "vpc", "v.vhd", "32M"]);
    assert!(out.stderr.contains("blocks of the image overlap"), "{out:?}");

    // Extents by the milliard are refused before there is one.
    let out = run(1, &["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", "x.vmdk", "7E"]);
    assert!(out.stderr.contains("The image size is too large for file format 'vmdk'"), "{out:?}");
    assert!(!scratch.file("x.vmdk").exists());
}

/// A hundred snapshots that share one table, and an unclean end: each table is read once.
#[test]
fn shared_tables_are_read_once_by_a_repair() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=64k", "d.qcow2", "1T"]);
    scratch.qemu_io("qcow2", "d.qcow2", &["write 0 64k", "write 600G 64k"]);
    scratch.judge(&["snapshot", "-c", "s", "d.qcow2"]);
    let mut file = std::fs::read(scratch.file("d.qcow2")).expect("read");
    let word = |file: &[u8], at: usize| u64::from_be_bytes(file[at..at + 8].try_into().expect("8")) as usize;
    let table = word(&file, 64);
    let l1 = word(&file, table);
    // Every entry of the snapshot's L1 table names the same L2 table.
    let l2 = file[l1..l1 + 8].to_vec();
    for index in 0..2048 {
        put(&mut file, l1 + index * 8, &l2);
    }
    // The entry's fixed part says how long the rest is; the last one in the file is not padded.
    let short = |at: usize| usize::from(u16::from_be_bytes(file[at..at + 2].try_into().expect("2")));
    let len = (40 + short(table + 38) + short(table + 12) + short(table + 14)).next_multiple_of(8);
    file.resize(file.len().max(table + len), 0);
    let entry = file[table..table + len].to_vec();
    let end = file.len().next_multiple_of(65536);
    for n in 0..200 {
        put(&mut file, end + n * entry.len(), &entry);
    }
    put(&mut file, 60, &200u32.to_be_bytes());
    put(&mut file, 64, &(end as u64).to_be_bytes());
    put(&mut file, 79, &[1]);
    let (qcow2, reads) = (vimg::block::format::find(FORMATS, "qcow2").expect("qcow2"), Arc::<Reads>::default());
    let files = Files::default();
    files.put("d.qcow2", Arc::new(Capped::counted(file.clone(), 64 << 20, reads.clone())));
    let opened = inside::open(&files, qcow2, "d.qcow2", true, None);
    // The snapshots' L1 tables are 16 KiB each; one L2 table for each of their entries would be 26 GiB.
    assert!(reads.bytes() < 16 << 20, "{reads:?}");
    if let Err(error) = opened {
        assert!(error.message().contains("refcount"), "{}", error.message());
    }
    std::fs::write(scratch.file("d.qcow2"), &file).expect("write");
    let out = vimg_within_memory(MEMORY, &["resize", "-f", "qcow2", "d.qcow2", "+1G"]).dir(scratch.path()).run();
    assert!(out.code == Some(0) || out.stderr.contains("refcount"), "{out:#?}");
}
