//! What a copy reports, shown on the console, from all its threads; and whether the user has ended it.

use super::interrupt::Interrupt;
use super::program::stderr_line;
use super::progress::Progress;
use crate::ops::copy::Observer;

/// See the module.
pub struct ConsoleObserver<'a> {
    /// Shows how far it is.
    pub progress: &'a Progress,
    /// Prefix of warnings; none under `-q`.
    pub name: Option<String>,
    /// Ends it, where it is not ended by the signal itself.
    pub interrupt: Option<&'a Interrupt>,
}

impl Observer for ConsoleObserver<'_> {
    fn wants_progress(&self) -> bool {
        self.progress.wanted()
    }

    fn progress(&self, done: u64, total: u64) {
        self.progress.report(done, total);
    }

    fn phase(&self, name: &'static str) {
        self.progress.phase(name);
    }

    fn is_cancelled(&self) -> bool {
        self.interrupt.is_some_and(Interrupt::is_caught)
    }

    fn note(&self, line: &str) {
        stderr_line(line);
    }

    fn warn(&self, text: &str) {
        if let Some(name) = &self.name {
            stderr_line(&format!("{name}: warning: {text}"));
        }
    }
}
