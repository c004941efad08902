//! Encrypted images, and how a passphrase comes to vimg: secrets, files, the terminal. The judges of what is encrypted
//! are qemu-img and qemu-io.

use std::fs;

use crate::common::trace::{Ended, killed_at};
use crate::common::{Output, Run, Scratch, judge, need_root, pattern, plain, sh, vimg, vimg_path, write_pattern};

/// Types answers on a terminal of its own: `answers` one after the other, each at a prompt (a line that ends in `: `);
/// `^C` is that key, `TERM` that signal. Prints what the terminal showed, the exit status, whether a core file was written, and whether
/// the terminal's echo is on afterwards.
const TERMINAL: &str = r#"
import os, pty, sys, termios
answers = sys.argv[1].split(',') if sys.argv[1] else []
argv = sys.argv[2:]
pid, fd = pty.fork()
if pid == 0:
    import resource, signal
    # Whoever started the tests may ignore these: a shell does for what runs in the background.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    os.execvp(argv[0], argv)
shown, since = b'', b''
while True:
    try:
        piece = os.read(fd, 4096)
    except OSError:
        break
    if not piece:
        break
    shown, since = shown + piece, since + piece
    # An error may come in pieces that end so too.
    asked = b'assword for ' in since or b'Once more, for ' in since
    if since.endswith(b': ') and asked and answers:
        answer, since = answers.pop(0), b''
        if answer == 'TERM':
            os.kill(pid, 15)
            continue
        os.write(fd, {'^C': b'\x03', '^\\': b'\x1c', '^D': b'\x04'}.get(answer, answer.encode() + b'\n'))
status = os.waitpid(pid, 0)[1]
echo = bool(termios.tcgetattr(fd)[3] & termios.ECHO)
sys.stdout.write(shown.decode().replace('\r\n', '\n'))
core = os.WCOREDUMP(status) if os.WIFSIGNALED(status) else False
how = 'signal %d' % os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'exit %d' % os.WEXITSTATUS(status)
sys.stdout.write('\n[%s, core %s, echo %s]\n' % (how, core, echo))
"#;

fn on_terminal(scratch: &Scratch, answers: &str, args: &[&str]) -> String {
    on_terminal_of(scratch, vimg_path().to_str().unwrap(), answers, args)
}

/// The same of that program.
fn on_terminal_of(scratch: &Scratch, program: &str, answers: &str, args: &[&str]) -> String {
    let mut all = vec!["-c", TERMINAL, answers, program];
    all.extend(args);
    plain("python3", &all).dir(scratch.path()).ok().stdout
}

fn disk(scratch: &Scratch) {
    write_pattern(&scratch.file("disk"), 0, 9, 300_000);
    scratch.sh("truncate -s 1M disk");
}

/// What the judge reads of an encrypted image.
fn assert_reads(scratch: &Scratch, image: &str, format: &str, passphrase: &str, model: &str) {
    fs::write(scratch.file("judges-secret"), passphrase).unwrap();
    let name = format!("driver={format},encrypt.key-secret=s,file.filename={image}");
    let args = ["convert", "--object", "secret,id=s,file=judges-secret", "--image-opts", &name, "-O", "raw", "read"];
    scratch.judge(&args);
    scratch.assert_same_content("raw", "read", "raw", model);
}

fn vimg_in(scratch: &Scratch, args: &[&str]) -> Output {
    plain(vimg_path().to_str().unwrap(), args).dir(scratch.path()).run()
}

#[test]
fn a_terminal_is_asked_for_passphrases() {
    let scratch = Scratch::new();
    disk(&scratch);
    let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", "encryption=on", "disk", "a.qcow2"];
    let said = on_terminal(&scratch, "open sesame,open sesame", &convert);
    let expected = "Password for 'a.qcow2': \nOnce more, for 'a.qcow2': \n\n[exit 0, core False, echo True]\n";
    assert_eq!(said, expected);
    assert_reads(&scratch, "a.qcow2", "qcow2", "open sesame", "disk");

    let said = on_terminal(&scratch, "open sesame", &["convert", "-f", "qcow2", "a.qcow2", "b"]);
    assert_eq!(said, "Password for 'a.qcow2': \n\n[exit 0, core False, echo True]\n");
    scratch.assert_same_content("raw", "b", "raw", "disk");

    let said = on_terminal(
        &scratch,
        "open sesame,new,new",
        &["convert", "-O", "qcow", "-o", "encrypt.format=aes", "a.qcow2", "c"],
    );
    assert!(said.contains("Password for 'a.qcow2': \nPassword for 'c': \nOnce more, for 'c': \n"), "{said}");
    assert_reads(&scratch, "c", "qcow", "new", "disk");

    // What would be made in the place of what is read is asked for its own, and the image is in use.
    let args = ["convert", "-O", "qcow", "-o", "encrypt.format=aes", "c", "c"];
    let said = on_terminal(&scratch, "new,other,other", &args);
    assert!(said.contains("Password for 'c': \nPassword for 'c': \nOnce more, for 'c': \n"), "{said}");
    assert!(said.contains("lock"), "{said}");
    assert_reads(&scratch, "c", "qcow", "new", "disk");

    let said = on_terminal(&scratch, "open sesame", &["resize", "-f", "qcow2", "a.qcow2", "2M"]);
    assert!(said.contains("Password for 'a.qcow2': \nImage resized."), "{said}");

    let said = on_terminal(&scratch, "x,x", &["create", "-q", "-f", "qcow2", "-o", "encryption=on", "d", "1M"]);
    assert!(said.starts_with("Password for 'd': \nOnce more, for 'd': \n\n[exit 0"), "{said}");
}

/// Under the reference's name nobody is asked: what else would wait for an answer that never comes.
#[test]
fn qemu_img_asks_for_nothing() {
    let scratch = Scratch::new();
    disk(&scratch);
    fs::create_dir(scratch.file("bin")).unwrap();
    std::os::unix::fs::symlink(vimg_path(), scratch.file("bin/qemu-img")).unwrap();
    let ours = scratch.file("bin/qemu-img");
    let encryption = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let secret = "secret,id=s,data=abc";
    scratch.judge(&["create", "-q", "--object", secret, "-f", "qcow2", "-o", encryption, "a", "1M"]);
    for args in [
        &["check", "a"][..],
        &["map", "a"],
        &["convert", "-O", "raw", "a", "b"],
        &["convert", "-f", "raw", "-O", "qcow2", "-o", "encrypt.format=luks", "disk", "c"],
        &["create", "-f", "luks", "d", "1M"],
        &["resize", "a", "2M"],
        &["compare", "a", "a"],
        &["amend", "--object", secret, "-f", "qcow2", "-o", "encrypt.state=active", "a"],
    ] {
        let [theirs, ours] =
            ["qemu-img", ours.to_str().unwrap()].map(|program| on_terminal_of(&scratch, program, "no", args));
        assert_eq!(ours, theirs, "{args:?}");
        assert!(ours.contains("exit ") && !ours.contains("Password for"), "{ours}");
    }
}

/// What goes to a pipe is opened again on its way, to find out where its data lie: with its own passphrase.
#[test]
fn what_goes_to_a_pipe_has_a_passphrase_of_its_own() {
    let scratch = Scratch::new();
    disk(&scratch);
    for (file, text) in [("one", "first"), ("two", "second")] {
        fs::write(scratch.file(file), text).unwrap();
    }
    let program = vimg_path();
    let program = program.display();
    scratch.sh(&format!("'{program}' convert -O luks -o iter-time=10 --target-passphrase-file one disk a.luks"));
    for (format, options, key) in [
        ("luks", "iter-time=10", "key-secret"),
        ("qcow2", "encrypt.format=luks,encrypt.iter-time=10", "encrypt.key-secret"),
    ] {
        scratch.sh(&format!(
            "'{program}' convert -f luks -O {format} -o {options} --passphrase-file one --target-passphrase-file two \
             a.luks /dev/stdout | cat >piped"
        ));
        let name = format!("driver={format},{key}=s,file.filename=piped");
        scratch.judge(&["convert", "--object", "secret,id=s,file=two", "--image-opts", &name, "-O", "raw", "read"]);
        scratch.assert_same_content("raw", "read", "raw", "disk");
    }
}

#[test]
fn nothing_is_made_where_the_answer_is_none() {
    let scratch = Scratch::new();
    let create = ["create", "-q", "-f", "qcow2", "-o", "encryption=on", "a", "1M"];
    let said = on_terminal(&scratch, "one,two", &create);
    assert!(said.contains("vimg: a: The two passwords for 'a' differ\n"), "{said}");
    assert!(said.ends_with("[exit 1, core False, echo True]\n"), "{said}");
    let said = on_terminal(&scratch, "^D", &create);
    assert!(said.contains("No password was typed") && said.ends_with("[exit 1, core False, echo True]\n"), "{said}");
    let said = on_terminal(&scratch, "^C", &create);
    assert!(said.ends_with("[signal 2, core False, echo True]\n"), "{said}");
    assert!(!scratch.file("a").exists());
}

/// Whichever thread hears the signal: there are others in most commands, and in those that change an image one that
/// waits for signals.
#[test]
fn a_signal_at_a_prompt_ends_it_and_gives_the_terminal_back() {
    let scratch = Scratch::new();
    disk(&scratch);
    fs::write(scratch.file("key"), "abc").unwrap();
    let made = ["--target-passphrase-file", "key", "disk", "a"];
    scratch.vimg(
        &[&["convert", "-f", "raw", "-O", "qcow2", "-o", "encrypt.format=luks,encrypt.iter-time=1"], &made[..]]
            .concat(),
    );
    let whole = fs::read(scratch.file("a")).unwrap();
    let (snapshot, amend) =
        (["snapshot", "-c", "s", "a"], ["amend", "-o", "encrypt.state=active,encrypt.iter-time=1", "a"]);
    for (before, args) in [
        ("", &["convert", "a", "b"][..]),
        ("", &["convert", "-f", "raw", "-O", "luks", "disk", "b"]),
        ("", &["compare", "a", "disk"]),
        ("", &["resize", "a", "2M"]),
        ("", &["resize", "--preallocation=full", "a", "2M"]),
        ("", &snapshot),
        ("", &["commit", "a"]),
        ("", &["bitmap", "--add", "a", "b"]),
        ("", &amend),
        ("abc,", &amend),
        ("abc,new,", &amend),
        ("", &["bench", "-c", "1", "a"]),
        ("", &["info", "a"]),
    ] {
        let asks = args[0] != "info";
        for (key, number) in [("^C", 2), ("TERM", 15), ("^\\", 3)] {
            let said = on_terminal(&scratch, &format!("{before}{key}"), args);
            let ends =
                if asks { format!("[signal {number}, core False, echo True]\n") } else { "echo True]\n".to_owned() };
            assert!(said.ends_with(&ends) && said.matches("assword for").count() <= 2, "{args:?} {key}: {said}");
            assert!(!scratch.file("b").exists() && fs::read(scratch.file("a")).unwrap() == whole, "{args:?} {key}");
        }
    }
}

#[test]
fn no_core_file_has_a_passphrase() {
    let scratch = Scratch::new();
    let create = ["create", "-q", "-f", "qcow2", "-o", "encryption=on", "a", "1M"];
    let said = on_terminal(&scratch, "secret,^\\", &create);
    assert!(said.ends_with("[signal 3, core False, echo True]\n"), "{said}");
}

#[test]
fn passphrases_come_from_files() {
    let scratch = Scratch::new();
    disk(&scratch);
    fs::write(scratch.file("old"), "with a line end\n").unwrap();
    fs::write(scratch.file("new"), "without").unwrap();
    let convert = |args: &[&str]| scratch.vimg(&[&["convert"], args].concat());
    convert(&["-f", "raw", "-O", "qcow2", "-o", "encryption=on", "--target-passphrase-file", "old", "disk", "a"]);
    assert_reads(&scratch, "a", "qcow2", "with a line end", "disk");
    let both = ["--passphrase-file", "old", "--target-passphrase-file", "new"];
    convert(&[&both[..], &["-O", "qcow", "-o", "encrypt.format=aes", "a", "b"]].concat());
    assert_reads(&scratch, "b", "qcow", "without", "disk");
    // The image that is there is the target.
    convert(&[&both[..], &["-n", "-O", "qcow", "a", "b"]].concat());
    assert_reads(&scratch, "b", "qcow", "without", "disk");
    scratch.vimg(&["resize", "--passphrase-file", "new", "-f", "qcow", "b", "2M"]);
    scratch.vimg(&["create", "-q", "-f", "qcow2", "--passphrase-file", "new", "-o", "encryption=on", "c", "1M"]);

    let out =
        vimg_in(&scratch, &["convert", "--passphrase-file", "old", "-O", "qcow2", "-o", "encryption=on", "a", "d"]);
    assert_eq!(
        out.stderr,
        "vimg: d: error while converting qcow2: Parameter 'encrypt.key-secret' is required for cipher\n"
    );
    let out = vimg_in(&scratch, &["resize", "--passphrase-file", "nothing", "a", "2M"]);
    let error = "vimg: Could not read the passphrase file 'nothing': No such file or directory\n";
    assert_eq!((out.code, out.stderr.as_str()), (Some(1), error));
    let out = vimg_in(&scratch, &["resize", "--passphrase-file", "/dev/zero", "a", "2M"]);
    let error = "vimg: Could not read the passphrase file '/dev/zero': it holds more than 1048576 bytes\n";
    assert_eq!((out.code, out.stderr.as_str()), (Some(1), error));
}

/// A comma that is not doubled makes a word of its own of what follows it.
#[test]
fn words_of_a_secret_are_in_no_error() {
    let scratch = Scratch::new();
    for object in [
        "--object=secret,id=s,data=my,geheim",
        "--object=secret,id=s,data=my,geheim=x",
        "--object=secret,id=s,data=my, geheim=x",
        "--object=secret,id=s,data:geheim",
        "--object=secret,id=s,data=x,format=geheim",
        "--object=data:geheim",
        "--object=geheim",
        r#"--object={"qom-type":"secret","id":"s","data":geheim}"#,
        r#"--object={"qom-type":"secret","id":"s","data":"geheim}"#,
        r#"--object={"qom-type":"secret","id":"s","data":"\ugeheim"}"#,
        r#"--object={'qom-type':'secret','id':'s','data':'my' geheim}"#,
        r#"--object={"qom-type":"geheim","id":"s"}"#,
        "--objekt=secret,id=s,data=geheim",
    ] {
        let ours = vimg_in(&scratch, &["info", object, "a"]);
        assert_eq!(ours.code, Some(1), "{ours:?}");
        assert!(!ours.stderr.contains("geheim") && !ours.stderr.contains("geh"), "{}", ours.stderr);
        // By the other name it says what the reference says.
        let [ours, theirs] = [vimg(&["info", object, "a"]), judge(&["info", object, "a"])].map(|run| run.run().stderr);
        let first = |text: &str| text.lines().next().unwrap_or_default().to_owned();
        assert_eq!(first(&ours), first(&theirs), "{object}");
    }
    let out = vimg_in(&scratch, &["info", "--object", "secret,id=s,data=my,geheim", "a"]);
    assert_eq!(out.stderr, "vimg: Part 4 of an object has no '=': a comma in a value is written twice\n");
}

/// Starts a program that is to read a secret from a pipe, and ends it there so that a core file is written, if one may be.
const AT_THE_SECRET: &str = r#"
import os, resource, signal, subprocess, sys
os.mkfifo('secret')
def cores():
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
program = subprocess.Popen(sys.argv[1:], preexec_fn=cores)
pipe = os.open('secret', os.O_WRONLY)
program.send_signal(signal.SIGQUIT)
status = os.waitpid(program.pid, 0)[1]
print(os.WIFSIGNALED(status), os.WCOREDUMP(status))
"#;

#[test]
fn no_core_file_is_written_from_before_a_secret_is_read() {
    let program = vimg_path();
    for secret in [&["--object", "secret,id=s,file=secret"][..], &["--passphrase-file", "secret"]] {
        let scratch = Scratch::new();
        let args = [&["-c", AT_THE_SECRET, program.to_str().unwrap(), "convert"], secret, &["a", "b"]].concat();
        assert_eq!(plain("python3", &args).dir(scratch.path()).ok().stdout, "True False\n");
    }
}

#[test]
fn every_command_takes_passphrases_from_files() {
    let scratch = Scratch::new();
    disk(&scratch);
    fs::write(scratch.file("key"), "open sesame\n").unwrap();
    fs::write(scratch.file("new"), "close sesame\n").unwrap();
    let make = |format: &str, options: &str, name: &str| {
        let args =
            ["convert", "-f", "raw", "-O", format, "-o", options, "--target-passphrase-file", "key", "disk", name];
        scratch.vimg(&args);
    };
    make("qcow2", "encrypt.format=luks,encrypt.iter-time=0", "a");
    make("luks", "iter-time=0", "b");
    let measure = |more: &[&str]| scratch.vimg(&[&["measure", "-O", "qcow2"], more].concat()).stdout;
    let named =
        ["--object", "secret,id=s,data=open sesame", "--image-opts", "driver=luks,key-secret=s,file.filename=b"];
    assert_eq!(measure(&["--passphrase-file", "key", "-f", "luks", "b"]), measure(&named));
    scratch.vimg(&["dd", "--passphrase-file", "key", "--target-passphrase-file", "new", "-O", "luks", "if=a", "of=c"]);
    scratch.vimg(&["compare", "--passphrase-file", "new", "c", "disk"]);
    // What is read back opens with the target's, be it new or not.
    for (format, options) in [("luks", "iter-time=0"), ("qcow2", "encrypt.format=luks,encrypt.iter-time=0")] {
        let proof = ["convert", "--verify", "--passphrase-file", "new", "--target-passphrase-file", "key"];
        scratch.vimg(&[&proof[..], &["-f", "luks", "-O", format, "-o", options, "c", "v"]].concat());
        scratch.vimg(&[&proof[..], &["-n", "-f", "luks", "-O", format, "c", "v"]].concat());
        scratch.vimg(&["compare", "--passphrase-file", "key", "v", "disk"]);
        scratch.sh("rm v");
    }

    // An image in an encrypted one.
    scratch.judge(&["create", "-q", "-f", "qcow2", "inner", "64M"]);
    scratch.vimg(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "luks",
        "-o",
        "iter-time=0",
        "--target-passphrase-file",
        "key",
        "inner",
        "d",
    ]);
    let inside = "driver=qcow2,file.driver=luks,file.file.filename=d";
    let said = scratch.vimg(&["map", "--passphrase-file", "key", "--output=json", "--image-opts", inside]).stdout;
    assert!(said.contains("67108864"), "{said}");

    for (name, prefix) in [("a", "encrypt."), ("b", "")] {
        let options = format!("{prefix}state=active,{prefix}iter-time=1");
        let amend = ["amend", "--passphrase-file", "key", "-o", &options, name];
        let refused = vimg_in(&scratch, &amend).stderr;
        assert_eq!(refused, "vimg: 'new-secret' is required to activate a keyslot\n", "{name}");
        scratch.vimg(&[&amend[..], &["--new-passphrase-file", "new"]].concat());
        scratch.vimg(&["compare", "--passphrase-file", "new", name, "disk"]);
        let added = format!("{prefix}state=active,{prefix}iter-time=0");
        let said = on_terminal(&scratch, "open sesame,typed,typed", &["amend", "-o", &added, name]);
        let prompts = format!("Password for '{name}': \nNew password for '{name}': \nOnce more, for '{name}': \n");
        assert_eq!(said, format!("{prompts}\n[exit 0, core False, echo True]\n"));
        fs::write(scratch.file("typed"), "typed").unwrap();
        scratch.vimg(&["compare", "--passphrase-file", "typed", name, "disk"]);
        let said = on_terminal(&scratch, "open sesame,typed,other", &["amend", "-o", &added, name]);
        assert!(said.contains(&format!("The two passwords for '{name}' differ")), "{said}");
    }
}

#[test]
fn nothing_is_shown_of_a_map_before_its_error() {
    let scratch = Scratch::new();
    disk(&scratch);
    encrypt(&scratch, ours, "", "a");
    let image = format!("{KEYED}a");
    let args = [&["map"], &SECRET[..], &["--image-opts", &image]].concat();
    let out = vimg_in(&scratch, &args);
    let error = "vimg: File contains external, encrypted or compressed clusters.\n";
    assert_eq!((out.code, out.stdout.as_str(), out.stderr.as_str()), (Some(1), "", error));
    scratch.sh("truncate -s 1M empty");
    assert_eq!(vimg_in(&scratch, &["map", "-f", "raw", "empty"]).stdout.lines().count(), 1);
}

/// `qemu-img` takes no other passphrases than text.
#[test]
fn a_new_image_gets_no_passphrase_that_is_no_text() {
    let scratch = Scratch::new();
    disk(&scratch);
    for bytes in [&b"\xff\xfe"[..], b"a\0b"] {
        fs::write(scratch.file("key"), bytes).unwrap();
        for how in [
            &["create", "--passphrase-file", "key", "-f", "qcow2", "-o", "encrypt.format=luks", "a", "1M"][..],
            &["create", "--passphrase-file", "key", "-f", "luks", "a", "1M"],
            &["convert", "--target-passphrase-file", "key", "-O", "qcow", "-o", "encryption=on", "disk", "a"],
        ] {
            let out = vimg_in(&scratch, how);
            assert_eq!(out.code, Some(1), "{out:?}");
            assert!(out.stderr.contains("The passphrase for 'a' is not valid UTF-8 without NUL"), "{out:?}");
            assert!(!scratch.file("a").exists(), "{how:?}");
        }
    }
    // What other programs made with such a passphrase is read.
    fs::write(scratch.file("key"), b"\xff\xfe").unwrap();
    let args =
        ["luksFormat", "--type", "luks1", "--batch-mode", "--pbkdf-force-iterations", "1000", "--key-file", "key"];
    fs::write(scratch.file("b"), vec![0; 4 << 20]).unwrap();
    plain("cryptsetup", &[&args[..], &["b"]].concat()).dir(scratch.path()).ok();
    scratch.vimg(&["convert", "--passphrase-file", "key", "-f", "luks", "-O", "raw", "b", "c"]);
}

#[test]
fn own_options_are_shown_under_our_own_name_alone() {
    let scratch = Scratch::new();
    assert!(vimg_in(&scratch, &["convert", "--help"]).stdout.contains("--target-passphrase-file FILE"));
    assert!(!scratch.vimg(&["convert", "--help"]).stdout.contains("passphrase-file"));
    // And they do not stand in the way of what the reference's options are abbreviated to.
    disk(&scratch);
    scratch.vimg(&["convert", "--pa", "1", "-f", "raw", "disk", "b"]);
}

#[test]
fn each_layer_has_its_own_key() {
    let scratch = Scratch::new();
    disk(&scratch);
    let secrets = ["--object", "secret,id=s,data=abc", "--object", "secret,id=t,data=other"];
    let make = ["-f", "raw", "-O", "qcow2", "-o", "encryption=on,encrypt.key-secret=s", "disk", "a"];
    scratch.vimg(&[&["convert"], &secrets[..], &make].concat());
    let overlay = ["-q", "-f", "qcow", "-o", "encrypt.format=aes,encrypt.key-secret=t", "-b", "a", "-F", "qcow2", "b"];
    scratch.vimg(&[&["create"], &secrets[..], &overlay].concat());
    let image = "driver=qcow,encrypt.key-secret=t,backing.encrypt.key-secret=s,file.filename=b";
    scratch.vimg(&[&["convert"], &secrets[..], &["--image-opts", image, "c"]].concat());
    scratch.assert_same_content("raw", "c", "raw", "disk");
    // The target's layers, too.
    fs::write(scratch.file("key"), "abc").unwrap();
    let onto = ["-B", "a", "-F", "qcow2", "-O", "qcow2", "-o", "encryption=on,encrypt.key-secret=t", "disk", "d"];
    scratch.vimg(&[&["convert", "--passphrase-file", "key"], &secrets[..], &onto].concat());
    let image = "driver=qcow2,encrypt.key-secret=t,file.filename=d,backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=a";
    let args = ["--image-opts", image, "e"];
    judge(&[&["convert"], &secrets[..], &args].concat()).dir(scratch.path()).ok();
    scratch.assert_same_content("raw", "e", "raw", "disk");
}

const SECRET: [&str; 2] = ["--object", "secret,id=s,data=abc"];
const KEYED: &str = "driver=qcow2,encrypt.key-secret=s,file.filename=";

fn luks(more: &str) -> String {
    format!("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10{more}")
}

fn ours(args: &[&str]) -> Run {
    vimg(args)
}

fn theirs(args: &[&str]) -> Run {
    judge(args)
}

/// Makes the image `name` of `disk` by that program.
fn encrypt(scratch: &Scratch, by: fn(&[&str]) -> Run, more: &str, name: &str) {
    let options = luks(more);
    let args = ["-f", "raw", "-O", "qcow2", "-o", &options, "disk", name];
    by(&[&["convert"], &SECRET[..], &args].concat()).dir(scratch.path()).ok();
}

/// What that program reads of it.
fn assert_decrypts(scratch: &Scratch, by: fn(&[&str]) -> Run, name: &str) {
    let image = format!("{KEYED}{name}");
    by(&[&["convert"], &SECRET[..], &["--image-opts", &image, "-O", "raw", "plain"]].concat()).dir(scratch.path()).ok();
    scratch.assert_same_content("raw", "plain", "raw", "disk");
}

#[test]
fn each_reads_what_the_other_encrypts() {
    let scratch = Scratch::new();
    disk(&scratch);
    for more in [
        "",
        ",cluster_size=512",
        ",extended_l2=on",
        ",compat=0.10",
        ",data_file=data",
        ",data_file=data,data_file_raw=on",
        ",preallocation=metadata",
        ",preallocation=full",
        ",encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
        ",encrypt.cipher-alg=serpent-256,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha512",
        ",encrypt.cipher-alg=twofish-128,encrypt.cipher-mode=ctr,encrypt.hash-alg=ripemd160",
        ",encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=ecb,encrypt.hash-alg=sha1",
        ",encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=md5",
    ] {
        encrypt(&scratch, ours, more, "ours");
        assert_decrypts(&scratch, theirs, "ours");
        assert_decrypts(&scratch, ours, "ours");
        judge(&[&["check", "-q"], &SECRET[..], &["--image-opts", &format!("{KEYED}ours")]].concat())
            .dir(scratch.path())
            .ok();
        // The judge takes seconds to make a header, however short it is to last: it makes two, and fills what vimg has
        // made of the other kinds.
        if more.is_empty() || more.contains("essiv") {
            encrypt(&scratch, theirs, more, "theirs");
        } else {
            let size = fs::metadata(scratch.file("disk")).unwrap().len().to_string();
            let (options, image) = (luks(more), format!("{KEYED}theirs"));
            let create = ["-q", "-f", "qcow2", "-o", &options, "theirs", &size];
            vimg(&[&["create"], &SECRET[..], &create].concat()).dir(scratch.path()).ok();
            let fill = ["-n", "-f", "raw", "--target-image-opts", "disk", &image];
            judge(&[&["convert"], &SECRET[..], &fill].concat()).dir(scratch.path()).ok();
        }
        assert_decrypts(&scratch, ours, "theirs");
    }
}

/// The file but for what is drawn at random: the LUKS header's digest, salts, UUID and key material, and, which is
/// measured, its iterations.
fn without_chance(path: &std::path::Path) -> Vec<u8> {
    let mut bytes = fs::read(path).unwrap();
    let word = |at: usize| u32::from_be_bytes(*bytes[at..].first_chunk().unwrap()) as usize;
    let mut at = if word(4) < 3 { 72 } else { word(100) };
    while word(at) != 0x0537_be77 {
        at += 8 + word(at + 4).next_multiple_of(8);
    }
    let header = word(at + 12);
    let (material, length) = (header + word(header + 248) * 512, word(header + 108) * 4000);
    for range in [header + 112..header + 208, header + 212..header + 248, material..material + length] {
        bytes[range].fill(0xee);
    }
    bytes
}

#[test]
fn new_luks_images_are_laid_out_as_the_references() {
    let scratch = Scratch::new();
    for (more, size) in [
        ("", "1T"),
        (",cluster_size=512,refcount_bits=64,encrypt.ivgen-alg=plain,encrypt.ivgen-hash-alg=sha1", "3M"),
        (",cluster_size=2M", "1T"),
        (",cluster_size=4k,preallocation=metadata", "8M"),
        (",cluster_size=4k,preallocation=falloc", "8M"),
        (",compat=0.10,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc", "1M"),
        (",extended_l2=on,preallocation=metadata", "3M"),
        (",data_file=data", "1M"),
    ] {
        let options = luks(more);
        for (by, name) in [(ours as fn(&[&str]) -> Run, "ours"), (theirs, "theirs")] {
            let args = ["-q", "-f", "qcow2", "-o", &options, name, size];
            by(&[&["create"], &SECRET[..], &args].concat()).dir(scratch.path()).ok();
        }
        let same = without_chance(&scratch.file("ours")) == without_chance(&scratch.file("theirs"));
        assert!(same, "{more} {size}");
    }
}

#[test]
fn a_wrong_passphrase_changes_nothing() {
    let scratch = Scratch::new();
    disk(&scratch);
    encrypt(&scratch, ours, "", "a");
    let before = fs::read(scratch.file("a")).unwrap();
    let image = format!("{KEYED}a");
    let wrong = ["--object", "secret,id=s,data=abd", "--image-opts", &image];
    for args in [&[&["convert"], &wrong[..], &["b"]].concat(), &[&["resize"], &wrong[..], &["2M"]].concat()] {
        let out = vimg(args).dir(scratch.path()).fails(1);
        let error = format!("qemu-img: Could not open '{image}': Invalid password, cannot unlock any keyslot\n");
        assert_eq!(out.stderr, error);
    }
    assert!(fs::read(scratch.file("a")).unwrap() == before && !scratch.file("b").exists());
}

#[test]
fn resize_and_repair_keep_the_luks_header() {
    let scratch = Scratch::new();
    disk(&scratch);
    for more in [",cluster_size=512", ",extended_l2=on"] {
        encrypt(&scratch, theirs, more, "a");
        let image = format!("{KEYED}a");
        let resize = |args: &[&str]| {
            vimg(&[&["resize", "-q"], &SECRET[..], args].concat()).dir(scratch.path()).ok();
            judge(&[&["check", "-q"], &SECRET[..], &["--image-opts", &image]].concat()).dir(scratch.path()).ok();
        };
        // The L1 table moves, and moves back; the dirty bit has refcounts counted anew.
        resize(&["--image-opts", &image, "300M"]);
        let mut bytes = fs::read(scratch.file("a")).unwrap();
        bytes[79] |= 1;
        fs::write(scratch.file("a"), bytes).unwrap();
        resize(&["--shrink", "--image-opts", &image, "1M"]);
        resize(&["--preallocation=metadata", "--image-opts", &image, "3M"]);
        resize(&["--shrink", "--image-opts", &image, "1M"]);
        assert_decrypts(&scratch, theirs, "a");
        fs::copy(scratch.file("disk"), scratch.file("grown")).unwrap();
        resize(&["--preallocation=metadata", "--image-opts", &image, "3M"]);
        scratch.sh("truncate -s 3M grown");
        let args = ["--image-opts", &image, "-O", "raw", "plain"];
        judge(&[&["convert"], &SECRET[..], &args].concat()).dir(scratch.path()).ok();
        scratch.assert_same_content("raw", "plain", "raw", "grown");
    }
}

#[test]
fn snapshots_of_an_encrypted_image_are_read() {
    let scratch = Scratch::new();
    disk(&scratch);
    encrypt(&scratch, ours, "", "a");
    let image = format!("{KEYED}a");
    judge(&[&["snapshot", "-c", "one"], &SECRET[..], &["--image-opts", &image]].concat()).dir(scratch.path()).ok();
    let write = ["--image-opts", "-c", "write -P 7 0 1M", &image];
    plain("qemu-io", &[&SECRET[..], &write].concat()).dir(scratch.path()).ok();
    scratch.vimg(&[&["convert", "-l", "one"], &SECRET[..], &["--image-opts", &image, "-O", "raw", "b"]].concat());
    scratch.assert_same_content("raw", "b", "raw", "disk");
}

#[test]
fn a_kill_leaves_a_whole_encrypted_image_or_none() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk"), 0, 1, 6 << 20);
    fs::create_dir(scratch.file("in")).unwrap();
    let options = luks("");
    let args = ["-f", "raw", "-O", "qcow2", "-o", &options, "../disk", "new"];
    let args = [&["convert"], &SECRET[..], &args].concat();
    let Ended::Done(calls) = killed_at(&scratch.file("in"), &args, usize::MAX) else { panic!("nothing kills it") };
    fs::remove_file(scratch.file("in/new")).unwrap();
    let mut killed = 0;
    for point in 1..10 {
        killed += usize::from(killed_at(&scratch.file("in"), &args, calls * point / 10) == Ended::Killed);
        if scratch.file("in/new").exists() {
            assert_decrypts(&scratch, theirs, "in/new");
            fs::remove_file(scratch.file("in/new")).unwrap();
        }
        assert_eq!(fs::read_dir(scratch.file("in")).unwrap().count(), 0, "at {point} tenths");
    }
    assert!(killed >= 4, "only {killed} of 9 were killed in time");
}

#[test]
fn a_full_disk_leaves_nothing_of_an_encrypted_image() {
    need_root("mounting a small tmpfs");
    let scratch = Scratch::new();
    fs::write(scratch.file("disk"), pattern(1, 8 << 20)).unwrap();
    fs::create_dir(scratch.file("full")).unwrap();
    sh("mount -t tmpfs -o size=4m none full").dir(scratch.path()).ok();
    let options = luks("");
    let args = ["--no-space-check", "-f", "raw", "-O", "qcow2", "-o", &options, "disk", "full/new"];
    let out = vimg(&[&["convert"], &SECRET[..], &args].concat()).dir(scratch.path()).run();
    let left = fs::read_dir(scratch.file("full")).map(|dir| dir.count());
    sh("umount full").dir(scratch.path()).ok();
    assert_eq!((out.code, left.unwrap()), (Some(1), 0), "{out:?}");
    assert!(out.stderr.ends_with(": No space left on device\n"), "{}", out.stderr);
}
