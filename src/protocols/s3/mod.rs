//! `s3`: objects of stores that speak Amazon's protocol, `s3://bucket/key`, read by ranges over HTTP, and written whole.
//!
//! `credentials` is who asks, as the environment and the usual files say; `signature` shows it to the store. Without
//! credentials requests are not signed, which is enough for public objects.

mod credentials;
mod signature;

use self::credentials::{Credentials, Settings};
use self::signature::Signer;
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
pub const S3: ByUrl = ByUrl { name: "s3", open, send: Some(&Objects), credentials: credentials::files, keeps: false };

/// Objects that are written.
#[derive(Debug)]
struct Objects;

/// The region, where nothing says which.
const REGION: &str = "us-east-1";

fn open(wanted: &Wanted<'_>, wishes: Wishes) -> Result<Remote> {
    if wishes.login.is_some() {
        return Err(Error::Other("s3 takes no 'username': AWS_ACCESS_KEY_ID and AWS_PROFILE say who asks".to_owned()));
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
    let settings = Settings::of(Environment::of_process());
    let region = settings.region().unwrap_or_else(|| REGION.to_owned());
    let place = place(url, &region, settings.endpoint().as_deref());
    let place = place.ok_or_else(|| Error::Other(format!("'{url}' names no object: s3://BUCKET/KEY does")))?;
    let credentials = settings.credentials().map_err(Error::Other)?;
    let signer = |credentials: Credentials| -> Box<dyn Sign> { Box::new(Signer::new(credentials, region)) };
    Ok((place, credentials.map(signer)))
}

/// The URL of an object over HTTP: below the endpoint, if one is named, or else at Amazon's for that region.
fn place(url: &str, region: &str, endpoint: Option<&str>) -> Option<String> {
    let (bucket, key) = bucket_and_key(url, "s3")?;
    if region.is_empty() || !region.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return None;
    }
    let key = encoded(key, "/");
    Some(match endpoint {
        Some(endpoint) => format!("{}/{bucket}/{key}", endpoint.trim_end_matches('/')),
        // A certificate for all buckets is for none with a dot.
        None if bucket.contains(['.', '_']) => format!("https://s3.{region}.amazonaws.com/{bucket}/{key}"),
        None => format!("https://{bucket}.s3.{region}.amazonaws.com/{key}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_have_urls() {
        let of = |url, endpoint| place(url, "eu-west-1", endpoint);
        let amazon = "https://b.s3.eu-west-1.amazonaws.com/d/a%20%2B%C3%BC?";
        assert_eq!(of("s3://b/d/a +\u{fc}", None).as_deref(), amazon.strip_suffix('?'));
        assert_eq!(of("s3://b.c/k", None).as_deref(), Some("https://s3.eu-west-1.amazonaws.com/b.c/k"));
        assert_eq!(of("s3://b/k", Some("http://h:9000/")).as_deref(), Some("http://h:9000/b/k"));
        for bad in ["s3://b", "s3://b/", "s3:///k", "s3://b@c/k", "s3://b#/k"] {
            assert_eq!(of(bad, None), None, "{bad}");
        }
    }
}
