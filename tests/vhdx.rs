//! vhdx against qemu-img, 7z and libvhdi: what they write and read, what resizing leaves, and what qemu-img refuses or has
//! no check for: logs, sectors of 4096 bytes, damage.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use vimg::block::io::Scratch as Buffers;
use vimg::block::{Fix, GuestOffset, format};
use vimg::formats::FORMATS;
use vimg::storage::fault::{Fault, Faulty, FaultyOperation};
use vimg::storage::memory::Memory;
use vimg::storage::{Preallocation, Storage};

use crate::common::inside::{self, Files};
use crate::common::{Output, Scratch, judge, need, pattern, plain, vimg};
use crate::rig::{Pair, create, open_bytes, open_on, walk};

pub const M: u64 = 1 << 20;
/// Where qemu-img and vimg put things in a small image.
const HEADERS: [usize; 2] = [0x1_0000, 0x2_0000];
const REGION_TABLES: [usize; 2] = [0x3_0000, 0x4_0000];
const LOG: usize = 0x10_0000;
pub const BAT: usize = 0x20_0000;
pub const METADATA: usize = 0x30_0000;

/// CRC-32C, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

/// Puts the checksum of a structure in its place.
fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let crc = crc32c(bytes);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
}

pub fn put(image: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    image.resize(image.len().max(at + bytes.len()), 0);
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

pub fn word(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(image[at..at + 8].try_into().expect("8"))
}

/// Whether a check finds that.
pub fn said(out: &Output, finding: &str) -> bool {
    out.stdout.contains(finding) || out.stderr.contains(finding)
}

/// The header that counts.
pub fn header(image: &[u8]) -> usize {
    let [a, b] = HEADERS;
    if word(image, a + 8) > word(image, b + 8) { a } else { b }
}

/// Seals headers and region tables.
fn seal_all(image: &mut [u8]) {
    HEADERS.into_iter().for_each(|at| seal(&mut image[at..at + 4096]));
    REGION_TABLES.into_iter().for_each(|at| seal(&mut image[at..at + 65536]));
}

#[test]
fn what_is_written_is_what_others_read() {
    for options in ["", "subformat=fixed", "block_size=1048576", "block_state_zero=off,block_size=2097152"] {
        let scratch = Scratch::new();
        // 7z opens no disk that is not whole mebibytes.
        let odd = options.is_empty();
        let mut pair = Pair::new(&scratch, "vhdx", options, 19 * M + if odd { 1536 } else { 0 });
        pair.exercise(60, 3 * M / 2);
        pair.assert_good();
        if !odd {
            pair.assert_7z_agrees("vhdx");
        }
        scratch.vimg(&["check", "image.vhdx"]);
    }
}

#[test]
fn what_others_write_goes_on() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M", "a.vhdx", "12M"]);
    let mut pair = Pair::of(&scratch, "vhdx", "a.vhdx");
    pair.exercise(20, M);
    pair.assert_good();
    pair.resize(30 * M);
    pair.exercise(20, M);
    pair.assert_good();
    pair.resize(3 * M + 512);
    pair.assert_good();
    pair.resize(4 * M);
    pair.assert_7z_agrees("vhdx");
    scratch.vimg(&["check", "a.vhdx"]);
}

/// Nothing else on this system makes or writes them; qemu-img does not open them.
#[test]
fn sectors_of_4096_bytes_are_written() {
    let scratch = Scratch::new();
    let mut pair = Pair::new(&scratch, "vhdx", "logical_sector_size=4096,block_size=1048576", 5 * M);
    pair.exercise(40, M);
    pair.assert_7z_agrees("vhdx");
    pair.resize(9 * M + 8192);
    pair.exercise(20, M);
    pair.resize(11 * M);
    pair.assert_7z_agrees("vhdx");
    scratch.vimg(&["check", "image.vhdx"]);
    need("vhdiinfo");
    let info = plain("vhdiinfo", &["image.vhdx"]).dir(scratch.path()).ok();
    assert!(info.stdout.contains("Bytes per sector\t: 4096 bytes"), "{info:?}");
    let out = vimg(&["resize", "image.vhdx", "12583424"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("The new size must be a multiple of 4096"), "{out:?}");
    // An odd disk has whole sectors.
    scratch.vimg(&["create", "-q", "-f", "vhdx", "-o", "logical_sector_size=4k", "odd.vhdx", "1M"]);
    let out =
        vimg(&["create", "-q", "-f", "vhdx", "-o", "logical_sector_size=1k", "x", "1M"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("'logical_sector_size' must be 512 or 4096"), "{out:?}");
}

#[test]
fn a_resize_that_stops_leaves_the_old_disk_or_the_new_one() {
    let scratch = Scratch::new();
    for options in ["block_size=1048576", "block_size=1048576,subformat=fixed"] {
        let mut pair = Pair::new(&scratch, "vhdx", options, 3 * M + 512);
        pair.exercise(10, M);
        pair.assert_resize_is_safe(5 * M, Preallocation::Off);
        pair.assert_resize_is_safe(6 * M, Preallocation::Metadata);
        fs::remove_file(scratch.file("image.vhdx")).expect("remove");
    }
}

/// The BAT moves: at no moment does anybody see another one than the old or the new.
#[test]
fn a_growth_that_moves_the_table_can_stop_anywhere() {
    const SIZE: u64 = 200 << 30;
    let scratch = Scratch::new();
    let files = inside::create(format::find(FORMATS, "vhdx").expect("vhdx"), "a", 3 * M, "block_size=1048576");
    let before = inside::bytes_of(&*files.get("a").expect("made"));
    let node = open_bytes(before, "vhdx", true).expect("open");
    node.write(GuestOffset(M / 2), &pattern(1, 1 << 20), &mut Buffers::default()).expect("write");
    node.driver().close().expect("close");
    let before = inside::bytes_of(&*node.driver().files()[0].storage);
    let grow = |storage: Arc<dyn Storage>| {
        let node = open_on(storage, "vhdx", true).expect("open");
        let _ = node.driver().resizing().expect("resizes").resize(SIZE, Preallocation::Off);
        node.driver().close()
    };
    let whole = Arc::new(Faulty::recording(Arc::new(Memory::new(before.clone()))));
    grow(whole.clone()).expect("grows");
    let (operations, mut grown) = (whole.operations(), 0);
    let points = operations.len();
    for point in 0..=points {
        for fault in [Fault::Stop, Fault::Shorten] {
            if fault == Fault::Shorten
                && matches!(operations.get(point), Some(FaultyOperation::Write { len: ..512, .. }))
            {
                // A sector is written or not.
                continue;
            }
            let memory = Arc::new(Memory::new(before.clone()));
            let _ = grow(Arc::new(Faulty::new(memory.clone(), point, fault)));
            fs::write(scratch.file("a"), memory.to_vec()).expect("write");
            scratch.judge(&["check", "-f", "vhdx", "a"]);
            // 3: the new table, which nothing names yet.
            let out = vimg(&["check", "-f", "vhdx", "a"]).dir(scratch.path()).run();
            assert!(matches!(out.code, Some(0 | 3)), "{fault:?} at {point} of {points}: {out:?}");
            let info = scratch.judge(&["info", "--output=json", "a"]).json();
            grown += usize::from(info["virtual-size"].as_u64() == Some(SIZE));
            let end = if info["virtual-size"].as_u64() == Some(SIZE) { 4 * M } else { 3 * M };
            let part = format!("driver=raw,size={end},file.driver=vhdx,file.file.filename=a");
            scratch.judge(&["convert", "--image-opts", "-O", "raw", &part, "raw"]);
            let mut wanted = vec![0; usize::try_from(end).expect("small")];
            wanted[1 << 19..(1 << 19) + (1 << 20)].copy_from_slice(&pattern(1, 1 << 20));
            assert!(fs::read(scratch.file("raw")).expect("raw") == wanted, "{fault:?} at {point} of {points}");
        }
    }
    assert!(grown > 2 && grown < 2 * points, "{grown} of {points}");
}

/// What a log entry does.
enum Change<'a> {
    Sector(&'a [u8]),
    Zeros(u64),
}

/// One entry of a log.
fn entry(sequence: u64, tail: usize, guid: [u8; 16], ends: [u64; 2], changes: &[(usize, Change<'_>)]) -> Vec<u8> {
    let (mut head, mut data) = (vec![0; 64], Vec::new());
    for (at, change) in changes {
        let mut descriptor = vec![0; 32];
        put(&mut descriptor, 16, &(*at as u64).to_le_bytes());
        put(&mut descriptor, 24, &sequence.to_le_bytes());
        match change {
            Change::Zeros(len) => {
                put(&mut descriptor, 0, b"zero");
                put(&mut descriptor, 8, &len.to_le_bytes());
            }
            Change::Sector(bytes) => {
                put(&mut descriptor, 0, b"desc");
                put(&mut descriptor, 4, &bytes[4092..]);
                put(&mut descriptor, 8, &bytes[..8]);
                data.extend(b"data");
                data.extend(((sequence >> 32) as u32).to_le_bytes());
                data.extend(&bytes[8..4092]);
                data.extend((sequence as u32).to_le_bytes());
            }
        }
        head.extend(descriptor);
    }
    head.resize(head.len().next_multiple_of(4096), 0);
    head.extend(data);
    put(&mut head, 0, b"loge");
    let length = head.len() as u32;
    put(&mut head, 8, &length.to_le_bytes());
    put(&mut head, 12, &(tail as u32).to_le_bytes());
    put(&mut head, 16, &sequence.to_le_bytes());
    put(&mut head, 24, &(changes.len() as u32).to_le_bytes());
    put(&mut head, 32, &guid);
    put(&mut head, 48, &ends[0].to_le_bytes());
    put(&mut head, 56, &ends[1].to_le_bytes());
    seal(&mut head);
    head
}

/// An image of qemu-img's whose BAT is still in the log, which starts at that byte of its room and goes round; also how
/// long each of the two entries is.
fn logged(scratch: &Scratch, start: usize) -> (Vec<u8>, [usize; 2]) {
    scratch.judge(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M", "whole", "8M"]);
    scratch.qemu_io("vhdx", "whole", &["write -P 7 3M 100k", "write -P 8 5M 4k"]);
    let mut image = fs::read(scratch.file("whole")).expect("made");
    let full = image[BAT..BAT + 4096].to_vec();
    let mut half = full.clone();
    half[40..48].fill(0);
    let mut blank = full.clone();
    blank[24..32].fill(0);
    blank[40..48].fill(0);
    put(&mut image, BAT, &blank);
    put(&mut image, BAT + 0x8000, &[0xff; 8192]);
    let (guid, ends) = ([0x5a; 16], [image.len() as u64; 2]);
    let first = entry(41, start, guid, ends, &[(BAT, Change::Sector(&half)), (BAT + 0x8000, Change::Zeros(4096))]);
    let second = entry(42, start, guid, ends, &[(BAT + 0x9000, Change::Zeros(4096)), (BAT, Change::Sector(&full))]);
    let stale = entry(99, 0x8_0000, [1; 16], ends, &[(BAT, Change::Sector(&blank))]);
    put(&mut image, LOG + 0x8_0000, &stale);
    let lengths = [first.len(), second.len()];
    for (n, sector) in [first, second].concat().chunks(4096).enumerate() {
        put(&mut image, LOG + (start + n * 4096) % (1 << 20), sector);
    }
    let at = header(&image);
    put(&mut image, at + 48, &guid);
    seal(&mut image[at..at + 4096]);
    (image, lengths)
}

/// The judge replays it, and then reads the same as vimg without a replay in the file.
fn assert_reads_as_replayed(scratch: &Scratch, image: &[u8], what: &str) {
    fs::write(scratch.file("a"), image).expect("write");
    fs::write(scratch.file("judged"), image).expect("write");
    scratch.judge(&["check", "-q", "-r", "all", "-f", "vhdx", "judged"]);
    scratch.vimg(&["convert", "-f", "vhdx", "-O", "raw", "a", "raw"]);
    assert!(fs::read(scratch.file("a")).expect("a") == image, "{what}: reading changes it");
    scratch.assert_same_content("vhdx", "judged", "raw", "raw");
}

#[test]
fn a_log_is_replayed_in_memory_and_on_disk() {
    for start in [0, 0x4000, (1 << 20) - 4096, (1 << 20) - 8192, (1 << 20) - 3 * 4096] {
        let scratch = Scratch::new();
        let (image, _) = logged(&scratch, start);
        let what = format!("log from {start:#x} on");
        assert_reads_as_replayed(&scratch, &image, &what);
        scratch.assert_same_content("vhdx", "whole", "raw", "raw");
        let out = vimg(&["check", "a"]).dir(scratch.path()).fails(2);
        assert!(said(&out, "the log holds changes that are not in their places"), "{what}: {out:?}");
        for args in [&["check", "-r", "all", "a"][..], &["check", "-r", "leaks", "a"], &["resize", "a", "8M"]] {
            fs::write(scratch.file("a"), &image).expect("write");
            scratch.vimg(args);
            let now = fs::read(scratch.file("a")).expect("a");
            assert_eq!(now[header(&now) + 48..][..16], [0; 16], "{what}: {args:?}");
            assert_eq!(now[BAT + 0x8000..][..8192], [0; 8192], "{what}: {args:?}");
            scratch.assert_clean("vhdx", "a");
            scratch.assert_same_content("vhdx", "a", "vhdx", "whole");
        }
    }
}

#[test]
fn a_replay_that_stops_is_done_again() {
    let scratch = Scratch::new();
    let (image, _) = logged(&scratch, 0);
    let replay = |storage: Arc<dyn Storage>| open_on(storage, "vhdx", true).map(drop);
    let whole = Arc::new(Faulty::recording(Arc::new(Memory::new(image.clone()))));
    replay(whole.clone()).expect("replays");
    let points = whole.operations().len();
    assert!(points >= 5, "{points}");
    for point in 0..points {
        for fault in [Fault::Stop, Fault::Shorten] {
            let memory = Arc::new(Memory::new(image.clone()));
            let _ = replay(Arc::new(Faulty::new(memory.clone(), point, fault)));
            assert_reads_as_replayed(&scratch, &memory.to_vec(), &format!("{fault:?} at {point}"));
            scratch.assert_same_content("vhdx", "whole", "raw", "raw");
        }
    }
}

/// An entry that was not written to its end never was one; the others count.
#[test]
fn a_torn_entry_of_a_log_is_none() {
    let scratch = Scratch::new();
    let (image, [first, second]) = logged(&scratch, 0);
    for at in [first, first + 70, first + second - 1, first + 4096 + 100] {
        let mut torn = image.clone();
        torn[LOG + at] ^= 1;
        assert_reads_as_replayed(&scratch, &torn, &format!("torn at {at:#x}"));
    }
    // The last entry needs the first one. (The judge does without it.)
    let mut torn = image.clone();
    torn[LOG + 4096 + 100] ^= 1;
    for write in [false, true] {
        let error = open_bytes(torn.clone(), "vhdx", write).expect_err("a log without a start");
        assert!(error.message().contains("no whole sequence"), "{}", error.message());
    }
    // So are entries whose tail is where no entry can be, with a sound one before them or not.
    for tail in [1, 0x8000, 4096 + 512, 1 << 20, 0xffff_f000] {
        let ends = [image.len() as u64; 2];
        let change = entry(43, tail, [0x5a; 16], ends, &[(BAT, Change::Sector(&[0; 4096]))]);
        let mut alone = image.clone();
        alone[LOG..LOG + first + second].fill(0);
        put(&mut alone, LOG, &change);
        let mut last = image.clone();
        put(&mut last, LOG + first + second, &change);
        for wrong in [alone, last] {
            for write in [false, true] {
                let error = open_bytes(wrong.clone(), "vhdx", write).expect_err("a log without a start");
                assert!(error.message().contains("no whole sequence"), "{tail:#x}: {}", error.message());
            }
        }
    }
    // What it must not do is refused.
    let cut = &image[..image.len() - 4096];
    let error = open_bytes(cut.to_vec(), "vhdx", false).expect_err("a file that is too short");
    assert!(error.message().contains("the log was written when the file had"), "{}", error.message());
    for (at, change) in [
        (0x1_0000, Change::Sector(&[0; 4096])),
        (LOG + 0x2000, Change::Sector(&[0; 4096])),
        (image.len() + 4096, Change::Zeros(4096)),
        (BAT, Change::Zeros(u64::MAX - 4095)),
        (BAT + 1, Change::Zeros(4096)),
    ] {
        let mut wrong = image.clone();
        let ends = [image.len() as u64; 2];
        put(&mut wrong, LOG, &entry(41, 0, [0x5a; 16], ends, &[(at, change)]));
        wrong[LOG + 8192..LOG + 0x8000].fill(0);
        let error = open_bytes(wrong.clone(), "vhdx", false).expect_err("a wrong log");
        assert!(error.message().contains("the log changes"), "{}", error.message());
        open_bytes(wrong, "vhdx", true).expect_err("a wrong log");
    }
}

/// What is changed in a sound image; what a check says, how many errors are there, and how many it can mend.
type Damage = (&'static str, fn(&mut Vec<u8>), &'static str, u64, u64);

const DAMAGES: &[Damage] = &[
    (
        "older header",
        |image| {
            let at = HEADERS.into_iter().find(|at| *at != header(image)).unwrap();
            image[at + 20] ^= 1
        },
        "is damaged",
        1,
        1,
    ),
    (
        "newer header",
        |image| {
            let at = header(image);
            image[at + 20] ^= 1
        },
        "is damaged",
        1,
        1,
    ),
    ("first region table", |image| image[REGION_TABLES[0] + 40] ^= 1, "region table 1 is damaged", 1, 1),
    ("second region table", |image| image[REGION_TABLES[1] + 40] ^= 1, "region table 2 is damaged", 1, 1),
    ("far block", |image| put(image, BAT, &(6u64 | 1 << 40).to_le_bytes()), "lies past the end of the file", 1, 0),
    (
        "shared block",
        |image| {
            let entry = word(image, BAT);
            put(image, BAT + 8, &entry.to_le_bytes())
        },
        "overlaps what else is there",
        1,
        0,
    ),
    (
        "block over the BAT",
        |image| put(image, BAT + 16, &(6u64 | 2 << 20).to_le_bytes()),
        "overlaps what else is there",
        1,
        0,
    ),
    ("unknown state", |image| put(image, BAT + 16, &5u64.to_le_bytes()), "is in state 5, which it cannot be in", 1, 0),
    (
        "partly present",
        |image| put(image, BAT + 16, &(7u64 | 9 << 20).to_le_bytes()),
        "is in state 7, which it cannot be in",
        1,
        0,
    ),
    (
        "leaked blocks",
        |image| {
            let len = image.len();
            image.resize(len + (2 << 20), 0)
        },
        "Leaked 2 blocks behind the last one",
        0,
        0,
    ),
];

#[test]
fn damage_is_found_and_what_is_there_twice_mended() {
    let scratch = Scratch::new();
    create(&scratch.file("a"), "vhdx", "block_size=1048576", 6 * M).expect("create");
    fs::write(scratch.file("d.raw"), pattern(3, 6 << 20)).expect("write");
    scratch.vimg(&["convert", "-n", "-f", "raw", "-O", "vhdx", "d.raw", "a"]);
    scratch.vimg(&["check", "a"]);
    let sound = fs::read(scratch.file("a")).expect("a");
    for (what, damage, finding, errors, mended) in DAMAGES {
        let mut image = sound.clone();
        damage(&mut image);
        fs::write(scratch.file("a"), &image).expect("write");
        let out = vimg(&["check", "a"]).dir(scratch.path()).fails(if *errors > 0 { 2 } else { 3 });
        assert!(said(&out, finding), "{what}: {out:?}");
        assert!(fs::read(scratch.file("a")).expect("a") == image, "{what}: a look changes it");
        let out = vimg(&["check", "-r", "all", "a"]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(if errors == mended { 0 } else { 2 }), "{what}: {out:?}");
        if errors == mended {
            scratch.vimg(&["check", "a"]);
            scratch.assert_clean("vhdx", "a");
            scratch.assert_same_content("vhdx", "a", "raw", "d.raw");
        } else {
            assert!(fs::read(scratch.file("a")).expect("a") == image, "{what}: a guess was made");
            if *errors > 0 {
                let node = open_bytes(image.clone(), "vhdx", true).expect("open");
                node.write(GuestOffset(0), &[1; 512], &mut Buffers::default()).expect_err(what);
                let now = inside::bytes_of(&*node.driver().files()[0].storage);
                assert!(now == image, "{what}: it was written to");
            }
        }
    }
}

/// Every field, with every checksum made right again.
#[test]
fn fields_with_right_checksums_may_say_anything() {
    let vhdx = format::find(FORMATS, "vhdx").expect("vhdx");
    let files = inside::create(vhdx, "image", 3 * M, "block_size=1048576");
    let mut image = inside::bytes_of(&*files.get("image").expect("made"));
    image.truncate(5 << 20);
    put(&mut image, BAT, &(6u64 | 4 << 20).to_le_bytes());
    let ranges = [
        (HEADERS[1], 8..80),
        (REGION_TABLES[0], 8..80),
        (METADATA, 8..200),
        (METADATA + 0x1_0000, 0..40),
        (BAT, 0..32),
    ];
    let values = [0u32, 7, 0xfff0_0000, 0xffff_ffff];
    let (mut cases, mut opened) = (0, 0);
    for (start, range) in ranges {
        for at in range.step_by(4) {
            for value in values {
                let mut changed = image.clone();
                put(&mut changed, start + at, &value.to_le_bytes());
                seal_all(&mut changed);
                cases += 1;
                let files = Files::default();
                files.put("image", Arc::new(inside::Capped::new(changed.clone(), 64 << 20)));
                if let Ok(node) = inside::open(&files, vhdx, "image", true, None) {
                    opened += 1;
                    walk(&node);
                    let _ = node.driver().resizing().map(|resizing| resizing.resize(7 * M, Preallocation::Off));
                }
                let files = Files::default();
                files.put("image", Arc::new(inside::Capped::new(changed, 64 << 20)));
                let _ = inside::check(&files, vhdx, "image", Fix::All);
            }
        }
    }
    assert!(cases > 350 && opened > 80, "{opened} of {cases}");
}

/// What a cut file has lost is no zeros.
#[test]
fn a_cut_image_is_refused() {
    let scratch = Scratch::new();
    fs::write(scratch.file("d.raw"), pattern(3, 3 << 20)).expect("write");
    scratch.judge(&["convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", "d.raw", "a"]);
    let whole = fs::read(scratch.file("a")).expect("a");
    for len in
        [0, 8, 0x1_0000, 0x1_1000, 0x3_0000, BAT, BAT + 8, METADATA, METADATA + 0x1_0000, 9 << 20, whole.len() - 4096]
    {
        fs::write(scratch.file("a"), &whole[..len]).expect("write");
        let out = vimg(&["convert", "-f", "vhdx", "-O", "raw", "a", "out"]).dir(scratch.path()).fails(1);
        assert!(!out.stderr.is_empty() && !scratch.file("out").exists(), "{len}: {out:?}");
    }
}

/// The first of the two is what counts, and the other one is made to follow before anything changes.
#[test]
fn the_copies_of_a_region_table_are_made_equal() {
    let scratch = Scratch::new();
    create(&scratch.file("a"), "vhdx", "block_size=1048576", 3 * M).expect("create");
    let mut image = fs::read(scratch.file("a")).expect("a");
    let second = REGION_TABLES[1];
    put(&mut image, second + 32, &(5 * M).to_le_bytes());
    seal(&mut image[second..second + 65536]);
    fs::write(scratch.file("a"), &image).expect("write");
    fs::write(scratch.file("d.raw"), pattern(3, 3 << 20)).expect("write");
    scratch.vimg(&["convert", "-n", "-f", "raw", "-O", "vhdx", "d.raw", "a"]);
    let image = fs::read(scratch.file("a")).expect("a");
    let [first, second] = REGION_TABLES.map(|at| &image[at..at + 65536]);
    assert!(first == second);
    scratch.assert_same_content("vhdx", "a", "raw", "d.raw");
    let _ = judge(&["check", "a"]).dir(scratch.path()).ok();
}

/// A differing header is another file: what is written shows in the identifiers, what is read does not.
#[test]
fn identifiers_follow_what_is_written() {
    let scratch = Scratch::new();
    let ids = |path: &Path| {
        let image = fs::read(path).expect("image");
        image[header(&image) + 16..][..32].to_vec()
    };
    scratch.judge(&["create", "-q", "-f", "vhdx", "a", "3M"]);
    let new = ids(&scratch.file("a"));
    scratch.vimg(&["convert", "-f", "vhdx", "-O", "raw", "a", "raw"]);
    scratch.vimg(&["check", "-r", "all", "a"]);
    assert_eq!(ids(&scratch.file("a")), new);
    fs::write(scratch.file("d.raw"), [1; 512]).expect("write");
    scratch.vimg(&["convert", "-n", "-f", "raw", "-O", "vhdx", "d.raw", "a"]);
    let written = ids(&scratch.file("a"));
    assert!(written[..16] != new[..16] && written[16..] != new[16..]);
}
