//! `http` and `https` (RFC 9110, RFC 9112): files of servers that give ranges of them, read and never written.
//!
//! `client` sends one request, `proxy` decides what it goes through, `file` keeps to one version of the file, follows
//! redirects and tries again.

pub mod client;
mod file;
mod proxy;

use self::client::Client;
use self::file::HttpFile;
use super::store::Sign;
use super::url::{ByUrl, Remote, Wanted, Wishes};
use crate::storage::Result;

/// Without encryption.
pub const HTTP: ByUrl = ByUrl { name: "http", open, send: None, credentials: Vec::new, keeps: false };
/// Over TLS.
pub const HTTPS: ByUrl = ByUrl { name: "https", open, send: None, credentials: Vec::new, keeps: false };

/// Requests under way at once.
const PARALLEL: u32 = 16;

fn open(wanted: &Wanted<'_>, wishes: Wishes) -> Result<Remote> {
    open_signed(wanted, wishes, None)
}

/// Opens a file of a server that wants requests signed.
pub fn open_signed(wanted: &Wanted<'_>, wishes: Wishes, signer: Option<Box<dyn Sign>>) -> Result<Remote> {
    let client = Client::new(wishes, signer, wanted.untrusted);
    let (file, start) = HttpFile::open(client, wanted.url, wanted.start)?;
    let len = file.len();
    Ok(Remote { file: Box::new(file), len, start, parallel: PARALLEL })
}
