//! Images on servers of HTTP. The reference's module for it is no part of what the tests install: its texts stand here
//! as they were seen.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::common::web::{Reply, Request, Web};
use crate::common::{Output, Scratch, assert_same_bytes, judge, need, own, pattern, vimg};

fn run(scratch: &Scratch, args: &[&str]) -> Output {
    vimg(args).dir(scratch.path()).run()
}

/// A raw disk of some blocks, and what it looks like through a server that answers so.
fn converted(answer: impl Fn(&[u8], &Request) -> Reply + Send + Sync + 'static) -> (Scratch, Web, Output) {
    let scratch = Scratch::new();
    let file = pattern(7, 3 << 20);
    fs::write(scratch.file("disk"), &file).unwrap();
    let web = Web::new(move |request| answer(&file, request));
    let out = run(&scratch, &["convert", "-f", "raw", "-O", "raw", &web.url("disk"), "out"]);
    (scratch, web, out)
}

/// It is read all the same.
fn arrives(answer: impl Fn(&[u8], &Request) -> Reply + Send + Sync + 'static) -> Web {
    let (scratch, web, out) = converted(answer);
    assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{:?}", web.requests());
    assert_same_bytes(&scratch.file("disk"), &scratch.file("out"));
    web
}

/// It is refused, with the URL and that text, and nothing is left.
fn fails(text: &str, answer: impl Fn(&[u8], &Request) -> Reply + Send + Sync + 'static) -> Web {
    let (scratch, web, out) = converted(answer);
    assert_eq!(out.code, Some(1), "{out:?}");
    assert!(out.stderr.contains(&web.url("disk")) && out.stderr.contains(text), "{text}: {}", out.stderr);
    assert!(!scratch.file("out").exists());
    web
}

fn tagged(file: &[u8], request: &Request) -> Reply {
    Reply::part(file, request).with("ETag", "\"1\"").with("Accept-Ranges", "bytes")
}

#[test]
fn images_on_a_server_are_read_by_every_command() {
    let scratch = Scratch::new();
    scratch.sh(
        "qemu-img create -q -f qcow2 base.qcow2 8M && qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
    );
    scratch.qemu_io("qcow2", "base.qcow2", &["write -P 7 0 1M", "write -P 9 5M 100k"]);
    scratch.qemu_io("qcow2", "top.qcow2", &["write -P 3 512k 64k"]);
    let files = scratch.path().to_path_buf();
    let web = Web::new(move |request| match fs::read(files.join(request.path.trim_start_matches('/'))) {
        Ok(file) => Reply::part(&file, request),
        Err(_) => Reply::empty(404),
    });
    let (base, top) = (web.url("base.qcow2"), web.url("top.qcow2"));
    let info = scratch.vimg(&["info", &base]).stdout;
    let local = scratch.judge(&["info", "base.qcow2"]).stdout;
    let local: String = local
        .replace("base.qcow2", &base)
        .replace("protocol type: file", "protocol type: http")
        .lines()
        .map(|line| match line.split_once("disk size: ") {
            Some((before, _)) => format!("{before}disk size: unavailable\n"),
            None => format!("{line}\n"),
        })
        .collect();
    assert_eq!(info, local);
    let chain = scratch.vimg(&["info", "--backing-chain", &top]).stdout;
    assert!(chain.contains(&format!("backing file: base.qcow2 (actual path: {base})\n")), "{chain}");
    let json = scratch.vimg(&["info", "--output=json", &base]).json();
    let child = &json["children"][0]["info"];
    assert_eq!((child["format"].as_str(), child["filename"].as_str()), (Some("http"), Some(base.as_str())));
    assert!(json.get("actual-size").is_none());

    scratch.vimg(&["convert", "-O", "raw", &top, "ours"]);
    scratch.judge(&["convert", "-O", "raw", "top.qcow2", "theirs"]);
    assert_same_bytes(&scratch.file("ours"), &scratch.file("theirs"));
    assert_eq!(scratch.vimg(&["compare", &top, "top.qcow2"]).stdout, "Images are identical.\n");
    assert_eq!(run(&scratch, &["compare", &top, &base]).code, Some(1));
    let map = scratch.vimg(&["map", "--output=json", &top]).stdout;
    assert_eq!(map, scratch.judge(&["map", "--output=json", "top.qcow2"]).stdout);
    assert_eq!(scratch.vimg(&["check", &base]).stdout, scratch.judge(&["check", "base.qcow2"]).stdout);
    let measured = scratch.vimg(&["measure", "-O", "qcow2", &top]).stdout;
    assert_eq!(measured, scratch.judge(&["measure", "-O", "qcow2", "top.qcow2"]).stdout);
    scratch.vimg(&["dd", "bs=1M", "skip=4", &format!("if={base}"), "of=part"]);
    scratch.judge(&["dd", "bs=1M", "skip=4", "if=base.qcow2", "of=same"]);
    assert_same_bytes(&scratch.file("part"), &scratch.file("same"));

    // A local image over one on a server.
    scratch.vimg(&["create", "-q", "-f", "qcow2", "-b", &top, "-F", "qcow2", "over.qcow2"]);
    scratch.vimg(&["convert", "-O", "raw", "over.qcow2", "through"]);
    assert_same_bytes(&scratch.file("through"), &scratch.file("theirs"));

    // And by options.
    let tree =
        format!(r#"json:{{"driver": "qcow2", "file": {{"driver": "http", "url": "{base}", "readahead": "64k"}}}}"#);
    assert_eq!(scratch.vimg(&["info", &tree]).stdout, info);
    let dotted = format!("driver=http,url={base},sslverify=off,timeout=7");
    let bare = scratch.vimg(&["info", "--image-opts", &dotted]).stdout;
    let name = format!(r#"image: json:{{"url": "{base}", "driver": "http", "sslverify": "off"}}"#);
    assert!(bare.starts_with(&format!("{name}\nfile format: http\nvirtual size: ")), "{bare}");
}

#[test]
fn what_the_reference_refuses_is_refused_in_its_words() {
    let scratch = Scratch::new();
    fs::write(scratch.file("a"), [1; 512]).unwrap();
    let web = Web::new(|request| match request.path.as_str() {
        "/none" => Reply::empty(404),
        "/closed" => Reply::empty(403),
        "/whole" => Reply::whole(&[1; 512]),
        "/empty" => Reply::empty(200),
        "/unknown" => Reply::part(&[1; 512], request).with("Content-Range", "bytes 0-511/*"),
        _ => Reply::part(&[1; 512], request),
    });
    let (none, a) = (web.url("none"), web.url("a"));
    let opened = |name: &str, text: &str| format!("qemu-img: Could not open '{name}': {text}\n");
    let curl = |name: &str, text: &str| opened(&web.url(name), &format!("CURL: Error opening file: {text}"));
    let opts = |more: &str| format!("driver=http,{more}");
    let with = |more: &str| format!("driver=http,url={a},{more}");
    let by_options = |more: &str, text: &str| {
        (vec!["info".to_owned(), "--image-opts".to_owned(), more.to_owned()], opened(more, text))
    };
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let cannot = "curl driver does not support writes";
    let create = "Protocol driver 'http' does not support image creation";
    let cases = vec![
        (words(&format!("info {none}")), curl("none", "The requested URL returned error: 404")),
        (words(&format!("info {}", web.url("closed"))), curl("closed", "The requested URL returned error: 403")),
        (words(&format!("info {}", web.url("whole"))), curl("whole", "Server does not support 'range' (byte ranges).")),
        (words(&format!("info {}", web.url("unknown"))), curl("unknown", "Server didn't report file size.")),
        (
            words("info http:foo"),
            opened("http:foo", "http curl driver cannot handle the URL 'http:foo' (does not start with 'http://')"),
        ),
        (words("info HTTP://a/"), opened("HTTP://a/", "Unknown protocol 'HTTP'")),
        (
            words("info -f http a"),
            opened("a", "http curl driver cannot handle the URL 'a' (does not start with 'http://')"),
        ),
        (words(&format!("create -f raw {a} 1M")), format!("qemu-img: {a}: {create}\n")),
        (words(&format!("convert -O qcow2 a {a}")), format!("qemu-img: {create}\n")),
        (words(&format!("convert -n -O raw a {a}")), opened(&a, cannot)),
        (words(&format!("resize -f raw {a} 1M")), opened(&a, cannot)),
        (words(&format!("bench -w -f raw {a}")), opened(&a, cannot)),
        (words(&format!("dd if=a of={a}")), format!("qemu-img: {create}\n")),
        (
            words("create -f http x 1M"),
            "qemu-img: x: Format driver 'http' does not support image creation\n".to_owned(),
        ),
        by_options("driver=http", "curl block driver requires an 'url' option"),
        by_options(&opts("filename=http://a/"), "curl block driver requires an 'url' option"),
        by_options(
            &opts("url=https://x/"),
            "http curl driver cannot handle the URL 'https://x/' (does not start with 'http://')",
        ),
        by_options(&with("readahead=100"), "HTTP_READAHEAD_SIZE 100 is not a multiple of 512"),
        by_options(&with("timeout=10001"), "timeout parameter is too large or negative"),
        by_options(&with("timeout=x"), "Parameter 'timeout' expects a number"),
        by_options(&with("sslverify=x"), "Parameter 'sslverify' expects 'on' or 'off'"),
        by_options(&with("cookie=a,cookie-secret=s"), "curl driver cannot handle both cookie and cookie secret"),
        by_options(&with("cookie-secret=s"), "No secret with id 's'"),
        by_options(&with("password-secret=s"), "No secret with id 's'"),
        by_options(&with("foo=1"), "Block protocol 'http' doesn't support the option 'foo'"),
        by_options(&with("filename=b"), "Block protocol 'http' doesn't support the option 'filename'"),
    ];
    for (args, text) in cases {
        let out = vimg(&args).dir(scratch.path()).fails(1);
        assert_eq!(out.stderr, text, "{args:?}");
    }
    let empty = scratch.vimg(&["info", &web.url("empty")]).stdout;
    assert!(empty.contains("virtual size: 0 B (0 bytes)\n"), "{empty}");
    // Nobody is there.
    let gone = web.url("a");
    drop(web);
    let out = run(&scratch, &["info", &gone]);
    assert!(out.stderr.contains("CURL: Error opening file: Failed to connect to 127.0.0.1 port "), "{out:?}");
}

/// Python's server knows no ranges.
#[test]
fn a_real_server_without_ranges_is_refused() {
    let scratch = Scratch::new();
    fs::write(scratch.file("a"), pattern(1, 100_000)).unwrap();
    need("python3");
    let script = "import http.server, sys\n\
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n\
        print(server.server_port, flush=True)\nserver.serve_forever()";
    let mut server = Command::new("python3")
        .args(["-c", script])
        .current_dir(scratch.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut port = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(server.stdout.take().unwrap()), &mut port).unwrap();
    let url = format!("http://127.0.0.1:{}/a", port.trim());
    let out = run(&scratch, &["convert", "-O", "raw", &url, "out"]);
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(out.stderr.ends_with("Server does not support 'range' (byte ranges).\n"), "{out:?}");
    assert!(out.code == Some(1) && !scratch.file("out").exists());
}

#[test]
fn a_server_that_stumbles_is_asked_again() {
    // What was sent before is not asked for again.
    let web = arrives(|file, request| match request.number {
        1 => tagged(file, request).cut(100_000),
        _ => tagged(file, request),
    });
    assert_eq!(web.sent(), 3 << 20);
    arrives(|file, request| match request.number {
        0 | 2 => Reply::empty(503).with("Retry-After", "0"),
        3 => tagged(file, request).cut(0),
        4 => Reply::empty(500),
        _ => tagged(file, request),
    });
    // Less than was asked for, and said so.
    arrives(|file, request| {
        let range = request.range.map(|(from, to)| (from, if from > 0 { to.min(from + 499_999) } else { to }));
        tagged(file, &Request { range, ..request.clone() })
    });
    // Weak tags may differ; the time must not.
    arrives(|file, request| {
        let weak = format!("W/\"{}\"", request.number);
        Reply::part(file, request).with("ETag", weak).with("Last-Modified", "Fri, 27 Nov 2026 10:00:00 GMT")
    });
}

#[test]
fn a_server_that_lies_is_refused() {
    let changed = "the file has been changed on the server while it was read";
    fails(changed, |file, request| tagged(file, request).with("ETag", format!("\"{}\"", request.number)));
    fails(changed, |file, request| {
        let reply = Reply::part(file, request)
            .with("Last-Modified", format!("Fri, 27 Nov 2026 10:00:0{} GMT", request.number.min(9)));
        if request.number == 0 { reply } else { reply.with("ETag", "W/\"9\"") }
    });
    fails(changed, |file, request| match request.number {
        0 => tagged(file, request),
        _ => tagged(&file[..file.len() - 512], request),
    });
    fails(changed, |file, request| match request.number {
        0 => tagged(file, request),
        _ => Reply::whole(&file[1..]).with("ETag", "\"2\""),
    });
    fails("Server does not support 'range' (byte ranges).", |file, request| match request.number {
        0 => Reply::part(file, request),
        _ => Reply::whole(file),
    });
    fails("The requested URL returned error: 416", |file, request| match request.number {
        0 => tagged(file, request),
        _ => Reply::empty(416),
    });
    let other = fails("the server sends bytes 0-9 in place of ", |file, request| match request.number {
        0 => tagged(file, request),
        _ => tagged(file, &Request { range: Some((0, 9)), ..request.clone() }),
    });
    assert!(other.requests().len() <= 17, "nothing is asked of it again");
    fails("the server does not say which bytes it sends", |file, request| match request.number {
        0 => tagged(file, request),
        _ => tagged(file, request).with("Content-Range", "bytes=1-2/x"),
    });
    fails("in an encoding that was not asked for", |file, request| {
        tagged(file, request).with("Content-Encoding", "gzip")
    });
    fails("the server does not say which bytes it sends", |file, request| match request.number {
        0 => tagged(file, request),
        _ => Reply {
            headers: vec![("Content-Type", "multipart/byteranges; boundary=a".into()), ("ETag", "\"1\"".into())],
            ..tagged(file, request)
        },
    });
}

#[test]
fn a_connection_that_is_lost_for_good_leaves_no_target() {
    let (scratch, web, out) = converted(|file, request| match request.number {
        0 => tagged(file, request),
        _ => tagged(file, request).cut(1000),
    });
    assert_eq!(out.code, Some(1));
    let start = format!("qemu-img: {}: error while reading at byte ", web.url("disk"));
    assert!(out.stderr.starts_with(&start), "{out:?}");
    assert!(out.stderr.contains("the server closed the connection (at byte "), "{out:?}");
    assert!(!scratch.file("out").exists());
    // Bounded: each of the ranges that were under way, and each try.
    assert!(web.requests().len() < 100, "{}", web.requests().len());
}

#[test]
fn redirects_are_followed_once_and_bounded() {
    let web = arrives(|file, request| match request.path.as_str() {
        "/disk" => Reply::elsewhere("a/../b/next?x"),
        "/b/next?x" => Reply::elsewhere("/last").with("Content-Type", "text/html"),
        "/last" => tagged(file, request),
        _ => Reply::empty(404),
    });
    let asked: Vec<_> = web.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(asked[..3], ["/disk", "/b/next?x", "/last"]);
    assert!(asked[3..].iter().all(|path| path == "/last"), "{asked:?}");
    // What a redirect led to may come to its end: then it is asked for again.
    let web = arrives(|file, request| match request.path.as_str() {
        "/disk" => Reply::elsewhere(format!("/at{}", request.number)),
        "/at0" if request.number > 1 => Reply::empty(403),
        _ => tagged(file, request),
    });
    assert!(web.requests().iter().filter(|request| request.path == "/disk").count() >= 2);
    let web = fails("Maximum (10) redirects followed", |_, _| Reply::elsewhere("/disk"));
    assert_eq!(web.requests().len(), 11);
    fails("which is no URL of http", |_, _| Reply::elsewhere("file:///etc/passwd"));
    fails("is elsewhere, but not where", |_, _| Reply::empty(302));
}

#[test]
fn an_untrusted_image_leads_to_no_server() {
    let scratch = Scratch::new();
    let web = Web::of(vec![5; 65536]);
    let url = web.url("base");
    scratch.judge(&["create", "-q", "-u", "-f", "qcow2", "-b", &url, "-F", "raw", "over", "64k"]);
    let out = vimg(&["--untrusted", "convert", "-O", "raw", "over", "out"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains(&format!("'over' names the file '{url}', and an untrusted image")), "{out:?}");
    let tree = format!(r#"json:{{"driver":"raw","file":{{"driver":"http","url":"{url}"}}}}"#);
    scratch.judge(&["create", "-q", "-u", "-f", "qcow2", "-b", &tree, "-F", "raw", "tree", "64k"]);
    vimg(&["--untrusted", "convert", "-O", "raw", "tree", "out"]).dir(scratch.path()).fails(1);
    assert_eq!(web.requests(), [], "nobody has asked");
    // What the user names is read, and led nowhere else.
    scratch.vimg(&["--untrusted", "convert", "-f", "raw", "-O", "raw", &url, "out"]);
    let other = Web::new(move |request| Reply::elsewhere(if request.path == "/here" { "/there" } else { &url }));
    let out = vimg(&["--untrusted", "info", &other.url("here")]).fails(1);
    assert!(out.stderr.contains("an untrusted one may lead to no other server"), "{out:?}");
    assert_eq!(other.requests().len(), 2);
    scratch.vimg(&["info", "-f", "raw", &other.url("here")]);
}

#[test]
fn names_passwords_and_cookies_stay_with_the_server_they_are_for() {
    let scratch = Scratch::new();
    let other = Web::of(vec![5; 1024]);
    let to = other.url("x");
    let web = Web::new(
        move |request| if request.path == "/away" { Reply::elsewhere(&to) } else { Reply::part(&[6; 1024], request) },
    );
    let secrets = ["--object", "secret,id=s,data=pw", "--object", "secret,id=c,data=k=v"];
    let seen = |web: &Web| {
        let last = web.requests().pop().unwrap();
        (last.header("Authorization").map(str::to_owned), last.header("Cookie").map(str::to_owned))
    };
    for (path, opts) in
        [("here", "username=u,password-secret=s,cookie-secret=c"), ("away", "username=u,password-secret=s,cookie=k=v")]
    {
        let tree = format!("driver=http,url={},{opts}", web.url(path));
        scratch.vimg(&[&["info"], &secrets[..], &["--image-opts", &tree]].concat());
        assert_eq!(seen(&web), (Some("Basic dTpwdw==".to_owned()), Some("k=v".to_owned())));
    }
    assert_eq!(seen(&other), (None, None));
    scratch.vimg(&["info", &format!("http://u:p%77@127.0.0.1:{}/here", web.port())]);
    assert_eq!(seen(&web), (Some("Basic dTpwdw==".to_owned()), None));
}

#[test]
fn a_proxy_is_gone_through() {
    let scratch = Scratch::new();
    let (web, proxy) = (Web::of(vec![5; 1024]), Web::new(|_| Reply::empty(500)));
    let tree = format!("driver=http,url={},proxy-username=u,proxy-password-secret=s", web.url("a"));
    let args = ["info", "--object", "secret,id=s,data=pw", "--image-opts", &tree];
    let through =
        |name: &str| vimg(&args).dir(scratch.path()).env("http_proxy", proxy.url("")).env("no_proxy", name).ok();
    through("127.0.0.1");
    assert_eq!(proxy.requests().len(), 0);
    through("example.org");
    let asked = proxy.requests();
    assert_eq!(asked[0].path, format!("127.0.0.1:{}", web.port()));
    assert_eq!(asked[0].header("Proxy-Authorization"), Some("Basic dTpwdw=="));
}

/// Python's TLS before a server of ours.
#[test]
fn tls_is_verified_unless_told_otherwise() {
    let scratch = Scratch::new();
    need("python3");
    scratch.sh("openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 9000 -subj /CN=localhost \
         -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE 2>/dev/null");
    let file = pattern(3, 1 << 20);
    fs::write(scratch.file("disk"), &file).unwrap();
    let served = file.clone();
    let web = Web::new(move |request| match request.path.as_str() {
        "/down" => Reply::elsewhere("http://localhost/disk"),
        _ => Reply::part(&served, request),
    });
    let script = "import socket, ssl, sys, threading\n\
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\ncontext.load_cert_chain('cert', 'key')\n\
        def copy(a, b):\n  try:\n    while d := a.recv(65536): b.sendall(d)\n  except OSError: pass\n  \
        try: b.shutdown(2)\n  except OSError: pass\n\
        def serve(c):\n  try: c = context.wrap_socket(c, server_side=True)\n  except OSError: return\n  \
        s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n  \
        threading.Thread(target=copy, args=(c, s), daemon=True).start()\n  copy(s, c)\n\
        l = socket.create_server(('127.0.0.1', 0))\nprint(l.getsockname()[1], flush=True)\n\
        while True: threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()";
    let mut server = Command::new("python3")
        .args(["-c", script, &web.port().to_string()])
        .current_dir(scratch.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut port = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(server.stdout.take().unwrap()), &mut port).unwrap();
    let url = format!("https://localhost:{}/disk", port.trim());
    let refused = run(&scratch, &["info", &url]);
    let tree = format!("driver=raw,file.driver=https,file.url={url},file.sslverify=off");
    let unverified = run(&scratch, &["convert", "--image-opts", "-O", "raw", &tree, "out"]);
    let verified = |args: &[&str]| {
        let args = [args, &["compare", "-f", "raw", "-F", "raw", &url, "out"]].concat();
        own(&args).dir(scratch.path()).env("SSL_CERT_FILE", scratch.file("cert")).run()
    };
    // The kernel lets nothing be read but what was named: the certificates are.
    let (verified, confined) = (verified(&[]), verified(&["--untrusted"]));
    let down = format!("driver=https,url=https://localhost:{}/down,sslverify=off", port.trim());
    let down = run(&scratch, &["info", "--image-opts", &down]);
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(refused.code == Some(1) && refused.stderr.contains("certificate"), "{refused:?}");
    assert!(down.stderr.ends_with("the file is at 'http://localhost/disk', without TLS\n"), "{down:?}");
    assert_eq!(unverified.code, Some(0), "{unverified:?}");
    assert_same_bytes(&scratch.file("disk"), &scratch.file("out"));
    assert_eq!(verified.stdout, "Images are identical.\n", "{verified:?}");
    assert_eq!(confined.stdout, "Images are identical.\n", "{confined:?}");
}

#[test]
fn of_a_sparse_image_little_more_than_its_data_is_fetched() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "a", "8G"]);
    let writes: Vec<String> = (0..64).map(|n| format!("write -q -P {} {}M 512k", n + 1, n * 127)).collect();
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    scratch.qemu_io("qcow2", "a", &writes);
    let web = Web::of(fs::read(scratch.file("a")).unwrap());
    scratch.vimg(&["convert", "-O", "qcow2", &web.url("a"), "b"]);
    scratch.assert_same_content("qcow2", "a", "qcow2", "b");
    let (sent, requests) = (web.sent(), web.requests().len());
    assert!(sent <= (64 << 19) * 11 / 10, "{sent} bytes for {}", 64 << 19);
    // One for each run of data, and one for each table.
    assert!(requests <= 64 + 16 + 8, "{requests}");
    // Compressed clusters are fetched many at a time.
    scratch.judge(&["convert", "-c", "-O", "qcow2", "a", "c"]);
    let web = Web::of(fs::read(scratch.file("c")).unwrap());
    scratch.vimg(&["convert", "-O", "qcow2", &web.url("c"), "d"]);
    scratch.assert_same_content("qcow2", "a", "qcow2", "d");
    let len = fs::metadata(scratch.file("c")).unwrap().len();
    assert!(web.sent() <= len && web.requests().len() as u64 <= len.div_ceil(256 << 10) + 1, "{len} {}", web.sent());
}

/// What a server is asked for while a disk of runs of data with holes between them, which follow each other in the file,
/// is made raw: the number of requests for data, the most bytes of one, and how it ended.
fn scattered(answer: impl Fn(&[u8], &Request) -> Reply + Send + Sync + 'static) -> (Scratch, usize, u64, Output) {
    let scratch = Scratch::new();
    let run = pattern(11, 640 << 10);
    let disk = fs::File::create(scratch.file("disk")).unwrap();
    (0..128u64).for_each(|n| disk.write_all_at(&run, n << 20).unwrap());
    disk.set_len(128 << 20).unwrap();
    scratch.judge(&["convert", "-f", "raw", "-O", "qcow2", "disk", "a"]);
    let file = fs::read(scratch.file("a")).unwrap();
    let web = Web::new(move |request| answer(&file, request));
    let out = run_convert(&scratch, &web.url("a"));
    let len = |request: &Request| request.range.map_or(0, |(from, to)| to + 1 - from);
    let data: Vec<u64> = web.requests().iter().map(len).filter(|len| *len > 256 << 10).collect();
    if out.code == Some(0) {
        assert_same_bytes(&scratch.file("disk"), &scratch.file("out"));
        assert!(fs::metadata(scratch.file("out")).unwrap().blocks() * 512 <= 82 << 20);
    }
    (scratch, data.len(), data.into_iter().max().unwrap_or(0), out)
}

fn run_convert(scratch: &Scratch, url: &str) -> Output {
    run(scratch, &["convert", "-f", "qcow2", "-O", "raw", url, "out"])
}

/// Several chunks are taken at once, and fetched by one request, as one answer.
#[test]
fn what_follows_in_the_file_is_asked_for_once() {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let (_scratch, requests, most, out) = scattered(move |file, request| {
        let reply = tagged(file, request);
        count.fetch_add(reply.body.len(), Ordering::SeqCst);
        reply
    });
    assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""));
    // 80 MiB, a 64th of it at once or a little more.
    assert!(requests <= 80 && most > 1 << 20, "{requests} {most}");
    assert!(sent.load(Ordering::SeqCst) <= 81 << 20, "{sent:?}");
    // A worker that has its answer cut off asks for what is missing, and so it does where less comes than was asked for.
    let (_scratch, _, _, out) = scattered(|file, request| match (request.range, request.number % 3) {
        (Some((from, to)), 1) if to - from > 300_000 => tagged(file, request).cut(((to - from) * 7 / 9) as usize),
        (Some((from, to)), 2) if to - from > 300_000 => {
            tagged(file, &Request { range: Some((from, from + (to - from) / 3)), ..request.clone() })
        }
        _ => tagged(file, request),
    });
    assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""));
    // What is asked for once more has changed.
    let (scratch, _, _, out) = scattered(|file, request| match request.number {
        0..9 => tagged(file, request),
        9 => tagged(file, request).cut(400_000),
        _ => tagged(file, request).with("ETag", "\"2\""),
    });
    assert_eq!(out.code, Some(1));
    assert!(out.stderr.contains("the file has been changed on the server while it was read"), "{}", out.stderr);
    assert!(!scratch.file("out").exists());
}

/// But for the first tables, the server answers no request for one before four of them are there at once, unless they do
/// not come.
#[test]
fn tables_are_fetched_several_at_once() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "a", "16G"]);
    let writes: Vec<String> = (0..32).map(|n| format!("write -q -P {} {}M 64k", n + 1, n * 512)).collect();
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    scratch.qemu_io("qcow2", "a", &writes);
    let file = fs::read(scratch.file("a")).unwrap();
    let word = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    let l1 = word(40) as usize;
    let tables: Vec<u64> = (0..32).map(|n| word(l1 + n * 8)).collect();
    let most = Arc::new(AtomicUsize::new(0));
    let (seen, under_way) = (most.clone(), (Mutex::new((0, false)), Condvar::new()));
    let web = Web::new(move |request| {
        if request.range.is_some_and(|(from, _)| tables[2..].contains(&from)) {
            let (lock, changed) = &under_way;
            let mut state = lock.lock().unwrap();
            state.0 += 1;
            state.1 |= state.0 >= 4;
            seen.fetch_max(state.0, Ordering::SeqCst);
            changed.notify_all();
            let wait = Duration::from_secs(60);
            let (mut state, _) = changed.wait_timeout_while(state, wait, |(_, enough)| !*enough).unwrap();
            *state = (state.0 - 1, true);
        }
        Reply::part(&file, request).with("ETag", "\"1\"")
    });
    // Nobody asks again for what waits.
    let wishes = "file.readahead=65536,file.timeout=600";
    let name = format!("driver=qcow2,file.driver=http,file.url={},{wishes}", web.url("a"));
    let far = vimg(&["map", "--output=json", "--image-opts", &name]).dir(scratch.path()).ok();
    let near = judge(&["map", "--output=json", "a"]).dir(scratch.path()).ok();
    assert_eq!(far.stdout, near.stdout);
    assert!(most.load(Ordering::SeqCst) >= 4);
    // What lies past the part that is asked about is not fetched.
    let before = web.requests().len();
    let part = vimg(&["map", "--max-length=1G", "--image-opts", &name]).dir(scratch.path()).ok();
    assert_eq!(part.stdout.lines().count(), 3, "{part:?}");
    assert!(web.requests().len() - before <= 8, "{:?}", web.requests().len() - before);
}

/// The signature itself is compared with the reference's own example, beside the code.
#[test]
fn objects_of_a_store_are_read_with_signed_requests() {
    let scratch = Scratch::new();
    let file = pattern(9, 3 << 20);
    fs::write(scratch.file("disk"), &file).unwrap();
    let web = Web::new(move |request| match request.path.as_str() {
        "/bucket/a%20b/disk.raw" => tagged(&file, request),
        _ => Reply::empty(404),
    });
    let convert = || {
        let args = ["convert", "-f", "raw", "-O", "raw", "s3://bucket/a b/disk.raw", "out"];
        vimg(&args).dir(scratch.path()).env("HOME", scratch.path()).env("AWS_ENDPOINT_URL", web.url(""))
    };
    convert().ok();
    assert_same_bytes(&scratch.file("disk"), &scratch.file("out"));
    assert!(web.requests().iter().all(|request| request.header("Authorization").is_none()));
    let before = web.requests().len();
    let keys = convert().env("AWS_ACCESS_KEY_ID", "ID").env("AWS_SECRET_ACCESS_KEY", "not to be seen");
    keys.env("AWS_SESSION_TOKEN", "token").env("AWS_REGION", "eu-west-1").ok();
    for request in &web.requests()[before..] {
        let shown = request.header("Authorization").unwrap();
        assert!(
            shown.starts_with("AWS4-HMAC-SHA256 Credential=ID/2") && shown.contains("/eu-west-1/s3/aws4_request,"),
            "{shown}"
        );
        assert_eq!(request.header("X-Amz-Security-Token"), Some("token"));
        assert!(!format!("{request:?}").contains("not to be seen"));
    }
    let out = vimg(&["info", "s3://bucket"]).fails(1);
    assert!(out.stderr.contains("names no object: s3://BUCKET/KEY does"), "{out:?}");
    let out = convert().env("AWS_ACCESS_KEY_ID", "ID").fails(1);
    assert!(out.stderr.contains("AWS_SECRET_ACCESS_KEY is not"), "{out:?}");
    let out = vimg(&["create", "-f", "raw", "s3://bucket/new", "1M"]).fails(1);
    assert_eq!(out.stderr, "qemu-img: s3://bucket/new: Protocol driver 's3' does not support image creation\n");
}
