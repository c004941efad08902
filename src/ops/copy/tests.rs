//! The engine between buffers in memory: contents, holes, thread counts, failures.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::*;
use crate::block::format::Alone;
use crate::block::{Child, Format, NO_SECRETS, OpenRequest, OptionTree, Purpose};
use crate::formats::qcow::Qcow;
use crate::formats::raw::Raw;
use crate::formats::vdi::Vdi;
use crate::storage::memory::Memory;
use crate::storage::zeros::is_zero;
use crate::storage::{Error as StorageError, Event, Facts, HostExtent, HostFile, Preallocation, Storage, Zeroing};

/// A buffer with holes where nothing was written, with sectors that cannot be read or written.
#[derive(Debug, Default)]
struct Patchy {
    inner: Memory,
    holes: bool,
    bad_read: Option<u64>,
    /// How often that sector is read before it is bad.
    spared: Mutex<u64>,
    parallel: Option<u32>,
    bad_write: Option<u64>,
    written: Mutex<BTreeMap<u64, u64>>,
}

impl Storage for Patchy {
    fn len(&self) -> crate::storage::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, at: u64, buf: &mut [u8]) -> crate::storage::Result<()> {
        match self.bad_read {
            Some(bad) if bad >= at && bad < at + buf.len() as u64 => {
                let mut spared = self.spared.lock().unwrap();
                if *spared > 0 {
                    *spared -= 1;
                    return self.inner.read_at(at, buf);
                }
                Err(StorageError::Io(std::io::Error::from_raw_os_error(5)))
            }
            _ => self.inner.read_at(at, buf),
        }
    }
    fn write_at(&self, at: u64, buf: &[u8]) -> crate::storage::Result<()> {
        if self.bad_write.is_some_and(|bad| bad >= at && bad < at + buf.len() as u64) {
            return Err(StorageError::Io(std::io::Error::from_raw_os_error(28)));
        }
        self.written.lock().unwrap().insert(at, buf.len() as u64);
        self.inner.write_at(at, buf)
    }
    fn extent(&self, at: u64, max: u64) -> crate::storage::Result<HostExtent> {
        let extent = self.inner.extent(at, max)?;
        if !self.holes || extent.is_zero() {
            return Ok(extent);
        }
        // A hole is a page of zeros.
        let page = |at: u64| {
            let mut buf = [0; 4096];
            self.inner.read_at(at / 4096 * 4096, &mut buf).map(|()| is_zero(&buf))
        };
        let hole = page(at)?;
        let mut end = (at / 4096 + 1) * 4096;
        while end < at + extent.len && page(end)? == hole {
            end += 4096;
        }
        let len = extent.len.min(end - at);
        Ok(if hole { HostExtent::hole(len) } else { HostExtent::data(len) })
    }
    fn zero(&self, at: u64, len: u64, how: Zeroing) -> crate::storage::Result<()> {
        self.inner.zero(at, len, how)
    }
    fn discard(&self, at: u64, len: u64) -> crate::storage::Result<()> {
        self.inner.discard(at, len)
    }
    fn set_len(&self, len: u64, fill: Preallocation) -> crate::storage::Result<()> {
        self.inner.set_len(len, fill)
    }
    fn flush(&self) -> crate::storage::Result<()> {
        Ok(())
    }
    fn allocated(&self) -> crate::storage::Result<Option<u64>> {
        Ok(None)
    }
    fn facts(&self) -> Facts {
        Facts { parallel: self.parallel, ..self.inner.facts() }
    }
    fn host(&self) -> Option<&HostFile> {
        None
    }
    fn announce(&self, _event: Event) {}
}

fn node(storage: Arc<dyn Storage>, name: &str) -> Arc<Node> {
    layer(storage, None, name)
}

fn layer(storage: Arc<dyn Storage>, backing: Option<Arc<Node>>, name: &str) -> Arc<Node> {
    layer_of(&Raw, storage, backing, name)
}

fn layer_of(format: &dyn Format, storage: Arc<dyn Storage>, backing: Option<Arc<Node>>, name: &str) -> Arc<Node> {
    let driver = format
        .open(OpenRequest {
            file: Child { role: "file".to_owned(), name: name.to_owned(), driver: "file", storage },
            side_files: Vec::new(),
            options: &mut OptionTree::new(),
            purpose: Purpose::Write,
            secrets: &NO_SECRETS,
            related: &Alone,
        })
        .unwrap();
    Arc::new(Node::new(driver, backing, name.to_owned()))
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    while rng.u8(..) > 8 {
        let at = rng.usize(0..len);
        let end = (at + rng.usize(1..len / 3)).min(len);
        rng.fill(&mut bytes[at..end]);
    }
    bytes
}

#[derive(Default)]
struct Recorder {
    warnings: Mutex<Vec<String>>,
    last: Mutex<(u64, u64)>,
}

impl Observer for Recorder {
    fn wants_progress(&self) -> bool {
        true
    }
    fn progress(&self, done: u64, total: u64) {
        let mut last = self.last.lock().unwrap();
        *last = (last.0.max(done), total);
    }
    fn warn(&self, text: &str) {
        self.warnings.lock().unwrap().push(text.to_owned());
    }
}

#[test]
fn raw_to_raw_is_equal_with_any_number_of_threads() {
    let first = noise(9 << 20, 1);
    let second = noise((5 << 20) + 512, 2);
    let nodes: Vec<_> = [&first, &second]
        .iter()
        .map(|bytes| {
            let storage = Patchy { inner: Memory::new(bytes.to_vec()), holes: true, ..Patchy::default() };
            node(Arc::new(storage), "source")
        })
        .collect();
    let source = Joined::new(&nodes, None);
    let both = [first, second].concat();
    for (threads, sparse) in [(1, 4096), (2, 4096), (16, 512), (3, 0)] {
        for reads_zero in [true, false] {
            let old = if reads_zero { vec![0; both.len()] } else { vec![0xaa; both.len()] };
            let target = Arc::new(Patchy { inner: Memory::new(old), ..Patchy::default() });
            let options = CopyOptions { threads: Some(threads), sparse, ..CopyOptions::default() };
            let facts = TargetFacts { reads_zero, ..TargetFacts::default() };
            copy(&source, &node(target.clone(), "target"), &options, facts, &Silent).unwrap();
            assert!(target.inner.to_vec() == both, "{threads} threads, -S {sparse}, zero {reads_zero}");
        }
    }
}

#[test]
fn zeros_are_not_written_where_there_are_some() {
    let mut bytes = vec![0; 8 << 20];
    bytes[5 << 20] = 1;
    let source = Joined::new(&[node(Arc::new(Memory::new(bytes.clone())), "source")], None);
    let target = Arc::new(Patchy { inner: Memory::new(vec![0; bytes.len()]), ..Patchy::default() });
    let facts = TargetFacts { reads_zero: true, ..TargetFacts::default() };
    let recorder = Recorder::default();
    copy(&source, &node(target.clone(), "target"), &CopyOptions::default(), facts, &recorder).unwrap();
    assert_eq!(target.written.lock().unwrap().clone().into_iter().collect::<Vec<_>>(), [(5 << 20, 4096)]);
    assert!(target.inner.to_vec() == bytes);
    assert_eq!(*recorder.last.lock().unwrap(), (8 << 20, 8 << 20));
}

#[test]
fn failures_say_where_and_stop_everybody() {
    let bytes = noise(32 << 20, 3);
    let bad = Patchy { inner: Memory::new(bytes.clone()), bad_read: Some((5 << 20) + 700), ..Patchy::default() };
    let source = Joined::new(&[node(Arc::new(bad), "source")], None);
    let target = Arc::new(Patchy { inner: Memory::new(vec![0; bytes.len()]), ..Patchy::default() });
    let options = CopyOptions { threads: Some(4), ..CopyOptions::default() };
    let facts = TargetFacts::default();
    let error = copy(&source, &node(target.clone(), "target"), &options, facts, &Silent).unwrap_err();
    assert_eq!(error.message(), "source: error while reading at byte 4194304: Input/output error");

    let recorder = Recorder::default();
    copy(&source, &node(target.clone(), "target"), &CopyOptions { salvage: true, ..options.clone() }, facts, &recorder)
        .unwrap();
    let mut salvaged = bytes.clone();
    salvaged[(5 << 20) + 512..(5 << 20) + 1024].fill(0);
    assert!(target.inner.to_vec() == salvaged);
    assert_eq!(*recorder.warnings.lock().unwrap(), ["error while reading offset 5243392: Input/output error"]);

    let full = Patchy { bad_write: Some(20 << 20), inner: Memory::new(vec![0; bytes.len()]), ..Patchy::default() };
    let whole = Joined::new(&[node(Arc::new(Memory::new(vec![7; 32 << 20])), "source")], None);
    let error = copy(&whole, &node(Arc::new(full), "target"), &options, facts, &Silent).unwrap_err();
    assert_eq!(error.message(), "target: error while writing at byte 20971520: No space left on device");
    let small = node(Arc::new(Memory::new(vec![0; 1 << 20])), "small");
    let error = copy(&whole, &small, &options, facts, &Silent).unwrap_err();
    assert_eq!(error.message(), "output file is smaller than input file");
}

#[test]
fn storage_with_latency_gets_a_thread_for_each_request_it_wants_in_flight() {
    let disk = |parallel| Arc::new(Patchy { parallel, ..Patchy::default() });
    let suits = |parallel| node(disk(parallel), "disk");
    let cores = 3;
    let threads = |source: &Arc<Node>, target: &Node| {
        suitable_threads(&Joined::new(std::slice::from_ref(source), None), target, cores)
    };
    let (cached, deep) = (suits(None), suits(Some(200)));
    assert_eq!(threads(&cached, &cached), cores);
    assert_eq!(threads(&cached, &suits(Some(1))), cores);
    assert_eq!((threads(&deep, &cached), threads(&cached, &deep)), (200, 200));
    let over = layer(disk(None), Some(deep), "top");
    assert_eq!(threads(&over, &cached), 200, "a backing file counts too");
}

/// An empty image with blocks of that size.
fn vdi(size: u64, block: u64) -> Vec<u8> {
    let mut image = vec![0; 512];
    let mut put = |at: usize, n: u64| image[at..at + 4].copy_from_slice(&u32::try_from(n).unwrap().to_le_bytes());
    let blocks = size.div_ceil(block);
    for (at, n) in [(0x40, 0xbeda_107f), (0x44, 0x1_0001), (0x48, 0x180), (0x4c, 1), (0x154, 512), (0x158, 4096)] {
        put(at, n);
    }
    for (at, n) in [(0x168, 512), (0x170, size), (0x178, block), (0x180, blocks)] {
        put(at, n);
    }
    image.resize(4096, 0xff);
    image
}

/// A block that is larger than what a worker holds is read twice.
#[test]
fn what_cannot_be_read_is_told_once_however_often_it_is_read() {
    const LEN: u64 = 8 << 20;
    for spared in [0, 1] {
        let bytes = vec![7; 8 << 20];
        let bad = Patchy {
            inner: Memory::new(bytes.clone()),
            bad_read: Some((5 << 20) + 700),
            spared: Mutex::new(spared),
            ..Patchy::default()
        };
        let source = Joined::new(&[node(Arc::new(bad), "source")], None);
        let target = layer_of(&Vdi, Arc::new(Memory::new(vdi(LEN, LEN))), None, "target");
        let options = CopyOptions { salvage: true, ..CopyOptions::default() };
        let recorder = Recorder::default();
        copy(&source, &target, &options, TargetFacts::default(), &recorder).unwrap();
        let warnings = recorder.warnings.lock().unwrap();
        assert_eq!(*warnings, ["error while reading offset 5243392: Input/output error"], "{spared} reads spared");
        let (mut read, mut salvaged) = (vec![1; bytes.len()], bytes);
        salvaged[(5 << 20) + 512..(5 << 20) + 1024].fill(0);
        target.read(crate::block::GuestOffset(0), &mut read, &mut crate::block::io::Scratch::default()).unwrap();
        assert!(read == salvaged);
    }
}

/// An empty image with clusters of 4 KiB.
fn qcow(size: u64) -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x01");
    image[24..32].copy_from_slice(&size.to_be_bytes());
    image[32..34].copy_from_slice(&[12, 9]);
    image[47] = 48;
    image
}

/// How long it takes is `rate`'s own test. What is stored compressed counts as the guest has it.
#[test]
fn a_rate_counts_what_is_copied() {
    const LEN: u64 = 8 << 20;
    let source = Joined::new(&[node(Arc::new(Memory::new(vec![1; 8 << 20])), "source")], None);
    let options = CopyOptions { rate: Some(u64::MAX), ..CopyOptions::default() };
    let mut counted = 0;
    for facts in [TargetFacts { unnamed: true, reads_zero: true, ..TargetFacts::default() }, TargetFacts::default()] {
        let raw = node(Arc::new(Memory::new(vec![0; 8 << 20])), "target");
        // The second kind of blocks is larger than what a worker holds.
        let blocks = [1 << 20, 8 << 20].map(|block| Arc::new(Memory::new(vdi(LEN, block))));
        for target in [raw].into_iter().chain(blocks.map(|image| layer_of(&Vdi, image, None, "target"))) {
            copy(&source, &target, &options, facts, &Silent).unwrap();
            counted += LEN;
            assert_eq!(rate::COUNTED.load(Ordering::Relaxed), counted, "{} {facts:?}", target.driver().format());
        }
        let target = layer_of(&Qcow, Arc::new(Memory::new(qcow(LEN))), None, "target");
        let options = CopyOptions { compress: true, ..options.clone() };
        copy(&source, &target, &options, facts, &Silent).unwrap();
        assert!(target.driver().files()[0].storage.len().unwrap() < LEN / 2);
        counted += LEN;
        assert_eq!(rate::COUNTED.load(Ordering::Relaxed), counted, "compressed {facts:?}");
    }
}
