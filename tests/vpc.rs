//! vpc against qemu-img and 7z.

use std::os::unix::fs::FileExt;
use std::path::Path;

use vimg::storage::Preallocation;

use crate::common::{Scratch, assert_same_bytes, judge};
use crate::rig::{Pair, assert_survives_mutations, create, open_bytes};

const M: u64 = 1 << 20;

/// Clears what differs from run to run: time, checksum and UUID, in both footers.
fn mask(path: &Path, fixed: bool) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let end = file.metadata().unwrap().len() - 512;
    let starts = if fixed { vec![end] } else { vec![0, end] };
    for at in starts {
        file.write_all_at(&[0; 4], at + 24).unwrap();
        file.write_all_at(&[0; 20], at + 64).unwrap();
    }
}

/// Puts the checksum right.
fn seal(footer: &mut [u8]) {
    footer[64..68].fill(0);
    let sum = !footer.iter().map(|b| u32::from(*b)).sum::<u32>();
    footer[64..68].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn new_images_are_the_references() {
    let scratch = Scratch::new();
    for size in [0, 1, 34816, 10 * M, 504 * M, 1 << 30, 64 << 30, 127 << 30, (127 << 30) + 600 * M, 2040 << 30] {
        for options in ["", "force_size=on", "subformat=fixed", "subformat=fixed,force_size=on"] {
            create(&scratch.file("ours"), "vpc", options, size).unwrap();
            let shown = if options.is_empty() { "subformat=dynamic" } else { options };
            scratch.judge(&["create", "-q", "-f", "vpc", "-o", shown, "theirs", &size.to_string()]);
            for name in ["ours", "theirs"] {
                mask(&scratch.file(name), options.contains("fixed"));
            }
            assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
        }
    }
    let error = create(&scratch.file("ours"), "vpc", "", (2040 << 30) + 1).unwrap_err();
    assert_eq!(error.message(), "Disk size is too large, max size is 2040 GiB");
}

#[test]
fn what_is_written_is_what_others_read() {
    for options in ["", "force_size=on", "subformat=fixed", "subformat=fixed,force_size=on"] {
        let scratch = Scratch::new();
        let mut pair = Pair::new(&scratch, "vpc", options, 19 * M + 1536);
        pair.exercise(100, 3 * M);
        pair.assert_good();
        pair.assert_7z_agrees("vhd");
    }
}

#[test]
fn what_others_write_goes_on() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vpc", "a.vhd", "12M"]);
    let mut pair = Pair::of(&scratch, "vpc", "a.vhd");
    pair.exercise(20, M);
    let writes = ["write -P 7 3M 2M", "write -P 8 11M 4k"];
    scratch.qemu_io("vpc", "a.vhd", &writes);
    scratch.qemu_io("raw", "a.vhd.model", &writes);
    pair.assert_good();
    pair.exercise(20, M);
    pair.assert_good();
}

#[test]
fn resized_images_keep_their_content() {
    for options in ["", "force_size=on", "subformat=fixed"] {
        let scratch = Scratch::new();
        let mut pair = Pair::new(&scratch, "vpc", options, 20 * M + 512);
        pair.exercise(30, 2 * M);
        for size in [21 * M, 100 * M + 512, 600 * M, 3000 * M, 1500 * M + 512, 7 * M + 512, 8 * M, 300 * M, 5 * M] {
            pair.resize(size);
            pair.assert_good();
            pair.exercise(8, 3 * M);
            pair.assert_good();
        }
        pair.assert_7z_agrees("vhd");
    }
}

#[test]
fn the_last_footer_stays_the_last_thing() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "vpc", "", 600 * M);
    pair.exercise(10, 3 * M);
    for size in [2000 * M, 20 * M, 900 * M] {
        pair.resize(size);
        let bytes = std::fs::read(pair.path()).unwrap();
        assert_eq!(bytes[..512], bytes[bytes.len() - 512..]);
        crate::common::need("vhdiinfo");
        let out = scratch.sh(&format!("vhdiinfo '{}'", pair.name));
        assert!(out.stdout.contains(&format!("({size} bytes)")), "{out:?}");
    }
}

#[test]
fn a_resize_stopped_at_any_write_leaves_the_old_or_the_new_disk() {
    for options in ["force_size=on", "subformat=fixed,force_size=on"] {
        let scratch = Scratch::new();
        let fixed = options.contains("fixed");
        let (start, grown) = if fixed { (2 * M + 512, 3 * M) } else { (200 * M + 512, 700 * M) };
        let mut pair = Pair::new(&scratch, "vpc", options, start);
        let node = pair.open();
        for at in [0, start / 2 / 512 * 512 + 5, start - 512] {
            pair.write(&node, at, 512);
        }
        node.driver().close().unwrap();
        drop(node);
        pair.assert_resize_is_safe(grown, Preallocation::Off);
        pair.assert_resize_is_safe(start / 2 / 512 * 512 + 1024, Preallocation::Off);
        pair.assert_resize_is_safe(M, Preallocation::Off);
        if fixed {
            pair.assert_resize_is_safe(start + 512, Preallocation::Off);
            pair.assert_resize_is_safe(start - 512, Preallocation::Off);
            pair.assert_resize_is_safe(grown, Preallocation::Falloc);
            pair.assert_resize_is_safe(grown, Preallocation::Full);
        }
    }
}

/// A resize that was stopped leaves the old disk in a file that is longer than it: another one shows nothing of what
/// lies between.
#[test]
fn a_fixed_disk_in_a_longer_file_is_resized() {
    for size in [2 * M + 512, 3 * M, 4 * M - 512, 4 * M, 5 * M, M] {
        let scratch = Scratch::new();
        let mut pair = Pair::new(&scratch, "vpc", "subformat=fixed,force_size=on", 2 * M);
        let node = pair.open();
        pair.write(&node, 0, 2 << 20);
        node.driver().close().unwrap();
        drop(node);
        let mut file = std::fs::read(pair.path()).unwrap();
        let footer = file.split_off(2 << 20);
        file.resize(4 << 20, 0xee);
        file.extend(footer);
        std::fs::write(pair.path(), &file).unwrap();
        pair.assert_good();
        pair.assert_resize_is_safe(size, Preallocation::Off);
        pair.resize(size);
        pair.assert_good();
        assert_eq!(pair.path().metadata().unwrap().len(), size + 512);
    }
}

#[test]
fn virtual_pc_images_are_read_by_their_geometry() {
    let scratch = Scratch::new();
    create(&scratch.file("a.vhd"), "vpc", "", 10 * M).unwrap();
    let good = std::fs::read(scratch.file("a.vhd")).unwrap();
    for creator in [b"vpc ", b"qemu", b"win ", b"vbox", b"qem2", b"tap\0"] {
        let mut bytes = good.clone();
        bytes[28..32].copy_from_slice(creator);
        bytes[48..56].copy_from_slice(&(5 * M).to_be_bytes());
        seal(&mut bytes[..512]);
        std::fs::write(scratch.file("b.vhd"), &bytes).unwrap();
        let theirs = judge(&["info", "-f", "vpc", "--output=json", "b.vhd"]).dir(scratch.path()).ok().json();
        let ours = open_bytes(bytes, "vpc", false).unwrap().virtual_size();
        assert_eq!(theirs["virtual-size"].as_u64(), Some(ours));
    }
}

#[test]
fn sectors_that_were_never_written_are_zeros() {
    let scratch = Scratch::new();
    create(&scratch.file("a.vhd"), "vpc", "force_size=on", 4 * M).unwrap();
    scratch.qemu_io("vpc", "a.vhd", &["write -P 5 0 4M"]);
    let mut bytes = std::fs::read(scratch.file("a.vhd")).unwrap();
    let at = 512 * u32::from_be_bytes([bytes[1536], bytes[1537], bytes[1538], bytes[1539]]) as usize;
    bytes[at] = 0b1011_1111;
    bytes[at + 2] = 0;
    let storage = std::sync::Arc::new(vimg::storage::memory::Memory::new(bytes));
    let node = crate::rig::open_on(storage, "vpc", true).unwrap();
    let mut buffers = Default::default();
    let mut read = vec![9; 4 << 20];
    node.read(vimg::block::GuestOffset(0), &mut read, &mut buffers).unwrap();
    let mut wanted = vec![5; 4 << 20];
    wanted[512..1024].fill(0);
    wanted[16 * 512..24 * 512].fill(0);
    assert!(read == wanted);
    // A part of a sector brings the rest of it to light.
    node.write(vimg::block::GuestOffset(600), &[7; 10], &mut buffers).unwrap();
    node.write(vimg::block::GuestOffset(17 * 512), &[8; 1024], &mut buffers).unwrap();
    wanted[600..610].fill(7);
    wanted[17 * 512..19 * 512].fill(8);
    node.read(vimg::block::GuestOffset(0), &mut read, &mut buffers).unwrap();
    assert!(read == wanted);
}

#[test]
fn wrong_images_are_refused_in_the_references_words() {
    let scratch = Scratch::new();
    create(&scratch.file("a.vhd"), "vpc", "", 4 * M).unwrap();
    let good = std::fs::read(scratch.file("a.vhd")).unwrap();
    for (at, bytes) in [
        (0, &b"x"[..]),
        (8, &[1]),
        (512, b"x"),
        (512 + 28, &[0, 0, 0, 1]),
        (512 + 28, &[0xff, 0xff, 0xff, 0xff]),
        (512 + 28, &[0x10, 0, 0, 0]),
        (512 + 32, &[0, 0, 0, 0]),
        (512 + 32, &[0, 0x30, 0, 0]),
        (512 + 16, &[0, 0, 1, 0]),
        (512 + 16, &[0x80]),
        (16, &[0x80]),
        (1536, &[0, 0, 1, 0]),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        if at == 16 {
            seal(&mut bad[..512]);
        }
        if at < 512 {
            // Here the footer at the end would help us.
            let end = bad.len() - 512;
            bad.truncate(end);
        }
        std::fs::write(scratch.file("bad.vhd"), &bad).unwrap();
        let theirs = judge(&["info", "-f", "vpc", "bad.vhd"]).dir(scratch.path()).run();
        let ours = open_bytes(bad, "vpc", false).map(|_| ()).unwrap_err().message();
        assert_eq!(theirs.stderr, format!("qemu-img: Could not open 'bad.vhd': {ours}\n"));
    }
    for len in [0, 511, 1023, 1024, 1535] {
        std::fs::write(scratch.file("bad.vhd"), &good[..len]).unwrap();
        let theirs = judge(&["info", "-f", "vpc", "bad.vhd"]).dir(scratch.path()).run();
        let ours = open_bytes(good[..len].to_vec(), "vpc", false).map(|_| ()).unwrap_err().message();
        assert_eq!(theirs.stderr, format!("qemu-img: Could not open 'bad.vhd': {ours}\n"));
    }
    let mut healed = good.clone();
    healed[0] = 0;
    assert_eq!(open_bytes(healed, "vpc", false).unwrap().virtual_size(), 8228 * 512);
}

#[test]
fn mutated_headers_are_read_or_refused() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "vpc", "", 4 * M);
    let node = pair.open();
    pair.write(&node, 2 * M, 512);
    node.driver().close().unwrap();
    let bytes = std::fs::read(pair.path()).unwrap();
    assert_survives_mutations("vpc", &bytes, 100);
    let header: Vec<u8> = bytes;
    for at in 512..1600 {
        for value in [0, 1, 0x7f, 0xff] {
            let mut changed = header.clone();
            changed[at] = value;
            let _ = open_bytes(changed, "vpc", true).map(|node| crate::rig::walk(&node));
        }
    }
}

/// What failed half way into an image that is there leaves one with both its footers.
#[test]
fn a_failed_write_into_an_image_leaves_its_footer() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vpc", "-o", "force_size=on", "t.vhd", "64M"]);
    crate::common::write_pattern(&scratch.file("s.raw"), 0, 1, 60 << 20);
    let program = crate::common::vimg_path();
    let line =
        format!("(ulimit -f 30000; '{}' convert -n -f raw -O vpc s.raw t.vhd) && exit 1 || exit 0", program.display());
    scratch.sh(&line);
    let file = std::fs::read(scratch.file("t.vhd")).expect("read");
    assert_eq!(&file[file.len() - 512..file.len() - 504], b"conectix");
}

/// A resize says what it refuses before it changes anything, be it to put a damaged footer right.
#[test]
fn the_check_of_a_resize_writes_nothing() {
    let scratch = Scratch::new();
    create(&scratch.file("a.vhd"), "vpc", "force_size=on", 10 * M).unwrap();
    let mut bytes = std::fs::read(scratch.file("a.vhd")).unwrap();
    bytes[100] ^= 1;
    std::fs::write(scratch.file("a.vhd"), &bytes).unwrap();
    let node = crate::rig::open_on(crate::common::inside::host_file(&scratch.file("a.vhd")), "vpc", true).unwrap();
    let resizing = node.driver().resizing().unwrap();
    resizing.check(20 * M, Preallocation::Off).unwrap();
    assert!(std::fs::read(scratch.file("a.vhd")).unwrap() == bytes);
    resizing.resize(20 * M, Preallocation::Off).unwrap();
    let bytes = std::fs::read(scratch.file("a.vhd")).unwrap();
    assert!(bytes[..512] == bytes[bytes.len() - 512..]);
}

#[test]
fn a_resize_refuses_the_preallocation_that_it_does_not_have() {
    let scratch = Scratch::new();
    for (options, modes) in [("", &["metadata", "falloc", "full"][..]), ("subformat=fixed", &["metadata"])] {
        create(&scratch.file("a.vhd"), "vpc", options, 10 * M).unwrap();
        let before = std::fs::read(scratch.file("a.vhd")).unwrap();
        for mode in modes {
            let mode = format!("--preallocation={mode}");
            let out =
                crate::common::run::vimg(&["resize", "-f", "vpc", &mode, "a.vhd", "20M"]).dir(scratch.path()).run();
            assert_eq!(out.code, Some(1), "{out:?}");
            assert!(out.stderr.contains("Unsupported preallocation mode"), "{out:?}");
        }
        assert!(std::fs::read(scratch.file("a.vhd")).unwrap() == before);
    }
}

#[test]
fn a_footer_without_its_disk_is_refused() {
    let scratch = Scratch::new();
    for options in ["subformat=fixed", "subformat=fixed,force_size=on"] {
        create(&scratch.file("a.vhd"), "vpc", options, 10 * M).unwrap();
        let whole = std::fs::read(scratch.file("a.vhd")).unwrap();
        for len in [512, 513, 1023] {
            std::fs::write(scratch.file("f.vhd"), &whole[whole.len() - len..]).unwrap();
            for args in [&["info", "-f", "vpc", "f.vhd"][..], &["convert", "-f", "vpc", "-O", "raw", "f.vhd", "out"]] {
                let out = crate::common::run::vimg(args).dir(scratch.path()).run();
                assert_eq!(out.code, Some(1), "{out:?}");
                assert!(out.stderr.contains("'f.vhd' has"), "{out:?}");
            }
        }
        // With a part of it, it is not resized either, nor shown as zeros.
        std::fs::write(scratch.file("f.vhd"), &whole[9 << 20..]).unwrap();
        let node = crate::rig::open_on(crate::common::inside::host_file(&scratch.file("f.vhd")), "vpc", true).unwrap();
        let error = node.driver().resizing().unwrap().resize(20 * M, Preallocation::Off).unwrap_err();
        assert!(error.message().contains("before its footer"), "{}", error.message());
        let extent = node.driver().extent(vimg::block::GuestOffset(5 * M), M).unwrap();
        let vimg::block::ExtentKind::Data(place) = extent.kind else { panic!("{extent:?}") };
        assert!(place.at.get() >= scratch.file("f.vhd").metadata().unwrap().len());
        assert_eq!(std::fs::read(scratch.file("f.vhd")).unwrap(), whole[9 << 20..]);
    }
}

/// The places of header, table and blocks are the image's own: other writers put the table behind the blocks.
#[test]
fn a_table_behind_the_blocks_is_written_and_resized() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vpc", "-o", "force_size=on", "a.vhd", "20M"]);
    let mut file = std::fs::read(scratch.file("a.vhd")).unwrap();
    // Two blocks where the table was, of zeros, then the table, then the footer.
    let stride = 512 + (2 << 20);
    let footer = file[..512].to_vec();
    file.truncate(1536);
    for _ in 0..2 {
        file.extend(vec![0xff; 512]);
        file.extend(vec![0; 2 << 20]);
    }
    let mut table = vec![0xff; 512];
    table[4..8].copy_from_slice(&3u32.to_be_bytes());
    table[12..16].copy_from_slice(&(3 + stride / 512u32).to_be_bytes());
    let at = file.len() as u64;
    file.extend(table);
    file.extend(&footer);
    file[512 + 16..512 + 24].copy_from_slice(&at.to_be_bytes());
    file[512 + 36..512 + 40].fill(0);
    let sum = !file[512..1536].iter().map(|b| u32::from(*b)).sum::<u32>();
    file[512 + 36..512 + 40].copy_from_slice(&sum.to_be_bytes());
    std::fs::write(scratch.file("a.vhd"), &file).unwrap();
    let mut pair = Pair::of(&scratch, "vpc", "a.vhd");
    pair.assert_good();
    pair.exercise(20, 3 * M);
    pair.assert_good();
    pair.assert_resize_is_safe(600 * M, Preallocation::Off);
    for size in [600 * M, 9 * M + 512, 30 * M, 3 * M] {
        pair.resize(size);
        pair.assert_good();
        pair.exercise(8, 3 * M);
        pair.assert_good();
    }
}

/// Blocks lie right behind the table. What is in the way of a longer one is moved, and the table stays where it is.
#[test]
fn a_table_grows_over_the_blocks_behind_it() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "vpc", "force_size=on", 200 * M);
    let node = pair.open();
    for at in [0, 199 * M, 100 * M] {
        pair.write(&node, at, 65536);
    }
    node.driver().close().unwrap();
    drop(node);
    let path = pair.path();
    let table = |entries: &[usize]| {
        let file = std::fs::read(&path).unwrap();
        let number = |at: usize, len: usize| file[at..at + len].iter().fold(0, |n, b| n << 8 | u64::from(*b));
        let at = number(512 + 16, 8);
        let place = |n: &usize| number(at as usize + n * 4, 4) * 512;
        (at, number(512 + 28, 4), entries.iter().map(place).collect::<Vec<_>>())
    };
    let (at, count, before) = table(&[0, 99, 50]);
    assert_eq!((at, count, before[0]), (1536, 100, 2048));
    pair.assert_resize_is_safe(700 * M, Preallocation::Off);
    pair.resize(700 * M);
    let (at, count, after) = table(&[0, 99, 50]);
    assert_eq!((at, count), (1536, 350));
    assert!(after[0] > before[2] && after[1..] == before[1..], "{before:?} {after:?}");
    pair.assert_good();
    pair.assert_7z_agrees("vhd");
}

#[test]
fn what_overlaps_is_not_written_to() {
    let scratch = Scratch::new();
    create(&scratch.file("a.vhd"), "vpc", "force_size=on", 20 * M).unwrap();
    scratch.qemu_io("vpc", "a.vhd", &["write -P 5 0 6M"]);
    let good = std::fs::read(scratch.file("a.vhd")).unwrap();
    let second = u32::from_be_bytes(good[1540..1544].try_into().unwrap());
    // The table over the header, in a block, on the copy of the footer; a block over another, and over the table.
    let table = |at: u64| (512 + 16, at.to_be_bytes().to_vec());
    let entry = |sector: u32| (1536, sector.to_be_bytes().to_vec());
    for (at, bytes) in [table(512), table(8192), table(0), entry(second), entry(second + 1), entry(3), entry(0)] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(&bytes);
        crate::rig::assert_resizes_change_nothing("vpc", bad, &[M, 21 * M, 900 * M]);
    }
}
