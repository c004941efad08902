//! Exit codes: the only place that decides them.

use std::process::ExitCode;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// What was asked for was done.
    Success,
    /// It was not; or what was compared differs.
    Failure,
    /// `check`: the image's tables are damaged.
    Corrupt,
    /// `check`: space is lost, and nothing else is wrong.
    Leaks,
    /// `check`: the format has none.
    Unsupported,
    /// What is to be compared cannot be opened.
    NotOpened,
    /// What is to be compared does not say what it stores.
    NoStatus,
    /// What is to be compared cannot be read.
    Unreadable,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Success => ExitCode::SUCCESS,
            Exit::Failure => ExitCode::FAILURE,
            Exit::Corrupt => ExitCode::from(2),
            Exit::Leaks => ExitCode::from(3),
            Exit::Unsupported => ExitCode::from(63),
            Exit::NotOpened => ExitCode::from(2),
            Exit::NoStatus => ExitCode::from(3),
            Exit::Unreadable => ExitCode::from(4),
        }
    }
}

/// How the program ends after an error. Every error, of use or of work, is a plain failure.
pub fn of(_error: &anyhow::Error) -> Exit {
    Exit::Failure
}
