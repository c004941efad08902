//! `check` of every kind of damage: what is found, what is mended, and what a repair that is stopped leaves.
//!
//! Each image is made by the judge, and damaged by a change of a few bytes. What was mended is clean for the judge and
//! for the format's own tools, and reads as it did before it was mended.

use std::fs;
use std::sync::Arc;

use vimg::block::io::Scratch as Buffers;
use vimg::block::{Fix, GuestOffset, format};
use vimg::formats::FORMATS;
use vimg::storage::fault::{Fault, Faulty};
use vimg::storage::memory::Memory;

use crate::common::inside::{self, Files};
use crate::common::{Scratch, judge, plain, vimg, write_pattern};
use crate::rig::open_bytes;

const IMAGE: &str = "image";

/// One change of an image.
struct Damage {
    change: fn(&mut Vec<u8>),
    /// Lines of standard error.
    found: &'static [&'static str],
    /// The exit code.
    code: i32,
    /// All of it can be mended.
    mended: bool,
}

/// What is done to an image's bytes.
type Change = fn(&mut Vec<u8>);

const fn lost(found: &'static [&'static str], change: fn(&mut Vec<u8>)) -> Damage {
    Damage { change, found, code: 2, mended: false }
}

const fn mended(found: &'static [&'static str], change: fn(&mut Vec<u8>)) -> Damage {
    Damage { change, found, code: 2, mended: true }
}

const fn leaked(found: &'static [&'static str], change: fn(&mut Vec<u8>)) -> Damage {
    Damage { change, found, code: 3, mended: true }
}

/// An image of a format, and what can be wrong with it.
struct Kind {
    format: &'static str,
    /// Makes it, under the name `image`.
    make: &'static str,
    /// A program that must accept it.
    reader: Option<&'static str>,
    damages: &'static [Damage],
}

impl Kind {
    fn bytes(&self, scratch: &Scratch) -> Vec<u8> {
        scratch.sh(self.make);
        std::fs::read(scratch.file(IMAGE)).expect("image")
    }

    fn every_damage_is_found(&self) {
        let scratch = Scratch::new();
        let whole = self.bytes(&scratch);
        let check = |args: &[&str]| {
            let out = vimg(&[&["check", "-f", self.format], args, &[IMAGE]].concat()).dir(scratch.path()).run();
            (out.code, out.stderr.lines().map(str::to_owned).collect::<Vec<_>>())
        };
        assert_eq!(check(&[]), (Some(0), vec![]), "{}: it is whole", self.format);
        for Damage { change, found, code, mended } in self.damages {
            let what = format!("{}: {found:?}", self.format);
            let mut bytes = whole.clone();
            change(&mut bytes);
            std::fs::write(scratch.file(IMAGE), &bytes).expect("write");
            assert_eq!(check(&[]), (Some(*code), found.iter().map(|line| (*line).to_owned()).collect()), "{what}");
            assert_eq!(check(&["-q", "--output=json"]).0, Some(*code), "{what}");
            assert_eq!(std::fs::read(scratch.file(IMAGE)).expect("read"), bytes, "{what}: a check changes nothing");
            if *code == 2 {
                assert_eq!(check(&["-r", "leaks"]).0, Some(2), "{what}");
                assert_eq!(std::fs::read(scratch.file(IMAGE)).expect("read"), bytes, "{what}: these are no leaks");
            }
            let content = mended.then(|| self.mended_content(&whole, &bytes));
            let fix = if *code == 3 { "leaks" } else { "all" };
            let (after, _) = check(&["-r", fix]);
            let now = std::fs::read(scratch.file(IMAGE)).expect("read");
            let Some(content) = content else {
                assert_eq!(after, Some(*code), "{what}: it cannot be mended");
                assert!(now == bytes, "{what}: what cannot be mended is left alone");
                continue;
            };
            assert_eq!((after, check(&[])), (Some(0), (Some(0), vec![])), "{what}: it is mended");
            assert!(read_all(&now, self.format) == Some(content.clone()), "{what}: the guest's data is there");
            let out = judge(&["check", "-f", self.format, IMAGE]).dir(scratch.path()).run();
            assert!(matches!(out.code, Some(0 | 63)), "{what}: {out:#?}");
            scratch.judge(&["convert", "-f", self.format, "-O", "raw", IMAGE, "raw"]);
            assert!(std::fs::read(scratch.file("raw")).expect("raw") == content, "{what}: the judge reads it");
            if let Some(reader) = self.reader {
                plain(reader, &[IMAGE]).dir(scratch.path()).ok();
            }
        }
    }

    /// What the guest shall read once it is mended: in a vmdk, whose tables are there twice, what was there before the
    /// damage; else what it read before it was mended.
    fn mended_content(&self, whole: &[u8], damaged: &[u8]) -> Vec<u8> {
        read_all(if self.format == "vmdk" { whole } else { damaged }, self.format).expect("it can be read")
    }

    /// Stopped before any write, a repair leaves nothing that is worse, and the next one completes it.
    fn repairs_can_be_stopped(&self) {
        let scratch = Scratch::new();
        let whole = self.bytes(&scratch);
        let format = format::find(FORMATS, self.format).expect("a format of ours");
        for Damage { change, found, .. } in self.damages.iter().filter(|damage| damage.mended) {
            let mut bytes = whole.clone();
            change(&mut bytes);
            let content = [read_all(&bytes, self.format), Some(self.mended_content(&whole, &bytes))];
            let before = inside::check(&one(&bytes), format, IMAGE, Fix::Nothing).expect("check");
            let mut at = 0;
            loop {
                let what = format!("{}: {found:?}: stopped at {at}", self.format);
                let memory = Arc::new(Memory::new(bytes.clone()));
                let faulty = Arc::new(Faulty::new(memory.clone(), at, Fault::Stop));
                let files = Files::default();
                files.put(IMAGE, faulty.clone());
                let _ = inside::check(&files, format, IMAGE, Fix::All);
                let left = memory.to_vec();
                let after = inside::check(&one(&left), format, IMAGE, Fix::Nothing).expect("check");
                assert!(after.corruptions <= before.corruptions, "{what}: {after:?}");
                assert!(content.contains(&read_all(&left, self.format)), "{what}: the guest's data is there");
                let again = one(&left);
                inside::check(&again, format, IMAGE, Fix::All).expect("repair");
                let last = inside::check(&again, format, IMAGE, Fix::Nothing).expect("check");
                assert_eq!((last.corruptions, last.leaks), (0, 0), "{what}: {last:?}");
                let now = inside::bytes_of(&*again.get(IMAGE).expect("image"));
                assert!(read_all(&now, self.format) == content[1], "{what}: the guest's data is there when mended");
                if !faulty.tripped() {
                    break;
                }
                at += 1;
            }
            assert!(at > 0, "{}: {found:?}: nothing is written", self.format);
        }
    }
}

fn one(bytes: &[u8]) -> Files {
    let files = Files::default();
    files.put(IMAGE, Arc::new(Memory::new(bytes.to_vec())));
    files
}

/// The whole disk, if all of it can be read.
fn read_all(bytes: &[u8], format: &str) -> Option<Vec<u8>> {
    let node = open_bytes(bytes.to_vec(), format, false).expect("open");
    let mut all = vec![0xee; usize::try_from(node.virtual_size()).expect("small")];
    node.read(GuestOffset(0), &mut all, &mut Buffers::default()).ok()?;
    Some(all)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn le32(bytes: &mut [u8], at: usize, value: u32) {
    put(bytes, at, &value.to_le_bytes());
}

fn be32(bytes: &mut [u8], at: usize, value: u32) {
    put(bytes, at, &value.to_be_bytes());
}

fn be64(bytes: &mut [u8], at: usize, value: u64) {
    put(bytes, at, &value.to_be_bytes());
}

fn get_le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The map is at 512, the blocks are from 1024 on: guest blocks 1, 2 and 5.
const VDI: Kind = Kind {
    format: "vdi",
    make: "qemu-img create -q -f vdi image 8M && \
           qemu-io -f vdi -c 'write -P 1 1M 1M' -c 'write -P 2 2M 1M' -c 'write -P 3 5M 64k' image",
    reader: None,
    damages: &[
        mended(&["ERROR: block index 1 also used by 1"], |b| le32(b, 512 + 5 * 4, 1)),
        mended(
            &[
                "ERROR: block index 0 also used by 0",
                "ERROR: block index 0 also used by 0",
                "ERROR: block index 0 also used by 0",
                "ERROR: allocated blocks mismatch, is 4, should be 3",
            ],
            |b| [2, 3, 5].into_iter().for_each(|n| le32(b, 512 + n * 4, 0)),
        ),
        mended(&["ERROR: allocated blocks mismatch, is 3, should be 1"], |b| le32(b, 0x184, 1)),
        mended(&["ERROR: allocated blocks mismatch, is 3, should be 7"], |b| le32(b, 0x184, 7)),
        mended(&["ERROR: block index 4 in use, allocated blocks are 3"], |b| {
            b.resize(1024 + (4 << 20), 7);
            let last = b[1024 + (2 << 20)..1024 + (3 << 20)].to_vec();
            b.extend_from_slice(&last);
            le32(b, 512 + 5 * 4, 4);
        }),
        leaked(&["Leaked 2 blocks at the end of the file"], |b| b.resize(b.len() + (2 << 20), 9)),
        lost(&["ERROR: block index 5 too large, is 8", "ERROR: allocated blocks mismatch, is 2, should be 3"], |b| {
            le32(b, 512 + 5 * 4, 8)
        }),
        lost(&["ERROR: block index 5 lies past the end of the file, is 6"], |b| le32(b, 512 + 5 * 4, 6)),
        lost(&["ERROR: block index 5 lies past the end of the file, is 2"], |b| b.truncate(b.len() - 512)),
        lost(&["ERROR: block map at 512 lies past the end of the file at 530"], |b| b.truncate(530)),
        lost(&["ERROR: header, block map at 512 and blocks at 512 overlap"], |b| le32(b, 0x158, 512)),
    ],
};

/// Puts the checksum of a footer right.
fn seal(bytes: &mut [u8], at: usize) {
    put(bytes, at + 64, &[0; 4]);
    let sum: u32 = bytes[at..at + 512].iter().map(|byte| u32::from(*byte)).sum();
    be32(bytes, at + 64, !sum);
}

/// The table is at 1536, the blocks are from 2048 on: guest blocks 0 and 2.
const VPC: Kind = Kind {
    format: "vpc",
    make: "qemu-img create -q -f vpc -o force_size=on image 8M && \
           qemu-io -f vpc -c 'write -P 1 0 2M' -c 'write -P 2 5M 64k' image",
    reader: Some("vhdiinfo"),
    damages: &[
        mended(&["ERROR: copy of the footer at the start is missing"], |b| put(b, 0, &[0; 512])),
        mended(&["ERROR: copy of the footer at the start is damaged"], |b| b[100] ^= 1),
        mended(&["ERROR: footer at the end of the file is missing"], |b| b.truncate(b.len() - 512)),
        mended(&["ERROR: footer at the end of the file is damaged"], |b| {
            let at = b.len() - 300;
            b[at] ^= 8;
        }),
        mended(&["ERROR: footer at the end of the file and its copy at the start differ"], |b| {
            let at = b.len() - 512;
            b[at + 27] ^= 8;
            seal(b, at);
        }),
        // A block was on its way.
        mended(&["ERROR: footer at the end of the file is missing", "Leaked 1 blocks behind the last one"], |b| {
            let at = b.len() - 512;
            b[at..].fill(0xff);
            b.resize(at + 512 + (2 << 20) + 512, 3);
        }),
        leaked(&["Leaked 2 blocks behind the last one"], |b| {
            let footer = b.split_off(b.len() - 512);
            b.resize(b.len() + (4 << 20) + 1024, 3);
            b.extend_from_slice(&footer);
        }),
        lost(&["ERROR: checksum of the dynamic header is wrong"], |b| b[512 + 1000] ^= 1),
        lost(&["ERROR: block 2 at offset 51200000 lies past the end of the file"], |b| be32(b, 1536 + 8, 100_000)),
        lost(&["ERROR: block 2 at offset 2048 overlaps what else is there"], |b| be32(b, 1536 + 8, 4)),
        lost(&["ERROR: block 2 at offset 512 overlaps what else is there"], |b| be32(b, 1536 + 8, 1)),
        lost(
            &[
                "ERROR: footer at the end of the file is missing",
                "ERROR: block 2 at offset 2099712 lies past the end of the file",
            ],
            |b| b.truncate(3 << 20),
        ),
    ],
};

/// The L1 table is at 48; L2 tables are at 4096 (for the first 2 MiB) and behind the first clusters.
const QCOW: Kind = Kind {
    format: "qcow",
    make: "qemu-img create -q -f qcow image 8M && \
           qemu-io -f qcow -c 'write -P 1 0 64k' -c 'write -P 2 3M 32k' image",
    reader: Some("qcowinfo"),
    damages: &[
        leaked(&["Leaked 3 clusters at the end of the file"], |b| b.resize(b.len() + 3 * 4096 + 100, 5)),
        lost(&["ERROR: L2 table 1 at offset 10485760 lies past the end of the file"], |b| be64(b, 56, 10 << 20)),
        lost(&["ERROR: L2 table 1 at offset 4096 overlaps another one"], |b| be64(b, 56, 4096)),
        lost(&["ERROR: cluster 0 at offset 8192 overlaps what else is there"], |b| {
            b.copy_within(73728..73728 + 4096, 8192);
            be64(b, 56, 8192);
        }),
        lost(&["ERROR: cluster 1 at offset 8192 overlaps what else is there"], |b| be64(b, 4096 + 8, 8192)),
        lost(&["ERROR: cluster 3 at offset 4096 overlaps what else is there"], |b| be64(b, 4096 + 24, 4096)),
        lost(&["ERROR: cluster 0 at offset 4611686018427387904 lies past the end of the file"], |b| {
            be64(b, 4096, 1 << 62);
        }),
        lost(&["ERROR: cluster 775 at offset 106496 lies past the end of the file"], |b| b.truncate(b.len() - 512)),
        lost(&["ERROR: L1 table at offset 48 lies past the end of the file"], |b| b.truncate(70)),
        lost(&["ERROR: compressed cluster 2 at offset 12288 has no data"], |b| {
            be64(b, 4096 + 16, 1 << 63 | 12288);
        }),
        lost(&["ERROR: cluster 2 at offset 110000 lies past the end of the file"], |b| {
            be64(b, 4096 + 16, 1 << 63 | 4000 << 51 | 110_000);
        }),
    ],
};

/// The redundant directory is at sector 21, its tables from 22 on; the directory at 30, its tables at 31 and 35; grains
/// from 128 on.
const VMDK: Kind = Kind {
    format: "vmdk",
    make: "qemu-img create -q -f vmdk image 60M && \
           qemu-io -f vmdk -c 'write -P 1 0 64k' -c 'write -P 2 1M 128k' -c 'write -P 3 40M 4k' image",
    reader: Some("vmdkinfo"),
    damages: &[
        mended(&["ERROR: image: redundant grain table 0 differs from the first one"], |b| le32(b, 22 * 512 + 64, 0)),
        mended(&["ERROR: image: redundant grain table 1 is missing"], |b| le32(b, 21 * 512 + 4, 0)),
        mended(&["ERROR: image: redundant grain table 1 lies past the end of the file"], |b| {
            le32(b, 21 * 512 + 4, 0x7fff_ffff);
        }),
        // Its place is not its own.
        mended(&["ERROR: image: redundant grain table 1 differs from the first one"], |b| le32(b, 21 * 512 + 4, 128)),
        mended(
            &[
                "ERROR: image: grain table 0 lies past the end of the file",
                "ERROR: image: redundant grain table 0 differs from the first one",
            ],
            |b| le32(b, 30 * 512, 99999),
        ),
        mended(
            &[
                "ERROR: image: grain table 1 overlaps another one",
                "ERROR: image: redundant grain table 1 differs from the first one",
            ],
            |b| {
                let table = get_le32(b, 30 * 512);
                le32(b, 30 * 512 + 4, table);
            },
        ),
        mended(
            &[
                "ERROR: cluster offset for sector 2048 points after EOF",
                "ERROR: image: redundant grain table 0 differs from the first one",
            ],
            |b| le32(b, 31 * 512 + 64, 99999),
        ),
        mended(
            &[
                "ERROR: image: cluster for sector 2048 overlaps what else is there",
                "ERROR: image: redundant grain table 0 differs from the first one",
            ],
            |b| le32(b, 31 * 512 + 64, 128),
        ),
        lost(&["ERROR: image: cluster for sector 2048 overlaps what else is there"], |b| {
            [22, 31].into_iter().for_each(|table| le32(b, table * 512 + 64, 1))
        }),
        lost(&["ERROR: image: redundant grain directory lies past the end of the file"], |b| b[0x34] = 2),
        lost(&["ERROR: image: redundant grain directory lies past the end of the file"], |b| le32(b, 0x30, 100_000)),
        lost(&["ERROR: image: grain directory lies past the end of the file"], |b| b[0x3c] = 2),
        lost(&["ERROR: image: metadata at offset 10240 overlaps other metadata"], |b| {
            // Its tables are named in the descriptor's last sector.
            let directory = b[21 * 512..22 * 512].to_vec();
            put(b, 20 * 512, &directory);
            le32(b, 0x30, 20);
        }),
        lost(&["ERROR: image: cluster for sector 81920 is cut off by EOF"], |b| b.truncate(b.len() - 512)),
        lost(&["ERROR: cluster offset for sector 81920 points after EOF"], |b| b.truncate(b.len() - 65536)),
    ],
};

#[test]
fn damage_of_a_vdi_is_found_and_mended() {
    VDI.every_damage_is_found();
}

#[test]
fn damage_of_a_vpc_is_found_and_mended() {
    VPC.every_damage_is_found();
}

#[test]
fn damage_of_a_qcow_is_found_and_mended() {
    QCOW.every_damage_is_found();
}

#[test]
fn damage_of_a_vmdk_is_found_and_mended() {
    VMDK.every_damage_is_found();
}

#[test]
fn repairs_can_be_stopped_anywhere() {
    for kind in [VDI, VPC, QCOW, VMDK] {
        kind.repairs_can_be_stopped();
    }
}

#[test]
fn a_mended_copy_leaves_the_image_alone() {
    for kind in [VDI, VPC, QCOW, VMDK] {
        let scratch = Scratch::new();
        let whole = kind.bytes(&scratch);
        let damage = kind.damages.iter().find(|damage| damage.mended).expect("one that can be mended");
        let mut bytes = whole.clone();
        (damage.change)(&mut bytes);
        std::fs::write(scratch.file(IMAGE), &bytes).expect("write");
        std::fs::write(scratch.file("copy"), "what was there").expect("write");
        let to = |image: &str, copy: &str| {
            vimg(&["check", "-f", kind.format, "--repair-to", copy, image]).dir(scratch.path()).run()
        };
        let out = to(IMAGE, "copy");
        assert_eq!(out.code, Some(0), "{}: {out:#?}", kind.format);
        assert!(out.stdout.contains("Double checking the fixed image now..."), "{out:#?}");
        assert!(std::fs::read(scratch.file(IMAGE)).expect("read") == bytes, "{}: changed", kind.format);
        let copy = std::fs::read(scratch.file("copy")).expect("copy");
        assert!(read_all(&copy, kind.format) == Some(kind.mended_content(&whole, &bytes)), "{}", kind.format);
        vimg(&["check", "-f", kind.format, "copy"]).dir(scratch.path()).ok();
        let out = to("copy", "./copy");
        assert_eq!(out.code, Some(1), "{out:#?}");
        assert!(out.stderr.contains("'./copy' is the image itself"), "{out:#?}");
        assert!(std::fs::read(scratch.file("copy")).expect("copy") == copy, "{}: it is as it was", kind.format);
    }
}

#[test]
fn a_mended_copy_of_a_qcow2_is_sparse_and_clean() {
    let scratch = Scratch::new();
    scratch.sh(
        "qemu-img create -q -f qcow2 a 1G && qemu-io -c 'write -P 1 64k 64k' -c 'write -P 2 900M 64k' a && \
         printf '\\000\\000' | dd of=a bs=1 seek=$((0x20006)) conv=notrunc && truncate -s 300M a && cp --sparse=always a a0",
    );
    scratch.judge(&["convert", "-O", "raw", "a", "before"]);
    let out = vimg(&["check", "--repair-to", "b", "--output=json", "a"]).dir(scratch.path()).run();
    assert_eq!(out.code, Some(0), "{out:#?}");
    assert_eq!((out.json()["filename"].as_str(), out.json()["corruptions-fixed"].as_u64()), (Some("b"), Some(1)));
    scratch.sh("cmp a a0");
    assert_eq!(judge(&["check", "a"]).dir(scratch.path()).run().code, Some(2), "it is as damaged as it was");
    scratch.assert_clean("qcow2", "b");
    scratch.assert_same_content("raw", "before", "qcow2", "b");
    use std::os::unix::fs::MetadataExt;
    let blocks = std::fs::metadata(scratch.file("b")).expect("b").blocks();
    assert!(blocks * 512 < 2 << 20, "{blocks} blocks");
}

#[test]
fn no_mended_copy_is_made_of_what_cannot_be_copied_or_checked() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 9M && truncate -s 1M raw && \
         qemu-img create -q -f vdi whole 9M && truncate -s 100 whole");
    for (format, image, code, text) in [
        ("vmdk", "split.vmdk", 1, "'split.vmdk' has several files, of which no mended copy can be made"),
        ("raw", "raw", 63, "This image format does not support checks"),
        ("vdi", "whole", 1, "VDI"),
    ] {
        let out = vimg(&["check", "-f", format, "--repair-to", "copy", image]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(code), "{out:#?}");
        assert!(out.stderr.contains(text), "{out:#?}");
        assert!(!scratch.file("copy").exists(), "{image}");
    }
}

#[test]
fn a_copy_far_from_its_backing_file_is_warned_of() {
    let scratch = Scratch::new();
    scratch.sh("mkdir far && truncate -s 1M base && qemu-img create -q -f qcow2 -b base -F raw a");
    let out = scratch.vimg(&["check", "--repair-to", "far/b", "a"]);
    assert!(out.stderr.contains("warning: From where 'far/b' is, its backing file 'base' is not found"), "{out:#?}");
    assert_eq!(scratch.vimg(&["check", "--repair-to", "b", "a"]).stderr, "");
}

#[test]
fn an_untrusted_overlay_is_checked_alone() {
    let scratch = Scratch::new();
    scratch.sh("truncate -s 1M base && qemu-img create -q -f qcow2 -b base -F raw a && rm base");
    scratch.vimg(&["--untrusted", "check", "a"]);
    vimg(&["check", "a"]).dir(scratch.path()).fails(1);
}

#[test]
fn a_truncated_image_is_never_without_errors() {
    let scratch = Scratch::new();
    crate::fixtures::unpack(scratch.path());
    for fixture in crate::fixtures::all() {
        let bytes = std::fs::read(scratch.file(&fixture.name)).expect("fixture");
        let out = vimg(&["check", "-f", &fixture.format, &fixture.name]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(0), "{}: {out:#?}", fixture.name);
        std::fs::write(scratch.file(&fixture.name), &bytes[..bytes.len() / 2]).expect("write");
        let out = vimg(&["check", "-f", &fixture.format, &fixture.name]).dir(scratch.path()).run();
        assert!(matches!(out.code, Some(1 | 2)), "{}: {out:#?}", fixture.name);
        std::fs::write(scratch.file(&fixture.name), &bytes).expect("write");
    }
}

/// Extents of a Bochs disk at the same place and past the end; offsets of a cloop that are out of order, of nothing and of
/// what is no stream.
#[test]
fn damage_of_bochs_and_cloop_images_is_found() {
    let scratch = Scratch::new();
    let check = |name: &str, bytes: &[u8], wrong: &[&str]| {
        std::fs::write(scratch.file(name), bytes).expect("write");
        let out = vimg(&["check", "-f", name, name]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(if wrong.is_empty() { 0 } else { 2 }), "{out:#?}");
        let wrong: Vec<String> = wrong.iter().map(|line| format!("ERROR: {line}")).collect();
        assert_eq!(out.stderr.lines().collect::<Vec<_>>(), wrong, "{out:#?}");
    };
    let bochs = |at: u32, entries: [u32; 4], bytes: usize| {
        let mut image = vec![0; 512];
        for (at, text) in [(0, "Bochs Virtual HD Image"), (32, "Redolog"), (48, "Growing")] {
            image[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        for (n, value) in [2 << 16, at, 4, 512, 4096, 0, 16384].into_iter().enumerate() {
            le32(&mut image, 64 + n * 4, value);
        }
        image.extend(entries.iter().flat_map(|entry| entry.to_le_bytes()));
        image.resize(bytes, 0);
        image
    };
    const NONE: u32 = u32::MAX;
    check("bochs", &bochs(512, [1, NONE, 0, NONE], 528 + 2 * 4608), &[]);
    check("bochs", &bochs(512, [0, NONE, 0, 1], 528 + 2 * 4608), &["extents 0 and 2 are both at offset 528"]);
    check(
        "bochs",
        &bochs(512, [NONE, 7, 0, NONE], 528 + 4608),
        &["extent 1 at offset 32784 lies past the end of the file"],
    );
    check(
        "bochs",
        &bochs(508, [NONE; 4], 1024),
        &["the catalog overlaps the header", "extent 0 at offset 524 lies past the end of the file"],
    );
    // Sectors that are not there need no room.
    let mut short = bochs(512, [0, NONE, NONE, NONE], 528 + 512 + 1024);
    short[528] = 3;
    check("bochs", &short, &[]);
    short[528] = 8;
    check("bochs", &short, &["extent 0 at offset 528 lies past the end of the file"]);

    scratch.sh("python3 -c 'import zlib; open(\"packed\", \"wb\").write(zlib.compress(bytes(4096), 0))'");
    let packed = std::fs::read(scratch.file("packed")).expect("packed");
    let cloop = |offsets: [u64; 4]| {
        let mut image = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop".to_vec();
        image.resize(128, 0);
        image.extend([0, 0, 16, 0, 0, 0, 0, 3]);
        image.extend(offsets.iter().flat_map(|offset| offset.to_be_bytes()));
        image.extend(packed.repeat(3));
        image
    };
    let len = packed.len() as u64;
    let sound = [168, 168 + len, 168 + 2 * len, 168 + 3 * len];
    check("cloop", &cloop(sound), &[]);
    let [a, b, c, d] = sound;
    check(
        "cloop",
        &cloop([a, c, b, d]),
        &[
            &format!("block 0 at offset {a} has a compressed size of {} bytes", 2 * len),
            &format!("block 1 ends at offset {b}, before it starts at {c}"),
            &format!("block 2 at offset {b} has a compressed size of {} bytes", 2 * len),
        ],
    );
    check("cloop", &cloop([0, b, c, d]), &["block 0 at offset 0 overlaps the table of offsets"]);
    check("cloop", &cloop([a, b, c, d + 1]), &[&format!("block 2 at offset {c} lies past the end of the file")]);
    let mut damaged = cloop(sound);
    damaged[b as usize + 100] ^= 1;
    std::fs::write(scratch.file("cloop"), &damaged).expect("write");
    let out = vimg(&["check", "-f", "cloop", "cloop"]).dir(scratch.path()).fails(2);
    assert!(out.stderr.starts_with(&format!("ERROR: block 1 at offset {b}: ")), "{out:#?}");
}

/// From the end: the end of the stream, the footer and its marker, the directory and its marker. The first grain is at
/// sector 128, and its table behind the grains.
#[test]
fn damage_of_a_stream_optimized_vmdk_is_found() {
    type ChangeFromEnd = fn(&mut Vec<u8>, usize);
    let changes: &[(&str, ChangeFromEnd)] = &[
        ("ERROR: image: no marker at the end of the stream", |b, end| b[end - 512] = 1),
        ("ERROR: image: no marker before the footer", |b, end| b[end - 3 * 512 + 12] = 9),
        ("ERROR: image: no marker before the grain directory", |b, end| b[end - 5 * 512 + 12] = 9),
        ("ERROR: image: header and footer differ", |b, end| b[end - 2 * 512 + 0x2c] ^= 1),
        ("ERROR: image: no marker before grain table 0", |b, end| {
            let table = get_le32(b, end - 4 * 512) as usize;
            b[(table - 1) * 512 + 12] = 7;
        }),
        ("ERROR: image: grain table 0 lies past the end of the file", |b, end| le32(b, end - 4 * 512, 1 << 30)),
        ("ERROR: cluster offset for sector 0 points after EOF", |b, end| {
            let table = get_le32(b, end - 4 * 512) as usize;
            le32(b, table * 512, 1 << 30);
        }),
        ("ERROR: image: cluster for sector 128 has the marker of another one", |b, end| {
            let table = get_le32(b, end - 4 * 512) as usize;
            let first = get_le32(b, table * 512);
            le32(b, table * 512 + 4, first);
        }),
        ("ERROR: image: cluster for sector 0 has a compressed size of 1048576 bytes", |b, _| {
            le32(b, 128 * 512 + 8, 1 << 20);
        }),
        ("ERROR: image: cluster for sector 128 overlaps what else is there", |b, _| le32(b, 128 * 512 + 8, 1000)),
    ];
    let scratch = Scratch::new();
    scratch.sh("truncate -s 9M raw && qemu-io -f raw -c 'write -P 1 0 64k' -c 'write -P 2 64k 128k' raw");
    scratch.vimg(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", IMAGE]);
    let whole = std::fs::read(scratch.file(IMAGE)).expect("read");
    scratch.vimg(&["check", "-f", "vmdk", IMAGE]);
    for (text, change) in changes {
        let mut bytes = whole.clone();
        let end = bytes.len();
        change(&mut bytes, end);
        std::fs::write(scratch.file(IMAGE), &bytes).expect("write");
        let out = vimg(&["check", "-f", "vmdk", "-r", "all", IMAGE]).dir(scratch.path()).fails(2);
        assert_eq!(out.stderr, format!("{text}\n"));
        assert!(std::fs::read(scratch.file(IMAGE)).expect("read") == bytes, "{text}: it is left alone");
    }
}

#[test]
fn every_extent_of_a_split_vmdk_is_checked() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse a.vmdk 4G && \
         qemu-io -f vmdk -c 'write 0 64k' -c 'write 3G 128k' a.vmdk && truncate -s -64k a-s002.vmdk && \
         truncate -s -600 a-s001.vmdk");
    let out = vimg(&["check", "a.vmdk"]).dir(scratch.path()).fails(2);
    let wanted = "ERROR: a-s001.vmdk: cluster for sector 0 is cut off by EOF\n\
                  ERROR: cluster offset for sector 6291584 points after EOF\n";
    assert_eq!(out.stderr, wanted);
}

/// An image of one extent that has no descriptor in it.
fn with_descriptor(scratch: &Scratch, kind: &str, word: &str, sectors: u64, extent: &[u8]) {
    std::fs::write(scratch.file("extent"), extent).expect("write");
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\
         RW {sectors} {word} \"extent\"\n"
    );
    std::fs::write(scratch.file(IMAGE), text).expect("write");
}

/// The directory is at sector 4, its table at 5, grains of 8 sectors at 40 and 48.
#[test]
fn damage_of_a_cowd_extent_is_found() {
    let mut whole = vec![0; 56 * 512];
    put(&mut whole, 0, b"COWD");
    for (n, word) in [1, 3, 8192, 8, 4, 1, 100].into_iter().enumerate() {
        le32(&mut whole, 4 + n * 4, word);
    }
    le32(&mut whole, 4 * 512, 5);
    le32(&mut whole, 5 * 512, 40);
    le32(&mut whole, 5 * 512 + 4, 48);
    let scratch = Scratch::new();
    with_descriptor(&scratch, "vmfsSparse", "VMFSSPARSE", 8192, &whole);
    scratch.judge(&["check", IMAGE]);
    scratch.vimg(&["check", IMAGE]);
    let changes: [(&str, Change); 5] = [
        ("ERROR: extent: cluster for sector 8 overlaps what else is there", |b| le32(b, 5 * 512 + 4, 40)),
        ("ERROR: extent: cluster for sector 8 overlaps what else is there", |b| le32(b, 5 * 512 + 4, 4)),
        ("ERROR: cluster offset for sector 8 points after EOF", |b| le32(b, 5 * 512 + 4, 400)),
        ("ERROR: extent: cluster for sector 8 is cut off by EOF", |b| b.truncate(50 * 512)),
        ("ERROR: extent: grain table 0 lies past the end of the file", |b| le32(b, 4 * 512, 400)),
    ];
    for (text, change) in changes {
        let mut bytes = whole.clone();
        change(&mut bytes);
        with_descriptor(&scratch, "vmfsSparse", "VMFSSPARSE", 8192, &bytes);
        let out = vimg(&["check", "-r", "all", IMAGE]).dir(scratch.path()).fails(2);
        assert_eq!(out.stderr, format!("{text}\n"));
    }
}

/// Three tables, from sector 256 on; grains from 8192 on.
#[test]
fn damage_of_a_space_efficient_extent_is_found() {
    fn le64(bytes: &mut [u8], at: usize, value: u64) {
        put(bytes, at, &value.to_le_bytes());
    }
    const SECTORS: u64 = 4096 * 8 * 2 + 80;
    let mut whole = vec![0; 8192 * 512 + 100 * 4096];
    let words = [
        (0, 0xcafe_babe),
        (1, 0x2_0000_0001),
        (2, SECTORS),
        (3, 8),
        (4, 64),
        (10, 1),
        (11, 1),
        (16, 128),
        (17, 1),
        (18, 256),
        (19, 192),
        (24, 8192),
        (25, 800),
    ];
    for (n, word) in words {
        le64(&mut whole, n * 8, word);
    }
    le64(&mut whole, 512, 0xcafe_cafe);
    for table in 0..3 {
        le64(&mut whole, 128 * 512 + table * 8, 0x1000_0000_0000_0000 | table as u64);
    }
    for (n, grain) in [(0, 5), (1, 6), (10, 0), (4096, 3), (8192, 50)] {
        le64(&mut whole, 256 * 512 + n * 8, 0x3000_0000_0000_0000 | grain << 48);
    }
    let scratch = Scratch::new();
    with_descriptor(&scratch, "seSparse", "SESPARSE", SECTORS, &whole);
    scratch.judge(&["check", IMAGE]);
    scratch.vimg(&["check", IMAGE]);
    let changes: [(&str, Change); 6] = [
        ("ERROR: extent: cluster for sector 32768 overlaps what else is there", |b| {
            le64(b, 256 * 512 + 4096 * 8, 0x3000_0000_0000_0000 | 6 << 48);
        }),
        ("ERROR: cluster offset for sector 80 points after EOF", |b| {
            le64(b, 256 * 512 + 80, 0x3000_0000_0000_0000 | 600 << 48);
        }),
        ("ERROR: extent: sector 80: seSparse extent: invalid table entry 0x7000000000000000", |b| {
            le64(b, 256 * 512 + 80, 7 << 60);
        }),
        ("ERROR: extent: directory entry 1: seSparse extent: there is no grain table 9", |b| {
            le64(b, 128 * 512 + 8, 1 << 60 | 9);
        }),
        ("ERROR: extent: directory entry 1 names grain table 0, as another one does", |b| {
            le64(b, 128 * 512 + 8, 1 << 60);
        }),
        ("ERROR: cluster offset for sector 65536 points after EOF", |b| b.truncate(8192 * 512 + 50 * 4096 + 600)),
    ];
    for (text, change) in changes {
        let mut bytes = whole.clone();
        change(&mut bytes);
        with_descriptor(&scratch, "seSparse", "SESPARSE", SECTORS, &bytes);
        let out = vimg(&["check", IMAGE]).dir(scratch.path()).fails(2);
        assert_eq!(out.stderr, format!("{text}\n"));
    }
}

/// Every entry of the L2 tables of a sparse image points to where nothing is.
#[test]
fn endless_damage_is_counted() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,preallocation=metadata", "a", "60M"]);
    let mut bytes = std::fs::read(scratch.file("a")).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let entries = u32::from_be_bytes(bytes[36..40].try_into().unwrap()) as usize;
    for entry in 0..entries {
        let l2 = u64::from_be_bytes(bytes[l1 + 8 * entry..][..8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
        for word in bytes[l2 as usize..][..512].chunks_exact_mut(8) {
            word.copy_from_slice(&(1_u64 << 63 | 1 << 62 | 1).to_be_bytes());
        }
    }
    std::fs::write(scratch.file("a"), &bytes).unwrap();
    let out = vimg(&["check", "-f", "qcow2", "a"]).dir(scratch.path()).run();
    let lines: Vec<&str> = out.stderr.lines().collect();
    assert_eq!((out.code, lines.len()), (Some(2), 100_001), "{:?}", lines.last());
    assert_eq!(lines.last(), Some(&"qemu-img: further findings are counted, not shown"));
    let counted = out.stdout.lines().find_map(|line| line.strip_suffix(" errors were found on the image."));
    assert!(counted.unwrap().parse::<u64>().unwrap() > 100_000, "{}", out.stdout);
}

/// The name of what the image stands on is no name for its copy, however far below.
#[test]
fn a_mended_copy_takes_no_name_of_the_chain() {
    for format in ["qcow2", "qed", "qcow"] {
        let scratch = Scratch::new();
        write_pattern(&scratch.file("base"), 0, 3, 1 << 20);
        let base = fs::read(scratch.file("base")).unwrap();
        scratch.sh(&format!(
            "qemu-img create -q -f {format} -b base -F raw middle; qemu-img create -q -f qcow2 -b middle -F {format} top"
        ));
        for (image, format) in [("middle", format), ("top", "qcow2")] {
            let out = vimg(&["check", "-f", format, "--repair-to", "base", image]).dir(scratch.path()).fails(1);
            assert!(out.stderr.contains(&format!("'base' is what '{image}' stands on")), "{out:?}");
            assert!(fs::read(scratch.file("base")).unwrap() == base);
        }
    }
}

/// A table of snapshots that says it is longer than the file, and so is not counted, is written anew all the same, in one
/// go: the reference needs two.
#[test]
fn a_snapshot_table_with_a_wrong_length_is_mended() {
    for options in ["cluster_size=512", "cluster_size=1k,refcount_bits=8", "cluster_size=64k"] {
        for extra in [0u32, 1, 65536, u32::MAX] {
            let scratch = Scratch::new();
            scratch.sh(&format!(
                "qemu-img create -q -f qcow2 -o {options} a 1M && qemu-io -c 'write -P 3 0 100k' a && qemu-img snapshot -c one a && \
                 qemu-io -c 'write -P 4 50k 100k' a && qemu-img snapshot -c two a && qemu-img convert -O raw a model"
            ));
            let mut bytes = fs::read(scratch.file("a")).unwrap();
            let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
            bytes[table + 36..table + 40].copy_from_slice(&extra.to_be_bytes());
            fs::write(scratch.file("a"), bytes).unwrap();
            let out = vimg(&["check", "-q", "-r", "all", "a"]).dir(scratch.path()).run();
            // What the table hid may be left as leaks.
            assert!(matches!(out.code, Some(0 | 3)), "{options} {extra}: {out:?}");
            scratch.vimg(&["check", "-q", "-r", "all", "a"]);
            scratch.judge(&["check", "-q", "a"]);
            scratch.assert_same_content("qcow2", "a", "raw", "model");
        }
    }
}
