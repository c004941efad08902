//! LUKS images: made, read and written by vimg, and judged by qemu-img and qemu-io, by cryptsetup, and by a reader of the
//! format in Python, which has its ciphers from `cryptography`.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use crate::common::trace::{Ended, killed_at};
use crate::common::{Output, Scratch, need, need_root, pattern, plain, sh, vimg, write_pattern};

const SECRET: [&str; 2] = ["--object", "secret,id=s,data=abc"];

/// Cipher, mode, generator of vectors with its hash, hash: every cipher in every mode that the reference has it in, and
/// every generator and hash with some of them. With keys of 24 bytes the reference aborts in all modes but xts.
const COMBINATIONS: &[[&str; 4]] = &[
    ["aes-128", "ecb", "plain", "md5"],
    ["aes-128", "cbc", "essiv:md5", "sha1"],
    ["aes-128", "xts", "plain64", "sha224"],
    ["aes-128", "ctr", "plain", "sha256"],
    ["aes-192", "xts", "essiv:sm3", "sha384"],
    ["aes-256", "ecb", "plain64", "sha512"],
    ["aes-256", "cbc", "essiv:sha256", "ripemd160"],
    ["aes-256", "xts", "plain", "sm3"],
    ["aes-256", "ctr", "essiv:sha256", "md5"],
    ["serpent-128", "ecb", "plain64", "sha1"],
    ["serpent-128", "cbc", "plain", "sha224"],
    ["serpent-128", "xts", "essiv:sha256", "sha256"],
    ["serpent-128", "ctr", "plain64", "sha384"],
    ["serpent-192", "xts", "plain64", "sha512"],
    ["serpent-256", "ecb", "plain", "ripemd160"],
    ["serpent-256", "cbc", "essiv:md5", "sm3"],
    ["serpent-256", "xts", "plain", "md5"],
    ["serpent-256", "ctr", "plain64", "sha1"],
    ["twofish-128", "ecb", "plain", "sha224"],
    ["twofish-128", "cbc", "plain64", "sha256"],
    ["twofish-128", "xts", "essiv:md5", "sha384"],
    ["twofish-128", "ctr", "plain", "sha512"],
    ["twofish-192", "xts", "plain64:md5", "ripemd160"],
    ["twofish-256", "ecb", "plain64", "sm3"],
    ["twofish-256", "cbc", "essiv:sha256", "md5"],
    ["twofish-256", "xts", "plain64", "sha1"],
    ["twofish-256", "ctr", "essiv:sm3", "sha224"],
    ["cast5-128", "ecb", "plain", "sha256"],
    ["cast5-128", "cbc", "plain64", "sha384"],
    ["cast5-128", "ctr", "plain", "sha512"],
    ["cast5-128", "ecb", "essiv:md5", "sha1"],
    ["cast5-128", "cbc", "essiv:md5", "sha256"],
    ["cast5-128", "ctr", "essiv:md5", "sm3"],
];

/// A combination as creation options; iterations are few.
fn options([cipher, mode, iv, hash]: [&str; 4]) -> String {
    let (iv, iv_hash) = iv.split_once(':').unwrap_or((iv, ""));
    let iv_hash = if iv_hash.is_empty() { String::new() } else { format!(",ivgen-hash-alg={iv_hash}") };
    format!("key-secret=s,cipher-alg={cipher},cipher-mode={mode},ivgen-alg={iv}{iv_hash},hash-alg={hash},iter-time=1")
}

fn image(name: &str) -> String {
    format!("driver=luks,key-secret=s,file.filename={name}")
}

fn vimg_in(scratch: &Scratch, args: &[&str]) -> Output {
    scratch.vimg(&[&args[..1], &SECRET, &args[1..]].concat())
}

fn judge_in(scratch: &Scratch, args: &[&str]) -> Output {
    scratch.judge(&[&args[..1], &SECRET, &args[1..]].concat())
}

fn disk(scratch: &Scratch, name: &str, seed: u64, len: usize) {
    fs::write(scratch.file(name), pattern(seed, len)).unwrap();
}

fn assert_same(scratch: &Scratch, a: &str, b: &str, what: &str) {
    assert!(fs::read(scratch.file(a)).unwrap() == fs::read(scratch.file(b)).unwrap(), "{what}: {a} is not {b}");
}

/// The judge writes over a part of an image, and of its model.
fn judge_writes(scratch: &Scratch, image: &str, model: &str) {
    let write = ["-c", "write -P 0x5a 40961 70001"];
    let args = [&SECRET[..], &write, &["--image-opts", image]].concat();
    plain("qemu-io", &args).dir(scratch.path()).ok();
    let mut bytes = fs::read(scratch.file(model)).unwrap();
    bytes[40961..40961 + 70001].fill(0x5a);
    fs::write(scratch.file(model), bytes).unwrap();
}

#[test]
fn every_cipher_mode_generator_and_hash_is_read_and_written_both_ways() {
    let scratch = Scratch::new();
    for (n, combination) in COMBINATIONS.iter().enumerate() {
        let (options, what) = (options(*combination), combination.join(" "));
        disk(&scratch, "disk", n as u64, 300_032);
        vimg_in(&scratch, &["convert", "-f", "raw", "-O", "luks", "-o", &options, "disk", "a"]);
        judge_in(&scratch, &["convert", "--image-opts", &image("a"), "-O", "raw", "read"]);
        assert_same(&scratch, "read", "disk", &what);
        judge_writes(&scratch, &image("a"), "disk");
        vimg_in(&scratch, &["convert", "--image-opts", &image("a"), "-O", "raw", "read"]);
        assert_same(&scratch, "read", "disk", &what);
    }
}

/// What vimg takes the judge opens, and reads the same; what vimg refuses the judge refuses in the same words. (It makes
/// a header in seconds, but refuses to, and opens one, at once.)
#[test]
fn what_goes_together_is_what_the_judge_lets_go_together() {
    const HASHES: [&str; 8] = ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"];
    let ciphers =
        ["aes", "serpent", "twofish"].iter().flat_map(|family| [128, 192, 256].map(|n| format!("{family}-{n}")));
    let ciphers = ciphers.chain(["cast5-128", "des", "3des", "sm4"].map(str::to_owned));
    let ivs: Vec<String> = ["plain".to_owned(), "plain64".to_owned()]
        .into_iter()
        .chain(HASHES.map(|hash| format!("essiv:{hash}")))
        .collect();
    let scratch = Scratch::new();
    disk(&scratch, "disk", 1, 10_240);
    let (mut taken, mut refused) = (0, 0);
    for cipher in ciphers {
        for mode in ["ecb", "cbc", "xts", "ctr"] {
            for iv in &ivs {
                let combination = [cipher.as_str(), mode, iv, HASHES[(taken + refused) % HASHES.len()]];
                let (what, options) = (combination.join(" "), options(combination));
                // Nothing is measured, which takes longest.
                let quick = options.replace("iter-time=1", "iter-time=0");
                let make = |options| {
                    [&["convert", "-f", "raw", "-O", "luks"], &SECRET[..], &["-o", options, "disk", "a"]].concat()
                };
                let ours = vimg(&make(&quick)).dir(scratch.path()).run();
                if ours.code == Some(0) {
                    taken += 1;
                    // The judge aborts.
                    if !cipher.ends_with("-192") || mode == "xts" {
                        judge_in(&scratch, &["convert", "--image-opts", &image("a"), "-O", "raw", "read"]);
                        assert_same(&scratch, "read", "disk", &what);
                    }
                } else {
                    refused += 1;
                    let theirs = plain("qemu-img", &make(&options)).dir(scratch.path()).run();
                    assert_eq!((ours.code, ours.stderr), (theirs.code, theirs.stderr), "{what}");
                }
            }
        }
    }
    // Nine ciphers in four modes have plain, plain64 and hashes of 128 and 256 bits, of which there are three; one has
    // three modes and the shorter hash.
    assert_eq!((taken, refused), (9 * 4 * 5 + 3 * 3, 13 * 4 * 10 - 9 * 4 * 5 - 3 * 3));
}

/// The parts of a header may touch, and what lies between two key slots belongs to the first.
#[test]
fn headers_are_taken_and_refused_as_by_the_judge() {
    let scratch = Scratch::new();
    vimg_in(&scratch, &["create", "-q", "-f", "luks", "-o", "key-secret=s,iter-time=0", "whole", "64k"]);
    let whole = fs::read(scratch.file("whole")).unwrap();
    let slot = |n: usize| 208 + 48 * n + 40;
    let numbers =
        |at: usize, numbers: &[u32]| numbers.iter().map(|n| (at, n.to_be_bytes().to_vec())).collect::<Vec<_>>();
    let names = |names: &[&str]| {
        let long = |name: &&str| [name.as_bytes(), &vec![0; 32 - name.len()]].concat();
        names.iter().map(|name| (40, long(name))).collect::<Vec<_>>()
    };
    let mut same = 0;
    for (at, bytes) in [
        numbers(104, &[0, 7, 8, 511, 512, 3535, 3536, 4035, 4036, 4039, 4040, 4041]),
        numbers(slot(0), &[7, 8, 9, 10, 511, 512, 513, 3537, 3543, 3544]),
        numbers(slot(1), &[8, 508, 511, 512, 513, 514, 1016, 3537, 3543]),
        numbers(slot(7), &[8, 511, 3536, 3537, 3540, 3544, u32::MAX]),
        names(&[
            "xts-essiv:sha1",
            "xts-essiv:sha512",
            "xts-essiv:md5",
            "cbc-essiv:sha256",
            "xts-essiv",
            "xts-plain:foo",
        ]),
    ]
    .concat()
    {
        let mut header = whole.clone();
        header[at..at + bytes.len()].copy_from_slice(&bytes);
        fs::write(scratch.file("a"), header).unwrap();
        let a = image("a");
        let read = [&["convert"], &SECRET[..], &["--image-opts", &a, "-O", "raw", "read"]].concat();
        for args in [&read[..], &["info", "a"], &["info", "--output=json", "a"]] {
            let [ours, theirs] = [vimg(args), plain("qemu-img", args)].map(|run| run.dir(scratch.path()).run());
            assert_eq!((ours.code, &ours.stderr), (theirs.code, &theirs.stderr), "{at}: {bytes:?}");
            // What the host stores of a file differs from moment to moment.
            let stable = |text: &str| text.lines().filter(|line| !line.contains("size")).collect::<String>();
            assert_eq!(stable(&ours.stdout), stable(&theirs.stdout), "{at}: {bytes:?}");
            same += usize::from(ours.code == Some(0));
        }
    }
    assert!(same > 10);
}

/// The header without what is drawn or measured: digest, salts, iterations, UUID, and the key material.
fn masked(path: &Path) -> (Vec<u8>, u64) {
    let bytes = fs::read(path).unwrap();
    let word = |at: usize| u32::from_be_bytes(*bytes[at..].first_chunk().unwrap()) as usize * 512;
    let mut head = bytes[..word(104)].to_vec();
    head[112..208].fill(0);
    let material = word(208 + 40);
    head[208 + 4..208 + 40].fill(0);
    let key = usize::try_from(u32::from_be_bytes(*bytes[108..].first_chunk().unwrap())).unwrap();
    head[material..material + (key * 4000).next_multiple_of(512)].fill(0);
    (head, bytes.len() as u64)
}

#[test]
fn a_new_header_is_the_references() {
    let scratch = Scratch::new();
    for combination in [
        ["aes-256", "xts", "plain64", "sha256"],
        ["aes-128", "cbc", "essiv:sha256", "sha1"],
        ["serpent-192", "xts", "plain:md5", "sha512"],
    ] {
        // Most of the time goes by while the judge finds out how fast it is.
        let options = options(combination);
        vimg_in(&scratch, &["create", "-q", "-f", "luks", "-o", &options, "ours", "1000001"]);
        judge_in(&scratch, &["create", "-q", "-f", "luks", "-o", &options, "theirs", "1000001"]);
        assert!(masked(&scratch.file("ours")) == masked(&scratch.file("theirs")), "{combination:?}");
        disk(&scratch, "disk", 3, 1_000_001);
        let target = image("theirs");
        judge_in(&scratch, &["convert", "-n", "-f", "raw", "--target-image-opts", "disk", &target]);
        fs::File::options().write(true).open(scratch.file("disk")).unwrap().set_len(1_000_448).unwrap();
        vimg_in(&scratch, &["convert", "--image-opts", &image("theirs"), "-O", "raw", "read"]);
        assert_same(&scratch, "read", "disk", "made by the judge");
    }
}

#[test]
fn cryptsetup_opens_ours_and_we_open_cryptsetups() {
    need("cryptsetup");
    let scratch = Scratch::new();
    fs::write(scratch.file("abc"), "abc").unwrap();
    fs::write(scratch.file("other"), "other").unwrap();
    vimg_in(&scratch, &["create", "-q", "-f", "luks", "-o", "key-secret=s,iter-time=1", "ours", "1M"]);
    scratch.sh("cryptsetup luksDump ours && cryptsetup open --test-passphrase --key-file abc ours");
    assert!(sh("cryptsetup open --test-passphrase --key-file other ours").dir(scratch.path()).run().code == Some(2));
    scratch.sh("cryptsetup -q luksAddKey --iter-time 1 --key-file abc --key-slot 7 ours other");
    scratch.sh("cryptsetup -q luksKillSlot --key-file other ours 0");
    let open = |secret: &str, image: &str| {
        vimg(&["convert", "--object", secret, "--image-opts", image, "-O", "raw", "read"]).dir(scratch.path()).run()
    };
    assert_eq!(open("secret,id=s,file=other", &image("ours")).code, Some(0));
    let wrong = open("secret,id=s,data=abc", &image("ours"));
    assert!(wrong.stderr.ends_with("Invalid password, cannot unlock any keyslot\n"), "{wrong:?}");

    // A key of 24 bytes in cbc: the reference cannot open that.
    for (more, len) in
        [("", 512), ("-c aes-cbc-essiv:sha256 -s 192 -h sha1", 192), ("-c aes-xts-plain64 -s 256 -h sha512", 256)]
    {
        scratch.sh(&format!(
            "rm -f theirs; truncate -s 6M theirs; cryptsetup -q luksFormat --type luks1 --iter-time 1 {more} theirs abc"
        ));
        disk(&scratch, "disk", len, 1 << 20);
        let info = scratch.vimg(&["info", "--output=json", "theirs"]).json();
        let payload = info["format-specific"]["data"]["payload-offset"].as_u64().unwrap();
        scratch.sh(&format!("truncate -s {} theirs", payload + (1 << 20)));
        vimg_in(&scratch, &["convert", "-n", "-f", "raw", "--target-image-opts", "disk", &image("theirs")]);
        vimg_in(&scratch, &["convert", "--image-opts", &image("theirs"), "-O", "raw", "read"]);
        assert_same(&scratch, "read", "disk", more);
        if len != 192 {
            judge_in(&scratch, &["convert", "--image-opts", &image("theirs"), "-O", "raw", "read"]);
            assert_same(&scratch, "read", "disk", more);
        }
        scratch.sh("cryptsetup open --test-passphrase --key-file abc theirs");
    }
}

/// Reads a LUKS image by the specification alone.
const READER: &str = r#"
import hashlib, struct, sys
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
volume, passphrase = open(sys.argv[1], 'rb').read(), sys.argv[2].encode()
text = lambda at: volume[at:at + 32].split(b'\0')[0].decode()
cipher, mode, hash = text(8), text(40), text(72)
assert volume[:8] == b'LUKS\xba\xbe\0\1' and cipher == 'aes'
payload, length = struct.unpack_from('>II', volume, 104)
chain, iv = mode.split('-')
def decrypt(key, data):
    out = []
    for n in range(len(data) // 512):
        vector = struct.pack('<QQ', n & 0xffffffff if iv == 'plain' else n, 0)
        if iv.startswith('essiv:'):
            e = Cipher(algorithms.AES(hashlib.new(iv[6:], key).digest()), modes.ECB()).encryptor()
            vector = e.update(vector)
        how = {'xts': modes.XTS, 'cbc': modes.CBC, 'ctr': modes.CTR, 'ecb': lambda _: modes.ECB()}[chain](vector)
        d = Cipher(algorithms.AES(key), how).decryptor()
        out.append(d.update(data[n * 512:n * 512 + 512]))
    return b''.join(out)
def diffuse(block):
    size, out = hashlib.new(hash).digest_size, b''
    for n in range(0, len(block), size):
        out += hashlib.new(hash, struct.pack('>I', n // size) + block[n:n + size]).digest()[:len(block[n:n + size])]
    return out
def slot(n):
    state, count, salt, at, stripes = struct.unpack_from('>II32sII', volume, 208 + 48 * n)
    if state != 0xac71f3: return None
    derived = hashlib.pbkdf2_hmac(hash, passphrase, salt, count, length)
    size = (length * stripes + 511) // 512 * 512
    split = decrypt(derived, volume[at * 512:at * 512 + size])
    block = bytes(length)
    for n in range(stripes):
        block = bytes(a ^ b for a, b in zip(block, split[n * length:n * length + length]))
        if n + 1 < stripes: block = diffuse(block)
    digest, salt, count = struct.unpack_from('>20s32sI', volume, 112)
    return block if hashlib.pbkdf2_hmac(hash, block, salt, count, 20) == digest else None
key = next(key for key in map(slot, range(8)) if key)
sys.stdout.buffer.write(decrypt(key, volume[payload * 512:]))
"#;

#[test]
fn a_third_reader_agrees() {
    let scratch = Scratch::new();
    disk(&scratch, "disk", 5, 100 << 10);
    fs::write(scratch.file("reader.py"), READER).unwrap();
    for combination in [
        ["aes-256", "xts", "plain64", "sha256"],
        ["aes-128", "cbc", "essiv:sha256", "sha1"],
        ["aes-192", "cbc", "plain", "sha512"],
        ["aes-256", "ctr", "plain", "sha384"],
        ["aes-128", "ecb", "plain", "md5"],
    ] {
        vimg_in(&scratch, &["convert", "-f", "raw", "-O", "luks", "-o", &options(combination), "disk", "a"]);
        scratch.sh("python3 reader.py a abc > read");
        assert_same(&scratch, "read", "disk", &combination.join(" "));
    }
}

#[test]
fn passphrases_of_any_text_open() {
    need("cryptsetup");
    let scratch = Scratch::new();
    for passphrase in ["", "x", "line\n", "ä€\u{1f511}", &"long".repeat(128)] {
        fs::write(scratch.file("key"), passphrase).unwrap();
        let key = ["--object", "secret,id=s,file=key"];
        let create =
            [&["create", "-q", "-f", "luks"], &key[..], &["-o", "key-secret=s,iter-time=1", "a", "64k"]].concat();
        scratch.vimg(&create);
        scratch.sh("cryptsetup open --test-passphrase --key-file key a");
        let a = image("a");
        let args = [&key[..], &["-c", "write -P 7 0 64k", "--image-opts", &a]].concat();
        plain("qemu-io", &args).dir(scratch.path()).ok();
        scratch.vimg(&[&["convert"], &key[..], &["--image-opts", &image("a"), "-O", "raw", "read"]].concat());
        assert!(fs::read(scratch.file("read")).unwrap() == [7; 65536], "{passphrase:?}");
    }
    let binary = "secret,id=s,format=base64,data=/w==";
    let out = vimg(&["create", "-q", "-f", "luks", "--object", binary, "-o", "key-secret=s", "b", "1M"]);
    assert!(out.dir(scratch.path()).fails(1).stderr.ends_with("Data from secret s is not valid UTF-8\n"));
    assert!(!scratch.file("b").exists());
}

#[test]
fn a_detached_header_is_made_read_and_used_to_write() {
    need("cryptsetup");
    let scratch = Scratch::new();
    fs::write(scratch.file("abc"), "abc").unwrap();
    let create = ["create", "-f", "luks", "-o", "key-secret=s,iter-time=1,detached-header=on", "head"];
    let said = vimg_in(&scratch, &create).stdout;
    assert_eq!(said, "Formatting 'head', fmt=luks size=-1 key-secret=s iter-time=1 detached-header=on\n");
    scratch.sh("cryptsetup open --test-passphrase --key-file abc --header head head");
    disk(&scratch, "disk", 8, 1 << 20);
    scratch.sh("truncate -s 1M payload");
    let parts = "driver=luks,key-secret=s,file.filename=payload,header.filename=head";
    vimg_in(&scratch, &["convert", "-n", "-f", "raw", "--target-image-opts", "disk", parts]);
    judge_in(&scratch, &["convert", "--image-opts", parts, "-O", "raw", "read"]);
    assert_same(&scratch, "read", "disk", "by the judge");
    judge_writes(&scratch, parts, "disk");
    let nested = parts.replace("header.filename", "header.driver=raw,header.file.filename");
    vimg_in(&scratch, &["convert", "--image-opts", &nested, "-O", "raw", "read"]);
    assert_same(&scratch, "read", "disk", "in an image");
    for parts in [parts, &nested] {
        for args in [["info", "--image-opts", parts], ["info", "--output=json", "--image-opts"]] {
            let args = if args[2] == parts { args.to_vec() } else { [&args[..], &[parts]].concat() };
            assert_eq!(vimg_in(&scratch, &args).stdout, judge_in(&scratch, &args).stdout);
        }
    }
    vimg_in(&scratch, &["resize", "--image-opts", parts, "2M"]);
    assert_eq!(fs::metadata(scratch.file("payload")).unwrap().len(), 2 << 20);
    let refused = |args: &[&str]| {
        let args = [&args[..1], &SECRET, &args[1..]].concat();
        vimg(&args).dir(scratch.path()).fails(1).stderr
    };
    let with_size = [&create[..5], &["b", "1M"]].concat();
    assert!(refused(&with_size).contains("a detached header has no disk"));
    assert!(refused(&["convert", "-f", "raw", "-O", "luks", "-o", create[4], "disk", "b"]).contains("no disk"));
    assert!(!scratch.file("b").exists());
    let missing = parts.replace("=head", "=nosuch");
    assert!(refused(&["convert", "--image-opts", &missing, "-O", "raw", "b"]).contains("Could not open 'nosuch'"));
    let unknown = format!("{parts},header.x=y");
    assert!(refused(&["convert", "--image-opts", &unknown, "-O", "raw", "b"]).contains("the option 'x'"));
}

/// A header that asks for more iterations than anybody waits for is refused at once; so is one to be made.
#[test]
fn iterations_that_take_hours_are_refused() {
    let scratch = Scratch::new();
    vimg_in(&scratch, &["create", "-q", "-f", "luks", "-o", "key-secret=s,iter-time=1", "a", "1M"]);
    let whole = fs::read(scratch.file("a")).unwrap();
    for at in [164, 208 + 4] {
        let mut bytes = whole.clone();
        bytes[at..at + 4].fill(0xff);
        fs::write(scratch.file("b"), bytes).unwrap();
        let b = image("b");
        let args = [&["convert"], &SECRET[..], &["--image-opts", &b, "-O", "raw", "read"]].concat();
        let out = vimg(&args).dir(scratch.path()).fails(1);
        let error =
            "4294967295 iterations of the key derivation are refused: to unlock an image may take 536870912 rounds";
        assert!(out.stderr.contains(error), "{out:?}");
    }
    // A slower hash gets fewer.
    let slow = "key-secret=s,iter-time=1,hash-alg=sha512";
    vimg_in(&scratch, &["create", "-q", "-f", "luks", "-o", slow, "a", "1M"]);
    let mut bytes = fs::read(scratch.file("a")).unwrap();
    bytes[212..216].copy_from_slice(&(1u32 << 28).to_be_bytes());
    fs::write(scratch.file("b"), bytes).unwrap();
    let b = image("b");
    let args = [&["convert"], &SECRET[..], &["--image-opts", &b, "-O", "raw", "read"]].concat();
    let out = vimg(&args).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("to unlock an image may take 134217728 rounds"), "{out:?}");
    let args = [&["create", "-f", "luks"], &SECRET[..], &["-o", "key-secret=s,iter-time=500000", "c", "1M"]].concat();
    let out = vimg(&args).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("are refused") && !scratch.file("c").exists(), "{out:?}");
}

/// What an encrypted image holds where nothing was written is no zeros: an image in it does not take it for such.
#[test]
fn an_image_inside_grows_by_zeros() {
    let scratch = Scratch::new();
    disk(&scratch, "disk", 4, 3 << 20);
    scratch.judge(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "inner", "8M"]);
    vimg_in(&scratch, &["convert", "-f", "raw", "-O", "luks", "-o", "key-secret=s,iter-time=1", "inner", "a"]);
    let inside = "driver=qcow2,file.driver=luks,file.key-secret=s,file.file.filename=a";
    let args = [&SECRET[..], &["-c", "write -P 9 5000 1", "-c", "write -P 8 7M 3k", "--image-opts", inside]].concat();
    plain("qemu-io", &args).dir(scratch.path()).ok();
    vimg_in(&scratch, &["convert", "-n", "-f", "raw", "--target-image-opts", "disk", inside]);
    judge_in(&scratch, &["check", "--image-opts", inside]);
    judge_in(&scratch, &["convert", "--image-opts", inside, "-O", "raw", "read"]);
    let read = fs::read(scratch.file("read")).unwrap();
    assert!(read[..3 << 20] == fs::read(scratch.file("disk")).unwrap()[..]);
    assert!(read[7 << 20..][..3 << 10] == [8; 3 << 10] && read[(7 << 20) + (3 << 10)..].iter().all(|byte| *byte == 0));
}

#[test]
fn killed_at_any_call_leaves_the_older_image_or_the_new_one() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk"), 0, 1, 3 << 20);
    let job =
        [&["convert", "-f", "raw", "-O", "luks"], &SECRET[..], &["-o", "key-secret=s,iter-time=0", "../disk", "a"]];
    let job = job.concat();
    let (mut n, mut before, mut after) = (0, 0, 0);
    loop {
        n += 19;
        let folder = scratch.file(&n.to_string());
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("a"), "precious").unwrap();
        let killed = killed_at(&folder, &job, n) == Ended::Killed;
        if fs::read(folder.join("a")).unwrap() == b"precious" {
            assert!(killed, "call {n}");
            before += 1;
        } else {
            let args = [&["compare"], &SECRET[..], &["--image-opts", &image("a"), "driver=raw,file.filename=../disk"]];
            plain("qemu-img", &args.concat()).dir(&folder).ok();
            after += 1;
        }
        if !killed {
            break;
        }
    }
    assert!(before > 5 && after > 0, "{before} before, {after} after");
}

/// Those calls that change something are the last ones.
#[test]
fn a_resize_killed_at_any_call_leaves_the_old_disk_or_the_new_one() {
    const LAST: usize = 44;
    let scratch = Scratch::new();
    disk(&scratch, "disk", 1, 2 << 20);
    let qcow2 = "driver=qcow2,encrypt.key-secret=s,file.filename=a";
    let in_qcow2 = "cluster_size=4k,encrypt.format=luks,encrypt.iter-time=0,encrypt.key-secret=s";
    for (format, options, opened, how, size) in [
        ("luks", "key-secret=s,iter-time=0", &*image("a"), "--preallocation=off", 5 << 20),
        ("luks", "key-secret=s,iter-time=0", &image("a"), "--preallocation=falloc", 5 << 20),
        ("luks", "key-secret=s,iter-time=0", &image("a"), "--preallocation=full", 5 << 20),
        ("luks", "key-secret=s,iter-time=0", &image("a"), "--shrink", 1 << 20),
        ("qcow2", in_qcow2, qcow2, "--preallocation=off", 256 << 20),
        ("qcow2", in_qcow2, qcow2, "--shrink", 1 << 20),
    ] {
        let what = format!("{format} {how}");
        let folder = scratch.file(&what);
        fs::create_dir(&folder).unwrap();
        vimg_in(&scratch, &["convert", "-f", "raw", "-O", format, "-o", options, "disk", &format!("{what}/a")]);
        let image = fs::read(folder.join("a")).unwrap();
        let size_text = size.to_string();
        let resize = [&["resize", "-q", how], &SECRET[..], &["--image-opts", opened, &size_text]].concat();
        let Ended::Done(calls) = killed_at(&folder, &resize, usize::MAX) else { panic!("nothing kills it") };
        let (mut seen, mut sizes) = (HashSet::new(), Vec::new());
        for n in calls - LAST..=calls {
            let is = fs::read(folder.join("a")).unwrap();
            if seen.insert(is) {
                let read = [&["convert"], &SECRET[..], &["--image-opts", opened, "-O", "raw", "read"]].concat();
                plain("qemu-img", &read).dir(&folder).ok();
                let read = fs::read(folder.join("read")).unwrap();
                let model = fs::read(scratch.file("disk")).unwrap();
                let common = model.len().min(read.len());
                assert!(read[..common] == model[..common], "{what}: {n} of {calls}");
                // What nobody wrote to a luks image is anything.
                assert!(format == "luks" || read[common..].iter().all(|byte| *byte == 0), "{what}: {n} of {calls}");
                sizes.push(read.len());
            }
            fs::write(folder.join("a"), &image).unwrap();
            killed_at(&folder, &resize, n);
        }
        let new = sizes.iter().filter(|len| **len == size).count();
        let old = sizes.iter().filter(|len| **len == 2 << 20).count();
        assert!(new > 0 && old > 0 && new + old == sizes.len(), "{what}: {sizes:?}");
    }
}

#[test]
fn a_full_disk_leaves_nothing() {
    need_root("mounting a small tmpfs");
    let scratch = Scratch::new();
    disk(&scratch, "disk", 2, 8 << 20);
    fs::create_dir(scratch.file("full")).unwrap();
    scratch.sh("mount -t tmpfs -o size=4m none full");
    let args = [
        &["convert", "--no-space-check", "-f", "raw", "-O", "luks"],
        &SECRET[..],
        &["-o", "key-secret=s,iter-time=0", "disk", "full/a"],
    ];
    let out = vimg(&args.concat()).dir(scratch.path()).run();
    let left = fs::read_dir(scratch.file("full")).map(Iterator::count);
    scratch.sh("umount full");
    assert!(out.code == Some(1) && out.stderr.contains("No space left on device"), "{out:?}");
    assert_eq!(left.unwrap(), 0);
}
