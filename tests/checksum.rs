//! Digests: `checksum`, `convert --digest`, `--expect-digest`, `--verify`. The judges are sha256sum and b3sum.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::common::{Scratch, own, pattern, plain, write_pattern};

/// A disk of 9 MiB with data here and there, and its digests by their judges.
fn disk(scratch: &Scratch) -> [String; 2] {
    fs::write(scratch.file("disk"), pattern(3, 700_000)).unwrap();
    scratch.sh("truncate -s 9M disk");
    write_pattern(&scratch.file("disk"), 5 << 20, 4, 200_000);
    write_pattern(&scratch.file("disk"), (9 << 20) - 512, 5, 512);
    ["sha256sum", "b3sum"].map(|judge| {
        let out = plain(judge, &["disk"]).dir(scratch.path()).ok().stdout;
        format!("{}:{}", if judge == "b3sum" { "blake3" } else { "sha256" }, out.split(' ').next().unwrap())
    })
}

const FORMATS: &[(&str, &str)] = &[
    ("qcow2", "cluster_size=4k"),
    ("qcow2", "compression_type=zstd"),
    ("vmdk", "subformat=streamOptimized"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vdi", ""),
    ("vpc", "force_size=on"),
    ("vhdx", ""),
    ("qed", ""),
    ("parallels", ""),
];

#[test]
fn a_disk_has_one_digest_in_every_format() {
    let scratch = Scratch::new();
    let judged = disk(&scratch);
    let sum = |kind: &str, name: &str| {
        let out = own(&["checksum", "--digest", kind, name]).dir(scratch.path()).ok().stdout;
        let (digest, shown) = out.trim_end().split_once("  ").unwrap();
        assert_eq!(shown, name);
        digest.to_owned()
    };
    let tree = sum("blake3-tree", "disk");
    assert!(tree.starts_with("blake3-tree:") && tree.len() == 12 + 64, "{tree}");
    assert_eq!([sum("sha256", "disk"), sum("blake3", "disk")], judged);
    assert_eq!(own(&["checksum", "disk"]).dir(scratch.path()).ok().stdout, format!("{tree}  disk\n"));
    for (n, (format, options)) in FORMATS.iter().enumerate() {
        let name = format!("image{n}");
        let mut args = vec!["convert", "-f", "raw", "-O", format, "--digest", "blake3-tree", "--verify", "disk", &name];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        if options.contains("zstd") {
            args.push("-c");
        }
        // On the way, and of what it has come to.
        let out = own(&args).dir(scratch.path()).ok();
        assert_eq!((out.stdout.trim_end(), out.stderr.as_str()), (tree.as_str(), ""), "{args:?}");
        assert_eq!(sum("blake3-tree", &name), tree, "{args:?}");
        assert_eq!(sum("sha256", &name), judged[0], "{args:?}");
    }
}

#[test]
fn digests_on_the_way_are_of_the_whole_disk() {
    let scratch = Scratch::new();
    let [sha, _] = disk(&scratch);
    let digest = |args: &[&str]| {
        let all: Vec<&str> =
            ["convert", "--digest", "sha256", "--verify"].into_iter().chain(args.iter().copied()).collect();
        own(&all).dir(scratch.path()).ok().stdout.trim_end().to_owned()
    };
    // Whatever is left out, written, copied by the host, placed out of order, in one thread or in several.
    for args in [
        &["-f", "raw", "-O", "raw", "-S", "0", "disk", "o"][..],
        &["-f", "raw", "-O", "qcow2", "-S", "64k", "-m", "1", "disk", "o"],
        &["-f", "raw", "-O", "qcow2", "-W", "-m", "7", "disk", "o"],
        &["-f", "raw", "-O", "raw", "-C", "disk", "o"],
        &["-f", "raw", "-O", "vhdx", "-n", "disk", "there"],
    ] {
        scratch.sh("qemu-img create -q -f vhdx there 12M");
        assert_eq!(digest(args), sha, "{args:?}");
    }
    // What a backing file has need not be copied, and is part of the disk.
    scratch.sh("qemu-img convert -f raw -O qcow2 disk base && qemu-img create -q -f qcow2 -b base -F qcow2 top \
         && qemu-io -c 'write -P 8 1M 100k' -c 'write -z 5M 64k' top");
    let flat = digest(&["-O", "raw", "top", "flat"]);
    let judged = plain("sha256sum", &["flat"]).dir(scratch.path()).ok().stdout;
    assert_eq!(flat, format!("sha256:{}", judged.split(' ').next().unwrap()));
    assert_eq!(digest(&["-O", "qcow2", "-B", "base", "-F", "qcow2", "top", "o"]), flat);
    scratch.assert_same_content("qcow2", "o", "raw", "flat");
    // Several are one disk.
    scratch.sh("cat disk flat >both");
    let judged = plain("sha256sum", &["both"]).dir(scratch.path()).ok().stdout;
    assert_eq!(digest(&["-O", "qcow2", "base", "top", "o"]), format!("sha256:{}", judged.split(' ').next().unwrap()));
}

#[test]
fn another_digest_than_the_expected_one_leaves_no_target() {
    let scratch = Scratch::new();
    let [sha, blake] = disk(&scratch);
    fs::write(scratch.file("o"), "precious").unwrap();
    let convert = |digest: &str| {
        own(&["convert", "-f", "raw", "-O", "qcow2", "--expect-digest", digest, "disk", "o"]).dir(scratch.path()).run()
    };
    let wrong = format!("{}0", &sha[..sha.len() - 1]);
    let wrong = if wrong == sha { format!("{}1", &sha[..sha.len() - 1]) } else { wrong };
    let out = convert(&wrong);
    assert_eq!((out.code, out.stderr), (Some(1), format!("vimg: disk: the digest is {sha}, not {wrong}\n")));
    assert_eq!(fs::read(scratch.file("o")).unwrap(), b"precious");
    let out = convert(&blake);
    assert_eq!((out.code, out.stdout.as_str()), (Some(0), ""), "{out:?}");
    let check = |digest: &str| own(&["checksum", "--expect-digest", digest, "o"]).dir(scratch.path()).run();
    assert_eq!((check(&sha).code, check(&wrong).code), (Some(0), Some(1)));
    assert_eq!(check(&sha.to_uppercase()).code, Some(0));
    for bad in ["sha256:00", "md5:00", "x"] {
        assert!(check(bad).stderr.contains("is no digest"), "{bad}");
    }
    let out = own(&["checksum", "--digest", "blake3", "--expect-digest", &sha, "o"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("different kinds"), "{out:?}");
}

/// A target that forgets what is written to it.
#[test]
fn what_is_not_there_when_it_is_read_back_is_told_with_its_place() {
    let scratch = Scratch::new();
    disk(&scratch);
    // Zeros, and then one byte.
    scratch.sh(
        "truncate -s 3M blank; truncate -s 2M late; printf x | dd of=late bs=1 seek=1048999 conv=notrunc status=none",
    );
    let target = r#"json:{"driver":"raw","file":{"driver":"null-co","size":"16M","read-zeroes":true}}"#;
    for (sources, at) in
        [(&["disk"][..], 0), (&["blank", "late"], (3 << 20) + 1_048_999), (&["late", "disk"], 1_048_999)]
    {
        let args = [&["convert", "-n", "--verify", "-f", "raw", "-O", "raw"], sources, &[target]].concat();
        let said = own(&args).dir(scratch.path()).fails(1).stderr;
        let wanted = format!(": error while reading at byte {at}: what was read back is not what was written\n");
        assert!(said.ends_with(&wanted), "{sources:?}: {said}");
        let json = own(&[&args[..1], &["--output=json"], &args[1..]].concat()).dir(scratch.path()).fails(1);
        let told = [&json.stdout, &json.stderr].iter().any(|text| text.contains(&format!("\"guest-offset\": {at}")));
        assert!(told, "{json:?}");
    }
    let args = ["convert", "-n", "--verify", "-f", "raw", "-O", "raw", "blank", target];
    assert_eq!(own(&args).dir(scratch.path()).ok().stderr, "");
}

/// A disk of 4 TiB: the time that its zeros take is the watchdog's to notice.
#[test]
fn holes_cost_nothing() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a 4T && qemu-io -c 'write -P 1 3T 64k' a && truncate -s 4T b");
    fs::OpenOptions::new().write(true).open(scratch.file("b")).unwrap().write_all_at(&[1; 64 << 10], 3 << 40).unwrap();
    let sums = own(&["checksum", "a", "b"]).dir(scratch.path()).ok().stdout;
    let digests: Vec<&str> = sums.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert!(digests.len() == 2 && digests[0] == digests[1], "{sums}");
}
