//! The running program: the name it was started by, its output streams, what its subcommands share.
//!
//! Standard output is collected and written at the end (at each line on a terminal), as stdio does; standard
//! error is written at once.

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufWriter, IsTerminal, LineWriter, Stdout, Write};
use std::path::Path;

use serde_json::Value;

use super::SUBCOMMANDS;
use super::exit::Exit;
use super::json;
use super::report::Complaint;
use crate::block::{Allowed, Notice, Opener, Policy, Secrets};
use crate::drivers::DRIVERS;

enum Out {
    Terminal(LineWriter<Stdout>),
    Other(BufWriter<Stdout>),
}

/// A line on standard error, from any thread. Where it cannot be written there is nobody to tell.
pub(super) fn stderr_line(text: &str) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// See the module.
pub struct Program {
    typed: String,
    name: String,
    subcommand: Option<&'static str>,
    untrusted: bool,
    allowed: Allowed,
    /// The largest disk that an image may have.
    largest: Option<u64>,
    /// How long a file may be.
    longest_file: Option<u64>,
    /// What was done, and why not, is told in JSON.
    json_results: bool,
    /// What it is about that is wrong, if nothing else is said.
    image: RefCell<Option<String>>,
    out: RefCell<Out>,
    trouble: RefCell<Option<io::Error>>,
}

impl Program {
    /// Started under that name.
    pub fn new(argv0: OsString) -> Self {
        let typed = argv0.to_string_lossy().into_owned();
        let name = Path::new(&argv0).file_name().map_or_else(|| typed.clone(), |n| n.to_string_lossy().into_owned());
        let stdout = io::stdout();
        let out = if stdout.is_terminal() {
            Out::Terminal(LineWriter::new(stdout))
        } else {
            Out::Other(BufWriter::with_capacity(4096, stdout))
        };
        Self {
            typed,
            name,
            subcommand: None,
            untrusted: false,
            allowed: Allowed::default(),
            largest: None,
            longest_file: None,
            json_results: false,
            image: RefCell::default(),
            out: RefCell::new(out),
            trouble: RefCell::default(),
        }
    }

    /// The name it was started by, without folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it was started by its own name: by another one (`qemu-img`) it says what the reference says, and no more.
    pub fn is_vimg(&self) -> bool {
        self.name == "vimg"
    }

    /// What was typed to come here: the name as typed, and the subcommand.
    pub fn invocation(&self) -> String {
        match self.subcommand {
            Some(subcommand) => format!("{} {subcommand}", self.typed),
            None => self.typed.clone(),
        }
    }

    /// Whether the subcommand shows progress.
    pub(super) fn shows_progress(&self) -> bool {
        let row = SUBCOMMANDS.iter().find(|row| Some(row.name) == self.subcommand);
        row.is_some_and(|row| (row.command)().get_arguments().any(|arg| arg.get_id() == "progress"))
    }

    /// From here on it is this subcommand that runs.
    pub(super) fn enter(&mut self, subcommand: &'static str) {
        self.subcommand = Some(subcommand);
    }

    /// From here on what was done, and why not, is told in JSON, or is not.
    pub(super) fn tell_results(&mut self, in_json: bool) {
        self.json_results = in_json;
    }

    /// Whether what was done is told in JSON, and not in words.
    pub fn tells_results(&self) -> bool {
        self.json_results
    }

    /// From here on it is about this image, where nothing else is said.
    pub fn works_on(&self, image: &str) {
        self.image.replace(Some(image.to_owned()));
    }

    /// The image that it is about, if that is known.
    pub fn image(&self) -> Option<String> {
        self.image.borrow().clone()
    }

    /// Tells what was done, where that is told in JSON: `members` of the object.
    pub fn result(&self, members: Value) {
        if self.json_results {
            self.println(&json::result(self.subcommand.unwrap_or_default(), members));
        }
    }

    /// From here on images may not make us open other files.
    pub(super) fn distrust(&mut self) {
        self.untrusted = true;
    }

    /// Whether they may not.
    pub(super) fn is_untrusting(&self) -> bool {
        self.untrusted
    }

    /// From here on no longer file is written.
    pub(super) fn limit_files(&mut self, longest: u64) {
        self.longest_file = Some(longest);
    }

    /// How long files may be, where the user says so.
    pub fn longest_file(&self) -> Option<u64> {
        self.longest_file
    }

    /// From here on an image whose disk is larger is refused.
    pub(super) fn limit_disks(&mut self, largest: u64) {
        self.largest = Some(largest);
    }

    /// Images may name that file all the same, or the files in that folder.
    pub(super) fn allow(&mut self, path: &OsStr) -> anyhow::Result<()> {
        Ok(self.allowed.add(DRIVERS, path)?)
    }

    /// Refuses exceptions to what is not the rule.
    pub(super) fn check_trust(&self) -> anyhow::Result<()> {
        match self.untrusted || self.allowed == Allowed::default() {
            true => Ok(()),
            false => Err(Complaint::usage("--allow has no effect without --untrusted").into()),
        }
    }

    /// Writes to standard output, as it is.
    pub fn print(&self, text: &str) {
        let written = match &mut *self.out.borrow_mut() {
            Out::Terminal(out) => out.write_all(text.as_bytes()),
            Out::Other(out) => out.write_all(text.as_bytes()),
        };
        self.keep(written);
    }

    /// Writes a line to standard output.
    pub fn println(&self, text: &str) {
        self.print(&format!("{text}\n"));
    }

    /// Sends what was printed on its way.
    pub fn flush(&self) {
        let flushed = match &mut *self.out.borrow_mut() {
            Out::Terminal(out) => out.flush(),
            Out::Other(out) => out.flush(),
        };
        self.keep(flushed);
    }

    fn keep(&self, result: io::Result<()>) {
        if let Err(error) = result {
            self.trouble.borrow_mut().get_or_insert(error);
        }
    }

    /// A line on standard error, as it is.
    pub fn line(&self, text: &str) {
        stderr_line(text);
    }

    /// `PROG: text` on standard error.
    pub fn error(&self, text: &str) {
        self.line(&format!("{}: {text}", self.name));
    }

    /// `PROG: warning: text` on standard error.
    pub fn warn(&self, text: &str) {
        self.error(&format!("warning: {text}"));
    }

    /// Warns of a new image that is raw because nothing else was asked for, and has the name of another format's.
    pub fn warn_of_raw(&self, name: &OsStr, option: &str) {
        if let Some(usual) = DRIVERS.usual(name).filter(|usual| self.is_vimg() && usual.name() != "raw") {
            let format = usual.name();
            let name = name.display();
            self.warn(&format!(
                "'{name}' will be raw: {option} {format} makes it {format}, {option} raw ends this warning"
            ));
        }
    }

    /// A way to write that is deprecated, and the line that says what to write instead.
    pub fn deprecated(&self, warning: &str, hint: &str) {
        self.warn(warning);
        self.line(hint);
    }

    /// What opens images.
    pub fn opener<'a>(&self, secrets: &'a Secrets) -> Opener<'a> {
        // What stands behind the policy is tested without it.
        let bypassed = cfg!(debug_assertions) && std::env::var_os("VIMG_TEST_NO_POLICY").is_some();
        let policy = match self.untrusted && !bypassed {
            true => Policy::Refuse(self.allowed.clone()),
            false => Policy::Follow,
        };
        Opener::new(DRIVERS, policy, secrets).limited_to(self.largest)
    }

    /// Shows what came up while opening.
    pub fn notices(&self, opener: &Opener<'_>) {
        for notice in opener.take_notices() {
            match notice {
                Notice::Line(line) => self.line(&line),
                Notice::Warning(text) => self.warn(&text),
            }
        }
    }

    /// Writes out what was printed. Lost output is a failure, unless the reader went away: that is its own choice.
    pub(super) fn finish(&self, exit: Exit) -> Exit {
        self.flush();
        match &*self.trouble.borrow() {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                self.error(&format!("Could not write to standard output: {}", crate::storage::error::strerror(error)));
                Exit::Failure
            }
            _ => exit,
        }
    }
}
