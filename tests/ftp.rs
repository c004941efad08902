//! Images on servers of FTP and TFTP. The reference's module for FTP is no part of what the tests install: its texts
//! stand here as they were seen. It knows no TFTP.

use std::fs;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::common::ftp::{Ftp, Quirks};
use crate::common::{Output, Scratch, assert_same_bytes, pattern, tftp, vimg};

fn convert(scratch: &Scratch, url: &str) -> Output {
    vimg(&["convert", "-f", "raw", "-O", "raw", url, "out"]).dir(scratch.path()).run()
}

fn disk() -> (Scratch, Vec<u8>) {
    let scratch = Scratch::new();
    let file = pattern(11, (5 << 20) + 512);
    fs::write(scratch.file("disk"), &file).unwrap();
    (scratch, file)
}

#[test]
fn a_file_on_an_ftp_server_is_read() {
    for quirks in [
        Quirks::default(),
        Quirks { old: true, ..Quirks::default() },
        Quirks { cut: Some((1, 300_000)), ..Quirks::default() },
    ] {
        let (scratch, file) = disk();
        let ftp = Ftp::new(file, quirks.clone(), None);
        let out = convert(&scratch, &format!("ftp://127.0.0.1:{}/a%20b/disk", ftp.port()));
        assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{quirks:?} {:?}", ftp.said());
        assert_same_bytes(&scratch.file("disk"), &scratch.file("out"));
        let said = ftp.said();
        assert!(said.contains(&"USER anonymous".to_owned()) && said.contains(&"RETR a b/disk".to_owned()), "{said:?}");
    }
}

#[test]
fn images_on_an_ftp_server() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "a", "1G"]);
    scratch.qemu_io("qcow2", "a", &["write -P 5 3M 1M", "write -P 6 900M 70k"]);
    let ftp = Ftp::new(fs::read(scratch.file("a")).unwrap(), Quirks::default(), None);
    let url = format!("ftp://u:pw@127.0.0.1:{}/a", ftp.port());
    scratch.vimg(&["convert", "-O", "qcow2", &url, "b"]);
    scratch.assert_same_content("qcow2", "a", "qcow2", "b");
    let info = scratch.vimg(&["info", &url]).stdout;
    assert!(info.contains("protocol type: ftp\n") && info.contains("disk size: unavailable\n"), "{info}");
    let says = |args: &[&str]| vimg(args).dir(scratch.path()).fails(1).stderr;
    let at = |login: &str, name: &str| format!("ftp://{login}127.0.0.1:{}/{name}", ftp.port());
    for (name, text) in [
        (at("", "none"), "CURL: Error opening file: The file does not exist"),
        (at("u:bad@", "a"), "CURL: Error opening file: Access denied: 530"),
        ("ftp:a".to_owned(), "ftp curl driver cannot handle the URL 'ftp:a' (does not start with 'ftp://')"),
    ] {
        assert_eq!(says(&["info", &name]), format!("qemu-img: Could not open '{name}': {text}\n"));
    }
    // Nothing in a URL is a command.
    let out = says(&["info", &at("", "a%0d%0aDELE%20a")]);
    assert!(out.contains("is no URL of a file") && !ftp.said().iter().any(|line| line.starts_with("DELE")), "{out}");
    assert_eq!(
        says(&["create", "-f", "raw", &url, "1M"]),
        format!("qemu-img: {url}: Protocol driver 'ftp' does not support image creation\n")
    );
    assert_eq!(
        says(&["resize", "-f", "qcow2", &url, "2G"]),
        format!("qemu-img: Could not open '{url}': curl driver does not support writes\n")
    );
}

#[test]
fn an_ftp_server_that_does_not_keep_its_word() {
    for (quirks, text) in [
        (
            Quirks { from_the_start: true, ..Quirks::default() },
            "Server does not support 'range' (byte ranges). (at byte ",
        ),
        (
            Quirks { changed: Some(1), ..Quirks::default() },
            "the file has been changed on the server while it was read (at byte ",
        ),
        (Quirks { cut_all: Some(1000), ..Quirks::default() }, "the server closed the connection (at byte "),
    ] {
        let (scratch, file) = disk();
        // All of it may come in one transfer, from the start on: then nothing is amiss, and it is all there.
        let fails = |_| {
            let ftp = Ftp::new(file.clone(), quirks.clone(), None);
            let url = format!("ftp://127.0.0.1:{}/disk", ftp.port());
            let out = convert(&scratch, &url);
            if out.code == Some(0) && quirks.cut_all.is_none() {
                assert!(fs::read(scratch.file("out")).unwrap() == file);
                fs::remove_file(scratch.file("out")).unwrap();
                return false;
            }
            assert!(out.code == Some(1) && out.stderr.contains(&url) && out.stderr.contains(text), "{out:?}");
            assert!(!scratch.file("out").exists());
            true
        };
        assert!((0..100).any(fails), "{text}");
    }
}

#[test]
fn an_ftps_server_shows_who_it_is() {
    let (scratch, file) = disk();
    scratch.sh("openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 9000 -subj /CN=localhost \
         -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE 2>/dev/null");
    let cert = CertificateDer::from_pem_file(scratch.file("cert")).unwrap();
    let key = PrivateKeyDer::from_pem_file(scratch.file("key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(vec![cert], key).unwrap();
    let ftp = Ftp::new(file, Quirks::default(), Some(Arc::new(config)));
    let url = format!("ftps://localhost:{}/disk", ftp.port());
    let refused = convert(&scratch, &url);
    assert!(refused.code == Some(1) && refused.stderr.contains("certificate"), "{refused:?}");
    let args = ["convert", "-f", "raw", "-O", "raw", &url, "out"];
    vimg(&args).dir(scratch.path()).env("SSL_CERT_FILE", scratch.file("cert")).ok();
    assert_same_bytes(&scratch.file("disk"), &scratch.file("out"));
    let said = ftp.said();
    assert!(said.contains(&"PBSZ 0".to_owned()) && said.contains(&"PROT P".to_owned()), "{said:?}");
    let tree = format!("driver=ftps,url={url},sslverify=off");
    let bare = scratch.vimg(&["info", "--image-opts", &tree]).stdout;
    assert!(bare.contains("file format: ftps\n"), "{bare}");
}

#[test]
fn a_file_on_a_tftp_server_is_read() {
    let plain = tftp::Quirks::default();
    for quirks in [
        plain.clone(),
        tftp::Quirks { old: true, ..plain.clone() },
        tftp::Quirks { twice: true, ..plain.clone() },
        // Each time a packet is sent again after a second.
        tftp::Quirks { deaf: Some(3000), ..plain.clone() },
    ] {
        let (scratch, mut file) = disk();
        if quirks.twice {
            // A last block that is empty.
            file.truncate(1428 * 700);
            fs::write(scratch.file("disk"), &file).unwrap();
        }
        let server = tftp::Tftp::new(file.clone(), quirks.clone());
        let url = server.url("disk");
        // What comes is kept in a file that the user has not named.
        let args = ["--untrusted", "convert", "-O", "raw", &url, "o"];
        let untrusted = || vimg(&args).dir(scratch.path()).run();
        let out = if quirks.deaf.is_none() { untrusted() } else { convert(&scratch, &url) };
        assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{quirks:?}");
        let out = convert(&scratch, &url);
        assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{quirks:?}");
        let out = fs::read(scratch.file("out")).unwrap();
        assert!(out.len() == file.len().next_multiple_of(512) && out.starts_with(&file), "{quirks:?}");
    }
}

/// Where block numbers begin again.
#[test]
fn a_long_file_on_a_tftp_server_is_read() {
    let scratch = Scratch::new();
    let file = pattern(5, 512 * 66_000);
    let server = tftp::Tftp::new(file.clone(), tftp::Quirks { old: true, ..tftp::Quirks::default() });
    assert_eq!(convert(&scratch, &server.url("disk")).code, Some(0));
    assert!(fs::read(scratch.file("out")).unwrap() == file);
}

#[test]
fn a_tftp_server_that_fails_leaves_no_target() {
    let plain = tftp::Quirks::default();
    for (quirks, name, text) in [
        (plain.clone(), "none", "The file does not exist: No such file"),
        (tftp::Quirks { fails_at: Some(1000), ..plain.clone() }, "a", "the server says: The disk is gone"),
        (tftp::Quirks { lies: 512, ..plain.clone() }, "a", "the file is not as long as the server says"),
    ] {
        let (scratch, file) = disk();
        let server = tftp::Tftp::new(file, quirks);
        let out = convert(&scratch, &server.url(name));
        assert!(out.code == Some(1) && out.stderr.contains(&server.url(name)) && out.stderr.contains(text), "{out:?}");
        assert!(!scratch.file("out").exists());
    }
    let out = vimg(&["create", "-f", "raw", "tftp://127.0.0.1/a", "1M"]).fails(1);
    assert_eq!(out.stderr, "qemu-img: tftp://127.0.0.1/a: Protocol driver 'tftp' does not support image creation\n");
}
