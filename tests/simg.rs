//! Android's sparse images against libsparse's own tools.

use crate::common::run::vimg;
use crate::common::{Scratch, assert_same_bytes, need, pattern};
use crate::rig::assert_survives_mutations;

const BLOCK: usize = 4096;

/// A chunk: type, blocks, what it carries.
type Chunk<'a> = (u16, u32, &'a [u8]);

/// An image with longer headers than are known, as later writers may make.
fn image(block: u32, blocks: u32, checksum: u32, extra: u16, chunks: &[Chunk<'_>]) -> Vec<u8> {
    let mut bytes = 0xed26_ff3au32.to_le_bytes().to_vec();
    let count = u32::try_from(chunks.len()).unwrap();
    for word in [1, 0, 28 + extra, 12 + extra] {
        bytes.extend(word.to_le_bytes());
    }
    for word in [block, blocks, count, checksum] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(vec![0x55; usize::from(extra)]);
    for (kind, blocks, data) in chunks {
        bytes.extend(kind.to_le_bytes());
        bytes.extend([0, 0]);
        bytes.extend(blocks.to_le_bytes());
        bytes.extend((u32::try_from(data.len()).unwrap() + 12 + u32::from(extra)).to_le_bytes());
        bytes.extend(vec![0x55; usize::from(extra)]);
        bytes.extend(*data);
    }
    bytes
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// Data, a pattern over more than one unit, zeros that are said and zeros that are not.
fn disk() -> Vec<u8> {
    let mut disk = pattern(3, 5 * BLOCK);
    disk.extend([1, 2, 3, 4].repeat(40 * BLOCK / 4));
    disk.extend(vec![0; 9 * BLOCK]);
    disk.extend(pattern(4, BLOCK));
    disk
}

fn sample(checksum: u32, at_data: u32) -> Vec<u8> {
    let disk = disk();
    let (first, last) = (&disk[..5 * BLOCK], &disk[54 * BLOCK..]);
    let chunks: &[Chunk<'_>] = &[
        (0xcac1, 5, first),
        (0xcac4, 0, &at_data.to_le_bytes()),
        (0xcac2, 40, &[1, 2, 3, 4]),
        (0xcac3, 4, &[]),
        (0xcac2, 5, &[0; 4]),
        (0xcac1, 1, last),
    ];
    image(4096, 55, checksum, 8, chunks)
}

#[test]
fn what_libsparse_makes_is_read() {
    need("img2simg");
    let scratch = Scratch::new();
    std::fs::write(scratch.file("disk"), disk()).unwrap();
    for block in ["4096", "1024", "65536"] {
        // Its own block size must divide the disk.
        let size = disk().len().next_multiple_of(65536) as u64;
        std::fs::OpenOptions::new().write(true).open(scratch.file("disk")).unwrap().set_len(size).unwrap();
        scratch.sh(&format!("img2simg disk sparse {block}"));
        scratch.vimg(&["convert", "-O", "raw", "sparse", "ours"]);
        assert_same_bytes(&scratch.file("ours"), &scratch.file("disk"));
        let info = scratch.vimg(&["info", "--output=json", "sparse"]).json();
        assert_eq!((info["format"].as_str(), info["virtual-size"].as_u64()), (Some("simg"), Some(size)));
        assert_eq!(info["cluster-size"].as_u64(), block.parse().ok());
        let check = scratch.vimg(&["check", "sparse"]);
        assert!(check.stdout.starts_with("No errors were found on the image."), "{}", check.stdout);
    }
}

#[test]
fn every_kind_of_chunk_is_read() {
    need("simg2img");
    let scratch = Scratch::new();
    let disk = disk();
    std::fs::write(scratch.file("sparse"), sample(crc(&disk), crc(&disk[..5 * BLOCK]))).unwrap();
    scratch.sh("simg2img sparse theirs");
    scratch.vimg(&["convert", "-O", "raw", "sparse", "ours"]);
    assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
    assert_eq!(std::fs::read(scratch.file("ours")).unwrap(), disk);
    scratch.vimg(&["check", "sparse"]);
    let map = scratch.vimg(&["map", "--output=json", "sparse"]).json();
    let runs: Vec<_> =
        map.as_array().unwrap().iter().map(|run| (run["start"].as_u64(), run["zero"].as_bool())).collect();
    assert_eq!(runs.last().map(|run| run.1), Some(Some(false)));
    assert!(runs.contains(&(Some(45 * BLOCK as u64), Some(true))), "{runs:?}");
    vimg(&["convert", "-O", "simg", "sparse", "no"]).dir(scratch.path()).fails(1);
}

#[test]
fn damage_is_found() {
    let scratch = Scratch::new();
    let disk = disk();
    let (all, first) = (crc(&disk), crc(&disk[..5 * BLOCK]));
    for (bytes, words) in [
        (sample(all ^ 1, first), "the header says that the disk's checksum is"),
        (sample(all, first ^ 1), "a checksum chunk says"),
    ] {
        std::fs::write(scratch.file("a"), bytes).unwrap();
        let check = vimg(&["check", "a"]).dir(scratch.path()).fails(2);
        assert!(check.stderr.contains(words), "{}", check.stderr);
    }
    let mut cut = sample(all, first);
    cut.truncate(cut.len() - 100);
    std::fs::write(scratch.file("a"), cut).unwrap();
    vimg(&["check", "a"]).dir(scratch.path()).fails(2);
    let error = vimg(&["convert", "-O", "raw", "a", "b"]).dir(scratch.path()).fails(1).stderr;
    assert!(error.contains("the file is truncated"), "{error}");
    assert!(!scratch.file("b").exists());

    let raw = vec![7; 4096];
    for (bytes, words) in [
        (image(4096, 2, 0, 0, &[(0xcac1, 1, &raw)]), "the chunks hold 1 of the disk's 2 blocks"),
        (image(4096, 1, 0, 0, &[(0xcac1, 2, &[raw.clone(), raw.clone()].concat())]), "goes past the end of the disk"),
        (image(4096, 1, 0, 0, &[(0xcac1, 1, &raw[..8])]), "has another size than its type"),
        (image(4096, 1, 0, 0, &[(0xcac9, 1, &raw)]), "is of the unknown type 0xcac9"),
        (image(4098, 1, 0, 0, &[(0xcac1, 1, &raw)]), "is not a multiple of 4"),
    ] {
        std::fs::write(scratch.file("a"), bytes).unwrap();
        let error = vimg(&["convert", "-O", "raw", "a", "b"]).dir(scratch.path()).fails(1).stderr;
        assert!(error.contains(words) && error.contains("'a'"), "{error}");
        assert!(!scratch.file("b").exists());
    }
}

#[test]
fn corrupt_headers_end() {
    assert_survives_mutations("simg", &sample(0, 0), 80);
}
