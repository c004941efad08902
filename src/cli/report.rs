//! How errors are shown: the chain of causes once, on one line, then hints on lines of their own.

use std::fmt;

use super::Program;
use crate::block;

/// An error that is the command line's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Complaint {
    /// In the words of `getopt_long`, with its prefix; then where help is.
    Getopt(String),
    /// Wrong use; then where help is.
    Usage(String),
    /// A bad value: its text, and lines that follow it.
    Value(String, &'static [&'static str]),
    /// A bad key in the description of a snapshot.
    Snapshot {
        /// What came up before, and the line below it.
        warnings: Vec<(String, String)>,
        /// The key.
        key: String,
        /// The whole description.
        text: String,
    },
}

impl Complaint {
    /// Wrong use.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    /// A bad value, or a bad combination of them.
    pub fn value(text: impl Into<String>) -> Self {
        Self::Value(text.into(), &[])
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Getopt(text) | Self::Usage(text) | Self::Value(text, _) => f.write_str(text),
            Self::Snapshot { text, .. } => write!(f, "Failed in parsing snapshot param '{text}'"),
        }
    }
}

impl std::error::Error for Complaint {}

/// Shows an error on stderr.
pub fn error(program: &Program, error: &anyhow::Error) {
    let text = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
    let ours = error.chain().find_map(|cause| cause.downcast_ref::<block::Error>());
    if let Some(error) = ours {
        error.all_notes().iter().for_each(|note| program.line(note));
    }
    match error.chain().find_map(|cause| cause.downcast_ref::<Complaint>()) {
        Some(Complaint::Getopt(_)) => {
            program.line(&format!("{}: {text}", program.invocation()));
            program.line(&try_help(program));
        }
        Some(Complaint::Usage(_)) => {
            program.error(&text);
            program.line(&try_help(program));
        }
        Some(Complaint::Value(_, lines)) => {
            program.error(&text);
            lines.iter().for_each(|line| program.line(line));
        }
        Some(Complaint::Snapshot { warnings, key, .. }) => {
            warnings.iter().for_each(|(warning, hint)| program.deprecated(warning, hint));
            program.error(&format!("Invalid parameter '{key}'"));
            program.error(&text);
        }
        None => program.error(&text),
    }
    if let Some(error) = ours {
        error.all_hints().iter().for_each(|hint| program.line(hint));
    }
}

fn try_help(program: &Program) -> String {
    format!("Try '{} --help' for more information", program.invocation())
}
