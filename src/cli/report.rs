//! How errors are shown: the chain of causes once, on one line, then hints on lines of their own.

use std::fmt;
use std::path::Path;

use serde_json::{Value, json};

use super::{Program, beside};
use crate::block::error::PlacePart;
use crate::block::{ErrorKind, SecretBytes};
use crate::storage::holder::Holder;
use crate::{block, storage};

/// An error that is the command line's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Complaint {
    /// In the words of `getopt_long`, with its prefix; then where help is. Perhaps what was meant.
    Getopt(String, Option<String>),
    /// Wrong use; then where help is. Perhaps what was meant.
    Usage(String, Option<String>),
    /// Wrong use: there is no such command. Perhaps what was meant.
    NoCommand(String, Option<String>),
    /// A bad value: its text, and lines that follow it.
    Value(String, &'static [&'static str]),
    /// A bad value, and what was probably meant.
    Misspelt(String, String),
    /// A bad value that may be a part of a secret.
    Withheld {
        /// What is said of it.
        text: String,
        /// What the reference says, which repeats it.
        reference: SecretBytes,
    },
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
    /// Whether it is about a value, not about how the program is used.
    pub fn is_of_value(&self) -> bool {
        !matches!(self, Self::Getopt(..) | Self::Usage(..) | Self::NoCommand(..))
    }

    /// Wrong use.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into(), None)
    }

    /// A bad value, or a bad combination of them.
    pub fn value(text: impl Into<String>) -> Self {
        Self::Value(text.into(), &[])
    }

    /// A bad value, with what was probably meant if that is known.
    pub fn misspelt(text: impl Into<String>, meant: Option<impl Into<String>>) -> Self {
        match meant {
            Some(meant) => Self::Misspelt(text.into(), meant.into()),
            None => Self::value(text),
        }
    }

    /// A bad value that may be a part of a secret: what is said of it, and what the reference says.
    pub fn withheld(text: impl Into<String>, reference: String) -> Self {
        Self::Withheld { text: text.into(), reference: reference.into_bytes().into() }
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Getopt(text, _)
            | Self::Usage(text, _)
            | Self::Value(text, _)
            | Self::Misspelt(text, _)
            | Self::Withheld { text, .. } => f.write_str(text),
            Self::NoCommand(name, _) => write!(f, "Command not found: {name}"),
            Self::Snapshot { text, .. } => write!(f, "Failed in parsing snapshot param '{text}'"),
        }
    }
}

impl std::error::Error for Complaint {}

/// Tells an error on stderr, and where results are told in JSON there too.
pub fn error(program: &Program, error: &anyhow::Error) {
    words(program, error);
    program.result(json!({"error": to_json(program, error)}));
}

/// An error as the object that programs read.
pub fn to_json(program: &Program, error: &anyhow::Error) -> Value {
    let ours = error.chain().find_map(|cause| cause.downcast_ref::<block::Error>());
    let kind = match (ours, complaint(error)) {
        (Some(error), _) => error.kind.name(),
        (None, Some(_)) => "usage",
        (None, None) => "other",
    };
    let mut object = json!({"kind": kind, "message": text(error)});
    if let Some(file) = ours.and_then(block::Error::file).or_else(|| program.image()) {
        object["file"] = file.into();
    }
    let place = ours.and_then(block::Error::place);
    if let Some(at) = ours.and_then(block::Error::offset) {
        object["offset"] = at.into();
    }
    if let Some(PlacePart::Guest(guest)) = place.map(|place| place.part) {
        object["guest-offset"] = guest.get().into();
    }
    object
}

fn text(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Shows an error on stderr.
pub fn words(program: &Program, error: &anyhow::Error) {
    let mut text = text(error);
    let ours = error.chain().find_map(|cause| cause.downcast_ref::<block::Error>());
    // The reference leaves out whose error some are.
    if let Some(file) = ours.and_then(block::Error::file).filter(|file| program.is_vimg() && !text.contains(file)) {
        text = format!("{file}: {text}");
    }
    if let Some(error) = ours {
        error.all_notes().iter().for_each(|note| program.line(note));
    }
    match complaint(error) {
        Some(Complaint::Getopt(..)) => {
            program.line(&format!("{}: {text}", program.invocation()));
            program.line(&try_help(program));
        }
        Some(Complaint::Usage(..) | Complaint::NoCommand(..)) => {
            program.error(&text);
            program.line(&try_help(program));
        }
        Some(Complaint::Value(_, lines)) => {
            program.error(&text);
            lines.iter().for_each(|line| program.line(line));
        }
        Some(Complaint::Withheld { reference, .. }) if !program.is_vimg() => {
            program.error(&String::from_utf8_lossy(reference.get()));
        }
        Some(Complaint::Snapshot { warnings, key, .. }) => {
            warnings.iter().for_each(|(warning, hint)| program.deprecated(warning, hint));
            program.error(&format!("Invalid parameter '{key}'"));
            program.error(&text);
        }
        Some(Complaint::Misspelt(..) | Complaint::Withheld { .. }) | None => program.error(&text),
    }
    if let Some(error) = ours {
        error.all_hints().iter().for_each(|hint| program.line(hint));
    }
    if program.is_vimg() {
        advice(program, error).iter().for_each(|line| program.line(&format!("hint: {line}")));
    }
}

/// What the user can do about it: what the reference does not say.
fn advice(program: &Program, error: &anyhow::Error) -> Vec<String> {
    let mut advice = Vec::new();
    match complaint(error) {
        Some(
            Complaint::Getopt(_, Some(meant))
            | Complaint::Usage(_, Some(meant))
            | Complaint::NoCommand(_, Some(meant))
            | Complaint::Misspelt(_, meant),
        ) => advice.push(format!("did you mean '{meant}'?")),
        Some(Complaint::NoCommand(_, None)) => advice.push("'vimg help' lists the commands".to_owned()),
        _ => {}
    }
    if let Some(error) = error.chain().find_map(|cause| cause.downcast_ref::<block::Error>()) {
        advice.extend(error.all_advice());
        // What is advised already is another limit.
        if let Some(longest) = program.longest_file()
            && error.kind == ErrorKind::TooLarge
            && advice.is_empty()
        {
            advice.push(format!("--max-output lets no file have more than {longest} bytes"));
        }
        if let Some(storage::Error::File { name, cause, doing }) = error.storage()
            && cause.kind() == std::io::ErrorKind::NotFound
        {
            let path = Path::new(name);
            let meant = match *doing {
                // It is its folder that is not there.
                "create" => {
                    path.parent().and_then(beside::meant).zip(path.file_name()).map(|(folder, name)| folder.join(name))
                }
                _ => beside::meant(path),
            };
            advice.extend(meant.map(|meant| format!("did you mean '{}'?", meant.display())));
            if program.shows_progress() && ["human", "json"].contains(&name.as_str()) {
                advice.push(format!("a form of progress follows '=': --progress={name}"));
            }
        }
        if let Some(storage::Error::Locked { lock: Some(lock), .. }) = error.storage() {
            let who = |holder: &Holder| match holder.pid == std::process::id() {
                true => "this command itself, which names it twice".to_owned(),
                false => format!("'{}', process {}", holder.name, holder.pid),
            };
            let mut holders = lock.holders();
            // We hold some ourselves where we have the image open for something else.
            if holders.iter().any(|holder| holder.pid != std::process::id()) {
                holders.retain(|holder| holder.pid != std::process::id());
            }
            let holders: Vec<String> = holders.iter().map(who).collect();
            if !holders.is_empty() {
                advice.push(format!("it is held by {}", holders.join("; ")));
            }
        }
    }
    advice
}

fn complaint(error: &anyhow::Error) -> Option<&Complaint> {
    error.chain().find_map(|cause| cause.downcast_ref::<Complaint>())
}

fn try_help(program: &Program) -> String {
    format!("Try '{} --help' for more information", program.invocation())
}
