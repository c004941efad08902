//! `ftp` and `ftps` (RFC 959, RFC 2428, RFC 3659; RFC 4217 with TLS from the first byte on): files that are read from any
//! place on (`REST`), and never written.
//!
//! `session` is a connection with a server, `wire` its bytes, encrypted or not; here is the file, for which as many
//! sessions are kept as are used at once.
//!
//! FTP sends a file to its end: a transfer that was read in part is gone on with, where the next read starts where it
//! stands, or else ended.
//!
//! Lock order: `idle` is a leaf, never held while anything is sent or awaited.

mod session;
mod wire;

use std::sync::{Mutex, PoisonError};

use self::session::{FileFacts, Session};
use self::wire::Dialer;
use super::ranged::Fetch;
use super::url::address::Address;
use super::url::again::{self, Persistence, Trouble};
use super::url::{ByUrl, Login, Remote, Wanted, Wishes};
use crate::storage::{Error, Result};

/// Without encryption.
pub const FTP: ByUrl = ByUrl { name: "ftp", open, send: None, credentials: Vec::new, keeps: false };
/// Over TLS.
pub const FTPS: ByUrl = ByUrl { name: "ftps", open, send: None, credentials: Vec::new, keeps: false };

/// Sessions at once: servers allow an address but a few.
const PARALLEL: u32 = 4;

fn open(wanted: &Wanted<'_>, wishes: Wishes) -> Result<Remote> {
    let bad = || Error::Other(format!("'{}' is no URL of a file", wanted.url));
    let address = Address::parse(wanted.url).ok_or_else(bad)?;
    let path = address.file().filter(|path| !path.is_empty()).ok_or_else(bad)?;
    let login = wishes.login.clone().or(address.login.clone()).unwrap_or_else(anonymous);
    let dialer = Dialer::new(&address, &wishes)?;
    let (first, facts) = again::open(|| {
        let mut session = Session::begin(&dialer, &login)?;
        let facts = session.facts_of(&path)?;
        Ok((session, facts))
    })?;
    let len = facts.len;
    let idle = Mutex::new(vec![first]);
    let file = FtpFile { dialer, login, path, facts, idle, persistence: Persistence::default() };
    Ok(Remote { file: Box::new(file), len, start: Vec::new(), parallel: PARALLEL })
}

/// RFC 1635.
fn anonymous() -> Login {
    Login { name: "anonymous".to_owned(), password: b"vimg@example.org".to_vec().into() }
}

/// See the module.
#[derive(Debug)]
struct FtpFile {
    dialer: Dialer,
    login: Login,
    path: Vec<u8>,
    facts: FileFacts,
    /// Sessions that nobody uses now.
    idle: Mutex<Vec<Session>>,
    persistence: Persistence,
}

impl FtpFile {
    /// A session to read from `at` on: best one that stands there.
    fn session(&self, at: u64) -> std::result::Result<Session, Trouble> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let best = idle.iter().position(|session| session.stands_at() == Some(at));
        let best = best.or_else(|| idle.iter().position(|session| session.stands_at().is_none()));
        if let Some(best) = best.or_else(|| idle.len().checked_sub(1)) {
            return Ok(idle.swap_remove(best));
        }
        drop(idle);
        Session::begin(&self.dialer, &self.login)
    }

    fn ask(&self, at: u64, buf: &mut [u8]) -> (usize, std::result::Result<(), Trouble>) {
        let mut session = match self.session(at) {
            Ok(session) => session,
            Err(trouble) => return (0, Err(trouble)),
        };
        let (done, result) = session.read(&self.dialer, &self.path, &self.facts, at, buf);
        // One that has failed is closed.
        if result.is_ok() {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(session);
        }
        (done, result)
    }
}

impl Fetch for FtpFile {
    fn fetch(&self, at: u64, buf: &mut [u8], _behind: u64) -> Result<()> {
        self.persistence.fetch(at, buf, |at, buf| self.ask(at, buf))
    }
}
