//! Signatures of requests: "Signature Version 4" of the Amazon S3 API Reference, in the header `Authorization`.

use chrono::{DateTime, Utc};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::credentials::Credentials;
use crate::protocols::store::{Header, Sign, Unsigned};

/// See the module.
#[derive(Debug)]
pub struct Signer {
    credentials: Credentials,
    region: String,
}

impl Signer {
    /// With these credentials.
    pub fn new(credentials: Credentials, region: String) -> Self {
        Self { credentials, region }
    }

    /// The headers that a request gets at that time, beside those that it has.
    fn headers_at(&self, request: &Unsigned<'_>, now: DateTime<Utc>) -> Vec<Header> {
        let uri = request.uri;
        let host = uri.authority().map_or("", |authority| authority.as_str());
        let body = hex(&Sha256::digest(request.body));
        let time = now.format("%Y%m%dT%H%M%SZ").to_string();
        let day = now.format("%Y%m%d").to_string();
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let mut headers = vec![
            ("host", Zeroizing::new(host.to_owned())),
            ("x-amz-content-sha256", Zeroizing::new(body.clone())),
            ("x-amz-date", Zeroizing::new(time.clone())),
        ];
        headers.extend(request.headers.iter().map(|(name, value)| (*name, Zeroizing::new(value.clone()))));
        if let Some(token) = &self.credentials.token {
            let token = String::from_utf8_lossy(token.get()).into_owned();
            headers.push(("x-amz-security-token", Zeroizing::new(token)));
        }
        headers.sort_by_key(|(name, _)| *name);
        let names = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let mut canonical =
            Zeroizing::new(format!("{}\n{}\n{}\n", request.method, uri.path(), uri.query().unwrap_or_default()));
        for (name, value) in &headers {
            canonical.push_str(&format!("{name}:{}\n", value.trim()));
        }
        canonical.push_str(&format!("\n{names}\n{body}"));
        let hash = hex(&Sha256::digest(canonical.as_bytes()));
        let to_sign = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{hash}");
        let secret = Zeroizing::new([b"AWS4", self.credentials.secret.get()].concat());
        let key = [day.as_str(), &self.region, "s3", "aws4_request"]
            .iter()
            .fold(secret, |key, part| Zeroizing::new(mac(&key, part.as_bytes())));
        let signature = hex(&mac(&key, to_sign.as_bytes()));
        let id = &self.credentials.id;
        let shown = format!("AWS4-HMAC-SHA256 Credential={id}/{scope},SignedHeaders={names},Signature={signature}");
        headers.retain(|(name, _)| *name != "host" && request.headers.iter().all(|(own, _)| own != name));
        headers.push(("authorization", Zeroizing::new(shown)));
        headers
    }
}

impl Sign for Signer {
    fn headers(&self, request: &Unsigned<'_>) -> Result<Vec<Header>, String> {
        Ok(self.headers_at(request, Utc::now()))
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
    use ureq::http::{Method, Uri};

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
        let range = [("range", "bytes=0-9".to_owned())];
        let request = Unsigned { method: &Method::GET, uri: &uri, headers: &range, body: &[] };
        let headers = Signer::new(credentials, "us-east-1".to_owned()).headers_at(&request, now);
        let shown = &headers.iter().find(|(name, _)| *name == "authorization").unwrap().1;
        assert_eq!(
            shown.as_str(),
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,\
             SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,\
             Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
    }
}
