//! Differencing vhdx disks: read and written through their parents, which have to be the ones that they were made on.
//!
//! Nothing on this system makes them, so the test does, from the specification; 7z, which follows a parent beside the
//! image, says what they read as.

use std::fs;
use std::sync::Arc;

use vimg::block::io::Scratch as Buffers;
use vimg::block::{GuestOffset, format};
use vimg::formats::FORMATS;

use crate::common::inside::{self, Files};
use crate::common::{Scratch, need, pattern, plain, vimg};
use crate::differencing::Pair;
use crate::vhdx::{BAT, M, METADATA, header, put, said, word};

const SIZE: u64 = 9 * M;
const BLOCK: usize = 2 << 20;
/// Entry of the first sector bitmap: behind those of 4 GiB of blocks.
const BITMAP: usize = 2048;

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// A GUID as text.
fn text(guid: &[u8]) -> String {
    let part = |range: &[usize]| range.iter().map(|n| format!("{:02X}", guid[*n])).collect::<String>();
    let parts = [&[3, 2, 1, 0][..], &[5, 4], &[7, 6], &[8, 9], &[10, 11, 12, 13, 14, 15]].map(part);
    format!("{{{}}}", parts.join("-"))
}

fn guid(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .replace('-', "")
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("text"), 16).expect("hex"))
        .collect();
    [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15].map(|n: usize| digits[n]).to_vec()
}

fn locator(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913");
    bytes.extend([0, 0, entries.len() as u8, 0]);
    let mut texts = Vec::new();
    for (key, value) in entries {
        let (key, value) = (utf16(key), utf16(value));
        let at = (20 + 12 * entries.len() + texts.len()) as u32;
        bytes.extend(at.to_le_bytes());
        bytes.extend((at + key.len() as u32).to_le_bytes());
        bytes.extend((key.len() as u16).to_le_bytes());
        bytes.extend((value.len() as u16).to_le_bytes());
        texts.extend(key);
        texts.extend(value);
    }
    bytes.extend(texts);
    bytes
}

/// A child of a parent, and what it reads as: of its blocks one is the parent's, one partly there, one all of it, one
/// zeros, and one, cut off by the disk's end, the parent's.
fn child(parent: &[u8], below: &[u8], paths: &[(&str, &str)]) -> (Vec<u8>, Vec<u8>) {
    let vhdx = format::find(FORMATS, "vhdx").expect("vhdx");
    let files = inside::create(vhdx, "child", SIZE, "block_size=2097152,block_state_zero=off");
    let mut image = inside::bytes_of(&*files.get("child").expect("made"));
    let at = header(parent);
    let linkage = text(&parent[at + 32..at + 48]);
    let mut entries = vec![("parent_linkage", &*linkage)];
    entries.extend(paths);
    let locator = locator(&entries);
    put(&mut image, METADATA + 10, &[6, 0]);
    put(&mut image, METADATA + 0x1_0004, &[2]);
    put(&mut image, METADATA + 0x1_1000, &locator);
    let entry = METADATA + 32 + 5 * 32;
    put(&mut image, entry, &guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C"));
    for (n, value) in [0x1_1000, locator.len() as u32, 4, 0].into_iter().enumerate() {
        put(&mut image, entry + 16 + n * 4, &value.to_le_bytes());
    }
    // The sector bitmap at 8 MiB, blocks at 9 and 11 MiB.
    for (block, value) in [(BITMAP, 8 << 20 | 6u64), (1, 9 << 20 | 7), (2, 11 << 20 | 6), (3, 2)] {
        put(&mut image, BAT + block * 8, &value.to_le_bytes());
    }
    let own = [pattern(21, BLOCK), pattern(22, BLOCK)];
    put(&mut image, 9 << 20, &own[0]);
    put(&mut image, 11 << 20, &own[1]);
    let mut disk = below.to_vec();
    for sector in (0..100).chain([4095]).chain(1000..1009) {
        let bit = BLOCK / 512 + sector;
        image[(8 << 20) + bit / 8] |= 1 << (bit % 8);
        disk[BLOCK + sector * 512..][..512].copy_from_slice(&own[0][sector * 512..][..512]);
    }
    disk[2 * BLOCK..3 * BLOCK].copy_from_slice(&own[1]);
    disk[3 * BLOCK..4 * BLOCK].fill(0);
    (image, disk)
}

const BESIDE: &[(&str, &str)] =
    &[("relative_path", r".\parent.vhdx"), ("absolute_win32_path", r"\\?\C:\vms\parent.vhdx")];

/// A parent, a child, and what both read as, in a folder.
fn family(scratch: &Scratch, paths: &[(&str, &str)]) -> (Vec<u8>, Vec<u8>) {
    let below = pattern(9, usize::try_from(SIZE).expect("small"));
    fs::write(scratch.file("below"), &below).expect("write");
    scratch.vimg(&["convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", "below", "parent.vhdx"]);
    let (image, disk) = child(&fs::read(scratch.file("parent.vhdx")).expect("parent"), &below, paths);
    fs::write(scratch.file("child.vhdx"), &image).expect("write");
    (image, disk)
}

fn assert_reads(scratch: &Scratch, name: &str, disk: &[u8]) {
    scratch.vimg(&["convert", "-O", "raw", name, "read"]);
    let read = fs::read(scratch.file("read")).expect("read");
    assert_eq!(read.iter().zip(disk).position(|(a, b)| a != b), None, "{name}");
    assert_eq!(read.len(), disk.len());
    need("7z");
    scratch.sh(&format!("7z x -so -tvhdx {name} 2>log | cmp - read"));
}

#[test]
fn a_differencing_disk_is_read_and_written_through_its_parent() {
    let scratch = Scratch::new();
    let (image, mut disk) = family(&scratch, BESIDE);
    assert_reads(&scratch, "child.vhdx", &disk);
    scratch.vimg(&["check", "child.vhdx"]);
    let info = scratch.vimg(&["info", "--output=json", "child.vhdx"]).json();
    assert_eq!(info["backing-filename"], "parent.vhdx");
    assert_eq!(info["backing-filename-format"], "vhdx");
    need("vhdiinfo");
    let out = plain("vhdiinfo", &["child.vhdx"]).dir(scratch.path()).ok();
    assert!(out.stdout.contains("Disk type\t\t: Differential"), "{out:?}");
    // Writes of all kinds, against a plain buffer.
    let vhdx = format::find(FORMATS, "vhdx").expect("vhdx");
    let files = Files::default();
    for name in ["child.vhdx", "parent.vhdx"] {
        let bytes = fs::read(scratch.file(name)).expect("made");
        files.put(name, Arc::new(vimg::storage::memory::Memory::new(bytes)));
    }
    let open = || {
        let parent = inside::open(&files, vhdx, "parent.vhdx", false, None).expect("parent");
        inside::open(&files, vhdx, "child.vhdx", true, Some(Arc::new(parent))).expect("child")
    };
    let (mut rng, mut buffers, mut node) = (fastrand::Rng::with_seed(4), Buffers::default(), open());
    for n in 0..60 {
        let grain = [1, 512][rng.usize(..2)];
        let at = rng.usize(..disk.len()) / grain * grain;
        let longest = [700, 40_000, 3 << 20][rng.usize(..3)];
        let len = (1 + rng.usize(..longest)).min(disk.len() - at);
        let start = GuestOffset(at as u64);
        match rng.u8(..10) {
            0..6 => {
                let data = pattern(rng.u64(..), len);
                node.write(start, &data, &mut buffers).expect("write");
                disk[at..at + len].copy_from_slice(&data);
            }
            6..8 => {
                node.write_zeroes(start, len as u64, rng.bool(), &mut buffers).expect("zeros");
                disk[at..at + len].fill(0);
            }
            _ => {
                let mut read = vec![1; len];
                node.read(start, &mut read, &mut buffers).expect("read");
                assert!(read == disk[at..at + len], "{at}+{len}");
            }
        }
        if n % 20 == 19 {
            node.driver().close().expect("close");
            drop(node);
            files.save(scratch.path());
            assert_reads(&scratch, "child.vhdx", &disk);
            scratch.vimg(&["check", "child.vhdx"]);
            node = open();
        }
    }
    drop(node);
    let now = fs::read(scratch.file("child.vhdx")).expect("child");
    assert!(word(&now, BAT) != word(&image, BAT), "a block that was the parent's is partly the child's");
    scratch.vimg(&["resize", "child.vhdx", "11M"]);
    scratch.vimg(&["resize", "--shrink", "child.vhdx", "5000192"]);
    scratch.vimg(&["resize", "child.vhdx", "9M"]);
    disk[5_000_192..].fill(0);
    assert_reads(&scratch, "child.vhdx", &disk);
    scratch.vimg(&["check", "child.vhdx"]);
}

#[test]
fn a_resize_of_a_differencing_vhdx_may_stop_anywhere() {
    // Where the disk ends in a block that is partly its own, and in one that is all its parent's.
    for sizes in [&[5_000_192, 9 * M, 5000 * M][..], &[8_500_224, 9 * M], &[1_000_448, 9 * M]] {
        let scratch = Scratch::new();
        let (child, disk) = family(&scratch, BESIDE);
        let parent = ("parent.vhdx", fs::read(scratch.file("parent.vhdx")).expect("parent"));
        let mut pair = Pair { format: "vhdx", parent, child: ("child.vhdx", child), disk };
        for size in sizes {
            pair.resize_stopping_anywhere(&scratch, *size);
        }
    }
}

#[test]
fn a_parent_is_found_by_each_of_its_paths() {
    let scratch = Scratch::new();
    let volume = r"\\?\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\vms\parent.vhdx";
    let absolute = scratch.file("parent.vhdx").display().to_string();
    for paths in [
        &[("relative_path", r".\parent.vhdx")][..],
        &[("relative_path", r"nowhere\parent.vhdx")],
        &[("volume_path", volume)],
        &[("absolute_win32_path", r"C:\vms\parent.vhdx"), ("relative_path", r"..\gone.vhdx")],
        &[("absolute_win32_path", &*absolute)],
    ] {
        let (_, disk) = family(&scratch, paths);
        fs::create_dir_all(scratch.file("elsewhere")).expect("folder");
        for folder in [".", "elsewhere"] {
            let name = scratch.file("child.vhdx").display().to_string();
            let out = scratch.file("read").display().to_string();
            vimg(&["convert", "-O", "raw", &name, &out]).dir(scratch.file(folder)).ok();
            assert!(fs::read(scratch.file("read")).expect("read") == disk, "{paths:?}");
        }
        let out = vimg(&["convert", "-O", "raw", "--untrusted", "child.vhdx", "read"]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("parent.vhdx") || out.stderr.contains("gone.vhdx"), "{out:?}");
    }
    // By the user's word alone.
    let (_, disk) = family(&scratch, &[("relative_path", r"..\gone.vhdx")]);
    fs::rename(scratch.file("parent.vhdx"), scratch.file("moved")).expect("rename");
    let out = vimg(&["convert", "-O", "raw", "child.vhdx", "read"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("../gone.vhdx"), "{out:?}");
    let image = "driver=vhdx,file.filename=child.vhdx,backing.file.filename=moved";
    scratch.vimg(&["convert", "--image-opts", "-O", "raw", image, "read"]);
    assert!(fs::read(scratch.file("read")).expect("read") == disk);
}

/// The parent has another identifier then, and the child follows.
#[test]
fn a_committed_disk_is_still_its_parents() {
    let scratch = Scratch::new();
    let (_, disk) = family(&scratch, BESIDE);
    scratch.vimg(&["commit", "child.vhdx"]);
    assert_reads(&scratch, "child.vhdx", &disk);
    scratch.vimg(&["convert", "-O", "raw", "parent.vhdx", "read"]);
    assert!(fs::read(scratch.file("read")).expect("read") == disk);
    scratch.vimg(&["check", "child.vhdx"]);
    scratch.assert_clean("vhdx", "parent.vhdx");
}

#[test]
fn another_parent_than_the_one_it_was_made_on_is_refused() {
    let scratch = Scratch::new();
    let (image, _) = family(&scratch, BESIDE);
    let out = |args: &[&str]| vimg(args).dir(scratch.path()).fails(1);
    fs::copy(scratch.file("parent.vhdx"), scratch.file("kept")).expect("copy");
    scratch.vimg(&["convert", "-n", "-f", "raw", "-O", "vhdx", "below", "parent.vhdx"]);
    let refused = out(&["convert", "-O", "raw", "child.vhdx", "read"]);
    assert!(refused.stderr.contains("The parent has changed since this image was made"), "{refused:?}");
    let raw = "driver=vhdx,file.filename=child.vhdx,backing.driver=raw,backing.file.filename=below";
    let refused = out(&["convert", "--image-opts", "-O", "raw", raw, "read"]);
    assert!(refused.stderr.contains("The parent is not a vhdx image"), "{refused:?}");
    fs::copy(scratch.file("kept"), scratch.file("parent.vhdx")).expect("copy");
    // Locators that say nothing, or nothing that can be.
    let place = METADATA + 0x1_1000;
    for (at, bytes, said) in [
        (place, &[1][..], "a parent of the unknown kind"),
        (place + 18, &[200, 0], "too many entries"),
        (place + 20, &[0xff; 4], "a key is no text"),
        (place + 24, &[0xff; 4], "is no text"),
        (METADATA + 32 + 5 * 32 + 20, &[8, 0, 0, 0], "too short"),
        (METADATA + 10, &[5], "without a parent locator"),
        (BAT + BITMAP * 8, &[0], "has no sector bitmap"),
    ] {
        let mut wrong = image.clone();
        put(&mut wrong, at, bytes);
        fs::write(scratch.file("child.vhdx"), &wrong).expect("write");
        let refused = out(&["convert", "-O", "raw", "child.vhdx", "read"]);
        assert!(refused.stderr.contains(said), "{said}: {refused:?}");
    }
    let mut lost = image;
    put(&mut lost, BAT + BITMAP * 8, &[0; 8]);
    fs::write(scratch.file("child.vhdx"), &lost).expect("write");
    let out = vimg(&["check", "child.vhdx"]).dir(scratch.path()).fails(2);
    assert!(said(&out, "sector bitmap of block 1 is missing"), "{out:?}");
}
