//! Servers that others have made, each on this host and for the time of a test. Those that a host for tests has anyway are
//! asked each time; the others where that is asked for: `cargo test -- --ignored servers`.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::run::plain;
use crate::common::*;

/// A server until it is dropped.
struct Served(Child);

impl Served {
    /// Started in that folder; it listens once `ready` says so.
    fn new(scratch: &Scratch, line: &[&str], ready: impl Fn() -> bool) -> Self {
        let [program, args @ ..] = line else { panic!("no program") };
        need(program);
        let mut child = plain(program, args).dir(scratch.path()).spawn();
        let end = Instant::now() + Duration::from_secs(600);
        while !ready() {
            assert!(child.try_wait().unwrap().is_none(), "{line:?} has ended");
            assert!(Instant::now() < end, "{line:?} does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // By its own signal: what it has started ends with it.
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap()),
            nix::sys::signal::Signal::SIGTERM,
        );
        let _ = self.0.wait();
    }
}

/// A port that nobody listens on.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn listens(port: u16) -> impl Fn() -> bool {
    move || TcpStream::connect(("127.0.0.1", port)).is_ok()
}

/// `disk`, and the same as `files/disk.qcow2`, in folders that anybody may read.
fn files() -> Scratch {
    let scratch = Scratch::new();
    let mut bytes = vec![0; 9 << 20];
    for (at, len) in [(0, 1 << 20), (3 << 20, (2 << 20) + 777), ((8 << 20) + 4096, 4096)] {
        bytes[at..at + len].copy_from_slice(&pattern(at as u64, len));
    }
    fs::write(scratch.file("disk"), bytes).unwrap();
    scratch.sh("mkdir files && qemu-img convert -f raw -O qcow2 disk files/disk.qcow2 && chmod 755 . files");
    scratch
}

/// An image behind a URL is what it is in its file, to every command that reads.
fn assert_read(scratch: &Scratch, url: &str) {
    scratch.vimg(&["convert", "-f", "qcow2", "-O", "raw", url, "out"]);
    assert_same_bytes(&scratch.file("out"), &scratch.file("disk"));
    scratch.vimg(&["compare", "-f", "qcow2", "-F", "raw", url, "disk"]);
    assert_eq!(scratch.vimg(&["info", "--output=json", url]).json()["virtual-size"], 9 << 20);
    scratch.vimg(&["check", url]);
    let runs = |name: &str| {
        let map = scratch.vimg(&["map", "--output=json", "-f", "qcow2", name]).json();
        let of = |run: &serde_json::Value| ["start", "length", "zero", "offset"].map(|key| run[key].clone());
        map.as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(runs(url), runs("files/disk.qcow2"));
}

fn folder(scratch: &Scratch) -> String {
    scratch.path().to_str().unwrap().to_owned()
}

#[test]
fn nbdkit() {
    let scratch = files();
    let socket: PathBuf = scratch.file("s");
    let ready = || UnixStream::connect(&socket).is_ok();
    let at = socket.to_str().unwrap().to_owned();
    {
        let line = ["nbdkit", "-f", "-r", "-U", &at, "file", "files/disk.qcow2"];
        let _served = Served::new(&scratch, &line, ready);
        assert_read(&scratch, "nbd+unix:///?socket=s");
    }
    fs::remove_file(&socket).unwrap();
    scratch.sh("truncate -s 9M new");
    {
        let _served = Served::new(&scratch, &["nbdkit", "-f", "-U", &at, "file", "new"], ready);
        scratch.vimg(&["convert", "-n", "-f", "raw", "-O", "raw", "disk", "nbd:unix:s"]);
    }
    assert_same_bytes(&scratch.file("new"), &scratch.file("disk"));
}

#[test]
#[ignore = "needs nbd-server"]
fn nbd_server() {
    let scratch = files();
    let (port, dir) = (port(), folder(&scratch));
    scratch.sh("truncate -s 9M new");
    let config = format!(
        "[generic]\nport = {port}\nlistenaddr = 127.0.0.1\n[read]\nexportname = {dir}/files/disk.qcow2\n\
         readonly = true\n[write]\nexportname = {dir}/new\nflush = true\nfua = true\ntrim = true\n"
    );
    fs::write(scratch.file("config"), config).unwrap();
    {
        // It goes to the background by itself, and is found by the file that it leaves.
        scratch.sh("nbd-server -C \"$PWD/config\" -p \"$PWD/pid\"");
        let end = Instant::now() + Duration::from_secs(600);
        while !listens(port)() && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
        assert_read(&scratch, &format!("nbd://127.0.0.1:{port}/read"));
        let url = format!("nbd:127.0.0.1:{port}:exportname=write");
        scratch.vimg(&["convert", "-n", "-f", "raw", "-O", "raw", "disk", &url]);
        scratch.sh("kill $(cat pid)");
    }
    assert_same_bytes(&scratch.file("new"), &scratch.file("disk"));
}

#[test]
#[ignore = "needs nginx"]
fn nginx() {
    let scratch = files();
    let (port, dir) = (port(), folder(&scratch));
    let folders: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|what| format!("{what}_temp_path {dir}/temp; "))
        .collect();
    let config = format!(
        "daemon off; pid {dir}/pid; error_log {dir}/errors; events {{}} http {{ access_log {dir}/log; {folders} \
         server {{ listen 127.0.0.1:{port}; root {dir}/files; \
         location /elsewhere/ {{ rewrite ^/elsewhere/(.*)$ /$1 redirect; }} \
         location /whole/ {{ alias {dir}/files/; max_ranges 0; }} location /busy {{ return 503; }} }} }}"
    );
    fs::write(scratch.file("config"), config).unwrap();
    let (config, errors) = (format!("{dir}/config"), format!("{dir}/errors"));
    let _served = Served::new(&scratch, &["nginx", "-p", &dir, "-c", &config, "-e", &errors], listens(port));
    assert_read(&scratch, &format!("http://127.0.0.1:{port}/disk.qcow2"));
    assert_read(&scratch, &format!("http://127.0.0.1:{port}/elsewhere/disk.qcow2"));
    for (path, text) in [("whole/disk.qcow2", "does not support 'range'"), ("busy", "503"), ("nix", "404")] {
        let out = vimg(&["info", &format!("http://127.0.0.1:{port}/{path}")]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains(text), "{out:?}");
    }
}

#[test]
#[ignore = "needs vsftpd, and the rights of root"]
fn vsftpd() {
    let scratch = files();
    let (port, dir) = (port(), folder(&scratch));
    scratch.sh("mkdir empty");
    let config = format!(
        "listen=YES\nlisten_address=127.0.0.1\nlisten_port={port}\nanonymous_enable=YES\nlocal_enable=NO\n\
         anon_root={dir}/files\nsecure_chroot_dir={dir}/empty\nbackground=NO\nseccomp_sandbox=NO\nftp_username=daemon\n\
         nopriv_user=nobody\n"
    );
    fs::write(scratch.file("config"), config).unwrap();
    let _served = Served::new(&scratch, &["vsftpd", &format!("{dir}/config")], listens(port));
    assert_read(&scratch, &format!("ftp://127.0.0.1:{port}/disk.qcow2"));
    let out = vimg(&["info", &format!("ftp://127.0.0.1:{port}/nix")]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("The file does not exist"), "{out:?}");
}

#[test]
#[ignore = "needs tftpd-hpa, and the rights of root"]
fn tftpd_hpa() {
    let scratch = files();
    let (port, dir) = (port(), folder(&scratch));
    let (place, files) = (format!("127.0.0.1:{port}"), format!("{dir}/files"));
    let url = format!("tftp://{place}/disk.qcow2");
    // It speaks over UDP, to which nobody can connect to see whether it is there.
    let there = || vimg(&["info", &url]).dir(scratch.path()).run().code == Some(0);
    let _served = Served::new(&scratch, &["in.tftpd", "-L", "-a", &place, "-s", &files], there);
    assert_read(&scratch, &url);
    let out = vimg(&["info", &format!("tftp://{place}/nix")]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("The file does not exist"), "{out:?}");
}

/// Formats that go to a store from front to back, or by a temporary file, and come back.
fn assert_sent(scratch: &Scratch, run: &dyn Fn(&[&str]), prefix: &str) {
    for (format, options) in [
        ("raw", &[][..]),
        ("qcow2", &[]),
        ("qcow2", &["-c"]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vpc", &["-o", "subformat=fixed,force_size=on"]),
    ] {
        let url = format!("{prefix}/{format}{}", options.len());
        run(&[&["convert", "-f", "raw", "-O", format], options, &["disk", &url]].concat());
        run(&["convert", "-f", format, "-O", "raw", &url, "out"]);
        assert_same_bytes(&scratch.file("out"), &scratch.file("disk"));
    }
}

#[test]
#[ignore = "needs moto's server (pip install 'moto[s3,server]'), and curl"]
fn moto() {
    let scratch = files();
    let port = port();
    let _served = Served::new(&scratch, &["moto_server", "-H", "127.0.0.1", "-p", &port.to_string()], listens(port));
    scratch.sh(&format!("curl -sf -X PUT http://127.0.0.1:{port}/bucket"));
    let run = |args: &[&str]| {
        let run = vimg(args).dir(scratch.path()).env("HOME", scratch.path()).env("AWS_REGION", "us-east-1");
        let run = run.env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"));
        run.env("AWS_ACCESS_KEY_ID", "ID").env("AWS_SECRET_ACCESS_KEY", "secret").ok();
    };
    assert_sent(&scratch, &run, "s3://bucket");
}

#[test]
#[ignore = "needs azurite (npm install -g azurite)"]
fn azurite() {
    let scratch = files();
    let port = port();
    // The account that every azurite has (its documentation says so), and a key that is no secret.
    let key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
    let place = format!("http://127.0.0.1:{port}/devstoreaccount1");
    let number = port.to_string();
    let line = ["azurite-blob", "--silent", "--skipApiVersionCheck", "--blobPort", &number, "--location", "blobs"];
    let _served = Served::new(&scratch, &line, listens(port));
    let make = "import sys, hmac, hashlib, base64, urllib.request, email.utils
place, key = sys.argv[1:]
date = email.utils.formatdate(usegmt=True)
said = 'PUT' + '\\n' * 12 + f'x-ms-date:{date}\\nx-ms-version:2021-08-06\\n'
said += '/devstoreaccount1/devstoreaccount1/box\\nrestype:container'
mark = base64.b64encode(hmac.new(base64.b64decode(key), said.encode(), hashlib.sha256).digest()).decode()
headers = {'x-ms-date': date, 'x-ms-version': '2021-08-06', 'Authorization': f'SharedKey devstoreaccount1:{mark}'}
urllib.request.urlopen(urllib.request.Request(place + '/box?restype=container', method='PUT', headers=headers))";
    plain("python3", &["-c", make, &place, key]).ok();
    let named =
        format!("DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};BlobEndpoint={place};");
    let run = |args: &[&str]| {
        vimg(args).dir(scratch.path()).env("AZURE_STORAGE_CONNECTION_STRING", &named).ok();
    };
    assert_sent(&scratch, &run, "az://box");
}
