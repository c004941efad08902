//! What protocols have in common whose files are named by a URL and read range by range: their options, and how they are
//! opened. What is kept of a file is [`ranged`](super::ranged)'s.

pub mod address;
pub mod again;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Map;

use super::ranged::{Fetch, Ranged, block_size};
use crate::block::keys::{take_number, take_size, take_switch, take_text};
use crate::block::protocol::{CreateFile, FileRequest, OpenedFile, Protocol, SendFile, Spelt};
use crate::block::{Error, OptionTree, Result, SecretBytes, Secrets};
use crate::storage;

/// A protocol, under one of its names.
#[derive(Debug)]
pub struct ByUrl {
    /// What URLs of it start with.
    pub name: &'static str,
    /// Opens a file.
    pub open: fn(&Wanted<'_>, Wishes) -> storage::Result<Remote>,
    /// Sends one, where that can be done.
    pub send: Option<&'static dyn SendFile>,
    /// The files that say who asks, as [`Protocol::credentials`] does.
    pub credentials: fn() -> Vec<PathBuf>,
    /// As [`Protocol::keeps_what_comes`] says.
    pub keeps: bool,
}

/// What is to be opened.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Its URL, which starts as it should.
    pub url: &'a str,
    /// So many bytes from its start are wanted at once, if they can be had with the same request.
    pub start: usize,
    /// Nothing that a server says may lead to another one.
    pub untrusted: bool,
}

/// A file that was opened.
pub struct Remote {
    /// It.
    pub file: Box<dyn Fetch>,
    /// How long it is.
    pub len: u64,
    /// Its first bytes, as far as they came along.
    pub start: Vec<u8>,
    /// Requests at once that suit it.
    pub parallel: u32,
}

/// Bytes that are fetched where less is asked for, if nothing else is said.
const READ_AHEAD: u64 = 256 << 10;

/// Seconds to wait, if nothing else is said, and the most that can be.
const TIMEOUT: u64 = 5;
const LONGEST_TIMEOUT: u64 = 10_000;
/// A store that has taken a part may think for a while.
const SENDING_TIMEOUT: u64 = 120;

/// Options without which it would not be the same file.
const STRONG: [&str; 8] = [
    "url",
    "sslverify",
    "cookie",
    "cookie-secret",
    "username",
    "password-secret",
    "proxy-username",
    "proxy-password-secret",
];

impl Protocol for ByUrl {
    fn name(&self) -> &'static str {
        self.name
    }

    fn takes(&self, _path: &Path) -> bool {
        false
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn credentials(&self) -> Vec<PathBuf> {
        (self.credentials)()
    }

    fn keeps_what_comes(&self) -> bool {
        self.keeps
    }

    fn spelt(&self, rest: &OsStr) -> Result<Spelt> {
        let mut name = OsString::from(self.name);
        name.push(":");
        name.push(rest);
        self.plain(&name)
    }

    fn plain(&self, name: &OsStr) -> Result<Spelt> {
        let url = name.to_str().ok_or_else(|| self.cannot_handle(&name.to_string_lossy()))?;
        self.check(url)?;
        Ok(Spelt { path: None, options: OptionTree::from_iter([("url".to_owned(), url.into())]) })
    }

    fn take_name(&self, path: Option<OsString>, _options: &mut OptionTree) -> Result<Option<OsString>> {
        Ok(path)
    }

    fn open(&self, request: FileRequest<'_>) -> Result<OpenedFile> {
        let FileRequest { options, write, secrets, untrusted, .. } = request;
        if write {
            return Err(Error::unsupported("curl driver does not support writes"));
        }
        let strong = STRONG.into_iter().filter_map(|key| Some((key.to_owned(), options.get(key)?.clone())));
        let strong = Map::from_iter(strong);
        let wishes = Wishes::take(options, secrets)?;
        let url =
            take_text(options, "url").ok_or_else(|| Error::invalid("curl block driver requires an 'url' option"))?;
        self.check(&url)?;
        let refuse = |error: storage::Error| Error::from(error).context("CURL: Error opening file");
        let ahead = wishes.read_ahead;
        let wanted = Wanted { url: &url, start: block_size(ahead), untrusted };
        let Remote { file, len, start, parallel } = (self.open)(&wanted, wishes).map_err(refuse)?;
        let storage = Arc::new(Ranged::new(file, len, ahead, parallel).with_start(&start));
        let path = (strong.len() == 1).then(|| url.into());
        Ok(OpenedFile { storage, path, based: true, strong, locking: false })
    }

    fn sending(&self) -> Option<&'static dyn SendFile> {
        self.send
    }

    fn creating(&self) -> Option<&'static dyn CreateFile> {
        None
    }
}

impl ByUrl {
    /// Refuses what is no URL of this protocol.
    fn check(&self, url: &str) -> Result<()> {
        let rest = url.strip_prefix(self.name).and_then(|rest| rest.strip_prefix("://"));
        rest.map(drop).ok_or_else(|| self.cannot_handle(url))
    }

    fn cannot_handle(&self, url: &str) -> Error {
        let name = self.name;
        Error::invalid(format!("{name} curl driver cannot handle the URL '{url}' (does not start with '{name}://')"))
    }
}

/// A name and a password.
#[derive(Debug, Clone, Default)]
pub struct Login {
    /// The name.
    pub name: String,
    /// The password.
    pub password: SecretBytes,
}

/// What options say of how a file is fetched.
#[derive(Debug)]
pub struct Wishes {
    read_ahead: u64,
    /// How long nothing may come; `None` for ever.
    pub timeout: Option<Duration>,
    /// A server has to show that it is who it says.
    pub verify: bool,
    /// What a server is to remember.
    pub cookie: Option<SecretBytes>,
    /// Who asks.
    pub login: Option<Login>,
    /// Who asks a proxy.
    pub proxy_login: Option<Login>,
}

impl Wishes {
    /// What is taken for a file that is sent, of which options say nothing.
    pub fn sending() -> Self {
        Self {
            read_ahead: READ_AHEAD,
            timeout: Some(Duration::from_secs(SENDING_TIMEOUT)),
            verify: true,
            cookie: None,
            login: None,
            proxy_login: None,
        }
    }

    fn take(options: &mut OptionTree, secrets: &Secrets) -> Result<Self> {
        let read_ahead = take_size(options, "readahead")?.unwrap_or(READ_AHEAD);
        if !read_ahead.is_multiple_of(512) {
            return Err(Error::invalid(format!("HTTP_READAHEAD_SIZE {read_ahead} is not a multiple of 512")));
        }
        let timeout = take_number(options, "timeout")?.unwrap_or(TIMEOUT);
        if timeout > LONGEST_TIMEOUT {
            return Err(Error::invalid("timeout parameter is too large or negative"));
        }
        let verify = take_switch(options, "sslverify")?.unwrap_or(true);
        let cookie = take_text(options, "cookie").map(|text| text.into_bytes().into());
        let cookie = match (cookie, take_text(options, "cookie-secret")) {
            (Some(_), Some(_)) => {
                return Err(Error::invalid("curl driver cannot handle both cookie and cookie secret"));
            }
            (None, Some(id)) => Some(secrets.passphrase(&id)?.as_bytes().to_vec().into()),
            (cookie, None) => cookie,
        };
        Ok(Self {
            read_ahead,
            timeout: (timeout > 0).then(|| Duration::from_secs(timeout)),
            verify,
            cookie,
            login: take_login(options, secrets, "username", "password-secret")?,
            proxy_login: take_login(options, secrets, "proxy-username", "proxy-password-secret")?,
        })
    }
}

/// A password without a name is no login.
fn take_login(options: &mut OptionTree, secrets: &Secrets, name: &str, password: &str) -> Result<Option<Login>> {
    let name = take_text(options, name);
    let password = match take_text(options, password) {
        Some(id) => secrets.passphrase(&id)?.as_bytes().to_vec().into(),
        None => SecretBytes::default(),
    };
    Ok(name.map(|name| Login { name, password }))
}
