//! What two programs make of one damaged image, side by side.

use std::fs;

use super::damage::Damaged;
use crate::common::run;
use crate::common::{Output, Scratch, judge};

/// Where the two programs part ways on purpose, and what qemu-img says then.
const DIFFERENCES: &[(&str, &[&str])] = &[
    ("a refcount block past the end of the file: qemu-img makes the file as long as that", &["is outside image"]),
    (
        "qemu-img gives up, or leaves its new refcounts broken",
        &["Preventing invalid write", "ERROR writing refblock", "No medium found", "is still broken"],
    ),
    ("qemu-img writes bitmaps anew that nobody changed", &["qcow2_free_clusters failed", "Lost persistent bitmaps"]),
];

/// The difference that explains another output.
fn difference(theirs: &Output, ours: &Output) -> Option<&'static str> {
    if is_cut(ours) {
        return Some("what the end of the file cuts off");
    }
    // New refcounts of a truncated image: ours leave the place alone that entries past the end still name, and there are
    // none if there is no room before it.
    let renewed = theirs.stderr.contains("Rebuilding refcount structure");
    if theirs.stderr.contains("exceeding the end of the file") && renewed {
        return Some("new refcounts of a truncated image");
    }
    if renewed && theirs.stderr.contains("Check failed: Invalid argument") && ours.code == Some(0) {
        return Some("qemu-img stops behind new refcounts where there are bitmaps");
    }
    if ours.stderr.contains("no room for a new snapshot table within the file") {
        return Some("a new snapshot table of a truncated image");
    }
    let emptied = |out: &Output| out.stderr.contains("snapshot table entry 0 is incomplete");
    if emptied(theirs) && !emptied(ours) {
        return Some("qemu-img takes a damaged snapshot table for leaked, and empties it");
    }
    let left_marks = |out: &Output| out.stderr.contains("ERROR OFLAG_COPIED");
    if ours.stderr.contains("snapshot table") && left_marks(theirs) && !left_marks(ours) {
        return Some("qemu-img leaves marks wrong where a snapshot table reached too far");
    }
    // The bit is read as an entry, where an L2 table is said to be in the header.
    let without_bit = |out: &Output| out.stderr.replace("ERROR found l2 entry with reserved bits set: 4\n", "");
    if ours.stderr != theirs.stderr && without_bit(ours) == theirs.stderr {
        return Some("qemu-img clears autoclear bits before it looks");
    }
    if theirs.code.is_none() {
        return Some("qemu-img crashes");
    }
    if ours.stderr.contains("Preventing invalid write") {
        return Some("vimg refuses to write where tables overlap");
    }
    let said = |(_, words): &&(&str, &[&str])| words.iter().any(|word| theirs.stderr.contains(word));
    DIFFERENCES.iter().find(said).map(|(what, _)| *what)
}

/// Whether something is told that qemu-img bears: that it ends past the end of the file by less than a cluster, or lies
/// past the end of the data file.
fn is_cut(ours: &Output) -> bool {
    let said = ["is cut off by the end of the file", "lies past the end of the data file"];
    said.iter().any(|words| ours.stderr.contains(words))
}

/// One program's check of a file.
pub fn check(ours: bool, scratch: &Scratch, name: &str, fix: Option<&str>) -> Output {
    let mut args = vec!["check", "-f", "qcow2"];
    args.extend(fix.iter().flat_map(|fix| ["-r", fix]));
    args.push(name);
    let run = if ours { run::vimg(&args) } else { judge(&args) };
    let mut out = run.dir(scratch.path()).run();
    // qemu-img leaves out the end of this line.
    out.stderr = out.stderr.replace("on the image file to fix.\n", "on the image file to fix.");
    out
}

/// Where two outputs part, in a few lines.
fn unlike(ours: &Output, theirs: &Output) -> String {
    let mut text = format!("exit codes {:?}, qemu-img's {:?}\n", ours.code, theirs.code);
    for (what, ours, theirs) in [("stderr", &ours.stderr, &theirs.stderr), ("stdout", &ours.stdout, &theirs.stdout)] {
        let same = ours.lines().zip(theirs.lines()).take_while(|(ours, theirs)| ours == theirs).count();
        for (whose, lines) in [("vimg", ours), ("qemu-img", theirs)] {
            let rest: Vec<&str> = lines.lines().skip(same).take(6).collect();
            text += &format!("{what}, {whose}, from line {}: {rest:#?}\n", same + 1);
        }
    }
    text
}

/// What is wrong with what the two programs make of one damage, if anything is.
pub fn compare(scratch: &Scratch, damaged: &Damaged, name: &str) -> Result<Option<&'static str>, String> {
    let (theirs_name, ours_name) = (format!("{name}.theirs"), format!("{name}.ours"));
    let mut excuse = None;
    for fix in [None, Some("leaks"), Some("all")] {
        for name in [&theirs_name, &ours_name] {
            let _ = fs::remove_file(scratch.file(name));
            fs::write(scratch.file(name), &damaged.bytes).unwrap();
        }
        // The same name for both: it is in some of the texts.
        let play = |ours: bool, file: &str| {
            fs::rename(scratch.file(file), scratch.file(name)).unwrap();
            let out = check(ours, scratch, name, fix);
            fs::rename(scratch.file(name), scratch.file(file)).unwrap();
            out
        };
        let (theirs, ours) = (play(false, &theirs_name), play(true, &ours_name));
        let same = (theirs.code, &theirs.stdout, &theirs.stderr) == (ours.code, &ours.stdout, &ours.stderr);
        if !same {
            let why = if fix.is_some() || is_cut(&ours) { difference(&theirs, &ours) } else { None };
            let Some(why) = why else {
                return Err(format!("-r {fix:?}: {}", unlike(&ours, &theirs)));
            };
            excuse = Some(why);
        }
        if fix.is_none() {
            continue;
        }
        // Each finds in the other's what the other does.
        for file in [&theirs_name, &ours_name] {
            let (a, b) = (check(false, scratch, file, None), check(true, scratch, file, None));
            if !is_cut(&b) && (a.code, &a.stdout, &a.stderr) != (b.code, &b.stdout, &b.stderr) {
                return Err(format!("{file} after -r {fix:?}: {}", unlike(&b, &a)));
            }
            if ours.code == Some(0) && *file == ours_name && a.code != Some(0) {
                return Err(format!("not clean after -r {fix:?}: {}", unlike(&ours, &a)));
            }
        }
        // Where a bitmap lies in guest data, qemu-img changes that.
        if (theirs.code, ours.code) == (Some(0), Some(0)) && !damaged.bitmaps {
            let args = ["compare", "-f", "qcow2", "-F", "qcow2", &theirs_name, &ours_name];
            let out = judge(&args).dir(scratch.path()).run();
            // What neither can read (3, 4) they read alike.
            if !matches!(out.code, Some(0 | 3 | 4)) {
                return Err(format!("content after -r {fix:?}: {out:#?}"));
            }
        }
    }
    Ok(excuse)
}
