//! What a URL says (RFC 3986): where to, and who asks.

use ureq::http::Uri;

use super::Login;

/// Where a request goes.
#[derive(Debug, Clone)]
pub struct Address {
    /// Without a name and a password.
    pub uri: Uri,
    /// Those that stand in the URL.
    pub login: Option<Login>,
}

impl Address {
    /// What a URL says; nothing if it is none.
    pub fn parse(url: &str) -> Option<Self> {
        let url = url.split_once('#').map_or(url, |(before, _)| before);
        let (scheme, rest) = url.split_once("://")?;
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let slash = if path.starts_with('/') { "" } else { "/" };
        let uri: Uri = format!("{scheme}://{host}{slash}{path}").parse().ok()?;
        uri.host().filter(|host| !host.is_empty())?;
        let login = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let name = String::from_utf8_lossy(&decoded(name)).into_owned();
            Login { name, password: decoded(password).into() }
        });
        Some(Self { uri, login })
    }

    /// What a reference means that stands in an answer of HTTP from here (RFC 3986, section 5.2); nothing if it leads
    /// out of HTTP.
    pub fn join(&self, reference: &str) -> Option<Self> {
        self.resolve(reference).filter(|to| matches!(to.uri.scheme_str(), Some("http" | "https")))
    }

    fn resolve(&self, reference: &str) -> Option<Self> {
        let scheme = self.uri.scheme_str()?;
        let authority = self.uri.authority()?;
        let path = self.uri.path();
        if reference.split(['/', '?', '#']).next().is_some_and(|first| first.contains(':')) {
            return Self::parse(reference);
        }
        if reference.starts_with("//") {
            return Self::parse(&format!("{scheme}:{reference}"));
        }
        let (to, query) = reference.split_at(reference.find(['?', '#']).unwrap_or(reference.len()));
        let full = match to {
            "" => path.to_owned(),
            _ if to.starts_with('/') => without_dots(to),
            _ => without_dots(&format!("{}/{to}", path.rsplit_once('/').map_or("", |(folder, _)| folder))),
        };
        Self::parse(&format!("{scheme}://{authority}{full}{query}"))
    }

    /// Whether a name, a password and cookies for `other` are for this too: its scheme, host and port are the same.
    pub fn has_origin_of(&self, other: &Self) -> bool {
        self.uri.scheme() == other.uri.scheme() && self.host() == other.host() && self.port() == other.port()
    }

    /// Whether it is another port or another way at most to the same place: over TLS in place of without.
    pub fn is_same_place(&self, other: &Self) -> bool {
        let upgraded = (self.port(), other.port()) == (443, 80);
        self.host() == other.host() && (self.port() == other.port() || upgraded)
    }

    /// Whether it is over TLS.
    pub fn is_secure(&self) -> bool {
        matches!(self.uri.scheme_str(), Some("https" | "ftps"))
    }

    /// The host, as names of hosts are compared.
    pub fn host(&self) -> String {
        self.uri.host().unwrap_or_default().to_ascii_lowercase()
    }

    /// The path without its first slash and without percent-encoding, as names of files are in FTP and TFTP; nothing
    /// where it would end a line there.
    pub fn file(&self) -> Option<Vec<u8>> {
        let path = decoded(self.uri.path().strip_prefix('/').unwrap_or_default());
        (!path.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0))).then_some(path)
    }

    /// The port, given or not.
    pub fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(match self.uri.scheme_str() {
            Some("https") => 443,
            Some("ftp") => 21,
            Some("ftps") => 990,
            Some("tftp") => 69,
            _ => 80,
        })
    }
}

/// A path without `.` and `..`.
fn without_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let last = parts.len().saturating_sub(1);
    for (n, part) in parts.into_iter().enumerate() {
        match part {
            "." | ".." => {
                if part == ".." {
                    kept.pop();
                }
                if n == last {
                    kept.push("");
                }
            }
            part => kept.push(part),
        }
    }
    format!("/{}", kept.join("/"))
}

/// Without percent-encoding.
pub fn decoded(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let digits = more.get(..2).and_then(|two| str::from_utf8(two).ok());
        match digits.filter(|_| *first == b'%').and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = more.get(2..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = more;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(url: &str) -> Option<String> {
        Address::parse(url).map(|address| address.uri.to_string())
    }

    #[test]
    fn urls() {
        assert_eq!(uri("http://a/b?c=d#e").as_deref(), Some("http://a/b?c=d"));
        assert_eq!(uri("http://a?c").as_deref(), Some("http://a/?c"));
        assert_eq!(uri("https://u@a:8").as_deref(), Some("https://a:8/"));
        for bad in ["http://", "http:///a", "http://a b/", "a", "http://[::1/a"] {
            assert_eq!(uri(bad), None, "{bad}");
        }
        let login = Address::parse("http://u%40h:p%3a%zz@a/").and_then(|address| address.login);
        let login = login.map(|login| (login.name, login.password.get().to_vec()));
        assert_eq!(login, Some(("u@h".to_owned(), b"p:%zz".to_vec())));
    }

    /// The examples of RFC 3986, section 5.4, that make sense for HTTP.
    #[test]
    fn references() {
        let base = Address::parse("http://a/b/c/d;p?q").unwrap();
        for (reference, full) in [
            ("g", "http://a/b/c/g"),
            ("./g", "http://a/b/c/g"),
            ("g/", "http://a/b/c/g/"),
            ("/g", "http://a/g"),
            ("//g", "http://g/"),
            ("?y", "http://a/b/c/d;p?y"),
            ("g?y", "http://a/b/c/g?y"),
            ("g#s", "http://a/b/c/g"),
            (";x", "http://a/b/c/;x"),
            (".", "http://a/b/c/"),
            ("..", "http://a/b/"),
            ("../g", "http://a/b/g"),
            ("../../../g", "http://a/g"),
            ("/./g", "http://a/g"),
            ("g/../h", "http://a/b/c/h"),
            ("g?y/../x", "http://a/b/c/g?y/../x"),
            ("https://h:8/x", "https://h:8/x"),
        ] {
            assert_eq!(base.join(reference).map(|to| to.uri.to_string()).as_deref(), Some(full), "{reference}");
        }
        assert!(base.join("ftp://a/").is_none() && base.join("javascript:x").is_none());
    }

    #[test]
    fn places() {
        let at = |url: &str| Address::parse(url).unwrap();
        assert!(at("http://A/").has_origin_of(&at("http://a:80/x")));
        assert!(!at("http://a:81/").has_origin_of(&at("http://a/")));
        assert!(at("https://a/").is_same_place(&at("http://a/")) && !at("http://a/").is_same_place(&at("https://a/")));
        assert!(!at("http://127.0.0.1/").is_same_place(&at("http://a/")));
    }
}
