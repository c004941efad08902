//! A storage account, and who asks: the variables that Azure's own tools read.
//!
//! Sources: "Configure Azure Storage connection strings" and "Authorize with Shared Key" of the Azure Storage
//! documentation.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::block::SecretBytes;
use crate::codec::base64;
use crate::protocols::store::{Environment, Header, Sign, Unsigned};
use crate::protocols::url::address::decoded;

/// The version of the protocol that is spoken.
const VERSION: &str = "2021-08-06";

/// See the module.
#[derive(Debug)]
pub struct Account {
    /// Where its containers are, without a last slash.
    pub endpoint: String,
    /// A shared access signature: what every query has.
    pub leave: Option<String>,
    /// What requests are signed with.
    pub key: Option<SharedKey>,
}

impl Account {
    /// As the environment says.
    pub fn find(environment: &Environment<'_>) -> Result<Self, String> {
        let string = environment.get("AZURE_STORAGE_CONNECTION_STRING").unwrap_or_default();
        let given = parts(&string);
        let variable = |names: &[&str]| names.iter().find_map(|name| environment.get(name));
        let of =
            |part: &str, names: &[&str]| given.get(part).map(|value| (*value).to_owned()).or_else(|| variable(names));
        let name = of("AccountName", &["AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"]);
        let endpoint = of("BlobEndpoint", &["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"]);
        let endpoint = match (endpoint, &name) {
            (Some(endpoint), _) => endpoint,
            (None, Some(name)) => {
                let scheme = given.get("DefaultEndpointsProtocol").copied().unwrap_or("https");
                let suffix = given.get("EndpointSuffix").copied().unwrap_or("core.windows.net");
                format!("{scheme}://{name}.blob.{suffix}")
            }
            (None, None) => {
                return Err(
                    "whose storage it is, AZURE_STORAGE_ACCOUNT or AZURE_STORAGE_CONNECTION_STRING says".to_owned()
                );
            }
        };
        let leave = of("SharedAccessSignature", &["AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"]);
        let leave = leave.map(|leave| leave.trim_start_matches('?').to_owned());
        let key = of("AccountKey", &["AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY"]);
        let key = match (key.map(Zeroizing::new).filter(|_| leave.is_none()), name) {
            (Some(key), Some(account)) => {
                let key = base64::decode(key.trim().as_bytes()).filter(|key| !key.is_empty());
                let key = key.ok_or("the key of the storage account is not in base64")?;
                Some(SharedKey { account, key: key.into() })
            }
            (Some(_), None) => return Err("the storage account has a key, and no name".to_owned()),
            (None, _) => None,
        };
        Ok(Self { endpoint: endpoint.trim_end_matches('/').to_owned(), leave, key })
    }
}

/// Keys and values of a connection string.
fn parts(text: &str) -> BTreeMap<&str, &str> {
    text.split(';').filter_map(|part| part.split_once('=')).map(|(key, value)| (key.trim(), value.trim())).collect()
}

/// Signs requests.
#[derive(Debug)]
pub struct SharedKey {
    account: String,
    key: SecretBytes,
}

impl SharedKey {
    fn headers_at(&self, request: &Unsigned<'_>, now: DateTime<Utc>) -> Vec<Header> {
        let date = now.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let mut own: Vec<(&str, &str)> = request.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        own.extend([("x-ms-date", date.as_str()), ("x-ms-version", VERSION)]);
        own.sort_unstable();
        let header = |name: &str| own.iter().find(|(own, _)| *own == name).map_or("", |(_, value)| value);
        let len = if request.body.is_empty() { String::new() } else { request.body.len().to_string() };
        // Method, encoding, language, length, MD5, type, date, four conditions, range.
        let mut text = Zeroizing::new(format!(
            "{}\n\n\n{len}\n\n{}\n\n\n\n\n\n{}\n",
            request.method,
            header("content-type"),
            header("range")
        ));
        for (name, value) in own.iter().filter(|(name, _)| name.starts_with("x-ms-")) {
            text.push_str(&format!("{name}:{value}\n"));
        }
        text.push_str(&format!("/{}{}", self.account, request.uri.path()));
        let mut query: Vec<(String, String)> = request
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_lowercase(), String::from_utf8_lossy(&decoded(value)).into_owned()))
            .collect();
        query.sort_unstable();
        for (key, value) in query {
            text.push_str(&format!("\n{key}:{value}"));
        }
        let signature = Hmac::<Sha256>::new_from_slice(self.key.get()).map_or_else(
            |_| Vec::new(),
            |mut mac| {
                mac.update(text.as_bytes());
                mac.finalize().into_bytes().to_vec()
            },
        );
        let shown = format!("SharedKey {}:{}", self.account, base64::encode(&signature));
        vec![
            ("x-ms-date", Zeroizing::new(date)),
            ("x-ms-version", Zeroizing::new(VERSION.to_owned())),
            ("authorization", Zeroizing::new(shown)),
        ]
    }
}

impl Sign for SharedKey {
    fn headers(&self, request: &Unsigned<'_>) -> Result<Vec<Header>, String> {
        Ok(self.headers_at(request, Utc::now()))
    }
}

#[cfg(test)]
mod tests {
    use ureq::http::{Method, Uri};

    use super::*;

    fn find(set: &[(&str, &str)]) -> Result<Account, String> {
        let variable = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Account::find(&Environment::new(variable, |_: &str| None))
    }

    #[test]
    fn the_environment_says_whose_and_who() {
        let string =
            "DefaultEndpointsProtocol=http;AccountName=dev;AccountKey=a2V5PQ==;BlobEndpoint=http://127.0.0.1:1/dev;";
        let account = find(&[("AZURE_STORAGE_CONNECTION_STRING", string)]).unwrap();
        assert_eq!(account.endpoint, "http://127.0.0.1:1/dev");
        let key = account.key.unwrap();
        assert_eq!((key.account.as_str(), key.key.get()), ("dev", &b"key="[..]));
        let account = find(&[("AZURE_STORAGE_ACCOUNT", "a"), ("AZURE_STORAGE_SAS_TOKEN", "?sv=1&sig=x")]).unwrap();
        assert_eq!(account.endpoint, "https://a.blob.core.windows.net");
        assert_eq!((account.leave.as_deref(), account.key.is_none()), (Some("sv=1&sig=x"), true));
        assert!(find(&[]).is_err());
        assert!(find(&[("AZURE_STORAGE_ACCOUNT", "a"), ("AZURE_STORAGE_KEY", "?")]).is_err());
    }

    /// What Azure's own library for Python signs the same requests with.
    #[test]
    fn requests_are_signed() {
        let key = SharedKey { account: "dev".to_owned(), key: b"key=".to_vec().into() };
        let now = "2026-11-28T01:02:03Z".parse().unwrap();
        let of = |method: Method, url: &str, headers: &[(&'static str, String)], body: &[u8]| {
            let uri: Uri = url.parse().unwrap();
            let signed = key.headers_at(&Unsigned { method: &method, uri: &uri, headers, body }, now);
            signed.last().unwrap().1.clone()
        };
        let block = of(Method::PUT, "http://127.0.0.1:1/dev/c/a%20b?blockid=MDAwMDAwMDE%3D&comp=block", &[], b"block");
        assert_eq!(block.as_str(), "SharedKey dev:uBEddl+fVs6a62KomjRwHHV3BlUNX2UmBgZPwCVTXkc=");
        let blob = [("x-ms-blob-type", "BlockBlob".to_owned())];
        let blob = of(Method::PUT, "http://127.0.0.1:1/dev/c/a%20b", &blob, b"");
        assert_eq!(blob.as_str(), "SharedKey dev:OqlujH+QToDjqI3dIczXPUuZbEwwmpb6LIIiSmSslME=");
        let read = of(Method::GET, "http://127.0.0.1:1/dev/c/k", &[], b"");
        assert_eq!(read.as_str(), "SharedKey dev:dXtQs+95KYnW4cIEr0WIZzfCVJfacgs6WoIJyo4UF3g=");
    }
}
