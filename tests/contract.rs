//! One suite over every format that can be created and written to: seeded random operations against a `Vec<u8>`,
//! and then the judge's word on what is left.
//!
//! A new entry of `FORMATS` that can be created is tested without being named here; [`VARIANTS`] adds the kinds that a format has.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::thread;

use vimg::block::io::Scratch as Buffers;
use vimg::block::{Effort, Encoded, Format, GuestOffset, Node, Store};
use vimg::formats::FORMATS;
use vimg::storage::Preallocation;

use crate::common::inside::{self, Files};
use crate::common::{Scratch, judge, pattern};

/// Kinds of a format worth a run of their own, as creation options.
const VARIANTS: &[(&str, &[&str])] = &[
    (
        "qcow2",
        &[
            "",
            "cluster_size=512",
            "cluster_size=4096",
            "cluster_size=2097152",
            "compat=0.10",
            "compat=0.10,cluster_size=1024",
            "refcount_bits=1,cluster_size=4096",
            "refcount_bits=64,cluster_size=512",
            "lazy_refcounts=on",
            "extended_l2=on",
            "extended_l2=on,cluster_size=16384",
            "preallocation=metadata",
            "preallocation=metadata,extended_l2=on",
            "preallocation=falloc,cluster_size=8192",
            "data_file=data",
            "data_file=data,data_file_raw=on",
            "compression_type=zstd",
            "encryption=on",
            "encrypt.format=luks,encrypt.iter-time=1",
            "encrypt.format=luks,encrypt.iter-time=1,extended_l2=on,cluster_size=16384",
        ],
    ),
    ("qcow", &["", "encrypt.format=aes"]),
    ("vmdk", &["", "subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse", "subformat=twoGbMaxExtentFlat"]),
    ("vdi", &["", "static=on"]),
    ("vpc", &["", "subformat=fixed", "force_size=on"]),
    (
        "luks",
        &[
            "iter-time=0",
            "iter-time=0,cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv",
            "iter-time=0,cipher-alg=twofish-256,cipher-mode=ctr",
        ],
    ),
    ("vhdx", &["", "subformat=fixed", "block_size=1048576"]),
    ("qed", &["", "cluster_size=4096"]),
    ("parallels", &["", "cluster_size=65536"]),
];

fn variants(format: &dyn Format) -> &'static [&'static str] {
    VARIANTS.iter().find(|(name, _)| *name == format.name()).map_or(&[""][..], |(_, variants)| variants)
}

/// Kinds that take whole compressed units alone, each once: they are left out of what writes at random.
const ENCODED: &[(&str, &str)] = &[("vmdk", "subformat=streamOptimized")];

/// An image, what it must read as, and what its backing file reads as.
struct Case {
    format: &'static dyn Format,
    label: String,
    files: Files,
    node: Option<Node>,
    backing: Option<Arc<Node>>,
    below: Vec<u8>,
    model: Vec<u8>,
    rng: fastrand::Rng,
    buffers: Buffers,
}

const NAME: &str = "image";

impl Case {
    fn new(format: &'static dyn Format, options: &str, seed: u64) -> Self {
        let files = inside::create(format, NAME, 3 << 20, options);
        Self::start(format, options, seed, files, None, Vec::new())
    }

    /// On top of a raw file that is a little shorter than the overlay.
    fn overlay(format: &'static dyn Format, options: &str, seed: u64) -> Option<Self> {
        let has_backing = format.creating().is_some_and(|create| create.has_backing());
        if !has_backing || format.name() == "vmdk" {
            // vmdk takes vmdk alone as its backing file: tested with its own format.
            return None;
        }
        let raw = vimg::block::format::find(FORMATS, "raw").expect("raw");
        let below = pattern(seed ^ 0xb, 2_500_096);
        let files = Files::default();
        files.put("below", Arc::new(vimg::storage::memory::Memory::new(below.clone())));
        let comma = if options.is_empty() { "" } else { "," };
        let text = format!("{options}{comma}backing_file=below,backing_fmt=raw");
        inside::create_wrapped(&files, format, NAME, 3 << 20, &text, &|storage| storage).expect("create overlay");
        let backing = inside::open(&files, raw, "below", false, None).expect("open raw");
        Some(Self::start(format, &text, seed, files, Some(Arc::new(backing)), below))
    }

    fn start(
        format: &'static dyn Format,
        options: &str,
        seed: u64,
        files: Files,
        backing: Option<Arc<Node>>,
        mut below: Vec<u8>,
    ) -> Self {
        let label = format!("{} {options} (seed {seed})", format.name());
        let node = inside::open(&files, format, NAME, true, backing.clone())
            .unwrap_or_else(|e| panic!("{label}: {}", e.message()));
        below.resize(usize::try_from(node.virtual_size()).expect("small"), 0);
        if !format.layered() && node.driver().cipher().is_some() {
            // What was never written reads as anything.
            node.write_zeroes(GuestOffset(0), node.virtual_size(), false, &mut Buffers::default()).expect("zeros");
        }
        let model = below.clone();
        let rng = fastrand::Rng::with_seed(seed);
        Self { format, label, files, node: Some(node), backing, below, model, rng, buffers: Buffers::default() }
    }

    fn node(&self) -> &Node {
        self.node.as_ref().expect("open")
    }

    fn ok<T>(&self, what: &str, result: vimg::block::Result<T>) -> T {
        result.unwrap_or_else(|e| panic!("{}: {what}: {}", self.label, e.message()))
    }

    /// A range of the disk: mostly whole sectors, sometimes any bytes, sometimes long.
    fn range(&mut self) -> (usize, usize) {
        let size = self.model.len();
        let grain = if self.rng.u8(..4) == 0 { 1 } else { 512 };
        let longest = [2048, 70_000, 300_000, 1_200_000][self.rng.usize(..4)];
        let at = self.rng.usize(..size) / grain * grain;
        let len = (1 + self.rng.usize(..longest)).next_multiple_of(grain).min(size - at);
        (at, len)
    }

    fn step(&mut self) {
        let (at, len) = if self.model.is_empty() { (0, 0) } else { self.range() };
        let start = GuestOffset(at as u64);
        let mut buffers = std::mem::take(&mut self.buffers);
        match self.rng.u8(..100) {
            0..45 if len > 0 => {
                let data = pattern(self.rng.u64(..), len);
                self.ok("write", self.node().write(start, &data, &mut buffers));
                self.model[at..at + len].copy_from_slice(&data);
            }
            45..65 if len > 0 => {
                let unmap = self.rng.bool();
                self.ok("write zeroes", self.node().write_zeroes(start, len as u64, unmap, &mut buffers));
                self.model[at..at + len].fill(0);
            }
            65..75 if len > 0 => self.discard(at, len, &mut buffers),
            75..90 if len > 0 => {
                let mut got = vec![0xee; len];
                self.ok("read", self.node().read(start, &mut got, &mut buffers));
                assert!(got == self.model[at..at + len], "{}: read at {at}, {len} bytes", self.label);
            }
            90..94 => self.check_map(),
            94..97 => self.reopen(),
            97..100 => self.resize(),
            _ => {}
        }
        self.buffers = buffers;
    }

    /// Whole units in the range read as zero, as the backing file, or as before; the rest as before.
    fn discard(&mut self, at: usize, len: usize, buffers: &mut Buffers) {
        let start = GuestOffset(at as u64);
        self.ok("discard", self.node().writing().and_then(|w| w.discard(start, len as u64)));
        let mut got = vec![0xee; len];
        self.ok("read", self.node().read(start, &mut got, buffers));
        for (i, byte) in got.iter().enumerate() {
            let (old, below) = (self.model[at + i], self.below[at + i]);
            let fine = *byte == old || *byte == 0 || *byte == below;
            assert!(fine, "{}: after discard {at}+{len}, byte {} is {byte:#x}", self.label, at + i);
        }
        self.model[at..at + len].copy_from_slice(&got);
    }

    /// The map covers the disk, step by step, and what it calls zero is zero.
    fn check_map(&mut self) {
        let size = self.node().virtual_size();
        let mut at = 0;
        while at < size {
            let mapping = self.ok("map", self.node().map(GuestOffset(at), size - at, usize::MAX));
            assert!(mapping.len >= 1 && mapping.len <= size - at, "{}: map at {at}: {mapping:?}", self.label);
            let range = usize::try_from(at).unwrap()..usize::try_from(at + mapping.len).unwrap();
            if mapping.is_zero() {
                assert!(self.model[range].iter().all(|byte| *byte == 0), "{}: {at} is not zero", self.label);
            }
            at += mapping.len;
        }
    }

    fn reopen(&mut self) {
        self.ok("close", self.node().driver().close());
        self.node = None;
        let node = inside::open(&self.files, self.format, NAME, true, self.backing.clone());
        self.node = Some(self.ok("open again", node));
        assert_eq!(self.node().virtual_size(), self.model.len() as u64, "{}", self.label);
    }

    /// Grows or shrinks, where the format can, at the driver: without what `resize` does above it for a tail that
    /// a longer backing file would show through.
    fn resize(&mut self) {
        if self.backing.is_some() {
            return;
        }
        let to = self.rng.u64(1..10_000) * 512;
        self.resize_to(to);
    }

    /// False where the format cannot.
    fn resize_to(&mut self, to: u64) -> bool {
        let Some(resizing) = self.node().driver().resizing() else { return false };
        if resizing.check(to, Preallocation::Off).is_err() {
            return false;
        }
        let result = resizing.resize(to, Preallocation::Off);
        self.ok("resize", result);
        let (old, new) = (self.model.len() as u64, self.node().virtual_size());
        if new > old && !self.format.layered() && self.node().driver().cipher().is_some() {
            let mut buffers = std::mem::take(&mut self.buffers);
            self.ok("zeros", self.node().write_zeroes(GuestOffset(old), new - old, false, &mut buffers));
            self.buffers = buffers;
        }
        // A resized image is closed next, as `resize` does.
        self.model.resize(usize::try_from(self.node().virtual_size()).expect("small"), 0);
        self.reopen();
        let size = usize::try_from(self.node().virtual_size()).expect("small");
        assert!(size as u64 >= to, "{}: {size} after resize to {to}", self.label);
        self.below.resize(size, 0);
        true
    }

    /// The judge reads the same, and finds nothing wrong.
    fn judged(mut self) {
        self.ok("close", self.node().driver().close());
        self.node = None;
        let scratch = Scratch::new();
        self.files.save(scratch.path());
        let name = self.format.name();
        let secret = format!("secret,id=s,data={}", inside::PASSPHRASE);
        let option = if name == "luks" { "key-secret" } else { "encrypt.key-secret" };
        let keyed = format!("driver={name},{option}=s,file.filename={NAME}");
        let image = match name == "luks" || self.label.contains("encrypt") {
            true => &["--object", &secret, "--image-opts", &keyed][..],
            false => &["-f", name, NAME],
        };
        let out = judge(&[&["check"], image].concat()).dir(scratch.path()).run();
        // 63: the format has no check.
        assert!(matches!(out.code, Some(0 | 63)), "{}: {out:#?}", self.label);
        let out = judge(&[&["convert", "-O", "raw"], image, &["judged.raw"]].concat()).dir(scratch.path()).run();
        assert_eq!(out.code, Some(0), "{}: {out:#?}", self.label);
        let judged = std::fs::read(scratch.file("judged.raw")).expect("judged.raw");
        assert_eq!(judged.len(), self.model.len(), "{}: size", self.label);
        if let Some(at) = judged.iter().zip(&self.model).position(|(a, b)| a != b) {
            panic!("{}: the judge reads another byte at {at} ({at:#x})", self.label);
        }
    }
}

/// Formats that can be made, opened for writing, and written to in any order.
fn writable() -> Vec<(&'static dyn Format, &'static str)> {
    let mut found = Vec::new();
    for format in FORMATS.iter().copied().filter(|format| format.creating().is_some()) {
        for options in variants(format) {
            let files = inside::create(format, NAME, 3 << 20, options);
            let node = inside::open(&files, format, NAME, true, None).unwrap_or_else(|e| {
                panic!("{} {options}: {}", format.name(), e.message());
            });
            if node.writing().is_ok() {
                found.push((format, *options));
            }
        }
    }
    for format in FORMATS.iter().filter(|format| format.creating().is_some()) {
        assert!(found.iter().any(|(other, _)| other.name() == format.name()), "{}: not writable", format.name());
    }
    found
}

/// Runs `body` on every writable format and kind, two at a time.
fn for_each_kind(body: impl Fn(&'static dyn Format, &'static str) + Sync) {
    let kinds = writable();
    let next = std::sync::atomic::AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((format, options)) = kinds.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    body(*format, options);
                }
            });
        }
    });
}

#[test]
fn random_operations_match_a_plain_buffer() {
    let (able, resized) = (Mutex::new(BTreeSet::new()), Mutex::new(BTreeSet::new()));
    for_each_kind(|format, options| {
        for seed in 1..=2 {
            let mut case = Case::new(format, options, seed);
            if case.node().driver().resizing().is_some() {
                able.lock().expect("names").insert(format.name());
            }
            // Whatever chance brings, there are data behind a growth, and a shrunk disk grows again.
            for size in [5 << 20, 1 << 20, 4 << 20] {
                for _ in 0..16 {
                    case.step();
                }
                if case.resize_to(size) {
                    resized.lock().expect("names").insert(format.name());
                }
                case.check_map();
            }
            case.judged();
        }
    });
    let (able, resized) = (able.into_inner().expect("names"), resized.into_inner().expect("names"));
    assert!(able == resized && able.contains("qcow2"), "{able:?} can be resized, {resized:?} were");
}

#[test]
fn random_operations_on_an_overlay_match_a_plain_buffer() {
    for_each_kind(|format, options| {
        if options.contains("data_file") || options.contains("preallocation") {
            return;
        }
        for seed in 11..=12 {
            let Some(mut case) = Case::overlay(format, options, seed) else { return };
            for _ in 0..60 {
                case.step();
            }
            case.judged();
        }
    });
}

#[test]
fn writers_on_several_threads_do_not_disturb_each_other() {
    for_each_kind(|format, options| {
        let mut case = Case::new(format, options, 5);
        let unit = case.ok("writing", case.node().writing()).unit().max(4096);
        let units: Vec<u64> = (0..case.node().virtual_size() / unit).collect();
        let node = case.node();
        thread::scope(|scope| {
            for part in 0..4 {
                let mine: Vec<u64> = units.iter().copied().filter(|n| n % 4 == part).collect();
                scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(part);
                    let mut mine = mine;
                    rng.shuffle(&mut mine);
                    let mut buffers = Buffers::default();
                    for n in mine {
                        let data = pattern(n, usize::try_from(unit).unwrap());
                        node.write(GuestOffset(n * unit), &data, &mut buffers).expect("write");
                    }
                });
            }
        });
        for n in units {
            let at = usize::try_from(n * unit).unwrap();
            let len = usize::try_from(unit).unwrap();
            case.model[at..at + len].copy_from_slice(&pattern(n, len));
        }
        case.judged();
    });
}

#[test]
fn a_placement_that_is_dropped_leaves_nothing() {
    for_each_kind(|format, options| {
        let mut case = Case::new(format, options, 6);
        let unit = case.ok("writing", case.node().writing()).unit().max(512);
        for n in [0, 3, 1] {
            if (n + 1) * unit <= case.node().virtual_size() {
                drop(case.ok("place", case.node().place(GuestOffset(n * unit), unit, Store::Data)));
            }
        }
        let data = pattern(9, 5000);
        case.ok("write", case.node().write(GuestOffset(512), &data, &mut Buffers::default()));
        case.model[512..5512].copy_from_slice(&data);
        // Where a format keeps no count of its space a dropped placement may have been given a place in the file:
        // what is read decides, and `check`.
        case.judged();
    });
}

/// Formats and kinds that can store compressed units.
fn compressing() -> Vec<(&'static dyn Format, &'static str)> {
    let mut found = writable();
    for (name, options) in ENCODED {
        found.push((vimg::block::format::find(FORMATS, name).expect("format"), options));
    }
    found.retain(|(format, options)| {
        let files = inside::create(*format, NAME, 3 << 20, options);
        let node = inside::open(&files, *format, NAME, true, None).expect("open");
        node.writing().is_ok_and(|writing| writing.compressing().is_some())
    });
    assert!(found.iter().any(|(_, options)| options.contains("streamOptimized")));
    found
}

/// Stores one unit, encoded; a unit that does not get smaller as it is.
fn store_encoded(case: &mut Case, at: u64, data: &[u8]) -> vimg::block::Result<()> {
    let writing = case.node().writing()?;
    let compress = writing.compressing().expect("compressing");
    let mut encoded = Vec::new();
    let outcome = compress.encode(GuestOffset(at), data, Effort::default(), &mut encoded)?;
    let len = (data.len() as u64).min(case.node().virtual_size() - at);
    let plain = &data[..usize::try_from(len).expect("small")];
    match outcome {
        Encoded::Smaller => {
            let placement =
                case.node().place(GuestOffset(at), len, Store::Compressed { bytes: encoded.len() as u64 })?;
            assert_eq!(placement.len() as u64, len, "{}: a unit is placed as a whole", case.label);
            placement.write_encoded(&encoded)?;
            placement.publish()?;
        }
        Encoded::Incompressible => case.node().write(GuestOffset(at), plain, &mut Buffers::default())?,
    }
    let start = usize::try_from(at).expect("small");
    case.model[start..start + plain.len()].copy_from_slice(plain);
    Ok(())
}

#[test]
fn compressed_units_match_a_plain_buffer() {
    for (format, options) in compressing() {
        let strict = ENCODED.contains(&(format.name(), options));
        // The second size needs two grain tables of vmdk, and ends inside a grain.
        let sizes: &[u64] = if strict { &[3 << 20, (37 << 20) - 7 * 512] } else { &[(1 << 20) + 512] };
        for (seed, size) in (21..).zip(sizes.iter().copied()) {
            let files = inside::create(format, NAME, size, options);
            let mut case = Case::start(format, options, seed, files, None, Vec::new());
            let unit = case.ok("writing", case.node().writing()).unit();
            let units = size.div_ceil(unit);
            // Front to back, with gaps; text, and what does not get smaller.
            let mut at = 0;
            let mut stored = Vec::new();
            while at < units {
                let mut data = pattern(seed + at, usize::try_from(unit).expect("small"));
                if case.rng.u8(..3) > 0 {
                    data.iter_mut().for_each(|byte| *byte = b'a' + *byte % 4);
                }
                let done = store_encoded(&mut case, at * unit, &data);
                case.ok("store", done);
                stored.push(at * unit);
                match case.rng.u8(..40) {
                    0 => case.check_map(),
                    // What is stored behind a tail that was written already takes its place.
                    1 => case.ok("flush", case.node().driver().flush()),
                    2 => case.reopen(),
                    _ => {}
                }
                at += [1, 1, 1, 2, 7, 300][case.rng.usize(..6)];
            }
            case.check_map();
            for _ in 0..20 {
                let (at, len) = case.range();
                let mut got = vec![0xee; len];
                case.ok("read", case.node().read(GuestOffset(at as u64), &mut got, &mut Buffers::default()));
                assert!(got == case.model[at..at + len], "{}: read at {at}, {len} bytes", case.label);
            }
            if strict {
                refuses_what_it_cannot(&mut case, &stored);
            }
            case.judged();
        }
    }
}

/// A kind that takes compressed units alone refuses the rest, and stays as it is.
fn refuses_what_it_cannot(case: &mut Case, stored: &[u64]) {
    let (full, buffers) = (GuestOffset(stored[0]), &mut Buffers::default());
    case.node().write(full, &[1; 512], buffers).expect_err("plain data");
    case.node().write_zeroes(full, 65536, true, buffers).expect_err("zeros over data");
    let again = pattern(99, 65536);
    let model = case.model.clone();
    store_encoded(case, stored[0], &again).expect_err("a unit over another");
    case.model = model;
    let shrink = |size| case.node().driver().resizing().expect("resizes").check(size, Preallocation::Off);
    shrink(65536).expect_err("shrinking");
    case.reopen();
    case.check_map();
    // Zeros where there is nothing are there already; growing adds room behind.
    let larger = case.node().virtual_size() + (50 << 20);
    case.ok("grow", case.node().driver().resizing().expect("resizes").resize(larger, Preallocation::Off));
    let size = usize::try_from(larger).expect("small");
    case.model.resize(size, 0);
    case.below.resize(size, 0);
    let at = larger / 65536 * 65536 - 65536;
    case.ok("zeros", case.node().write_zeroes(GuestOffset(at), 65536, true, &mut Buffers::default()));
    let done = store_encoded(case, at, &pattern(5, 65536));
    case.ok("store behind", done);
}
