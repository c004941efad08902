//! macOS' disk images, made here from the description, against other readers.

use std::fmt::Write as _;
use std::io::Write as _;

use crate::common::run::vimg;
use crate::common::{Scratch, assert_same_bytes, need, pattern};
use crate::rig::assert_survives_mutations;

const SECTOR: usize = 512;
const ZERO: u32 = 0;
const RAW: u32 = 1;
const IGNORE: u32 = 2;
const ADC: u32 = 0x8000_0004;
const ZLIB: u32 = 0x8000_0005;
const BZIP2: u32 = 0x8000_0006;
const LZFSE: u32 = 0x8000_0007;
const LZMA: u32 = 0x8000_0008;

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn encode(kind: u32, plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match kind {
        ZERO | IGNORE => {}
        RAW => out.extend(plain),
        // Literal runs, and the last four bytes once more as a copy where they repeat.
        ADC => {
            for run in plain.chunks(128) {
                if run.len() == 128 && run[..64] == run[64..] {
                    out.push(0x80 | 63);
                    out.extend(&run[..64]);
                    out.extend([0x40 | 60, 0, 63]);
                } else {
                    out.push(0x80 | u8::try_from(run.len() - 1).unwrap());
                    out.extend(run);
                }
            }
        }
        ZLIB => {
            let mut encoder = flate2::write::ZlibEncoder::new(out, flate2::Compression::default());
            encoder.write_all(plain).unwrap();
            out = encoder.finish().unwrap();
        }
        BZIP2 => {
            let mut encoder = bzip2::write::BzEncoder::new(out, bzip2::Compression::best());
            encoder.write_all(plain).unwrap();
            out = encoder.finish().unwrap();
        }
        LZFSE => {
            lzfse_rust::LzfseEncoder::default().encode_bytes(plain, &mut out).unwrap();
        }
        LZMA => {
            let mut encoder = xz2::write::XzEncoder::new(out, 6);
            encoder.write_all(plain).unwrap();
            out = encoder.finish().unwrap();
        }
        _ => panic!("{kind:#x}"),
    }
    out
}

fn checksum(value: u32) -> Vec<u8> {
    let mut bytes = [2u32.to_be_bytes(), 32u32.to_be_bytes(), value.to_be_bytes()].concat();
    bytes.resize(136, 0);
    bytes
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for n in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * n) & 63) as usize];
            text.push(if n > group.len() { '=' } else { char::from(letter) });
        }
    }
    text
}

/// Where the block tables are.
#[derive(Clone, Copy, PartialEq)]
enum Tables {
    List,
    Fork,
}

/// An image whose partitions are made of blocks of that many sectors, each in the next of the codecs.
fn image(disk: &[u8], parts: &[usize], kinds: &[u32], sectors: usize, tables: Tables) -> Vec<u8> {
    let (mut data, mut all, mut sums) = (Vec::new(), Vec::new(), Vec::new());
    let (mut first, mut turn) = (0, kinds.iter().cycle());
    for part in parts {
        let plain = &disk[first * SECTOR..(first + part) * SECTOR];
        let (mut entries, mut summed) = (Vec::new(), Vec::new());
        let base = data.len() as u64;
        for (n, block) in plain.chunks(sectors * SECTOR).enumerate() {
            let kind = if block.iter().all(|byte| *byte == 0) { [ZERO, IGNORE][n % 2] } else { *turn.next().unwrap() };
            let encoded = encode(kind, block);
            if kind != IGNORE {
                summed.extend(block);
            }
            for word in [kind, 0] {
                entries.extend(word.to_be_bytes());
            }
            let at = data.len() as u64 - base;
            for word in [(n * sectors) as u64, (block.len() / SECTOR) as u64, at, encoded.len() as u64] {
                entries.extend(word.to_be_bytes());
            }
            data.extend(encoded);
        }
        entries.extend([&0xffff_ffffu32.to_be_bytes()[..], &[0; 4], &(*part as u64).to_be_bytes(), &[0; 24]].concat());
        let mut mish = b"mish\0\0\0\x01".to_vec();
        for word in [first as u64, *part as u64, base] {
            mish.extend(word.to_be_bytes());
        }
        mish.resize(64, 0);
        mish.extend(checksum(crc(&summed)));
        mish.extend(u32::try_from(entries.len() / 40).unwrap().to_be_bytes());
        mish.extend(entries);
        sums.extend(crc(&summed).to_be_bytes());
        all.push(mish);
        first += part;
    }
    let mut bytes = data.clone();
    let list = match tables {
        Tables::List => list(&all),
        Tables::Fork => fork(&all),
    };
    bytes.extend(&list);
    let place = [(data.len() as u64).to_be_bytes(), (list.len() as u64).to_be_bytes()].concat();
    let none = vec![0; 16];
    let (of_fork, of_list) = if tables == Tables::Fork { (&place, &none) } else { (&none, &place) };
    let mut koly = b"koly\0\0\0\x04\0\0\x02\0\0\0\0\x01".to_vec();
    koly.extend([0; 16]);
    koly.extend((data.len() as u64).to_be_bytes());
    koly.extend(of_fork);
    koly.extend([0, 0, 0, 1, 0, 0, 0, 1]);
    koly.extend([7; 16]);
    koly.extend(checksum(crc(&data)));
    koly.extend(of_list);
    koly.resize(352, 0);
    koly.extend(checksum(crc(&sums)));
    koly.extend(1u32.to_be_bytes());
    koly.extend((first as u64).to_be_bytes());
    koly.resize(512, 0);
    bytes.extend(koly);
    bytes
}

fn list(tables: &[Vec<u8>]) -> Vec<u8> {
    let mut text = String::from(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE plist PUBLIC \"-//Apple//DTD PLIST 1.0//EN\" \
         \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">\n<plist version=\"1.0\">\n<dict>\n\t<key>resource-fork</key>\n\
         \t<dict>\n\t\t<key>blkx</key>\n\t\t<array>\n",
    );
    for (n, table) in tables.iter().enumerate() {
        let letters = base64(table);
        let lines: Vec<_> = letters.as_bytes().chunks(44).map(|line| str::from_utf8(line).unwrap()).collect();
        write!(
            text,
            "<dict>\n<key>Attributes</key>\n<string>0x0050</string>\n<key>CFName</key>\n<string>disk (Apple_UFS : {n})\
             </string>\n<key>Data</key>\n<data>\n\t{}\n</data>\n<key>ID</key>\n<string>{n}</string>\n<key>Name</key>\n\
             <string>disk (Apple_UFS : {n})</string>\n</dict>\n",
            lines.join("\n\t")
        )
        .unwrap();
    }
    text.push_str("\t\t</array>\n\t</dict>\n</dict>\n</plist>\n");
    text.into_bytes()
}

fn fork(tables: &[Vec<u8>]) -> Vec<u8> {
    let (mut data, mut references) = (Vec::new(), Vec::new());
    for (n, table) in tables.iter().enumerate() {
        references.extend([&u16::try_from(n).unwrap().to_be_bytes()[..], &[0xff; 2]].concat());
        references.extend((0x5000_0000 | u32::try_from(data.len()).unwrap()).to_be_bytes());
        references.extend([0; 4]);
        data.extend(u32::try_from(table.len()).unwrap().to_be_bytes());
        data.extend(table);
    }
    // Types: another one stands in front.
    let count = u16::try_from(tables.len() - 1).unwrap();
    let mut map = vec![0; 24];
    map.extend(28u16.to_be_bytes());
    map.extend(0u16.to_be_bytes());
    map.extend(1u16.to_be_bytes());
    map.extend(b"plst\0\0\0\0");
    map.extend([&b"blkx"[..], &count.to_be_bytes(), &18u16.to_be_bytes()].concat());
    map.extend(references);
    let header = [256, 256 + data.len(), data.len(), map.len()].map(|word| u32::try_from(word).unwrap().to_be_bytes());
    let mut fork = header.concat();
    fork.resize(256, 0);
    fork.extend(data);
    fork.extend(map);
    fork
}

/// Noise, text that repeats itself, and zeros.
fn disk(sectors: usize) -> Vec<u8> {
    let noise = pattern(9, 40 * SECTOR);
    let text = b"All work and no play makes Jack a dull boy. 64 bytes are a line.\n"[..64].repeat(60 * SECTOR / 64);
    let mut disk = [noise, text, vec![0; 50 * SECTOR]].concat().repeat(sectors / 150 + 1);
    disk.truncate(sectors * SECTOR);
    disk
}

#[test]
fn what_other_readers_read_is_read() {
    for tool in ["7z", "dmg2img"] {
        need(tool);
    }
    let scratch = Scratch::new();
    let disk = disk(700);
    std::fs::write(scratch.file("disk"), &disk).unwrap();
    for (kinds, judges) in [
        (&[RAW][..], &["qemu-img", "7z", "dmg2img"][..]),
        (&[ZLIB], &["qemu-img", "7z", "dmg2img"]),
        (&[RAW, ZLIB], &["qemu-img", "7z", "dmg2img"]),
        (&[ADC], &["7z"]),
        (&[BZIP2], &["7z", "dmg2img"]),
        (&[LZFSE], &["7z"]),
        (&[LZMA], &["7z"]),
        (&[RAW, ADC, ZLIB, BZIP2, LZFSE, LZMA], &["7z"]),
    ] {
        std::fs::write(scratch.file("a.dmg"), image(&disk, &[700], kinds, 33, Tables::List)).unwrap();
        for judge in judges {
            let _ = std::fs::remove_file(scratch.file("theirs"));
            match *judge {
                "qemu-img" => scratch.judge(&["convert", "-O", "raw", "a.dmg", "theirs"]),
                "7z" => scratch.sh("7z e -so -tdmg a.dmg > theirs 2> /dev/null"),
                _ => scratch.sh("dmg2img -s a.dmg theirs"),
            };
            assert_same_bytes(&scratch.file("theirs"), &scratch.file("disk"));
        }
        scratch.vimg(&["convert", "-O", "raw", "a.dmg", "ours"]);
        assert_same_bytes(&scratch.file("ours"), &scratch.file("disk"));
        scratch.assert_same_info("a.dmg");
        let check = scratch.vimg(&["check", "a.dmg"]);
        assert!(check.stdout.starts_with("No errors were found on the image."), "{}", check.stdout);
    }
}

#[test]
fn partitions_names_and_places() {
    let scratch = Scratch::new();
    let disk = disk(500);
    std::fs::write(scratch.file("disk"), &disk).unwrap();
    for tables in [Tables::List, Tables::Fork] {
        let bytes = image(&disk, &[1, 63, 301, 135], &[ZLIB, RAW], 16, tables);
        // Known by its name or by its end, also with padding behind it.
        std::fs::write(scratch.file("a.dmg"), &bytes).unwrap();
        std::fs::write(scratch.file("b"), &bytes).unwrap();
        std::fs::write(scratch.file("c"), [&bytes[..], &[0; 204]].concat()).unwrap();
        scratch.judge(&["convert", "-f", "dmg", "-O", "raw", "a.dmg", "theirs"]);
        assert_same_bytes(&scratch.file("theirs"), &scratch.file("disk"));
        for name in ["a.dmg", "b", "c"] {
            scratch.vimg(&["convert", "-O", "raw", name, "ours"]);
            assert_same_bytes(&scratch.file("ours"), &scratch.file("disk"));
            scratch.vimg(&["check", name]);
        }
    }
    // The trailer in front of a data fork that is counted from there.
    let bytes = image(&disk, &[500], &[ZLIB], 16, Tables::List);
    let (rest, koly) = bytes.split_at(bytes.len() - 512);
    let mut koly = koly.to_vec();
    for at in [0x18, 0xd8] {
        let was = u64::from_be_bytes(koly[at..at + 8].try_into().unwrap());
        koly[at..at + 8].copy_from_slice(&(was + 512).to_be_bytes());
    }
    std::fs::write(scratch.file("front"), [&koly[..], rest].concat()).unwrap();
    scratch.vimg(&["convert", "-O", "raw", "front", "ours"]);
    assert_same_bytes(&scratch.file("ours"), &scratch.file("disk"));
}

#[test]
fn damage_is_found() {
    let scratch = Scratch::new();
    let disk = disk(300);
    let bytes = image(&disk, &[300], &[RAW, ZLIB], 20, Tables::List);
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut changed = bytes.clone();
        change(&mut changed);
        std::fs::write(scratch.file("a"), changed).unwrap();
    };
    // A byte of a raw block: the disk can be read, and is not what it was.
    with(&|bytes| bytes[100] ^= 1);
    let check = vimg(&["check", "-f", "dmg", "a"]).dir(scratch.path()).fails(2);
    for words in ["the checksum of the data fork is", "the checksum of partition 0 is"] {
        assert!(check.stderr.contains(words), "{}", check.stderr);
    }
    // One of the data fork's checksum.
    with(&|bytes| {
        let at = bytes.len() - 512 + 0x58;
        bytes[at] ^= 1;
    });
    let check = vimg(&["check", "-f", "dmg", "a"]).dir(scratch.path()).fails(2);
    assert!(check.stderr.contains("the checksum of the data fork"), "{}", check.stderr);
    // A codec's bytes.
    let start = disk[..20 * SECTOR].len() + 40;
    with(&|bytes| bytes[start..start + 60].fill(0xff));
    let error = vimg(&["convert", "-f", "dmg", "-O", "raw", "a", "b"]).dir(scratch.path()).fails(1).stderr;
    assert!(error.contains("block of sector 20: invalid compressed data"), "{error}");
    assert!(!scratch.file("b").exists());
    // Half a download, an encrypted one, one of several files.
    std::fs::write(scratch.file("half.dmg"), &bytes[..bytes.len() / 2]).unwrap();
    std::fs::write(scratch.file("secret"), [b"encrcdsa\0\0\0\x02", &[0; 5000][..]].concat()).unwrap();
    std::fs::write(scratch.file("older"), [&[9; 5000][..], b"cdsaencr"].concat()).unwrap();
    with(&|bytes| {
        let at = bytes.len() - 512 + 63;
        bytes[at] = 2;
    });
    for (name, words) in [
        ("half.dmg", "Could not open 'half.dmg': Could not locate UDIF trailer in dmg file"),
        ("secret", "Could not open 'secret': Encrypted dmg images are not supported"),
        ("older", "Could not open 'older': Encrypted dmg images are not supported"),
        ("a", "Could not open 'a': A dmg image in 2 files is not supported"),
    ] {
        let error = vimg(&["convert", "-O", "raw", name, "b"]).dir(scratch.path()).fails(1).stderr;
        assert!(error.contains(words), "{error}");
        assert!(!scratch.file("b").exists());
    }
}

#[test]
fn corrupt_tables_end() {
    let bytes = image(&disk(40), &[40], &[RAW, ZLIB, LZFSE], 8, Tables::Fork);
    // What is mutated stands in front: the trailer, and the fork behind it.
    let (data, rest) = bytes.split_at(bytes.len() - 512);
    let from = usize::try_from(u64::from_be_bytes(rest[0x28..0x30].try_into().unwrap())).unwrap();
    let (data, fork) = data.split_at(from);
    let mut koly = rest.to_vec();
    koly[0x18..0x20].copy_from_slice(&((512 + fork.len()) as u64).to_be_bytes());
    koly[0x28..0x30].copy_from_slice(&512u64.to_be_bytes());
    let turned = [&koly[..], fork, data].concat();
    assert_survives_mutations("dmg", &turned, 512 + 256 + 240);
}
