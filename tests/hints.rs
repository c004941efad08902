//! What vimg says beyond the reference where it is called by its own name: what a user can do about an error, what a
//! new user stumbles over. Called `qemu-img` it says nothing of the kind.

use std::fs;

use crate::common::run::Holder;
use crate::common::{Scratch, judge, own, plain, vimg, vimg_path};

#[test]
fn an_error_says_what_can_be_done_about_it() {
    let scratch = Scratch::new();
    scratch
        .sh("truncate -s 1M disk; cp disk a:b; mkdir folder; cp disk folder/image; qemu-img create -q -f qcow2 q 1M; \
             qemu-img snapshot -c before q");
    for (args, hint) in [
        (&["info", "a:b"][..], "a file of that name is written './a:b'"),
        (&["convert", "-O", "vhd", "disk", "o"], "did you mean 'vpc'?"),
        (&["convert", "-O", "qcwo2", "disk", "o"], "did you mean 'qcow2'?"),
        (&["info", "-f", "vmkd", "disk"], "did you mean 'vmdk'?"),
        (&["create", "-f", "qcow2", "-o", "cluster_sise=64k", "o", "1M"], "did you mean 'cluster_size'?"),
        (&["create", "-f", "qcow2", "-o", "wibble=64k", "o", "1M"], "'-o help' lists the options of the format"),
        (&["covnert", "disk", "o"], "did you mean 'convert'?"),
        (&["info", "--outptu=json", "disk"], "did you mean '--output'?"),
        (
            &["create", "-f", "vmdk", "-o", "subformat=streamoptimized", "o", "1M"],
            "did you mean 'subformat=streamOptimized'?",
        ),
        (&["convert", "-O", "vpc", "-o", "subformat=wibble", "disk", "o"], "'subformat' is one of dynamic, fixed"),
        (
            &["create", "-f", "qcow2", "-o", "preallocation=fallocate", "o", "1M"],
            "did you mean 'preallocation=falloc'?",
        ),
        (&["create", "-o", "preallocation=ful", "o", "1M"], "did you mean 'preallocation=full'?"),
        (
            &["measure", "-O", "qcow2", "-o", "preallocation=fallocate", "--size", "1M"],
            "did you mean 'preallocation=falloc'?",
        ),
        (&["amend", "-o", "compat=v4", "q"], "did you mean 'compat=v2'?"),
        (&["create", "o", "10GB"], "did you mean '10G'?"),
        (&["create", "-f", "qcow2", "-o", "cluster_size=64KiB", "o", "1M"], "did you mean '64K'?"),
        (&["resize", "-f", "raw", "disk", "+1,5 gb"], "did you mean '+1.5g'?"),
        (&["resize", "-f", "raw", "--preallocation", "fallocate", "disk", "2M"], "did you mean 'falloc'?"),
        (&["rezise", "disk", "2M"], "did you mean 'resize'?"),
        (&["wibble"], "'vimg help' lists the commands"),
        (&["snapshot", "-a", "befor", "q"], "did you mean 'before'?"),
        (&["snapshot", "-d", "befroe", "q"], "did you mean 'before'?"),
        (&["convert", "-l", "befor", "q", "o"], "did you mean 'before'?"),
        (&["convert", "-l", "snapshot.name=befor", "q", "o"], "did you mean 'before'?"),
        (&["create", "-f", "qcow2", "-b", "q", "o"], "-F qcow2 names it, where that is right"),
        (&["convert", "-t", "writebakc", "disk", "o"], "did you mean 'writeback'?"),
        (&["info", "dsik"], "did you mean 'disk'?"),
        (&["info", "flder/image"], "did you mean 'folder/image'?"),
        (&["convert", "-O", "raw", "disk", "folde/new"], "did you mean 'folder/new'?"),
    ] {
        let out = own(args).dir(scratch.path()).fails(1);
        assert!(out.stderr.ends_with(&format!("\nhint: {hint}\n")), "{out:?}");
        let theirs = vimg(args).dir(scratch.path()).fails(1);
        assert!(!theirs.stderr.contains("hint:") && !theirs.stderr.contains("did you mean"), "{theirs:?}");
    }
    let out = own(&["convert", "--progress", "json", "disk", "o"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.ends_with("\nhint: a form of progress follows '=': --progress=json\n"), "{out:?}");
    scratch.sh("qemu-img create -q -f qcow2 -b q -F qcow2 l && qemu-img rebase -u -b l -F qcow2 q");
    for args in [&["resize", "--shrink", "q", "-1K"][..], &["resize", "q", "2M"]] {
        let out = own(args).dir(scratch.path()).fails(1);
        assert!(out.stderr.contains("hint: its backing files lead back to it: they are an infinite loop\n"), "{out:?}");
    }
    assert!(own(&["info", "./a:b"]).dir(scratch.path()).ok().stdout.contains("image: ./a:b"));
}

#[test]
fn the_holder_of_a_lock_is_named() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "a", "1M"]);
    let holder = Holder::new(scratch.path(), &["-f", "qcow2", "a"]);
    let out = own(&["resize", "a", "2M"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains(&format!("hint: it is held by 'qemu-io', process {}\n", holder.pid())), "{out:?}");
    drop(holder);
}

#[test]
fn help_is_a_command_of_vimg_alone() {
    let all = own(&["--help"]).ok().stdout;
    assert_eq!(own(&["help"]).ok().stdout, all);
    assert_eq!(own(&["help", "resize"]).ok().stdout, own(&["resize", "--help"]).ok().stdout);
    assert!(own(&["help", "resise"]).fails(1).stderr.contains("did you mean 'resize'?"));
    for program in [vimg(&["help"]), judge(&["help"])] {
        assert!(program.fails(1).stderr.starts_with("qemu-img: Command not found: help\n"));
    }
}

#[test]
fn a_raw_image_with_the_name_of_another_format_is_warned_of() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vmdk", "a.vmdk", "1M"]);
    let said = |name: &str, option: &str, format: &str| {
        format!(
            "vimg: warning: '{name}' will be raw: {option} {format} makes it {format}, {option} raw ends this warning\n"
        )
    };
    let run = |args: &[&str]| own(args).dir(scratch.path()).ok().stderr;
    assert_eq!(run(&["convert", "a.vmdk", "b.qcow2"]), said("b.qcow2", "-O", "qcow2"));
    assert_eq!(run(&["create", "d.VHD", "1M"]), said("d.VHD", "-f", "vpc"));
    assert_eq!(run(&["dd", "if=a.vmdk", "of=b.qcow2"]), said("b.qcow2", "-O", "qcow2"));
    for quiet in [
        &["convert", "-O", "raw", "a.vmdk", "b.qcow2"][..],
        &["convert", "-O", "qcow2", "a.vmdk", "b.qcow2"],
        &["dd", "-O", "raw", "if=a.vmdk", "of=b.qcow2"],
        &["dd", "if=a.vmdk", "of=b.img"],
        &["convert", "a.vmdk", "b.img"],
        &["convert", "a.vmdk", "b"],
        &["create", "d.raw", "1M"],
        &["create", "-f", "raw", "d.vmdk", "1M"],
    ] {
        assert_eq!(run(quiet), "", "{quiet:?}");
    }
    assert_eq!(vimg(&["convert", "a.vmdk", "b.qcow2"]).dir(scratch.path()).ok().stderr, "");
    assert!(judge(&["info", "-f", "raw", "b.qcow2"]).dir(scratch.path()).ok().stdout.contains("file format: raw"));
}

#[test]
fn info_shows_several_images() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a 1M && qemu-img create -q -f qcow2 -b a -F qcow2 b && truncate -s 1M c");
    let run = |args: &[&str]| own(args).dir(scratch.path()).run();
    let one = |name: &str| scratch.judge(&["info", name]).stdout;
    assert_eq!(run(&["info", "a", "b", "c"]).stdout, [one("a"), one("b"), one("c")].join("\n"));
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let alone = |name: &str| json(&scratch.judge(&["info", "--output=json", name]).stdout);
    let both = run(&["info", "--output=json", "a", "c"]).stdout;
    assert_eq!(json(&both), serde_json::Value::Array(vec![alone("a"), alone("c")]));
    let chains = json(&run(&["info", "--output=json", "--backing-chain", "b", "a"]).stdout);
    assert_eq!((chains[0][1]["filename"].as_str(), chains[1].as_array().map(Vec::len)), (Some("a"), Some(1)));
    // What cannot be shown keeps no other from being shown.
    let out = run(&["info", "a", "nowhere", "c"]);
    assert_eq!((out.code, out.stdout), (Some(1), [one("a"), one("c")].join("\n")));
    assert!(out.stderr.contains("Could not open 'nowhere'"), "{}", out.stderr);
    let told = json(&run(&["info", "--output=json", "a", "nowhere", "c"]).stdout);
    assert_eq!((&told[0], &told[2]), (&alone("a"), &alone("c")));
    let failed = &told[1];
    assert_eq!((&failed["filename"], &failed["error"]["kind"]), (&"nowhere".into(), &"not-found".into()));
    assert!(vimg(&["info", "a", "c"]).dir(scratch.path()).fails(1).stderr.contains("Expecting one image file name"));
}

/// Runs `convert -p` on a terminal with so many columns; what it showed.
fn bar(scratch: &Scratch, term: &str, columns: u16) -> String {
    bar_of(scratch, vimg_path().to_str().unwrap(), "vimg", term, columns)
}

/// The same of that program, called so.
fn bar_of(scratch: &Scratch, program: &str, name: &str, term: &str, columns: u16) -> String {
    let script = r#"
import fcntl, os, pty, struct, sys, termios
pid, fd = pty.fork()
if pid == 0:
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, int(sys.argv[2]), 0, 0))
    os.environ['TERM'] = sys.argv[1]
    os.execvp(sys.argv[3], [sys.argv[4], 'convert', '-p', '-f', 'raw', '-O', 'raw', 'a', 'b'])
shown = b''
while True:
    try:
        piece = os.read(fd, 4096)
    except OSError:
        break
    if not piece:
        break
    shown += piece
assert os.waitpid(pid, 0)[1] == 0
sys.stdout.write(shown.decode())
"#;
    let args = ["-c", script, term, &columns.to_string(), program, name];
    plain("python3", &args).dir(scratch.path()).ok().stdout
}

/// What stands before the first report, and behind the last one: those between come as the work goes.
fn ends(shown: &str) -> (&str, &str) {
    (shown.split_once('\r').unwrap().0, &shown[shown.rfind("    (").unwrap()..])
}

#[test]
fn progress_suits_the_terminal() {
    let scratch = Scratch::new();
    fs::write(scratch.file("a"), vec![7; 3 << 20]).unwrap();
    // Where nothing can be drawn over, in lines that no drawing is needed for.
    let dumb = bar(&scratch, "dumb", 80);
    assert!(dumb.contains("(100.00/100%)") && !dumb.contains('\x1b'), "{dumb:?}");
    assert!(bar(&scratch, "", 80).contains("(100.00/100%)"));
    // Nor where a program reads it that expects qemu-img.
    let named = bar_of(&scratch, vimg_path().to_str().unwrap(), "qemu-img", "xterm", 80);
    let theirs = bar_of(&scratch, "qemu-img", "qemu-img", "xterm", 80);
    assert_eq!(ends(&named), ends(&theirs));
    let drawn = bar(&scratch, "xterm", 80);
    assert!(drawn.contains("3.00 MiB") && drawn.ends_with("\n"), "{drawn:?}");
    let last = |shown: &str| {
        let line = shown.rsplit('\r').find(|line| line.contains('%')).unwrap().to_owned();
        let mut text = String::new();
        let mut escape = false;
        for c in line.chars() {
            match c {
                '\x1b' => escape = true,
                'A'..='Z' | 'a'..='z' if escape => escape = false,
                '\n' => {}
                _ if escape => {}
                c => text.push(c),
            }
        }
        text
    };
    let wide = last(&bar(&scratch, "xterm", 100));
    assert!(wide.contains("100%") && wide.contains("3.00 MiB of 3.00 MiB") && !wide.contains("left"), "{wide:?}");
    for columns in [60, 30, 12] {
        let narrow = last(&bar(&scratch, "xterm", columns));
        assert!(narrow.contains("100%") && !narrow.contains("left"), "{narrow:?}");
        assert!(narrow.trim_end().chars().count() <= usize::from(columns), "{narrow:?}");
    }
}

#[test]
fn help_is_short_or_long() {
    let (short, long) = (own(&["convert", "-h"]).ok().stdout, own(&["convert", "--help"]).ok().stdout);
    assert!(short.lines().count() < long.lines().count() && !short.contains("Example:"), "{short}");
    assert!(long.contains("\nExample:\n  vimg convert "), "{long}");
    for text in [&short, &long] {
        for group in ["Operands", "Image", "Target", "How it is done", "What is shown", "Images that are not trusted"] {
            assert!(text.contains(&format!("\n{group}:\n")), "{group}: {text}");
        }
        for option in ["-O, --target-format FMT", "--verify", "--untrusted", "-p, --progress"] {
            assert!(text.contains(&format!("\n  {option}")), "{option}: {text}");
        }
    }
    // The synopsis has what is our own, and each text is one that says something alone.
    for option in ["[--verify]", "[--digest KIND]", "[--target-passphrase-file FILE]", "[--allow DIR_OR_FILE]"] {
        assert!(short.contains(option) && long.contains(option), "{option}: {long}");
    }
    assert!(!short.contains("the same for the target") && !short.contains(" with --untrusted\n"), "{short}");
    assert!(own(&["info", "-h"]).ok().stdout.contains("json] FILENAME [FILENAME2...]\n"));
    assert!(own(&["rebase", "-h"]).ok().stdout.contains("-b BACKING_FILENAME [-F BACKING_FMT]"));
    // Called qemu-img it is the one that it was.
    let theirs = vimg(&["convert", "-h"]).ok().stdout;
    assert!(
        theirs.contains("\nArguments:\n") && !theirs.contains("--verify") && !theirs.contains("Example"),
        "{theirs}"
    );
    assert_eq!(theirs, vimg(&["convert", "--help"]).ok().stdout);
    // So has the whole program.
    let (short, long) = (own(&["-h"]).ok().stdout, own(&["--help"]).ok().stdout);
    for text in [&short, &long] {
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for line in ["\nCommands:\n", "\n  help      Print the help", "\n  convert   Copy", "\n  --untrusted"] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
    for line in ["\nExamples:\n", "qcow2 qcow", "default: no limit"] {
        assert!(long.contains(line) && !short.contains(line), "{line}: {short}{long}");
    }
    assert!(vimg(&["-h"]).ok().stdout == vimg(&["--help"]).ok().stdout);
}

/// What an option does where it is not given is said of each that takes a value, but for those without which nothing is
/// done.
#[test]
fn the_long_help_of_a_command_is_whole() {
    let none = ["--object", "--image-opts", "--expect-digest", "-F, --backing-format", "-b, --backing", "-s, --size"];
    let deeds =
        ["--merge", "-a, --apply", "-c, --create", "-d, --delete", "-o, --options", "-o, --target-format-options"];
    let commands = own(&["--help"]).ok().stdout;
    let commands = commands.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names: Vec<&str> = commands.map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(names.len(), 17);
    for name in names.into_iter().chain(["generate"]) {
        let help = own(&[name, "--help"]).ok().stdout;
        assert!(help.starts_with(|c: char| c.is_ascii_uppercase()) && help.contains(".  Usage:\n\n  vimg "), "{help}");
        assert!(help.contains(&format!("\nExample:\n  vimg {name}")), "{help}");
        for text in [&help, &own(&[name, "-h"]).ok().stdout] {
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        }
        let mut option = "";
        let mut said = true;
        for line in help.lines().chain(["  --end X"]) {
            if line.starts_with("  -") {
                let excused = none.iter().chain(&deeds).any(|name| option.starts_with(name));
                assert!(said || excused, "{name} {option}: {help}");
                option = line.trim();
                said = option.split(", ").last().unwrap().split_whitespace().count() < 2;
            }
            said |=
                ["not given", "default", "without it", "the same", "does not say", "in the same way", "not the next"]
                    .iter()
                    .any(|word| line.contains(word));
        }
    }
}

#[test]
fn an_error_names_its_file() {
    let scratch = Scratch::new();
    scratch.sh("truncate -s 1M a.raw");
    let size = ["resize", "-f", "raw", "a.raw", "7E"];
    assert_eq!(own(&size).dir(scratch.path()).fails(1).stderr, "vimg: a.raw: Could not resize file: File too large\n");
    for program in [vimg(&size), judge(&size)] {
        let out = program.dir(scratch.path()).fails(1);
        assert_eq!(out.stderr, "qemu-img: Could not resize file: File too large\n");
    }
    let told = own(&["resize", "--output=json", "-f", "raw", "a.raw", "7E"]).dir(scratch.path()).fails(1);
    let told: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!((&told["error"]["file"], &told["error"]["kind"]), (&"a.raw".into(), &"too-large".into()));
}
