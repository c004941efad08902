//! `tftp` (RFC 1350, with the options of RFC 2347 to 2349): files that come from their start on, block by block.
//!
//! Nothing can be asked for by its place. So what has come is kept in a file of the host that has no name, as far as
//! anybody has asked; where the server does not say how long the file is, that is all of it.
//!
//! Lock order: `state` is held while blocks are awaited: they come one after the other, whoever wants them.

use std::fs::File;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::ranged::Fetch;
use super::url::address::Address;
use super::url::{ByUrl, Remote, Wanted, Wishes};
use crate::storage::error::strerror;
use crate::storage::temporary::unnamed_file;
use crate::storage::{Error, Result};

/// The protocol.
pub const TFTP: ByUrl = ByUrl { name: "tftp", open, send: None, credentials: Vec::new, keeps: true };

/// Bytes in a block that are asked for (in one Ethernet frame, with the headers of IPv6), and where nothing is agreed.
const WISHED_BLOCK: usize = 1428;
const PLAIN_BLOCK: usize = 512;

/// How often a packet is sent that nothing comes back for.
const TRIES: u32 = 5;

/// How long nothing may come, before it is sent again.
const PAUSE: Duration = Duration::from_secs(1);

/// Packets that are none of the transfer's, before it is given up.
const MOST_STRAY: u32 = 10_000;

/// RFC 1350, section 5.
mod opcode {
    pub const READ: u16 = 1;
    pub const DATA: u16 = 3;
    pub const ACK: u16 = 4;
    pub const ERROR: u16 = 5;
    /// RFC 2347.
    pub const OPTIONS: u16 = 6;
}

fn open(wanted: &Wanted<'_>, wishes: Wishes) -> Result<Remote> {
    let bad = || Error::Other(format!("'{}' is no URL of a file", wanted.url));
    let address = Address::parse(wanted.url).ok_or_else(bad)?;
    let path = address.file().filter(|path| !path.is_empty()).ok_or_else(bad)?;
    let mut transfer = Transfer::begin(&address, &path, wishes.timeout)?;
    let len = match transfer.told {
        Some(len) => len,
        None => {
            while !transfer.ended {
                transfer.step()?;
            }
            transfer.came
        }
    };
    Ok(Remote { file: Box::new(TftpFile { state: Mutex::new(transfer) }), len, start: Vec::new(), parallel: 1 })
}

/// See the module.
#[derive(Debug)]
struct TftpFile {
    state: Mutex<Transfer>,
}

#[derive(Debug)]
struct Transfer {
    socket: UdpSocket,
    /// What has come.
    kept: File,
    came: u64,
    /// How long the file is, if the server has told.
    told: Option<u64>,
    block_len: usize,
    /// The block that comes next; from 65535 on again from 0.
    next: u16,
    /// What was sent last: it is sent again where nothing comes back.
    last: Vec<u8>,
    ended: bool,
    /// Why it has ended too early.
    lost: Option<String>,
}

enum Packet<'a> {
    Data(u16, &'a [u8]),
    Options(&'a [u8]),
    Error(String),
    Other,
}

impl<'a> Packet<'a> {
    fn parse(bytes: &'a [u8]) -> Self {
        let number = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        match (number(0), number(2)) {
            (Some(opcode::DATA), Some(block)) => Self::Data(block, bytes.get(4..).unwrap_or_default()),
            (Some(opcode::OPTIONS), _) => Self::Options(bytes.get(2..).unwrap_or_default()),
            (Some(opcode::ERROR), Some(code)) => {
                let text = bytes.get(4..).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default();
                let text = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect::<String>();
                let known = match code {
                    1 => "The file does not exist",
                    2 => "Access denied",
                    _ => "the server says",
                };
                Self::Error(format!("{known}: {text}"))
            }
            _ => Self::Other,
        }
    }
}

fn lasting(error: &std::io::Error) -> Error {
    Error::Other(strerror(error))
}

impl Transfer {
    /// Asks for the file. What comes first is the options that the server takes, or the first block.
    fn begin(address: &Address, path: &[u8], timeout: Option<Duration>) -> Result<Self> {
        let host = address.host().trim_matches(['[', ']']).to_owned();
        let to = match host.parse::<IpAddr>() {
            Ok(ip) => Some(SocketAddr::new(ip, address.port())),
            Err(_) => (host.as_str(), address.port()).to_socket_addrs().ok().and_then(|mut found| found.next()),
        };
        let to = to.ok_or_else(|| Error::Other(format!("Could not resolve host: {host}")))?;
        let from = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(from).map_err(|error| lasting(&error))?;
        let pause = timeout.map_or(PAUSE, |most| PAUSE.min(most));
        socket.set_read_timeout(Some(pause)).map_err(|error| lasting(&error))?;
        let wished = WISHED_BLOCK.to_string();
        let words: [&[u8]; 6] = [path, b"octet", b"blksize", wished.as_bytes(), b"tsize", b"0"];
        let mut request = opcode::READ.to_be_bytes().to_vec();
        words.iter().for_each(|word| request.extend(word.iter().chain(&[0])));
        let mut transfer = Self {
            socket,
            kept: unnamed_file()?,
            came: 0,
            told: None,
            block_len: PLAIN_BLOCK,
            next: 1,
            last: request,
            ended: false,
            lost: None,
        };
        transfer.first(to)?;
        Ok(transfer)
    }

    /// The first answer: it comes from a port that was chosen for this transfer.
    fn first(&mut self, to: SocketAddr) -> Result<()> {
        let mut buffer = vec![0; 65536];
        for _ in 0..TRIES {
            self.socket.send_to(&self.last, to).map_err(|error| lasting(&error))?;
            loop {
                let (len, from) = match self.socket.recv_from(&mut buffer) {
                    Ok(came) => came,
                    Err(error) if is_late(&error) => break,
                    Err(error) => return Err(lasting(&error)),
                };
                let packet = Packet::parse(&buffer[..len]);
                if from.ip() != to.ip() || matches!(packet, Packet::Other) {
                    continue;
                }
                self.socket.connect(from).map_err(|error| lasting(&error))?;
                match packet {
                    Packet::Options(options) => {
                        self.agree(options)?;
                        self.acknowledge(0)?;
                    }
                    Packet::Data(block, bytes) => self.take(block, bytes).map(drop)?,
                    Packet::Error(text) => return Err(Error::Other(text)),
                    Packet::Other => {}
                }
                return Ok(());
            }
        }
        Err(Error::Other("Timeout was reached".to_owned()))
    }

    /// What the server takes of what was offered (RFC 2347).
    fn agree(&mut self, options: &[u8]) -> Result<()> {
        let refuse = || Error::Other("the server answers with options that were not offered".to_owned());
        let mut words = options.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).to_ascii_lowercase());
        while let (Some(key), Some(value)) = (words.next(), words.next()) {
            match (key.as_str(), value.parse::<u64>()) {
                ("blksize", Ok(len)) => {
                    let len = usize::try_from(len).ok().filter(|len| (8..=WISHED_BLOCK).contains(len));
                    self.block_len = len.ok_or_else(refuse)?;
                }
                ("tsize", Ok(len)) => self.told = Some(len),
                _ => return Err(refuse()),
            }
        }
        Ok(())
    }

    fn acknowledge(&mut self, block: u16) -> Result<()> {
        self.last = [opcode::ACK.to_be_bytes(), block.to_be_bytes()].concat();
        self.socket.send(&self.last).map(drop).map_err(|error| lasting(&error))
    }

    /// Keeps a block, if it is the next one: whether it is.
    fn take(&mut self, block: u16, bytes: &[u8]) -> Result<bool> {
        if block != self.next || bytes.len() > self.block_len {
            return Ok(false);
        }
        self.kept.write_all_at(bytes, self.came).map_err(Error::from)?;
        self.came += bytes.len() as u64;
        self.ended = bytes.len() < self.block_len;
        self.next = self.next.wrapping_add(1);
        self.acknowledge(block)?;
        let right = self.told.is_none_or(|len| if self.ended { self.came == len } else { self.came <= len });
        if right { Ok(true) } else { Err(Error::Other("the file is not as long as the server says".to_owned())) }
    }

    /// Waits for the next block.
    fn step(&mut self) -> Result<()> {
        let mut buffer = vec![0; 65536];
        let (mut tries, mut stray) = (1, 0);
        loop {
            match self.socket.recv(&mut buffer) {
                Ok(len) => match Packet::parse(&buffer[..len]) {
                    Packet::Data(block, bytes) if self.take(block, bytes)? => return Ok(()),
                    Packet::Error(text) => return Err(Error::Other(text)),
                    // Sent twice, or late: it is not answered, or both would send everything twice from then on.
                    _ => stray += 1,
                },
                Err(error) if is_late(&error) && tries < TRIES => {
                    tries += 1;
                    self.socket.send(&self.last).map_err(|error| lasting(&error))?;
                }
                Err(error) if is_late(&error) => return Err(Error::Other("Timeout was reached".to_owned())),
                Err(error) => return Err(lasting(&error)),
            }
            if stray > MOST_STRAY {
                return Err(Error::Other("the server does not speak TFTP as it should".to_owned()));
            }
        }
    }
}

/// Nothing has come in time.
fn is_late(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

impl Fetch for TftpFile {
    fn fetch(&self, at: u64, buf: &mut [u8], _behind: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let end = at.saturating_add(buf.len() as u64);
        while state.came < end {
            if let Some(text) = &state.lost {
                return Err(Error::Other(text.clone()));
            }
            if let Err(error) = state.step() {
                state.lost = Some(error.to_string());
                return Err(error);
            }
            if state.ended && state.came < end {
                return Err(Error::Other("the file ends too early".to_owned()));
            }
        }
        state.kept.read_exact_at(buf, at).map_err(Error::from)
    }
}
