//! How far it is: the reference's form off a terminal, a bar on a terminal, one line on SIGUSR1 without either.
//!
//! SIGUSR1 is blocked in every thread, and waited for in one of its own where it means anything: no handler runs.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::signal::{SigSet, Signal};

use super::program::stderr_line;
use crate::storage::host;

/// How far apart reports are, where nothing else is said, in percent.
const STEP: f64 = 1.0;

enum ProgressForm {
    /// Nothing, but for a line when a signal asks for it.
    Silent(Arc<AtomicBool>),
    /// The reference's form.
    Plain,
    /// A bar on standard error.
    Bar(ProgressBar),
}

/// Whether standard error is a terminal on which a line can be drawn again.
fn can_redraw() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
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
    /// At nothing done; `wanted` is `-p` without `-q`.
    pub fn start(wanted: bool) -> Self {
        Self::with_step(wanted, STEP)
    }

    /// The same, with reports so many percent apart.
    pub fn with_step(wanted: bool, step: f64) -> Self {
        let mut signal = SigSet::empty();
        signal.add(Signal::SIGUSR1);
        // Blocked before any thread is made: all inherit it. Where that fails it stays as it was.
        let blocked = signal.thread_block().is_ok();
        let form = if !wanted {
            let asked = Arc::new(AtomicBool::new(false));
            if blocked {
                let flag = asked.clone();
                // Ends with the program. Where no thread is to be had nobody hears the signal.
                let _ = std::thread::Builder::new().spawn(move || {
                    while signal.wait().is_ok() {
                        flag.store(true, Ordering::Relaxed);
                    }
                });
            }
            ProgressForm::Silent(asked)
        } else if io::stdout().is_terminal() && can_redraw() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            ProgressForm::Bar(bar.with_style(style(bar_templates().0)))
        } else {
            ProgressForm::Plain
        };
        let progress = Self { form, step, last: Mutex::new(0.0) };
        progress.show(0.0);
        progress
    }

    /// Whether a report would be shown now.
    pub fn wanted(&self) -> bool {
        match &self.form {
            ProgressForm::Silent(asked) => asked.load(Ordering::Relaxed),
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
            ProgressForm::Plain => {
                let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
                if percent - *last > self.step || percent >= 100.0 {
                    *last = percent;
                    self.show(percent);
                }
            }
            ProgressForm::Silent(asked) => {
                if asked.swap(false, Ordering::Relaxed) {
                    stderr_line(&format!("    ({percent:3.2}/100%)"));
                }
            }
        }
    }

    fn show(&self, percent: f64) {
        if let ProgressForm::Plain = self.form {
            let mut out = io::stdout().lock();
            // What could not be written is found when the program ends.
            let _ = write!(out, "    ({percent:3.2}/100%)\r").and_then(|()| out.flush());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        match &self.form {
            ProgressForm::Plain => {
                let _ = writeln!(io::stdout());
            }
            ProgressForm::Bar(bar) => {
                if bar.length().is_some_and(|total| bar.position() >= total) {
                    bar.set_style(style(bar_templates().1));
                }
                bar.abandon();
            }
            ProgressForm::Silent(_) => {}
        }
    }
}
