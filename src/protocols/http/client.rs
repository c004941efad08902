//! One request, and what came of it: connections that are kept, timeouts, TLS, who asks.
//!
//! No request is sent twice here, and no redirect followed.
//!
//! Lock order: `addresses` is a leaf, never held while anything is looked up.

use std::collections::HashMap;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ureq::config::Config;
use ureq::http::header::{
    ACCEPT_RANGES, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, COOKIE, ETAG, LAST_MODIFIED,
    LOCATION, RANGE, RETRY_AFTER,
};
use ureq::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, BodyReader};
use zeroize::Zeroizing;

use super::proxy::proxy_for;
use crate::codec::base64;
use crate::protocols::store::{Sign, Unsigned};
use crate::protocols::url::address::Address;
use crate::protocols::url::{Login, Wishes};
use crate::storage::error::strerror;

/// The most connections that are kept.
const IDLE: usize = 16;

/// What comes from a server passes through a buffer of so many bytes, which the processor's cache holds.
const BUFFER: usize = 64 << 10;

/// See the module.
#[derive(Debug)]
pub struct Client {
    wishes: Wishes,
    signer: Option<Box<dyn Sign>>,
    /// Redirects may not lead elsewhere.
    pub untrusted: bool,
    /// Without TLS, and with it: made when they are needed first.
    agents: [OnceLock<Result<Agent, String>>; 2],
    addresses: Addresses,
}

/// Where servers are: looked up once, not before each request, and once more when one of them has not answered.
#[derive(Debug, Clone, Default)]
struct Addresses(Arc<Mutex<HashMap<String, Vec<SocketAddr>>>>);

/// What a server says of a file beside its bytes.
pub struct Answer {
    /// How it went.
    pub status: StatusCode,
    headers: HeaderMap,
    body: BodyReader<'static>,
}

/// Why there is no answer, or not all of it.
#[derive(Debug)]
pub struct NoAnswer {
    /// In words.
    pub text: String,
    /// It may go better the next time.
    pub passing: bool,
}

impl Client {
    /// With these wishes.
    pub fn new(wishes: Wishes, signer: Option<Box<dyn Sign>>, untrusted: bool) -> Self {
        Self { wishes, signer, untrusted, agents: Default::default(), addresses: Addresses::default() }
    }

    /// Asks for a range of a file: bytes `from` to `to`, the last of them included. A name, a password and cookies are
    /// given where `origin`, which the user has named, is.
    pub fn get(&self, at: &Address, origin: &Address, from: u64, to: u64) -> Result<Answer, NoAnswer> {
        let range = format!("bytes={from}-{to}");
        let mut request = self.agent(at)?.get(at.uri.clone()).header(RANGE, &range);
        let ours = at.has_origin_of(origin);
        let login = at.login.as_ref().or(self.wishes.login.as_ref().or(origin.login.as_ref()).filter(|_| ours));
        if let Some(login) = login {
            request = request.header(AUTHORIZATION, secret_header(&basic(login))?);
        }
        if let Some(cookie) = self.wishes.cookie.as_ref().filter(|_| ours) {
            request = request.header(COOKIE, secret_header(cookie.get())?);
        }
        if ours {
            let range = [("range", range.clone())];
            let unsigned = Unsigned { method: &Method::GET, uri: &at.uri, headers: &range, body: &[] };
            for (name, value) in self.signed(&unsigned)? {
                request = request.header(name, value);
            }
        }
        let (parts, body) = request.call().map_err(|error| self.no_answer(at, &error))?.into_parts();
        if parts.status.is_server_error() {
            self.addresses.forget();
        }
        Ok(Answer { status: parts.status, headers: parts.headers, body: body.into_reader() })
    }

    /// Sends something, signed.
    pub fn send(
        &self,
        at: &Address,
        method: &Method,
        body: &[u8],
        headers: &[(&'static str, String)],
    ) -> Result<Answer, NoAnswer> {
        let unsigned = Unsigned { method, uri: &at.uri, headers, body };
        let mut request = Request::builder().method(method).uri(at.uri.clone());
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        for (name, value) in self.signed(&unsigned)? {
            request = request.header(name, value);
        }
        let request = request.body(body).map_err(|error| NoAnswer { text: error.to_string(), passing: false })?;
        let answer = self.agent(at)?.run(request).map_err(|error| self.no_answer(at, &error))?;
        let (parts, body) = answer.into_parts();
        Ok(Answer { status: parts.status, headers: parts.headers, body: body.into_reader() })
    }

    /// The headers by which a store sees who asks.
    fn signed(&self, request: &Unsigned<'_>) -> Result<Vec<(&'static str, HeaderValue)>, NoAnswer> {
        let Some(signer) = &self.signer else { return Ok(Vec::new()) };
        let headers = signer.headers(request).map_err(|text| NoAnswer { text, passing: false })?;
        headers.into_iter().map(|(name, value)| Ok((name, secret_header(value.as_bytes())?))).collect()
    }

    fn no_answer(&self, at: &Address, error: &ureq::Error) -> NoAnswer {
        self.addresses.forget();
        no_answer(at, error)
    }

    fn agent(&self, at: &Address) -> Result<&Agent, NoAnswer> {
        let agent = self.agents[usize::from(at.is_secure())].get_or_init(|| self.make(at));
        agent.as_ref().map_err(|text| NoAnswer { text: text.clone(), passing: false })
    }

    /// An agent for that way to servers. All of them have the same proxy but where `no_proxy` says so; a redirect to
    /// another host goes the same way.
    fn make(&self, at: &Address) -> Result<Agent, String> {
        let proxy = proxy_for(at, self.wishes.proxy_login.as_ref(), |name| std::env::var(name).ok())?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .input_buffer_size(BUFFER)
            .max_idle_connections(IDLE)
            .max_idle_connections_per_host(IDLE)
            .user_agent(concat!("vimg/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .proxy(proxy)
            .timeout_resolve(self.wishes.timeout)
            .timeout_connect(self.wishes.timeout)
            .timeout_per_read(self.wishes.timeout)
            .timeout_per_write(self.wishes.timeout);
        if at.is_secure() {
            config = config.tls_config(tls(self.wishes.verify));
        }
        Ok(Agent::with_parts(config.build(), DefaultConnector::default(), self.addresses.clone()))
    }
}

impl Addresses {
    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<String, Vec<SocketAddr>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self) {
        self.known().clear();
    }
}

impl Resolver for Addresses {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        // With the scheme, from which the port may come.
        let server =
            format!("{}://{}", uri.scheme_str().unwrap_or_default(), uri.authority().map_or("", |at| at.as_str()));
        if let Some(known) = self.known().get(&server) {
            let mut addresses = self.empty();
            known.iter().for_each(|address| addresses.push(*address));
            return Ok(addresses);
        }
        let addresses = DefaultResolver::default().resolve(uri, config, timeout)?;
        self.known().insert(server, addresses.to_vec());
        Ok(addresses)
    }
}

/// The certificates that the host trusts, or where it has none those that Mozilla does.
fn tls(verify: bool) -> TlsConfig {
    let mut config = TlsConfig::builder().disable_verification(!verify);
    if verify {
        let host = rustls_native_certs::load_native_certs().certs;
        let roots: Vec<_> = host.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        config = config.root_certs(match roots.is_empty() {
            true => RootCerts::WebPki,
            false => RootCerts::new_with_certs(&roots),
        });
    }
    config.build()
}

/// RFC 7617.
fn basic(login: &Login) -> Zeroizing<Vec<u8>> {
    let mut plain = Zeroizing::new(login.name.clone().into_bytes());
    plain.push(b':');
    plain.extend_from_slice(login.password.get());
    let mut header = Zeroizing::new(b"Basic ".to_vec());
    header.extend_from_slice(base64::encode(&plain).as_bytes());
    header
}

fn secret_header(bytes: &[u8]) -> Result<HeaderValue, NoAnswer> {
    let mut value = HeaderValue::from_bytes(bytes)
        .map_err(|_| NoAnswer { text: "The cookie, name or password has a line end".to_owned(), passing: false })?;
    value.set_sensitive(true);
    Ok(value)
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("status", &self.status).finish_non_exhaustive()
    }
}

impl Answer {
    fn header(&self, name: HeaderName) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Where it is said to be.
    pub fn location(&self) -> Option<&str> {
        self.header(LOCATION)
    }

    /// Which bytes these are, and of how many, if that is said (RFC 9110, section 14.4).
    pub fn range(&self) -> Option<ContentRange> {
        ContentRange::parse(self.header(CONTENT_RANGE)?)
    }

    /// Which version of the file it is: a strong entity tag, or when it was changed (RFC 9110, section 8.8).
    pub fn version(&self) -> Option<String> {
        let tag = self.header(ETAG).filter(|tag| !tag.starts_with("W/"));
        tag.or_else(|| self.header(LAST_MODIFIED)).map(str::to_owned)
    }

    /// The entity tag, as the server writes it.
    pub fn tag(&self) -> Option<&str> {
        self.header(ETAG)
    }

    /// The body, if it is text of so many bytes at most.
    pub fn text(&mut self, most: u64) -> Result<String, NoAnswer> {
        let mut text = String::new();
        match self.body.by_ref().take(most).read_to_string(&mut text) {
            Ok(_) => Ok(text),
            Err(error) => Err(passing(&broken(&error))),
        }
    }

    /// Seconds after which to ask again.
    pub fn retry_after(&self) -> Option<u64> {
        self.header(RETRY_AFTER)?.trim().parse().ok()
    }

    /// The bytes are the file's own.
    pub fn is_plain(&self) -> bool {
        self.header(CONTENT_ENCODING).is_none_or(|coding| coding.eq_ignore_ascii_case("identity"))
    }

    /// It is said to have no bytes.
    pub fn body_is_empty(&self) -> bool {
        self.header(CONTENT_LENGTH).is_some_and(|len| len.trim() == "0")
    }

    /// Whether it says that ranges can be had, though this is none.
    pub fn claims_ranges(&self) -> bool {
        self.header(ACCEPT_RANGES).is_some_and(|unit| unit.eq_ignore_ascii_case("bytes"))
    }

    /// The next bytes into `buf`, as many as come; the second is why there are no more, if there should be. `ends`: these
    /// are the last ones.
    pub fn read(&mut self, buf: &mut [u8], ends: bool) -> (usize, Option<NoAnswer>) {
        let mut done = 0;
        while done < buf.len() {
            match self.body.read(&mut buf[done..]) {
                Ok(0) => return (done, Some(passing("the server closed the connection"))),
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return (done, Some(passing(&broken(&error)))),
            }
        }
        // What has been read to its end can be used again.
        if ends {
            let _ = self.body.read(&mut [0]);
        }
        (done, None)
    }
}

/// Bytes `first` to `last`, the last of them included, of a file of so many; without them where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentRange {
    /// Which bytes.
    pub bytes: Option<(u64, u64)>,
    /// Of how many.
    pub total: Option<u64>,
}

impl ContentRange {
    fn parse(text: &str) -> Option<Self> {
        let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
        let bytes = match range.trim() {
            "*" => None,
            range => {
                let (first, last) = range.split_once('-')?;
                Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
            }
        };
        let total = match total.trim() {
            "*" => None,
            total => Some(total.parse().ok()?),
        };
        Some(Self { bytes, total })
    }
}

fn passing(text: &str) -> NoAnswer {
    NoAnswer { text: text.to_owned(), passing: true }
}

/// An error of a body that had begun.
fn broken(error: &std::io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>()) {
        Some(ureq::Error::Timeout(_)) => "the server sends nothing any more".to_owned(),
        _ if error.kind() == std::io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
        _ => strerror(error),
    }
}

fn no_answer(at: &Address, error: &ureq::Error) -> NoAnswer {
    let (host, port) = (at.host(), at.port());
    let (text, passing) = match error {
        ureq::Error::HostNotFound => (format!("Could not resolve host: {host}"), false),
        ureq::Error::Timeout(_) => ("Timeout was reached".to_owned(), true),
        ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            (format!("Failed to connect to {host} port {port}: Couldn't connect to server"), true)
        }
        ureq::Error::Io(error) => (strerror(error), true),
        ureq::Error::Protocol(_) => (format!("The server does not speak HTTP as it should: {error}"), true),
        ureq::Error::ConnectionFailed => (format!("Failed to connect to {host} port {port}"), true),
        other => (other.to_string(), false),
    };
    NoAnswer { text, passing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        let of = |bytes, total| Some(ContentRange { bytes, total });
        assert_eq!(ContentRange::parse("bytes 0-9/100"), of(Some((0, 9)), Some(100)));
        assert_eq!(ContentRange::parse("bytes 5-5/*"), of(Some((5, 5)), None));
        assert_eq!(ContentRange::parse("bytes */100"), of(None, Some(100)));
        for bad in ["", "bytes", "bytes 1/2", "bytes a-b/2", "lines 0-9/100", "bytes 0-9/x", "bytes -1-2/9"] {
            assert_eq!(ContentRange::parse(bad), None, "{bad}");
        }
    }
}
