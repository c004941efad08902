//! One body run on vimg and on qemu-img: stdout, stderr, exit code and the files left behind are equal.
//!
//! The cases are text (`*.case`), because they are command lines:
//!
//! ```text
//! ## title
//! : shell line           makes the files; run with the judge's programs
//! | more                 goes on with the line above
//! hold ARGS              `qemu-io ARGS` keeps an image open while the rest runs
//! $ shell line           run with vimg, and with qemu-img, each called `qemu-img`; everything must be equal
//! $ ... timeout $LIMIT   where qemu-img never ends
//! ~ FILE FMT             compare that file by `qemu-img compare` and `check`, not byte by byte
//! - FILE                 do not compare that file
//! ```
//!
//! What qemu-img does and vimg does not yet stands in `todo.case`.
//!
//! A case runs twice, in a folder of the same name, once with each program. Where vimg differs on purpose the
//! case stands in `deviations.case`, with what vimg does instead:
//!
//! ```text
//! why: the reason, one line
//! code: 1                exit code of the last `$` line
//! out: line              its standard output, line by line
//! err: line              its standard error, line by line
//! err-: text             the same, without a line end
//! has: FILE              that file exists afterwards, as qemu-img reads it: `has: FILE FMT` checks it too
//! not: FILE              that file does not
//! ```

mod cases;
mod dialect;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use cases::{Case, Deviation, Step};

use crate::common::run::{self, Holder, sh_with};
use crate::common::{Output, Scratch, first_difference, judge, need, sh};

#[test]
fn create_is_qemu_imgs() {
    run_all("create", include_str!("create.case"), 100);
}

#[test]
fn info_is_qemu_imgs() {
    run_all("info", include_str!("info.case"), 60);
}

#[test]
fn nbd_is_qemu_imgs() {
    need("nbdkit");
    run_all("nbd", include_str!("nbd.case"), 10);
}

#[test]
fn convert_is_qemu_imgs() {
    run_all("convert", include_str!("convert.case"), 100);
}

#[test]
fn resize_is_qemu_imgs() {
    run_all("resize", include_str!("resize.case"), 50);
}

#[test]
fn dd_is_qemu_imgs() {
    run_all("dd", include_str!("dd.case"), 12);
}

#[test]
fn bench_is_qemu_imgs() {
    run_all("bench", include_str!("bench.case"), 12);
}

#[test]
fn snapshot_is_qemu_imgs() {
    run_all("snapshot", include_str!("snapshot.case"), 24);
}

#[test]
fn commit_is_qemu_imgs() {
    run_all("commit", include_str!("commit.case"), 25);
}

#[test]
fn rebase_is_qemu_imgs() {
    run_all("rebase", include_str!("rebase.case"), 20);
}

#[test]
fn amend_is_qemu_imgs() {
    run_all("amend", include_str!("amend.case"), 18);
}

#[test]
fn bitmap_is_qemu_imgs() {
    run_all("bitmap", include_str!("bitmap.case"), 18);
}

#[test]
fn map_is_qemu_imgs() {
    run_all("map", include_str!("map.case"), 60);
}

#[test]
fn measure_is_qemu_imgs() {
    run_all("measure", include_str!("measure.case"), 60);
}

#[test]
fn compare_is_qemu_imgs() {
    run_all("compare", include_str!("compare.case"), 40);
}

#[test]
fn check_is_qemu_imgs() {
    run_all("check", include_str!("check.case"), 12);
}

#[test]
fn parallels_is_qemu_imgs() {
    run_all("parallels", include_str!("parallels.case"), 18);
}

#[test]
fn qed_is_qemu_imgs() {
    run_all("qed", include_str!("qed.case"), 30);
}

#[test]
fn check_of_qcow2_is_qemu_imgs() {
    run_all("check_qcow2", include_str!("check_qcow2.case"), 30);
}

#[test]
fn command_line_is_qemu_imgs() {
    run_all("general", include_str!("general.case"), 30);
}

#[test]
fn deviations_are_as_the_readme_says() {
    let table = include_str!("deviations.case");
    run_all("deviations", table, 10);
    let readme = include_str!("../../README.md");
    for case in cases::parse("deviations", table) {
        assert!(readme.contains(&format!("`{}`", case.title)), "README.md has no row for `{}`", case.title);
    }
}

/// A case that passes has to be moved, so that it cannot fail again unseen.
#[test]
fn what_is_to_do_is_not_done_yet() {
    run_each("todo", include_str!("todo.case"), 0, check_undone);
}

fn run_all(table: &str, text: &str, floor: usize) {
    run_each(table, text, floor, check);
}

/// Runs every case of a table, a few at a time, and reports all failures together. `VIMG_CASE` selects by title.
fn run_each(table: &str, text: &str, floor: usize, check: fn(&Case) -> Result<(), String>) {
    need("qemu-img");
    need("qemu-io");
    let wanted = std::env::var("VIMG_CASE").unwrap_or_default();
    let cases: Vec<Case> = cases::parse(table, text);
    assert!(cases.len() >= floor, "{table}: {} cases, fewer than {floor}", cases.len());
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if !case.title.contains(&wanted) {
                        continue;
                    }
                    if let Err(what) = check(case) {
                        failures.lock().expect("failures").push(format!("## {table}: {}\n{what}", case.title));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("failures");
    assert!(failures.is_empty(), "{} of {} cases:\n\n{}", failures.len(), cases.len(), failures.join("\n"));
}

/// What one program did in a case.
struct Outcome {
    outputs: Vec<Output>,
    /// The files that were there before it ran.
    before: BTreeSet<String>,
    dir: PathBuf,
}

fn check(case: &Case) -> Result<(), String> {
    let real = Path::new(&run::which("qemu-img")).parent().expect("a folder").to_path_buf();
    for tries_left in (0..=3).rev() {
        let scratch = Scratch::new();
        let theirs = play(case, &scratch, &real, "theirs")?;
        let ours = play(case, &scratch, run::links(), "ours")?;
        let verdict = match &case.deviation {
            Some(deviation) => check_deviation(case, deviation, &theirs, &ours),
            None => check_equal(case, &theirs, &ours),
        };
        if verdict.is_ok() || tries_left == 0 || !only_disk_sizes_differ(&theirs, &ours) {
            return verdict;
        }
    }
    unreachable!("the last try returns")
}

/// Whether what was said differs in nothing but what files take on the disk. ext4 needs a block more for the extents of a file
/// that it happened to scatter, whoever wrote it: such a case is played again. A difference of the programs comes each time.
fn only_disk_sizes_differ(theirs: &Outcome, ours: &Outcome) -> bool {
    let said =
        |outcome: &Outcome| outcome.outputs.iter().map(|out| dialect::normalise(&out.stdout)).collect::<Vec<_>>();
    let without = |texts: &[String]| {
        let is_size = |line: &&str| line.contains("disk size: ") || line.contains("\"actual-size\": ");
        let rest = |text: &String| text.lines().filter(|line| !is_size(line)).map(str::to_owned).collect();
        texts.iter().map(rest).collect::<Vec<Vec<String>>>()
    };
    let (theirs, ours) = (said(theirs), said(ours));
    theirs != ours && without(&theirs) == without(&ours)
}

/// qemu-img does the case well, and twice alike, so that the case is sound; vimg does it in another way, or not at all.
fn check_undone(case: &Case) -> Result<(), String> {
    let scratch = Scratch::new();
    let real = Path::new(&run::which("qemu-img")).parent().expect("a folder").to_path_buf();
    let theirs = play(case, &scratch, &real, "theirs")?;
    let again = play(case, &scratch, &real, "again")?;
    let ours = play(case, &scratch, run::links(), "ours")?;
    if let Some(out) = theirs.outputs.iter().find(|out| out.code != Some(0)) {
        return Err(format!("qemu-img fails: {out:#?}"));
    }
    let said = |outcome: &Outcome| {
        outcome.outputs.iter().map(|out| (out.stdout.clone(), out.stderr.clone())).collect::<Vec<_>>()
    };
    if said(&theirs) != said(&again) {
        return Err(format!("qemu-img says another thing each time: {:#?}", theirs.outputs));
    }
    compare_folders(case, &theirs, &again).map_err(|what| format!("qemu-img twice: {what}"))?;
    match check_equal(case, &theirs, &ours) {
        Ok(()) => Err("vimg does it as qemu-img does: move the case to the table of its command".to_owned()),
        Err(_) => Ok(()),
    }
}

/// Runs a case in a folder that has the same name whoever runs in it, then moves the folder away.
fn play(case: &Case, scratch: &Scratch, links: &Path, name: &str) -> Result<Outcome, String> {
    let work = scratch.file("work");
    // Where qemu-img never ends it need not run for long, and vimg may take as long as a loaded machine makes it.
    let limit = if name == "theirs" { "2" } else { "600" };
    std::fs::create_dir(&work).map_err(|e| e.to_string())?;
    let mut outputs = Vec::new();
    let mut holders = Vec::new();
    let mut before = None;
    for step in &case.steps {
        match step {
            Step::Setup(line) => {
                let out = sh(line).dir(&work).run();
                if out.code != Some(0) {
                    return Err(format!("setup failed: {out:#?}"));
                }
            }
            Step::Hold(args) => holders.push(Holder::new(&work, &args.split(' ').collect::<Vec<_>>())),
            Step::Compare(line) => {
                before.get_or_insert_with(|| list(&work).into_keys().collect());
                let out = sh_with(links, line).dir(&work).env("LIMIT", limit).run();
                if out.timed_out {
                    return Err(format!("{name}: no end: {line}"));
                }
                outputs.push(out);
            }
        }
    }
    drop(holders);
    let dir = scratch.file(name);
    std::fs::rename(&work, &dir).map_err(|e| e.to_string())?;
    Ok(Outcome { outputs, before: before.unwrap_or_default(), dir })
}

fn check_equal(case: &Case, theirs: &Outcome, ours: &Outcome) -> Result<(), String> {
    let mut wrong = String::new();
    for (theirs, ours) in theirs.outputs.iter().zip(&ours.outputs) {
        let (stdout, stderr) = (dialect::normalise(&theirs.stdout), dialect::normalise(&theirs.stderr));
        let (our_stdout, our_stderr) = match std::env::var_os("VIMG") {
            // Another program is put to the test, to try the table: it may speak the installed dialect.
            Some(_) => (dialect::normalise(&ours.stdout), dialect::normalise(&ours.stderr)),
            None => (ours.stdout.clone(), ours.stderr.clone()),
        };
        if theirs.code != ours.code || theirs.signal != ours.signal {
            let show = |o: &Output| format!("{:?}/{:?}", o.code, o.signal);
            wrong += &format!("exit code {} but qemu-img's {}\n", show(ours), show(theirs));
        }
        wrong += &text_difference("stdout", &stdout, &our_stdout);
        wrong += &text_difference("stderr", &stderr, &our_stderr);
        if !wrong.is_empty() {
            return Err(format!("$ {}\n{wrong}", ours.command));
        }
    }
    compare_folders(case, theirs, ours)
}

fn text_difference(what: &str, theirs: &str, ours: &str) -> String {
    if theirs == ours { String::new() } else { format!("{what}: vimg\n{ours}{what}: qemu-img\n{theirs}") }
}

fn compare_folders(case: &Case, theirs: &Outcome, ours: &Outcome) -> Result<(), String> {
    let (mut left, right) = (list(&theirs.dir), list(&ours.dir));
    if ours.outputs.last().is_some_and(|out| out.code != Some(0)) {
        // Of a failure qemu-img leaves half a file; vimg leaves none (`a failure leaves no file` in the README).
        left.retain(|name, _| theirs.before.contains(name) || right.contains_key(name));
        let one =
            case.steps.iter().filter(|step| matches!(step, Step::Compare(line) if !line.contains([';', '&']))).count();
        if one == 1
            && ours.outputs.len() == 1
            && let Some(new) = right.keys().find(|name| !ours.before.contains(*name))
        {
            return Err(format!("a failure leaves {new}\n"));
        }
    }
    if left.keys().ne(right.keys()) {
        return Err(format!("files: vimg {:?}, qemu-img {:?}\n", right.keys(), left.keys()));
    }
    for (name, theirs) in &left {
        let ours = &right[name];
        if case.ignored.contains(name) || !theirs.is_file() || theirs.is_symlink() {
            continue;
        }
        let mode = |path: &Path| {
            use std::os::unix::fs::PermissionsExt;
            std::fs::metadata(path).map(|m| m.permissions().mode() & 0o7777).unwrap_or(0)
        };
        if mode(theirs) != mode(ours) {
            return Err(format!("{name}: mode {:o}, qemu-img's {:o}\n", mode(ours), mode(theirs)));
        }
        match case.content.get(name) {
            None => {
                if let Some(at) = first_difference(theirs, ours) {
                    let len = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
                    let lens = format!("lengths {} and qemu-img's {}", len(ours), len(theirs));
                    return Err(format!("{name}: differs from qemu-img's at byte {at} ({at:#x}); {lens}\n"));
                }
            }
            Some(format) => same_content(format, theirs, ours)?,
        }
    }
    Ok(())
}

fn same_content(format: &str, theirs: &Path, ours: &Path) -> Result<(), String> {
    let (theirs, ours) = (theirs.to_string_lossy(), ours.to_string_lossy());
    let out = judge(&["compare", "-f", format, "-F", format, &theirs, &ours]).run();
    if out.code != Some(0) || out.stdout != "Images are identical.\n" {
        return Err(format!("content: {out:#?}\n"));
    }
    let out = judge(&["check", "-f", format, &ours]).run();
    if !matches!(out.code, Some(0 | 63)) {
        return Err(format!("not clean: {out:#?}\n"));
    }
    Ok(())
}

/// Every file below a folder, by its name relative to it.
fn list(dir: &Path) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("read folder").flatten() {
            let path = entry.path();
            if path.is_dir() && !path.is_symlink() {
                folders.push(path.clone());
            }
            found.insert(path.strip_prefix(dir).expect("below").to_string_lossy().into_owned(), path);
        }
    }
    found
}

fn check_deviation(case: &Case, expected: &Deviation, theirs: &Outcome, ours: &Outcome) -> Result<(), String> {
    let Some(out) = ours.outputs.last() else { return Err("no command".to_owned()) };
    let mut wrong = String::new();
    if out.code != Some(expected.code) {
        wrong += &format!("exit code {:?}, not {}\n", out.code, expected.code);
    }
    wrong += &text_difference("stdout", &expected.stdout, &out.stdout);
    wrong += &text_difference("stderr", &expected.stderr, &out.stderr);
    for (file, format) in &expected.present {
        let path = ours.dir.join(file);
        if !path.exists() {
            wrong += &format!("{file} is not there\n");
        } else if let Some(format) = format {
            let info = judge(&["info", "-f", format, &path.to_string_lossy()]).run();
            if info.code != Some(0) {
                wrong += &format!("{file}: {}", info.stderr);
            }
        }
    }
    for file in &expected.absent {
        if ours.dir.join(file).exists() {
            wrong += &format!("{file} is there\n");
        }
    }
    if !wrong.is_empty() {
        return Err(format!("$ {}\n{wrong}", out.command));
    }
    // A deviation that is none any more must not stay in the table.
    if expected.absent.iter().any(|file| theirs.dir.join(file).exists()) {
        return Ok(());
    }
    match check_equal(case, theirs, ours) {
        Ok(()) => Err("qemu-img does the same: this is no deviation".to_owned()),
        Err(_) => Ok(()),
    }
}
