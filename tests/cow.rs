//! User-mode Linux' copy-on-write files, made by its own tools or from their layout; its `uml_moo` is the judge.

use std::fs::{File, FileTimes, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, UNIX_EPOCH};

use crate::common::run::vimg;
use crate::common::{Scratch, assert_same_bytes, need, pattern};
use crate::rig::assert_survives_mutations;

/// When base files were last written to.
const TIME: u32 = 1_700_000_000;

fn header(version: u32, size: u64, sector: u32, alignment: u32, base: &str) -> Vec<u8> {
    let mut name = base.as_bytes().to_vec();
    name.resize(4096, 0);
    let own = [&b"OOOM"[..], &version.to_be_bytes()].concat();
    let facts = [&TIME.to_be_bytes()[..], &size.to_be_bytes(), &sector.to_be_bytes()].concat();
    match version {
        2 => [own, name, facts].concat(),
        _ => [own, facts, alignment.to_be_bytes().to_vec(), vec![0; 4], name].concat(),
    }
}

fn set_time(file: &File) {
    file.set_times(FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_secs(TIME.into()))).unwrap();
}

/// Both versions, disks that end within a byte of version 3's bitmap, and bitmaps that end where the data has to start.
#[test]
fn what_its_own_tool_merges_is_read() {
    need("uml_moo");
    let scratch = Scratch::new();
    for (version, alignment, sectors) in
        [(2, 0, 104), (2, 0, 3904), (2, 0, 3912), (3, 4096, 8200), (3, 512, 21), (3, 4096, 8)]
    {
        let size = sectors * 512;
        let base = File::create(scratch.file("base")).unwrap();
        base.write_all_at(&pattern(1, size), 0).unwrap();
        set_time(&base);
        let head = header(version, size as u64, 512, alignment, &scratch.file("base").to_string_lossy());
        let image = File::create(scratch.file("a")).unwrap();
        image.write_all_at(&head, 0).unwrap();
        // Bits and data by noise: where they are is what the two have to agree on.
        image.write_all_at(&pattern(2, size + 3 * 4096), head.len() as u64).unwrap();
        scratch.sh("rm -f theirs; uml_moo a theirs");
        scratch.vimg(&["convert", "-O", "raw", "a", "ours"]);
        assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
    }
}

#[test]
fn a_base_that_changed_is_refused() {
    need("uml_mkcow");
    let scratch = Scratch::new();
    std::fs::write(scratch.file("base"), pattern(1, 100 << 10)).unwrap();
    set_time(&OpenOptions::new().write(true).open(scratch.file("base")).unwrap());
    scratch.sh("uml_mkcow a base");
    OpenOptions::new().write(true).open(scratch.file("a")).unwrap().write_all_at(&[1], 8192).unwrap();
    let convert = |more: &[&str]| {
        let args = [&["convert", "-O", "raw"], more, &["a", "b"]].concat();
        vimg(&args).dir(scratch.path()).run()
    };
    assert_eq!(convert(&[]).code, Some(0));
    let expected = [vec![0; 512], pattern(1, 100 << 10)[512..].to_vec()].concat();
    assert!(std::fs::read(scratch.file("b")).unwrap() == expected);
    scratch.sh("rm b; touch -d @1700000001 base");
    let refused = convert(&[]);
    let words = "The backing file has changed since this image was made: its time is 1700000001, not 1700000000";
    assert!(refused.code == Some(1) && refused.stderr.contains(words), "{refused:?}");
    assert!(!scratch.file("b").exists());
    let salvaged = convert(&["--salvage"]);
    assert!(salvaged.code == Some(0) && salvaged.stderr.contains(words), "{salvaged:?}");
    assert!(std::fs::read(scratch.file("b")).unwrap() == expected);
    scratch.sh("truncate -s +512 base; touch -d @1700000000 base");
    let refused = convert(&[]);
    assert!(refused.code == Some(1) && refused.stderr.contains("its size is 102912, not 102400"), "{refused:?}");
}

#[test]
fn what_a_bitmap_says_is_there_lies_in_the_file() {
    let scratch = Scratch::new();
    // 21 sectors; bits in three bytes at 4608, data from 5120 on.
    let mut bytes = header(3, 21 * 512, 512, 512, "");
    bytes.resize(5120 + 10 * 512, 0);
    let check = |bits: [u8; 3], code| {
        let mut bytes = bytes.clone();
        bytes[4608..4611].copy_from_slice(&bits);
        std::fs::write(scratch.file("a"), &bytes).unwrap();
        let out = vimg(&["check", "-f", "cow", "a"]).dir(scratch.path()).run();
        assert_eq!(out.code, Some(code), "{out:?}");
        out
    };
    let sound = check([0b0000_1001, 0b10, 0], 0);
    assert!(sound.stdout.contains("3/21 = ") && sound.stdout.contains("Image end offset: 10240"), "{sound:?}");
    let lost = check([1, 0b1100, 0], 2);
    assert!(lost.stderr.contains("ERROR: sectors 10 to 11 lie past the end of the file"), "{lost:?}");
    let past = check([1, 0, 0b100_0000], 2);
    assert!(past.stderr.contains("ERROR: the bitmap has sectors past the end of the disk"), "{past:?}");
}

#[test]
fn corrupt_headers_end() {
    let mut bytes = header(3, 64 << 10, 512, 512, "");
    bytes.resize(4608, 0);
    bytes.extend(pattern(1, 66 << 10));
    assert_survives_mutations("cow", &bytes, 64);
    let mut bytes = header(2, 64 << 10, 512, 0, "");
    bytes.extend(pattern(1, 66 << 10));
    assert_survives_mutations("cow", &bytes, 16);
}
