//! Where a server is, as names and options say it, and the sockets that lead there: for protocols that speak with one of
//! their own.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixStream};
use std::time::Duration;

use crate::block::keys::{take_number, take_switch, take_text};
use crate::block::name::first_key;
use crate::block::{Error, OptionTree, Result};
use crate::storage::error::strerror;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket of the host: its path, or, if it is an abstract one, its name, filled with zeros unless `tight`.
    Unix { path: String, namespace: Namespace },
    /// A port, or the name of a service, which no system here knows.
    Inet { host: String, port: String, family: Family },
}

/// What the path of a socket of the host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace {
    /// The name of a file.
    File,
    /// A name that has no file (unix(7)); `padded`: with zeros up to the longest length.
    Abstract { padded: bool },
}

/// Which addresses of a host are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// Those of IPv4.
    pub v4: bool,
    /// Those of IPv6.
    pub v6: bool,
}

impl Family {
    /// All of them.
    pub const ANY: Family = Family { v4: true, v6: true };
}

impl Address {
    /// Refuses what can be no address.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Unix { path, .. } if path.len() >= LONGEST_SOCKET => {
                Err(Error::invalid(format!("UNIX socket path '{path}' is too long"))
                    .hint("Path must be less than 108 bytes"))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { path, .. } => write!(f, "{path}"),
            Self::Inet { host, port, .. } => write!(f, "{host}:{port}"),
        }
    }
}

/// Bytes of a socket's address (unix(7)).
const LONGEST_SOCKET: usize = 108;

/// The options below `server`.
pub fn take_server(mut server: OptionTree) -> Result<Address> {
    let missing = |key: &str| Error::invalid(format!("Parameter '{key}' is missing"));
    let elsewhere = |what: &str| Error::unsupported(format!("A server cannot be reached by {what} here"));
    let kind = take_text(&mut server, "type").ok_or_else(|| missing("type"))?;
    let address = match kind.as_str() {
        "unix" => {
            let path = take_text(&mut server, "path").ok_or_else(|| missing("path"))?;
            let apart = take_switch(&mut server, "abstract")?.unwrap_or(false);
            let tight = take_switch(&mut server, "tight")?.unwrap_or(true);
            let namespace = if apart { Namespace::Abstract { padded: !tight } } else { Namespace::File };
            Address::Unix { path, namespace }
        }
        "inet" => {
            let host = take_text(&mut server, "host").ok_or_else(|| missing("host"))?;
            let port = take_text(&mut server, "port").ok_or_else(|| missing("port"))?;
            // Meant for those who listen.
            take_switch(&mut server, "numeric")?;
            take_number(&mut server, "to")?;
            let (v4, v6) = (take_switch(&mut server, "ipv4")?, take_switch(&mut server, "ipv6")?);
            for key in ["keep-alive", "mptcp"] {
                if take_switch(&mut server, key)?.unwrap_or(false) {
                    return Err(Error::unsupported(format!("'{key}' is not supported")));
                }
            }
            // One that is wanted keeps the other away, unless that is wanted too.
            let family = Family { v4: v4.unwrap_or(v6 != Some(true)), v6: v6.unwrap_or(v4 != Some(true)) };
            Address::Inet { host, port, family }
        }
        "fd" => return Err(elsewhere("the number of an open file")),
        "vsock" => return Err(elsewhere("vsock")),
        other => return Err(Error::invalid(format!("Parameter 'type' does not accept value '{other}'"))),
    };
    match first_key(&server) {
        Some(key) => Err(Error::invalid(format!("Parameter '{key}' is unexpected"))),
        None => Ok(address),
    }
}

/// A socket's path; one that starts with a zero byte is abstract.
pub fn unix_address(path: String) -> Address {
    match path.strip_prefix('\0') {
        Some(name) => Address::Unix { path: name.to_owned(), namespace: Namespace::Abstract { padded: false } },
        None => Address::Unix { path, namespace: Namespace::File },
    }
}

/// A host, which may be an address of IPv6 in brackets, and what stands behind the colon after it.
pub fn host_and_port(text: &str) -> Option<(&str, Option<&str>)> {
    let (host, after) = match text.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => text.find(':').map_or((text, ""), |colon| text.split_at(colon)),
    };
    match after.strip_prefix(':') {
        Some(port) => Some((host, Some(port))),
        None => after.is_empty().then_some((host, None)),
    }
}

/// Text without percent-encoding, if it is text then.
pub fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
                let (high, low) = (digit()?, digit()?);
                u8::try_from(high << 4 | low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// Of the network.
    Tcp(TcpStream),
    /// Of the host.
    Unix(UnixStream),
}

/// Bytes of an abstract socket's name, filled up (unix(7)).
const ABSTRACT_NAME: usize = 107;

impl Socket {
    /// Connects, or says why not.
    pub fn connect(address: &Address) -> std::result::Result<Self, String> {
        let failed = |error: io::Error| format!("Failed to connect to '{address}': {}", strerror(&error));
        match address {
            Address::Unix { path, namespace: Namespace::File } => {
                // Nothing listens on no name, whatever the host says of it.
                let empty = || io::Error::from(nix::errno::Errno::ECONNREFUSED);
                let stream = if path.is_empty() { Err(empty()) } else { UnixStream::connect(path) };
                stream.map(Self::Unix).map_err(failed)
            }
            Address::Unix { path, namespace: Namespace::Abstract { padded } } => {
                let mut name = path.clone().into_bytes();
                if *padded {
                    name.resize(ABSTRACT_NAME.max(name.len()), 0);
                }
                let stream = UnixAddress::from_abstract_name(name).and_then(|name| UnixStream::connect_addr(&name));
                stream.map(Self::Unix).map_err(failed)
            }
            Address::Inet { host, port, family } => {
                let mut last = io::Error::from(nix::errno::Errno::EADDRNOTAVAIL);
                for candidate in addresses(host, port, *family)? {
                    match TcpStream::connect(candidate) {
                        Ok(stream) => {
                            // "The client and server SHOULD disable Nagle's algorithm".
                            stream.set_nodelay(true).map_err(failed)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(failed(last))
            }
        }
    }

    /// How long is waited for bytes; `None`: for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
            Self::Unix(stream) => stream.set_read_timeout(timeout),
        }
    }

    /// Sends a header and what follows it.
    pub fn send(&self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let mut socket = self;
        let mut sent = 0;
        while sent < head.len() {
            let rest = [io::IoSlice::new(head.get(sent..).unwrap_or_default()), io::IoSlice::new(body)];
            match socket.write_vectored(&rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => sent += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        socket.write_all(body.get(sent - head.len()..).unwrap_or_default())
    }

    /// Ends it, and whatever waits for it.
    pub fn shut_down(&self) {
        // One that is gone already is what is wanted.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

/// The addresses of a host.
fn addresses(host: &str, port: &str, family: Family) -> std::result::Result<Vec<SocketAddr>, String> {
    let failed = |why: &str| format!("address resolution failed for {host}:{port}: {why}");
    // The C library takes the lower bits, as the reference does.
    let number: u64 = port.parse().map_err(|_| failed("Servname not supported for ai_socktype"))?;
    let number = u16::try_from(number & 0xffff).unwrap_or_default();
    if host.is_empty() {
        return Err(failed("Name or service not known"));
    }
    let found = (host, number).to_socket_addrs().map_err(|error| {
        let text = strerror(&error);
        failed(text.rsplit_once(": ").map_or(text.as_str(), |(_, why)| why))
    })?;
    let wanted = |address: &SocketAddr| if address.is_ipv4() { family.v4 } else { family.v6 };
    let found: Vec<_> = found.filter(wanted).collect();
    if found.is_empty() { Err(failed("Address family for hostname not supported")) } else { Ok(found) }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&mut &*stream).read(buf),
            Socket::Unix(stream) => (&mut &*stream).read(buf),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&mut &*stream).write(buf),
            Socket::Unix(stream) => (&mut &*stream).write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&mut &*stream).write_vectored(bufs),
            Socket::Unix(stream) => (&mut &*stream).write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
