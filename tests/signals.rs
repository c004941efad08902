//! SIGUSR1 asks a conversion how far it is: one line on standard error, in qemu-img's form. A signal that ends a change
//! in place ends it where the image is consistent.

use crate::common::trace::terminated_at;
use crate::common::{Scratch, judge, vimg_path, write_pattern};

#[test]
fn a_conversion_says_on_sigusr1_how_far_it_is() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk"), 0, 1, 64 << 20);
    // Asked once it hears the signal (before, that ends it), again and again until it has answered.
    let line = format!(
        "{} convert -r 1M -f raw -O raw disk out > said 2> answer & p=$!; \
         until grep -Eq 'SigBlk:.*[2367abef]..$' /proc/$p/status; do sleep 0.01; done; \
         while [ ! -s answer ] && kill -USR1 $p; do sleep 0.05; done; kill -TERM $p; wait $p; cat said answer",
        vimg_path().display()
    );
    let out = scratch.sh(&line).stdout;
    let percent = out.strip_prefix("    (").and_then(|rest| rest.strip_suffix("/100%)\n"));
    let percent: Option<f64> = percent.and_then(|number| number.parse().ok());
    assert!(percent.is_some_and(|percent| (0.0..100.0).contains(&percent)), "{out:?}");
}

#[test]
fn a_signal_ends_a_commit_where_the_images_are_consistent() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk"), 0, 1, 64 << 20);
    scratch.sh("qemu-img create -q -f qcow2 base 64M; qemu-img bitmap --add base map; \
         qemu-img convert -f raw -O qcow2 disk image; qemu-img rebase -u -b base -F qcow2 image");
    let line = format!(
        "{} commit -r 1M -f qcow2 image & p=$!; \
         until [ $(stat -c %s base) -gt 1000000 ]; do sleep 0.01; done; kill -TERM $p; wait $p; echo $?",
        vimg_path().display()
    );
    assert_eq!(scratch.sh(&line).stdout, "143\n", "ended by the signal");
    for image in ["image", "base"] {
        let check = scratch.judge(&["check", "-f", "qcow2", image]).stdout;
        assert!(check.starts_with("No errors were found"), "{image}: {check}");
    }
    scratch.assert_same_content("qcow2", "image", "raw", "disk");
    let info = scratch.judge(&["info", "-f", "qcow2", "--output=json", "base"]).json();
    let flags = &info["format-specific"]["data"]["bitmaps"][0]["flags"];
    assert_eq!(flags, &serde_json::json!(["auto"]), "the bitmap can be trusted");
}

#[test]
fn a_signal_at_any_point_of_a_change_leaves_the_image_consistent() {
    let scratch = Scratch::new();
    let folder = scratch.file("in");
    std::fs::create_dir(&folder).unwrap();
    scratch.sh("qemu-img create -q -f raw base 4M; \
         qemu-img create -q -f qcow2 -o cluster_size=4k,refcount_bits=16 -b base -F raw image 4M; \
         qemu-io -c 'write -P 1 0 1M' -c 'write -z 1M 64k' -c 'write -z 2560k 64k' image; \
         qemu-img snapshot -c one image; qemu-io -c 'write -z 256k 64k' image; \
         qemu-img convert -O raw image shown; qemu-img convert -l one -O raw image one");
    let changes = [
        &["amend", "-o", "compat=0.10", "../changed"][..],
        &["amend", "-o", "refcount_bits=64", "../changed"],
        &["bitmap", "--add", "--disable", "../changed", "map"],
        &["snapshot", "-c", "two", "../changed"],
        &["snapshot", "-d", "one", "../changed"],
        &["resize", "-q", "../changed", "4M"],
    ];
    for change in changes {
        let (mut calls, mut ended) = (40, 0);
        loop {
            std::fs::copy(scratch.file("image"), scratch.file("changed")).unwrap();
            let Some(by_signal) = terminated_at(&folder, change, calls) else { break };
            ended += usize::from(by_signal);
            let check = scratch.judge(&["check", "-f", "qcow2", "changed"]).stdout;
            assert!(check.starts_with("No errors were found"), "{change:?}, call {calls}: {check}");
            scratch.assert_same_content("qcow2", "changed", "raw", "shown");
            calls += 29;
        }
        assert!(ended > 5, "{change:?}: {ended} of those up to {calls}");
    }
}

/// A repair comes to its end, or has not begun.
#[test]
fn a_signal_at_any_point_of_a_repair_lets_it_come_to_its_end() {
    let scratch = Scratch::new();
    let folder = scratch.file("in");
    std::fs::create_dir(&folder).unwrap();
    scratch.sh("qemu-img create -q -f qcow2 -o cluster_size=4k image 4M; qemu-io -c 'write -P 1 0 1M' image; \
         qemu-img snapshot -c one image; qemu-io -c 'write -P 2 0 64k' image");
    let mut damaged = std::fs::read(scratch.file("image")).unwrap();
    // No snapshots: what they used leaks, and marks change.
    damaged[60..64].fill(0);
    let (mut calls, mut mended, mut before) = (40, 0, 0);
    loop {
        std::fs::write(scratch.file("changed"), &damaged).unwrap();
        let args = ["check", "-q", "-r", "all", "../changed"];
        let Some(by_signal) = terminated_at(&folder, &args, calls) else { break };
        if std::fs::read(scratch.file("changed")).unwrap() == damaged {
            before += 1;
        } else {
            let check = scratch.judge(&["check", "-f", "qcow2", "changed"]).stdout;
            assert!(check.starts_with("No errors were found"), "call {calls}: {check}");
            mended += usize::from(by_signal);
        }
        calls += 7;
    }
    assert!(before > 3 && mended > 3, "{before} and {mended} of those up to {calls}");
}

/// What is being filled is not counted yet.
#[test]
fn a_signal_while_room_is_filled_leaves_the_old_disk_without_leaks() {
    let scratch = Scratch::new();
    let folder = scratch.file("in");
    std::fs::create_dir(&folder).unwrap();
    scratch.sh("qemu-img create -q -f qcow2 image 1M; qemu-io -f qcow2 -c 'write -P 1 0 256k' image");
    let (mut calls, mut filling) = (40, 0);
    loop {
        std::fs::copy(scratch.file("image"), scratch.file("changed")).unwrap();
        let args = ["resize", "-q", "--preallocation=full", "../changed", "64M"];
        let Some(by_signal) = terminated_at(&folder, &args, calls) else { break };
        let check = judge(&["check", "--output=json", "-f", "qcow2", "changed"]).dir(scratch.path()).run().json();
        assert_eq!(check.get("corruptions"), None, "call {calls}: {check}");
        let info = scratch.judge(&["info", "--output=json", "-f", "qcow2", "changed"]).json();
        let grown = std::fs::metadata(scratch.file("changed")).unwrap().len() > 32 << 20;
        if by_signal && info["virtual-size"] == 1 << 20 {
            scratch.assert_same_content("qcow2", "changed", "qcow2", "image");
            filling += usize::from(grown && check.get("leaks").is_none());
        }
        calls += 5;
    }
    // Of those at which its tables are complete, and the size is not changed yet, there may be one or two.
    assert!(filling > 5, "{filling} of those up to {calls}");
}
