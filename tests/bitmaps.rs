//! Persistent bitmaps of qcow2 follow a resize, bit for bit as qemu-img makes them follow.

use std::fs;

use crate::common::{Scratch, vimg};

/// Every bitmap's flags and bits, read from the file.
pub fn bitmaps(file: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let u32_at = |at: usize| u32::from_be_bytes(file[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap()) as usize;
    let cluster = 1 << u32_at(20);
    let mut at = 112;
    while u32_at(at) != 0x2385_2875 {
        assert_ne!(u32_at(at), 0, "no bitmaps");
        at += 8 + (u32_at(at + 4) as usize).next_multiple_of(8);
    }
    let (count, mut entry) = (u32_at(at + 8), u64_at(at + 24));
    let mut found = Vec::new();
    for _ in 0..count {
        let (table, len) = (u64_at(entry), u32_at(entry + 8) as usize);
        let name_len = usize::from(u16::from_be_bytes(file[entry + 18..entry + 20].try_into().unwrap()));
        let name = String::from_utf8(file[entry + 24..entry + 24 + name_len].to_vec()).unwrap();
        let mut bits = Vec::new();
        for index in 0..len {
            match u64_at(table + index * 8) {
                0 => bits.extend(vec![0; cluster]),
                1 => bits.extend(vec![0xff; cluster]),
                place => bits.extend_from_slice(&file[place..place + cluster]),
            }
        }
        found.push((name, u32_at(entry + 12), bits));
        entry += (24 + name_len).next_multiple_of(8);
    }
    found
}

#[test]
fn enabled_bitmaps_follow_a_resize() {
    // The reference takes long to shrink many small clusters.
    for (cluster, large) in [("512", "20M"), ("64k", "700M")] {
        let s = Scratch::new();
        let option = format!("cluster_size={cluster}");
        s.judge(&["create", "-q", "-f", "qcow2", "-o", &option, "ours", "3M"]);
        s.judge(&["bitmap", "--add", "-g", "512", "ours", "fine"]);
        s.judge(&["bitmap", "--add", "ours", "a longer name"]);
        s.judge(&["bitmap", "--add", "--disable", "ours", "still"]);
        s.qemu_io("qcow2", "ours", &["write 0 700k", "write 2900k 100k", "write 1M 512"]);
        fs::copy(s.file("ours"), s.file("theirs")).unwrap();
        for (size, shrink) in [("9M", false), ("2997248", true), ("1049088", true), (large, false), ("5M", true)] {
            let mut args = vec!["resize", "-q", "-f", "qcow2"];
            if shrink {
                args.push("--shrink");
            }
            s.vimg(&[&args[..], &["ours", size]].concat());
            s.judge(&[&args[..], &["theirs", size]].concat());
            s.assert_clean("qcow2", "ours");
            let read = |name: &str| bitmaps(&fs::read(s.file(name)).unwrap());
            assert_eq!(read("ours").len(), 3);
            assert!(read("ours") == read("theirs"), "clusters of {cluster}, {size}");
        }
    }
}

#[test]
fn an_inconsistent_bitmap_forbids_a_resize() {
    let s = Scratch::new();
    s.judge(&["create", "-q", "-f", "qcow2", "a", "1M"]);
    s.judge(&["bitmap", "--add", "a", "b"]);
    let mut bytes = fs::read(s.file("a")).unwrap();
    let name = bytes.windows(9).rposition(|w| w == b"\x00\x01\0\0\0\0b\0\0").unwrap();
    // The flags stand 6 bytes before the length of the name.
    bytes[name - 3] |= 1;
    fs::write(s.file("a"), &bytes).unwrap();
    let before = fs::read(s.file("a")).unwrap();
    let out = vimg(&["resize", "-f", "qcow2", "a", "2M"]).dir(s.path()).fails(1);
    assert!(out.stderr.contains("Bitmap 'b' is inconsistent and cannot be used"), "{out:?}");
    assert!(fs::read(s.file("a")).unwrap() == before, "nothing has changed");
}

/// The same image for both, with bitmaps of three kinds and some dirt.
fn twins(s: &Scratch, cluster: &str, size: &str) {
    let option = format!("cluster_size={cluster}");
    s.judge(&["create", "-q", "-f", "qcow2", "-o", &option, "ours", size]);
    s.judge(&["bitmap", "--add", "-g", "512", "ours", "fine"]);
    s.judge(&["bitmap", "--add", "ours", "a longer name"]);
    s.judge(&["bitmap", "--add", "--disable", "ours", "still"]);
    s.qemu_io("qcow2", "ours", &["write -P 9 2M 300k"]);
    s.judge(&["bitmap", "--merge", "fine", "ours", "still"]);
    s.judge(&["bitmap", "--clear", "ours", "fine"]);
    fs::copy(s.file("ours"), s.file("theirs")).unwrap();
}

#[test]
fn enabled_bitmaps_record_what_is_written() {
    for (cluster, options) in [
        ("64k", &[][..]),
        ("512", &[]),
        ("2M", &[]),
        ("512", &["--target-is-zero"]),
        ("64k", &["-c"]),
        ("64k", &["-S", "0", "-m", "4", "-W"]),
    ] {
        let s = Scratch::new();
        s.judge(&["create", "-q", "-f", "qcow2", "s", "5000k"]);
        let writes = ["write -P 1 64k 64k", "write -P 2 1000k 4k", "write -z 2M 64k", "write -P 3 3M 1500k"];
        s.qemu_io("qcow2", "s", &writes);
        twins(&s, cluster, "6M");
        let args = [&["convert", "-n", "-f", "qcow2", "-O", "qcow2"], options].concat();
        s.vimg(&[&args[..], &["s", "ours"]].concat());
        s.judge(&[&args[..], &["s", "theirs"]].concat());
        s.assert_clean("qcow2", "ours");
        let read = |name: &str| bitmaps(&fs::read(s.file(name)).unwrap());
        assert!(read("ours")[0].2.iter().any(|byte| *byte != 0));
        assert!(read("ours") == read("theirs"), "clusters of {cluster}, {options:?}");
        s.assert_same_content("qcow2", "ours", "qcow2", "theirs");
    }
}

#[test]
fn scattered_writes_set_their_own_bits_alone() {
    let s = Scratch::new();
    // More runs than are kept in memory.
    let mut raw = vec![0; 20_000 * 1024];
    for n in 0..20_000 {
        raw[n * 1024..n * 1024 + 512].fill(7);
    }
    fs::write(s.file("s"), raw).unwrap();
    twins(&s, "512", "20M");
    let args = ["convert", "-n", "--target-is-zero", "-S", "512", "-f", "raw", "-O", "qcow2", "s"];
    s.vimg(&[&args[..], &["ours"]].concat());
    s.assert_clean("qcow2", "ours");
    let fine = &bitmaps(&fs::read(s.file("ours")).unwrap())[0].2;
    assert!(fine[..5000].iter().all(|byte| *byte == 0x55));
    assert!(fine[5000..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_bitmap_that_misses_a_write_is_marked_inconsistent() {
    let s = Scratch::new();
    twins(&s, "64k", "6M");
    fs::write(s.file("s"), vec![7; 6 << 20]).unwrap();
    // The file cannot grow.
    let vimg = crate::common::vimg_path();
    let line = format!("ulimit -f 6000; {} convert -n -f raw -O qcow2 s ours", vimg.display());
    let out = crate::common::sh(&line).dir(s.path()).run();
    assert_ne!(out.code, Some(0), "{out:?}");
    let flags: Vec<u32> = bitmaps(&fs::read(s.file("ours")).unwrap()).iter().map(|bitmap| bitmap.1).collect();
    assert_eq!(flags, [3, 3, 0]);
}

#[test]
fn convert_copies_bitmaps() {
    for (cluster, options) in [("64k", ""), ("512", "cluster_size=2M"), ("2M", "cluster_size=512,extended_l2=off")] {
        let s = Scratch::new();
        twins(&s, cluster, "5000k");
        let options = if options.is_empty() { vec![] } else { vec!["-o", options] };
        let args = [&["convert", "--bitmaps", "-f", "qcow2", "-O", "qcow2"], &options[..], &["ours"]].concat();
        s.vimg(&[&args[..], &["a"]].concat());
        s.judge(&[&args[..], &["b"]].concat());
        s.assert_clean("qcow2", "a");
        let read = |name: &str| bitmaps(&fs::read(s.file(name)).unwrap());
        assert_eq!(read("a").len(), 3);
        assert!(read("a") == read("b"), "clusters of {cluster}, {options:?}");
        // To one that has others, which follow.
        for (run, name) in [(Scratch::vimg as fn(&Scratch, &[&str]) -> _, "c"), (Scratch::judge, "d")] {
            s.judge(&["create", "-q", "-f", "qcow2", name, "5000k"]);
            s.judge(&["bitmap", "--add", name, "x"]);
            run(&s, &["convert", "-n", "--bitmaps", "-f", "qcow2", "-O", "qcow2", "ours", name]);
        }
        s.assert_clean("qcow2", "c");
        assert_eq!(read("c").len(), 4);
        assert!(read("c") == read("d"), "clusters of {cluster}");
    }
}

#[test]
fn bitmaps_that_share_clusters_are_not_copied() {
    let s = Scratch::new();
    twins(&s, "64k", "6M");
    let mut bytes = fs::read(s.file("ours")).unwrap();
    let at = bytes.windows(4).position(|w| w == [0x23, 0x85, 0x28, 0x75]).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let (directory, last) = (word(&bytes, at + 24), 32 + 40);
    // A thousand times the last entry, under other names.
    let entry = bytes[directory + last..directory + last + 32].to_vec();
    let mut list = Vec::new();
    for n in 0..1000 {
        let mut entry = entry.clone();
        entry[24..29].copy_from_slice(format!("{n:05}").as_bytes());
        list.extend_from_slice(&entry);
    }
    bytes[at + 8..at + 12].copy_from_slice(&1000u32.to_be_bytes());
    bytes[at + 16..at + 24].copy_from_slice(&(list.len() as u64).to_be_bytes());
    bytes[directory..directory + list.len()].copy_from_slice(&list);
    fs::write(s.file("ours"), &bytes).unwrap();
    let out = vimg(&["convert", "--bitmaps", "-O", "qcow2", "ours", "a"]).dir(s.path()).fails(1);
    assert!(out.stderr.contains("Bitmaps share their place in the file"), "{out:?}");
    assert!(!s.file("a").exists());
}

#[test]
fn bitmaps_of_all_granularities_are_merged() {
    const GRANULARITIES: [&str; 6] = ["512", "1k", "4k", "64k", "1M", "2G"];
    for (cluster, size) in [("512", "3000k"), ("64k", "40M"), ("2M", "5000k")] {
        let s = Scratch::new();
        s.judge(&["create", "-q", "-f", "qcow2", "-o", &format!("cluster_size={cluster}"), "ours", size]);
        for granularity in GRANULARITIES {
            s.judge(&["bitmap", "--add", "-g", granularity, "ours", granularity]);
        }
        let writes = ["write 0 512", "write 3k 1k", "write 700k 64k", "write 1000k 1500k", "write 2999k 1k"];
        s.qemu_io("qcow2", "ours", &writes);
        for granularity in GRANULARITIES {
            s.judge(&["bitmap", "--disable", "ours", granularity]);
            s.judge(&["bitmap", "--add", "-g", granularity, "ours", &format!("to {granularity}")]);
        }
        s.qemu_io("qcow2", "ours", &["write 2500k 30k"]);
        fs::copy(s.file("ours"), s.file("source")).unwrap();
        for from in GRANULARITIES {
            fs::copy(s.file("source"), s.file("ours")).unwrap();
            fs::copy(s.file("source"), s.file("theirs")).unwrap();
            for to in GRANULARITIES {
                let other = ["-b", "source", "-F", "qcow2"];
                let other = if to == "4k" { &other[..] } else { &[] };
                let args = [&["bitmap", "--merge", from], other].concat();
                let to = format!("to {to}");
                s.vimg(&[&args[..], &["ours", &to]].concat());
                s.judge(&[&args[..], &["theirs", &to]].concat());
            }
            s.assert_clean("qcow2", "ours");
            let read = |name: &str| bitmaps(&fs::read(s.file(name)).unwrap());
            assert!(read("ours") == read("theirs"), "clusters of {cluster}, from {from}");
        }
    }
}

#[test]
fn bitmaps_that_share_clusters_are_not_merged() {
    let s = Scratch::new();
    s.judge(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "a", "8G"]);
    s.judge(&["bitmap", "--add", "-g", "512", "a", "one"]);
    s.judge(&["bitmap", "--add", "-g", "1k", "a", "two"]);
    s.qemu_io("qcow2", "a", &["write 0 1k"]);
    let mut bytes = fs::read(s.file("a")).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let at = bytes.windows(4).position(|w| w == [0x23, 0x85, 0x28, 0x75]).unwrap();
    let table = word(&bytes, word(&bytes, at + 24));
    // All of its bits are said to lie in the same cluster.
    for n in 1..512 {
        bytes.copy_within(table..table + 8, table + n * 8);
    }
    fs::write(s.file("a"), &bytes).unwrap();
    let out = vimg(&["bitmap", "--merge", "one", "a", "two"]).dir(s.path()).fails(1);
    assert!(out.stderr.contains("Bitmaps share their place in the file"), "{out:?}");
    let (before, after) = (bitmaps(&bytes), bitmaps(&fs::read(s.file("a")).unwrap()));
    assert!(before == after, "the bitmaps have changed");
}
