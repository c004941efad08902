//! Storage that fails, shortens or stops at the n-th write, or fails at the n-th read, for every n and in every kind of
//! image that can be written to: afterwards the judge finds the image clean (leaks at worst) with all data that
//! nothing wrote to, or there is no image.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use vimg::block::driver::NewSnapshot;
use vimg::block::io::Scratch as Buffers;
use vimg::block::{Error, Format, GuestOffset, Node, Result, format};
use vimg::formats::FORMATS;
use vimg::storage::fault::{Fault, Faulty, FaultyOperation};
use vimg::storage::memory::Memory;
use vimg::storage::{Preallocation, Storage};

use crate::common::inside::{self, Files};
use crate::common::{Scratch, judge, pattern};

const NAME: &str = "image";

const FAULTS: &[Fault] = &[Fault::Fail(Errno::EIO), Fault::FailFrom(Errno::ENOSPC), Fault::Shorten, Fault::Stop];

fn find(format: &str) -> &'static dyn Format {
    format::find(FORMATS, format).expect("a format of ours")
}

/// What is done to an image that is open for writing.
type Work = fn(&Node) -> Result<()>;

fn write_a_lot(node: &Node) -> Result<()> {
    let mut buffers = Buffers::default();
    for (n, at) in [0, 700_000, 130_000, 1_900_000, 64_000].into_iter().enumerate() {
        node.write(GuestOffset(at), &pattern(n as u64, 90_000), &mut buffers)?;
    }
    node.driver().flush()?;
    node.write_zeroes(GuestOffset(100_000), 300_000, true, &mut buffers)?;
    node.writing()?.discard(GuestOffset(1_900_544), 65536)?;
    node.write(GuestOffset(120_000), &pattern(7, 200_000), &mut buffers)?;
    node.driver().close()
}

fn grow(node: &Node) -> Result<()> {
    resize(node, 400 << 20, Preallocation::Off)
}

fn shrink(node: &Node) -> Result<()> {
    resize(node, 300 << 10, Preallocation::Off)
}

fn grow_with_metadata(node: &Node) -> Result<()> {
    resize(node, 8 << 20, Preallocation::Metadata)
}

fn grow_a_little(node: &Node) -> Result<()> {
    resize(node, 7 << 20, Preallocation::Off)
}

fn resize(node: &Node, size: u64, preallocation: Preallocation) -> Result<()> {
    node.driver().resizing().expect("it resizes").resize(size, preallocation)?;
    node.driver().close()
}

/// A kind of image, and what is done to it.
struct Case {
    format: &'static str,
    options: &'static str,
    work: Work,
    /// Guest data that the work does not touch.
    kept: Range<usize>,
}

/// The data of [`Case::prepared`] begins here.
const DATA: usize = 64 << 10;

impl Case {
    fn new(format: &'static str, options: &'static str, work: Work) -> Self {
        // A shrunk disk ends at 300 KiB; what writes leaves this out.
        Self { format, options, work, kept: 450_048..599_552 }
    }

    fn shrinking(format: &'static str, options: &'static str) -> Self {
        Self { format, options, work: shrink, kept: DATA..300 << 10 }
    }

    /// An image with some data in it.
    fn prepared(&self) -> Files {
        let files = inside::create(find(self.format), NAME, 2 << 20, self.options);
        let node = inside::open(&files, find(self.format), NAME, true, None).expect("open");
        node.write(GuestOffset(DATA as u64), &pattern(1, 700_000), &mut Buffers::default()).expect("write");
        node.driver().close().expect("close");
        files
    }

    /// Does the work on a copy of the image with a fault; returns what was done, what came of it, and the files.
    fn run(&self, files: &Files, faulty: impl Fn(Arc<dyn Storage>) -> Faulty) -> (Faulty, Result<()>, Files) {
        let plain = files.copy();
        let first = faulty(plain.get(NAME).expect("image"));
        let wrapped = Files::default();
        for name in plain.names() {
            wrapped.put(&name, Arc::new(first.beside(plain.get(&name).expect("file"))));
        }
        let worked = inside::open(&wrapped, find(self.format), NAME, true, None).and_then(|node| (self.work)(&node));
        (first, worked, plain)
    }

    /// Every fault at every change.
    fn every_point(&self, floor: usize) {
        let files = self.prepared();
        let (recorded, worked, after) = self.run(&files, Faulty::recording);
        let (operations, label) = (recorded.operations(), format!("{} {}", self.format, self.options));
        let count = operations.len();
        assert!(worked.is_ok(), "{label}: fails without a fault");
        assert!(count >= floor, "{label}: only {count} operations");
        let mut judge = Judge::default();
        judge.judged(self, &after, &label);
        for fault in FAULTS {
            for (at, operation) in operations.iter().enumerate() {
                if *fault == Fault::Shorten && matches!(operation, FaultyOperation::Write { len: ..512, .. }) {
                    // No disk writes half a table's entry.
                    continue;
                }
                let what = format!("{label}: {fault:?} at {operation:?}, {at} of {count}");
                let (_, worked, after) = self.run(&files, |inner| Faulty::new(inner, at, *fault));
                // To give space back is an offer: that it is refused is no failure of the work.
                let offer = matches!(operation, FaultyOperation::Discard { .. });
                let must_tell = *fault != Fault::Stop && !offer;
                assert!(!(worked.is_ok() && must_tell), "{what}: the failure is not reported");
                judge.judged(self, &after, &what);
            }
        }
    }

    /// A fault at every read: it is reported, or the outcome is the same without what could not be read.
    fn every_read(&self) {
        let files = self.prepared();
        let (recorded, worked, whole) = self.run(&files, Faulty::recording);
        let (count, label) = (recorded.reads(), format!("{} {}", self.format, self.options));
        assert!(worked.is_ok() && count >= 1, "{label}: {count} reads");
        let content = |files: &Files| {
            let node = inside::open(files, find(self.format), NAME, false, None).expect("open");
            let mut bytes = vec![0xee; usize::try_from(node.virtual_size()).expect("small")];
            node.read(GuestOffset(0), &mut bytes, &mut Buffers::default()).expect("read");
            bytes
        };
        let wanted = content(&whole);
        let mut judge = Judge::default();
        let mut reported = 0;
        for at in 0..count {
            let what = format!("{label}: read {at} of {count} fails");
            let (_, worked, after) = self.run(&files, |inner| Faulty::failing_read(inner, at));
            reported += usize::from(worked.is_err());
            assert!(worked.is_err() || content(&after) == wanted, "{what}: not reported");
            judge.judged(self, &after, &what);
        }
        assert!(reported > 0, "{label}: none of {count} failures is reported");
    }
}

/// Whether an error says in which of these files it happened, and where: within `range`, if that is known.
fn has_place(error: &Error, files: &Files, range: Option<Range<u64>>) -> bool {
    error.place().is_some_and(|place| {
        let at = place.host.map(|at| at.get());
        files.names().contains(&place.file) && at.is_some_and(|at| range.is_none_or(|range| range.contains(&at)))
    })
}

/// The judge, who looks at the same files once.
#[derive(Default)]
struct Judge {
    seen: HashSet<u64>,
    scratch: Option<Scratch>,
}

impl Judge {
    /// Errors that the judge finds: nothing, or leaks. Data that nothing wrote to is still there.
    fn judged(&mut self, case: &Case, files: &Files, what: &str) {
        let mut hasher = DefaultHasher::new();
        for name in files.names() {
            (&name, inside::bytes_of(&*files.get(&name).expect("file"))).hash(&mut hasher);
        }
        if !self.seen.insert(hasher.finish()) {
            return;
        }
        let scratch = self.scratch.get_or_insert_with(Scratch::new);
        files.save(scratch.path());
        let secret = format!("secret,id=s,data={}", inside::PASSPHRASE);
        let key = match (case.format, case.options.contains("encrypt.format")) {
            ("luks", _) => ",key-secret=s",
            (_, true) => ",encrypt.key-secret=s",
            _ => "",
        };
        let image = format!("driver={},file.filename={NAME}{key}", case.format);
        let out = judge(&["check", "--object", &secret, "--image-opts", &image]).dir(scratch.path()).run();
        // 63: the format has no check. What a parallels image says of itself after a stop is all that may be wrong with it.
        let unclosed = "ERROR image was not closed correctly\n";
        let wrong =
            out.stderr.lines().filter(|line| line.starts_with("ERROR") && !line.contains("space leaked")).count();
        let is_open = out.code == Some(2) && out.stderr.starts_with(unclosed) && wrong == 1;
        assert!(matches!(out.code, Some(0 | 3 | 63)) || is_open, "{what}: {out:#?}");
        let part = format!("driver=raw,size={},file.{}", case.kept.end, image.replace(',', ",file."));
        let out = judge(&["convert", "--object", &secret, "--image-opts", "-O", "raw", &part, "raw"])
            .dir(scratch.path())
            .run();
        assert_eq!(out.code, Some(0), "{what}: {out:#?}");
        let raw = std::fs::read(scratch.file("raw")).expect("raw");
        let kept = case.kept.start - DATA..case.kept.end - DATA;
        assert!(raw[case.kept.clone()] == pattern(1, 700_000)[kept], "{what}: data is lost");
    }
}

/// Every other format that can be written to in any order.
const OTHERS: &[(&str, &str)] = &[
    ("qcow", ""),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", ""),
    ("vpc", "subformat=fixed"),
    ("vmdk", ""),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=monolithicFlat"),
    ("luks", "iter-time=0"),
    ("parallels", ""),
    ("parallels", "cluster_size=4096"),
    ("vhdx", "block_size=1048576"),
    ("vhdx", "block_size=1048576,subformat=fixed"),
];

/// Those that grow, but do not shrink.
const GROWING: &[(&str, &str)] = &[("qed", ""), ("qed", "cluster_size=4096")];

/// A qcow2 whose LUKS header is as short as it can be.
const ENCRYPTED: &str = "cluster_size=4096,encrypt.format=luks,encrypt.iter-time=0,encrypt.cipher-alg=aes-128";

#[test]
fn failed_writes_leave_a_consistent_qcow2() {
    for options in ["", "cluster_size=4096"] {
        Case::new("qcow2", options, write_a_lot).every_point(10);
    }
}

#[test]
fn failed_writes_leave_a_consistent_image_of_any_other_format() {
    for (format, options) in OTHERS.iter().chain(GROWING) {
        Case::new(format, options, write_a_lot).every_point(6);
    }
}

#[test]
fn a_failed_growth_leaves_a_consistent_qcow2() {
    Case::new("qcow2", "cluster_size=4096", grow).every_point(3);
    Case::new("qcow2", "cluster_size=4096", grow_with_metadata).every_point(5);
    Case::new("qcow2", ENCRYPTED, grow).every_point(3);
    Case::new("qcow2", ENCRYPTED, grow_with_metadata).every_point(5);
}

#[test]
fn a_failed_growth_leaves_a_consistent_image_of_any_other_format() {
    for (format, options) in OTHERS.iter().chain(GROWING) {
        Case::new(format, options, grow_a_little).every_point(1);
    }
}

#[test]
fn a_failed_shrinking_leaves_a_consistent_image_of_any_format() {
    Case::shrinking("qcow2", "cluster_size=4096").every_point(3);
    Case::shrinking("qcow2", ENCRYPTED).every_point(3);
    for (format, options) in OTHERS {
        Case::shrinking(format, options).every_point(1);
    }
}

/// Where the backing file is longer than the disk, what it holds past the disk's end never shows, wherever a growth
/// stops.
#[test]
fn a_stopped_growth_over_a_longer_backing_file_shows_none_of_it() {
    // How the base is made; how the disk is; its new length.
    let qcow = "qemu-img create -q -f qcow -b base -F raw i";
    let vmdk = "qemu-img create -q -f vmdk -b base -F vmdk";
    let cases = [
        ("qcow", "raw", format!("{qcow} 1000448"), 5 << 20),
        // A longer first table.
        ("qcow", "raw", format!("{qcow} 300k"), 64 << 20),
        ("qed", "raw", "qemu-img create -q -f qed -b base -F raw i 1000448".to_owned(), 5 << 20),
        ("vmdk", "vmdk", format!("{vmdk} i 1000448"), 5 << 20),
        ("vmdk", "vmdk", format!("{vmdk} i 640k"), 100 << 20),
        ("vmdk", "vmdk", format!("{vmdk} -o zeroed_grain=on i 640k"), 100 << 20),
    ];
    for (overlay, base, line, size) in cases {
        let scratch = Scratch::new();
        std::fs::write(scratch.file("disk"), pattern(9, 4 << 20)).expect("disk");
        scratch.sh(&format!("qemu-img convert -f raw -O {base} disk base; {line}"));
        let files = Files::default();
        for name in ["i", "base"] {
            files.put(name, Arc::new(Memory::new(std::fs::read(scratch.file(name)).expect("made"))));
        }
        let grown = |stop: Option<usize>| -> (Faulty, Files) {
            let files = files.copy();
            let plain = files.get("i").expect("image");
            let faulty =
                stop.map_or_else(|| Faulty::recording(plain.clone()), |at| Faulty::new(plain.clone(), at, Fault::Stop));
            files.put("i", Arc::new(faulty.beside(plain.clone())));
            let below = inside::open(&files, find(base), "base", false, None).expect("base");
            let node = inside::open(&files, find(overlay), "i", true, Some(Arc::new(below))).expect("overlay");
            let done = vimg::ops::resize::resize(&node, size, Preallocation::Off);
            assert!(stop.is_some() || done.is_ok(), "{line}: {done:?}");
            files.put("i", plain);
            (faulty, files)
        };
        let shown = || {
            scratch.judge(&["convert", "-f", overlay, "-O", "raw", "i", "shown"]);
            std::fs::read(scratch.file("shown")).expect("shown")
        };
        let old = shown();
        let count = grown(None).0.operations().len();
        let mut new = 0;
        for stop in 0..=count {
            grown(Some(stop)).1.save(scratch.path());
            let is = shown();
            let (before, after) = is.split_at(old.len());
            assert!(before == old, "{line}: {stop} of {count}");
            assert!([0, size - old.len() as u64].contains(&(after.len() as u64)), "{line}: {stop} of {count}");
            let seen = after.iter().position(|byte| *byte != 0);
            assert!(seen.is_none(), "{line}: {stop} of {count}: {seen:?} past the old end");
            new += usize::from(!after.is_empty());
        }
        assert!(new > 0 && new <= count, "{line}: {new} of {count}");
    }
}

#[test]
fn a_failed_read_is_reported_and_leaves_a_consistent_image() {
    for (format, options) in [("qcow2", ""), ("qcow2", "cluster_size=4096,compat=0.10")].iter().chain(OTHERS) {
        Case::new(format, options, write_a_lot).every_read();
        Case::new(format, options, grow_a_little).every_read();
        Case::shrinking(format, options).every_read();
    }
    for (format, options) in GROWING {
        Case::new(format, options, write_a_lot).every_read();
        Case::new(format, options, grow_a_little).every_read();
    }
}

#[test]
fn creation_leaves_an_image_or_an_error() {
    // What `create` leaves half done is never given a name (see the walk-throughs); here: the failure is reported.
    for options in ["", "preallocation=metadata", "cluster_size=512,preallocation=full"] {
        let recorded: Arc<Mutex<Vec<Arc<Faulty>>>> = Arc::default();
        let keep = recorded.clone();
        let files = Files::default();
        inside::create_wrapped(&files, find("qcow2"), NAME, 2 << 20, options, &|storage| {
            let faulty = Arc::new(Faulty::recording(storage));
            keep.lock().unwrap().push(faulty.clone());
            faulty
        })
        .expect("create");
        let count: usize = recorded.lock().unwrap().iter().map(|faulty| faulty.operations().len()).sum();
        assert!(count >= 2, "create {options}: {count} operations");
        for at in 0..count {
            for fault in [Fault::Fail(Errno::EIO), Fault::FailFrom(Errno::ENOSPC), Fault::Shorten] {
                let files = Files::default();
                let result = inside::create_wrapped(&files, find("qcow2"), NAME, 2 << 20, options, &|storage| {
                    Arc::new(Faulty::new(storage, at, fault)) as Arc<dyn Storage>
                });
                assert!(result.is_err(), "create {options}: {fault:?} at {at} of {count} is not reported");
            }
        }
    }
}

#[test]
fn a_failing_disk_is_named_with_its_reason() {
    let files = Case::new("qcow2", "", write_a_lot).prepared();
    let plain = files.get(NAME).expect("image");
    files.put(NAME, Arc::new(Faulty::new(plain, 0, Fault::FailFrom(Errno::ENOSPC))));
    let node = inside::open(&files, find("qcow2"), NAME, true, None).expect("open");
    let error = node.write(GuestOffset(1_500_000), &pattern(1, 5000), &mut Buffers::default()).unwrap_err();
    assert!(error.message().contains("No space left on device"), "{}", error.message());
    assert!(error.message().contains(NAME), "{}", error.message());
}

/// What cannot be read of a table is told with the file and the place in it.
#[test]
fn a_table_that_cannot_be_read_is_told_with_its_place() {
    let scratch = crate::common::Scratch::new();
    for (format, sector, told) in [
        ("qcow2", 512, "error while reading L2 table at byte 262144"),
        ("vdi", 1, "error while reading block map at byte 0"),
        ("vpc", 3, "error while reading block allocation table at byte 0"),
        ("vmdk", 26, "error while reading the grain directory at byte 13312"),
    ] {
        scratch.judge(&["create", "-q", "-f", format, "a", "4M"]);
        scratch.qemu_io(format, "a", &["write -P 1 0 64k"]);
        let rule = format!("{{\"event\":\"none\",\"iotype\":\"read\",\"sector\":{sector}}}");
        let below = format!("{{\"driver\":\"blkdebug\",\"image\":\"file\",\"inject-error\":[{rule}]}}");
        let below = below.replace("\"file\"", "{\"driver\":\"file\",\"filename\":\"a\"}");
        let tree = format!("json:{{\"driver\":\"{format}\",\"file\":{below}}}");
        let out = crate::common::vimg(&["convert", "-O", "raw", &tree, "o"]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains(&format!(": {told}: Input/output error")), "{out:?}");
    }
}

/// Snapshots that come and go, bitmaps that are read, that follow what is written, and that get longer.
fn snapshots_and_bitmaps(node: &Node) -> Result<()> {
    let (driver, mut bits) = (node.driver(), [0; 4]);
    driver.bitmaps().expect("bitmaps").read(0, 0, &mut bits)?;
    node.write(GuestOffset(1_000_000), &pattern(3, 90_000), &mut Buffers::default())?;
    driver.flush()?;
    let snapshots = driver.snapshots().expect("snapshots");
    snapshots.create(&NewSnapshot { name: "t".to_owned(), date_sec: 7, date_nsec: 0 })?;
    snapshots.delete(0)?;
    grow(node)
}

#[test]
fn what_cannot_be_read_or_written_is_told_with_its_file_and_place() {
    let mut cases: Vec<(Case, Files)> = Vec::new();
    let split = "subformat=twoGbMaxExtentSparse";
    for (format, options) in
        [("qcow2", ""), ("vdi", ""), ("vpc", ""), ("vpc", "subformat=fixed"), ("vmdk", ""), ("vmdk", split)]
    {
        let writing = Case::new(format, options, write_a_lot);
        let files = writing.prepared();
        for case in [writing, Case::new(format, options, grow), Case::shrinking(format, options)] {
            cases.push((case, files.copy()));
        }
    }
    let case = Case::new("qcow2", "", snapshots_and_bitmaps);
    let (scratch, files) = (Scratch::new(), case.prepared());
    files.save(scratch.path());
    scratch.judge(&["snapshot", "-c", "s", NAME]);
    scratch.judge(&["bitmap", "--add", NAME, "b"]);
    scratch.qemu_io("qcow2", NAME, &["write -P 9 0 64k"]);
    files.put(NAME, Arc::new(Memory::new(std::fs::read(scratch.file(NAME)).expect("image"))));
    cases.push((case, files));
    let mut without: Vec<String> = Vec::new();
    for (case, files) in cases {
        let label = format!("{} {}", case.format, case.options);
        let (recorded, worked, _) = case.run(&files, Faulty::recording);
        worked.unwrap_or_else(|error| panic!("{label}: {}", error.message()));
        for (n, operation) in recorded.operations().into_iter().enumerate() {
            let FaultyOperation::Write { at, len } = operation else { continue };
            let (_, worked, _) = case.run(&files, |inner| Faulty::new(inner, n, Fault::Fail(Errno::EIO)));
            match worked {
                Err(error) if !has_place(&error, &files, Some(at..at + len)) => {
                    without.push(format!("{label}: write at {at}: {}", error.message()));
                }
                _ => {}
            }
        }
        for n in 0..recorded.reads() {
            let (_, worked, _) = case.run(&files, |inner| Faulty::failing_read(inner, n));
            match worked {
                Err(error) if !has_place(&error, &files, None) => {
                    without.push(format!("{label}: read {n}: {}", error.message()));
                }
                _ => {}
            }
        }
    }
    without.sort_unstable();
    without.dedup_by_key(|text| text.rsplit(": ").take(2).map(str::to_owned).collect::<Vec<_>>());
    assert!(without.is_empty(), "{without:#?}");
}
