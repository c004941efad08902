//! `az`: block blobs of Azure Blob Storage, `az://container/blob`, read by ranges over HTTP, and written whole.
//!
//! `account` is whose they are and who asks, as the environment says; `blocks` is how a blob is sent. Source: the "Blob
//! service REST API" of the Azure Storage documentation.

mod account;
mod blocks;

use self::account::Account;
use self::blocks::Blocks;
use super::http::client::Client;
use super::http::open_signed;
use super::store::upload::Upload;
use super::store::{Environment, Sign, bucket_and_key, encoded};
use super::url::{ByUrl, Remote, Wanted, Wishes};
use crate::block::protocol::SendFile;
use crate::block::{self, OptionTree};
use crate::storage::outgoing::Outgoing;
use crate::storage::{Error, Result};

/// The protocol.
pub const AZ: ByUrl = ByUrl { name: "az", open, send: Some(&Blobs), credentials: Vec::new, keeps: false };

/// Blobs that are written.
#[derive(Debug)]
struct Blobs;

/// Where a blob is, and who asks for it.
struct Place {
    /// Without a query.
    url: String,
    /// What every query has.
    leave: Option<String>,
    signer: Option<Box<dyn Sign>>,
}

fn open(wanted: &Wanted<'_>, wishes: Wishes) -> Result<Remote> {
    if wishes.login.is_some() {
        return Err(Error::Other("az takes no 'username': AZURE_STORAGE_ACCOUNT and the like say who asks".to_owned()));
    }
    let Place { url, leave, signer } = find(wanted.url)?;
    let url = leave.map_or(url.clone(), |leave| format!("{url}?{leave}"));
    open_signed(&Wanted { url: &url, ..*wanted }, wishes, signer)
}

impl SendFile for Blobs {
    fn send(&self, options: &OptionTree, len: u64) -> block::Result<Box<dyn Outgoing>> {
        let url = options.get("url").and_then(|url| url.as_str()).unwrap_or_default();
        let Place { url, leave, signer } = find(url)?;
        let client = Client::new(Wishes::sending(), signer, false);
        Ok(Box::new(Upload::new(Box::new(Blocks::new(client, url, leave)), len)))
    }
}

fn find(url: &str) -> Result<Place> {
    let (container, blob) = bucket_and_key(url, "az")
        .ok_or_else(|| Error::Other(format!("'{url}' names no blob: az://CONTAINER/BLOB does")))?;
    let Account { endpoint, leave, key } = Account::find(&Environment::of_process()).map_err(Error::Other)?;
    let url = format!("{endpoint}/{container}/{}", encoded(blob, "/"));
    Ok(Place { url, leave, signer: key.map(|key| -> Box<dyn Sign> { Box::new(key) }) })
}
