//! Exit codes: the only place that decides them.

use std::process::ExitCode;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// What was asked for was done.
    Success,
    /// It was not.
    Failure,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Success => ExitCode::SUCCESS,
            Exit::Failure => ExitCode::FAILURE,
        }
    }
}

/// How the program ends after an error. Every error, of use or of work, is a plain failure.
pub fn of(_error: &anyhow::Error) -> Exit {
    Exit::Failure
}
