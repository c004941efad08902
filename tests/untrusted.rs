//! `--untrusted`: no file that only an image names is opened, whatever the format and wherever it is named.

use std::fs;

use crate::common::{Scratch, vimg};

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
