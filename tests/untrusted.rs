//! `--untrusted`: no file that only an image names is opened, whatever the format and wherever it is named.

use std::fs;
use std::os::unix::fs::symlink;

use crate::common::{Output, Scratch, judge, own, plain, sh, vimg, vimg_path};

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
}

/// However the image spells the name, and however the command line does.
#[test]
fn what_is_allowed_is_a_file_not_a_name() {
    let scratch = folder();
    fs::write(scratch.file("other"), "").unwrap();
    let tree = |file: &str| format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{file}"}}}}"#);
    let make = |name: &str| scratch.judge(&["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", "t", "1M"]);
    for name in [&tree("base"), &tree("./base"), "file:base", "./base", r#"json:{"file.filename":"base"}"#] {
        make(name);
        for allow in ["base", ".", "file:base", &tree("base")] {
            allowed(&scratch, &["convert", "--untrusted", "--allow", allow, "-O", "raw", "t", "o"]);
        }
        for allow in ["other", &tree("other")] {
            refused(&scratch, &["convert", "--untrusted", "--allow", allow, "-O", "raw", "t", "o"], name);
        }
        // The user names it as an image, too.
        allowed(&scratch, &["convert", "--untrusted", "-O", "raw", &tree("base"), "t", "o"]);
    }
    // Names that are not those of files alone cannot be allowed.
    for name in [
        r#"json:{"driver":"qcow2","file":{"driver":"nbd","path":"base"}}"#,
        r#"json:{"driver":"qcow2","file":{"filename":"nbd:unix:base"}}"#,
        r#"json:{"driver":"qcow2","file":{"filename":"base"},"backing":{"driver":"raw","file":{"filename":"/etc/passwd"}}}"#,
        r#"json:{"driver":"blkverify","raw":{"filename":"base"},"test":{"filename":"base"}}"#,
    ] {
        make(name);
        let out = run(&scratch, &["convert", "--untrusted", "--allow", ".", "-O", "raw", "t", "o"]);
        assert!(out.code == Some(1) && out.stderr.contains("an untrusted image may name none"), "{out:?}");
    }
    let out = run(&scratch, &["info", "--untrusted", "--allow", "nbd://host/x", "base"]);
    assert!(out.code == Some(1) && out.stderr.contains("names other things than files"), "{out:?}");
}

/// What the process was started with is not read, should there be a way past the policy.
#[test]
fn the_environment_is_out_of_reach() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-u", "-f", "qcow2", "-b", "/proc/self/environ", "-F", "raw", "t", "1M"]);
    let bypassing = |args: &[&str]| vimg(args).dir(scratch.path()).env("VIMG_TEST_NO_POLICY", "1").run();
    let out = bypassing(&["convert", "--untrusted", "-O", "raw", "t", "o"]);
    assert!(out.code == Some(1) && out.stderr.contains("Permission denied"), "{out:?}");
    // It is the kernel that is in the way.
    let out = bypassing(&["convert", "-O", "raw", "t", "o"]);
    assert!(!out.stderr.contains("Permission denied"), "{out:?}");
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

/// Images in the folder `in` that name other files, each with a file that it names: none of them is named by a test.
fn hostile(scratch: &Scratch) -> Vec<(&'static str, &'static str)> {
    fs::create_dir(scratch.file("in")).unwrap();
    fs::create_dir(scratch.file("out")).unwrap();
    fs::write(scratch.file("secret"), vec![7; 1 << 20]).unwrap();
    symlink("../secret", scratch.file("in/link")).unwrap();
    let absolute = scratch.file("secret");
    let absolute = absolute.to_str().unwrap();
    scratch.sh(&format!(
        "cd in && qemu-img create -q -f qcow2 -b ../secret -F raw relative && \
         qemu-img create -q -f qcow2 -b {absolute} -F raw absolute && \
         qemu-img create -q -f qcow2 -b link -F raw linked && \
         qemu-img create -q -f qcow2 -u -b 'json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"secret\"}}}}' -F raw tree 1M && \
         qemu-img create -q -f qcow2 -u -b file:secret -F raw prefixed 1M && \
         qemu-img create -q -f qcow2 -u -b blkdebug::{absolute} -F raw filtered 1M && \
         qemu-img create -q -f qcow -b ../secret -F raw old && \
         qemu-img create -q -f qed -b ../secret -F raw qed && \
         qemu-img create -q -f vmdk base.vmdk 1M && qemu-img create -q -f vmdk -b base.vmdk -F vmdk child.vmdk && \
         qemu-img create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 1M && \
         qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 1M && \
         cd .. && qemu-img create -q -f qcow2 -o data_file=in/data outside.qcow2 1M && mv outside.qcow2 in/outside"
    ));
    vec![
        ("relative", "secret"),
        ("absolute", "secret"),
        ("linked", "secret"),
        ("tree", "secret"),
        ("prefixed", "secret"),
        ("filtered", "secret"),
        ("old", "secret"),
        ("qed", "secret"),
        ("child.vmdk", "base.vmdk"),
        ("flat.vmdk", "flat-flat.vmdk"),
        ("split.vmdk", "split-s001.vmdk"),
        ("outside", "data"),
    ]
}

/// Runs it under strace: what it said, and the names that it opened.
fn opened(scratch: &Scratch, args: &[&str], bypass: bool) -> (Output, Vec<String>) {
    let program = vimg_path();
    let strace = ["-f", "-qq", "-e", "trace=open,openat,openat2,creat", "-o", "log", program.to_str().unwrap()];
    let run = plain("strace", &[&strace[..], args].concat()).dir(scratch.path());
    let out = if bypass { run.env("VIMG_TEST_NO_POLICY", "1") } else { run }.run();
    let log = fs::read_to_string(scratch.file("log")).unwrap();
    let good = log.lines().filter(|line| !line.contains(" = -1 ") && !line.contains("O_PATH"));
    let names = good.filter_map(|line| Some(line.split('"').nth(1)?.to_owned()));
    // The program's own: libraries, what the system is like.
    let system = ["/etc/", "/lib", "/usr/", "/proc/", "/sys/", "/dev/", "/work/", "/opt/", "/root/"];
    (out, names.filter(|name| !system.iter().any(|folder| name.starts_with(folder))).collect())
}

#[test]
fn what_hostile_images_name_is_opened_by_nobody() {
    let scratch = Scratch::new();
    for (image, named) in hostile(&scratch) {
        let path = format!("in/{image}");
        // They are images that would be followed.
        assert!(
            ["tree", "prefixed"].contains(&image)
                || run(&scratch, &["convert", "-O", "raw", &path, "out/o"]).code == Some(0)
        );
        let _ = fs::remove_file(scratch.file("out/o"));
        for bypass in [false, true] {
            let (out, names) = opened(&scratch, &["--untrusted", "info", "--output=json", &path], bypass);
            assert!(names.iter().all(|name| *name == path), "{image}: {names:?}");
            // With the policy gone, what makes up the image itself cannot be opened.
            let whole = !bypass || ["flat.vmdk", "split.vmdk"].iter().all(|other| *other != image);
            assert_eq!(out.code, Some(if whole { 0 } else { 1 }), "{image}: {out:?}");
            if !bypass {
                let info: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
                let references = info["external-references"].as_array().unwrap();
                assert!(
                    references.iter().any(|of| of["filename"].as_str().unwrap().contains(named) || image == "linked"),
                    "{info}"
                );
            }
            let args = ["--untrusted", "convert", "-O", "raw", &path, "out/o"];
            let (out, names) = opened(&scratch, &args, bypass);
            assert_eq!(out.code, Some(1), "{image}: {out:?}");
            let good = |name: &String| *name == path || ["out", ".", "in"].contains(&name.as_str());
            assert!(names.iter().all(good), "{image}, bypassed: {bypass}: {names:?}");
            let words = if bypass { "Permission denied" } else { "an untrusted image may name none" };
            assert!(out.stderr.contains(words) || ["tree", "prefixed"].contains(&image), "{image}: {out:?}");
            assert!(!scratch.file("out/o").exists());
        }
    }
}

/// Whether a file that an image names is there is not asked either: who sees the answer would learn it.
#[test]
fn files_that_hostile_images_name_are_not_asked_for() {
    let scratch = Scratch::new();
    let mut images: Vec<_> =
        hostile(&scratch).into_iter().map(|(image, named)| (format!("in/{image}"), named)).collect();
    symlink("in/relative", scratch.file("led")).unwrap();
    images.push(("led".to_owned(), "secret"));
    let commands = [&["--untrusted", "info", "--output=json"][..], &["--untrusted", "checksum"]];
    for ((path, named), command) in images.iter().flat_map(|image| commands.map(|command| (image, command))) {
        let strace = ["-f", "-qq", "-e", "trace=%file,readlink,readlinkat", "-o", "log", vimg_path().to_str().unwrap()]
            .map(str::to_owned);
        let strace: Vec<&str> = strace.iter().map(String::as_str).collect();
        let args = [&strace[..], command, &[path]].concat();
        let out = plain("strace", &args).dir(scratch.path()).run();
        assert_eq!(out.code, Some(i32::from(command.contains(&"checksum"))), "{path}: {out:?}");
        let log = fs::read_to_string(scratch.file("log")).unwrap();
        let asked: Vec<&str> = log.lines().filter(|line| !line.contains("execve(") && line.contains(named)).collect();
        assert!(log.contains(&format!("\"{path}\"")) && asked.is_empty(), "{path}: {asked:?}");
    }
}

/// What the command line names can be used with the kernel in the way of all else.
#[test]
fn confined_commands_work() {
    let scratch = folder();
    fs::write(scratch.file("pw"), "secret").unwrap();
    fs::create_dir(scratch.file("sub")).unwrap();
    symlink("sub/real", scratch.file("link")).unwrap();
    // A base of several files that grows by one.
    scratch.sh("qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse b.vmdk 1M \
         && qemu-img create -q -f qcow2 -b b.vmdk -F vmdk over.vmdk 3G");
    for line in [
        "convert -O qcow2 base sub/o",
        "convert -O qcow2 base sub/o",
        "convert -O raw base link",
        "convert -O vmdk -o subformat=twoGbMaxExtentSparse base sub/split.vmdk",
        "convert -O qcow2 -o data_file=sub/dd base sub/outside",
        "convert -O luks --passphrase-file pw --target-passphrase-file pw -o iter-time=10 base sub/l",
        "checksum --passphrase-file pw sub/l",
        "create -q -f qcow2 -b ../base -F qcow2 sub/top",
        "convert -n -O qcow2 base sub/o",
        "resize -q sub/o 3M",
        "snapshot -c one sub/o",
        "snapshot -l sub/o",
        "check -q sub/o",
        "check -q --repair-to sub/mended -r all sub/o",
        "commit -q --allow base sub/top",
        "rebase --allow base -b '' sub/top",
        "amend -o lazy_refcounts=on sub/o",
        "bitmap --add sub/o b",
        "compare base base",
        "dd if=base of=sub/d bs=1M count=1",
        "map --output=json sub/o",
        "measure -O qcow2 sub/o",
        "info --image-opts driver=qcow2,file.filename=sub/o",
        "bench -c 5 sub/o",
        "generate gen/er/ated",
        "commit -q --allow b.vmdk --allow b-s001.vmdk over.vmdk",
    ] {
        let args: Vec<&str> =
            ["--untrusted"].into_iter().chain(line.split(' ').map(|word| word.trim_matches('\''))).collect();
        let out = own(&args).dir(scratch.path()).run();
        assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{line}: {out:?}");
    }
    assert!(scratch.file("b-s002.vmdk").exists() && scratch.file("gen/er/ated/man/vimg.1").exists());
    assert!(scratch.file("sub/real").exists() && scratch.file("link").is_symlink());
    // What is not written from front to back is kept in a file until it is whole.
    let pipe = format!("'{}' convert --untrusted -O qcow2 base /dev/stdout | cat > piped.qcow2", vimg_path().display());
    scratch.sh(&pipe);
    scratch.assert_same_content("qcow2", "base", "qcow2", "piped.qcow2");
    let pipe = format!("'{}' convert --untrusted -O raw base /dev/stdout | cat > piped", vimg_path().display());
    assert_eq!(sh(&pipe).dir(scratch.path()).ok().stderr, "");
    scratch.assert_same_content("raw", "piped", "raw", "sub/real");
}

#[test]
fn sizes_are_limited() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a 1G && qemu-img create -q -f qcow2 -b a -F qcow2 top 1M");
    let fails = |args: &[&str], words: &str| {
        let out = run(&scratch, args);
        assert_eq!(out.code, Some(1), "{out:?}");
        assert!(out.stderr.contains(words) && !scratch.file("o").exists(), "{out:?}");
    };
    fails(
        &["convert", "--max-size", "512M", "-O", "qcow2", "a", "o"],
        "the disk of 'a' has 1073741824 bytes, and may have",
    );
    fails(&["--max-size", "512M", "convert", "-O", "qcow2", "top", "o"], "the disk of 'a' has");
    allowed(&scratch, &["convert", "--max-size", "1G", "-O", "qcow2", "a", "o"]);
    // Who looks sees how large it is.
    allowed(&scratch, &["info", "--untrusted", "--max-size", "512M", "a"]);
    fails(&["convert", "--max-output", "512M", "-O", "raw", "a", "o"], "File too large");
    for (args, hint) in [
        (
            &["convert", "--max-output", "512M", "-O", "raw"][..],
            "--max-output lets no file have more than 536870912 bytes",
        ),
        (&["convert", "--max-output", "1k", "-O", "qcow2"], "--max-output lets no file have more than 1024 bytes"),
        (&["convert", "--max-size", "512M", "-O", "raw"], "--max-size says how large a disk may be"),
    ] {
        let out = own(&[args, &["a", "o"]].concat()).dir(scratch.path()).fails(1);
        assert!(out.stderr.ends_with(&format!("\nhint: {hint}\n")), "{out:?}");
    }
    let out = own(&["create", "--max-output", "1k", "-f", "qcow2", "o", "1G"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.ends_with("\nhint: --max-output lets no file have more than 1024 bytes\n"), "{out:?}");
    let out = own(&["convert", "--untrusted", "-O", "raw", "top", "o"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.ends_with("\nhint: --allow DIR_OR_FILE says what images may name\n"), "{out:?}");
    allowed(&scratch, &["convert", "--max-output", "512M", "-O", "qcow2", "a", "o"]);
    fails(&["convert", "--max-size", "x", "a", "o"], "Invalid largest disk specified");
    // None is made that is larger.
    let most = |args: &[&'static str]| [&["--untrusted", "--max-size", "1G"], args].concat();
    fails(
        &most(&["create", "-f", "qcow2", "o", "2G"]),
        "the disk of 'o' has 2147483648 bytes, and may have 1073741824",
    );
    allowed(&scratch, &most(&["create", "-q", "-f", "qcow2", "o", "1G"]));
    fails(&most(&["convert", "-O", "qcow2", "a", "a", "o"]), "the disk of 'o' has 2147483648 bytes");
    fails(&most(&["convert", "-O", "raw", "a", "a", "/dev/stdout"]), "bytes, and may have");
    fails(&most(&["resize", "a", "+512"]), "the disk of 'a' has 1073742336 bytes");
    fails(&most(&["amend", "-o", "size=2G", "a"]), "the disk of 'a' has 2147483648 bytes");
    fails(&most(&["dd", "-O", "qcow2", "if=a", "of=o", "bs=1G", "count=3", "--max-size", "512M"]), "may have");
    assert!(scratch.judge(&["info", "a"]).stdout.contains("1 GiB (1073741824 bytes)"));
}
