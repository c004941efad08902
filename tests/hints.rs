//! What vimg says beyond the reference where it is called by its own name: what a user can do about an error, what a
//! new user stumbles over. Called `qemu-img` it says nothing of the kind.

use std::fs;

use crate::common::run::Holder;
use crate::common::{Scratch, judge, own, plain, vimg, vimg_path};

#[test]
fn an_error_says_what_can_be_done_about_it() {
    let scratch = Scratch::new();
    scratch.sh("truncate -s 1M disk; cp disk a:b");
    for (args, hint) in [
        (&["info", "a:b"][..], "a file of that name is written './a:b'"),
        (&["convert", "-O", "vhd", "disk", "o"], "did you mean 'vpc'?"),
        (&["convert", "-O", "qcwo2", "disk", "o"], "did you mean 'qcow2'?"),
        (&["info", "-f", "vmkd", "disk"], "did you mean 'vmdk'?"),
        (&["create", "-f", "qcow2", "-o", "cluster_sise=64k", "o", "1M"], "did you mean 'cluster_size'?"),
        (&["create", "-f", "qcow2", "-o", "wibble=64k", "o", "1M"], "'-o help' lists the options of the format"),
        (&["covnert", "disk", "o"], "did you mean 'convert'?"),
        (&["info", "--outptu=json", "disk"], "did you mean '--output'?"),
    ] {
        let out = own(args).dir(scratch.path()).fails(1);
        assert!(out.stderr.ends_with(&format!("\nhint: {hint}\n")), "{out:?}");
        let theirs = vimg(args).dir(scratch.path()).fails(1);
        assert!(!theirs.stderr.contains("hint"), "{theirs:?}");
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
    for quiet in [
        &["convert", "-O", "raw", "a.vmdk", "b.qcow2"][..],
        &["convert", "-O", "qcow2", "a.vmdk", "b.qcow2"],
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
    assert!(vimg(&["info", "a", "c"]).dir(scratch.path()).fails(1).stderr.contains("Expecting one image file name"));
}

/// Runs `convert -p` on a terminal with so many columns; what it showed.
fn bar(scratch: &Scratch, term: &str, columns: u16) -> String {
    let script = r#"
import fcntl, os, pty, struct, sys, termios
pid, fd = pty.fork()
if pid == 0:
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, int(sys.argv[2]), 0, 0))
    os.environ['TERM'] = sys.argv[1]
    os.execv(sys.argv[3], ['vimg', 'convert', '-p', '-O', 'raw', 'a', 'b'])
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
    let program = vimg_path();
    let args = ["-c", script, term, &columns.to_string(), program.to_str().unwrap()];
    plain("python3", &args).dir(scratch.path()).ok().stdout
}

#[test]
fn progress_suits_the_terminal() {
    let scratch = Scratch::new();
    fs::write(scratch.file("a"), vec![7; 3 << 20]).unwrap();
    // Where nothing can be drawn over, in lines that no drawing is needed for.
    let dumb = bar(&scratch, "dumb", 80);
    assert!(dumb.contains("(100.00/100%)") && !dumb.contains('\x1b'), "{dumb:?}");
    assert!(bar(&scratch, "", 80).contains("(100.00/100%)"));
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

/// Packages get completions and manual pages from the tables that the program itself goes by.
#[test]
fn completions_and_pages_are_made() {
    let scratch = Scratch::new();
    own(&["generate", "out"]).dir(scratch.path()).ok();
    let complete = |words: &[&str]| {
        let last = words.last().unwrap();
        let before = words[words.len() - 2];
        let line = format!(
            "source out/completions/vimg; COMP_WORDS=({}); COMP_CWORD={}; _vimg vimg '{last}' '{before}'; echo \"${{COMPREPLY[*]}}\"",
            words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" "),
            words.len() - 1,
        );
        let out = plain("bash", &["-c", &line]).dir(scratch.path()).ok().stdout;
        out.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(complete(&["vimg", "convert", "-O", "q"]), ["qcow", "qcow2", "qed"]);
    assert_eq!(complete(&["vimg", "comp"]), ["compare"]);
    assert_eq!(complete(&["vimg", "create", "-o", "cluster_"]), ["cluster_size"]);
    assert!(complete(&["vimg", "convert", "--ver"]).contains(&"--verify".to_owned()));
    for file in ["_vimg", "vimg.fish"] {
        assert!(fs::read_to_string(scratch.file("out/completions").join(file)).unwrap().contains("checksum"), "{file}");
    }
    let page = |name: &str| fs::read_to_string(scratch.file("out/man").join(name)).unwrap();
    let convert = page("vimg-convert.1");
    assert!(convert.contains(".TH") && convert.contains("vimg convert \\-p"), "{convert}");
    assert_eq!(fs::read_dir(scratch.file("out/man")).unwrap().count(), 17);
    assert!(!page("vimg.1").contains("generate"));
    // It is a tool of packagers: help does not list it, and qemu-img has none.
    assert!(!own(&["--help"]).ok().stdout.contains("generate"));
    assert!(vimg(&["generate", "out"]).dir(scratch.path()).fails(1).stderr.contains("Command not found"));
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
    assert!(short.lines().all(|line| line.chars().count() <= 100), "{short}");
    // Called qemu-img it is the one that it was.
    let theirs = vimg(&["convert", "-h"]).ok().stdout;
    assert!(
        theirs.contains("\nArguments:\n") && !theirs.contains("--verify") && !theirs.contains("Example"),
        "{theirs}"
    );
    assert_eq!(theirs, vimg(&["convert", "--help"]).ok().stdout);
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
