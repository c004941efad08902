//! A file of a server, of which one version is read however many requests that takes.
//!
//! Invariants: every byte is of the version that was there when the file was opened, as far as the server tells
//! versions apart; the number of requests for a range is bounded; what has come of a range is not asked for again.
//!
//! An answer of which more will be read is kept, as far as it goes, until its reader goes on where it stands, or asks for
//! something else.
//!
//! Lock order: `place` and `begun` are leaves, never held while a request is under way.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use ureq::http::StatusCode;

use super::client::{Answer, Client, NoAnswer};
use crate::protocols::ranged::Fetch;
use crate::protocols::url::address::Address;
use crate::protocols::url::again::{self, Persistence, Trouble, TroubleKind};
use crate::storage::{Error, Result};

/// How many redirects lead to a file at most.
const MOST_REDIRECTS: usize = 10;

/// See the module.
#[derive(Debug)]
pub struct HttpFile {
    client: Client,
    /// As the user has named it.
    origin: Address,
    /// Where redirects have led.
    place: Mutex<Address>,
    len: u64,
    version: Option<String>,
    persistence: Persistence,
    begun: Mutex<Vec<Begun>>,
}

/// An answer that was read in part.
#[derive(Debug)]
struct Begun {
    answer: Answer,
    /// Where in the file it stands, and ends.
    at: u64,
    end: u64,
    /// Who reads it: one at a time, so that nobody waits for an answer with another one in hand.
    reader: ThreadId,
}

impl From<NoAnswer> for Trouble {
    fn from(no: NoAnswer) -> Self {
        let kind = if no.passing { TroubleKind::Passing(None) } else { TroubleKind::Lasting };
        Self { text: no.text, kind }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HttpFile {
    /// Opens the file with that URL: beside it come its first bytes, `start` of them if there are so many.
    pub fn open(client: Client, url: &str, start: usize) -> Result<(Self, Vec<u8>)> {
        let origin = Address::parse(url).ok_or_else(|| Error::Other(format!("'{url}' is no URL")))?;
        let last = (start as u64).saturating_sub(1);
        let (place, len, version, bytes) = again::open(|| Self::ask_first(&client, &origin, last))?;
        let (place, persistence, begun) = (Mutex::new(place), Persistence::default(), Mutex::default());
        Ok((Self { client, origin, place, len, version, persistence, begun }, bytes))
    }

    /// How long it is.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The first request: where the file is, how long, in which version, and its first bytes.
    fn ask_first(
        client: &Client,
        origin: &Address,
        last: u64,
    ) -> std::result::Result<(Address, u64, Option<String>, Vec<u8>), Trouble> {
        let (place, mut answer) = follow(client, origin, origin.clone(), 0, last)?;
        let version = answer.version();
        match answer.status {
            StatusCode::PARTIAL_CONTENT => {}
            // A range of an empty file cannot be had.
            StatusCode::RANGE_NOT_SATISFIABLE if answer.range().and_then(|range| range.total) == Some(0) => {
                return Ok((place, 0, version, Vec::new()));
            }
            StatusCode::OK if answer.body_is_empty() => return Ok((place, 0, version, Vec::new())),
            StatusCode::OK => return Err(no_ranges(&answer)),
            status => return Err(unwelcome(status, &answer)),
        }
        let (bytes, total) = part(&answer, 0, last)?;
        let total = total.ok_or_else(|| Trouble::lasting("Server didn't report file size."))?;
        if bytes != last.saturating_add(1).min(total) {
            return Err(Trouble::passing(format!("the server sends {bytes} of the first bytes of {total}")));
        }
        let mut start = vec![0; usize::try_from(bytes).map_err(|_| Trouble::lasting("the answer is too long"))?];
        match answer.read(&mut start, true) {
            (_, None) => Ok((place, total, version, start)),
            (_, Some(no)) => Err(no.into()),
        }
    }

    /// As much of a range as comes in one answer, which may go on `behind` it.
    fn ask(&self, at: u64, buf: &mut [u8], behind: u64) -> (usize, std::result::Result<(), Trouble>) {
        let last = at.saturating_add(buf.len() as u64).saturating_add(behind).saturating_sub(1);
        let mut begun = match self.take_begun(at).map_or_else(|| self.begin(at, last), Ok) {
            Ok(begun) => begun,
            Err(trouble) => return (0, Err(trouble)),
        };
        let left = begun.end - begun.at;
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let (done, broken) = begun.answer.read(&mut buf[..len], len as u64 == left);
        begun.at += done as u64;
        if let Some(no) = broken {
            return (done, Err(no.into()));
        }
        if begun.at < begun.end {
            lock(&self.begun).push(begun);
        }
        (done, Ok(()))
    }

    fn take_begun(&self, at: u64) -> Option<Begun> {
        let mut all = lock(&self.begun);
        let reader = thread::current().id();
        let index = all.iter().position(|begun| begun.at == at && begun.reader == reader)?;
        Some(all.remove(index))
    }

    /// Sends a request, and looks at what the answer says of itself.
    fn begin(&self, at: u64, last: u64) -> std::result::Result<Begun, Trouble> {
        let reader = thread::current().id();
        lock(&self.begun).retain(|begun| begun.reader != reader);
        let place = lock(&self.place).clone();
        let (place, answer) = follow(&self.client, &self.origin, place, at, last)?;
        if is_gone(answer.status) && place.uri != self.origin.uri {
            // Where redirects led is no longer there: perhaps they lead elsewhere now.
            *lock(&self.place) = self.origin.clone();
            return Err(Trouble::passing(unwelcome(answer.status, &answer).text));
        }
        self.judge(&answer)?;
        *lock(&self.place) = place;
        let (bytes, _) = part(&answer, at, last)?;
        Ok(Begun { answer, at, end: at + bytes, reader })
    }

    /// Whether it is an answer, and of the version that we read.
    fn judge(&self, answer: &Answer) -> std::result::Result<(), Trouble> {
        let changed = || Trouble::lasting("the file has been changed on the server while it was read");
        let total = answer.range().and_then(|range| range.total);
        match answer.status {
            StatusCode::PARTIAL_CONTENT => {}
            StatusCode::RANGE_NOT_SATISFIABLE if total.is_some_and(|total| total != self.len) => return Err(changed()),
            StatusCode::OK if answer.version() != self.version => return Err(changed()),
            StatusCode::OK => return Err(no_ranges(answer)),
            status => return Err(unwelcome(status, answer)),
        }
        if total.is_some_and(|total| total != self.len) || answer.version() != self.version {
            return Err(changed());
        }
        Ok(())
    }
}

impl Fetch for HttpFile {
    fn fetch(&self, at: u64, buf: &mut [u8], behind: u64) -> Result<()> {
        self.persistence.fetch(at, buf, |at, buf| self.ask(at, buf, behind))
    }
}

/// Asks for a range at `place`, and where it is said to be then, until there is an answer that says nothing of the
/// kind (RFC 9110, section 15.4).
fn follow(
    client: &Client,
    origin: &Address,
    place: Address,
    from: u64,
    to: u64,
) -> std::result::Result<(Address, Answer), Trouble> {
    let mut place = place;
    for _ in 0..=MOST_REDIRECTS {
        let answer = client.get(&place, origin, from, to)?;
        if !matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok((place, answer));
        }
        let location = answer
            .location()
            .ok_or_else(|| Trouble::lasting("the server says that the file is elsewhere, but not where"))?;
        let next = place.join(location).ok_or_else(|| {
            Trouble::lasting(format!("the server says that the file is at '{location}', which is no URL of http"))
        })?;
        if place.is_secure() && !next.is_secure() {
            return Err(Trouble::lasting(format!("the server says that the file is at '{}', without TLS", next.uri)));
        }
        if client.untrusted && !next.is_same_place(origin) {
            return Err(Trouble::lasting(format!(
                "the server says that the file is at '{}', and an untrusted one may lead to no other server",
                next.uri
            )));
        }
        place = next;
    }
    Err(Trouble::lasting(format!("Maximum ({MOST_REDIRECTS}) redirects followed")))
}

/// How many bytes of the range that was asked for an answer has, all of them from its start, and how long the file is.
fn part(answer: &Answer, from: u64, to: u64) -> std::result::Result<(u64, Option<u64>), Trouble> {
    if !answer.is_plain() {
        return Err(Trouble::lasting("the server sends the file in an encoding that was not asked for"));
    }
    let range = answer.range().ok_or_else(|| Trouble::lasting("the server does not say which bytes it sends"))?;
    match range.bytes {
        Some((first, last))
            if first == from && last >= first && last <= to && range.total.is_none_or(|total| last < total) =>
        {
            Ok((last - first + 1, range.total))
        }
        Some((first, last)) => {
            Err(Trouble::lasting(format!("the server sends bytes {first}-{last} in place of {from}-{to}")))
        }
        None => Err(Trouble::lasting("the server does not say which bytes it sends")),
    }
}

fn no_ranges(answer: &Answer) -> Trouble {
    let text = match answer.claims_ranges() {
        true => "Server says that it supports 'range' (byte ranges), and sends the whole file",
        false => "Server does not support 'range' (byte ranges).",
    };
    Trouble::lasting(text)
}

/// It is not there, or not for us.
fn is_gone(status: StatusCode) -> bool {
    matches!(status.as_u16(), 401 | 403 | 404 | 410)
}

/// An answer that is none.
fn unwelcome(status: StatusCode, answer: &Answer) -> Trouble {
    let text = format!("The requested URL returned error: {}", status.as_u16());
    match status.as_u16() {
        408 | 429 | 500 | 502 | 503 | 504 => Trouble { text, kind: TroubleKind::Passing(answer.retry_after()) },
        _ => Trouble::lasting(text),
    }
}
