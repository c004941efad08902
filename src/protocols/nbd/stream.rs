//! A socket as two halves, one to send and one to receive by, with or without TLS.
//!
//! Lock order: the state of TLS is a leaf, and held while bytes are encrypted or decrypted, never while they move.

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::ClientConnection;

use crate::protocols::server::Socket;

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
        self.socket.send(head, body)
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
