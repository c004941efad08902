//! Images made, written and resized through the library, each beside a raw file that says what they must read as.
//! The judge of the image is qemu-img.

use std::fs::{File, OpenOptions};
use std::hash::Hasher;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;
use vimg::block::io::Scratch as Buffers;
use vimg::block::{Effort, Encoded, Fix, GuestOffset, Node, Store, format};
use vimg::formats::FORMATS;
use vimg::storage::memory::Memory;
use vimg::storage::{Preallocation, Storage};

use crate::common::inside::{self, host_file};
use crate::common::{Scratch, judge};

/// Makes an image; options as `key=value,...`.
pub fn create(path: &Path, format: &str, text: &str, size: u64) -> vimg::block::Result<()> {
    let (folder, name) = (path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap());
    inside::create_in(folder, format::find(FORMATS, format)?, name, size, text)
}

/// Opens one layer that lies in `storage`.
pub fn open_on(storage: Arc<dyn Storage>, format: &str, write: bool) -> vimg::block::Result<Node> {
    inside::open_alone(storage, format::find(FORMATS, format)?, write)
}

/// The same for a file's bytes.
pub fn open_bytes(bytes: Vec<u8>, format: &str, write: bool) -> vimg::block::Result<Node> {
    open_on(Arc::new(Memory::new(bytes)), format, write)
}

/// An image and what it must read as.
pub struct Pair<'a> {
    scratch: &'a Scratch,
    format: &'static str,
    /// Its file name.
    pub name: String,
    model: String,
    rng: Rng,
}

impl<'a> Pair<'a> {
    /// A new image, all zeros.
    pub fn new(scratch: &'a Scratch, format: &'static str, text: &str, size: u64) -> Self {
        let name = format!("image.{format}");
        create(&scratch.file(&name), format, text, size).unwrap();
        Self::of(scratch, format, &name)
    }

    /// An image that is there, all zeros.
    pub fn of(scratch: &'a Scratch, format: &'static str, name: &str) -> Self {
        let pair = Self {
            scratch,
            format,
            name: name.to_owned(),
            model: format!("{name}.model"),
            rng: Rng::with_seed(name.len() as u64),
        };
        File::create(scratch.file(&pair.model)).unwrap().set_len(pair.open().virtual_size()).unwrap();
        pair
    }

    /// Where the image is.
    pub fn path(&self) -> PathBuf {
        self.scratch.file(&self.name)
    }

    /// Opens it for writing.
    pub fn open(&self) -> Node {
        open_on(host_file(&self.path()), self.format, true).unwrap()
    }

    fn model(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.scratch.file(&self.model)).unwrap()
    }

    /// Writes a pattern to both.
    pub fn write(&mut self, node: &Node, at: u64, len: usize) {
        let mut bytes = vec![0; len];
        self.rng.fill(&mut bytes);
        node.write(GuestOffset(at), &bytes, &mut Buffers::default()).unwrap();
        self.model().write_all_at(&bytes, at).unwrap();
    }

    /// Random writes, zeroes, discards and reads, `count` in all, a part of them beyond a reopening.
    pub fn exercise(&mut self, count: usize, longest: u64) {
        let mut node = self.open();
        let size = node.virtual_size();
        for n in 0..count {
            let at = self.rng.u64(0..size);
            let at = if self.rng.bool() { at / 512 * 512 } else { at };
            let len = self.rng.u64(1..=longest).min(size - at);
            match self.rng.u8(0..10) {
                0..5 => self.write(&node, at, len as usize),
                5..7 => {
                    node.write_zeroes(GuestOffset(at), len, self.rng.bool(), &mut Buffers::default()).unwrap();
                    self.model().write_all_at(&vec![0; len as usize], at).unwrap();
                }
                _ => self.assert_reads(&node, at, len as usize),
            }
            if n % 7 == 6 {
                node.driver().flush().unwrap();
            }
            if n % 23 == 22 {
                node.driver().close().unwrap();
                drop(node);
                node = self.open();
            }
        }
        node.driver().close().unwrap();
    }

    fn assert_reads(&self, node: &Node, at: u64, len: usize) {
        let (mut got, mut wanted) = (vec![1; len], vec![0; len]);
        node.read(GuestOffset(at), &mut got, &mut Buffers::default()).unwrap();
        self.model().read_exact_at(&mut wanted, at).unwrap();
        assert!(got == wanted, "{} differs in {at}+{len}", self.name);
    }

    /// Writes a range through the encoder, unit by unit.
    pub fn write_compressed(&mut self, at: u64, units: u64, seed: u8) {
        let node = self.open();
        let writing = node.writing().unwrap();
        let unit = writing.unit();
        for n in 0..units {
            let start = at + n * unit;
            let plain: Vec<u8> = (0..unit).map(|i| (i / 97) as u8 ^ seed ^ n as u8).collect();
            let mut encoded = Vec::new();
            let outcome = writing
                .compressing()
                .unwrap()
                .encode(GuestOffset(start), &plain, Effort::default(), &mut encoded)
                .unwrap();
            assert_eq!(outcome, Encoded::Smaller);
            let len = unit.min(node.virtual_size() - start);
            let placement = node.place(GuestOffset(start), len, Store::Compressed { bytes: encoded.len() as u64 });
            let placement = placement.unwrap();
            assert_eq!(placement.len() as u64, len);
            placement.write_encoded(&encoded).unwrap();
            placement.publish().unwrap();
            self.model().write_all_at(&plain[..len as usize], start).unwrap();
        }
        node.driver().close().unwrap();
    }

    /// Resizes both.
    pub fn resize(&mut self, size: u64) {
        let node = self.open();
        node.driver().resizing().unwrap().resize(size, Preallocation::Off).unwrap();
        assert_eq!(node.virtual_size(), size);
        node.driver().close().unwrap();
        drop(node);
        assert_eq!(self.open().virtual_size(), size);
        self.model().set_len(size).unwrap();
    }

    /// The judge reads the image as it must be read, and finds nothing wrong where it knows how to check.
    pub fn assert_good(&self) {
        let out = judge(&["info", "-f", self.format, "--output=json", &self.name]).dir(self.scratch.path()).ok();
        let size = self.scratch.file(&self.model).metadata().unwrap().len();
        assert_eq!(out.json()["virtual-size"].as_u64(), Some(size), "{}", self.name);
        self.scratch.assert_same_content(self.format, &self.name, "raw", &self.model);
        let check = judge(&["check", "-f", self.format, &self.name]).dir(self.scratch.path()).run();
        assert!(matches!(check.code, Some(0 | 63)), "{check:?}");
    }

    /// A reader of its own reads it as it must be read.
    pub fn assert_7z_agrees(&self, kind: &str) {
        crate::common::need("7z");
        self.scratch
            .sh(&format!("rm -rf out && mkdir out && 7z x -t{kind} -oout '{}' && mv out/* out/disk", self.name));
        let out = judge(&["compare", "-f", "raw", "-F", "raw", "out/disk", &self.model]).dir(self.scratch.path()).run();
        assert_eq!(out.code, Some(0), "7z reads {} differently: {out:?}", self.name);
    }

    /// Lets a resize stop before, or fail at, each change of the file in turn: for the judge and for us the image
    /// then is the old disk or the new one.
    pub fn assert_resize_is_safe(&self, size: u64, fill: Preallocation) {
        use nix::errno::Errno;
        use vimg::storage::fault::{Fault, Faulty, FaultyOperation};

        let before = std::fs::read(self.path()).unwrap();
        let resize = |storage: Arc<dyn Storage>| -> vimg::block::Result<()> {
            let node = open_on(storage, self.format, true)?;
            node.driver().resizing().unwrap().resize(size, fill)?;
            node.driver().close()
        };
        let whole = Arc::new(Faulty::recording(Arc::new(Memory::new(before.clone()))));
        resize(whole.clone()).unwrap();
        let operations = whole.operations();
        let points = operations.len();
        assert!(points > 1);
        let old_model = self.scratch.file("old.model");
        let new_model = self.scratch.file("new.model");
        std::fs::copy(self.scratch.file(&self.model), &old_model).unwrap();
        std::fs::copy(self.scratch.file(&self.model), &new_model).unwrap();
        OpenOptions::new().write(true).open(&new_model).unwrap().set_len(size).unwrap();
        let stopped = self.scratch.file("stopped");
        let is_known = |name: &str| {
            let info = crate::common::run::vimg(&["info", "--output=json", name]).dir(self.scratch.path()).run();
            info.json()["format"] == self.format
        };
        let was_known = is_known(&self.name);
        let mut seen = vec![hash(&before)];
        for fault in [Fault::Stop, Fault::Fail(Errno::EIO), Fault::FailFrom(Errno::ENOSPC), Fault::Shorten] {
            for (point, operation) in operations.iter().enumerate() {
                let what = format!("{} to {size}, {fault:?} at {operation:?}, {point} of {points}", self.format);
                if fault == Fault::Shorten && matches!(operation, FaultyOperation::Write { len: ..=512, .. }) {
                    // A sector is written or not.
                    continue;
                }
                let memory = Arc::new(Memory::new(before.clone()));
                let worked = resize(Arc::new(Faulty::new(memory.clone(), point, fault))).is_ok();
                assert!(!worked || fault == Fault::Stop, "{what}: the failure is not reported");
                let bytes = memory.to_vec();
                if seen.contains(&hash(&bytes)) {
                    continue;
                }
                seen.push(hash(&bytes));
                std::fs::write(&stopped, &bytes).unwrap();
                let info =
                    judge(&["info", "-f", self.format, "--output=json", "stopped"]).dir(self.scratch.path()).run();
                assert_eq!(info.code, Some(0), "{what}: {info:?}");
                let virtual_size = info.json()["virtual-size"].as_u64().unwrap();
                assert!([size, self.size()].contains(&virtual_size), "{what}: {virtual_size} bytes");
                let model = if virtual_size == size { "new.model" } else { "old.model" };
                let out = judge(&["compare", "-f", self.format, "-F", "raw", "stopped", model]);
                assert_eq!(out.dir(self.scratch.path()).run().code, Some(0), "{what}: the judge reads something else");
                if self.format == "vpc" {
                    crate::common::need("vhdiinfo");
                    let out = crate::common::run::plain("vhdiinfo", &["stopped"]).dir(self.scratch.path()).run();
                    // Of a dynamic disk it trusts the footer at the end, the others the copy at the start.
                    let is = |size| out.stdout.contains(&format!("({size} bytes)"));
                    assert!(is(self.size()) || is(size), "{what}: {out:?}");
                }
                assert!(!was_known || is_known("stopped"), "{what}: it is not known by itself");
                let node = open_bytes(bytes, self.format, false).unwrap();
                assert_eq!(node.virtual_size(), virtual_size);
                if virtual_size > 32 << 20 {
                    // Too much to hold.
                    continue;
                }
                let wanted = std::fs::read(self.scratch.file(model)).unwrap();
                let mut read = vec![1; wanted.len()];
                node.read(GuestOffset(0), &mut read, &mut Buffers::default()).unwrap();
                assert!(read == wanted, "{what}: we read something else");
            }
        }
    }

    fn size(&self) -> u64 {
        self.scratch.file(&self.model).metadata().unwrap().len()
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Every byte of the first 2 KiB, and every field's width there, takes hostile values; reading must end, with data
/// or with an error, and so must writing.
pub fn assert_survives_mutations(format: &str, bytes: &[u8], head: usize) {
    let mut cases = 0;
    let mut opened = 0;
    for at in 0..head.min(bytes.len()) {
        for (width, value) in
            [(1, 0xffu64), (1, 0), (4, u64::MAX), (8, 1 << 62), (8, u64::MAX), (4, 1), (8, 0x7fff_ffff)]
        {
            let mut changed = bytes.to_vec();
            for n in 0..width {
                let shift = 8 * (width - 1 - n);
                if let Some(byte) = changed.get_mut(at + n) {
                    *byte = (value >> shift) as u8;
                }
            }
            cases += 1;
            let Ok(node) = open_bytes(changed, format, true) else { continue };
            opened += 1;
            if let Some(checking) = node.driver().checking() {
                let _ = checking.check(Fix::Nothing, &|_: &str| {});
            }
            walk(&node);
        }
    }
    assert!(cases >= head.min(bytes.len()) * 7 && opened > 0);
}

/// Reads along the map, and writes a little.
pub fn walk(node: &Node) {
    let size = node.virtual_size();
    let mut buffers = Buffers::default();
    let mut at = 0;
    for _ in 0..64 {
        if at >= size {
            break;
        }
        let Ok(mapping) = node.map(GuestOffset(at), size - at, usize::MAX) else { break };
        let mut some = vec![0; mapping.len.min(4096) as usize];
        let _ = node.read(GuestOffset(at), &mut some, &mut buffers);
        at += mapping.len;
    }
    if size >= 512 {
        for at in [0, size / 2 / 512 * 512, size - 512] {
            // A far place in a sparse image would need as much memory here as it needs disk there.
            let far = |placement: &vimg::block::io::Placement<'_>| match placement.placed().action {
                vimg::block::Action::Write { place, .. } => place.at.get() > 64 << 20,
                vimg::block::Action::Zero { place } => place.at.get() > 64 << 20,
                vimg::block::Action::Nothing => true,
            };
            let Ok(placement) = node.place(GuestOffset(at), 512, Store::Data) else { continue };
            if far(&placement) {
                continue;
            }
            let _ = placement.write(&vec![1; placement.len()], &mut buffers);
            let _ = placement.publish();
        }
    }
}

/// Nothing can be written, at the disk's start or further on, and the attempt leaves the image as it is.
pub fn assert_writes_change_nothing(format: &str, bytes: Vec<u8>) {
    for at in [0, 8192, (2 << 20) + 4096] {
        let memory = Arc::new(Memory::new(bytes.clone()));
        let node = open_on(memory.clone(), format, true).unwrap();
        let wrote = node.write(GuestOffset(at), &[1; 512], &mut Buffers::default());
        assert!(wrote.is_err(), "{format} at {at}");
        drop(node);
        assert!(memory.to_vec() == bytes, "{format} at {at}");
    }
}

/// None of these sizes can be had, and the attempt leaves the image as it is.
pub fn assert_resizes_change_nothing(format: &str, bytes: Vec<u8>, sizes: &[u64]) {
    for size in sizes {
        let memory = Arc::new(Memory::new(bytes.clone()));
        let Ok(node) = open_on(memory.clone(), format, true) else { continue };
        let resized = node.driver().resizing().unwrap().resize(*size, Preallocation::Off);
        assert!(resized.is_err(), "{format} to {size}");
        drop(node);
        assert!(memory.to_vec() == bytes, "{format} to {size}");
    }
}
