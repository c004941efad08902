//! `gs`: objects of Google Cloud Storage, `gs://bucket/key`, read by ranges over HTTP, and written whole.
//!
//! The store speaks Amazon's protocol for what is done here ("XML API" of its documentation, among it "XML API
//! multipart uploads"); only who asks is said in another way ([`token`]).

mod token;

use self::token::Tokens;
use super::http::client::Client;
use super::http::open_signed;
use super::store::multipart::Multipart;
use super::store::upload::Upload;
use super::store::{Environment, Sign, bucket_and_key, encoded};
use super::url::{ByUrl, Remote, Wanted, Wishes};
use crate::block::protocol::SendFile;
use crate::block::{self, OptionTree};
use crate::storage::outgoing::Outgoing;
use crate::storage::{Error, Result};

/// The protocol.
pub const GS: ByUrl = ByUrl { name: "gs", open, send: Some(&Objects), credentials: token::files, keeps: false };

/// Where the store is, unless a variable says where another one is.
const ENDPOINT: &str = "https://storage.googleapis.com";

/// Objects that are written.
#[derive(Debug)]
struct Objects;

fn open(wanted: &Wanted<'_>, wishes: Wishes) -> Result<Remote> {
    if wishes.login.is_some() {
        return Err(Error::Other("gs takes no 'username': GOOGLE_APPLICATION_CREDENTIALS says who asks".to_owned()));
    }
    let (url, signer) = find(wanted.url)?;
    open_signed(&Wanted { url: &url, ..*wanted }, wishes, signer)
}

impl SendFile for Objects {
    fn send(&self, options: &OptionTree, len: u64) -> block::Result<Box<dyn Outgoing>> {
        let url = options.get("url").and_then(|url| url.as_str()).unwrap_or_default();
        let (url, signer) = find(url)?;
        let client = Client::new(Wishes::sending(), signer, false);
        Ok(Box::new(Upload::new(Box::new(Multipart::new(client, url)), len)))
    }
}

/// The URL of an object over HTTP, and who asks for it.
fn find(url: &str) -> Result<(String, Option<Box<dyn Sign>>)> {
    let environment = Environment::of_process();
    let place = place(url, environment.get("STORAGE_EMULATOR_HOST").as_deref());
    let place = place.ok_or_else(|| Error::Other(format!("'{url}' names no object: gs://BUCKET/KEY does")))?;
    let tokens = Tokens::find(&environment).map_err(Error::Other)?;
    Ok((place, tokens.map(|tokens| -> Box<dyn Sign> { Box::new(tokens) })))
}

fn place(url: &str, endpoint: Option<&str>) -> Option<String> {
    let (bucket, key) = bucket_and_key(url, "gs")?;
    let endpoint = match endpoint {
        Some(endpoint) if endpoint.contains("://") => endpoint.trim_end_matches('/').to_owned(),
        Some(endpoint) => format!("http://{}", endpoint.trim_end_matches('/')),
        None => ENDPOINT.to_owned(),
    };
    Some(format!("{endpoint}/{bucket}/{}", encoded(key, "/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_have_urls() {
        assert_eq!(place("gs://b/d/a +", None).as_deref(), Some("https://storage.googleapis.com/b/d/a%20%2B"));
        assert_eq!(place("gs://b/k", Some("h:1")).as_deref(), Some("http://h:1/b/k"));
        assert_eq!(place("gs://b/k", Some("https://h/")).as_deref(), Some("https://h/b/k"));
        assert_eq!(place("gs://b", None), None);
    }
}
