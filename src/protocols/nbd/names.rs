//! How an export is named: by a URI (NetworkBlockDevice/nbd, doc/uri.md), in the reference's older way
//! (`nbd:HOST:PORT`, `nbd:unix:PATH`, each with `:exportname=NAME` perhaps), or by options.
//!
//! A name is a path to the rest of the house, and taken apart where the export is opened.

use serde_json::{Map, Value};

use super::layout::{BASE_ALLOCATION, LONGEST_STRING, PORT};
use crate::block::keys::{take_number, take_text};
use crate::block::name::take_below;
use crate::block::{Error, OptionTree, Result};
use crate::protocols::server::{Address, Family, Namespace, decoded, host_and_port, take_server, unix_address};

/// What a name says of TLS.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WantedTls {
    /// Without it there is no connection.
    pub required: bool,
    /// The object that holds the credentials; without one, the authorities that the system trusts.
    pub credentials: Option<String>,
    /// The name that the server's certificate must have, if not the host's.
    pub hostname: Option<String>,
    /// Whatever certificate it has will do.
    pub unverified: bool,
}

/// What is to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where the server is.
    pub address: Address,
    /// The export; the server's default one has no name.
    pub export: String,
    /// The context that its map is of.
    pub context: String,
    /// How it is spoken with.
    pub tls: WantedTls,
    /// Seconds for which a lost connection is tried to be made again, while requests wait.
    pub reconnect: u64,
    /// Seconds for which a first connection is tried.
    pub patience: u64,
}

/// What names start with, beside the name of the driver. The reference does not know the last two.
pub const SCHEMES: &[&str] = &["nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"];

fn no_url() -> Error {
    Error::invalid("No valid URL specified")
}

fn no_address() -> Error {
    Error::invalid("NBD server address missing")
}

impl Target {
    /// Whether the server is on this host.
    pub fn is_local(&self) -> bool {
        matches!(self.address, Address::Unix { .. })
    }

    fn new(address: Address, export: String) -> Self {
        let context = BASE_ALLOCATION.to_owned();
        Self { address, export, context, tls: WantedTls::default(), reconnect: 0, patience: 0 }
    }

    /// What a name says.
    pub fn of_name(name: &str) -> Result<Self> {
        match name.contains("://") {
            true => of_uri(name),
            false => of_old_name(name),
        }
    }

    /// What a name and options say together.
    pub fn take(name: Option<&str>, options: &mut OptionTree) -> Result<Self> {
        let named = name.map(Self::of_name).transpose()?;
        let (host, port, path) = (take_text(options, "host"), take_text(options, "port"), take_text(options, "path"));
        let export = take_text(options, "export");
        let server = take_below(options, "server");
        options.shift_remove("server");
        let both = "Cannot use 'server' and path/host/port at the same time";
        if path.is_some() && host.is_some() {
            return Err(Error::invalid("path and host may not be used at the same time"));
        }
        if port.is_some() && path.is_some() {
            return Err(Error::invalid("port may not be used without host"));
        }
        let simple = match (path, host) {
            (Some(path), _) => Some(Address::Unix { path, namespace: Namespace::File }),
            (None, Some(host)) => {
                let port = port.unwrap_or_else(|| PORT.to_string());
                Some(Address::Inet { host, port, family: Family::ANY })
            }
            (None, None) => None,
        };
        let address = match (simple, server.is_empty()) {
            (Some(_), false) => return Err(Error::invalid(both)),
            (Some(address), true) => Some(address),
            (None, false) => Some(take_server(server)?),
            (None, true) => None,
        };
        let mut target = match (named, address) {
            (Some(_), Some(_)) => return Err(Error::invalid(both)),
            (Some(named), None) => named,
            (None, Some(address)) => Self::new(address, String::new()),
            (None, None) => return Err(no_address()),
        };
        if let Some(export) = export {
            target.export = export;
        }
        target.tls.credentials = take_text(options, "tls-creds");
        target.tls.required |= target.tls.credentials.is_some();
        if let Some(hostname) = take_text(options, "tls-hostname") {
            target.tls.hostname = Some(hostname);
        }
        if let Some(context) = take_text(options, "x-dirty-bitmap") {
            target.context = context;
        }
        target.reconnect = take_number(options, "reconnect-delay")?.unwrap_or(0);
        target.patience = take_number(options, "open-timeout")?.unwrap_or(0);
        target.check()?;
        Ok(target)
    }

    fn check(&self) -> Result<()> {
        if self.export.len() > LONGEST_STRING {
            return Err(Error::invalid("export name too long to send to server"));
        }
        if self.context.len() > LONGEST_STRING {
            return Err(Error::invalid("x-dirty-bitmap query too long to send to server"));
        }
        self.address.check()
    }

    /// As the reference shows it, and whether that is a name of the very same.
    pub fn shown(&self) -> (String, bool) {
        let Self { address, export, tls, .. } = self;
        let s = if tls.required && tls.credentials.is_none() { "s" } else { "" };
        let text = match address {
            Address::Unix { path, .. } if export.is_empty() => format!("nbd{s}+unix://?socket={path}"),
            Address::Unix { path, .. } => format!("nbd{s}+unix:///{export}?socket={path}"),
            Address::Inet { host, port, .. } => {
                let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                let slash = if export.is_empty() { "" } else { "/" };
                format!("nbd{s}://{host}:{port}{slash}{export}")
            }
        };
        let again = Self::of_name(&text);
        let same = again.is_ok_and(|again| {
            let secure = !tls.required || again.tls == *tls;
            secure && (&again.address, &again.export) == (address, export)
        });
        (text, same)
    }

    /// The options that open it again, if none were given.
    pub fn options(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut put = |key: &str, value: &str| map.insert(key.to_owned(), value.into());
        match &self.address {
            Address::Unix { path, .. } => {
                put("server.type", "unix");
                put("server.path", path);
            }
            Address::Inet { host, port, .. } => {
                put("server.type", "inet");
                put("server.host", host);
                put("server.port", port);
            }
        }
        if !self.export.is_empty() {
            put("export", &self.export);
        }
        map
    }
}

/// RFC 3986, as far as doc/uri.md has use for it.
fn of_uri(text: &str) -> Result<Target> {
    let (scheme, rest) = text.split_once("://").ok_or_else(no_url)?;
    let (secure, unix) = match scheme {
        "nbd" | "nbd+tcp" => (false, false),
        "nbd+unix" => (false, true),
        "nbds" | "nbds+tcp" => (true, false),
        "nbds+unix" => (true, true),
        _ => return Err(no_url()),
    };
    let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
    let (rest, query) = rest.split_once('?').map_or((rest, ""), |(before, query)| (before, query));
    let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
    let export = decoded(path.strip_prefix('/').unwrap_or(path)).ok_or_else(no_url)?;
    let mut socket = None;
    let mut tls = WantedTls { required: secure, ..WantedTls::default() };
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (key, value) = parameter.split_once('=').ok_or_else(no_url)?;
        let value = decoded(value).ok_or_else(no_url)?;
        match (key, value.as_str()) {
            ("socket", _) if unix => socket = Some(value),
            ("tls-hostname", _) if secure => tls.hostname = Some(value),
            ("tls-verify-peer", "0") if secure => tls.unverified = true,
            ("tls-verify-peer", "1") | ("tls-type", "x509") if secure => {}
            ("tls-type", other) if secure => {
                return Err(Error::unsupported(format!("TLS of the type '{other}' is not supported: use x509")));
            }
            _ => return Err(no_url()),
        }
    }
    let address = match (unix, socket) {
        (true, Some(path)) if authority.is_empty() => unix_address(path),
        (false, None) => {
            let place = authority.rsplit_once('@').map_or(authority, |(_, place)| place);
            let (host, port) = host_and_port(place).ok_or_else(no_url)?;
            let host = decoded(host).ok_or_else(no_url)?;
            let port = match port.unwrap_or("").parse::<u16>() {
                Ok(0) => PORT,
                Ok(port) => port,
                Err(_) if port.is_none_or(str::is_empty) => PORT,
                Err(_) => return Err(no_url()),
            };
            if host.is_empty() {
                return Err(no_url());
            }
            Address::Inet { host, port: port.to_string(), family: Family::ANY }
        }
        _ => return Err(no_url()),
    };
    Ok(Target { tls, ..Target::new(address, export) })
}

/// `nbd:...` without slashes.
fn of_old_name(text: &str) -> Result<Target> {
    let wrong = || Error::invalid("File name string for NBD must start with 'nbd:'");
    let (rest, export) = match text.split_once(":exportname=") {
        Some((_, "")) => return Err(no_address()),
        Some((rest, export)) => (rest, export),
        None => (text, ""),
    };
    let rest = match rest {
        "nbd" => return Err(wrong()),
        rest => rest.strip_prefix("nbd:").ok_or_else(wrong)?,
    };
    if rest.is_empty() {
        return Err(no_address());
    }
    let address = match rest.strip_prefix("unix:") {
        Some(path) => Address::Unix { path: path.to_owned(), namespace: Namespace::File },
        None => {
            let bad = || match rest.starts_with('[') {
                true => Error::invalid(format!("error parsing IPv6 address '{rest}'")),
                false => Error::invalid(format!("error parsing address '{rest}'")),
            };
            let place = rest.split_once(',').map_or(rest, |(place, _)| place);
            let (host, port) = host_and_port(place).ok_or_else(bad)?;
            let port = port.filter(|port| !port.is_empty()).ok_or_else(bad)?;
            Address::Inet { host: host.to_owned(), port: port.to_owned(), family: Family::ANY }
        }
    };
    Ok(Target::new(address, export.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_as_the_reference_does() {
        for (name, shown, same) in [
            ("nbd+unix:///?socket=/s", "nbd+unix://?socket=/s", true),
            ("nbd+unix:///x%20y?socket=a%20b", "nbd+unix:///x y?socket=a b", true),
            ("nbd+unix:///%2Fx%3f?socket=a", "nbd+unix:////x??socket=a", false),
            ("nbd:unix:a:exportname=x:exportname=y", "nbd+unix:///x:exportname=y?socket=a", true),
            ("nbd://h//a#b", "nbd://h:10809//a", true),
            ("nbd://u:p@h:010998/?", "nbd://h:10998", true),
            ("nbd+tcp://h:0/", "nbd://h:10809", true),
            ("nbd:[::1]:1:exportname=a b", "nbd://[::1]:1/a b", true),
            ("nbd:h:1,ipv4=on", "nbd://h:1", true),
            ("nbds://h/a?tls-hostname=b", "nbds://h:10809/a", false),
        ] {
            assert_eq!(Target::of_name(name).unwrap().shown(), (shown.to_owned(), same), "{name}");
        }
    }

    #[test]
    fn bad_names() {
        let url = "No valid URL specified";
        let start = "File name string for NBD must start with 'nbd:'";
        for (name, text) in [
            ("nbd:", "NBD server address missing"),
            ("nbd:foo", "error parsing address 'foo'"),
            ("nbd:h:", "error parsing address 'h:'"),
            ("nbd:[::1", "error parsing IPv6 address '[::1'"),
            ("nbd:[::1]10", "error parsing IPv6 address '[::1]10'"),
            ("nbd:h:1:exportname=", "NBD server address missing"),
            ("nbd:exportname=x", start),
            ("nbd+unix:a?socket=b", start),
            ("x", start),
            ("nbd://", url),
            ("nbd:///x", url),
            ("nbd+unix://h/x?socket=s", url),
            ("nbd+unix:///x?socket=s&a=b", url),
            ("nbd+unix:///x?socket", url),
            ("nbd+unix:///x%zz?socket=s", url),
            ("nbd://h:99999/", url),
            ("nbd://::1:1/", url),
            ("nbd://h/?tls-hostname=x", url),
            ("foo://x", url),
        ] {
            assert_eq!(Target::of_name(name).unwrap_err().message(), text, "{name}");
        }
    }
}
