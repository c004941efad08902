//! How a disk is named: `sheepdog:VDI`, `sheepdog:HOST:PORT:VDI`, either with `:SNAPSHOT` perhaps; a URL,
//! `sheepdog://[HOST[:PORT]]/VDI[#SNAPSHOT]` or `sheepdog+unix:///VDI?socket=PATH[#SNAPSHOT]`; or options. A snapshot is
//! a number, or else a tag.

use serde_json::{Map, Value};

use super::layout::{NAME, PORT};
use crate::block::keys::{take_number, take_text};
use crate::block::name::take_below;
use crate::block::{Error, OptionTree, Result};
use crate::protocols::server::{Address, Family, Namespace, decoded, host_and_port, take_server, unix_address};

/// What names start with, beside the name of the driver.
pub const SCHEMES: &[&str] = &["sheepdog+tcp", "sheepdog+unix"];

/// What is to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdiName {
    /// A server of the cluster.
    pub address: Address,
    /// The disk.
    pub vdi: String,
    /// Which of its states.
    pub state: VdiState,
}

/// A state of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VdiState {
    /// As it is now.
    Current,
    /// A snapshot, by its number.
    Number(u32),
    /// A snapshot, by its tag.
    Tag(String),
}

impl VdiState {
    /// What stands behind a name.
    fn of(text: &str) -> Self {
        match text.parse() {
            Ok(0) => Self::Current,
            Ok(number) => Self::Number(number),
            Err(_) if text.is_empty() => Self::Current,
            Err(_) => Self::Tag(text.to_owned()),
        }
    }
}

fn no_name(name: &str) -> Error {
    Error::invalid(format!("'{name}' is no name of a VDI"))
        .hint("write sheepdog:[HOST:PORT:]VDI[:SNAPSHOT], sheepdog://HOST[:PORT]/VDI[#SNAPSHOT] or sheepdog+unix:///VDI?socket=PATH[#SNAPSHOT]")
}

fn inet(host: &str, port: &str) -> Address {
    Address::Inet { host: host.to_owned(), port: port.to_owned(), family: Family::ANY }
}

/// The server that is there if none is named.
fn usual() -> Address {
    inet("localhost", &PORT.to_string())
}

impl VdiName {
    /// What a name says.
    pub fn of_name(name: &str) -> Result<Self> {
        let target = if name.contains("://") { of_url(name) } else { of_old_name(name) };
        let target = target.ok_or_else(|| no_name(name))?;
        target.check()?;
        Ok(target)
    }

    /// What a name or options say.
    pub fn take(name: Option<&str>, options: &mut OptionTree) -> Result<Self> {
        let vdi = take_text(options, "vdi");
        let number = take_number(options, "snap-id")?;
        let tag = take_text(options, "tag");
        let server = take_below(options, "server");
        options.shift_remove("server");
        if let Some(name) = name {
            if vdi.is_some() || number.is_some() || tag.is_some() || !server.is_empty() {
                return Err(Error::invalid("a name and 'vdi', 'snap-id', 'tag' or 'server' may not be used together"));
            }
            return Self::of_name(name);
        }
        let vdi = vdi.ok_or_else(|| Error::invalid("Parameter 'vdi' is missing"))?;
        let address = if server.is_empty() { usual() } else { take_server(server)? };
        let state = match (number, tag) {
            (Some(_), Some(_)) => return Err(Error::invalid("'snap-id' and 'tag' may not be used together")),
            (Some(number), None) => match u32::try_from(number) {
                Ok(0) => VdiState::Current,
                Ok(number) => VdiState::Number(number),
                Err(_) => return Err(Error::invalid("'snap-id' is too large")),
            },
            (None, Some(tag)) if !tag.is_empty() => VdiState::Tag(tag),
            (None, _) => VdiState::Current,
        };
        let target = Self { address, vdi, state };
        target.check()?;
        Ok(target)
    }

    fn check(&self) -> Result<()> {
        let tag = if let VdiState::Tag(tag) = &self.state { tag } else { "" };
        if self.vdi.is_empty() {
            return Err(Error::invalid("the name of the VDI is empty"));
        }
        for (what, text) in [("name of the VDI", self.vdi.as_str()), ("tag of the snapshot", tag)] {
            if text.len() >= NAME || text.contains('\0') {
                return Err(Error::invalid(format!(
                    "the {what} is longer than {} bytes, or contains a zero",
                    NAME - 1
                )));
            }
        }
        self.address.check()
    }

    /// A name of it, if there is one.
    pub fn shown(&self) -> Option<String> {
        let vdi = encoded(&self.vdi);
        let state = match &self.state {
            VdiState::Current => String::new(),
            VdiState::Number(number) => format!("#{number}"),
            VdiState::Tag(tag) => format!("#{}", encoded(tag)),
        };
        let shown = match &self.address {
            Address::Unix { path, .. } => format!("sheepdog+unix:///{vdi}?socket={}{state}", encoded(path)),
            Address::Inet { host, port, .. } if host.contains(':') => {
                format!("sheepdog://[{host}]:{port}/{vdi}{state}")
            }
            Address::Inet { host, port, .. } => format!("sheepdog://{host}:{port}/{vdi}{state}"),
        };
        Some(shown).filter(|shown| Self::of_name(shown).is_ok_and(|again| again == *self))
    }

    /// The options that open it again.
    pub fn options(&self) -> Map<String, Value> {
        let mut map = Map::new();
        match &self.address {
            Address::Unix { path, namespace } => {
                map.insert("server.type".to_owned(), "unix".into());
                map.insert("server.path".to_owned(), path.clone().into());
                if let Namespace::Abstract { padded } = namespace {
                    map.insert("server.abstract".to_owned(), true.into());
                    map.insert("server.tight".to_owned(), (!padded).into());
                }
            }
            Address::Inet { host, port, .. } => {
                map.insert("server.type".to_owned(), "inet".into());
                map.insert("server.host".to_owned(), host.clone().into());
                map.insert("server.port".to_owned(), port.clone().into());
            }
        }
        map.insert("vdi".to_owned(), self.vdi.clone().into());
        match &self.state {
            VdiState::Current => None,
            VdiState::Number(number) => map.insert("snap-id".to_owned(), (*number).into()),
            VdiState::Tag(tag) => map.insert("tag".to_owned(), tag.clone().into()),
        };
        map
    }
}

/// With percent-encoding where a URL needs it.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/:@!$&'()*+,;=".contains(&byte);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

fn of_url(text: &str) -> Option<VdiName> {
    let (scheme, rest) = text.split_once("://")?;
    let (rest, state) = rest.split_once('#').unwrap_or((rest, ""));
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/')?;
    let mut socket = None;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        match parameter.split_once('=')? {
            ("socket", path) if scheme == "sheepdog+unix" => socket = Some(decoded(path)?),
            _ => return None,
        }
    }
    let address = match scheme {
        "sheepdog+unix" if authority.is_empty() => unix_address(socket?),
        "sheepdog" | "sheepdog+tcp" if authority.is_empty() => usual(),
        "sheepdog" | "sheepdog+tcp" => {
            let (host, port) = host_and_port(authority)?;
            let port = match port.filter(|port| !port.is_empty()) {
                Some(port) => port.parse().ok()?,
                None => PORT,
            };
            let host = decoded(host).filter(|host| !host.is_empty())?;
            inet(&host, &port.to_string())
        }
        _ => return None,
    };
    Some(VdiName { address, vdi: decoded(path)?, state: VdiState::of(&decoded(state)?) })
}

/// `sheepdog:...` without slashes.
fn of_old_name(text: &str) -> Option<VdiName> {
    let parts: Vec<&str> = text.strip_prefix("sheepdog:")?.split(':').collect();
    let (address, vdi, state) = match *parts {
        [vdi] => (usual(), vdi, ""),
        [vdi, state] => (usual(), vdi, state),
        [host, port, vdi] => (inet(host, port), vdi, ""),
        [host, port, vdi, state] => (inet(host, port), vdi, state),
        _ => return None,
    };
    Some(VdiName { address, vdi: vdi.to_owned(), state: VdiState::of(state) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, shown) in [
            ("sheepdog:a", "sheepdog://localhost:7000/a"),
            ("sheepdog:a:3", "sheepdog://localhost:7000/a#3"),
            ("sheepdog:a:b c", "sheepdog://localhost:7000/a#b%20c"),
            ("sheepdog:h:1:a", "sheepdog://h:1/a"),
            ("sheepdog:h:1:a:x", "sheepdog://h:1/a#x"),
            ("sheepdog:///a", "sheepdog://localhost:7000/a"),
            ("sheepdog://h/a#7", "sheepdog://h:7000/a#7"),
            ("sheepdog+tcp://h:9/a%23b#t", "sheepdog://h:9/a%23b#t"),
            ("sheepdog://[::1]:9/a", "sheepdog://[::1]:9/a"),
            ("sheepdog+unix:///a?socket=/s%20s#t", "sheepdog+unix:///a?socket=/s%20s#t"),
        ] {
            let target = VdiName::of_name(name).unwrap();
            assert_eq!(target.shown().as_deref(), Some(shown), "{name}");
            let mut options: OptionTree = target.options().into_iter().collect();
            assert_eq!(VdiName::take(None, &mut options).unwrap(), target, "{name}");
            assert!(options.is_empty(), "{name}");
        }
    }

    #[test]
    fn bad_names() {
        let long = format!("sheepdog:{}", "a".repeat(256));
        for name in [
            "sheepdog:",
            "sheepdog:a:b:c:d:e",
            "sheepdog://h",
            "sheepdog://h/",
            "sheepdog://h:x/a",
            "sheepdog://h/a?socket=s",
            "sheepdog+unix:///a",
            "sheepdog+unix://h/a?socket=s",
            "sheepdog+foo://h/a",
            "sheepdog://h/a%zz",
            "sheepdog://h/a%00",
            &long,
        ] {
            assert!(VdiName::of_name(name).is_err(), "{name}");
        }
    }
}
