//! Every fixture, read by vimg, is what the tool that made it says.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{Scratch, judge, sh, vimg};

/// One line of `fixtures/CONTENTS`.
pub struct Fixture {
    pub name: String,
    pub format: String,
    pub size: u64,
    pub sha256: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// All of them.
pub fn all() -> Vec<Fixture> {
    let text = fs::read_to_string(folder().join("CONTENTS")).expect("fixtures/CONTENTS");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.split(' ').map(str::to_owned);
            let mut next = || words.next().expect("four words a line");
            Fixture { name: next(), format: next(), size: next().parse().expect("size"), sha256: next() }
        })
        .collect()
}

/// Unpacks every file into a folder.
pub fn unpack(to: &Path) {
    let mut count = 0;
    for entry in fs::read_dir(folder()).expect("fixtures").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|ext| ext == "xz") {
            let packed = fs::File::open(&path).expect("fixture");
            let mut plain = fs::File::create(to.join(path.file_stem().expect("stem"))).expect("unpacked fixture");
            std::io::copy(&mut xz2::read::XzDecoder::new(packed), &mut plain).expect("xz");
            count += 1;
        }
    }
    assert!(count >= 20, "only {count} fixtures");
}

#[test]
fn fixtures_read_as_their_makers_say() {
    let scratch = Scratch::new();
    unpack(scratch.path());
    let mut wrong = Vec::new();
    for fixture in all() {
        let out =
            vimg(&["convert", "-f", &fixture.format, "-O", "raw", &fixture.name, "out"]).dir(scratch.path()).run();
        if out.code != Some(0) {
            wrong.push(format!("{}: {}", fixture.name, out.stderr));
            continue;
        }
        let size = fs::metadata(scratch.file("out")).expect("out").len();
        let sum = sh("sha256sum < out").dir(scratch.path()).ok().stdout;
        if size != fixture.size || !sum.starts_with(&fixture.sha256) {
            wrong.push(format!("{}: {size} bytes, {sum}", fixture.name));
        }
        fs::remove_file(scratch.file("out")).expect("remove");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn info_says_of_fixtures_what_the_judge_says() {
    let scratch = Scratch::new();
    unpack(scratch.path());
    let mut wrong = Vec::new();
    for fixture in all() {
        for args in [
            &["info", "--output=json", &fixture.name][..],
            &["info", &fixture.name],
            &["info", "-f", &fixture.format, &fixture.name],
        ] {
            // Without a format the judge takes a fixed VHD for raw, its footer for guest data: a difference of the README.
            let mut asked = args.to_vec();
            if fixture.name.ends_with("fixed.vhd") && !args.contains(&"-f") {
                asked.extend(["-f", "vpc"]);
            }
            let (ours, theirs) = (vimg(args).dir(scratch.path()).run(), judge(&asked).dir(scratch.path()).run());
            if (ours.code, &ours.stdout, &ours.stderr) != (theirs.code, &theirs.stdout, &theirs.stderr) {
                wrong.push(format!(
                    "{args:?}\n{}{}\nqemu-img:\n{}{}",
                    ours.stdout, ours.stderr, theirs.stdout, theirs.stderr
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What neither qemu-img nor vimg made.
fn by_others() -> impl Iterator<Item = Fixture> {
    all().into_iter().filter(|f| ["bochs", "vmdkstream", "orchestra", "imago"].iter().any(|by| f.name.starts_with(by)))
}

#[test]
fn images_of_other_makers_can_be_written_to_and_resized() {
    let scratch = Scratch::new();
    unpack(scratch.path());
    let mut count = 0;
    // A stream-optimized image takes no writes.
    for Fixture { name, format, size, .. } in by_others().filter(|fixture| fixture.name != "vmdkstream.vmdk") {
        // A part of the guest goes elsewhere, over zeros, over what nobody ever wrote, and to the end.
        scratch.judge(&["convert", "-f", &format, "-O", "raw", &name, "new.raw"]);
        let end = size - 70_144;
        let writes =
            ["write -P 7 1k 9k", "write -z 64k 40k", "write -P 8 2000k 100k", &format!("write -P 9 {end} 70144")];
        scratch.qemu_io("raw", "new.raw", &writes);
        scratch.vimg(&["convert", "-n", "-f", "raw", "-O", &format, "new.raw", &name]);
        assert_judged(&scratch, &format, &name);
        let grown = size + (64 << 20);
        scratch.vimg(&["resize", "-f", &format, &name, &grown.to_string()]);
        fs::OpenOptions::new().write(true).open(scratch.file("new.raw")).expect("open").set_len(grown).expect("length");
        assert_judged(&scratch, &format, &name);
        count += 1;
    }
    assert_eq!(count, 6);
}

fn assert_judged(scratch: &Scratch, format: &str, name: &str) {
    scratch.assert_same_content(format, name, "raw", "new.raw");
    let check = judge(&["check", "-f", format, name]).dir(scratch.path()).run();
    // 63: the format has no check.
    assert!(matches!(check.code, Some(0 | 63)), "{name}: {check:?}");
}
