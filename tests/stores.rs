//! Objects of stores that are written: whole or not at all, in parts, by signed requests.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex};

use crate::common::web::{Reply, Request, Web};
use crate::common::*;

/// What is in a store.
#[derive(Debug, Default)]
struct Shelf {
    objects: BTreeMap<String, Vec<u8>>,
    /// Uploads under way: their parts.
    uploads: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    begun: usize,
    /// So many requests that bring a part are answered by 503.
    busy: usize,
    /// A part with that number is refused.
    bad: Option<String>,
    /// An object that is there is not what was sent.
    forgets: bool,
}

fn value<'a>(query: &'a str, key: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
}

/// A value of XML.
fn all<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    text.split(&open).skip(1).filter_map(|rest| rest.split_once(&close).map(|(value, _)| value)).collect()
}

/// As Amazon's: an upload is begun, has parts, is completed or given up.
fn amazon(shelf: &Mutex<Shelf>, request: &Request) -> Reply {
    let mut shelf = shelf.lock().unwrap();
    let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
    let method = request.line.split(' ').next().unwrap();
    let upload = value(query, "uploadId").map(str::to_owned);
    match (method, upload) {
        ("GET", _) => match shelf.objects.get(path) {
            Some(object) => Reply::part(object, request).with("ETag", "\"1\""),
            None => Reply::empty(404),
        },
        ("POST", None) if query == "uploads=" => {
            shelf.begun += 1;
            let id = format!("u/{}", shelf.begun);
            shelf.uploads.insert(id.clone(), BTreeMap::new());
            Reply::whole(format!("<?xml version=\"1.0\"?><R xmlns=\"x\"><UploadId>{id}</UploadId></R>").as_bytes())
        }
        ("PUT", None) => {
            shelf.objects.insert(path.to_owned(), request.body.clone());
            Reply::empty(200)
        }
        (method, Some(upload)) => {
            let upload = upload.replace("%2F", "/");
            let number = value(query, "partNumber").unwrap_or_default();
            if method == "PUT" && shelf.busy > 0 {
                shelf.busy -= 1;
                return Reply::empty(503);
            }
            if method == "PUT" && shelf.bad.as_deref() == Some(number) {
                let text = "<Error><Code>QuotaExceeded</Code><Message>No more.</Message></Error>";
                return Reply { status: 403, ..Reply::whole(text.as_bytes()) };
            }
            let Some(parts) = shelf.uploads.get_mut(&upload) else { return Reply::empty(404) };
            match method {
                "PUT" => {
                    let tag = format!("\"{:04}-{}\"", number.parse::<u32>().unwrap(), request.body.len());
                    parts.insert(tag.clone(), request.body.clone());
                    Reply::empty(200).with("ETag", tag)
                }
                "POST" => {
                    let text = String::from_utf8(request.body.clone()).unwrap();
                    let mut whole: Vec<u8> = all(&text, "ETag").iter().flat_map(|tag| parts[*tag].clone()).collect();
                    shelf.uploads.remove(&upload);
                    if shelf.forgets {
                        whole[9 << 20] ^= 1;
                    }
                    shelf.objects.insert(path.to_owned(), whole);
                    Reply::whole(b"<?xml version=\"1.0\"?><CompleteMultipartUploadResult/>")
                }
                _ => {
                    shelf.uploads.remove(&upload);
                    Reply::empty(204)
                }
            }
        }
        _ => Reply::empty(405),
    }
}

/// As Azure's: blocks, and a list of them.
fn azure(shelf: &Mutex<Shelf>, request: &Request) -> Reply {
    let mut shelf = shelf.lock().unwrap();
    let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
    let method = request.line.split(' ').next().unwrap();
    match (method, value(query, "comp")) {
        ("GET", None) => match shelf.objects.get(path) {
            Some(object) => Reply::part(object, request).with("ETag", "\"1\""),
            None => Reply::empty(404),
        },
        ("PUT", None) if request.header("x-ms-blob-type") == Some("BlockBlob") => {
            shelf.objects.insert(path.to_owned(), request.body.clone());
            Reply::empty(201)
        }
        ("PUT", Some("block")) => {
            let name = value(query, "blockid").unwrap().replace("%3D", "=");
            shelf.uploads.entry(path.to_owned()).or_default().insert(name, request.body.clone());
            Reply::empty(201)
        }
        ("PUT", Some("blocklist")) => {
            let text = String::from_utf8(request.body.clone()).unwrap();
            let parts = shelf.uploads.remove(path).unwrap();
            let whole = all(&text, "Latest").iter().flat_map(|name| parts[*name].clone()).collect();
            shelf.objects.insert(path.to_owned(), whole);
            Reply::empty(201)
        }
        _ => Reply::empty(405),
    }
}

type Answer = fn(&Mutex<Shelf>, &Request) -> Reply;

fn store(answer: Answer) -> (Web, Arc<Mutex<Shelf>>) {
    let shelf = Arc::new(Mutex::new(Shelf::default()));
    let shared = shelf.clone();
    (Web::new(move |request| answer(&shared, request)), shelf)
}

/// What is converted to each.
const DISK: usize = (18 << 20) + 512;

#[test]
fn objects_are_sent_in_parts_and_read_back() {
    let scratch = Scratch::new();
    let mut disk = pattern(3, DISK);
    disk[5 << 20..9 << 20].fill(0);
    fs::write(scratch.file("disk"), &disk).unwrap();
    fs::write(scratch.file("little"), &disk[..1 << 20]).unwrap();
    let (amazon, shelf) = store(amazon);
    let (azure, blobs) = store(azure);
    let run = |args: &[&str]| {
        let command = vimg(args).dir(scratch.path()).env("HOME", scratch.path());
        let command = command.env("AWS_ENDPOINT_URL", amazon.url("")).env("STORAGE_EMULATOR_HOST", amazon.url(""));
        let command = command.env("AWS_ACCESS_KEY_ID", "ID").env("AWS_SECRET_ACCESS_KEY", "secret");
        let account = format!("AccountName=dev;AccountKey=a2V5PQ==;BlobEndpoint={}", azure.url("dev"));
        command.env("GOOGLE_OAUTH_ACCESS_TOKEN", "token").env("AZURE_STORAGE_CONNECTION_STRING", account)
    };
    shelf.lock().unwrap().busy = 2;
    for scheme in ["s3", "gs", "az"] {
        let to = |name: &str| format!("{scheme}://bucket/{scheme} {name}");
        run(&["convert", "-f", "raw", "-O", "raw", "disk", &to("disk")]).ok();
        let held = match scheme {
            "az" => blobs.lock().unwrap().objects["/dev/bucket/az%20disk"].clone(),
            _ => shelf.lock().unwrap().objects[&format!("/bucket/{scheme}%20disk")].clone(),
        };
        assert!(held == disk, "{scheme}: {} bytes", held.len());
        run(&["convert", "-f", "raw", "-O", "raw", "little", &to("little")]).ok();
        run(&["convert", "-f", "raw", "-O", "raw", &to("little"), "back"]).ok();
        assert_same_bytes(&scratch.file("little"), &scratch.file("back"));
        // Tables first; and, with -c, by way of a file.
        for more in [&[][..], &["-c"]] {
            let args = ["convert", "--verify", "-f", "raw", "-O", "qcow2", "disk"];
            let tmpdir = if more.is_empty() { "/missing" } else { "" };
            let name = to("disk.qcow2");
            run(&[&args[..], more, &[&name]].concat()).env("TMPDIR", tmpdir).ok();
            run(&["convert", "-f", "qcow2", "-O", "raw", &to("disk.qcow2"), "back"]).ok();
            assert_same_bytes(&scratch.file("disk"), &scratch.file("back"));
        }
    }
    assert!(shelf.lock().unwrap().uploads.is_empty());
    for (web, shown) in [(&amazon, "AWS4-HMAC-SHA256 Credential=ID/"), (&azure, "SharedKey dev:")] {
        for request in web.requests() {
            let given = request.header("Authorization").unwrap();
            assert!(given.starts_with(shown) || given == "Bearer token", "{request:?}");
        }
    }
}

#[test]
fn an_object_is_whole_or_not_there() {
    let scratch = Scratch::new();
    fs::write(scratch.file("disk"), pattern(4, DISK)).unwrap();
    let (web, shelf) = store(amazon);
    shelf.lock().unwrap().bad = Some("2".to_owned());
    shelf.lock().unwrap().objects.insert("/bucket/disk".to_owned(), b"older".to_vec());
    let run = |args: &[&str]| {
        let command = vimg(args).dir(scratch.path()).env("HOME", scratch.path()).env("AWS_ENDPOINT_URL", web.url(""));
        command.env("AWS_ACCESS_KEY_ID", "ID").env("AWS_SECRET_ACCESS_KEY", "secret")
    };
    let out = run(&["convert", "-f", "raw", "-O", "raw", "disk", "s3://bucket/disk"]).fails(1);
    assert_eq!(
        out.stderr,
        "qemu-img: s3://bucket/disk: error while writing: part 2: The requested URL returned error: 403 \
         (QuotaExceeded: No more.)\n"
    );
    let kept = shelf.lock().unwrap();
    assert!(kept.uploads.is_empty() && kept.begun == 1);
    assert_eq!(kept.objects["/bucket/disk"], b"older");
    drop(kept);
    shelf.lock().unwrap().bad = None;
    // A source that cannot be read to its end, a digest that is another one.
    let broken = "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"blkdebug\",\"inject-error\":[{\"event\":\"read_aio\",\"sector\":30000}],\"image\":{\"driver\":\"file\",\"filename\":\"disk\"}}}";
    for format in
        [&["raw"][..], &["qcow2"], &["vpc", "-o", "subformat=fixed"], &["vmdk", "-o", "subformat=streamOptimized"]]
    {
        let out = run(&[&["convert", "-O"], format, &[broken, "s3://bucket/disk"]].concat()).fails(1);
        assert!(out.stderr.contains("Input/output error"), "{out:?}");
    }
    let other = format!("sha256:{}", "0".repeat(64));
    for format in ["raw", "qcow2"] {
        run(&["convert", "-f", "raw", "-O", format, "--expect-digest", &other, "disk", "s3://bucket/disk"]).fails(1);
    }
    let kept = shelf.lock().unwrap();
    assert!(kept.uploads.is_empty() && kept.begun >= 5, "{} {:?}", kept.begun, kept.uploads.keys());
    assert_eq!(kept.objects["/bucket/disk"], b"older");
    drop(kept);
    shelf.lock().unwrap().forgets = true;
    let said = "what was read back is not what was written";
    for format in ["raw", "qcow2"] {
        let out = run(&["convert", "-f", "raw", "-O", format, "--verify", "disk", "s3://bucket/forgotten"]).fails(1);
        assert!(out.stderr.contains(said), "{out:?}");
    }
    shelf.lock().unwrap().forgets = false;
    for (args, said) in [
        (&["convert", "-f", "raw", "-O", "raw", "disk", "s3://bucket"][..], "names no object"),
        (&["create", "-f", "raw", "s3://bucket/x", "1M"], "does not support image creation"),
        (&["convert", "-n", "-f", "raw", "-O", "raw", "disk", "s3://bucket/disk"], "does not support writes"),
    ] {
        let out = run(args).fails(1);
        assert!(out.stderr.contains(said), "{args:?}: {out:?}");
    }
}

/// The token that a service account's key signs for is what the judge finds it to be.
#[test]
fn a_service_account_asks_for_a_token() {
    let scratch = Scratch::new();
    fs::write(scratch.file("little"), pattern(5, 1 << 20)).unwrap();
    judge_of("openssl", &["genpkey", "-quiet", "-algorithm", "RSA", "-out", "key"], &scratch);
    judge_of("openssl", &["pkey", "-in", "key", "-pubout", "-out", "public"], &scratch);
    let (web, shelf) = {
        let shelf = Arc::new(Mutex::new(Shelf::default()));
        let (shared, forms) = (shelf.clone(), scratch.file("form"));
        let web = Web::new(move |request| match request.path.as_str() {
            "/token" => {
                fs::write(&forms, &request.body).unwrap();
                Reply::whole(br#"{"access_token":"fresh","expires_in":3600,"token_type":"Bearer"}"#)
            }
            _ => amazon(&shared, request),
        });
        (web, shelf)
    };
    let key = fs::read_to_string(scratch.file("key")).unwrap().replace('\n', "\\n");
    let account = format!(
        "{{\"type\":\"service_account\",\"client_email\":\"a@b\",\"private_key\":\"{key}\",\"token_uri\":\"{}\"}}",
        web.url("token")
    );
    fs::write(scratch.file("account.json"), account).unwrap();
    let args = ["convert", "-f", "raw", "-O", "raw", "little", "gs://bucket/little"];
    let command = vimg(&args).dir(scratch.path()).env("HOME", scratch.path());
    command.env("STORAGE_EMULATOR_HOST", web.url("")).env("GOOGLE_APPLICATION_CREDENTIALS", "account.json").ok();
    assert!(shelf.lock().unwrap().objects["/bucket/little"] == fs::read(scratch.file("little")).unwrap());
    let put = web.requests().pop().unwrap();
    assert_eq!(put.header("Authorization"), Some("Bearer fresh"));
    let check = "
import base64, json, sys
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
form = dict(pair.split('=', 1) for pair in open('form').read().split('&'))
assert form['grant_type'] == 'urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer', form
head, claims, signature = form['assertion'].split('.')
plain = lambda text: base64.urlsafe_b64decode(text + '=' * (-len(text) % 4))
key = serialization.load_pem_public_key(open('public', 'rb').read())
key.verify(plain(signature), (head + '.' + claims).encode(), padding.PKCS1v15(), hashes.SHA256())
claims = json.loads(plain(claims))
assert json.loads(plain(head))['alg'] == 'RS256' and claims['iss'] == 'a@b' and claims['exp'] - claims['iat'] == 3600
";
    judge_of("python3", &["-c", check], &scratch);
}

fn judge_of(program: &str, args: &[&str], scratch: &Scratch) {
    let out = std::process::Command::new(program).args(args).current_dir(scratch.path()).output().unwrap();
    assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
}
