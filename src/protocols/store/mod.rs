//! What object stores have in common: requests are signed ([`Sign`]), and an object is sent in parts ([`upload`]) and is
//! there when its last request is answered.

pub mod multipart;
pub mod upload;

use std::fmt;

use ureq::http::{Method, Uri};
use zeroize::Zeroizing;

/// A header: its name, in small letters, and its value.
pub type Header = (&'static str, Zeroizing<String>);

/// A request before it is signed.
#[derive(Debug, Clone, Copy)]
pub struct Unsigned<'a> {
    /// What is to be done.
    pub method: &'a Method,
    /// With what. Its query stands in the order of the keys, and is encoded.
    pub uri: &'a Uri,
    /// Headers that it has, in the order of their names, in small letters.
    pub headers: &'a [(&'static str, String)],
    /// What goes along.
    pub body: &'a [u8],
}

/// What there is under a name.
type Lookup<'a> = Box<dyn Fn(&str) -> Option<String> + 'a>;

/// What is found out from: variables, and files.
pub struct Environment<'a> {
    variable: Lookup<'a>,
    read: Lookup<'a>,
}

impl<'a> Environment<'a> {
    /// These.
    pub fn new(variable: impl Fn(&str) -> Option<String> + 'a, read: impl Fn(&str) -> Option<String> + 'a) -> Self {
        Self { variable: Box::new(variable), read: Box::new(read) }
    }

    /// Those of this process.
    pub fn of_process() -> Self {
        Self::new(
            |name| std::env::var(name).ok().filter(|value| !value.is_empty()),
            |path| std::fs::read_to_string(path).ok(),
        )
    }

    /// A variable that says something.
    pub fn get(&self, name: &str) -> Option<String> {
        (self.variable)(name)
    }

    /// What a file holds.
    pub fn read(&self, path: &str) -> Option<String> {
        (self.read)(path)
    }
}

/// What `SCHEME://BUCKET/KEY` names; the bucket is a name that can stand in a URL.
pub fn bucket_and_key<'a>(url: &'a str, scheme: &str) -> Option<(&'a str, &'a str)> {
    let (bucket, key) = url.strip_prefix(scheme)?.strip_prefix("://")?.split_once('/')?;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '$');
    (!bucket.is_empty() && !key.is_empty() && bucket.chars().all(good)).then_some((bucket, key))
}

/// Text as it stands in a URL: all but the unreserved characters (RFC 3986, section 2.3), and `kept`, is encoded.
pub fn encoded(text: &str, kept: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            kept_one if kept.as_bytes().contains(&kept_one) => out.push(char::from(kept_one)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

/// Shows a store who asks.
pub trait Sign: fmt::Debug + Send + Sync {
    /// The headers that a request gets beside those that it has. An error says what is missing.
    fn headers(&self, request: &Unsigned<'_>) -> Result<Vec<Header>, String>;
}
