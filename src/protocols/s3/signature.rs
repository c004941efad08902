//! Signatures of requests: "Signature Version 4" of the Amazon S3 API Reference, in the header `Authorization`.

use chrono::{DateTime, Utc};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use ureq::http::Uri;
use zeroize::Zeroizing;

use super::credentials::Credentials;

/// The hash of no bytes: requests to read have no body.
const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Signs requests to read.
#[derive(Debug)]
pub struct Signer {
    credentials: Credentials,
    region: String,
}

/// A header: its name, in small letters, and its value.
pub type Header = (&'static str, Zeroizing<String>);

impl Signer {
    /// With these credentials.
    pub fn new(credentials: Credentials, region: String) -> Self {
        Self { credentials, region }
    }

    /// The headers that a request to read gets, beside `range`, which it has.
    pub fn headers(&self, uri: &Uri, range: &str, now: DateTime<Utc>) -> Vec<Header> {
        let host = uri.authority().map_or("", |authority| authority.as_str());
        let time = now.format("%Y%m%dT%H%M%SZ").to_string();
        let day = now.format("%Y%m%d").to_string();
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let mut headers = vec![
            ("host", Zeroizing::new(host.to_owned())),
            ("range", Zeroizing::new(range.to_owned())),
            ("x-amz-content-sha256", Zeroizing::new(EMPTY.to_owned())),
            ("x-amz-date", Zeroizing::new(time.clone())),
        ];
        if let Some(token) = &self.credentials.token {
            let token = String::from_utf8_lossy(token.get()).into_owned();
            headers.push(("x-amz-security-token", Zeroizing::new(token)));
        }
        let names = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let mut canonical = Zeroizing::new(format!("GET\n{}\n{}\n", uri.path(), uri.query().unwrap_or_default()));
        for (name, value) in &headers {
            canonical.push_str(&format!("{name}:{}\n", value.trim()));
        }
        canonical.push_str(&format!("\n{names}\n{EMPTY}"));
        let hash = hex(&Sha256::digest(canonical.as_bytes()));
        let to_sign = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{hash}");
        let secret = Zeroizing::new([b"AWS4", self.credentials.secret.get()].concat());
        let key = [day.as_str(), &self.region, "s3", "aws4_request"]
            .iter()
            .fold(secret, |key, part| Zeroizing::new(mac(&key, part.as_bytes())));
        let signature = hex(&mac(&key, to_sign.as_bytes()));
        let id = &self.credentials.id;
        let shown = format!("AWS4-HMAC-SHA256 Credential={id}/{scope},SignedHeaders={names},Signature={signature}");
        headers.retain(|(name, _)| !matches!(*name, "host" | "range"));
        headers.push(("authorization", Zeroizing::new(shown)));
        headers
    }
}

fn mac(key: &[u8], bytes: &[u8]) -> Vec<u8> {
    // A key of any length will do.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return Vec::new() };
    mac.update(bytes);
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "Example: GET Object" of the API Reference.
    #[test]
    fn the_example_of_the_reference() {
        let credentials = Credentials {
            id: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret: b"wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_vec().into(),
            token: None,
        };
        let uri: Uri = "https://examplebucket.s3.amazonaws.com/test.txt".parse().unwrap();
        let now = "2013-05-24T00:00:00Z".parse().unwrap();
        let headers = Signer::new(credentials, "us-east-1".to_owned()).headers(&uri, "bytes=0-9", now);
        let shown = &headers.iter().find(|(name, _)| *name == "authorization").unwrap().1;
        assert_eq!(
            shown.as_str(),
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,\
             SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,\
             Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
    }
}
