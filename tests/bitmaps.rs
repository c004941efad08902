//! Persistent bitmaps of qcow2 follow a resize, bit for bit as qemu-img makes them follow.

use std::fs;

use crate::common::{Scratch, vimg};

/// Every bitmap's flags and bits, read from the file.
fn bitmaps(file: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
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
fn they_follow_a_resize() {
    for cluster in ["512", "64k"] {
        let s = Scratch::new();
        let option = format!("cluster_size={cluster}");
        s.judge(&["create", "-q", "-f", "qcow2", "-o", &option, "ours", "3M"]);
        s.judge(&["bitmap", "--add", "-g", "512", "ours", "fine"]);
        s.judge(&["bitmap", "--add", "ours", "a longer name"]);
        s.judge(&["bitmap", "--add", "--disable", "ours", "still"]);
        s.qemu_io("qcow2", "ours", &["write 0 700k", "write 2900k 100k", "write 1M 512"]);
        fs::copy(s.file("ours"), s.file("theirs")).unwrap();
        for (size, shrink) in [("9M", false), ("2997248", true), ("1049088", true), ("700M", false), ("5M", true)] {
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
fn one_that_is_inconsistent_stands_in_the_way() {
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
