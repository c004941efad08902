//! Opening through the library: what an image is opened for, one layer under two chains, lower layers that are written
//! to, and layers that are open already. The judge's programs make the images, read what was written, and meet the
//! locks.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vimg::block::io::Scratch as Buffers;
use vimg::block::{ErrorKind, GuestOffset, ImageRef, NO_SECRETS, Node, OpenHow, Opener, Policy, Purpose, Result};
use vimg::drivers::DRIVERS;

use crate::common::{Scratch, judge, own};

fn opener() -> Opener<'static> {
    Opener::new(DRIVERS, Policy::Follow, &NO_SECRETS)
}

fn how(format: &str, purpose: Purpose) -> OpenHow {
    OpenHow { format: Some(format.to_owned()), purpose, ..OpenHow::default() }
}

fn open(opener: &Opener<'_>, path: &Path, purpose: Purpose) -> Result<Arc<Node>> {
    opener.open(&ImageRef::name(path), &how("qcow2", purpose))
}

/// The bytes of a KiB at each of these offsets, each of which is all the same.
fn bytes_at<const N: usize>(node: &Node, at: [u64; N]) -> [u8; N] {
    at.map(|at| {
        let mut bytes = [0xee; 1024];
        node.read(GuestOffset(at), &mut bytes, &mut Buffers::default()).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "at {at}");
        bytes[0]
    })
}

/// How many times this process has that file open.
fn descriptors(path: &Path) -> usize {
    let wanted = fs::metadata(path).unwrap();
    let open = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::metadata(entry.ok()?.path()).ok());
    open.filter(|meta| (meta.dev(), meta.ino()) == (wanted.dev(), wanted.ino())).count()
}

#[test]
fn one_layer_stands_under_two_chains() {
    let t = Scratch::new();
    for (base, byte) in [("a", "0xaa"), ("b", "0xbb")] {
        t.judge(&["create", "-q", "-f", "qcow2", base, "1M"]);
        t.qemu_io("qcow2", base, &[&format!("write -P {byte} 0 1M")]);
    }
    t.judge(&["create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "top"]);
    t.qemu_io("qcow2", "top", &["write -P 0x11 64k 64k"]);
    let opener = opener();
    let node = open(&opener, &t.file("top"), Purpose::Read).unwrap();
    let other = open(&opener, &t.file("b"), Purpose::Read).unwrap();
    let twin = node.on(Some(other.clone()));
    assert!(Arc::ptr_eq(node.layer(), twin.layer()));
    assert_eq!(bytes_at(&node, [0, 64 << 10]), [0xaa, 0x11]);
    assert_eq!(bytes_at(&twin, [0, 64 << 10]), [0xbb, 0x11]);
    assert_eq!(twin.name(), node.name());
    assert_eq!(twin.origin().tree["backing"]["file"]["filename"], t.file("b").to_str().unwrap());
    assert_eq!(bytes_at(&node.on(None), [0, 64 << 10]), [0, 0x11]);

    let image = ImageRef::name(t.file("top"));
    let third = opener.open_on(&image, &how("qcow2", Purpose::Read), Some(other)).unwrap();
    assert!(Arc::ptr_eq(third.layer(), node.layer()), "it is open already");
    assert_eq!(bytes_at(&third, [0, 64 << 10]), [0xbb, 0x11]);
    let error = opener.open_on(&image, &how("qcow2", Purpose::Read), Some(node)).unwrap_err();
    assert!(error.message().ends_with("creates an infinite loop."), "{}", error.message());
}

#[test]
fn a_layer_that_is_read_is_found_and_one_that_is_written_is_not() {
    let t = Scratch::new();
    t.judge(&["create", "-q", "-f", "qcow2", "base", "1M"]);
    for top in ["x", "y"] {
        t.judge(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top]);
    }
    let opener = opener();
    let base = t.file("base");
    let x = open(&opener, &t.file("x"), Purpose::Read).unwrap();
    let y = open(&opener, &t.file("y"), Purpose::Read).unwrap();
    fs::create_dir(t.file("d")).unwrap();
    let again = open(&opener, &t.file("d/../base"), Purpose::Read).unwrap();
    for node in [y.backing().unwrap(), &again] {
        assert!(Arc::ptr_eq(x.backing().unwrap().layer(), node.layer()));
    }
    assert_eq!(descriptors(&base), 1);
    // Asked for in another way, it is another layer.
    let sized = OpenHow { force_share: true, ..how("qcow2", Purpose::Read) };
    let shared = opener.open(&ImageRef::name(&base), &sized).unwrap();
    assert!(!Arc::ptr_eq(shared.layer(), again.layer()));
    let raw = opener.open(&ImageRef::name(&base), &how("raw", Purpose::Read)).unwrap();
    assert_eq!(raw.driver().format(), "raw");
    let error = open(&opener, &base, Purpose::Write).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Locked);
    drop((x, y, again, shared, raw));
    assert_eq!(descriptors(&base), 0, "what is found is not kept open");
    let writer = open(&opener, &base, Purpose::Write).unwrap();
    let error = open(&opener, &base, Purpose::Read).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Locked);
    drop(writer);
}

/// The chain top → mid → base with `mid` in that format, and its files, the image first.
fn chain_over(t: &Scratch, format: &str, options: &str) -> Vec<String> {
    let mut args = vec!["create", "-q", "-f", format, "mid"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    t.judge(&[&args[..], &["1M"]].concat());
    t.qemu_io(format, "mid", &["write -P 0x22 0 1M"]);
    t.judge(&["create", "-q", "-f", "qcow2", "-b", "mid", "-F", format, "top"]);
    t.qemu_io("qcow2", "top", &["write -P 0x33 64k 64k"]);
    let files = ["mid", "mid-flat", "data"].iter().filter(|name| t.file(name).exists());
    files.map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_layer_below_is_opened_again_for_writing_and_keeps_its_locks() {
    for (format, options, count) in [
        ("qcow2", "", 1),
        ("qcow2", "data_file=data", 2),
        ("raw", "", 1),
        ("vmdk", "subformat=monolithicFlat", 2),
        ("vpc", "", 1),
    ] {
        let t = Scratch::new();
        let files = chain_over(&t, format, options);
        assert_eq!(files.len(), count, "{format} {options}");
        let here = opener();
        let top = open(&here, &t.file("top"), Purpose::Commit).unwrap();
        let read = format!("qemu-io -r -f {format} -c 'read 0 512' mid");
        let write = format!("qemu-io -f {format} -c 'write -P 0x22 0 512' mid");
        t.sh(&format!("{read} >/dev/null"));

        // Somebody else reads it: nothing changes, and everybody can go on.
        if format != "raw" {
            let other = opener().open(&ImageRef::name(t.file("mid")), &how(format, Purpose::Read)).unwrap();
            let error = here.open_lower(&top, 1, Default::default()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Locked, "{}", error.message());
            drop(other);
            t.sh(&format!("{read} >/dev/null && ! {write} 2>/dev/null"));
        }

        let chain = here.open_lower(&top, 1, Default::default()).unwrap();
        drop(top);
        for name in &files {
            assert_eq!(descriptors(&t.file(name)), 1, "{format} {name}");
        }
        if format != "raw" {
            t.sh(&format!("! {read} 2>/dev/null && ! {write} 2>/dev/null"));
        }
        let mid = chain.backing().unwrap();
        mid.write(GuestOffset(512 << 10), &[0x44; 4096], &mut Buffers::default()).unwrap();
        assert_eq!(bytes_at(&chain, [0, 64 << 10, 512 << 10]), [0x22, 0x33, 0x44], "{format} {options}");
        assert_eq!(chain.backing().unwrap().name(), mid.name());
        let same = here.open_lower(&chain, 1, Default::default()).unwrap();
        assert!(Arc::ptr_eq(same.backing().unwrap().layer(), mid.layer()), "it can be written to already");
        assert!(here.open_lower(&chain, 2, Default::default()).is_err(), "nothing lies below it");
        mid.driver().close().unwrap();
        drop((chain, same));
        t.qemu_io(format, "mid", &["read -P 0x44 512k 4k", "read -P 0x22 516k 508k"]);
    }
}

#[test]
fn only_who_writes_guest_data_has_an_image_mended_on_opening() {
    let t = Scratch::new();
    let image = t.file("dirty");
    t.judge(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "dirty", "1M"]);
    t.sh("qemu-io -f qcow2 -c 'write 0 64k' -c flush -c 'sigraise 9' dirty >/dev/null 2>&1; true");
    let before = fs::read(&image).unwrap();
    assert_eq!(before[79], 1, "the dirty bit");
    for purpose in [Purpose::Look, Purpose::Read, Purpose::Check, Purpose::Repair] {
        let node = open(&opener(), &image, purpose).unwrap();
        assert_eq!(node.driver().writing().is_some(), purpose == Purpose::Repair);
        drop(node);
        assert!(fs::read(&image).unwrap() == before, "{purpose:?}");
    }
    for purpose in [Purpose::Write, Purpose::Commit] {
        fs::write(&image, &before).unwrap();
        let node = open(&opener(), &image, purpose).unwrap();
        node.driver().close().unwrap();
        drop(node);
        assert_eq!(fs::read(&image).unwrap()[79], 0, "{purpose:?}");
        judge(&["check", "-q", "-f", "qcow2", "dirty"]).dir(t.path()).ok();
    }
}

#[test]
fn a_corrupt_image_is_refused_to_writers_of_guest_data_alone() {
    let t = Scratch::new();
    let image = t.file("corrupt");
    t.judge(&["create", "-q", "-f", "qcow2", "corrupt", "1M"]);
    let mut bytes = fs::read(&image).unwrap();
    bytes[79] = 2;
    fs::write(&image, &bytes).unwrap();
    // A program that another test starts has our files, and with them their locks, for a moment.
    let patiently = |purpose: Purpose| loop {
        match open(&opener(), &image, purpose) {
            Err(error) if error.kind == ErrorKind::Locked => thread::sleep(Duration::from_millis(20)),
            other => return other,
        }
    };
    for purpose in [Purpose::Look, Purpose::Read, Purpose::Check, Purpose::Repair] {
        drop(patiently(purpose).unwrap());
    }
    for purpose in [Purpose::Write, Purpose::Commit] {
        let error = patiently(purpose).unwrap_err();
        let judged = judge(&["commit", "corrupt"]).dir(t.path()).fails(1);
        assert!(error.message().ends_with("qcow2: Image is corrupt; cannot be opened read/write"));
        assert!(judged.stderr.contains("qcow2: Image is corrupt; cannot be opened read/write"), "{}", judged.stderr);
    }
    assert!(fs::read(&image).unwrap() == bytes);
}

#[test]
fn protocols_that_are_none_here_are_refused_with_another_way() {
    let scratch = Scratch::new();
    for (name, way) in [
        ("ssh://user@host/disk", "sshfs"),
        ("rbd:pool/disk", "'rbd map'"),
        ("iscsi://host/target/1", "iscsiadm"),
        ("nfs://host/disk", "mount the volume"),
        ("wibble:disk", "a file of that name is written './wibble:disk'"),
    ] {
        let (protocol, _) = name.split_once(':').unwrap();
        for args in [&["info", name][..], &["create", "-f", "raw", name, "1M"]] {
            let out = own(args).dir(scratch.path()).fails(1);
            let refusal = format!("Unknown protocol '{protocol}'\n");
            assert!(out.stderr.contains(&refusal) && out.stderr.contains(way), "{args:?}: {out:?}");
        }
    }
}
