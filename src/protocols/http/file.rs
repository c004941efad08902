//! A file of a server, of which one version is read however many requests that takes.
//!
//! Invariants: every byte is of the version that was there when the file was opened, as far as the server tells
//! versions apart; the number of requests for a range is bounded; what has come of a range is not asked for again.
//!
//! Lock order: `place` and `lost` are leaves, never held while a request is under way.

use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ureq::http::StatusCode;

use super::address::Address;
use super::client::{Answer, Client, NoAnswer};
use crate::protocols::ranged::Fetch;
use crate::storage::{Error, Result};

/// How often a range is asked for that does not come.
const TRIES: u32 = 6;

/// How long is waited before the second try; before each further one twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause that a server can ask for.
const LONGEST_PAUSE: u64 = 30;

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
    /// Why nothing is asked for any more.
    lost: Mutex<Option<String>>,
}

/// Why a range has not come, or not all of it.
#[derive(Debug)]
struct Trouble {
    text: String,
    kind: TroubleKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TroubleKind {
    /// It may go better the next time, after so many seconds if that is said.
    Passing(Option<u64>),
    /// The place that redirects led to is no longer there.
    Moved,
    /// Not that range, and no other one.
    Lasting,
}

impl Trouble {
    fn lasting(text: impl Into<String>) -> Self {
        Self { text: text.into(), kind: TroubleKind::Lasting }
    }

    fn passing(text: impl Into<String>) -> Self {
        Self { text: text.into(), kind: TroubleKind::Passing(None) }
    }
}

impl From<NoAnswer> for Trouble {
    fn from(no: NoAnswer) -> Self {
        let kind = if no.passing { TroubleKind::Passing(None) } else { TroubleKind::Lasting };
        Self { text: no.text, kind }
    }
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        Error::Other(trouble.text)
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
        let mut tries = 0;
        loop {
            match Self::ask_first(&client, &origin, last) {
                Ok((place, len, version, bytes)) => {
                    let (place, lost) = (Mutex::new(place), Mutex::default());
                    return Ok((Self { client, origin, place, len, version, lost }, bytes));
                }
                Err(Trouble { kind: TroubleKind::Passing(after), .. }) if tries + 1 < TRIES / 2 => pause(tries, after),
                Err(trouble) => return Err(trouble.into()),
            }
            tries += 1;
        }
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
        match answer.read(&mut start) {
            (_, None) => Ok((place, total, version, start)),
            (_, Some(no)) => Err(no.into()),
        }
    }

    /// As much of a range as comes in one answer.
    fn ask(&self, at: u64, buf: &mut [u8]) -> (usize, std::result::Result<(), Trouble>) {
        let last = at.saturating_add(buf.len() as u64).saturating_sub(1);
        let place = lock(&self.place).clone();
        let (place, mut answer) = match follow(&self.client, &self.origin, place, at, last) {
            Ok(answer) => answer,
            Err(trouble) => return (0, Err(trouble)),
        };
        if let Err(trouble) = self.judge(&answer) {
            return (0, Err(trouble));
        }
        *lock(&self.place) = place;
        match part(&answer, at, last) {
            Ok((bytes, _)) => {
                let len = usize::try_from(bytes).unwrap_or(usize::MAX).min(buf.len());
                let (done, broken) = answer.read(&mut buf[..len]);
                (done, broken.map_or(Ok(()), |no| Err(no.into())))
            }
            Err(trouble) => (0, Err(trouble)),
        }
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
    fn fetch(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let (mut done, mut tries) = (0, 0);
        while done < buf.len() {
            if let Some(text) = &*lock(&self.lost) {
                return Err(Error::Other(text.clone()));
            }
            let (came, result) = self.ask(at + done as u64, &mut buf[done..]);
            done += came;
            let Err(mut trouble) = result else { continue };
            // A server that gives a little each time is asked on, but not for ever.
            tries = if came >= 65536 { 0 } else { tries + 1 };
            let again = match trouble.kind {
                TroubleKind::Moved => {
                    *lock(&self.place) = self.origin.clone();
                    true
                }
                TroubleKind::Passing(_) => true,
                TroubleKind::Lasting => false,
            };
            if again && tries < TRIES {
                pause(tries.saturating_sub(1), trouble.after());
                continue;
            }
            let _ = write!(trouble.text, " (at byte {} of the file)", at + done as u64);
            *lock(&self.lost) = Some(trouble.text.clone());
            return Err(trouble.into());
        }
        Ok(())
    }
}

impl Trouble {
    fn after(&self) -> Option<u64> {
        match self.kind {
            TroubleKind::Passing(after) => after,
            _ => None,
        }
    }
}

fn pause(tries: u32, after: Option<u64>) {
    let own = FIRST_PAUSE.saturating_mul(2u32.saturating_pow(tries));
    std::thread::sleep(after.map_or(own, |seconds| Duration::from_secs(seconds.min(LONGEST_PAUSE))));
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
            let gone = !place.has_origin_of(origin) || place.uri != origin.uri;
            if gone && matches!(answer.status.as_u16(), 401 | 403 | 404 | 410) {
                let kind = TroubleKind::Moved;
                return Err(Trouble { kind, ..unwelcome(answer.status, &answer) });
            }
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

/// An answer that is none.
fn unwelcome(status: StatusCode, answer: &Answer) -> Trouble {
    let text = format!("The requested URL returned error: {}", status.as_u16());
    match status.as_u16() {
        408 | 429 | 500 | 502 | 503 | 504 => Trouble { text, kind: TroubleKind::Passing(answer.retry_after()) },
        _ => Trouble::lasting(text),
    }
}
