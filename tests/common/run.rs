//! Running programs: output, exit code, time limit, memory limit.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::{need, vimg_path};

/// A program that has not ended by then hangs: far beyond what any test takes on a loaded machine.
const WATCHDOG: Duration = Duration::from_secs(20 * 60);

/// What a program said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The command, for messages.
    pub command: String,
    /// Its exit code; `None` where a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// True if it had to be killed because its time was over.
    pub timed_out: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Standard output as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"))
    }
}

/// A program about to be run.
pub struct Run {
    command: Command,
    shown: String,
    input: Option<Vec<u8>>,
}

impl Run {
    fn new(program: impl AsRef<OsStr>, args: &[impl AsRef<OsStr>]) -> Self {
        let mut command = Command::new(program.as_ref());
        command.args(args).env("LC_ALL", "C").env("TZ", "UTC").env_remove("SOURCE_DATE_EPOCH");
        // Cargo's, for libraries that nobody here has: hundreds of folders to look into at each start.
        command.env_remove("LD_LIBRARY_PATH");
        let mut shown = program.as_ref().to_string_lossy().into_owned();
        for arg in args {
            shown.push(' ');
            shown.push_str(&arg.as_ref().to_string_lossy());
        }
        Self { command, shown, input: None }
    }

    /// In that folder.
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// With that variable.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// With that search path.
    pub fn path(self, path: impl AsRef<OsStr>) -> Self {
        self.env("PATH", path)
    }

    /// With that on its standard input.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Started, with what it says thrown away.
    pub fn spawn(mut self) -> Child {
        self.command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.command.spawn().unwrap_or_else(|e| panic!("cannot run {}: {e}", self.shown))
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Output {
        self.once()
    }

    /// The same, again while it complains of a lock, for a minute or two: a test that starts a program while another
    /// one holds an image open in this process hands that lock to a child for a moment, between `fork` and `exec`.
    pub fn patiently(mut self) -> Output {
        for _ in 0..2000 {
            let out = self.once();
            if out.code == Some(0) || !out.stderr.contains("Is another process using the image") {
                return out;
            }
            thread::sleep(Duration::from_millis(50));
        }
        self.once()
    }

    fn once(&mut self) -> Output {
        self.command.stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() });
        // A group of its own, so that a shell line is killed with all that it started.
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = self.command.spawn().unwrap_or_else(|e| panic!("cannot run {}: {e}", self.shown));
        if let (Some(bytes), Some(mut pipe)) = (self.input.clone(), child.stdin.take()) {
            thread::spawn(move || pipe.write_all(&bytes));
        }
        let (closed, closings) = mpsc::channel();
        let stdout = gather(child.stdout.take(), closed.clone());
        let stderr = gather(child.stderr.take(), closed);
        let end = Instant::now() + WATCHDOG;
        // Both pipes are closed when it has ended, or is about to: nothing is asked again and again until then.
        for _ in 0..2 {
            let _ = closings.recv_timeout(end.saturating_duration_since(Instant::now()));
        }
        let mut pause = Duration::from_micros(50);
        let mut timed_out = false;
        let status = loop {
            if let Some(status) = child.try_wait().expect("wait") {
                break status;
            }
            if Instant::now() >= end {
                timed_out = true;
                plain("kill", &["-9".to_owned(), "--".to_owned(), format!("-{}", child.id())]).quiet();
                break child.wait().expect("wait");
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        };
        let text =
            |pipe: thread::JoinHandle<Vec<u8>>| String::from_utf8_lossy(&pipe.join().expect("pipe")).into_owned();
        Output {
            command: self.shown.clone(),
            code: status.code(),
            signal: status.signal(),
            timed_out,
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }

    fn quiet(mut self) {
        let _ = self.command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    }

    /// Runs it; it must succeed.
    pub fn ok(self) -> Output {
        let out = self.patiently();
        assert!(out.code == Some(0) && !out.timed_out, "failed: {out:#?}");
        out
    }

    /// Runs it; it must end with that exit code.
    pub fn fails(self, code: i32) -> Output {
        let out = self.run();
        assert!(out.code == Some(code) && !out.timed_out, "expected exit code {code}: {out:#?}");
        out
    }
}

fn gather(pipe: Option<impl Read + Send + 'static>, closed: mpsc::Sender<()>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = closed.send(());
        bytes
    })
}

/// Where a program is.
pub fn which(program: &str) -> PathBuf {
    need(program);
    let found = std::env::split_paths(&tool_path(None)).map(|folder| folder.join(program)).find(|path| path.is_file());
    found.unwrap_or_else(|| PathBuf::from(program))
}

/// Any program.
pub fn plain(program: &str, args: &[impl AsRef<OsStr>]) -> Run {
    need(program);
    Run::new(program, args)
}

/// The program under test, started as `qemu-img`.
pub fn vimg(args: &[impl AsRef<OsStr>]) -> Run {
    let mut run = Run::new(vimg_path(), args);
    run.command.arg0("qemu-img");
    run
}

/// The program under test, started by its own name.
pub fn own(args: &[impl AsRef<OsStr>]) -> Run {
    let mut run = Run::new(vimg_path(), args);
    run.command.arg0("vimg");
    run
}

/// The program under test with no more private memory (heap and stacks) than `bytes`: an allocation beyond that
/// fails, which ends it.
pub fn vimg_within_memory(bytes: u64, args: &[impl AsRef<OsStr>]) -> Run {
    need("prlimit");
    let mut all: Vec<OsString> = vec![format!("--data={bytes}").into(), "--core=0".into(), vimg_path().into()];
    all.extend(args.iter().map(|arg| arg.as_ref().to_owned()));
    Run::new("prlimit", &all)
}

/// The judge.
pub fn judge(args: &[impl AsRef<OsStr>]) -> Run {
    plain("qemu-img", args)
}

/// `qemu-io` with commands.
pub fn qemu_io(format: &str, image: &str, commands: &[&str]) -> Run {
    let mut args = vec!["-f", format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(image);
    plain("qemu-io", &args)
}

/// A shell line, with the judge's programs. In `$LUKS` are images that the judge takes seconds of computing to make.
pub fn sh(line: &str) -> Run {
    need("qemu-img");
    let run = Run::new("sh", &["-c", line]).path(tool_path(None));
    if line.contains("$LUKS") { run.env("LUKS", encrypted()) } else { run }
}

/// A shell line in which `qemu-img` is that program.
pub fn sh_with(links: &Path, line: &str) -> Run {
    Run::new("sh", &["-c", line]).path(tool_path(Some(links)))
}

/// A folder with empty disks of 1 MiB encrypted by LUKS, made once by the judge: `luks` and `qcow2`. The passphrase
/// is `abc`. Whatever `iter-time` says, `qemu-img` computes for two seconds to find out how fast it is.
fn encrypted() -> &'static Path {
    static IMAGES: OnceLock<PathBuf> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("luks");
        std::fs::create_dir_all(&folder).expect("a folder for the images");
        for (name, options) in [
            ("luks", "key-secret=s,iter-time=10"),
            ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
        ] {
            let (image, new) = (folder.join(name), folder.join(format!("{name}.{}", std::process::id())));
            if !image.exists() {
                let secret = ["create", "-q", "--object", "secret,id=s,data=abc", "-f", name, "-o", options];
                judge(&secret.map(OsStr::new).into_iter().chain([new.as_os_str(), "1M".as_ref()]).collect::<Vec<_>>())
                    .ok();
                std::fs::rename(new, image).expect("the image gets its name");
            }
        }
        folder
    })
}

fn tool_path(first: Option<&Path>) -> OsString {
    let old = std::env::var_os("PATH").unwrap_or_default();
    let rest = std::env::split_paths(&old).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    std::env::join_paths(first.map(Path::to_path_buf).into_iter().chain(rest)).expect("a search path")
}

/// A folder in which `qemu-img` is a link to the program under test.
pub fn links() -> &'static Path {
    static LINKS: OnceLock<PathBuf> = OnceLock::new();
    LINKS.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("links");
        std::fs::create_dir_all(&folder).expect("a folder for the link");
        let link = folder.join("qemu-img");
        if std::fs::read_link(&link).ok() != Some(vimg_path()) {
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(vimg_path(), link).expect("a link");
        }
        folder
    })
}

/// A `qemu-io` that keeps an image open until it is dropped.
pub struct Holder {
    child: Child,
}

impl Holder {
    /// Opens the image; returns once it is open, and so locked.
    pub fn new(dir: &Path, args: &[&str]) -> Self {
        need("qemu-io");
        let mut child = Command::new("qemu-io")
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("qemu-io");
        child.stdin.as_mut().expect("stdin").write_all(b"length\n").expect("qemu-io reads");
        let mut seen = Vec::new();
        let mut byte = [0];
        let out = child.stdout.as_mut().expect("stdout");
        // The answer to `length` is a line with a unit; the prompt alone has no line end.
        while !seen.contains(&b'\n') {
            assert_eq!(out.read(&mut byte).expect("qemu-io answers"), 1, "qemu-io ended: {args:?}");
            seen.push(byte[0]);
        }
        Self { child }
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
