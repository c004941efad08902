//! `--output=json` and `--progress=json`: what programs read, as the schemas in `doc` say it.

use std::fs;

use serde_json::Value;

use crate::common::{Scratch, judge, own, pattern, sh, vimg, vimg_path};

fn schema(name: &str) -> Value {
    let path = format!("{}/doc/{name}.schema.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// What of JSON Schema the two use: whether `value` is valid.
fn valid(root: &Value, schema: &Value, value: &Value) -> bool {
    let Value::Object(rules) = schema else { panic!("a schema: {schema}") };
    rules.iter().all(|(rule, wanted)| match rule.as_str() {
        "$schema" | "title" | "$defs" | "properties" => true,
        "$ref" => {
            let place = wanted.as_str().unwrap().strip_prefix('#').unwrap();
            valid(root, root.pointer(place).unwrap(), value)
        }
        "const" => value == wanted,
        "enum" => wanted.as_array().unwrap().contains(value),
        "oneOf" => wanted.as_array().unwrap().iter().filter(|schema| valid(root, schema, value)).count() == 1,
        "minimum" => value.as_u64().is_none_or(|number| number >= wanted.as_u64().unwrap()),
        "items" => value.as_array().unwrap().iter().all(|item| valid(root, wanted, item)),
        "required" => wanted.as_array().unwrap().iter().all(|key| value.get(key.as_str().unwrap()).is_some()),
        "additionalProperties" => {
            let known = &schema["properties"];
            value
                .as_object()
                .unwrap()
                .iter()
                .all(|(key, value)| known.get(key).is_some_and(|of| valid(root, of, value)))
        }
        "type" => {
            let is = |name: &Value| match name.as_str().unwrap() {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "boolean" => value.is_boolean(),
                "null" => value.is_null(),
                "integer" => value.is_u64(),
                other => panic!("type {other}"),
            };
            wanted.as_array().map_or_else(|| is(wanted), |names| names.iter().any(is))
        }
        other => panic!("rule {other}"),
    })
}

/// Runs it in JSON; the result is valid.
fn result(scratch: &Scratch, args: &[&str]) -> (Option<i32>, Value) {
    let args: Vec<&str> = args.iter().copied().chain(["--output=json"]).collect();
    let out = own(&args).dir(scratch.path()).run();
    let value: Value = serde_json::from_str(&out.stdout).unwrap_or_else(|error| panic!("{error}: {out:?}"));
    let schema = schema("results");
    assert!(valid(&schema, &schema, &value), "{args:?}: {value:#}");
    assert_eq!(out.stderr.is_empty(), out.code == Some(0), "{out:?}");
    (out.code, value)
}

#[test]
fn what_was_done_is_told_to_programs() {
    let scratch = Scratch::new();
    let done = |args: &[&str]| {
        let (code, value) = result(&scratch, args);
        assert_eq!((code, value["version"].as_u64(), value["command"].as_str()), (Some(0), Some(1), Some(args[0])));
        value
    };
    let value = done(&["create", "-f", "qcow2", "-o", "cluster_size=4k", "a", "1M"]);
    assert_eq!(
        (value["virtual-size"].as_u64(), value["options"]["cluster_size"].as_str()),
        (Some(1 << 20), Some("4096"))
    );
    done(&["create", "-f", "qcow2", "-b", "a", "-F", "qcow2", "top"]);
    let value = done(&["resize", "a", "2M"]);
    assert_eq!((value["old-virtual-size"].as_u64(), value["virtual-size"].as_u64()), (Some(1 << 20), Some(2 << 20)));
    assert_eq!(done(&["snapshot", "-c", "one", "a"])["create"], "one");
    let list = done(&["snapshot", "-l", "a"]);
    assert_eq!((list["snapshots"][0]["name"].as_str(), list["snapshots"][0]["id"].as_str()), (Some("one"), Some("1")));
    let value = done(&["commit", "top"]);
    assert_eq!((value["base"].as_str(), value["emptied"].as_bool()), (Some("a"), Some(true)));
    assert_eq!(done(&["rebase", "-b", "", "top"])["backing-filename"], Value::Null);
    assert_eq!(done(&["rebase", "-u", "-b", "a", "-F", "qcow2", "top"])["backing-filename"], "a");
    let value = done(&["convert", "-O", "vmdk", "--digest", "sha256", "--verify", "top", "o"]);
    assert_eq!((value["target"]["format"].as_str(), value["verified"].as_bool()), (Some("vmdk"), Some(true)));
    assert_eq!(value["target"]["virtual-size"], 1 << 20);
    // One that is there may be larger.
    done(&["create", "-f", "qcow2", "there", "5M"]);
    for args in [
        &["convert", "-n", "-O", "qcow2", "top", "there"][..],
        &["convert", "-n", "--verify", "--target-image-opts", "top", "driver=qcow2,file.filename=there"],
    ] {
        assert_eq!(done(args)["target"]["virtual-size"], 5 << 20, "{args:?}");
    }
    // What is listed too.
    for args in [
        &["create", "-f", "vpc", "-o", "help"][..],
        &["create", "-f", "vpc", "-o", "help", "x"],
        &["convert", "-O", "vpc", "-o", "help"],
    ] {
        let value = done(args);
        let options = value["supported-options"].as_array().unwrap();
        let named = |name: &str| options.iter().find(|option| option["name"] == name).unwrap();
        assert_eq!((named("subformat")["kind"].as_str(), named("size")["kind"].as_str()), (Some("text"), Some("size")));
        assert_eq!(named("subformat")["choices"], serde_json::json!(["dynamic", "fixed"]));
    }
    // So are the objects: as many and the same as in words.
    for args in [&["create"][..], &["convert"], &["resize"], &["checksum"], &["commit"], &["rebase"], &["snapshot"]] {
        let value = done(&[args, &["--object", "help"]].concat());
        let words = own(&[args, &["--object", "help"]].concat()).ok().stdout;
        let words: Vec<&str> = words.lines().skip(1).map(str::trim).collect();
        assert_eq!(value["object-types"], serde_json::json!(words));
    }
    for name in ["secret", "throttle-group", "authz-list", "main-loop"] {
        let value = done(&["create", "--object", &format!("{name},help")]);
        let words = own(&["create", "--object", &format!("{name},help")]).ok().stdout;
        let mut words: Vec<&str> = words.lines().skip(1).map(|line| line.trim().split('=').next().unwrap()).collect();
        words.sort_unstable();
        let named: Vec<_> = value["properties"].as_array().unwrap().iter().map(|property| &property["name"]).collect();
        assert_eq!((value["object-type"].as_str(), named.len()), (Some(name), words.len()));
        assert!(named.iter().zip(&words).all(|(named, word)| named == word), "{value} {words:?}");
    }
    assert_eq!(done(&["checksum", "--digest", "sha256", "o"])["images"][0]["digest"]["hex"], value["digest"]["hex"]);
    // Without it they say it in words.
    assert_eq!(own(&["resize", "a", "3M"]).dir(scratch.path()).ok().stdout, "Image resized.\n");
}

#[test]
fn what_failed_is_told_to_programs() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a 1M && qemu-io -c 'write 0 128k' a && head -c 300000 a >cut");
    let fails = |args: &[&str]| {
        let (code, value) = result(&scratch, args);
        assert_eq!(code, Some(1), "{args:?}");
        value["error"].clone()
    };
    let kind = |error: &Value| error["kind"].as_str().unwrap().to_owned();
    let error = fails(&["convert", "-O", "raw", "nowhere", "o"]);
    assert_eq!((kind(&error).as_str(), error["file"].as_str()), ("not-found", Some("nowhere")));
    // The second data cluster is cut off: where that is, on the guest's disk and in the file.
    let error = fails(&["convert", "-O", "raw", "cut", "o"]);
    assert_eq!((kind(&error).as_str(), error["file"].as_str()), ("truncated", Some("cut")));
    assert!(error["guest-offset"].as_u64().is_some_and(|at| at < 128 << 10), "{error}");
    // What is read of the file itself lies past its end.
    scratch.sh("head -c 200000 a >short && qemu-img create -q -f qcow2 -b gone -F raw -u top 1M && \
         qemu-img create -q -f qcow2 -b top -F qcow2 -u upper 1M && printf 'QFI\\373' >torn");
    let error = fails(&["convert", "-O", "raw", "short", "o"]);
    assert_eq!((kind(&error).as_str(), error["file"].as_str()), ("truncated", Some("short")));
    assert!(error["offset"].as_u64().is_some_and(|at| at < 400_000), "{error}");
    // An entry of a table is wrong: where that is.
    scratch.sh("qemu-img create -q -f qcow2 wrong 1M && qemu-io -c 'write 0 64k' wrong");
    let mut bytes = fs::read(scratch.file("wrong")).unwrap();
    bytes[0x40000..0x40008].copy_from_slice(&0x8000_0000_0005_0200_u64.to_be_bytes());
    fs::write(scratch.file("wrong"), bytes).unwrap();
    let error = fails(&["convert", "-O", "raw", "wrong", "o"]);
    assert_eq!((kind(&error).as_str(), error["file"].as_str()), ("corrupt", Some("wrong")));
    assert_eq!((error["offset"].as_u64(), error["guest-offset"].as_u64()), (Some(0x40000), Some(0)), "{error}");
    // Likewise in other formats: the L2 entry, the L1 entry, the entry of the block allocation table; the marker of a grain;
    // what a compressed unit holds.
    scratch.sh("head -c 262144 /usr/bin/bash >program && qemu-img create -q -f qed a.qed 1M && \
         qemu-io -c 'write 0 128k' a.qed && qemu-img convert -f raw -O vhdx program a.vhdx && \
         qemu-img convert -f raw -O vmdk -o subformat=streamOptimized program a.vmdk");
    scratch.vimg(&["convert", "-c", "-f", "raw", "-O", "qcow", "program", "a.qcow"]);
    for (image, at, wrong, told) in [
        ("a.qed", 0x70000, &3_u64.to_le_bytes()[..], 0x70000),
        ("a.qed", 0x10000, &3_u64.to_le_bytes()[..], 0x10000),
        ("a.vhdx", 0x20_0000, &5_u64.to_le_bytes()[..], 0x20_0000),
        ("a.vmdk", 0x10008, &[0xff; 4][..], 0x10000),
        ("a.vmdk", 0x1000c, &[0; 16][..], 0x1000c),
        ("a.qcow", 0x2000, &[0xff; 16][..], 0x2000),
    ] {
        let sound = fs::read(scratch.file(image)).unwrap();
        let mut bytes = sound.clone();
        bytes[at..at + wrong.len()].copy_from_slice(wrong);
        fs::write(scratch.file(image), bytes).unwrap();
        let error = fails(&["convert", "-O", "raw", image, "o"]);
        let found = (kind(&error), error["file"].as_str(), error["offset"].as_u64());
        assert_eq!(found, ("corrupt".to_owned(), Some(image), Some(told)), "{at:#x}: {error}");
        fs::write(scratch.file(image), sound).unwrap();
    }
    // The file is the one that is in the way, however far below.
    for (image, below) in [("top", "gone"), ("upper", "gone")] {
        let error = fails(&["convert", "-O", "raw", image, "o"]);
        assert_eq!((kind(&error).as_str(), error["file"].as_str()), ("not-found", Some(below)), "{error}");
    }
    scratch.sh("qemu-img create -q -f qcow2 -b torn -F qcow2 -u above 1M");
    assert_eq!(fails(&["convert", "-O", "raw", "above", "o"])["file"], "torn");
    let error = fails(&["--untrusted", "convert", "-O", "raw", "upper", "o"]);
    assert_eq!((kind(&error).as_str(), error["file"].as_str()), ("forbidden", Some("upper")), "{error}");
    assert_eq!(kind(&fails(&["create", "-f", "nix", "o", "1M"])), "invalid");
    assert_eq!(kind(&fails(&["create", "o", "--wibble"])), "usage");
    assert_eq!(kind(&fails(&["create"])), "usage");
    for (args, named, file) in [
        (&["resize", "a", "512k"][..], "usage", "a"),
        (&["create", "-f", "nix", "o", "1M"], "invalid", "o"),
        (&["convert", "-O", "nix", "a", "o"], "invalid", "o"),
        (&["convert", "-f", "nix", "-O", "raw", "a", "o"], "invalid", "a"),
        (&["convert", "-l", "none", "-O", "raw", "a", "o"], "not-found", "a"),
        (&["snapshot", "-a", "none", "a"], "not-found", "a"),
        (&["snapshot", "-d", "none", "a"], "not-found", "a"),
        (&["rebase", "-b", "x", "-F", "nix", "a"], "usage", "a"),
        (&["commit", "a"], "invalid", "a"),
    ] {
        let error = fails(args);
        assert_eq!((kind(&error).as_str(), error["file"].as_str()), (named, Some(file)), "{args:?}: {error}");
    }
    let error = fails(&["--untrusted", "rebase", "-u", "-b", "x", "-F", "raw", "a/b"]);
    assert_eq!(kind(&error), "io");
    let zeros = "blake3:0000000000000000000000000000000000000000000000000000000000000000";
    let error = fails(&["convert", "-O", "raw", "--expect-digest", zeros, "a", "o"]);
    assert_eq!((kind(&error).as_str(), error["file"].as_str()), ("mismatch", Some("a")));
    assert!(!scratch.file("o").exists());
}

/// Of a header that cannot be, where the field is that is wrong.
#[test]
fn the_wrong_field_of_a_header_is_told_to_programs() {
    let scratch = Scratch::new();
    for format in ["qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels"] {
        let made = judge(&["create", "-q", "-f", format, format, "4M"]).dir(scratch.path()).run();
        assert_eq!(made.code, Some(0), "{made:?}");
    }
    // What is written where, and where that is found to be wrong.
    for (image, format, at, bytes, told) in [
        ("qcow2", "qcow2", 0, &b"X"[..], Some(0)),
        ("qcow2", "qcow2", 7, &[9], Some(4)),
        ("qcow2", "qcow2", 23, &[30], Some(20)),
        ("qcow2", "qcow2", 47, &[1], Some(40)),
        ("qcow2", "qcow2", 79, &[0x40], Some(72)),
        ("qcow2", "qcow2", 99, &[7], Some(96)),
        ("qcow", "qcow", 7, &[7], Some(4)),
        ("qcow", "qcow", 32, &[30], Some(32)),
        ("qcow", "qcow", 39, &[2], Some(36)),
        ("qed", "qed", 4, &[1], Some(4)),
        ("qed", "qed", 16, &[0x40], Some(16)),
        ("qed", "qed", 40, &[1], Some(40)),
        ("vmdk", "vmdk", 4, &[9], Some(4)),
        ("vmdk", "vmdk", 0x14, &[3], Some(0x14)),
        ("vmdk", "vmdk", 0x2c, &[0xff; 4], Some(0x2c)),
        ("vdi", "vdi", 0x40, &[1], Some(0x40)),
        ("vdi", "vdi", 0x154, &[1], Some(0x154)),
        ("vdi", "vdi", 0x178, &[3], Some(0x178)),
        ("vhdx", "vhdx", 0, b"V", Some(0)),
        ("vpc", "vpc", 512, b"x", Some(512)),
        ("vpc", "vpc", 512 + 32, &[3], Some(512 + 32)),
        ("parallels", "parallels", 0, b"x", Some(0)),
        ("parallels", "parallels", 16, &[9], Some(16)),
        ("parallels", "parallels", 28, &[0; 4], Some(28)),
        // The name of a compatible feature says nothing.
        ("qcow2", "qcow2", 87, &[0x40], None),
    ] {
        let sound = fs::read(scratch.file(image)).unwrap();
        let mut wrong = sound.clone();
        wrong[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(scratch.file(image), wrong).unwrap();
        let (code, value) = result(&scratch, &["convert", "-f", format, "-O", "raw", image, "o"]);
        assert_eq!(
            (code == Some(0), value["error"]["offset"].as_u64()),
            (told.is_none(), told),
            "{image} {at}: {value}"
        );
        assert!(told.is_none() || value["error"]["file"] == image, "{value}");
        fs::write(scratch.file(image), sound).unwrap();
    }
}

#[test]
fn progress_is_told_to_programs() {
    let scratch = Scratch::new();
    fs::write(scratch.file("a"), pattern(1, 5 << 20)).unwrap();
    let schema = schema("progress");
    let check = |lines: &str, phases: &[&str]| {
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for line in &lines {
            assert!(valid(&schema, &schema, line), "{line}");
        }
        let mut seen: Vec<&str> = lines.iter().map(|line| line["phase"].as_str().unwrap()).collect();
        seen.dedup();
        assert_eq!(seen, phases);
        for phase in phases {
            let done: Vec<u64> = lines
                .iter()
                .filter(|line| line["phase"] == *phase)
                .map(|line| line["bytes-done"].as_u64().unwrap())
                .collect();
            assert!(done.is_sorted(), "{done:?}");
            assert_eq!(done.last(), Some(&(5 << 20)));
        }
    };
    let run = |line: &str| {
        let program = vimg_path();
        sh(line).env("V", program).dir(scratch.path()).ok()
    };
    let out = own(&["convert", "--progress=json", "--verify", "-O", "qcow2", "a", "b"]).dir(scratch.path()).ok();
    assert_eq!(out.stdout, "");
    check(&out.stderr, &["convert", "verify"]);
    // What goes from front to back, its tables first, is looked at first.
    run("$V convert --progress=json -f raw -O qcow2 a /dev/stdout 2>lines | cat >b");
    check(&fs::read_to_string(scratch.file("lines")).unwrap(), &["plan", "convert"]);
    // On a descriptor of its own, quiet or not; by the variable whatever the program is called.
    run("$V convert -q --progress=json:5 -f raw -O raw a b 5>lines");
    check(&fs::read_to_string(scratch.file("lines")).unwrap(), &["convert"]);
    let out = vimg(&["compare", "a", "b"]).env("VIMG_PROGRESS", "json").dir(scratch.path()).ok();
    check(&out.stderr, &["compare"]);
    // What is no descriptor of the caller's is refused before anything is done; so is what is no form.
    for wish in ["json:9", "json:0", "json:x", "xml", "json:3"] {
        let out = own(&["convert", &format!("--progress={wish}"), "a", "c"]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("rogress"), "{out:?}");
        assert!(!scratch.file("c").exists());
    }
    // Called qemu-img, the option takes no value.
    let out = vimg(&["convert", "--progress=json", "a", "c"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("option '--progress' doesn't allow an argument"), "{out:?}");
    assert!(own(&["convert", "-p", "a", "c.raw"]).dir(scratch.path()).ok().stdout.contains("(100.00/100%)"));
}
