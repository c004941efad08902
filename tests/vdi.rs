//! vdi against qemu-img and 7z.

use vimg::storage::Preallocation;

use crate::common::{Scratch, assert_same_bytes, judge};
use crate::rig::{Pair, assert_survives_mutations, create, open_bytes};

const M: u64 = 1 << 20;

fn mask(path: &std::path::Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[0; 32], 0x188).unwrap();
}

#[test]
fn new_images_are_the_references() {
    let scratch = Scratch::new();
    for (size, options) in [
        (0, ""),
        (1, ""),
        (512, "static=on"),
        (M + 512, ""),
        (5 * M, "static=on"),
        (200 * M, ""),
        (3 << 40, ""),
        (300 << 30, "static=on"),
    ] {
        create(&scratch.file("ours"), "vdi", options, size).unwrap();
        let text = size.to_string();
        let options = if options.is_empty() { "static=off" } else { options };
        scratch.judge(&["create", "-q", "-f", "vdi", "-o", options, "theirs", &text]);
        mask(&scratch.file("ours"));
        mask(&scratch.file("theirs"));
        assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
    }
    let error = create(&scratch.file("ours"), "vdi", "", 600 << 40).unwrap_err();
    assert_eq!(
        error.message(),
        "Unsupported VDI image size (size is 0x2580000000000, max supported is 0x1fffff8000000)"
    );
}

#[test]
fn what_is_written_is_what_others_read() {
    for options in ["", "static=on"] {
        let scratch = Scratch::new();
        let mut pair = Pair::new(&scratch, "vdi", options, 19 * M + 1536);
        pair.exercise(120, 3 * M / 2);
        pair.assert_good();
        pair.assert_7z_agrees("vdi");
    }
}

#[test]
fn what_others_write_goes_on() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vdi", "a.vdi", "12M"]);
    let mut pair = Pair::of(&scratch, "vdi", "a.vdi");
    pair.exercise(20, M);
    scratch.qemu_io("vdi", "a.vdi", &["write -P 7 3M 2M", "write -P 8 11M 4k"]);
    scratch.qemu_io("raw", "a.vdi.model", &["write -P 7 3M 2M", "write -P 8 11M 4k"]);
    pair.assert_good();
    pair.exercise(20, M);
    pair.assert_good();
}

#[test]
fn discarded_blocks_and_small_blocks_are_read() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vdi", "a.vdi", "4M"]);
    scratch.qemu_io("vdi", "a.vdi", &["write -P 1 0 4M"]);
    let mut bytes = std::fs::read(scratch.file("a.vdi")).unwrap();
    bytes[0x204..0x208].copy_from_slice(&0xffff_fffeu32.to_le_bytes());
    let mut read = vec![9; 4 << 20];
    let node = open_bytes(bytes.clone(), "vdi", false).unwrap();
    node.read(vimg::block::GuestOffset(0), &mut read, &mut Default::default()).unwrap();
    assert!(read[..1 << 20].iter().all(|b| *b == 1) && read[1 << 20..2 << 20].iter().all(|b| *b == 0));
    assert!(read[2 << 20..].iter().all(|b| *b == 1));

    // Blocks of 64 KiB: an image that the reference refuses.
    let mut small = vec![0; 0x400 + 3 * 65536];
    small[..0x200].copy_from_slice(&bytes[..0x200]);
    small[0x158..0x15c].copy_from_slice(&0x400u32.to_le_bytes());
    small[0x170..0x178].copy_from_slice(&(5 * 65536u64).to_le_bytes());
    small[0x178..0x17c].copy_from_slice(&65536u32.to_le_bytes());
    small[0x180..0x184].copy_from_slice(&5u32.to_le_bytes());
    small[0x184..0x188].copy_from_slice(&3u32.to_le_bytes());
    for (n, entry) in [2u32, u32::MAX, 0, 1, u32::MAX].into_iter().enumerate() {
        small[0x200 + 4 * n..0x204 + 4 * n].copy_from_slice(&entry.to_le_bytes());
    }
    for n in 0..3usize {
        small[0x400 + n * 65536..0x400 + (n + 1) * 65536].fill(n as u8 + 1);
    }
    let node = open_bytes(small, "vdi", false).unwrap();
    let mut read = vec![9; 5 * 65536];
    node.read(vimg::block::GuestOffset(0), &mut read, &mut Default::default()).unwrap();
    let seen: Vec<u8> = (0..5).map(|n| read[n * 65536 + 77]).collect();
    assert_eq!(seen, [3, 0, 1, 2, 0]);
}

#[test]
fn resized_images_keep_their_content() {
    for options in ["", "static=on"] {
        let scratch = Scratch::new();
        let mut pair = Pair::new(&scratch, "vdi", options, 20 * M + 512);
        pair.exercise(30, 2 * M);
        // More of the block, more blocks, a map that needs room where blocks are, twice.
        for size in [20 * M + 1024, 100 * M, 300 * M, 700 * M + 512, 400 * M, 7 * M + 512, 8 * M, 900 * M, 5 * M] {
            pair.resize(size);
            pair.assert_good();
            pair.exercise(8, 3 * M);
            pair.assert_good();
        }
        pair.assert_7z_agrees("vdi");
    }
}

/// New blocks are in the map, and the file has room for all of them that takes none of the disk's.
#[test]
fn a_resize_with_metadata_allocates_the_new_blocks() {
    for options in ["", "static=on"] {
        let scratch = Scratch::new();
        let mut pair = Pair::new(&scratch, "vdi", options, 2 * M + 512);
        pair.exercise(8, M);
        let blocks = || {
            let header = std::fs::read(pair.path()).unwrap();
            u32::from_le_bytes(header[388..392].try_into().unwrap())
        };
        let before = blocks();
        let out = scratch.vimg(&["resize", "-f", "vdi", "--preallocation=metadata", &pair.name, "40M"]);
        assert_eq!(out.stdout, "Image resized.\n");
        assert_eq!(blocks(), before + 37, "{options}");
        let file = pair.path().metadata().unwrap();
        assert!(std::os::unix::fs::MetadataExt::blocks(&file) * 512 < 8 << 20);
        std::fs::OpenOptions::new()
            .write(true)
            .open(scratch.file(&format!("{}.model", pair.name)))
            .unwrap()
            .set_len(40 << 20)
            .unwrap();
        pair.assert_good();
    }
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vdi", "a.vdi", "3M"]);
    let out =
        crate::common::run::vimg(&["resize", "-f", "vdi", "--preallocation=full", "a.vdi", "9M"]).dir(scratch.path());
    assert!(out.fails(1).stderr.contains("Unsupported preallocation mode 'full'"));
}

#[test]
fn a_huge_map_moves() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "vdi", "", 3 * M);
    pair.exercise(10, M);
    pair.resize(2 << 40);
    pair.assert_good();
    let node = pair.open();
    pair.write(&node, (2 << 40) - 4096, 4096);
    node.driver().close().unwrap();
    drop(node);
    pair.assert_good();
    pair.resize(4 * M);
    pair.assert_good();
}

#[test]
fn a_resize_stopped_at_any_write_leaves_the_old_or_the_new_disk() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "vdi", "", 100 * M + 512);
    let node = pair.open();
    for at in [0, 50 * M + 5, 100 * M] {
        pair.write(&node, at, 512);
    }
    node.driver().close().unwrap();
    drop(node);
    pair.assert_resize_is_safe(300 * M, Preallocation::Off);
    pair.assert_resize_is_safe(101 * M, Preallocation::Off);
    pair.resize(51 * M);
    pair.assert_resize_is_safe(80 * M, Preallocation::Off);
    // Shrinking moves blocks that were written in another order.
    let node = pair.open();
    for at in [40 * M, 10 * M] {
        pair.write(&node, at, 4096);
    }
    node.driver().close().unwrap();
    drop(node);
    pair.assert_resize_is_safe(20 * M, Preallocation::Off);
}

#[test]
fn a_resize_of_a_static_image_stopped_at_any_write_leaves_the_old_or_the_new_disk() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "vdi", "static=on", 3 * M + 512);
    let node = pair.open();
    for at in [0, 3 * M] {
        pair.write(&node, at, 512);
    }
    node.driver().close().unwrap();
    drop(node);
    for (size, fill) in [
        (3 * M + 1024, Preallocation::Off),
        (9 * M, Preallocation::Full),
        (5 * M, Preallocation::Metadata),
        (2 * M, Preallocation::Off),
    ] {
        pair.assert_resize_is_safe(size, fill);
    }
    // A map that needs the room of the first blocks.
    pair.assert_resize_is_safe(140 * M, Preallocation::Off);
}

/// The counter of blocks is what the judge counts, wherever a change of the disk stops.
#[test]
fn what_a_stopped_shrink_left_does_not_come_back() {
    use std::sync::Arc;
    use vimg::storage::fault::{Fault, Faulty};
    use vimg::storage::memory::Memory;

    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "vdi", "", 8 * M);
    let node = pair.open();
    for at in [6 * M, 0, 5 * M, 2 * M] {
        pair.write(&node, at, 1 << 20);
    }
    node.driver().close().unwrap();
    drop(node);
    let before = std::fs::read(pair.path()).unwrap();
    let resize = |storage: Arc<dyn vimg::storage::Storage>, size| {
        let node = crate::rig::open_on(storage, "vdi", true).unwrap();
        node.driver().resizing().unwrap().resize(size, Preallocation::Off).unwrap();
        node.driver().close().unwrap();
    };
    let whole = Arc::new(Faulty::recording(Arc::new(Memory::new(before.clone()))));
    resize(whole.clone(), 3 * M);
    for point in 0..whole.operations().len() {
        let memory = Arc::new(Memory::new(before.clone()));
        resize(Arc::new(Faulty::new(memory.clone(), point, Fault::Stop)), 3 * M);
        std::fs::write(scratch.file("i"), memory.to_vec()).unwrap();
        scratch.assert_clean("vdi", "i");
        let node = open_bytes(memory.to_vec(), "vdi", false).unwrap();
        let size = node.virtual_size();
        resize(memory.clone(), 8 * M);
        let node = open_bytes(memory.to_vec(), "vdi", false).unwrap();
        let mut read = vec![1; usize::try_from(8 * M - size).unwrap()];
        node.read(vimg::block::GuestOffset(size), &mut read, &mut Default::default()).unwrap();
        assert!(read.iter().all(|byte| *byte == 0), "stopped at {point}");
        std::fs::write(scratch.file("i"), memory.to_vec()).unwrap();
        scratch.assert_clean("vdi", "i");
    }
}

#[test]
fn wrong_images_are_refused_in_the_references_words() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vdi", "a.vdi", "4M"]);
    let good = std::fs::read(scratch.file("a.vdi")).unwrap();
    for (at, bytes) in [
        (0x40, &[0u8; 4][..]),
        (0x44, &[0, 0, 2, 0]),
        (0x154, &[1, 2, 0, 0]),
        (0x158, &[1, 4, 0, 0]),
        (0x168, &[0, 16, 0, 0]),
        (0x170, &[1, 0, 0x40, 0]),
        (0x170, &[0, 0, 0, 0, 0, 0, 0xff]),
        (0x178, &[0, 0, 0, 0]),
        (0x180, &[3, 0, 0, 0]),
        (0x180, &[0xff, 0xff, 0xff, 0x3f]),
        (0x1a8, &[1]),
        (0x1b8, &[1]),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(scratch.file("bad.vdi"), &bad).unwrap();
        let theirs = judge(&["info", "-f", "vdi", "bad.vdi"]).dir(scratch.path()).run();
        let ours = open_bytes(bad, "vdi", false).map(|_| ()).unwrap_err().message();
        assert_eq!(theirs.stderr, format!("qemu-img: Could not open 'bad.vdi': {ours}\n"));
    }
    let mut differencing = good.clone();
    differencing[0x4c] = 4;
    let error = open_bytes(differencing, "vdi", false).map(|_| ()).unwrap_err();
    assert_eq!(error.message(), "unsupported VDI image (differencing image)");
}

#[test]
fn mutated_headers_are_read_or_refused() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "vdi", "", 4 * M);
    let node = pair.open();
    pair.write(&node, 2 * M, 512);
    node.driver().close().unwrap();
    let bytes = std::fs::read(pair.path()).unwrap();
    assert_survives_mutations("vdi", &bytes, 0x210);
}

/// A size that is no whole number of sectors is rounded up for the guest: a resize keeps what it sees.
#[test]
fn a_resize_keeps_the_last_sector_of_an_odd_size() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vdi", "a.vdi", "1024"]);
    scratch.qemu_io("vdi", "a.vdi", &["write -P 5 0 1024"]);
    let mut file = std::fs::read(scratch.file("a.vdi")).expect("read");
    file[0x170..0x178].copy_from_slice(&1000u64.to_le_bytes());
    std::fs::write(scratch.file("a.vdi"), &file).expect("write");
    scratch.vimg(&["resize", "-q", "-f", "vdi", "a.vdi", "8192"]);
    scratch.qemu_io("vdi", "a.vdi", &["read -P 5 0 1024", "read -P 0 1024 7168"]);
}

/// The map is read when it is used.
#[test]
fn info_shows_what_the_header_alone_says() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vdi", "a.vdi", "40G"]);
    let whole = std::fs::read(scratch.file("a.vdi")).unwrap();
    std::fs::write(scratch.file("h.vdi"), &whole[..65536]).unwrap();
    scratch.judge(&["create", "-q", "-f", "vdi", "b.vdi", "4M"]);
    let mut much = std::fs::read(scratch.file("b.vdi")).unwrap();
    much[0x180..0x184].copy_from_slice(&0x1fff_ff80u32.to_le_bytes());
    std::fs::write(scratch.file("m.vdi"), &much).unwrap();
    for name in ["h.vdi", "m.vdi"] {
        scratch.assert_same_info(name);
        let out = crate::common::run::vimg(&["convert", "-O", "raw", name, "out"]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(1));
        assert!(out.stderr.contains(name) && out.stderr.contains("the block map"), "{out:?}");
        assert!(!scratch.file("out").exists());
        let out = crate::common::run::vimg(&["resize", "-q", name, "+1G"]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(1));
    }
    assert_eq!(std::fs::read(scratch.file("h.vdi")).unwrap(), whole[..65536]);
    assert_eq!(std::fs::read(scratch.file("m.vdi")).unwrap(), much);
}

/// A static image can have lost a block from its map; what lies there in the file is no part of a longer disk.
#[test]
fn a_static_image_grows_by_zeros_over_a_lost_block() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vdi", "-o", "static=on", "a.vdi", "3M"]);
    scratch.qemu_io("vdi", "a.vdi", &["write -P 5 0 3M"]);
    let mut image = std::fs::read(scratch.file("a.vdi")).unwrap();
    image[0x208..0x20c].copy_from_slice(&[0xff; 4]);
    std::fs::write(scratch.file("a.vdi"), image).unwrap();
    scratch.vimg(&["resize", "-q", "-f", "vdi", "a.vdi", "5M"]);
    scratch.judge(&["convert", "-f", "vdi", "-O", "raw", "a.vdi", "a.raw"]);
    let mut expected = vec![5; 2 << 20];
    expected.resize(5 << 20, 0);
    assert!(std::fs::read(scratch.file("a.raw")).unwrap() == expected);
}

#[test]
fn what_overlaps_is_not_written_to() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vdi", "a.vdi", "4M"]);
    scratch.qemu_io("vdi", "a.vdi", &["write -P 5 0 3M"]);
    let good = std::fs::read(scratch.file("a.vdi")).unwrap();
    // The map over the header and in the blocks, the blocks over map and header, one block over another.
    for (at, value) in [(0x154, 0u32), (0x154, 0x400), (0x158, 0x200), (0x158, 0), (0x200, 1)] {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
        crate::rig::assert_writes_change_nothing("vdi", bad.clone());
        crate::rig::assert_resizes_change_nothing("vdi", bad, &[M, 5 * M, 900 * M]);
    }
}
