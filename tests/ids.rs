//! Ids and times of new images: `--reproducible`, `--uuid`, `--cid`. The judges are the tools that show them.

use std::fs;

use crate::common::{Scratch, judge, own, pattern, plain};

const UUID: &str = "12345678-9abc-def0-1234-56789abcdef0";

/// The same with the lowest byte of its first three fields first.
const STORED: [u8; 16] = *b"\x78\x56\x34\x12\xbc\x9a\xf0\xde\x12\x34\x56\x78\x9a\xbc\xde\xf0";

#[test]
fn the_same_command_makes_the_same_bytes() {
    let scratch = Scratch::new();
    fs::write(scratch.file("disk"), pattern(1, 300_000)).unwrap();
    scratch.sh("truncate -s 1M disk");
    for (format, options) in [
        ("qcow2", ""),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=streamOptimized"),
        ("vdi", ""),
        ("vpc", "subformat=fixed"),
        ("vpc", ""),
        ("vhdx", ""),
        ("qed", ""),
        ("parallels", ""),
    ] {
        let run = |command: &[&str], more: &[&str], epoch: Option<&str>| {
            let mut args = [command, &["--reproducible"], more].concat();
            if !options.is_empty() {
                args.splice(1..1, ["-o", options]);
            }
            let run = own(&args).dir(scratch.path());
            let run = if let Some(epoch) = epoch { run.env("SOURCE_DATE_EPOCH", epoch) } else { run };
            run.ok();
            fs::read(scratch.file("o")).unwrap()
        };
        let made = |epoch| run(&["create", "-q", "-f", format], &["o", "1M"], epoch);
        assert!(made(None) == made(None), "{format} {options}");
        assert!(made(Some("1700000000")) == made(Some("1700000000")), "{format} {options}");
        let converted = || run(&["convert", "-f", "raw", "-O", format], &["disk", "o"], None);
        assert!(converted() == converted(), "{format} {options}");
    }
    // Wherever it lies, however that is spelt.
    let folder = scratch.file("o").display().to_string();
    let files = ["o", "./o", "file:o", &folder].map(|name| {
        own(&["create", "-q", "-f", "vdi", "--reproducible", name, "1M"]).dir(scratch.path()).ok();
        fs::read(scratch.file("o")).unwrap()
    });
    assert!(files.iter().all(|bytes| *bytes == files[0]));
    for (args, words) in [
        (&["convert", "--reproducible", "-W", "-O", "qcow2", "disk", "o"][..], "-W"),
        (&["convert", "--reproducible", "-n", "disk", "o"], "no effect"),
        (
            &[
                "create",
                "--reproducible",
                "-f",
                "luks",
                "--object",
                "secret,id=s,data=x",
                "-o",
                "key-secret=s",
                "p",
                "1M",
            ],
            "random",
        ),
    ] {
        assert!(own(args).dir(scratch.path()).fails(1).stderr.contains(words), "{args:?}");
    }
}

#[test]
fn ids_are_those_that_were_asked_for() {
    let scratch = Scratch::new();
    let create = |format: &str, option: &str, value: &str| {
        own(&["create", "-q", "-f", format, option, value, "o", "4M"]).dir(scratch.path()).ok();
    };
    create("vmdk", "--cid", "deadbeef");
    let info = judge(&["info", "--output=json", "o"]).dir(scratch.path()).ok().stdout;
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["format-specific"]["data"]["cid"], 0xdead_beef_u64);
    // What a conversion fills keeps it too.
    fs::write(scratch.file("disk"), crate::common::pattern(1, 1 << 20)).unwrap();
    for options in ["subformat=monolithicSparse", "subformat=monolithicFlat", "subformat=streamOptimized"] {
        let args = ["convert", "--cid", "deadbeef", "-f", "raw", "-O", "vmdk", "-o", options, "disk", "c.vmdk"];
        own(&args).dir(scratch.path()).ok();
        let info = judge(&["info", "--output=json", "c.vmdk"]).dir(scratch.path()).ok().stdout;
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["format-specific"]["data"]["cid"], 0xdead_beef_u64, "{options}");
        scratch.assert_same_content("vmdk", "c.vmdk", "raw", "disk");
    }
    create("vpc", "--uuid", UUID);
    let shown = plain("vhdiinfo", &["o"]).dir(scratch.path()).ok().stdout;
    assert!(shown.contains(UUID), "{shown}");
    // [MS-VHDX] 2.6.2.4: the Virtual Disk ID, a GUID as Windows stores them.
    create("vhdx", "--uuid", UUID);
    let bytes = fs::read(scratch.file("o")).unwrap();
    assert_eq!(bytes.windows(16).filter(|bytes| *bytes == STORED).count(), 1);
    // "VDI: first three fields little-endian", as qemu-img writes them too: the version of a random one is where
    // VirtualBox looks for it.
    create("vdi", "--uuid", &UUID.replace('-', ""));
    let bytes = fs::read(scratch.file("o")).unwrap();
    assert_eq!(bytes[0x188..0x198], STORED);
    for program in [judge(&["create", "-q", "-f", "vdi", "o", "4M"]), own(&["create", "-q", "-f", "vdi", "o", "4M"])] {
        program.dir(scratch.path()).ok();
        assert_eq!(fs::read(scratch.file("o")).unwrap()[0x188 + 7] >> 4, 4);
    }
    let luks = ["-f", "luks", "--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"];
    own(&[&["create", "-q", "--uuid", UUID], &luks[..], &["o", "1M"]].concat()).dir(scratch.path()).ok();
    assert_eq!(plain("cryptsetup", &["luksUUID", "o"]).dir(scratch.path()).ok().stdout.trim(), UUID);
    // What an image does not have is no id of it, and no image is left.
    fs::remove_file(scratch.file("o")).unwrap();
    for (format, option, value, words) in [
        ("qcow2", "--uuid", UUID, "An image of format 'qcow2' has no UUID"),
        ("vdi", "--cid", "deadbeef", "An image of format 'vdi' has no content id (CID)"),
        ("vdi", "--uuid", "12345678", "'12345678' is no UUID"),
        ("vmdk", "--cid", "xyz", "'xyz' is no content id"),
        ("vmdk", "--cid", "FFFFFFFF", "means that there is no parent"),
        ("vdi", "--uuid", "00000000-0000-0000-0000-000000000000", "a UUID of zeros alone is none"),
    ] {
        let out = own(&["create", "-q", "-f", format, option, value, "o", "4M"]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains(words) && !scratch.file("o").exists(), "{out:?}");
    }
}
