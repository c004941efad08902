//! `--untrusted`: no file that only an image names is opened, whatever the format and wherever it is named.

use std::fs;
use std::os::unix::fs::symlink;

use crate::common::{Output, Scratch, judge, vimg, vimg_path};

/// Images that name another file, and that file's name.
fn images(scratch: &Scratch) -> Vec<(&'static str, &'static str)> {
    fs::write(scratch.file("secret"), vec![7; 1 << 20]).unwrap();
    scratch.sh("qemu-img create -q -f qcow2 -b secret -F raw overlay && \
         qemu-img create -q -f qcow2 -b overlay -F qcow2 above && \
         qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on outside 1M && \
         qemu-img create -q -f qcow -b secret -F raw old && \
         qemu-img create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 1M && \
         qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 1M");
    vec![
        ("overlay", "secret"),
        ("above", "overlay"),
        ("outside", "data"),
        ("old", "secret"),
        ("flat.vmdk", "flat-flat.vmdk"),
        ("split.vmdk", "split-s001.vmdk"),
    ]
}

#[test]
fn what_an_untrusted_image_names_is_not_read() {
    let scratch = Scratch::new();
    for (image, named) in images(&scratch) {
        // It is the refusal, not the image, that is in the way.
        scratch.vimg(&["convert", "-O", "raw", image, "out"]);
        fs::remove_file(scratch.file("out")).unwrap();
        let out = vimg(&["--untrusted", "convert", "-O", "raw", image, "out"]).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains(&format!("'{named}', and an untrusted image may name none")), "{out:?}");
        assert!(!scratch.file("out").exists(), "{image}");
        // Nor is it written to.
        let before = fs::read(scratch.file(named)).unwrap();
        let args = ["--untrusted", "resize", "-q", image, "8M"];
        let resized = vimg(&args).dir(scratch.path()).run().code;
        assert!(resized == Some(1) || image == "overlay" || image == "above" || image == "old", "{image}");
        assert!(fs::read(scratch.file(named)).unwrap() == before, "{image}");
    }
}

#[test]
fn an_untrusted_image_by_itself_is_converted() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "a", "1M"]);
    scratch.qemu_io("qcow2", "a", &["write -P 9 100k 5k"]);
    scratch.vimg(&["--untrusted", "info", "a"]);
    scratch.vimg(&["--untrusted", "convert", "-O", "vmdk", "a", "b"]);
    scratch.assert_same_content("qcow2", "a", "vmdk", "b");
}

fn run(scratch: &Scratch, args: &[&str]) -> Output {
    vimg(args).dir(scratch.path()).run()
}

fn refused(scratch: &Scratch, args: &[&str], named: &str) {
    let out = run(scratch, args);
    assert_eq!(out.code, Some(1), "{args:?}: {out:?}");
    assert!(out.stderr.contains(&format!("names the file '{named}'")), "{args:?}: {out:?}");
    assert!(!scratch.file("o").exists(), "{args:?}");
}

fn allowed(scratch: &Scratch, args: &[&str]) {
    let out = run(scratch, args);
    assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{args:?}: {out:?}");
    let _ = fs::remove_file(scratch.file("o"));
}

/// `base`, `top` on it, `data.qcow2` with a data file, and flat and split vmdks.
fn folder() -> Scratch {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 base 1M && qemu-io -c 'write -P 5 0 64k' base \
         && qemu-img create -q -f qcow2 -b base -F qcow2 top \
         && qemu-img create -q -f qcow2 -o data_file=d data.qcow2 1M \
         && qemu-img create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 1M \
         && qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 1M");
    scratch
}

#[test]
fn what_an_image_names_is_not_opened() {
    let scratch = folder();
    for (image, named) in
        [("top", "base"), ("data.qcow2", "d"), ("flat.vmdk", "flat-flat.vmdk"), ("split.vmdk", "split-s001.vmdk")]
    {
        // Before the subcommand, and behind it.
        refused(&scratch, &["--untrusted", "convert", "-O", "raw", image, "o"], named);
        refused(&scratch, &["convert", "--untrusted", "-O", "raw", image, "o"], named);
        refused(&scratch, &["convert", "-O", "raw", image, "o", "--untrusted"], named);
        refused(&scratch, &["convert", "--untrusted", "--allow", "flat.vmdk", "-O", "raw", image, "o"], named);
        allowed(&scratch, &["convert", "--untrusted", "--allow", named, "-O", "raw", image, "o"]);
        allowed(&scratch, &["--untrusted", "--allow", ".", "convert", "-O", "raw", image, "o"]);
        allowed(&scratch, &["convert", "-O", "raw", image, "o"]);
    }
    refused(&scratch, &["info", "--untrusted", "--backing-chain", "top"], "base");
    allowed(&scratch, &["info", "--untrusted", "--allow", "base", "--backing-chain", "top"]);
    refused(&scratch, &["resize", "--untrusted", "flat.vmdk", "2M"], "flat-flat.vmdk");
    allowed(&scratch, &["resize", "-q", "--untrusted", "--allow", "flat-flat.vmdk", "flat.vmdk", "2M"]);
}

#[test]
fn what_the_user_names_is_opened() {
    let scratch = folder();
    allowed(&scratch, &["convert", "--untrusted", "-B", "base", "-F", "qcow2", "-O", "qcow2", "top", "o"]);
    allowed(&scratch, &["convert", "--untrusted", "-O", "qcow2", "-o", "data_file=x", "base", "o"]);
    allowed(&scratch, &["convert", "--untrusted", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", "base", "o"]);
    allowed(&scratch, &["create", "--untrusted", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "o"]);
    fs::copy(scratch.file("top"), scratch.file("there")).unwrap();
    refused(&scratch, &["convert", "--untrusted", "-n", "-O", "qcow2", "-f", "raw", "flat-flat.vmdk", "there"], "base");
    allowed(&scratch, &["convert", "--untrusted", "-n", "-B", "base", "-O", "qcow2", "top", "there"]);
    let tree =
        r#"json:{"driver":"qcow2","file":{"filename":"top"},"backing":{"driver":"qcow2","file":{"filename":"base"}}}"#;
    allowed(&scratch, &["convert", "--untrusted", "-O", "raw", tree, "o"]);
    let options = "driver=qcow2,file.filename=data.qcow2,data-file.filename=d";
    allowed(&scratch, &["convert", "--untrusted", "--image-opts", "-O", "raw", options, "o"]);
    // The format alone is no name.
    let tree = r#"json:{"driver":"qcow2","file":{"filename":"top"},"backing":{"driver":"qcow2"}}"#;
    refused(&scratch, &["convert", "--untrusted", "-O", "raw", tree, "o"], "base");
    // What the user's backing file names is not the user's.
    scratch.sh("qemu-img create -q -f qcow2 -b top -F qcow2 topmost");
    refused(&scratch, &["convert", "--untrusted", "-B", "top", "-F", "qcow2", "-O", "qcow2", "topmost", "o"], "base");
}

#[test]
fn a_folder_that_is_allowed_allows_nothing_outside() {
    let scratch = folder();
    fs::create_dir(scratch.file("in")).unwrap();
    fs::copy(scratch.file("base"), scratch.file("in/base")).unwrap();
    symlink("../base", scratch.file("in/link")).unwrap();
    symlink("base", scratch.file("in/near")).unwrap();
    for (name, good) in
        [("in/base", true), ("in/near", true), ("in/link", false), ("in/../base", false), ("base", false)]
    {
        scratch.sh(&format!("qemu-img create -q -f qcow2 -b {name} -F qcow2 t"));
        let args = ["convert", "--untrusted", "--allow", "in", "-O", "raw", "t", "o"];
        if good { allowed(&scratch, &args) } else { refused(&scratch, &args, name) }
    }
    // Names that are no file names cannot be allowed.
    for name in ["json:{\"driver\":\"qcow2\",\"file\":{\"filename\":\"base\"}}", "file:base"] {
        scratch.judge(&["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", "t", "1M"]);
        let out = run(&scratch, &["convert", "--untrusted", "--allow", ".", "-O", "raw", "t", "o"]);
        assert_eq!(out.code, Some(1), "{out:?}");
    }
}

#[test]
fn an_exception_needs_the_rule_and_a_file() {
    let scratch = folder();
    let out = run(&scratch, &["info", "--allow", "base", "base"]);
    assert_eq!(out.code, Some(1));
    assert!(out.stderr.contains("--allow has no effect without --untrusted"), "{}", out.stderr);
    let out = run(&scratch, &["info", "--untrusted", "--allow", "nowhere", "base"]);
    assert_eq!(out.code, Some(1));
    assert!(out.stderr.contains("Could not find 'nowhere': No such file or directory"), "{}", out.stderr);
}

#[test]
fn info_shows_extents_that_are_not_opened() {
    let scratch = folder();
    for image in ["flat.vmdk", "split.vmdk"] {
        let theirs = judge(&["info", "--output=json", image]).dir(scratch.path()).ok();
        let out = run(&scratch, &["info", "--untrusted", "--output=json", image]);
        assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{out:?}");
        let (ours, theirs): (serde_json::Value, serde_json::Value) =
            (serde_json::from_str(&out.stdout).unwrap(), serde_json::from_str(&theirs.stdout).unwrap());
        for key in ["filename", "format", "virtual-size"] {
            assert_eq!(ours[key], theirs[key], "{image}: {key}");
        }
        let (ours, theirs) = (&ours["format-specific"]["data"], &theirs["format-specific"]["data"]);
        assert_eq!((&ours["create-type"], &ours["cid"]), (&theirs["create-type"], &theirs["cid"]));
        for key in ["filename", "format", "virtual-size"] {
            assert_eq!(ours["extents"][0][key], theirs["extents"][0][key], "{image}: {key}");
        }
        // They need not be there.
        fs::remove_file(scratch.file(if image == "flat.vmdk" { "flat-flat.vmdk" } else { "split-s001.vmdk" })).unwrap();
        assert_eq!(run(&scratch, &["info", "--untrusted", image]).code, Some(0));
    }
}

/// Where vimg stands in for qemu-img, what it adds is not shown.
#[test]
fn the_help_shows_it_under_its_own_name_alone() {
    let scratch = Scratch::new();
    symlink(vimg_path(), scratch.file("vimg")).unwrap();
    for (out, shown) in [(scratch.sh("./vimg --help"), true), (scratch.vimg(&["--help"]), false)] {
        assert_eq!(out.stdout.contains("--untrusted") && out.stdout.contains("--allow"), shown, "{out:?}");
        assert!(shown || !out.stdout.contains("allow"), "{out:?}");
    }
}
