//! Objects in parts as Amazon's stores take them, and others that speak their protocol.
//!
//! Source: "Uploading and copying objects using multipart upload", and the operations CreateMultipartUpload, UploadPart,
//! CompleteMultipartUpload, AbortMultipartUpload and PutObject of the Amazon S3 API Reference.

use std::fmt::Write as _;

use roxmltree::Document;
use ureq::http::{Method, StatusCode};

use super::encoded;
use super::upload::Store;
use crate::protocols::http::client::{Answer, Client};
use crate::protocols::url::address::Address;
use crate::protocols::url::again::{Trouble, TroubleKind};

/// The longest answer that is read.
const LONGEST: u64 = 1 << 20;

/// An object to be.
#[derive(Debug)]
pub struct Multipart {
    client: Client,
    /// Its URL, without a query.
    url: String,
}

type Result<T> = std::result::Result<T, Trouble>;

impl Multipart {
    /// The object with that URL.
    pub fn new(client: Client, url: String) -> Self {
        Self { client, url }
    }

    /// Sends a request; keys of the query stand in their order.
    fn send(&self, method: &Method, query: &[(&str, &str)], body: &[u8]) -> Result<Answer> {
        let mut url = self.url.clone();
        for (n, (key, value)) in query.iter().enumerate() {
            let _ = write!(url, "{}{key}={}", if n == 0 { '?' } else { '&' }, encoded(value, ""));
        }
        let at = Address::parse(&url).ok_or_else(|| Trouble::lasting(format!("'{url}' is no URL")))?;
        let mut answer = self.client.send(&at, method, body, &[])?;
        match answer.status {
            status if status.is_success() => Ok(answer),
            status => Err(refusal(status, &mut answer)),
        }
    }
}

impl Store for Multipart {
    fn put(&self, bytes: &[u8]) -> Result<()> {
        self.send(&Method::PUT, &[], bytes).map(drop)
    }

    fn begin(&self) -> Result<String> {
        let text = self.send(&Method::POST, &[("uploads", "")], &[])?.text(LONGEST)?;
        element(&text, "UploadId").ok_or_else(|| Trouble::lasting("the store does not say what the upload is called"))
    }

    fn put_part(&self, upload: &str, number: u32, bytes: &[u8]) -> Result<String> {
        let number = number.to_string();
        let answer = self.send(&Method::PUT, &[("partNumber", &number), ("uploadId", upload)], bytes)?;
        let tag = answer.tag().map(str::to_owned);
        tag.ok_or_else(|| Trouble::lasting("the store does not say what a part is called"))
    }

    fn complete(&self, upload: &str, parts: &[String]) -> Result<()> {
        let mut body = "<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">".to_owned();
        for (n, tag) in parts.iter().enumerate() {
            let (number, tag) = (n + 1, escaped(tag));
            let _ = write!(body, "<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>");
        }
        body.push_str("</CompleteMultipartUpload>");
        let mut answer = self.send(&Method::POST, &[("uploadId", upload)], body.as_bytes())?;
        // An answer that begins well may end with an error.
        let text = answer.text(LONGEST)?;
        match said(&text) {
            Some(said) if element(&text, "Code").as_deref() == Some("InternalError") => Err(Trouble::passing(said)),
            Some(said) => Err(Trouble::lasting(said)),
            None => Ok(()),
        }
    }

    fn give_up(&self, upload: &str) -> Result<()> {
        self.send(&Method::DELETE, &[("uploadId", upload)], &[]).map(drop)
    }
}

/// An answer that is none.
pub fn refusal(status: StatusCode, answer: &mut Answer) -> Trouble {
    let after = answer.retry_after();
    let said = answer.text(LONGEST).ok().and_then(|text| said(&text));
    let mut text = format!("The requested URL returned error: {}", status.as_u16());
    if let Some(said) = said {
        let _ = write!(text, " ({said})");
    }
    match status.as_u16() {
        408 | 429 | 500 | 502 | 503 | 504 => Trouble { text, kind: TroubleKind::Passing(after) },
        _ => Trouble::lasting(text),
    }
}

/// What a store says went wrong: a code, and words.
fn said(text: &str) -> Option<String> {
    let document = Document::parse(text).ok()?;
    let error = document.root_element();
    let child = |name: &str| error.children().find(|node| node.has_tag_name(name))?.text();
    match error.tag_name().name() {
        "Error" => Some(format!("{}: {}", child("Code")?, child("Message").unwrap_or_default().trim())),
        _ => None,
    }
}

/// The text of the first element of that name.
fn element(text: &str, name: &str) -> Option<String> {
    let document = Document::parse(text).ok()?;
    let found = document.descendants().find(|node| node.tag_name().name() == name)?;
    found.text().map(|text| text.trim().to_owned())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_say_what_is_wrong() {
        let text =
            "<?xml version=\"1.0\"?>\n<Error><Code>NoSuchBucket</Code><Message>It is not there</Message></Error>";
        assert_eq!(said(text).as_deref(), Some("NoSuchBucket: It is not there"));
        let good = "<R xmlns=\"x\"><Bucket>b</Bucket><UploadId>a/b+c</UploadId></R>";
        assert_eq!((said(good), element(good, "UploadId").as_deref()), (None, Some("a/b+c")));
        assert_eq!((encoded("a/b+c~", ""), encoded("a/\u{fc}", "/")), ("a%2Fb%2Bc~".to_owned(), "a/%C3%BC".to_owned()));
    }
}
