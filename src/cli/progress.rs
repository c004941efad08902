//! How far it is: the reference's form off a terminal or under its name, else a bar, lines of JSON for programs that ask
//! for them, one line on SIGUSR1 without any of these.
//!
//! SIGUSR1 is blocked in every thread, and looked for when a report could be made, where it means anything: no handler
//! runs.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use serde_json::json;

use super::Complaint;
use super::output::JSON_VERSION;
use super::program::{Program, stderr_line};
use crate::storage::host;

/// How far apart reports are, where nothing else is said, in percent.
const STEP: f64 = 1.0;

/// Where what is for people goes off a terminal, and what options have printed.
pub const STANDARD_OUTPUT: i32 = 1;

/// Where `--progress=json` goes where it does not say.
const STANDARD_ERROR: i32 = 2;

/// The variable that asks for the form of progress that programs read.
const VARIABLE: &str = "VIMG_PROGRESS";

/// How far apart lines of JSON are at least, but for the first and the last of a phase.
const PAUSE: Duration = Duration::from_millis(100);

/// `-p`, `--progress=json[:DESCRIPTOR]`.
#[derive(Debug, clap::Args)]
pub struct ProgressArgs {
    /// show progress; --progress=json[:FD] writes lines of JSON to standard error or that descriptor, as VIMG_PROGRESS=json[:FD] does
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "human", value_parser = ProgressWish::parse)]
    progress: Option<ProgressWish>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProgressWish {
    Human,
    /// To that descriptor.
    Json(i32),
}

impl ProgressWish {
    fn parse(word: &str) -> Result<Self, Complaint> {
        let bad = || Complaint::value(format!("Progress is 'human', 'json' or 'json:DESCRIPTOR', not '{word}'"));
        match word.split_once(':') {
            None if word == "human" => Ok(Self::Human),
            None if word == "json" => Ok(Self::Json(STANDARD_ERROR)),
            Some(("json", number)) => number.parse().ok().filter(|fd| *fd > 0).map(Self::Json).ok_or_else(bad),
            _ => Err(bad()),
        }
    }
}

impl ProgressArgs {
    /// Nothing is done yet; `phase` is what is going to be.
    pub fn start(&self, program: &Program, quiet: bool, phase: &'static str) -> anyhow::Result<Progress> {
        self.start_with_step(program, quiet, phase, STEP)
    }

    /// The same, with reports so many percent apart.
    pub fn start_with_step(
        &self,
        program: &Program,
        quiet: bool,
        phase: &'static str,
        step: f64,
    ) -> anyhow::Result<Progress> {
        let wished = self.wished()?;
        if let Some(ProgressWish::Json(fd)) = wished {
            let out = host::descriptor(fd).with_context(|| format!("Progress cannot go to descriptor {fd}"))?;
            return Ok(Progress::with_form(ProgressForm::Json(Mutex::new(JsonProgress::new(out, phase))), step));
        }
        Ok(Progress::with_step(wished.is_some() && !quiet, program, step))
    }

    /// By the option, or else by the variable.
    fn wished(&self) -> anyhow::Result<Option<ProgressWish>> {
        let variable = std::env::var_os(VARIABLE).filter(|word| !word.is_empty());
        Ok(match (self.progress, variable) {
            (Some(ProgressWish::Json(fd)), _) => Some(ProgressWish::Json(fd)),
            (_, Some(word)) => Some(ProgressWish::parse(&word.to_string_lossy()).context(VARIABLE)?),
            (wished, None) => wished,
        })
    }

    /// The option that has something printed, and the descriptor that it goes to.
    pub fn printed(&self, quiet: bool) -> anyhow::Result<Option<(&'static str, i32)>> {
        Ok(match self.wished()? {
            Some(ProgressWish::Json(fd)) => Some(("--progress=json", fd)),
            Some(ProgressWish::Human) if !quiet => Some(("-p", STANDARD_OUTPUT)),
            _ => None,
        })
    }

    /// Whether there is to be a line at the end, whatever becomes of the work.
    pub fn ends_line(&self, quiet: bool) -> bool {
        self.progress == Some(ProgressWish::Human)
            && !quiet
            && std::env::var_os(VARIABLE).is_none_or(|word| word.is_empty())
    }
}

/// Lines of JSON.
struct JsonProgress {
    out: File,
    phase: &'static str,
    since: Instant,
    /// When the last line was written, and what it said is done.
    last: Option<(Instant, u64)>,
    /// All of the phase has been told.
    ended: bool,
}

impl JsonProgress {
    fn new(out: File, phase: &'static str) -> Self {
        Self { out, phase, since: Instant::now(), last: None, ended: false }
    }

    /// Reports come from all threads, in any order: what is less than what was told is not told.
    fn report(&mut self, done: u64, total: u64) {
        let (now, ends) = (Instant::now(), done >= total);
        let soon = self.last.is_some_and(|(last, told)| done <= told || (!ends && now - last < PAUSE));
        if self.ended || (soon && !ends) {
            return;
        }
        self.last = Some((now, done));
        self.ended = ends;
        let seconds = (now - self.since).as_secs_f64();
        let rate = if seconds > 0.0 { done as f64 / seconds } else { 0.0 };
        let left = (rate > 0.0).then(|| ((total - done.min(total)) as f64 / rate).round() as u64);
        let line = json!({
            "version": JSON_VERSION, "phase": self.phase, "bytes-done": done, "bytes-total": total,
            "bytes-per-second": rate as u64, "seconds-left": left,
        });
        // Nobody is told where whoever reads it has gone.
        let _ = self.out.write_all(format!("{line}\n").as_bytes());
    }
}

enum ProgressForm {
    /// Nothing, but for a line when a signal asks for it.
    Silent(Asked),
    /// The reference's form.
    Plain {
        /// Standard output is for something else.
        aside: bool,
    },
    /// A bar on standard error.
    Bar(ProgressBar),
    /// Lines for programs.
    Json(Mutex<JsonProgress>),
}

/// Whether a signal has asked for a line that was not written yet.
struct Asked {
    /// Where the signal is read. None where it is to be had nowhere: nobody hears it.
    signal: Option<SignalFd>,
    unanswered: AtomicBool,
}

impl Asked {
    fn new(signal: Option<SignalFd>) -> Self {
        Self { signal, unanswered: AtomicBool::new(false) }
    }

    fn is_unanswered(&self) -> bool {
        let comes = || self.signal.as_ref().is_some_and(|signal| matches!(signal.read_signal(), Ok(Some(_))));
        if !self.unanswered.load(Ordering::Relaxed) && comes() {
            self.unanswered.store(true, Ordering::Relaxed);
        }
        self.unanswered.load(Ordering::Relaxed)
    }

    /// Whether there is a line to be written, which is written then.
    fn answer(&self) -> bool {
        self.unanswered.swap(false, Ordering::Relaxed)
    }
}

/// To standard output, or aside. What could not be written there is found when the program ends.
fn put(aside: bool, text: &str) {
    let _ = match aside {
        true => io::stderr().write_all(text.as_bytes()),
        false => {
            let mut out = io::stdout().lock();
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        }
    };
}

/// Whether standard error is a terminal on which a line can be drawn again.
fn can_redraw() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_some_and(|term| !term.is_empty() && term != "dumb")
}

/// What the bar shows while work goes on, and when all is done: what fits in the terminal's width.
fn bar_templates() -> (&'static str, &'static str) {
    let columns = host::columns(io::stderr().as_fd()).unwrap_or(80);
    match columns {
        76.. => (
            "{wide_bar} {percent:>3}%  {binary_bytes:>10} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left",
            "{wide_bar} {percent:>3}%  {binary_bytes:>10} of {binary_total_bytes}  in {elapsed}",
        ),
        44.. => (
            "{wide_bar} {percent:>3}%  of {binary_total_bytes}  {eta} left",
            "{wide_bar} {percent:>3}%  of {binary_total_bytes}  in {elapsed}",
        ),
        24.. => ("{wide_bar} {percent:>3}%  {eta} left", "{wide_bar} {percent:>3}%  in {elapsed}"),
        _ => ("{percent:>3}%", "{percent:>3}%"),
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// See the module. Ends its line when dropped.
pub struct Progress {
    form: ProgressForm,
    /// A report is made when it has moved by more than this, in percent.
    step: f64,
    /// What was reported last, in percent.
    last: Mutex<f64>,
}

impl Progress {
    /// At nothing done, for people; `wanted` is `-p` without `-q`.
    fn with_step(wanted: bool, program: &Program, step: f64) -> Self {
        let mut signal = SigSet::empty();
        signal.add(Signal::SIGUSR1);
        // Blocked before any thread is made: all inherit it. Where that fails it stays as it was.
        let blocked = signal.thread_block().is_ok();
        let form = if !wanted {
            let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
            ProgressForm::Silent(Asked::new(blocked.then(|| SignalFd::with_flags(&signal, flags).ok()).flatten()))
        } else if program.is_vimg() && io::stdout().is_terminal() && can_redraw() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            ProgressForm::Bar(bar.with_style(style(bar_templates().0)))
        } else {
            // Standard output has something else where results are told.
            ProgressForm::Plain { aside: program.tells_results() }
        };
        Self::with_form(form, step)
    }

    fn with_form(form: ProgressForm, step: f64) -> Self {
        let progress = Self { form, step, last: Mutex::new(0.0) };
        progress.show(0.0);
        progress
    }

    /// Another kind of work begins, of which nothing is done.
    pub fn phase(&self, name: &'static str) {
        if let ProgressForm::Json(json) = &self.form {
            let mut json = json.lock().unwrap_or_else(PoisonError::into_inner);
            (json.phase, json.since, json.last, json.ended) = (name, Instant::now(), None, false);
        }
    }

    /// Whether a report would be shown now.
    pub fn wanted(&self) -> bool {
        match &self.form {
            ProgressForm::Silent(asked) => asked.is_unanswered(),
            _ => true,
        }
    }

    /// The work begins: nothing is done yet.
    pub fn begin(&self) {
        self.show(0.0);
    }

    /// So much of that much is done.
    pub fn report(&self, done: u64, total: u64) {
        let percent = if total == 0 { 100.0 } else { done as f64 / total as f64 * 100.0 };
        match &self.form {
            ProgressForm::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            ProgressForm::Plain { .. } => {
                let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
                if percent - *last > self.step || percent >= 100.0 {
                    *last = percent;
                    self.show(percent);
                }
            }
            ProgressForm::Json(json) => {
                json.lock().unwrap_or_else(PoisonError::into_inner).report(done, total);
            }
            ProgressForm::Silent(asked) => {
                if asked.answer() {
                    stderr_line(&format!("    ({percent:3.2}/100%)"));
                }
            }
        }
    }

    fn show(&self, percent: f64) {
        if let ProgressForm::Plain { aside } = self.form {
            put(aside, &format!("    ({percent:3.2}/100%)\r"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        match &self.form {
            ProgressForm::Plain { aside } => put(*aside, "\n"),
            ProgressForm::Bar(bar) => {
                if bar.length().is_some_and(|total| bar.position() >= total) {
                    bar.set_style(style(bar_templates().1));
                }
                bar.abandon();
                // What is printed next begins a line of its own.
                stderr_line("");
            }
            ProgressForm::Silent(_) | ProgressForm::Json(_) => {}
        }
    }
}
