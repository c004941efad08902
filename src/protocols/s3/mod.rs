//! `s3`: objects of stores that speak Amazon's protocol, `s3://bucket/key`, read by ranges over HTTP, and not written.
//!
//! `credentials` is who asks, as the environment and the usual files say; `signature` shows it to the store. Without
//! credentials requests are not signed, which is enough for public objects.

mod credentials;
mod signature;

use self::credentials::{Credentials, Environment};
pub use self::signature::Signer;
use super::http::open_signed;
use super::url::{ByUrl, Remote, Wanted, Wishes};
use crate::storage::{Error, Result};

/// The protocol.
pub const S3: ByUrl = ByUrl { name: "s3", open };

/// The region, where nothing says which.
const REGION: &str = "us-east-1";

fn open(wanted: &Wanted<'_>, wishes: Wishes) -> Result<Remote> {
    if wishes.login.is_some() {
        return Err(Error::Other("s3 takes no 'username': AWS_ACCESS_KEY_ID and AWS_PROFILE say who asks".to_owned()));
    }
    let environment = Environment::of_process();
    let region = environment.region().unwrap_or_else(|| REGION.to_owned());
    let url = place(wanted.url, &region, environment.endpoint().as_deref());
    let url = url.ok_or_else(|| Error::Other(format!("'{}' names no object: s3://BUCKET/KEY does", wanted.url)))?;
    let credentials = environment.credentials().map_err(Error::Other)?;
    let signer = credentials.map(|credentials: Credentials| Signer::new(credentials, region));
    open_signed(&Wanted { url: &url, ..*wanted }, wishes, signer)
}

/// The URL of an object over HTTP: below the endpoint, if one is named, or else at Amazon's for that region.
fn place(url: &str, region: &str, endpoint: Option<&str>) -> Option<String> {
    let (bucket, key) = url.strip_prefix("s3://")?.split_once('/')?;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if bucket.is_empty()
        || key.is_empty()
        || !bucket.chars().all(good)
        || region.is_empty()
        || !region.chars().all(good)
    {
        return None;
    }
    let key = encoded(key);
    Some(match endpoint {
        Some(endpoint) => format!("{}/{bucket}/{key}", endpoint.trim_end_matches('/')),
        // A certificate for all buckets is for none with a dot.
        None if bucket.contains(['.', '_']) => format!("https://s3.{region}.amazonaws.com/{bucket}/{key}"),
        None => format!("https://{bucket}.s3.{region}.amazonaws.com/{key}"),
    })
}

/// A key as it stands in a URL: all but the unreserved characters (RFC 3986, section 2.3) and slashes is encoded.
fn encoded(key: &str) -> String {
    let mut out = String::with_capacity(key.len());
    for byte in key.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
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
