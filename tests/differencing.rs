//! Differencing VHD and VDI disks: read and written through their parents, which have to be the ones that they were made
//! on. Nothing on this system makes them, so the tests do, from the specifications; 7z and libvhdi follow a VHD's parent.

use std::fs;
use std::sync::Arc;

use vimg::block::io::Scratch as Buffers;
use vimg::block::{GuestOffset, Node, format};
use vimg::formats::FORMATS;
use vimg::ops::resize;
use vimg::storage::fault::{Fault, Faulty};
use vimg::storage::memory::Memory;
use vimg::storage::{Preallocation, Storage};

use crate::common::inside::{self, Files};
use crate::common::{Scratch, need, pattern, vimg};
use crate::vhdx::{M, put};

const SIZE: u64 = 7 * M;

/// A parent and its child, made by a test.
struct Family {
    format: &'static str,
    options: &'static str,
    parent: &'static str,
    child: &'static str,
    /// Makes a child of what is empty, given the parent, and what it reads as of what that does.
    adopt: fn(&mut Vec<u8>, &[u8], &mut [u8]),
}

/// Puts the checksum of a footer or header in its place.
fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = !bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
}

fn utf16(text: &str, word: fn(u16) -> [u8; 2]) -> Vec<u8> {
    text.encode_utf16().flat_map(word).collect()
}

/// *Virtual Hard Disk Image Format Specification* 1.0: both of Windows' locators behind the table, then a block of which
/// some sectors are there, and one that is there as a whole.
fn adopt_vhd(image: &mut Vec<u8>, parent: &[u8], disk: &mut [u8]) {
    let mut footer = image[..512].to_vec();
    put(&mut footer, 60, &4u32.to_be_bytes());
    seal(&mut footer, 64);
    put(image, 0, &footer);
    put(image, 512 + 40, &parent[68..84]);
    put(image, 512 + 64, &utf16("parent.vhd", u16::to_be_bytes));
    let locators = [(b"W2ku", r"C:\vms\parent.vhd", 2048u64), (b"W2ru", r".\parent.vhd", 2560)];
    for (n, (code, path, at)) in locators.into_iter().enumerate() {
        let (text, entry) = (utf16(path, u16::to_le_bytes), 512 + 576 + n * 24);
        put(image, entry, code);
        put(image, entry + 4, &1u32.to_be_bytes());
        put(image, entry + 8, &(text.len() as u32).to_be_bytes());
        put(image, entry + 16, &at.to_be_bytes());
        image.resize(image.len().max(3072), 0);
        image[at as usize..at as usize + 512].fill(0);
        put(image, at as usize, &text);
    }
    seal(&mut image[512..1536], 36);
    let (block, stride) = (2 << 20, (2 << 20) + 512);
    let own = [pattern(31, block), pattern(32, block)];
    for (n, own) in own.iter().enumerate() {
        let at = 3072 + n * stride;
        put(image, 1536 + (n + 1) * 4, &((at / 512) as u32).to_be_bytes());
        let sectors: Vec<usize> = if n == 0 { (3..70).chain([4095]).collect() } else { (0..4096).collect() };
        put(image, at, &[0; 512]);
        for sector in sectors {
            image[at + sector / 8] |= 0x80 >> (sector % 8);
            let place = (n + 1) * block + sector * 512;
            disk[place..place + 512].copy_from_slice(&own[sector * 512..sector * 512 + 512]);
        }
        put(image, at + 512, own);
    }
    put(image, 3072 + 2 * stride, &footer);
}

/// As VirtualBox's documentation has it: a block of its own, one of zeros, the others the parent's.
fn adopt_vdi(image: &mut Vec<u8>, parent: &[u8], disk: &mut [u8]) {
    put(image, 0x4c, &4u32.to_le_bytes());
    put(image, 0x1a8, &parent[0x188..0x198]);
    put(image, 0x1b8, &parent[0x198..0x1a8]);
    // The parent's maker gave it, and this one, the same.
    image[0x188] ^= 1;
    put(image, 0x184, &1u32.to_le_bytes());
    let (map, data) = (0x200, u32::from_le_bytes(image[0x158..0x15c].try_into().expect("4")) as usize);
    put(image, map + 4, &0u32.to_le_bytes());
    put(image, map + 8, &0xffff_fffeu32.to_le_bytes());
    let own = pattern(33, 1 << 20);
    put(image, data, &own);
    disk[1 << 20..2 << 20].copy_from_slice(&own);
    disk[2 << 20..3 << 20].fill(0);
}

const FAMILIES: &[Family] = &[
    Family { format: "vpc", options: "force_size=on", parent: "parent.vhd", child: "child.vhd", adopt: adopt_vhd },
    Family {
        format: "vpc",
        options: "force_size=on,subformat=fixed",
        parent: "parent.vhd",
        child: "child.vhd",
        adopt: adopt_vhd,
    },
    Family { format: "vdi", options: "static=off", parent: "base.vdi", child: "child.vdi", adopt: adopt_vdi },
];

impl Family {
    /// In a folder; what the child reads as.
    fn make(&self, scratch: &Scratch) -> Vec<u8> {
        let mut disk = pattern(9, usize::try_from(SIZE).expect("small"));
        fs::write(scratch.file("below"), &disk).expect("write");
        let options = ["convert", "-f", "raw", "-O", self.format, "-o", self.options, "below", self.parent];
        scratch.vimg(&options);
        let parent = fs::read(scratch.file(self.parent)).expect("parent");
        let uuid = if self.options.contains("fixed") { parent[parent.len() - 512..].to_vec() } else { parent };
        let vimg = format::find(FORMATS, self.format).expect("a format of ours");
        let text = if self.format == "vpc" { "force_size=on" } else { "" };
        let mut image = inside::bytes_of(&*inside::create(vimg, "a", SIZE, text).get("a").expect("made"));
        (self.adopt)(&mut image, &uuid, &mut disk);
        fs::write(scratch.file(self.child), &image).expect("write");
        disk
    }

    fn assert_reads(&self, scratch: &Scratch, disk: &[u8]) {
        scratch.vimg(&["check", "-f", self.format, self.child]);
        scratch.vimg(&["convert", "-f", self.format, "-O", "raw", self.child, "read"]);
        let read = fs::read(scratch.file("read")).expect("read");
        assert_eq!(read.iter().zip(disk).position(|(a, b)| a != b), None, "{}", self.child);
        assert_eq!(read.len(), disk.len());
        // 7z ends where the parent does.
        if self.format == "vpc" && disk.len() as u64 <= SIZE {
            need("7z");
            scratch.sh(&format!("7z x -so -tvhd {} 2>log | cmp - read", self.child));
        }
    }
}

#[test]
fn differencing_disks_are_read_and_written_through_their_parents() {
    for family in FAMILIES {
        let scratch = Scratch::new();
        let mut disk = family.make(&scratch);
        family.assert_reads(&scratch, &disk);
        let info = scratch.vimg(&["info", "--output=json", "-f", family.format, family.child]).json();
        assert_eq!(info["backing-filename"], family.parent);
        let format = format::find(FORMATS, family.format).expect("a format of ours");
        let files = Files::default();
        for name in [family.child, family.parent] {
            files.put(name, Arc::new(Memory::new(fs::read(scratch.file(name)).expect("made"))));
        }
        let open = || {
            let parent = inside::open(&files, format, family.parent, false, None).expect("parent");
            inside::open(&files, format, family.child, true, Some(Arc::new(parent))).expect("child")
        };
        let (mut rng, mut buffers, mut node) = (fastrand::Rng::with_seed(4), Buffers::default(), open());
        for n in 0..45 {
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
                    assert!(read == disk[at..at + len], "{}: {at}+{len}", family.child);
                }
            }
            if n % 15 == 14 {
                node.driver().close().expect("close");
                drop(node);
                files.save(scratch.path());
                family.assert_reads(&scratch, &disk);
                node = open();
            }
        }
    }
}

/// What the disk gets reads as zeros, whatever the parent has there.
#[test]
fn differencing_disks_are_resized() {
    for family in FAMILIES {
        let scratch = Scratch::new();
        let mut disk = family.make(&scratch);
        let resize = |more: &[&str]| {
            let args = [&["resize", "-q", "-f", family.format], more].concat();
            scratch.vimg(&args);
            scratch.vimg(&["check", "-f", family.format, family.child]);
        };
        resize(&[family.child, "9M"]);
        disk.resize(9 << 20, 0);
        family.assert_reads(&scratch, &disk);
        resize(&["--shrink", family.child, "5000192"]);
        resize(&[family.child, "7M"]);
        disk.truncate(7 << 20);
        disk[5_000_192..].fill(0);
        family.assert_reads(&scratch, &disk);
        // Past what the tables have room for where they are.
        resize(&[family.child, "1300M"]);
        let bench = "-q -w -c 1 -s 65536 -o 900M --pattern 65 -f";
        let bench: Vec<&str> = bench.split(' ').chain([family.format, family.child]).collect();
        scratch.vimg(&[&["bench"], &bench[..]].concat());
        fs::write(scratch.file("want"), &disk).expect("write");
        let write = "truncate -s 900M want; head -c 65536 /dev/zero | tr '\\0' A >>want; truncate -s 1300M want";
        scratch.sh(write);
        scratch.vimg(&["compare", "-f", family.format, "-F", "raw", family.child, "want"]);
        resize(&["--shrink", family.child, "7M"]);
        family.assert_reads(&scratch, &disk);
    }
}

/// A child in a file, of a parent in another, and what it reads as.
pub struct Pair<'a> {
    pub format: &'a str,
    pub parent: (&'a str, Vec<u8>),
    pub child: (&'a str, Vec<u8>),
    pub disk: Vec<u8>,
}

impl Pair<'_> {
    fn open(&self, child: Arc<dyn Storage>, write: bool) -> vimg::block::Result<Node> {
        let (files, format) = (Files::default(), format::find(FORMATS, self.format).expect("a format of ours"));
        files.put(self.parent.0, Arc::new(Memory::new(self.parent.1.clone())));
        files.put(self.child.0, child);
        let parent = inside::open(&files, format, self.parent.0, false, None)?;
        inside::open(&files, format, self.child.0, write, Some(Arc::new(parent)))
    }

    /// Wherever a change of the size stops, the disk has one of the two sizes and what it had, and zeros behind that.
    /// The child has its new size then.
    pub fn resize_stopping_anywhere(&mut self, scratch: &Scratch, size: u64) {
        let run = |faulty: &dyn Fn(Arc<dyn Storage>) -> Faulty| {
            let plain: Arc<dyn Storage> = Arc::new(Memory::new(self.child.1.clone()));
            let faulty = Arc::new(faulty(Arc::clone(&plain)));
            let node = self.open(Arc::clone(&faulty) as Arc<dyn Storage>, true);
            (plain, faulty, node.and_then(|node| resize::resize(&node, size, Preallocation::Off)))
        };
        let (whole, recorded, done) = run(&Faulty::recording);
        let count = recorded.operations().len();
        assert!(done.is_ok() && count > 3, "{count}: {done:?}");
        let old = self.disk.len() as u64;
        let (mut sizes, kept) = ([0; 2], usize::try_from(old.min(size)).expect("small"));
        for at in 0..=count {
            let (plain, ..) = run(&|inner| Faulty::new(inner, at, Fault::Stop));
            let what = format!("{} to {size}, stopped at {at} of {count}", self.child.0);
            fs::write(scratch.file(self.child.0), inside::bytes_of(&*plain)).expect("write");
            let out = vimg(&["check", "-f", self.format, self.child.0]).dir(scratch.path()).run();
            // Two footers, or a vdi's map and its counter of blocks, do not change in one write.
            let mut wrong = out.stderr.lines().filter(|line| line.starts_with("ERROR"));
            let sound = wrong.all(|line| line.contains("footer") || line.contains("allocated blocks mismatch"));
            assert!(matches!(out.code, Some(0 | 2 | 3)) && sound, "{what}: {out:?}");
            let node = self.open(plain, false).expect(&what);
            let is = [old, size].iter().position(|size| *size == node.virtual_size());
            sizes[is.unwrap_or_else(|| panic!("{what}: {}", node.virtual_size()))] += 1;
            let mut read = vec![1; usize::try_from(node.virtual_size().min(9 * M)).expect("small")];
            node.read(GuestOffset(0), &mut read, &mut Buffers::default()).expect(&what);
            assert!(read[..kept] == self.disk[..kept], "{what}");
            assert!(size < old || read[kept..].iter().all(|byte| *byte == 0), "{what}: not zeros past the old end");
        }
        assert!(sizes[0] > 0 && sizes[1] > 0, "{sizes:?} of {count}");
        self.child.1 = inside::bytes_of(&*whole);
        self.disk.truncate(kept);
        self.disk.resize(usize::try_from(size.min(9 * M)).expect("small"), 0);
    }
}

#[test]
fn a_resize_of_a_differencing_disk_may_stop_anywhere() {
    for family in FAMILIES {
        for sizes in [&[1300 * M][..], &[3_000_320, 7 * M, 9 * M], &[5_000_192, 7 * M]] {
            let scratch = Scratch::new();
            let disk = family.make(&scratch);
            let [parent, child] =
                [family.parent, family.child].map(|name| (name, fs::read(scratch.file(name)).expect("made")));
            let mut pair = Pair { format: family.format, parent, child, disk };
            for size in sizes {
                pair.resize_stopping_anywhere(&scratch, *size);
            }
        }
    }
}

#[test]
fn differencing_disks_keep_the_parents_that_they_were_made_on() {
    for family in FAMILIES {
        let scratch = Scratch::new();
        let disk = family.make(&scratch);
        fs::copy(scratch.file(family.parent), scratch.file("other")).expect("copy");
        for more in [&["-u", "-b", "other"][..], &["-b", "other"], &["-u"], &["-b", ""]] {
            let args = [&["rebase", "-f", family.format, "-F", family.format], more, &[family.child]].concat();
            let out = vimg(&args).dir(scratch.path()).fails(1);
            let said = format!("a {} image keeps the parent that it was made on", family.format);
            assert!(out.stderr.contains(&said), "{out:?}");
        }
        family.assert_reads(&scratch, &disk);
    }
}

#[test]
fn a_parent_is_found_and_has_to_be_the_right_one() {
    for family in FAMILIES {
        let scratch = Scratch::new();
        let disk = family.make(&scratch);
        let convert = |image: &str| {
            let image = format!("driver={},file.filename={}{image}", family.format, family.child);
            vimg(&["convert", "--image-opts", "-O", "raw", &image, "read"]).dir(scratch.path())
        };
        fs::rename(scratch.file(family.parent), scratch.file("moved")).expect("rename");
        let gone = convert("").fails(1);
        assert!(gone.stderr.contains("Could not open backing file"), "{gone:?}");
        convert(",backing.file.filename=moved").ok();
        assert!(fs::read(scratch.file("read")).expect("read") == disk);
        let raw = convert(",backing.driver=raw,backing.file.filename=below").fails(1);
        assert!(raw.stderr.contains(&format!("The parent is not a {} image", family.format)), "{raw:?}");
        scratch.vimg(&["create", "-q", "-f", family.format, "other", "7M"]);
        let other = convert(",backing.file.filename=other").fails(1);
        assert!(other.stderr.contains("The parent is not the one that this image was made on"), "{other:?}");
        fs::rename(scratch.file("moved"), scratch.file(family.parent)).expect("rename");
        let out = vimg(&["convert", "--untrusted", "-f", family.format, "-O", "raw", family.child, "read"])
            .dir(scratch.path())
            .fails(1);
        assert!(out.stderr.contains("vhd") || out.stderr.contains("vdi"), "{out:?}");
    }
}

/// VirtualBox names a snapshot's image by its UUID; any other name will do.
#[test]
fn the_parent_of_a_vdi_is_found_by_its_uuid() {
    let scratch = Scratch::new();
    let family = &FAMILIES[2];
    let disk = family.make(&scratch);
    // Files that are none, and one in the way.
    fs::write(scratch.file("a.vdi"), [0; 100]).expect("write");
    fs::create_dir(scratch.file("b.vdi")).expect("folder");
    scratch.sh("mkfifo c.vdi");
    for name in ["z.VDI", "{00000000-1111-2222-3333-444444444444}.vdi"] {
        fs::rename(scratch.file("base.vdi"), scratch.file(name)).expect("rename");
        family.assert_reads(&scratch, &disk);
        let child = scratch.file("child.vdi").display().to_string();
        let out = scratch.file("read").display().to_string();
        vimg(&["convert", "-f", "vdi", "-O", "raw", &child, &out]).dir("/").ok();
        assert!(fs::read(&out).expect("read") == disk);
        fs::rename(scratch.file(name), scratch.file("base.vdi")).expect("rename");
    }
    fs::remove_file(scratch.file("base.vdi")).expect("remove");
    let out = vimg(&["convert", "-O", "raw", "child.vdi", "read"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("}.vdi"), "{out:?}");
}
