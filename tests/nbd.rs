//! nbd: against qemu-nbd, and against a server of our own that does what no server should (`server`). What texts say is
//! in `both/nbd.case`.

mod server;
mod wrong;

use std::fs;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use self::server::{Manner, Server};
use self::wrong::{WRONG, WRONG_EXTENDED, Wrong};
use crate::common::run::{own, plain, vimg_within_memory};
use crate::common::{Output, Scratch, assert_same_bytes, judge, pattern, vimg};

/// `qemu-nbd` on the socket `s` of a folder, until it is dropped.
struct Served(Child);

impl Served {
    fn new(scratch: &Scratch, args: &[&str]) -> Self {
        let socket = scratch.file("s");
        let all: Vec<&str> =
            ["-k", socket.to_str().unwrap(), "-t", "-e", "8", "-x", ""].iter().chain(args).copied().collect();
        let mut child = plain("qemu-nbd", &all).dir(scratch.path()).spawn();
        let end = Instant::now() + Duration::from_secs(600);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(child.try_wait().unwrap().is_none(), "qemu-nbd {all:?} has ended");
            assert!(Instant::now() < end, "qemu-nbd {all:?} does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A disk with data, zeros and holes.
fn disk(path: &Path) {
    let mut bytes = vec![0; 12 << 20];
    for (at, len) in [(0, 1 << 20), (3 << 20, (5 << 20) + 777), ((11 << 20) + 4096, 4096)] {
        bytes[at..at + len].copy_from_slice(&pattern(at as u64, len));
    }
    fs::write(path, &bytes).unwrap();
}

#[test]
fn disks_go_to_a_server_and_come_back() {
    let scratch = Scratch::new();
    disk(&scratch.file("disk"));
    scratch.sh("qemu-img create -q -f qcow2 t.qcow2 12M");
    {
        let _served = Served::new(&scratch, &["-f", "qcow2", "t.qcow2"]);
        scratch.vimg(&["convert", "-n", "-f", "raw", "-O", "raw", "disk", "nbd:unix:s"]);
        scratch.vimg(&["compare", "-f", "raw", "-F", "raw", "disk", "nbd:unix:s"]);
        scratch.vimg(&["convert", "-f", "raw", "-O", "raw", "nbd:unix:s", "back"]);
        assert_same_bytes(&scratch.file("disk"), &scratch.file("back"));
        // What is a hole there is one here.
        let map = |program: fn(&[&str]) -> crate::common::Run| {
            program(&["map", "-f", "raw", "--output=json", "nbd:unix:s"]).dir(scratch.path()).ok().stdout
        };
        assert_eq!(map(|args| vimg(args)), map(|args| crate::common::judge(args)));
        scratch.vimg(&[
            "convert",
            "-t",
            "writethrough",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            "-S",
            "0",
            "disk",
            "nbd:unix:s",
        ]);
        scratch.vimg(&["bench", "-q", "-w", "-c", "100", "-d", "16", "-f", "raw", "nbd:unix:s"]);
        scratch.vimg(&["convert", "-f", "raw", "-O", "raw", "disk", "nbd:unix:s"]);
    }
    scratch.assert_same_content("raw", "disk", "qcow2", "t.qcow2");
    scratch.assert_clean("qcow2", "t.qcow2");
}

/// Clusters that are marked are shown as absent, and are read all the same.
#[test]
fn a_map_shows_a_bitmap_as_the_reference_does() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a 4M && qemu-img bitmap --add -g 64k a b0");
    scratch.qemu_io("qcow2", "a", &["write -q -P 7 1M 128k", "write -q -P 8 3M 10k"]);
    let _served = Served::new(&scratch, &["-r", "-f", "qcow2", "-B", "b0", "a"]);
    let named = |driver: &str, context: &str| format!("{driver},x-dirty-bitmap={context}");
    let raw = "driver=raw,file.driver=nbd,file.path=s,file.x-dirty-bitmap=qemu:dirty-bitmap:b0".to_owned();
    for name in [named("driver=nbd,path=s", "qemu:dirty-bitmap:b0"), raw] {
        for form in ["json", "human"] {
            let args = ["map", "--output", form, "--image-opts", &name];
            let (ours, theirs) = (vimg(&args).dir(scratch.path()).ok(), judge(&args).dir(scratch.path()).ok());
            assert_eq!(ours.stdout, theirs.stdout);
        }
        let marked = vimg(&["map", "--output=json", "--image-opts", &name]).dir(scratch.path()).ok();
        assert_eq!(marked.stdout.matches("\"present\": false").count(), 2, "{marked:?}");
        scratch.vimg(&["convert", "--image-opts", &name, "-O", "raw", "out"]);
        scratch.assert_same_content("qcow2", "a", "raw", "out");
    }
    for context in ["qemu:dirty-bitmap:nix", ""] {
        let args = ["info", "--image-opts", &named("driver=nbd,path=s", context)];
        let (ours, theirs) = (vimg(&args).dir(scratch.path()).fails(1), judge(&args).dir(scratch.path()).fails(1));
        assert_eq!(ours.stderr, theirs.stderr);
    }
}

/// What is marked may be data, and `convert` writes it: the reference counts it for nothing.
#[test]
fn a_bitmap_of_an_export_makes_no_image_smaller() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a 4M && qemu-img bitmap --add -g 64k a b0");
    scratch.qemu_io("qcow2", "a", &["write -q -P 7 0 4M"]);
    let _served = Served::new(&scratch, &["-r", "-f", "qcow2", "-B", "b0", "a"]);
    let name = "driver=raw,file.driver=nbd,file.path=s,file.x-dirty-bitmap=qemu:dirty-bitmap:b0";
    let args = ["measure", "--output=json", "-O", "qcow2", "--image-opts", name];
    let required = |run: crate::common::Run| run.dir(scratch.path()).ok().json()["required"].as_u64().unwrap();
    scratch.vimg(&["convert", "--image-opts", "-O", "qcow2", name, "out"]);
    let len = fs::metadata(scratch.file("out")).unwrap().len();
    assert_eq!(required(vimg(&args)), len);
    assert!(required(judge(&args)) < len);
}

#[test]
fn an_export_that_is_not_there_is_told_with_those_that_are() {
    let scratch = Scratch::new();
    disk(&scratch.file("disk"));
    let socket = scratch.file("s");
    let all = ["-k", socket.to_str().unwrap(), "-t", "-e", "8", "-x", "first\"'\n", "-r", "-f", "raw", "disk"];
    let _served = Served(plain("qemu-nbd", &all).dir(scratch.path()).spawn());
    let end = Instant::now() + Duration::from_secs(600);
    while std::os::unix::net::UnixStream::connect(&socket).is_err() && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    let name = "nbd+unix:///nix?socket=s";
    let out = own(&["info", name]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("Requested export not available"), "{out:?}");
    assert!(out.stderr.contains(r#"the server has 'first\"\'\n'"#), "{out:?}");
    // Those who call it by the reference's name are told what that tells.
    let (ours, theirs) = (vimg(&["info", name]), judge(&["info", name]));
    assert_eq!(ours.dir(scratch.path()).fails(1).stderr, theirs.dir(scratch.path()).fails(1).stderr);
}

#[test]
fn a_connection_is_encrypted_by_certificates() {
    let scratch = Scratch::new();
    disk(&scratch.file("disk"));
    scratch.sh("exec 2>/dev/null; key='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'; \
         openssl req -x509 $key -days 3650 -subj /CN=ca -keyout ca-key.pem -out ca-cert.pem && \
         printf 'subjectAltName=DNS:localhost\\nextendedKeyUsage=serverAuth,clientAuth\\n' > ext && \
         for side in server client; do openssl req $key -subj /CN=localhost -keyout $side-key.pem -out csr && \
         openssl x509 -req -in csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 3650 -extfile ext \
         -out $side-cert.pem || exit 1; done");
    let object = |endpoint: &str| format!("tls-creds-x509,id=t,dir=.,endpoint={endpoint}");
    let serve = |object: &str| {
        let tls = ["--object", object, "--tls-creds", "t", "-r", "-f", "raw", "disk"];
        Served::new(&scratch, &tls)
    };
    let served = serve(&object("server"));
    let name = |host: &str| format!("driver=raw,file.driver=nbd,file.path=s,file.tls-creds=t,file.tls-hostname={host}");
    let convert = |host: &str, object: &str| -> Output {
        let args = ["convert", "--object", object, "--image-opts", "-O", "raw", &name(host), "out"];
        vimg(&args).dir(scratch.path()).run()
    };
    let out = convert("localhost", &object("client"));
    assert_eq!(out.code, Some(0), "{out:?}");
    assert_same_bytes(&scratch.file("disk"), &scratch.file("out"));
    fs::remove_file(scratch.file("out")).unwrap();
    for (host, object, text) in [
        ("other", object("client"), "Certificate does not match the hostname other"),
        ("localhost", object("server"), "Expected TLS credentials for a client endpoint"),
        ("localhost", "tls-creds-anon,id=t".to_owned(), "use tls-creds-x509"),
    ] {
        let out = convert(host, &object);
        assert!(out.code == Some(1) && out.stderr.contains(text), "{out:?}");
    }
    let out = vimg(&["info", "nbd:unix:s"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("TLS negotiation required before option 7 (go)\nDid you forget a valid tls-creds?"));
    // Authorities of the system do not know ours.
    let out = vimg(&["info", "nbds+unix:///?socket=s&tls-hostname=localhost"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("TLS handshake failed") || out.stderr.contains("no certificate authority"), "{out:?}");
    drop(served);
    fs::remove_file(scratch.file("s")).unwrap();
    let _served = serve(&(object("server") + ",verify-peer=off"));
    let unchecked = "nbds+unix:///?socket=s&tls-hostname=localhost&tls-verify-peer=0";
    vimg(&["info", "-f", "raw", unchecked]).dir(scratch.path()).fails(0);
}

/// Converts from the socket `s` of a folder to `out`.
fn convert(scratch: &Scratch, more: &str) -> Output {
    let name = format!("driver=raw,file.driver=nbd,file.path=s{more}");
    vimg_within_memory(256 << 20, &["convert", "--image-opts", "-O", "raw", &name, "out"]).dir(scratch.path()).run()
}

#[test]
fn requests_are_under_way_together_and_answered_in_any_order() {
    let scratch = Scratch::new();
    let bytes = pattern(1, 32 << 20);
    let convert = || {
        let _ = fs::remove_file(scratch.file("out"));
        scratch.vimg(&["convert", "-m", "4", "-f", "raw", "-O", "raw", "nbd:unix:s", "out"]);
        assert!(fs::read(scratch.file("out")).unwrap() == bytes);
    };
    for manner in [Manner { together: 4, ..Manner::GOOD }, Manner { together: 4, simple: true, ..Manner::GOOD }] {
        let _server = Server::start(&scratch.file("s"), &bytes, manner);
        convert();
    }
    let server = Server::start(&scratch.file("s"), &bytes, Manner { several: true, ..Manner::GOOD });
    convert();
    assert!(server.connections() > 1, "one connection to a server that takes several");
}

/// One on this host that waits for something else has as many requests under way as one that is far away.
#[test]
fn a_server_that_is_slow_is_asked_for_more_at_once() {
    let scratch = Scratch::new();
    let bytes = vec![7; 128 << 20];
    let manner = Manner { several: true, delay: Duration::from_millis(25), ..Manner::GOOD };
    let server = Server::start(&scratch.file("s"), &bytes, manner);
    let out = convert(&scratch, "");
    assert_eq!(out.code, Some(0), "{out:?}");
    assert!(fs::read(scratch.file("out")).unwrap() == bytes);
    assert_eq!(server.connections(), 4);
}

#[test]
fn what_a_server_must_not_send_is_an_error_that_names_it() {
    let scratch = Scratch::new();
    let bytes = pattern(2, 4 << 20);
    let plain = WRONG.iter().map(|wrong| (*wrong, false));
    let extended = WRONG.iter().chain(WRONG_EXTENDED).map(|wrong| (*wrong, true));
    for (wrong, extended) in plain.chain(extended) {
        let manner = Manner { wrong: Some(wrong), extended, ..Manner::GOOD };
        let _server = Server::start(&scratch.file("s"), &bytes, manner);
        let out = convert(&scratch, "");
        assert!(out.code == Some(1) && out.signal.is_none(), "{wrong:?}: {out:?}");
        let named =
            out.stderr.contains("nbd+unix://?socket=s: error while ") || out.stderr.contains("Could not open '");
        assert!(named, "{wrong:?}: {out:?}");
        assert!(!scratch.file("out").exists(), "{wrong:?}");
    }
}

/// Requests and replies with extended headers, whose lengths have 64 bits: all that is sent, and what is said of a
/// disk that is longer than 32 bits can tell.
#[test]
fn extended_headers_are_used_where_a_server_knows_them() {
    let scratch = Scratch::new();
    let (old, new) = (pattern(5, 6 << 20), pattern(6, 4 << 20));
    fs::write(scratch.file("new"), [&new[..], &[0; 2 << 20]].concat()).unwrap();
    let socket = scratch.file("s");
    for extended in [false, true] {
        let manner = Manner { extended, several: true, ..Manner::GOOD };
        let server = Server::start(&socket, &old, manner);
        scratch.vimg(&["convert", "-n", "-f", "raw", "-O", "raw", "new", "nbd:unix:s"]);
        assert!(server.bytes() == fs::read(scratch.file("new")).unwrap());
        assert!([1, 3, 6].iter().all(|command| server.asked(*command) > 0));
        scratch.vimg(&["compare", "-f", "raw", "-F", "raw", "new", "nbd:unix:s"]);
        drop(server);
        let refusing = Server::start(&socket, &old, Manner { wrong: Some(Wrong::Refuses), ..manner });
        let out = vimg(&["convert", "-n", "-f", "raw", "-O", "raw", "new", "nbd:unix:s"]);
        let out = out.dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("No space left on device"), "{out:?}");
        let out = convert(&scratch, "");
        assert!(out.code == Some(1) && out.stderr.contains("Input/output error"), "{out:?}");
        assert!(refusing.bytes() == old);
    }
    let manner = Manner { extended: true, size: Some(1 << 50), ..Manner::GOOD };
    let server = Server::start(&socket, &old, manner);
    let map = scratch.vimg(&["map", "-f", "raw", "--output=json", "nbd:unix:s"]).json();
    let runs: Vec<_> =
        map.as_array().unwrap().iter().map(|run| (run["length"].as_u64(), run["data"].as_bool())).collect();
    assert_eq!(runs, [(Some(6 << 20), Some(true)), (Some((1 << 50) - (6 << 20)), Some(false))]);
    assert!(server.asked(7) < 40, "{} requests for two runs", server.asked(7));
}

#[test]
fn a_connection_that_ends_leaves_no_target() {
    let scratch = Scratch::new();
    let bytes = pattern(3, 16 << 20);
    for replies in [0, 1, 2, 5, 7] {
        let manner = Manner { last_after: Some(replies), ..Manner::GOOD };
        let server = Server::start(&scratch.file("s"), &bytes, manner);
        let out = convert(&scratch, "");
        let text = "the server has closed the connection";
        assert!(out.code == Some(1) && out.stderr.contains(text), "{replies}: {out:?}");
        assert!(out.stderr.contains("nbd+unix://?socket=s: error while "), "{replies}: {out:?}");
        assert!(!scratch.file("out").exists());
        drop(server);
    }
    // One that comes back within the time that is allowed does no harm.
    let manner = Manner { last_after: Some(3), comes_back: true, ..Manner::GOOD };
    let server = Server::start(&scratch.file("s"), &bytes, manner);
    let out = convert(&scratch, ",file.reconnect-delay=600");
    assert_eq!(out.code, Some(0), "{out:?}");
    assert!(fs::read(scratch.file("out")).unwrap() == bytes);
    assert!(server.connections() > 2);
    drop(server);
    // A first connection is tried for as long as is said.
    let socket = scratch.file("s");
    let late = thread::spawn({
        let (socket, bytes) = (socket.clone(), bytes.clone());
        move || Server::start(&socket, &bytes, Manner::GOOD)
    });
    let out = convert(&scratch, ",file.open-timeout=600");
    assert_eq!(out.code, Some(0), "{out:?}");
    drop(late.join());
}

#[test]
fn an_untrusted_image_names_no_export() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 -u -b 'nbd+unix:///?socket=s' -F raw a 1M; \
         qemu-img create -q -f qcow2 -u -b 'json:{\"driver\":\"nbd\",\"path\":\"s\"}' -F raw b 1M");
    let server = Server::start(&scratch.file("s"), &pattern(4, 1 << 20), Manner::GOOD);
    for image in ["a", "b"] {
        let out = vimg(&["--untrusted", "convert", "-O", "raw", image, "out"]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("an untrusted image may name none"), "{out:?}");
    }
    assert_eq!(server.connections(), 0);
    scratch.vimg(&["convert", "-O", "raw", "a", "out"]);
    assert!(server.connections() > 0);
}
