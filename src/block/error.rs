//! The error of the library strata: what kind, what was being done to which file, and the cause.
//!
//! The outer text never repeats the cause; whoever shows an error walks the chain once, joining with `": "`, and
//! then prints the hints, each on a line of its own.

use std::error::Error as StdError;
use std::fmt;

use super::{GuestOffset, HostOffset};
use crate::storage;

/// Result of an operation on images.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The host could not do it: see the cause.
    Io,
    /// There is no such file, image, snapshot or device.
    NotFound,
    /// Somebody else holds the image.
    Locked,
    /// The image's own bytes are wrong.
    Corrupt,
    /// What should lie in a file lies past its end.
    Truncated,
    /// The image, or the format, cannot do this.
    Unsupported,
    /// What was asked for makes no sense.
    Invalid,
    /// More than the format, or the host's file system, can hold.
    TooLarge,
    /// The policy forbids what the image asks for.
    Forbidden,
    /// The user has ended it.
    Cancelled,
    /// It is not what was expected.
    Mismatch,
}

impl ErrorKind {
    /// Its name, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::NotFound => "not-found",
            Self::Locked => "locked",
            Self::Corrupt => "corrupt",
            Self::Truncated => "truncated",
            Self::Unsupported => "unsupported",
            Self::Invalid => "invalid",
            Self::TooLarge => "too-large",
            Self::Forbidden => "forbidden",
            Self::Cancelled => "cancelled",
            Self::Mismatch => "mismatch",
        }
    }
}

/// What was being done with the bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// They were read.
    Read,
    /// They were written, or made zeros.
    Write,
    /// They were asked about: data, or a hole.
    Status,
}

/// Of what a place is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlacePart {
    /// Of the guest's disk: where on it.
    Guest(GuestOffset),
    /// Of a table that the format keeps in the file: its name.
    Table(&'static str),
}

/// What was being done, with which file, and where in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// What was being done.
    pub operation: Operation,
    /// The file's name, as it is shown.
    pub file: String,
    /// Of what.
    pub part: PlacePart,
    /// Where in the file, if that is known.
    pub host: Option<HostOffset>,
}

impl fmt::Display for Place {
    /// In the reference's words, which know the guest's offset alone; but with the name of the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = &self.file;
        match (self.part, self.operation) {
            (PlacePart::Guest(at), Operation::Read) => write!(f, "{file}: error while reading at byte {}", at.get()),
            (PlacePart::Guest(at), Operation::Write) => write!(f, "{file}: error while writing at byte {}", at.get()),
            (PlacePart::Guest(at), Operation::Status) => {
                write!(f, "{file}: error while reading block status at offset {}", at.get())
            }
            (PlacePart::Table(table), operation) => {
                let doing = if operation == Operation::Write { "writing" } else { "reading" };
                let at = self.host.unwrap_or_default().get();
                write!(f, "{file}: error while {doing} {table} at byte {at}")
            }
        }
    }
}

impl Place {
    /// In a table of a file.
    pub fn of_table(operation: Operation, file: &str, table: &'static str, at: u64) -> Self {
        Self { operation, file: file.to_owned(), part: PlacePart::Table(table), host: Some(HostOffset(at)) }
    }
}

/// What an error says beside its message.
#[derive(Debug)]
enum Beside {
    /// A line to show before the message, as it is.
    Note(String),
    /// A line to show after it.
    Hint(String),
    /// What the user can do about it: what the reference does not say.
    Advice(String),
    /// The file, by the name that it is shown by.
    File(String),
    /// Where in it.
    Offset(u64),
}

/// See the module.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    /// What a caller can match.
    pub kind: ErrorKind,
    /// What was being done to which file, or what is wrong with it.
    pub context: String,
    /// What there is to say beside the message.
    beside: Vec<Beside>,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn StdError + Send + Sync>>,
    /// The storage error whose own text the context is.
    pub host: Option<Box<storage::Error>>,
    /// Where it happened, if this error is what says so.
    pub place: Option<Box<Place>>,
}

impl Error {
    /// An error with no further cause.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), beside: Vec::new(), source: None, host: None, place: None }
    }

    /// The image's own bytes are wrong.
    pub fn corrupt(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, context)
    }

    /// What should lie at `at` lies past the end of the file.
    pub fn truncated(what: &str, at: u64, end: u64) -> Self {
        Self::new(
            ErrorKind::Truncated,
            format!("the file is truncated: {what} at offset {at} lies past its end at {end}"),
        )
        .in_file_at(at)
    }

    /// The image, or the format, cannot do this.
    pub fn unsupported(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, context)
    }

    /// What was asked for makes no sense.
    pub fn invalid(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, context)
    }

    /// Adds a line to be shown before the message.
    pub fn note(mut self, line: impl Into<String>) -> Self {
        self.beside.push(Beside::Note(line.into()));
        self
    }

    /// Adds a line to be shown after the message.
    pub fn hint(mut self, line: impl Into<String>) -> Self {
        self.beside.push(Beside::Hint(line.into()));
        self
    }

    /// Adds what the user can do about it, as a clause.
    pub fn advise(mut self, line: impl Into<String>) -> Self {
        self.beside.push(Beside::Advice(line.into()));
        self
    }

    /// Says which file it is about.
    pub fn about(mut self, file: impl Into<String>) -> Self {
        self.beside.push(Beside::File(file.into()));
        self
    }

    /// Says where in the file it is; the text stays what it is.
    pub fn in_file_at(mut self, at: u64) -> Self {
        self.beside.push(Beside::Offset(at));
        self
    }

    /// Says which field of the header at the start of the file is wrong: where it is.
    pub fn in_field(self, at: usize) -> Self {
        self.in_file_at(u64::try_from(at).unwrap_or_default())
    }

    /// Puts what was being done before this error.
    pub fn context(self, context: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            context: context.into(),
            beside: Vec::new(),
            source: Some(Box::new(self)),
            host: None,
            place: None,
        }
    }

    /// Puts what was being done, and where, before this error.
    pub fn at(self, place: Place) -> Self {
        Self { place: Some(Box::new(place.clone())), ..self.context(place.to_string()) }
    }

    /// Notes where it happened; the text stays what it is.
    pub fn placed(self, place: Place) -> Self {
        Self { place: Some(Box::new(place)), ..self }
    }

    /// Puts the file's name before an error that does not say where it happened.
    pub fn naming(self, file: &str) -> Self {
        if self.place().is_some() { self } else { self.context(file).about(file) }
    }

    /// Where it happened, as far as that is known: the innermost place of the chain.
    pub fn place(&self) -> Option<&Place> {
        self.inner().and_then(Self::place).or(self.place.as_deref())
    }

    /// Whether it says where on the guest's disk it happened.
    pub fn tells_guest(&self) -> bool {
        let guest = |place: &Place| matches!(place.part, PlacePart::Guest(_));
        self.place.as_deref().is_some_and(guest) || self.inner().is_some_and(Self::tells_guest)
    }

    /// What the host said, or what is wrong, without what was being done and where.
    pub fn cause(&self) -> String {
        match (self.storage(), self.inner(), &self.place) {
            (Some(host), ..) => host.to_string(),
            (None, Some(inner), _) if self.place.is_some() || inner.place().is_some() => inner.cause(),
            _ => self.message(),
        }
    }

    fn inner(&self) -> Option<&Error> {
        self.source.as_ref()?.downcast_ref::<Error>()
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
        self.all(|beside| if let Beside::Note(line) = beside { Some(line) } else { None })
    }

    /// The hints of the whole chain, innermost first.
    pub fn all_hints(&self) -> Vec<String> {
        self.all(|beside| if let Beside::Hint(line) = beside { Some(line) } else { None })
    }

    /// The advice of the whole chain, innermost first.
    pub fn all_advice(&self) -> Vec<String> {
        self.all(|beside| if let Beside::Advice(line) = beside { Some(line) } else { None })
    }

    /// The file that it is about, as far as that is known, as it is shown.
    pub fn file(&self) -> Option<String> {
        let file = |beside: &Beside| if let Beside::File(name) = beside { Some(name.clone()) } else { None };
        let named = || self.beside.iter().find_map(file);
        let deeper = || self.inner().and_then(Self::file);
        self.place().map(|place| place.file.clone()).or_else(deeper).or_else(named)
    }

    /// Where in the file, as far as that is known.
    pub fn offset(&self) -> Option<u64> {
        let offset = |beside: &Beside| if let Beside::Offset(at) = beside { Some(*at) } else { None };
        let placed = || self.place().and_then(|place| place.host).map(HostOffset::get);
        self.inner().and_then(Self::offset).or_else(|| self.beside.iter().find_map(offset)).or_else(placed)
    }

    fn all(&self, wanted: fn(&Beside) -> Option<&String>) -> Vec<String> {
        let mut lines = self.inner().map(|inner| inner.all(wanted)).unwrap_or_default();
        lines.extend(self.beside.iter().filter_map(wanted).cloned());
        lines
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
    /// Puts the operation, file and place before the error.
    fn at(self, place: impl FnOnce() -> Place) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|e| e.context(what))
    }

    fn with_context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.context(what()))
    }

    fn at(self, place: impl FnOnce() -> Place) -> Result<T> {
        self.map_err(|e| e.at(place()))
    }
}

impl<T> Context<T> for storage::Result<T> {
    fn context(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|e| from_storage(e, what.into()))
    }

    fn with_context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| from_storage(e, what().into()))
    }

    fn at(self, place: impl FnOnce() -> Place) -> Result<T> {
        self.map_err(|e| {
            let place = place();
            Error { place: Some(Box::new(place.clone())), ..from_storage(e, place.to_string()) }
        })
    }
}

/// For a storage error that says it all by itself.
impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        let (kind, hints) = kind_of(&error);
        let context = error.to_string();
        Self { kind, context, beside: hints, source: None, host: Some(Box::new(error)), place: None }
    }
}

fn from_storage(error: storage::Error, context: String) -> Error {
    let (kind, hints) = kind_of(&error);
    Error { kind, context, beside: hints, source: Some(Box::new(error)), host: None, place: None }
}

fn kind_of(error: &storage::Error) -> (ErrorKind, Vec<Beside>) {
    if let Some(inner) = inner_image(error) {
        return (inner.kind, inner.all_hints().into_iter().map(Beside::Hint).collect());
    }
    if let storage::Error::Existing(cause) = error {
        return kind_of(cause);
    }
    let kind = match error {
        storage::Error::Locked { .. } | storage::Error::LockByte(_) => ErrorKind::Locked,
        _ => match error.errno() {
            Some(nix::errno::Errno::ENOENT) => ErrorKind::NotFound,
            Some(nix::errno::Errno::EFBIG) => ErrorKind::TooLarge,
            _ => ErrorKind::Io,
        },
    };
    let hints = match error {
        storage::Error::Locked { name, .. } => {
            vec![Beside::Hint(format!("Is another process using the image [{name}]?"))]
        }
        _ => Vec::new(),
    };
    (kind, hints)
}

/// The error of the image in whose disk the bytes lie.
fn inner_image(error: &storage::Error) -> Option<&Error> {
    match error {
        storage::Error::Image { cause, .. } => cause.downcast_ref::<Error>(),
        _ => None,
    }
}

/// The error of an image whose disk is the file of another one, as that one's storage tells it.
impl From<Error> for storage::Error {
    fn from(error: Error) -> Self {
        let errno = error.storage().and_then(storage::Error::errno).or(match error.kind {
            ErrorKind::Unsupported => Some(nix::errno::Errno::ENOTSUP),
            ErrorKind::TooLarge => Some(nix::errno::Errno::EFBIG),
            ErrorKind::Forbidden => Some(nix::errno::Errno::EPERM),
            _ => None,
        });
        storage::Error::Image { text: error.message(), errno, cause: Box::new(error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        let (part, host) = (PlacePart::Guest(GuestOffset(7)), Some(HostOffset(9)));
        Place { operation: Operation::Read, file: "a.img".to_owned(), part, host }
    }

    #[test]
    fn a_place_in_a_table_is_in_the_file() {
        let place = Place::of_table(Operation::Write, "a.img", "the block map", 512);
        assert_eq!(place.to_string(), "a.img: error while writing the block map at byte 512");
        let error = Err::<(), _>(storage::Error::from(nix::errno::Errno::EIO)).at(|| place.clone()).unwrap_err();
        assert!(!error.tells_guest());
        assert_eq!(error.naming("b.img").message(), format!("{place}: Input/output error"));
        assert_eq!(Error::corrupt("torn").naming("b.img").message(), "b.img: torn");
    }

    #[test]
    fn an_error_says_what_was_done_to_which_file_and_where() {
        let full = storage::Error::from(nix::errno::Errno::EIO);
        let error = Err::<(), _>(full).at(place).context("Could not open backing file").unwrap_err();
        assert_eq!(
            error.message(),
            "Could not open backing file: a.img: error while reading at byte 7: Input/output error"
        );
        assert_eq!(
            (error.place(), error.kind, error.cause().as_str()),
            (Some(&place()), ErrorKind::Io, "Input/output error")
        );
        let error = Error::corrupt("torn").at(place());
        assert_eq!(
            (error.message().as_str(), error.cause().as_str()),
            ("a.img: error while reading at byte 7: torn", "torn")
        );
        assert_eq!(Error::corrupt("torn").place(), None);
    }

    #[test]
    fn the_error_of_an_image_in_an_image_keeps_its_kind_and_number() {
        for errno in [nix::errno::Errno::ENOSPC, nix::errno::Errno::EIO] {
            let inner = Err::<(), _>(storage::Error::from(errno)).at(place).unwrap_err();
            let lowered = storage::Error::from(inner);
            assert_eq!(lowered.errno(), Some(errno));
            let outer = Err::<(), _>(lowered).context("outer").unwrap_err();
            assert_eq!((outer.kind, outer.storage().and_then(storage::Error::errno)), (ErrorKind::Io, Some(errno)));
        }
        let lowered = storage::Error::from(Error::corrupt("torn").hint("mend it"));
        assert_eq!((lowered.errno(), lowered.to_string().as_str()), (None, "torn"));
        let outer = Error::from(lowered);
        assert_eq!((outer.kind, outer.all_hints()), (ErrorKind::Corrupt, vec!["mend it".to_owned()]));
        assert!(storage::Error::from(Error::unsupported("no such thing")).is_unsupported());
    }
}
