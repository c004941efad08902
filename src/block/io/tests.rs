#![allow(clippy::unwrap_used)]

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::super::last_unit::LastUnit;
use super::*;

use crate::block::driver::{Action, Placed, Write};
use crate::block::info::ImageInfo;
use crate::block::{BlockDriver, Child, Cipher, Extent};
use crate::storage::memory::Memory;
use crate::storage::offload::Offload;

/// Bytes of a cluster, and of a sector of the cipher.
const CLUSTER: u64 = 4096;
const SECTOR: u64 = 512;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Entry {
    Zero(u64),
    Plain(u64),
    Compressed(u64),
}

/// A driver with a table in memory. "Compressed" is a cluster of one byte's repetition, stored as that byte.
#[derive(Debug)]
struct Toy {
    files: [Child; 1],
    table: Mutex<Vec<Entry>>,
    sealed: bool,
    decoded: Arc<AtomicUsize>,
}

impl Toy {
    fn node(table: Vec<Entry>, bytes: Vec<u8>, sealed: bool) -> (Node, Arc<Memory>) {
        Self::counting(table, bytes, sealed, Arc::default())
    }

    fn counting(table: Vec<Entry>, bytes: Vec<u8>, sealed: bool, decoded: Arc<AtomicUsize>) -> (Node, Arc<Memory>) {
        let storage = Arc::new(Memory::new(bytes));
        let child =
            Child { role: "file".to_owned(), name: "toy.img".to_owned(), driver: "file", storage: storage.clone() };
        let toy = Toy { files: [child], table: Mutex::new(table), sealed, decoded };
        (Node::new(Box::new(toy), None, "toy".to_owned()), storage)
    }

    fn entry(&self, at: GuestOffset) -> Entry {
        self.table.lock().unwrap()[usize::try_from(at.get() / CLUSTER).unwrap()]
    }
}

/// The key of a sector: its number on the disk and in the file, which differ in every test.
fn key(guest: u64, host: u64, byte: usize) -> u8 {
    let mixed = (guest / SECTOR).wrapping_mul(31) ^ (host / SECTOR).wrapping_mul(7) ^ byte as u64 ^ 0x5a;
    mixed.to_le_bytes()[0]
}

impl Cipher for Toy {
    fn sector(&self) -> NonZero<u32> {
        NonZero::new(512).unwrap()
    }

    fn decrypt(&self, guest: GuestOffset, host: HostOffset, buf: &mut [u8]) -> Result<()> {
        assert!(guest.get().is_multiple_of(SECTOR) && host.get().is_multiple_of(SECTOR));
        assert!((buf.len() as u64).is_multiple_of(SECTOR));
        for (n, sector) in (0..).zip(buf.chunks_mut(SECTOR as usize)) {
            let (guest, host) = (guest.get() + n * SECTOR, host.get() + n * SECTOR);
            sector.iter_mut().enumerate().for_each(|(i, byte)| *byte ^= key(guest, host, i));
        }
        Ok(())
    }

    fn encrypt(&self, guest: GuestOffset, host: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.decrypt(guest, host, buf)
    }
}

impl BlockDriver for Toy {
    fn format(&self) -> &'static str {
        "toy"
    }

    fn virtual_size(&self) -> u64 {
        self.table.lock().unwrap().len() as u64 * CLUSTER
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let within = at.get() % CLUSTER;
        let place = |host| HostPlace::main(host + within);
        let kind = match self.entry(at) {
            Entry::Zero(host) => ExtentKind::Zero(Some(place(host))),
            Entry::Plain(host) => ExtentKind::Data(place(host)),
            Entry::Compressed(host) => ExtentKind::Compressed(CompressedUnit {
                start: GuestOffset(at.get() - within),
                len: CLUSTER,
                place: HostPlace::main(host),
                host_len: 1,
            }),
        };
        Ok(Extent { start: at, len: max.min(CLUSTER - within), kind })
    }

    fn decode(&self, _unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        self.decoded.fetch_add(1, Ordering::Relaxed);
        out.fill(input[0]);
        Ok(())
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::plain(None))
    }

    fn writing(&self) -> Option<&dyn Write> {
        Some(self)
    }

    fn cipher(&self) -> Option<&dyn Cipher> {
        self.sealed.then_some(self)
    }
}

impl Write for Toy {
    fn unit(&self) -> u64 {
        CLUSTER
    }

    fn fill_unit(&self) -> u64 {
        1
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let within = at.get() % CLUSTER;
        let len = len.min(CLUSTER - within);
        let action = match self.entry(at) {
            Entry::Zero(host) => {
                Action::Write { place: HostPlace::main(host + within), before: within, after: CLUSTER - within - len }
            }
            Entry::Plain(host) => return Placed::over(at, len, store, HostPlace::main(host + within)),
            Entry::Compressed(host) => Action::Write { place: HostPlace::main(host), before: 0, after: 0 },
        };
        Ok(Placed::known(at, len, store, action))
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        let mut table = self.table.lock().unwrap();
        let entry = &mut table[usize::try_from(placed.start.get() / CLUSTER).unwrap()];
        if let Entry::Zero(host) = *entry {
            *entry = Entry::Plain(host);
        }
        Ok(())
    }
}

/// A file whose clusters lie in another order than on the disk, and hold `disk`.
fn sealed(disk: &[u8]) -> (Node, Arc<Memory>) {
    let clusters = disk.len() as u64 / CLUSTER;
    let table = (0..clusters).map(|n| Entry::Zero((clusters - n) * CLUSTER)).collect();
    let (node, file) = Toy::node(table, vec![0xee; disk.len() + CLUSTER as usize], true);
    node.write(GuestOffset(0), disk, &mut Scratch::default()).unwrap();
    (node, file)
}

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|n| (n * 7 % 251).to_le_bytes()[0]).collect()
}

#[test]
fn a_cipher_is_applied_with_the_places_on_the_disk_and_in_the_file() {
    let disk = pattern(3 * CLUSTER);
    let (_, file) = sealed(&disk);
    let stored = file.to_vec();
    for (n, want) in disk.iter().enumerate() {
        let guest = n as u64;
        let host = (3 - guest / CLUSTER) * CLUSTER + guest % CLUSTER;
        let in_sector = usize::try_from(guest % SECTOR).unwrap();
        let byte = stored[usize::try_from(host).unwrap()];
        assert_eq!(byte ^ key(guest / SECTOR * SECTOR, host / SECTOR * SECTOR, in_sector), *want, "byte {n}");
    }
}

#[test]
fn reads_and_writes_of_any_place_and_length_go_through_a_cipher() {
    let mut disk = pattern(3 * CLUSTER);
    let (node, _) = sealed(&disk);
    let mut rng = fastrand::Rng::with_seed(11);
    let scratch = &mut Scratch::default();
    for round in 0..400 {
        let at = rng.usize(0..disk.len());
        let most = if rng.bool() { 600 } else { 9000 };
        let len = rng.usize(1..=(disk.len() - at).min(most));
        match rng.u8(0..3) {
            0 => {
                let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(len).collect();
                node.write(GuestOffset(at as u64), &bytes, scratch).unwrap();
                disk[at..at + len].copy_from_slice(&bytes);
            }
            1 => {
                node.write_zeroes(GuestOffset(at as u64), len as u64, rng.bool(), scratch).unwrap();
                disk[at..at + len].fill(0);
            }
            _ => {}
        }
        let mut read = vec![1; len];
        node.read(GuestOffset(at as u64), &mut read, scratch).unwrap();
        assert_eq!(read, disk[at..at + len], "round {round}");
    }
    let mut all = vec![1; disk.len()];
    node.read(GuestOffset(0), &mut all, scratch).unwrap();
    assert!(all == disk);
}

fn step(node: &Node, at: u64, len: u64) -> Step<'_> {
    Step {
        placement: node.place(GuestOffset(at), len, Store::Data).unwrap(),
        from: usize::try_from(at).unwrap(),
        len: usize::try_from(len).unwrap(),
        encoded: false,
        done: 0,
    }
}

#[test]
fn a_write_of_adjacent_steps_goes_through_a_cipher() {
    let table = vec![Entry::Plain(CLUSTER), Entry::Plain(2 * CLUSTER)];
    let (node, _) = Toy::node(table, vec![0; 3 * CLUSTER as usize], true);
    let disk = pattern(2 * CLUSTER);
    // Whole clusters, which are one write; then parts of sectors, which are not.
    let scratch = &mut Scratch::default();
    for cut in [CLUSTER, CLUSTER + 100] {
        let steps = [(0, CLUSTER), (CLUSTER, cut - CLUSTER + 1), (cut + 1, 2 * CLUSTER - cut - 1)];
        let steps = steps.map(|(at, len)| step(&node, at, len));
        write_steps(&steps, &disk, &[], usize::MAX, scratch).unwrap();
        let mut read = vec![0; disk.len()];
        node.read(GuestOffset(0), &mut read, scratch).unwrap();
        assert!(read == disk);
    }
}

#[test]
fn with_a_cipher_the_host_neither_zeroes_nor_copies() {
    let disk = pattern(2 * CLUSTER);
    let (node, file) = sealed(&disk);
    punch(node.driver(), GuestOffset(0), 2 * CLUSTER).unwrap();
    let before = file.to_vec();
    assert!(before[CLUSTER as usize..].iter().any(|byte| *byte != 0));
    node.write_zeroes(GuestOffset(0), CLUSTER, true, &mut Scratch::default()).unwrap();
    let after = file.to_vec();
    assert!(
        after[2 * CLUSTER as usize..].iter().any(|byte| *byte != 0),
        "zeros of the host are not zeros of the guest"
    );
    assert_eq!(after[..2 * CLUSTER as usize], before[..2 * CLUSTER as usize]);
    let (plain, _) = Toy::node(vec![Entry::Plain(0)], vec![3; CLUSTER as usize], false);
    let source = plain.map(GuestOffset(0), CLUSTER, 1).unwrap();
    let step = |target| step(target, 0, CLUSTER);
    assert!(!step(&node).offload(&source, CLUSTER, Offload::ShareOrCopy).unwrap());
    let source = node.map(GuestOffset(0), CLUSTER, 1).unwrap();
    assert!(!step(&plain).offload(&source, CLUSTER, Offload::ShareOrCopy).unwrap());
}

#[test]
fn small_reads_decode_a_unit_once_until_a_unit_is_stored() {
    let decoded = Arc::new(AtomicUsize::new(0));
    let table = vec![Entry::Compressed(0), Entry::Compressed(1)];
    let (node, file) = Toy::counting(table, vec![4, 5], true, decoded.clone());
    let read = |at: u64, want: u8| {
        let mut buf = [0; 64];
        node.read(GuestOffset(at), &mut buf, &mut Scratch::default()).unwrap();
        assert_eq!(buf, [want; 64], "at {at}");
        decoded.load(Ordering::Relaxed)
    };
    for at in (0..CLUSTER).step_by(64) {
        assert_eq!(read(at, 4), 1);
    }
    assert_eq!((read(CLUSTER, 5), read(2 * CLUSTER - 64, 5)), (2, 2));
    // The same place in the file gets another unit.
    let placement = node.place(GuestOffset(CLUSTER), CLUSTER, Store::Compressed { bytes: 1 }).unwrap();
    placement.write_encoded(&[9]).unwrap();
    placement.publish().unwrap();
    assert_eq!(file.to_vec(), [4, 9]);
    assert_eq!((read(CLUSTER + 64, 9), read(CLUSTER, 9)), (3, 3));
    // A unit that is read as a whole is taken where it is kept, and not worth keeping.
    let mut whole = vec![0; CLUSTER as usize];
    node.read(GuestOffset(0), &mut whole, &mut Scratch::default()).unwrap();
    assert!(whole == [4; CLUSTER as usize]);
    assert_eq!((read(CLUSTER, 9), read(0, 4)), (4, 5));
}

#[test]
fn what_was_read_before_a_unit_was_stored_is_not_kept_after_it() {
    let last = LastUnit::default();
    let unit = CompressedUnit { start: GuestOffset(0), len: CLUSTER, place: HostPlace::main(0), host_len: 1 };
    let stored = last.find(&unit).unwrap_err();
    last.forget();
    last.keep(unit, &[1], stored);
    assert!(last.find(&unit).is_err());
    last.keep(unit, &[2], last.find(&unit).unwrap_err());
    assert_eq!(*last.find(&unit).unwrap(), [2]);
}

#[test]
fn a_buffer_that_cannot_be_had_is_an_error() {
    let error = zeroed(u64::MAX / 4).unwrap_err();
    assert_eq!(error.storage().and_then(|error| error.errno()), Some(Errno::ENOMEM));
    assert_eq!(zeroed(3).unwrap(), [0; 3]);
}
