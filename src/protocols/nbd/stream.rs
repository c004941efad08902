//! A socket as two halves, one to send and one to receive by, with or without TLS.
//!
//! Lock order: the state of TLS is a leaf, and held while bytes are encrypted or decrypted, never while they move.

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConnection;

use super::names::{Address, Family, Namespace};
use crate::storage::error::strerror;

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
    pub fn connect(address: &Address) -> Result<Self, String> {
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
fn addresses(host: &str, port: &str, family: Family) -> Result<Vec<SocketAddr>, String> {
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

type Tls = Arc<Mutex<ClientConnection>>;

/// Sends.
#[derive(Debug)]
pub struct SendHalf {
    socket: Arc<Socket>,
    tls: Option<Tls>,
    /// What is encrypted and not sent yet.
    records: Vec<u8>,
}

/// Receives. Small pieces come out of a buffer.
#[derive(Debug)]
pub struct ReceiveHalf(BufReader<Source>);

#[derive(Debug)]
struct Source {
    socket: Arc<Socket>,
    tls: Option<Decrypting>,
}

/// What comes in encrypted.
#[derive(Debug)]
struct Decrypting {
    tls: Tls,
    records: Vec<u8>,
    /// Those of the bytes that TLS has not taken yet.
    fresh: Range<usize>,
}

/// Bytes that are received at once, if they are wanted or not.
const BUFFER: usize = 16 << 10;
/// The longest record of TLS, encrypted.
const RECORD: usize = (16 << 10) + 2048;

/// The halves of a socket.
pub fn halves(socket: Arc<Socket>) -> (SendHalf, ReceiveHalf) {
    let source = Source { socket: socket.clone(), tls: None };
    (SendHalf { socket, tls: None, records: Vec::new() }, ReceiveHalf(BufReader::with_capacity(BUFFER, source)))
}

/// The halves of a socket on which TLS has been begun.
pub fn secure_halves(socket: Arc<Socket>, tls: ClientConnection) -> (SendHalf, ReceiveHalf) {
    let tls = Arc::new(Mutex::new(tls));
    let source = Source {
        socket: socket.clone(),
        tls: Some(Decrypting { tls: tls.clone(), records: vec![0; RECORD], fresh: 0..0 }),
    };
    let send = SendHalf { socket, tls: Some(tls), records: Vec::new() };
    (send, ReceiveHalf(BufReader::with_capacity(BUFFER, source)))
}

impl SendHalf {
    /// Sends a header and what follows it.
    pub fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        if self.tls.is_some() {
            return self.send_secure(head).and_then(|()| self.send_secure(body));
        }
        let mut socket = &*self.socket;
        let mut sent = 0;
        while sent < head.len() {
            let rest = [io::IoSlice::new(head.get(sent..).unwrap_or_default()), io::IoSlice::new(body)];
            match socket.write_vectored(&rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => sent += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        socket.write_all(body.get(sent - head.len()..).unwrap_or_default())
    }

    fn send_secure(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let Some(tls) = &self.tls else { return Ok(()) };
        while !bytes.is_empty() {
            self.records.clear();
            let mut state = tls.lock().unwrap_or_else(PoisonError::into_inner);
            let taken = state.writer().write(bytes)?;
            while state.wants_write() {
                state.write_tls(&mut self.records)?;
            }
            drop(state);
            bytes = bytes.get(taken..).unwrap_or_default();
            (&*self.socket).write_all(&self.records)?;
        }
        Ok(())
    }

    /// The socket itself.
    pub fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }
}

impl Read for ReceiveHalf {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl ReceiveHalf {
    /// Whether something was received that nobody has asked for.
    pub fn has_more(&self) -> bool {
        !self.0.buffer().is_empty()
    }
}

impl Read for Source {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(Decrypting { tls, records, fresh }) = &mut self.tls else { return (&*self.socket).read(buf) };
        loop {
            {
                let mut state = tls.lock().unwrap_or_else(PoisonError::into_inner);
                match state.reader().read(buf) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    done => return done,
                }
                if let Some(mut left) = records.get(fresh.clone()).filter(|left| !left.is_empty()) {
                    fresh.start += state.read_tls(&mut left)?;
                    // What TLS has to say to that goes out with the next request.
                    state.process_new_packets().map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
                    continue;
                }
            }
            match (&*self.socket).read(records)? {
                0 => return Ok(0),
                got => *fresh = 0..got,
            }
        }
    }
}
