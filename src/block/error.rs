//! The error of the library strata: what kind, what was being done to which file, and the cause.
//!
//! The outer text never repeats the cause; whoever shows an error walks the chain once, joining with `": "`, and
//! then prints the hints, each on a line of its own.

use std::error::Error as StdError;

use crate::storage;

/// Result of an operation on images.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The host could not do it: see the cause.
    Io,
    /// There is no such file, image, snapshot or device.
    NotFound,
    /// Somebody else holds the image.
    Locked,
    /// The image's own bytes are wrong.
    Corrupt,
    /// The image, or the format, cannot do this.
    Unsupported,
    /// What was asked for makes no sense.
    Invalid,
    /// More than the format, or the host's file system, can hold.
    TooLarge,
    /// The policy forbids what the image asks for.
    Forbidden,
}

/// See the module.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    /// What a caller can match.
    pub kind: Kind,
    /// What was being done to which file, or what is wrong with it.
    pub context: String,
    /// Lines to show before the message, as they are.
    pub notes: Vec<String>,
    /// Lines to show after the message.
    pub hints: Vec<String>,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn StdError + Send + Sync>>,
    /// The storage error whose own text the context is.
    pub host: Option<Box<storage::Error>>,
}

impl Error {
    /// An error with no further cause.
    pub fn new(kind: Kind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), notes: Vec::new(), hints: Vec::new(), source: None, host: None }
    }

    /// The image's own bytes are wrong.
    pub fn corrupt(context: impl Into<String>) -> Self {
        Self::new(Kind::Corrupt, context)
    }

    /// The image, or the format, cannot do this.
    pub fn unsupported(context: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, context)
    }

    /// What was asked for makes no sense.
    pub fn invalid(context: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, context)
    }

    /// Adds a line to be shown before the message.
    pub fn note(mut self, line: impl Into<String>) -> Self {
        self.notes.push(line.into());
        self
    }

    /// Adds a line to be shown after the message.
    pub fn hint(mut self, line: impl Into<String>) -> Self {
        self.hints.push(line.into());
        self
    }

    /// Puts what was being done before this error.
    pub fn context(self, context: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            context: context.into(),
            notes: Vec::new(),
            hints: Vec::new(),
            source: Some(Box::new(self)),
            host: None,
        }
    }

    /// The whole message on one line: every text of the chain, joined with `": "`.
    pub fn message(&self) -> String {
        let mut text = self.context.clone();
        let mut next = self.source();
        while let Some(error) = next {
            text.push_str(": ");
            text.push_str(&error.to_string());
            next = error.source();
        }
        text
    }

    /// The notes of the whole chain, innermost first.
    pub fn all_notes(&self) -> Vec<String> {
        let mut notes = match self.source.as_ref().and_then(|source| source.downcast_ref::<Error>()) {
            Some(inner) => inner.all_notes(),
            None => Vec::new(),
        };
        notes.extend(self.notes.iter().cloned());
        notes
    }

    /// The hints of the whole chain, innermost first.
    pub fn all_hints(&self) -> Vec<String> {
        let mut hints = match self.source.as_ref().and_then(|source| source.downcast_ref::<Error>()) {
            Some(inner) => inner.all_hints(),
            None => Vec::new(),
        };
        hints.extend(self.hints.iter().cloned());
        hints
    }

    /// The storage error at the bottom, if that is what it was.
    pub fn storage(&self) -> Option<&storage::Error> {
        if let Some(host) = &self.host {
            return Some(host);
        }
        let source = self.source.as_ref()?;
        match source.downcast_ref::<Error>() {
            Some(inner) => inner.storage(),
            None => source.downcast_ref::<storage::Error>(),
        }
    }
}

/// Gives an error its place: what was being done.
pub trait Context<T> {
    /// Puts `what` before the error.
    fn context(self, what: impl Into<String>) -> Result<T>;
    /// The same, made only when needed.
    fn with_context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|e| e.context(what))
    }

    fn with_context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.context(what()))
    }
}

impl<T> Context<T> for storage::Result<T> {
    fn context(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|e| from_storage(e, what.into()))
    }

    fn with_context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| from_storage(e, what().into()))
    }
}

/// For a storage error that says it all by itself.
impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        let (kind, hints) = kind_of(&error);
        Self { kind, context: error.to_string(), notes: Vec::new(), hints, source: None, host: Some(Box::new(error)) }
    }
}

fn from_storage(error: storage::Error, context: String) -> Error {
    let (kind, hints) = kind_of(&error);
    Error { kind, context, notes: Vec::new(), hints, source: Some(Box::new(error)), host: None }
}

fn kind_of(error: &storage::Error) -> (Kind, Vec<String>) {
    let kind = match error {
        storage::Error::Locked { .. } | storage::Error::LockByte(_) => Kind::Locked,
        _ => match error.errno() {
            Some(nix::errno::Errno::ENOENT) => Kind::NotFound,
            Some(nix::errno::Errno::EFBIG) => Kind::TooLarge,
            _ => Kind::Io,
        },
    };
    let hints = match error {
        storage::Error::Locked { name, .. } => vec![format!("Is another process using the image [{name}]?")],
        _ => Vec::new(),
    };
    (kind, hints)
}
