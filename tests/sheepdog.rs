//! sheepdog: against a small server of our own (`server`) that speaks the published protocol; the reference has none any
//! more. What lies in its objects is the judge.

mod server;

use std::fs;

use self::server::Server;
use crate::common::run::{own, vimg_within_memory};
use crate::common::{Output, Scratch, assert_same_bytes, pattern, vimg};

/// Of the objects here: small, so that there are many.
const BITS: u8 = 16;
const UNIT: usize = 1 << BITS;

/// A disk with data, zeros and holes, and an end in the middle of an object.
fn disk() -> Vec<u8> {
    let mut bytes = vec![0; 40 * UNIT + 512];
    for (at, len) in [(0, 3 * UNIT), (7 * UNIT + 4096, 5 * UNIT), (40 * UNIT, 512)] {
        bytes[at..at + len].copy_from_slice(&pattern(at as u64, len));
    }
    bytes
}

fn scratch_with_disk() -> Scratch {
    let scratch = Scratch::new();
    fs::write(scratch.file("disk"), disk()).unwrap();
    scratch
}

#[test]
fn disks_go_to_a_cluster_and_come_back() {
    let scratch = scratch_with_disk();
    let server = Server::on_a_port(BITS);
    let port = server.port();
    let url = format!("sheepdog://127.0.0.1:{port}/a%20b");
    scratch.vimg(&["convert", "-f", "raw", "-O", "raw", "disk", &url]);
    {
        let cluster = server.cluster();
        assert!(cluster.bytes("a b") == disk());
        assert!(cluster.locks.is_empty());
        // No object for what is zeros.
        assert_eq!(cluster.count(), 3 + 6 + 1);
    }
    for name in [
        url.clone(),
        format!("sheepdog+tcp://127.0.0.1:{port}/a b"),
        format!("sheepdog:127.0.0.1:{port}:a b"),
        format!(
            r#"json:{{"driver":"raw","file":{{"driver":"sheepdog","vdi":"a b",
            "server":{{"type":"inet","host":"127.0.0.1","port":"{port}"}}}}}}"#
        ),
    ] {
        scratch.vimg(&["convert", "-O", "raw", &name, "back"]);
        assert_same_bytes(&scratch.file("disk"), &scratch.file("back"));
        let info = scratch.vimg(&["info", "--output=json", &name]).json();
        assert_eq!(info["virtual-size"], disk().len());
        assert_eq!(info["actual-size"], 10 * UNIT);
        scratch.vimg(&["compare", "-f", "raw", "disk", &name]);
    }
    let map = scratch.vimg(&["map", "-f", "raw", "--output=json", &url]).json();
    let runs: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|run| (run["start"].as_u64().unwrap() as usize / UNIT, run["data"].as_bool().unwrap()))
        .collect();
    assert_eq!(runs, [(0, true), (3, false), (7, true), (13, false), (40, true)]);
    // What is there is not written over, unless that is said.
    fs::write(scratch.file("other"), pattern(9, 2 * UNIT)).unwrap();
    let out = own(&["convert", "-f", "raw", "-O", "raw", "other", &url]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("a VDI of that name exists already"), "{out:?}");
    assert!(server.cluster().bytes("a b") == disk());
    scratch.vimg(&["convert", "-n", "-f", "raw", "-O", "raw", "other", &url]);
    assert!(server.cluster().bytes("a b")[..2 * UNIT] == pattern(9, 2 * UNIT));
    assert!(server.cluster().locks.is_empty());
    let out = own(&["info", &format!("sheepdog://127.0.0.1:{port}/nix")]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("there is no such VDI"), "{out:?}");
}

#[test]
fn snapshots_are_read_and_what_begins_with_one_is_written_beside_it() {
    let scratch = scratch_with_disk();
    let server = Server::on(&scratch.file("s"), BITS);
    let url = "sheepdog+unix:///a?socket=s";
    scratch.vimg(&["convert", "-f", "raw", "-O", "raw", "disk", url]);
    server.cluster().snapshot("a", "before");
    let before = server.cluster().count();
    // Parts of two objects, one of which the snapshot has, and a whole one that it has not.
    scratch.sh("qemu-img create -q -f qcow2 -o cluster_size=4k top 2621952");
    let mut after = disk();
    for (byte, at, len) in [(7, 100, 8), (8, 1300, 4), (9, 512 + 128, 64)] {
        scratch.qemu_io("qcow2", "top", &[&format!("write -q -P {byte} {at}k {len}k")]);
        after[at << 10..(at + len) << 10].fill(byte);
    }
    scratch.vimg(&["rebase", "-u", "-b", url, "-F", "raw", "top"]);
    scratch.vimg(&["commit", "-q", "top"]);
    assert_clean_commit(&server, &after);
    assert!(server.cluster().count() > before);
    for name in ["sheepdog+unix:///a?socket=s#before", "sheepdog+unix:///a?socket=s#1"] {
        scratch.vimg(&["convert", "-f", "raw", "-O", "raw", name, "back"]);
        assert_same_bytes(&scratch.file("disk"), &scratch.file("back"));
        let out = own(&["convert", "-n", "-f", "raw", "-O", "raw", "disk", name]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("a snapshot cannot be written to"), "{out:?}");
    }
    for name in ["sheepdog+unix:///a?socket=s#2", "sheepdog+unix:///a?socket=s#after"] {
        let out = own(&["info", name]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("there is no such snapshot of the VDI"), "{out:?}");
    }
    let tree = r#"json:{"driver":"sheepdog","vdi":"a","tag":"before","server":{"type":"unix","path":"s"}}"#;
    scratch.vimg(&["convert", "-O", "raw", tree, "back"]);
    assert_same_bytes(&scratch.file("disk"), &scratch.file("back"));
}

fn assert_clean_commit(server: &Server, after: &[u8]) {
    let cluster = server.cluster();
    let bytes = cluster.bytes("a");
    let first = bytes.iter().zip(after).position(|(a, b)| a != b);
    assert!(bytes.len() == after.len() && first.is_none(), "first difference at {first:?}");
    assert!(cluster.locks.is_empty());
}

#[test]
fn images_of_any_format_lie_in_a_disk_and_grow() {
    let scratch = scratch_with_disk();
    let server = Server::on(&scratch.file("s"), BITS);
    for (format, options) in
        [("qcow2", "cluster_size=4k"), ("vpc", "subformat=fixed,force_size=on"), ("vdi", "static=off")]
    {
        let url = format!("sheepdog+unix:///{format}?socket=s");
        scratch.vimg(&["convert", "-f", "raw", "-O", format, "-o", options, "disk", &url]);
        // The file in it ends where it ends.
        fs::write(scratch.file("file"), server.cluster().bytes(format)).unwrap();
        scratch.assert_same_content("raw", "disk", format, "file");
        scratch.vimg(&["convert", "-f", format, "-O", "raw", &url, "back"]);
        assert_same_bytes(&scratch.file("disk"), &scratch.file("back"));
    }
    scratch.vimg(&["check", "sheepdog+unix:///qcow2?socket=s"]);
    let url = "sheepdog+unix:///raw?socket=s";
    scratch.vimg(&["create", "-q", "-f", "raw", url, "1M"]);
    {
        let cluster = server.cluster();
        // One request for each object, and none for a disk of zeros.
        assert_eq!((cluster.size("raw"), cluster.asked[&0x01]), (1 << 20, cluster.count()));
    }
    scratch.vimg(&["resize", "-q", "-f", "raw", url, "3M"]);
    assert_eq!(server.cluster().size("raw"), 3 << 20);
    scratch.vimg(&["resize", "-q", "-f", "raw", "--shrink", url, "2M"]);
    assert_eq!(server.cluster().size("raw"), 2 << 20);
    scratch.vimg(&["create", "-q", "-f", "raw", "-o", "preallocation=full", "sheepdog+unix:///full?socket=s", "256k"]);
    assert_eq!(server.cluster().bytes("full"), vec![0; 256 << 10]);
    let out = own(&["resize", "-q", "-f", "raw", "--shrink", "sheepdog+unix:///full?socket=s", "64k"]);
    assert!(out.dir(scratch.path()).fails(1).stderr.contains("cannot shrink"));
    assert!(server.cluster().locks.is_empty());
}

#[test]
fn a_disk_has_one_writer() {
    let scratch = scratch_with_disk();
    let server = Server::on(&scratch.file("s"), BITS);
    let url = "sheepdog+unix:///a?socket=s";
    scratch.vimg(&["create", "-q", "-f", "raw", url, "4M"]);
    {
        let mut cluster = server.cluster();
        let disks: Vec<u32> = cluster.objects.keys().map(|object| (object >> 32) as u32 & 0xff_ffff).collect();
        cluster.locks.extend(disks);
    }
    let out = own(&["convert", "-n", "-f", "raw", "-O", "raw", "disk", url]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("another client writes to it"), "{out:?}");
    scratch.vimg(&["info", url]);
}

/// Reads the disk `a`.
fn read(scratch: &Scratch) -> Output {
    let args = ["convert", "-f", "raw", "-O", "raw", "sheepdog+unix:///a?socket=s", "out"];
    vimg_within_memory(256 << 20, &args).dir(scratch.path()).run()
}

#[test]
fn what_a_server_must_not_send_is_an_error_that_names_it() {
    let scratch = scratch_with_disk();
    for wrong in server::WRONG {
        let server = Server::on(&scratch.file("s"), BITS);
        scratch.vimg(&["convert", "-f", "raw", "-O", "raw", "disk", "sheepdog+unix:///a?socket=s"]);
        server.cluster().wrong = Some(*wrong);
        let out = read(&scratch);
        assert!(out.code == Some(1) && out.signal.is_none(), "{wrong:?}: {out:?}");
        assert!(out.stderr.contains("sheepdog+unix:///a?socket=s"), "{wrong:?}: {out:?}");
        assert!(!scratch.file("out").exists(), "{wrong:?}");
        let args = ["convert", "-f", "raw", "-O", "raw", "disk", "sheepdog+unix:///b?socket=s"];
        let out = vimg_within_memory(256 << 20, &args).dir(scratch.path()).run();
        // What only those notice who read data does no harm to who writes it.
        let reads = matches!(wrong, server::Wrong::NoObject);
        assert!(out.code == Some(i32::from(!reads)) && out.signal.is_none(), "{wrong:?}: {out:?}");
    }
}

#[test]
fn a_connection_that_ends_at_any_moment_leaves_no_target() {
    ends_at_any_moment(false);
}

/// What was asked for is done, and nobody is told.
#[test]
fn a_reply_that_is_lost_at_any_moment_leaves_no_target() {
    ends_at_any_moment(true);
}

fn ends_at_any_moment(late: bool) {
    let scratch = scratch_with_disk();
    let mut ended = (false, false);
    for request in 0..200 {
        let server = Server::on(&scratch.file("s"), BITS);
        scratch.vimg(&["convert", "-f", "raw", "-O", "raw", "disk", "sheepdog+unix:///a?socket=s"]);
        let after = |server: &Server, request: usize| {
            let mut cluster = server.cluster();
            let seen = cluster.asked.values().sum::<usize>();
            (cluster.dies_at, cluster.dies_late) = (Some(seen + request), late);
        };
        if !ended.0 {
            after(&server, request);
            let out = read(&scratch);
            match out.code {
                Some(0) => {
                    ended.0 = true;
                    assert_same_bytes(&scratch.file("disk"), &scratch.file("out"));
                }
                _ => {
                    let text = "the server has closed the connection";
                    assert!(out.code == Some(1) && out.stderr.contains(text), "{request}: {out:?}");
                    assert!(out.stderr.contains("sheepdog+unix:///a?socket=s"), "{request}: {out:?}");
                    assert!(!scratch.file("out").exists(), "{request}");
                }
            }
        }
        if !ended.1 {
            after(&server, request);
            let args = ["convert", "-f", "raw", "-O", "raw", "disk", "sheepdog+unix:///b?socket=s"];
            let out = vimg(&args).dir(scratch.path()).run();
            let cluster = server.cluster();
            match out.code {
                Some(0) => {
                    ended.1 = true;
                    assert!(cluster.bytes("b") == disk());
                }
                _ => {
                    assert!(
                        out.code == Some(1) && out.stderr.contains("sheepdog+unix:///b?socket=s"),
                        "{request}: {out:?}"
                    );
                    assert!(!cluster.has("b"), "{request}: {out:?}");
                }
            }
        }
        if ended == (true, true) {
            return;
        }
    }
    panic!("200 requests for 10 objects");
}

/// A disk that somebody else has made stays, whatever becomes of the answer.
#[test]
fn a_lost_reply_removes_no_disk_that_was_there() {
    let scratch = scratch_with_disk();
    let server = Server::on(&scratch.file("s"), BITS);
    let url = "sheepdog+unix:///a?socket=s";
    scratch.vimg(&["create", "-q", "-f", "raw", url, "1M"]);
    for request in 0..4 {
        {
            let mut cluster = server.cluster();
            let seen = cluster.asked.values().sum::<usize>();
            (cluster.dies_at, cluster.dies_late) = (Some(seen + request), true);
        }
        vimg(&["create", "-q", "-f", "raw", url, "1M"]).dir(scratch.path()).fails(1);
        assert!(server.cluster().has("a"), "{request}");
    }
}

#[test]
fn an_untrusted_image_names_no_disk_of_a_cluster() {
    let scratch = scratch_with_disk();
    let server = Server::on(&scratch.file("s"), BITS);
    scratch.vimg(&["convert", "-f", "raw", "-O", "raw", "disk", "sheepdog+unix:///a?socket=s"]);
    let before = server.cluster().asked.values().sum::<usize>();
    scratch.vimg(&["create", "-q", "-f", "qcow2", "-u", "-b", "sheepdog+unix:///a?socket=s", "-F", "raw", "top", "1M"]);
    let out = vimg(&["--untrusted", "convert", "-O", "raw", "top", "out"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("an untrusted image may name none"), "{out:?}");
    assert_eq!(server.cluster().asked.values().sum::<usize>(), before);
    scratch.vimg(&["convert", "-O", "raw", "top", "out"]);
    assert!(fs::read(scratch.file("out")).unwrap()[..] == disk()[..1 << 20]);
}
