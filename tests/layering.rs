//! Commit and rebase where storage fails or loses writes: read through its chain the disk is the same wherever they
//! stop. The judge reads and checks every image.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use fastrand::Rng;
use nix::errno::Errno;
use vimg::block::io::Scratch as Buffers;
use vimg::block::{BackingRef, Format, GuestOffset, Node, Result, format};
use vimg::formats::FORMATS;
use vimg::ops::commit::{self, Commit};
use vimg::ops::copy::Silent;
use vimg::ops::rebase::{self, NewBacking};
use vimg::storage::CacheMode;
use vimg::storage::fault::{Fault, Faulty, FaultyOperation};

use crate::common::inside::{self, Files};
use crate::common::journal::Journal;
use crate::common::{Scratch, judge, pattern, vimg};

fn find(format: &str) -> &'static dyn Format {
    format::find(FORMATS, format).expect("a format of ours")
}

/// An overlay and what lies below it, or shall.
struct Case {
    /// Format, options and size of the overlay.
    top: (&'static str, &'static str, u64),
    /// The same of its backing file; no format: it has none.
    old: (&'static str, &'static str, u64),
    /// And of the one that it gets; no format for none. Nothing at all: what it stores is committed to the old one.
    new: Option<(&'static str, &'static str, u64)>,
    compress: bool,
}

const MIB: u64 = 1 << 20;

impl Case {
    fn commit(top: (&'static str, &'static str, u64), old: (&'static str, &'static str, u64)) -> Self {
        Self { top, old, new: None, compress: false }
    }

    fn rebase(
        top: (&'static str, &'static str, u64),
        old: (&'static str, &'static str, u64),
        new: (&'static str, &'static str, u64),
    ) -> Self {
        Self { top, old, new: Some(new), compress: false }
    }

    fn label(&self) -> String {
        format!("{:?} over {:?}, then {:?}", self.top, self.old, self.new)
    }

    /// The files, and what the overlay shows.
    fn prepared(&self) -> (Files, Vec<u8>) {
        let files = Files::default();
        for (n, (name, (format, options, size))) in
            [("old", self.old), ("new", self.new.unwrap_or_default())].into_iter().enumerate()
        {
            if format.is_empty() {
                continue;
            }
            inside::create_wrapped(&files, find(format), name, size, options, &|file| file).expect("create");
            let node = inside::open(&files, find(format), name, true, None).expect("open");
            let mut buffers = Buffers::default();
            // The two have some data in common.
            node.write(GuestOffset(40_960), &pattern(9, 200_000), &mut buffers).expect("write");
            node.write(GuestOffset(300_000), &pattern(n as u64, 300_000), &mut buffers).expect("write");
            node.write(GuestOffset(size - 50_000), &pattern(n as u64 + 2, 50_000), &mut buffers).expect("write");
            node.driver().close().expect("close");
        }
        let (format, options, size) = self.top;
        let backing = match self.old.0 {
            "" => String::new(),
            old => format!("backing_file=old,backing_fmt={old},"),
        };
        let options = format!("{backing}{options}");
        inside::create_wrapped(&files, find(format), "image", size, &options, &|file| file).expect("create");
        let node = self.open(&files, true);
        let mut buffers = Buffers::default();
        node.write(GuestOffset(100_000), &pattern(5, 70_000), &mut buffers).expect("write");
        node.write_zeroes(GuestOffset(400_000), 60_000, true, &mut buffers).expect("zeros");
        node.write(GuestOffset(700_000), &pattern(6, 20_000), &mut buffers).expect("write");
        node.driver().close().expect("close");
        let mut shown = vec![0; usize::try_from(size).expect("small")];
        self.open(&files, false).read(GuestOffset(0), &mut shown, &mut buffers).expect("read");
        (files, shown)
    }

    /// The overlay over its old backing file, which is written to by a commit.
    fn open(&self, files: &Files, write: bool) -> Arc<Node> {
        self.try_open(files, write).expect("open")
    }

    fn try_open(&self, files: &Files, write: bool) -> Result<Arc<Node>> {
        let below = match self.old.0 {
            "" => None,
            old => Some(Arc::new(inside::open(files, find(old), "old", write && self.new.is_none(), None)?)),
        };
        Ok(Arc::new(inside::open(files, find(self.top.0), "image", write, below)?))
    }

    fn work(&self, files: &Files) -> Result<()> {
        let chain = self.try_open(files, true)?;
        let Some((new, _, _)) = self.new else {
            commit::grow(&chain, 1)?;
            let chain = self.try_open(files, true)?;
            let plan = Commit { depth: 1, keep: false, rate: None, cache: CacheMode::Writeback };
            return commit::move_down(&chain, &plan, &Silent);
        };
        let below = match new {
            "" => None,
            new => Some(Arc::new(inside::open(files, find(new), "new", false, None)?)),
        };
        let format = Some(new.to_owned());
        let named = below.as_ref().map(|_| BackingRef { name: "new".into(), format, elsewhere: Vec::new() });
        rebase::rebase(&chain, &NewBacking { named, typed: None, below }, self.compress, &Silent)
    }

    /// Does the work on a copy with a fault.
    fn run(
        &self,
        files: &Files,
        faulty: impl FnOnce(Arc<dyn vimg::storage::Storage>) -> Faulty,
    ) -> (Faulty, bool, Files) {
        let plain = files.copy();
        let first = faulty(plain.get("image").expect("image"));
        let wrapped = Files::default();
        for name in plain.names() {
            wrapped.put(&name, Arc::new(first.beside(plain.get(&name).expect("file"))));
        }
        let worked = self.work(&wrapped).is_ok();
        (first, worked, plain)
    }
}

/// The judge, who looks at the same files once.
struct Judge<'a> {
    case: &'a Case,
    shown: &'a [u8],
    seen: HashSet<u64>,
    scratch: Scratch,
}

impl<'a> Judge<'a> {
    fn new(case: &'a Case, shown: &'a [u8]) -> Self {
        Self { case, shown, seen: HashSet::new(), scratch: Scratch::new() }
    }

    fn read(&self, format: &str, name: &str, what: &str) -> Vec<u8> {
        let out = judge(&["convert", "-f", format, "-O", "raw", name, "raw"]).dir(self.scratch.path()).run();
        assert_eq!(out.code, Some(0), "{what}: {out:#?}");
        std::fs::read(self.scratch.file("raw")).expect("raw")
    }

    fn check(&self, format: &str, name: &str, what: &str) {
        if !["", "raw"].contains(&format) {
            let out = judge(&["check", "-f", format, name]).dir(self.scratch.path()).run();
            // 63: the format has no check.
            assert!(matches!(out.code, Some(0 | 3 | 63)), "{what}: {name}: {out:#?}");
        }
    }

    /// The disk is what it was, and both images are consistent.
    fn judged(&mut self, files: &Files, what: &str) {
        let mut hasher = DefaultHasher::new();
        for name in files.names() {
            (&name, inside::bytes_of(&*files.get(&name).expect("file"))).hash(&mut hasher);
        }
        if !self.seen.insert(hasher.finish()) {
            return;
        }
        files.save(self.scratch.path());
        self.check(self.case.top.0, "image", what);
        self.check(self.case.old.0, "old", what);
        if (self.case.top.0, &self.case.new) == ("vmdk", &None) {
            // The id of the one and what the other has of it lie in two files.
            vimg(&["rebase", "-u", "-b", "old", "-F", "vmdk", "image"]).dir(self.scratch.path()).ok();
        }
        let is = self.read(self.case.top.0, "image", what);
        let at = is.iter().zip(self.shown).position(|(a, b)| a != b);
        assert!(is.len() == self.shown.len() && at.is_none(), "{what}: the disk differs at {at:?}");
    }

    /// It is done: a backing file that was committed to shows the disk by itself, and a rebased overlay has its new one.
    fn done(&mut self, files: &Files, what: &str) {
        self.judged(files, what);
        files.save(self.scratch.path());
        match self.case.new {
            None => {
                let below = self.read(self.case.old.0, "old", what);
                assert!(below.starts_with(self.shown), "{what}: the backing file does not show the disk");
            }
            Some((new, ..)) => {
                let info = judge(&["info", "--output=json", "-f", self.case.top.0, "image"]).dir(self.scratch.path());
                let info = info.ok().json();
                let named = info["backing-filename"].as_str();
                assert_eq!(named, (!new.is_empty()).then_some("new"), "{what}");
            }
        }
    }
}

fn every_point(case: &Case) {
    let (files, shown) = case.prepared();
    let mut judge = Judge::new(case, &shown);
    let label = case.label();
    judge.judged(&files, &label);
    let (recorded, worked, after) = case.run(&files, Faulty::recording);
    let operations = recorded.operations();
    assert!(worked && operations.len() > 5, "{label}: {worked}, {operations:?}");
    judge.done(&after, &label);
    for fault in [Fault::Fail(Errno::EIO), Fault::FailFrom(Errno::ENOSPC), Fault::Shorten, Fault::Stop] {
        for (at, operation) in operations.iter().enumerate() {
            let what = format!("{label}: {fault:?} at {operation:?}, {at} of {}", operations.len());
            let torn =
                matches!(operation, FaultyOperation::Write { at: 0, .. } | FaultyOperation::Write { len: ..512, .. });
            let torn = torn && (case.new.is_some() || !matches!(operation, FaultyOperation::Write { len: 512.., .. }));
            if torn && fault == Fault::Shorten {
                // No disk writes half a sector.
                continue;
            }
            let (_, worked, after) = case.run(&files, |inner| Faulty::new(inner, at, fault));
            let offer = matches!(operation, FaultyOperation::Discard { .. });
            assert!(!(worked && fault != Fault::Stop && !offer), "{what}: the failure is not reported");
            judge.judged(&after, &what);
        }
    }
}

/// Of what was written since the last flush of a file, any part may be lost.
fn power_cuts(case: &Case, seed: u64) {
    let (files, shown) = case.prepared();
    let (mut judge, mut rng) = (Judge::new(case, &shown), Rng::with_seed(seed));
    let journal = Journal::default();
    case.work(&journal.over(&files)).expect("it works");
    let steps = journal.len();
    for round in 0..60 {
        let cut = if round < 4 { steps - round } else { rng.usize(..=steps) };
        let left = journal.cut(&files, cut, &mut rng);
        judge.judged(&left, &format!("{}: cut after {cut} of {steps}, round {round}", case.label()));
    }
}

fn commits() -> Vec<Case> {
    vec![
        Case::commit(("qcow2", "cluster_size=4096", MIB), ("raw", "", MIB)),
        Case::commit(("qcow2", "", MIB + 512 * 100), ("qcow2", "cluster_size=4096", 900 << 10)),
        Case::commit(("qcow2", "compat=0.10,cluster_size=4096", MIB), ("qcow2", "extended_l2=on", MIB)),
        Case::commit(("qcow2", "extended_l2=on,cluster_size=16384", 900 << 10), ("qcow2", "compat=0.10", MIB)),
        Case::commit(("qcow", "", MIB), ("raw", "", MIB)),
        Case::commit(("qed", "", MIB), ("qed", "", MIB)),
        Case::commit(("vmdk", "", MIB), ("vmdk", "", MIB)),
    ]
}

fn rebases() -> Vec<Case> {
    let compressed = Case::rebase(("qcow2", "cluster_size=4096", MIB), ("qcow2", "", MIB), ("", "", 0));
    vec![
        Case::rebase(("qcow2", "cluster_size=4096", MIB), ("raw", "", MIB), ("qcow2", "", 900 << 10)),
        Case::rebase(("qcow2", "compat=0.10,cluster_size=4096", MIB), ("", "", 0), ("raw", "", MIB + MIB / 2)),
        Case::rebase(
            ("qcow2", "extended_l2=on,cluster_size=16384", MIB),
            ("qcow2", "", MIB / 2 + MIB),
            ("qcow2", "", MIB),
        ),
        Case { compress: true, ..compressed },
        Case::rebase(("qcow", "", MIB), ("qcow2", "", MIB), ("qcow2", "", MIB)),
        Case::rebase(("qed", "", MIB), ("raw", "", MIB), ("qcow2", "", MIB)),
        Case::rebase(("qed", "", MIB), ("", "", 0), ("raw", "", MIB)),
        Case::rebase(("vmdk", "", MIB), ("vmdk", "", MIB), ("vmdk", "", MIB)),
    ]
}

/// A read that fails is reported, or was not needed.
fn every_read(case: &Case) {
    let (files, shown) = case.prepared();
    let mut judge = Judge::new(case, &shown);
    let (recorded, worked, _) = case.run(&files, Faulty::recording);
    let (count, mut reported) = (recorded.reads(), 0);
    assert!(worked && count > 5, "{}: {count} reads", case.label());
    for at in 0..count {
        let what = format!("{}: read {at} of {count} fails", case.label());
        let (_, worked, after) = case.run(&files, |inner| Faulty::failing_read(inner, at));
        reported += usize::from(!worked);
        if worked { judge.done(&after, &what) } else { judge.judged(&after, &what) }
    }
    assert!(reported > 0, "{}: none of {count} failures is reported", case.label());
}

#[test]
fn a_failed_read_of_a_commit_or_a_rebase_is_reported() {
    every_read(&commits()[0]);
    every_read(&rebases()[0]);
}

#[test]
fn a_failed_commit_leaves_the_disk_as_it_was() {
    commits().iter().for_each(every_point);
}

#[test]
fn a_failed_rebase_leaves_the_disk_as_it_was() {
    rebases().iter().for_each(every_point);
}

/// A write fails for want of room, whichever it is, and others go on: what was placed for it is no leak.
#[test]
fn a_qed_that_finds_no_room_for_a_write_leaks_nothing() {
    for case in [
        Case::commit(("raw", "", 0), ("qed", "", 24 * MIB)),
        Case::rebase(("qed", "", 24 * MIB), ("raw", "", 24 * MIB), ("", "", 0)),
    ] {
        let commits = case.new.is_none();
        let files = Files::default();
        let make = |format: &str, name: &str, options: &str| {
            inside::create_wrapped(&files, find(format), name, 24 * MIB, options, &|file| file).expect("create");
        };
        let (top, below) = if commits { ("qcow2", "qed") } else { ("qed", "raw") };
        make(below, "old", "");
        make(top, "image", &format!("backing_file=old,backing_fmt={below}"));
        let case = Case { top: (top, "", 24 * MIB), ..case };
        let data = if commits { "image" } else { "old" };
        let node = match data {
            "image" => case.open(&files, true),
            _ => Arc::new(inside::open(&files, find(below), data, true, None).expect("open")),
        };
        node.write(GuestOffset(0), &pattern(3, 24 << 20), &mut Buffers::default()).expect("write");
        node.driver().close().expect("close");
        drop(node);
        let changed = if commits { "old" } else { "image" };
        let scratch = Scratch::new();
        let (recorded, worked, _) = case.run(&files, Faulty::recording);
        let operations = recorded.operations();
        assert!(worked && operations.len() > 12);
        for at in 0..operations.len() {
            // What is written after the failure may be any of the rest.
            let (_, worked, after) = case.run(&files, |inner| Faulty::new(inner, at, Fault::Fail(Errno::ENOSPC)));
            let large = matches!(operations[at], FaultyOperation::Write { len: 65536.., .. });
            if worked || !large {
                continue;
            }
            after.save(scratch.path());
            let out = judge(&["check", "-f", "qed", changed]).dir(scratch.path()).run();
            assert!(out.code == Some(0), "{}: {at} of {}: {out:?}", case.label(), operations.len());
        }
    }
}

#[test]
fn lost_writes_of_a_commit_or_a_rebase_leave_the_disk_as_it_was() {
    for (seed, case) in commits().iter().chain(&rebases()).enumerate() {
        power_cuts(case, seed as u64);
    }
}
