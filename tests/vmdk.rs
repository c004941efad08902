//! vmdk: what vimg writes is what qemu-img, 7z and the makers of the format read, and the reverse.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};

use crate::common::{Scratch, assert_same_bytes, judge, need, pattern, plain, vimg, vimg_path};

const SUBFORMATS: [&str; 5] =
    ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"];

/// A raw disk of an odd size with data at its start, across grains, and at its very end.
fn disk(scratch: &Scratch, name: &str, size: u64) {
    let file = fs::File::create(scratch.file(name)).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(&pattern(1, 200_000), 0).unwrap();
    file.write_all_at(&pattern(2, 70_000), size / 2 + 12_345).unwrap();
    file.write_all_at(&pattern(3, 700), size - 700).unwrap();
}

/// The bytes with the digits of the content id blanked out.
fn without_cid(bytes: Vec<u8>) -> Vec<u8> {
    let mut bytes = bytes;
    let key = b"\nCID=";
    if let Some(at) = bytes.windows(key.len()).position(|w| w == key) {
        let end = bytes[at + 5..].iter().position(|b| *b == b'\n').unwrap() + at + 5;
        // The id is printed without leading zeros: the text moves with its length.
        let rest: Vec<u8> = bytes.drain(at + 5..end).collect();
        if let Some(room) = bytes[at..].iter().position(|b| *b == 0) {
            let room = room + at;
            bytes.splice(room..room, vec![0; rest.len()]);
        }
    }
    bytes
}

#[test]
fn every_subformat_is_created_as_qemu_img_does() {
    let ours = Scratch::new();
    let theirs = Scratch::new();
    let options: [&[&str]; 9] = [
        &[],
        &["-o", "adapter_type=lsilogic"],
        &["-o", "compat6=on"],
        &["-o", "hwversion=10,toolsversion=99"],
        &["-o", "zeroed_grain=on"],
        &["-o", "subformat=monolithicFlat,adapter_type=buslogic"],
        &["-o", "subformat=twoGbMaxExtentSparse"],
        &["-o", "subformat=twoGbMaxExtentFlat"],
        &["-o", "adapter_type=foo"],
    ];
    for options in options {
        for size in ["0", "1", "512", "10M", "2G", "5G", "100000000512"] {
            let mut args = vec!["create", "-f", "vmdk"];
            args.extend(options);
            args.extend(["d.vmdk", size]);
            let (a, b) = (vimg(&args).dir(ours.path()).run(), judge(&args).dir(theirs.path()).run());
            assert_eq!((a.code, &a.stdout), (b.code, &b.stdout), "{args:?}\n{a:?}\n{b:?}");
            assert_eq!(a.stderr, b.stderr, "{args:?}");
            let mut names: Vec<_> =
                fs::read_dir(theirs.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            for name in &names {
                if b.code == Some(0) {
                    let (a, b) = (fs::metadata(ours.file(name)).unwrap(), fs::metadata(theirs.file(name)).unwrap());
                    assert!(a.len() == b.len() || b.len() < 4096, "length of {name} after {args:?}");
                    if b.len() < 64 << 20 {
                        let read = |s: &Scratch| without_cid(fs::read(s.file(name)).unwrap());
                        assert!(read(&ours) == read(&theirs), "{name} after {args:?}");
                    }
                }
                fs::remove_file(theirs.file(name)).unwrap();
                let _ = fs::remove_file(ours.file(name));
            }
        }
    }
}

#[test]
fn what_is_written_is_read_by_qemu_img_and_back() {
    for size in [3_100_160, 40 << 20, (2u64 << 30) + 77 * 512] {
        for subformat in SUBFORMATS {
            // The large size is for the seam between two extents.
            if size > 1 << 31 && !subformat.starts_with("twoGb") {
                continue;
            }
            let s = Scratch::new();
            disk(&s, "d.raw", size);
            let option = format!("subformat={subformat}");
            s.vimg(&["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "d.raw", "ours.vmdk"]);
            s.assert_same_content("raw", "d.raw", "vmdk", "ours.vmdk");
            s.assert_clean("vmdk", "ours.vmdk");
            s.judge(&["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "d.raw", "theirs.vmdk"]);
            s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "theirs.vmdk", "back.raw"]);
            s.assert_same_content("raw", "d.raw", "raw", "back.raw");
            s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "ours.vmdk", "back.raw"]);
            s.assert_same_content("raw", "d.raw", "raw", "back.raw");
            if subformat.ends_with("Sparse") {
                for entry in fs::read_dir(s.path()).unwrap() {
                    let name = entry.unwrap().file_name().into_string().unwrap();
                    if let Some(rest) = name.strip_prefix("theirs") {
                        let read = |who: &str| {
                            let bytes = fs::read(s.file(&format!("{who}{rest}"))).unwrap();
                            let text =
                                String::from_utf8_lossy(&bytes[..bytes.len().min(1200)]).replace("theirs", "ours");
                            (without_cid(text.into_bytes()).len(), bytes.len(), bytes.get(10752..).map(<[u8]>::to_vec))
                        };
                        let (ours, theirs) = (read("ours"), read("theirs"));
                        assert_eq!(ours.1, theirs.1, "length of {name}");
                        assert!(ours.2 == theirs.2, "bytes of {name}, {size}");
                    }
                }
            }
        }
    }
}

#[test]
fn stream_optimized_has_the_form_that_importers_insist_on() {
    need("7z");
    let s = Scratch::new();
    disk(&s, "d.raw", 70 << 20);
    s.vimg(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "d.raw", "d.vmdk"]);
    let bytes = fs::read(s.file("d.vmdk")).unwrap();
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(bytes[4..12], [3, 0, 0, 0, 1, 0, 3, 0], "version 3, flags 0x30001");
    assert_eq!(word(56), u64::MAX, "the grain directory is at the end");
    // Walk it front to back as an importer does.
    let mut at = 128 * 512;
    let (mut grains, mut tables, mut seen) = (0, 0, Vec::new());
    loop {
        let size = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        if size > 0 {
            let mut plain = vec![0; 65536];
            let status = flate2::Decompress::new(true)
                .decompress(&bytes[at + 12..at + 12 + size], &mut plain, flate2::FlushDecompress::Finish)
                .unwrap();
            assert_eq!(status, flate2::Status::StreamEnd);
            grains += 1;
            at += (12 + size).next_multiple_of(512);
            continue;
        }
        let kind = u32::from_le_bytes(bytes[at + 12..at + 16].try_into().unwrap());
        seen.push(kind);
        at += 512 * (1 + word(at) as usize);
        match kind {
            1 => tables += 1,
            0 => break,
            _ => {}
        }
    }
    assert_eq!(at, bytes.len(), "nothing follows the end-of-stream marker");
    assert_eq!((grains, tables), (4 + 2 + 1, 3));
    assert_eq!(seen, [1, 1, 1, 2, 3, 0], "tables, directory, footer, end");
    // A reader that is neither vimg nor QEMU.
    s.sh("7z e -so d.vmdk > seven.raw 2>/dev/null");
    assert!(fs::read(s.file("seven.raw")).unwrap() == fs::read(s.file("d.raw")).unwrap());
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let s = Scratch::new();
    disk(&s, "d.raw", 300 << 20);
    for subformat in ["streamOptimized", "monolithicSparse"] {
        let option = format!("subformat={subformat}");
        let mut seen: Option<Vec<u8>> = None;
        for threads in ["1", "2", "16"] {
            let args = ["convert", "-m", threads, "-f", "raw", "-O", "vmdk", "-o", &option, "d.raw", "d.vmdk"];
            vimg(&args).dir(s.path()).env("SOURCE_DATE_EPOCH", "1").ok();
            let bytes = fs::read(s.file("d.vmdk")).unwrap();
            assert!(seen.is_none_or(|seen| seen == bytes), "{subformat} with {threads} threads");
            seen = Some(bytes);
        }
    }
}

#[test]
fn every_subformat_grows_and_shrinks() {
    for subformat in SUBFORMATS {
        let s = Scratch::new();
        disk(&s, "d.raw", 40 << 20);
        let option = format!("subformat={subformat}");
        s.vimg(&["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "d.raw", "d.vmdk"]);
        for size in ["41M", "70M", "1900M"] {
            s.vimg(&["resize", "-f", "vmdk", "d.vmdk", size]);
            s.vimg(&["resize", "-f", "raw", "d.raw", size]);
            s.assert_same_content("vmdk", "d.vmdk", "raw", "d.raw");
            s.assert_clean("vmdk", "d.vmdk");
        }
        if subformat == "streamOptimized" {
            continue;
        }
        // The new part can be written to.
        s.qemu_io("vmdk", "d.vmdk", &["write -P 7 1800M 1M"]);
        s.qemu_io("raw", "d.raw", &["write -P 7 1800M 1M"]);
        s.assert_same_content("vmdk", "d.vmdk", "raw", "d.raw");
        for size in ["1800M", "20M", "1G"] {
            s.vimg(&["resize", "--shrink", "-f", "vmdk", "d.vmdk", size]);
            s.vimg(&["resize", "--shrink", "-f", "raw", "d.raw", size]);
            s.assert_same_content("vmdk", "d.vmdk", "raw", "d.raw");
            s.assert_clean("vmdk", "d.vmdk");
        }
    }
}

#[test]
fn split_images_grow_by_new_extents() {
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let s = Scratch::new();
        disk(&s, "d.raw", 3 << 30);
        let option = format!("subformat={subformat}");
        s.vimg(&["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "d.raw", "d.vmdk"]);
        let letter = if subformat.ends_with("Flat") { 'f' } else { 's' };
        // What is in the way stays, and the image as it was.
        let third = format!("d-{letter}003.vmdk");
        fs::write(s.file(&third), "precious").unwrap();
        let before = fs::read(s.file("d.vmdk")).unwrap();
        let out = vimg(&["resize", "-f", "vmdk", "d.vmdk", "7G"]).dir(s.path()).fails(1);
        assert!(out.stderr.contains("is there already, and would become a part of the image"), "{out:?}");
        assert_eq!(fs::read(s.file(&third)).unwrap(), b"precious");
        assert_eq!(fs::read(s.file("d.vmdk")).unwrap(), before);
        fs::remove_file(s.file(&third)).unwrap();
        for size in ["3500M", "7G", "7169M", "13G"] {
            s.vimg(&["resize", "-f", "vmdk", "d.vmdk", size]);
            s.vimg(&["resize", "-f", "raw", "d.raw", size]);
            s.assert_same_content("vmdk", "d.vmdk", "raw", "d.raw");
            s.assert_clean("vmdk", "d.vmdk");
        }
        let text = |name: &str| String::from_utf8(without_cid(fs::read(s.file(name)).unwrap())).unwrap();
        if subformat.ends_with("Flat") {
            // Lengths, names and geometry are those of a new image of that size.
            s.judge(&["create", "-q", "-f", "vmdk", "-o", &option, "new.vmdk", "13G"]);
            assert_eq!(
                text("d.vmdk").trim_end_matches('\0'),
                text("new.vmdk").replace("new-", "d-").trim_end_matches('\0')
            );
        } else {
            // An extent that has others behind it stays as long as it was.
            let lengths = text("d.vmdk")
                .lines()
                .filter_map(|line| line.strip_prefix("RW ")?.split(' ').next()?.parse().ok())
                .collect::<Vec<u64>>();
            let mib = |n: u64| n * 2048;
            assert_eq!(lengths, [2048, 1452, 2048, 1621, 2048, 2048, 2047].map(mib));
        }
        let writes = ["write -P 7 4095M 2M", "write -P 8 12G 1M"];
        s.qemu_io("vmdk", "d.vmdk", &writes);
        s.qemu_io("raw", "d.raw", &writes);
        s.assert_same_content("vmdk", "d.vmdk", "raw", "d.raw");
        s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "d.vmdk", "back.raw"]);
        s.assert_same_content("raw", "back.raw", "raw", "d.raw");
    }
}

/// Guest data is for those alone who could read it before.
#[test]
fn new_extents_have_the_mode_of_their_neighbours() {
    for (subformat, letter) in [("twoGbMaxExtentSparse", 's'), ("twoGbMaxExtentFlat", 'f')] {
        for mode in [0o600, 0o640, 0o666] {
            let s = Scratch::new();
            s.judge(&["create", "-q", "-f", "vmdk", "-o", &format!("subformat={subformat}"), "d.vmdk", "3G"]);
            s.sh(&format!("chmod {mode:o} *.vmdk"));
            s.vimg(&["resize", "-f", "vmdk", "d.vmdk", "7G"]);
            for name in ["d.vmdk".to_owned(), format!("d-{letter}003.vmdk"), format!("d-{letter}004.vmdk")] {
                let has = fs::metadata(s.file(&name)).unwrap().permissions().mode() & 0o777;
                assert_eq!(has, mode, "{name}");
            }
        }
    }
}

#[test]
fn a_descriptor_is_replaced_where_it_can_be() {
    let create = ["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "d.vmdk", "1G"];
    let s = Scratch::new();
    s.judge(&create);
    // The two names of a hard link are one file, and stay it.
    fs::hard_link(s.file("d.vmdk"), s.file("hard.vmdk")).unwrap();
    s.vimg(&["resize", "d.vmdk", "3G"]);
    assert!(fs::read(s.file("d.vmdk")).unwrap() == fs::read(s.file("hard.vmdk")).unwrap());
    fs::remove_file(s.file("hard.vmdk")).unwrap();
    // So does a symbolic link; mode and owner are kept.
    s.sh("mv d.vmdk real; ln -s real d.vmdk; chmod 640 real");
    s.vimg(&["resize", "d.vmdk", "5G"]);
    s.sh("test -L d.vmdk && test $(stat -c %a real) = 640");
    s.assert_clean("vmdk", "d.vmdk");
    assert!(s.judge(&["info", "d.vmdk"]).stdout.contains("virtual size: 5 GiB"));
    // Where a name cannot be given, nothing is.
    let before = s.sh("ls -A").stdout;
    s.sh("ln -s nowhere/x d-s004.vmdk");
    vimg(&["resize", "d.vmdk", "9G"]).dir(s.path()).fails(1);
    s.sh("rm d-s004.vmdk");
    assert_eq!(s.sh("ls -A").stdout, before);
}

#[test]
fn a_flat_extent_grows_over_zeros_and_leaves_others_alone() {
    let s = Scratch::new();
    fs::write(s.file("f"), pattern(4, 3 << 20)).unwrap();
    let text = |lines: &str| {
        let head = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n";
        fs::write(s.file("d.vmdk"), format!("{head}{lines}")).unwrap();
    };
    let data = pattern(4, 3 << 20);
    // What lies behind the extent was never a part of the disk.
    text("RW 2048 FLAT \"f\" 1024\n");
    s.vimg(&["resize", "-f", "vmdk", "d.vmdk", "4M"]);
    s.judge(&["convert", "-f", "vmdk", "-O", "raw", "d.vmdk", "d.raw"]);
    let got = fs::read(s.file("d.raw")).unwrap();
    assert!(got[..1 << 20] == data[512 << 10..1536 << 10] && got[1 << 20..].iter().all(|b| *b == 0));
    assert!(fs::read(s.file("f")).unwrap()[..1536 << 10] == data[..1536 << 10]);
    // Two extents in one file: what is behind one may be the other.
    fs::write(s.file("f"), &data).unwrap();
    text("RW 2048 FLAT \"f\" 2048\nRW 2048 FLAT \"f\" 0\n");
    for size in ["3M", "1536k"] {
        // The locks say so; where there are none, the driver does.
        vimg(&["resize", "-f", "vmdk", "--shrink", "d.vmdk", size]).dir(s.path()).fails(1);
    }
    assert!(fs::read(s.file("f")).unwrap() == data);
}

#[test]
fn a_large_directory_moves_when_it_must() {
    let s = Scratch::new();
    s.judge(&["create", "-f", "vmdk", "d.vmdk", "10G"]);
    s.qemu_io("vmdk", "d.vmdk", &["write -P 5 9G 1M", "write -P 6 0 64k"]);
    s.judge(&["convert", "-f", "vmdk", "-O", "raw", "d.vmdk", "d.raw"]);
    s.vimg(&["resize", "-f", "vmdk", "d.vmdk", "100G"]);
    s.vimg(&["resize", "-f", "raw", "d.raw", "100G"]);
    s.assert_same_content("vmdk", "d.vmdk", "raw", "d.raw");
    s.qemu_io("vmdk", "d.vmdk", &["write -P 9 99G 2M", "read -P 9 99G 2M", "read -P 5 9G 1M"]);
    s.assert_clean("vmdk", "d.vmdk");
}

/// Where the source is zero the parent must not show, though a stream has no zero grains.
#[test]
fn a_stream_on_a_parent_is_what_its_source_is() {
    let s = Scratch::new();
    disk(&s, "a", 4 << 20);
    s.judge(&["convert", "-f", "raw", "-O", "vmdk", "a", "base.vmdk"]);
    fs::write(s.file("sm"), pattern(3, 100_000)).unwrap();
    s.sh("truncate -s 4M sm zeros");
    for more in ["", "-S 1M", "-S 0", "-o zeroed_grain=on", "-m 8"] {
        for source in ["sm", "zeros"] {
            let args = ["convert", "-B", "base.vmdk", "-F", "vmdk", "-f", "raw", "-O", "vmdk"];
            let options = ["-o", "subformat=streamOptimized"];
            s.vimg(&[&args[..], &options, &more.split_whitespace().collect::<Vec<_>>(), &[source, "o.vmdk"]].concat());
            s.assert_same_content("vmdk", "o.vmdk", "raw", source);
            let options = "subformat=streamOptimized,backing_file=base.vmdk,backing_fmt=vmdk";
            s.judge(&["create", "-q", "-f", "vmdk", "-o", options, "n.vmdk"]);
            s.vimg(&["convert", "-n", "-f", "raw", "-O", "vmdk", source, "n.vmdk"]);
            s.assert_same_content("vmdk", "n.vmdk", "raw", source);
        }
    }
}

#[test]
fn a_child_knows_its_parent() {
    let s = Scratch::new();
    disk(&s, "d.raw", 8 << 20);
    s.judge(&["convert", "-f", "raw", "-O", "vmdk", "d.raw", "base.vmdk"]);
    s.vimg(&["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "over.vmdk"]);
    s.qemu_io("vmdk", "over.vmdk", &["write -P 3 1M 100k"]);
    s.judge(&["convert", "-f", "vmdk", "-O", "raw", "over.vmdk", "flat.raw"]);
    s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "over.vmdk", "ours.raw"]);
    s.assert_same_content("raw", "flat.raw", "raw", "ours.raw");
    // The parent changes: the child must say so instead of giving a mixture.
    s.qemu_io("vmdk", "base.vmdk", &["write -P 1 0 512"]);
    let out = vimg(&["convert", "-f", "vmdk", "-O", "raw", "over.vmdk", "x.raw"]).dir(s.path()).fails(1);
    assert!(out.stderr.contains("The parent has changed since this image was made"), "{out:?}");
    let line = ["convert", "-f", "vmdk", "-O", "raw", "over.vmdk", "x.raw"];
    let out = plain(vimg_path().to_str().expect("a path"), &line).dir(s.path()).fails(1);
    assert!(out.stderr.contains("'rebase -u' names the parent again"), "{out:?}");
    assert!(!s.file("x.raw").exists());
}

#[test]
fn odd_descriptors_are_read() {
    let s = Scratch::new();
    disk(&s, "flat.bin", 4 << 20);
    let text = "# Disk DescriptorFile\r\nversion = 1\r\nencoding=\"windows-1252\"\r\nCID = 12345678\r\nparentCID=ffffffff\r\n\
                createType = \"custom\"\r\n\r\n  RW  1024  FLAT  \"flat.bin\"  512\r\nRW 100 ZERO\r\nRDONLY 8 FLAT \"flat.bin\" 0\r\n";
    fs::write(s.file("d.vmdk"), text).unwrap();
    s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "d.vmdk", "d.raw"]);
    let (disk, got) = (fs::read(s.file("flat.bin")).unwrap(), fs::read(s.file("d.raw")).unwrap());
    assert_eq!(got.len(), 1132 * 512);
    assert!(got[..1024 * 512] == disk[512 * 512..1536 * 512]);
    assert!(got[1024 * 512..1124 * 512].iter().all(|b| *b == 0));
    assert!(got[1124 * 512..] == disk[..8 * 512]);
}

#[test]
fn space_efficient_extents_are_read_as_qemu_img_reads_them() {
    let s = Scratch::new();
    let mut file = vec![0u8; 8192 * 512 + 100 * 4096];
    let put = |file: &mut Vec<u8>, at: usize, v: u64| file[at..at + 8].copy_from_slice(&v.to_le_bytes());
    let capacity = 4096 * 8 * 2 + 80;
    let header = [
        0xcafe_babe,
        0x2_0000_0001,
        capacity,
        8,
        64,
        0,
        0,
        0,
        0,
        0,
        1,
        1,
        2,
        1,
        3,
        16,
        128,
        1,
        256,
        192,
        2048,
        8,
        2100,
        8,
        8192,
        800,
    ];
    for (i, v) in header.into_iter().enumerate() {
        put(&mut file, i * 8, v);
    }
    put(&mut file, 512, 0xcafe_cafe);
    for table in 0..3 {
        put(&mut file, 128 * 512 + table * 8, 0x1000_0000_0000_0000 | table as u64);
    }
    let data = pattern(9, 100 * 4096);
    file[8192 * 512..].copy_from_slice(&data);
    for (at, grain) in [(0, 5u64), (1, 6), (2, 7), (10, 0), (4096, 3), (4097, 99), (8192, 50)] {
        put(&mut file, 256 * 512 + at * 8, 0x3000_0000_0000_0000 | ((grain & 0xfff) << 48) | (grain >> 12));
    }
    put(&mut file, 256 * 512 + 20 * 8, 0x2000_0000_0000_0000);
    fs::write(s.file("d-sesparse.vmdk"), file).unwrap();
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"seSparse\"\nRW {capacity} SESPARSE \"d-sesparse.vmdk\"\n"
    );
    fs::write(s.file("d.vmdk"), text).unwrap();
    s.judge(&["convert", "-f", "vmdk", "-O", "raw", "d.vmdk", "theirs.raw"]);
    s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "d.vmdk", "ours.raw"]);
    s.assert_same_content("raw", "theirs.raw", "raw", "ours.raw");
    let (a, b) = (plain("qemu-img", &["info", "d.vmdk"]).dir(s.path()).ok(), s.vimg(&["info", "d.vmdk"]));
    assert_eq!(a.stdout, b.stdout);
}

/// A parent that is named is never left out in silence.
#[test]
fn a_parent_by_name_alone_is_not_left_out() {
    let s = Scratch::new();
    s.judge(&["create", "-q", "-f", "vmdk", "b.vmdk", "1M"]);
    s.judge(&["create", "-q", "-f", "vmdk", "-b", "b.vmdk", "-F", "vmdk", "o.vmdk"]);
    s.sh("sed -i 's/^parentCID=.*/parentCID=ffffffff/' o.vmdk");
    let args = ["info", "o.vmdk"];
    assert_eq!(s.vimg(&args).stdout, s.judge(&args).stdout);
    let out = vimg(&["convert", "-O", "raw", "o.vmdk", "out"]).dir(s.path()).fails(1);
    assert!(out.stderr.contains("The parent has changed"), "{out:?}");
    assert!(!s.file("out").exists());
}

/// A descriptor with those lines, padded as the reference pads it.
fn descriptor(create_type: &str, lines: &str) -> String {
    format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n{lines}\n")
}

/// What is a part of a disk is not taken for a whole one.
#[test]
fn a_lone_extent_is_refused() {
    let s = Scratch::new();
    s.judge(&["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "x.vmdk", "5G"]);
    let mut cowd = vec![0; 4096];
    cowd[..4].copy_from_slice(b"COWD");
    for (index, word) in [(1, 1), (2, 3), (3, 2048), (4, 1), (5, 4), (6, 1u32)] {
        cowd[index * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
    fs::write(s.file("x-delta.vmdk"), cowd).unwrap();
    let mut sesparse = vec![0; 4096];
    sesparse[..8].copy_from_slice(&0xcafe_babe_u64.to_le_bytes());
    fs::write(s.file("x-sesparse.vmdk"), sesparse).unwrap();
    for name in ["x-s001.vmdk", "x-delta.vmdk", "x-sesparse.vmdk"] {
        for command in [&["info", name][..], &["convert", "-O", "qcow2", name, "o"], &["resize", name, "+1M"]] {
            let out = vimg(command).dir(s.path()).fails(1);
            assert!(out.stderr.contains("one extent of a disk"), "{out:?}");
        }
    }
    assert!(!s.file("o").exists());
    s.vimg(&["convert", "-O", "qcow2", "x.vmdk", "o"]);
}

/// A descriptor that leaves a part of the disk out is refused; what the reference opens is opened.
#[test]
fn a_descriptor_is_whole_or_refused() {
    let s = Scratch::new();
    fs::write(s.file("f"), pattern(1, 1 << 20)).unwrap();
    let ends = [
        "",
        "RW 2048",
        "RW 2048 FLAT \"f\"",
        "RW 2048 FLAT \"f",
        "RWX 2048 FLAT \"f\" 0",
        "RW 2048 FLATT \"f\" 0",
        "RW 2048 FLAT \"f\" x",
        "RW 0 FLAT \"f\" 0",
        "R W 2048 FLAT \"f\" 0",
    ];
    for line in ends {
        for before in ["", "RW 2048 FLAT \"f\" 0\n"] {
            if line.is_empty() && !before.is_empty() {
                continue;
            }
            fs::write(s.file("d.vmdk"), descriptor("monolithicFlat", &format!("{before}{line}"))).unwrap();
            let out = vimg(&["convert", "-O", "raw", "d.vmdk", "o"]).dir(s.path()).fails(1);
            let expected = if line.is_empty() { "names no extents" } else { "Invalid extent line: R" };
            assert!(out.stderr.contains(expected) && !s.file("o").exists(), "{line}: {out:?}");
        }
    }
    // The first error is that of the first line.
    fs::write(s.file("d.vmdk"), descriptor("vmfs", "RW 2048 VMFS \"gone\"\nRW 2048 VMFS \"f\" -1")).unwrap();
    let args = ["info", "d.vmdk"];
    let (ours, theirs) = (vimg(&args).dir(s.path()).fails(1), judge(&args).dir(s.path()).fails(1));
    assert_eq!(ours.stderr, theirs.stderr);
    for line in ["RW 2048 VMFS \"f\"", "RW 2048 VMFS \"f\" partitionUUID 5b2d8b35", "RW 2048 FLAT \"f\" 0"] {
        fs::write(s.file("d.vmdk"), descriptor("vmfs", line)).unwrap();
        let args = ["info", "d.vmdk"];
        assert_eq!(s.vimg(&args).stdout, s.judge(&args).stdout, "{line}");
        s.assert_same_content("raw", "f", "vmdk", "d.vmdk");
    }
    // A disk of 0 bytes has none, and says so.
    s.judge(&["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "zero.vmdk", "0"]);
    s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "zero.vmdk", "o"]);
    assert_eq!(fs::metadata(s.file("o")).unwrap().len(), 0);
}

#[test]
fn a_mark_before_a_descriptor_and_a_later_version_are_no_hindrance() {
    let s = Scratch::new();
    fs::write(s.file("f"), pattern(1, 1 << 20)).unwrap();
    let text = descriptor("monolithicFlat", "RW 2048 FLAT \"f\" 0");
    fs::write(s.file("d.vmdk"), format!("\u{feff}{text}")).unwrap();
    assert!(s.vimg(&["info", "d.vmdk"]).stdout.contains("file format: vmdk"));
    s.vimg(&["convert", "-O", "raw", "d.vmdk", "o"]);
    s.assert_same_content("raw", "f", "raw", "o");
    s.vimg(&["resize", "d.vmdk", "2M"]);
    assert!(fs::read(s.file("d.vmdk")).unwrap().starts_with("\u{feff}# Disk".as_bytes()));
    assert!(s.vimg(&["info", "d.vmdk"]).stdout.contains("virtual size: 2 MiB"));
    fs::write(s.file("d.vmdk"), text.replace("version=1", "version=4")).unwrap();
    for args in [&["info", "-f", "vmdk", "d.vmdk"][..], &["info", "d.vmdk"]] {
        assert_eq!(s.vimg(args).stdout, s.judge(args).stdout);
    }
}

/// However little of a descriptor is there, from its title on, it is no disk of text, and no shorter disk.
#[test]
fn a_descriptor_that_is_cut_short_is_refused_at_every_length() {
    let s = Scratch::new();
    s.judge(&["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", "x.vmdk", "5G"]);
    let text = fs::read(s.file("x.vmdk")).unwrap();
    let end = String::from_utf8_lossy(&text).find("#DDB").unwrap();
    for len in "# Disk DescriptorFile".len()..end {
        fs::write(s.file("cut.vmdk"), &text[..len]).unwrap();
        let out = vimg(&["info", "cut.vmdk"]).dir(s.path()).fails(1);
        assert!(out.stderr.contains("Could not open"), "{len}: {out:?}");
    }
    // Padding behind a text that is whole is none of it, and a title is as good as a version that comes late.
    let mut padded = text.clone();
    padded.resize(2 << 20, 0);
    fs::write(s.file("padded.vmdk"), padded).unwrap();
    let late = String::from_utf8(text).unwrap().replace("version=1", "encoding=\"UTF-8\"\nversion=1");
    fs::write(s.file("late.vmdk"), late).unwrap();
    for name in ["padded.vmdk", "late.vmdk"] {
        assert!(s.vimg(&["info", name]).stdout.contains("virtual size: 5 GiB"), "{name}");
    }
}

/// A device that ends before its extent does is another device.
#[test]
fn a_device_that_is_too_small_is_refused() {
    let s = Scratch::new();
    fs::write(s.file("sdb"), pattern(1, 1 << 20)).unwrap();
    for kind in ["fullDevice", "partitionedDevice"] {
        fs::write(s.file("d.vmdk"), descriptor(kind, "RW 4096 FLAT \"sdb\" 0")).unwrap();
        let out = vimg(&["convert", "-O", "raw", "d.vmdk", "o"]).dir(s.path()).fails(1);
        assert!(out.stderr.contains("'sdb' has 1048576 bytes, and its extent ends at 2097152"), "{out:?}");
        fs::write(s.file("d.vmdk"), descriptor(kind, "RW 1024 FLAT \"sdb\" 1024")).unwrap();
        s.vimg(&["convert", "-O", "raw", "d.vmdk", "o"]);
        assert!(fs::read(s.file("o")).unwrap() == fs::read(s.file("sdb")).unwrap()[512 << 10..]);
    }
}

#[test]
fn extents_are_found_in_other_encodings_and_on_other_systems() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let s = Scratch::new();
    let gbk = b"\xb4\xc5\xc5\xcc-flat.vmdk";
    let mut text = descriptor("monolithicFlat", "encoding=\"GBK\"\nRW 2048 FLAT \"@\" 0").into_bytes();
    let at = text.iter().position(|byte| *byte == b'@').unwrap();
    text.splice(at..=at, gbk.iter().copied());
    fs::write(s.file("g.vmdk"), &text).unwrap();
    let content = pattern(1, 1 << 20);
    // The bytes as they are come first.
    let (bytes, decoded) = (s.path().join(OsStr::from_bytes(gbk)), s.file("\u{78c1}\u{76d8}-flat.vmdk"));
    fs::write(&decoded, &content).unwrap();
    s.vimg(&["convert", "-O", "raw", "g.vmdk", "o"]);
    assert!(fs::read(s.file("o")).unwrap() == content);
    fs::write(&bytes, pattern(2, 1 << 20)).unwrap();
    s.vimg(&["convert", "-O", "raw", "g.vmdk", "o"]);
    assert!(fs::read(s.file("o")).unwrap() == pattern(2, 1 << 20));
    fs::remove_file(&decoded).unwrap();
    s.vimg(&["resize", "g.vmdk", "2M"]);
    assert!(fs::read(s.file("g.vmdk")).unwrap().windows(gbk.len()).any(|window| window == gbk));
    assert_eq!(fs::metadata(&bytes).unwrap().len(), 2 << 20);
    // Of a path of Windows, the last component beside the descriptor, where nothing else is found.
    fs::write(s.file("d-flat.vmdk"), &content).unwrap();
    fs::create_dir(s.file("sub")).unwrap();
    for path in ["C:\\vm\\d-flat.vmdk", "C:/vm/d-flat.vmdk", "vm\\d-flat.vmdk"] {
        fs::write(s.file("w.vmdk"), descriptor("monolithicFlat", &format!("RW 2048 FLAT \"{path}\" 0"))).unwrap();
        s.vimg(&["convert", "-O", "raw", "w.vmdk", "o"]);
        assert!(fs::read(s.file("o")).unwrap() == content, "{path}");
    }
    fs::write(s.file("vm\\d-flat.vmdk"), pattern(3, 1 << 20)).unwrap();
    s.vimg(&["convert", "-O", "raw", &format!("{}/w.vmdk", s.path().display()), "o"]);
    assert!(fs::read(s.file("o")).unwrap() == pattern(3, 1 << 20));
    // The same for a parent.
    s.judge(&["convert", "-f", "raw", "-O", "vmdk", "d-flat.vmdk", "base.vmdk"]);
    s.judge(&["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "over.vmdk"]);
    let windows = fs::read(s.file("over.vmdk")).unwrap();
    let text = String::from_utf8(windows[512..10752].to_vec()).unwrap();
    let mut text = text.trim_end_matches('\0').replace("\"base.vmdk", "\"C:\\vm\\base.vmdk").into_bytes();
    text.resize(10240, 0);
    let mut windows = windows;
    windows[512..10752].copy_from_slice(&text);
    fs::write(s.file("over.vmdk"), windows).unwrap();
    s.vimg(&["convert", "-O", "raw", "over.vmdk", "o"]);
    assert!(fs::read(s.file("o")).unwrap() == content);
}

/// What a descriptor could not give back is not made; where the file needs no name, any name will do.
#[test]
fn names_that_no_descriptor_can_hold_are_refused_at_create() {
    let s = Scratch::new();
    for name in ["a\"b.vmdk", "a\nb.vmdk", "a\rb.vmdk"] {
        for subformat in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
            let option = format!("subformat={subformat}");
            let out = vimg(&["create", "-q", "-f", "vmdk", "-o", &option, name, "1M"]).dir(s.path()).fails(1);
            assert!(out.stderr.contains("A vmdk descriptor cannot hold the file name"), "{out:?}");
            assert_eq!(s.sh("ls").stdout, "");
        }
        s.vimg(&["create", "-q", "-f", "vmdk", name, "1M"]);
        s.assert_clean("vmdk", name);
        s.vimg(&["convert", "-f", "vmdk", "-O", "raw", name, "o"]);
        s.sh("rm -f ./*");
    }
}

/// Names with a colon, in the folder, in another one, absolute: create, open and resize mean the same files.
#[test]
fn extents_are_plain_paths() {
    let s = Scratch::new();
    fs::create_dir(s.file("sub")).unwrap();
    let absolute = format!("{}/sub/c:d.vmdk", s.path().display());
    for name in ["./a:b.vmdk", "sub/a:b.vmdk", &absolute] {
        s.judge(&["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", name, "3G"]);
        s.vimg(&["resize", "-f", "vmdk", name, "5G"]);
        for info in [s.vimg(&["info", name]), s.judge(&["info", name])] {
            assert!(info.stdout.contains("virtual size: 5 GiB"), "{info:?}");
        }
        let third = name.replace(".vmdk", "-s003.vmdk");
        assert!(s.path().join(&third).exists(), "{third}");
    }
}

/// Through a link, the extents are where they are without it.
#[test]
fn extents_stay_beside_the_target_of_a_link() {
    let s = Scratch::new();
    disk(&s, "d.raw", 1 << 20);
    fs::write(s.file("e.raw"), pattern(9, 1 << 20)).unwrap();
    for folder in ["real", "links"] {
        fs::create_dir(s.file(folder)).unwrap();
    }
    std::os::unix::fs::symlink("../real/d.vmdk", s.file("links/d.vmdk")).unwrap();
    for subformat in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let option = format!("subformat={subformat}");
        for (source, target) in [("d.raw", "real/d.vmdk"), ("e.raw", "links/d.vmdk")] {
            s.vimg(&["convert", "-f", "raw", "-O", "vmdk", "-o", &option, source, target]);
        }
        s.assert_same_content("raw", "e.raw", "vmdk", "real/d.vmdk");
        if subformat == "twoGbMaxExtentSparse" {
            s.vimg(&["resize", "-q", "links/d.vmdk", "3G"]);
            assert!(s.judge(&["info", "real/d.vmdk"]).stdout.contains("virtual size: 3 GiB"));
        }
        s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "links/d.vmdk", "o"]);
        assert_eq!(s.sh("ls links").stdout, "d.vmdk\n");
        s.sh("rm -f real/*");
    }
}

/// Two names that are different bytes, though not text, are different disks; the extents are called as qemu-img's.
#[test]
fn extents_have_the_bytes_of_the_images_name() {
    let s = Scratch::new();
    disk(&s, "d.raw", 1 << 20);
    fs::write(s.file("e.raw"), pattern(9, 1 << 20)).unwrap();
    let disks = [(b"caf\xe9.vmdk".as_slice(), "d.raw"), (b"caf\xe8.vmdk", "e.raw")];
    let run = |ours: bool, args: &[&str], name: &[u8], last: &str| {
        let name = [OsStr::from_bytes(name)];
        let args: Vec<_> = args.iter().map(OsStr::new).chain(name).chain([last].map(OsStr::new)).collect();
        if ours { vimg(&args) } else { judge(&args) }.dir(s.path()).ok()
    };
    for subformat in ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let option = format!("subformat={subformat}");
        let files = [true, false].map(|ours| {
            for (name, _) in disks {
                run(ours, &["create", "-q", "-f", "vmdk", "-o", &option], name, "1M");
            }
            let mut files: Vec<_> = fs::read_dir(s.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            files.sort();
            s.sh("rm -f caf*");
            files
        });
        assert_eq!(files[0], files[1], "{subformat}");
        for (name, source) in disks {
            let to = [OsStr::from_bytes(name)];
            let args = ["convert", "-f", "raw", "-O", "vmdk", "-o", &option, source].map(OsStr::new);
            vimg(&[args.as_slice(), &to].concat()).dir(s.path()).ok();
        }
        for (ours, (name, source)) in [true, false].into_iter().flat_map(|ours| disks.map(|disk| (ours, disk))) {
            run(ours, &["convert", "-f", "vmdk", "-O", "raw"], name, "o");
            assert_same_bytes(&s.file("o"), &s.file(source));
        }
        if subformat == "twoGbMaxExtentSparse" {
            run(true, &["resize", "-q"], disks[0].0, "3G");
            run(false, &["info"], disks[0].0, "-U");
        }
        s.sh("rm -f caf* o");
    }
}

/// Where header and footer of a stream differ, the footer's fields rule, unless the footer is the damaged one.
#[test]
fn the_footer_of_a_stream_rules() {
    let s = Scratch::new();
    disk(&s, "d.raw", 3 << 20);
    s.vimg(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "d.raw", "d.vmdk"]);
    let whole = fs::read(s.file("d.vmdk")).unwrap();
    let footer = whole.len() - 1024;
    let with = |at: usize, bytes: &[u8]| {
        let mut file = whole.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(s.file("x.vmdk"), file).unwrap();
    };
    // It does not say where the directory is.
    for wrong in [2u64, 0, 21, 1 << 40] {
        with(56, &wrong.to_le_bytes());
        s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "x.vmdk", "o"]);
        s.assert_same_content("raw", "d.raw", "raw", "o");
    }
    // The header knows nothing: version, flags, capacity, grain, descriptor, entries, overhead, compression.
    let wild = 0x7fff_ffff_u64.to_le_bytes();
    for (at, len) in [(4, 4), (8, 4), (12, 8), (20, 8), (28, 8), (36, 8), (44, 4), (64, 8), (77, 2)] {
        with(at, &wild[..len]);
        s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "x.vmdk", "o"]);
        s.assert_same_content("raw", "d.raw", "raw", "o");
    }
    // Both make sense: the footer's is the disk, unless it is shorter than the descriptor knows.
    with(footer + 12, &4096u64.to_le_bytes());
    let out = vimg(&["info", "x.vmdk"]).dir(s.path()).fails(1);
    assert!(out.stderr.contains("capacity of 4096 sectors, the descriptor an extent of 6144"), "{out:?}");
    with(12, &4096u64.to_le_bytes());
    assert!(s.vimg(&["info", "x.vmdk"]).stdout.contains("virtual size: 3 MiB"));
    // The footer is the damaged one.
    for (at, len) in [(4, 4), (8, 2), (12, 8), (20, 8), (44, 4), (64, 8), (77, 2)] {
        with(footer + at, &wild[..len]);
        s.vimg(&["convert", "-f", "vmdk", "-O", "raw", "x.vmdk", "o"]);
        s.assert_same_content("raw", "d.raw", "raw", "o");
    }
}

#[test]
fn salvage_reads_on_over_a_parent_that_has_changed() {
    let s = Scratch::new();
    disk(&s, "d.raw", 1 << 20);
    s.judge(&["convert", "-f", "raw", "-O", "vmdk", "d.raw", "base.vmdk"]);
    s.judge(&["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "over.vmdk"]);
    s.qemu_io("vmdk", "base.vmdk", &["write -P 1 0 512"]);
    vimg(&["convert", "-f", "vmdk", "-O", "raw", "over.vmdk", "o"]).dir(s.path()).fails(1);
    let out = s.vimg(&["convert", "--salvage", "-f", "vmdk", "-O", "raw", "over.vmdk", "o"]);
    assert!(out.stderr.contains("warning: ") && out.stderr.contains("The parent has changed"), "{out:?}");
    s.assert_same_content("vmdk", "base.vmdk", "raw", "o");
}

/// A grain that is another one's, or not as long as the header says, is no disk.
#[test]
fn a_damaged_grain_size_of_a_stream_is_seen() {
    let s = Scratch::new();
    disk(&s, "d.raw", 3 << 20);
    s.judge(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "d.raw", "d.vmdk"]);
    fs::write(s.file("e.raw"), pattern(1, 65536)).unwrap();
    s.judge(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "e.raw", "e.vmdk"]);
    let (long, short) = (fs::read(s.file("d.vmdk")).unwrap(), fs::read(s.file("e.vmdk")).unwrap());
    for (sectors, whole) in [(64u64, &long), (256, &long), (64, &short)] {
        let mut file = whole.clone();
        file[20..28].copy_from_slice(&sectors.to_le_bytes());
        fs::write(s.file("x.vmdk"), file).unwrap();
        crate::common::judge(&["convert", "-f", "vmdk", "-O", "raw", "x.vmdk", "o"]).dir(s.path()).fails(1);
        let _ = fs::remove_file(s.file("o"));
        let out = vimg(&["convert", "-f", "vmdk", "-O", "raw", "x.vmdk", "o"]).dir(s.path()).fails(1);
        assert!(out.stderr.contains("x.vmdk: "), "{out:?}");
        assert!(!s.file("o").exists());
    }
}

#[test]
fn a_header_without_capacity_is_refused_where_the_descriptor_knows_better() {
    let s = Scratch::new();
    disk(&s, "d.raw", 3 << 20);
    for (subformat, file) in
        [("monolithicSparse", "d.vmdk"), ("streamOptimized", "d.vmdk"), ("twoGbMaxExtentSparse", "d-s001.vmdk")]
    {
        let option = format!("subformat={subformat}");
        s.judge(&["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "d.raw", "d.vmdk"]);
        let mut bytes = fs::read(s.file(file)).unwrap();
        bytes[12..20].fill(0);
        fs::write(s.file(file), bytes).unwrap();
        let out = vimg(&["convert", "-f", "vmdk", "-O", "raw", "d.vmdk", "o"]).dir(s.path()).fails(1);
        assert!(out.stderr.contains("capacity of 0 sectors, the descriptor an extent of 6144"), "{out:?}");
    }
}

/// Extents of one file, under its name and others of it: for a reader it is open and locked once. (What comes of a lock
/// for each is quadratic: the kernel looks at all locks of a file for each that is taken.) Two that are written to are
/// in each other's way.
#[test]
fn a_file_of_many_extents_is_locked_once() {
    const EXTENTS: usize = 60;
    need("strace");
    let s = Scratch::new();
    fs::write(s.file("f.raw"), pattern(7, EXTENTS * 512)).unwrap();
    let names = ["f.raw", "./f.raw", ".//f.raw"];
    let line = |n: usize| format!("RW 1 FLAT \"{}\" {}\n", names[n % 3], n * 7 % EXTENTS);
    let lines: String = (0..EXTENTS).map(line).collect();
    fs::write(s.file("d.vmdk"), descriptor("vmfs", &lines)).unwrap();
    let program = crate::common::vimg_path();
    for line in ["info d.vmdk", "map --output=json d.vmdk", "convert -O raw d.vmdk ours"] {
        let trace = "-qq -f -y -o trace -e trace=openat,fcntl";
        let ours = s.sh(&format!("strace {trace} {} {line}", program.display())).stdout;
        let trace = fs::read_to_string(s.file("trace")).unwrap();
        let count = |what: &str| trace.lines().filter(|call| call.contains(what) && call.contains("f.raw")).count();
        assert!(count("openat(") <= 2 * names.len(), "{line}: {trace}");
        assert!((1..=8 * names.len()).contains(&count("F_OFD_SETLK")), "{line}: {trace}");
        if line.starts_with("map") {
            assert_eq!(ours, s.judge(&line.split(' ').collect::<Vec<_>>()).stdout);
        }
    }
    s.judge(&["convert", "-O", "raw", "d.vmdk", "theirs"]);
    assert_same_bytes(&s.file("ours"), &s.file("theirs"));
    for run in [judge, vimg] {
        let out = run(&["bench", "-w", "-c", "1", "-s", "512", "d.vmdk"]).dir(s.path()).fails(1);
        assert!(
            out.stderr.contains(" lock\nIs another process using the image") && out.stderr.contains("f.raw]?"),
            "{out:?}"
        );
    }
}
