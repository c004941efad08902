//! A blob in blocks.
//!
//! Source: "Put Blob", "Put Block" and "Put Block List" of the Blob service REST API. Blocks that no list names are
//! dropped by the service itself.

use std::fmt::Write as _;

use ureq::http::Method;

use crate::codec::base64;
use crate::protocols::http::client::{Answer, Client};
use crate::protocols::store::encoded;
use crate::protocols::store::multipart::refusal;
use crate::protocols::store::upload::Store;
use crate::protocols::url::address::Address;
use crate::protocols::url::again::Trouble;

/// A blob to be.
#[derive(Debug)]
pub struct Blocks {
    client: Client,
    /// Its URL, without a query.
    url: String,
    /// What every query has.
    leave: Option<String>,
}

type Result<T> = std::result::Result<T, Trouble>;

impl Blocks {
    /// The blob with that URL.
    pub fn new(client: Client, url: String, leave: Option<String>) -> Self {
        Self { client, url, leave }
    }

    fn send(&self, query: &[(&str, &str)], body: &[u8], headers: &[(&'static str, String)]) -> Result<Answer> {
        let mut url = self.url.clone();
        let own = query.iter().map(|(key, value)| format!("{key}={}", encoded(value, "")));
        for (n, pair) in own.chain(self.leave.clone()).enumerate() {
            let _ = write!(url, "{}{pair}", if n == 0 { '?' } else { '&' });
        }
        let at = Address::parse(&url).ok_or_else(|| Trouble::lasting(format!("'{}' is no URL", self.url)))?;
        let mut answer = self.client.send(&at, &Method::PUT, body, headers)?;
        match answer.status {
            status if status.is_success() => Ok(answer),
            status => Err(refusal(status, &mut answer)),
        }
    }
}

impl Store for Blocks {
    fn put(&self, bytes: &[u8]) -> Result<()> {
        self.send(&[], bytes, &[("x-ms-blob-type", "BlockBlob".to_owned())]).map(drop)
    }

    fn begin(&self) -> Result<String> {
        Ok(String::new())
    }

    fn put_part(&self, _upload: &str, number: u32, bytes: &[u8]) -> Result<String> {
        // Names of blocks are as long as each other.
        let name = base64::encode(format!("{number:08}").as_bytes());
        self.send(&[("blockid", &name), ("comp", "block")], bytes, &[])?;
        Ok(name)
    }

    fn complete(&self, _upload: &str, parts: &[String]) -> Result<()> {
        let mut list = "<?xml version=\"1.0\" encoding=\"utf-8\"?><BlockList>".to_owned();
        for name in parts {
            let _ = write!(list, "<Latest>{name}</Latest>");
        }
        list.push_str("</BlockList>");
        self.send(&[("comp", "blocklist")], list.as_bytes(), &[]).map(drop)
    }

    fn give_up(&self, _upload: &str) -> Result<()> {
        Ok(())
    }
}
