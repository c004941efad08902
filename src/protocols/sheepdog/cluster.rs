//! Requests to a server of a cluster: each goes over a connection of its own, which is kept for the next ones.

use std::io::{self, Read};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use zerocopy::{FromZeros, IntoBytes};

use super::layout::{DiskRequest, Head, NAME, ObjectRequest, Reply, VERSION, flag, opcode, result};
use super::names::VdiState;
use crate::protocols::server::{Address, Socket};
use crate::storage::error::strerror;
use crate::storage::{Error, Result};

/// See the module.
#[derive(Debug)]
pub struct Cluster {
    address: Address,
    idle: Mutex<Vec<Channel>>,
}

#[derive(Debug)]
struct Channel {
    socket: Socket,
    next_id: u32,
}

/// Where data goes that a new object is given.
#[derive(Debug, Clone, Copy)]
pub struct NewObject {
    /// Which.
    pub object: u64,
    /// The one that it is made from.
    pub from: Option<u64>,
    /// [`ObjectRequest::copies`] and [`ObjectRequest::copy_policy`].
    pub copies: (u8, u8),
}

/// Why there is no new disk.
#[derive(Debug)]
pub enum NoDisk {
    /// The server says no.
    Refused(Error),
    /// There was no answer: it may have been made.
    Unanswered(Error),
}

/// A reply that is no refusal.
fn accepted(reply: Reply) -> Result<Reply> {
    match reply.result.get() {
        result::SUCCESS => Ok(reply),
        other => {
            let (text, errno) = result::meaning(other);
            Err(Error::Remote { text: format!("{text} (result {other:#04x})"), errno })
        }
    }
}

fn remote(text: String) -> Error {
    Error::Remote { text, errno: Errno::EIO }
}

impl Cluster {
    /// Connects.
    pub fn open(address: Address) -> Result<Self> {
        let cluster = Self { address, idle: Mutex::default() };
        let first = cluster.connect()?;
        cluster.idle().push(first);
        Ok(cluster)
    }

    /// The id of a disk, or of a snapshot of one. `lock`: nobody else may write to it until [`Self::release`].
    pub fn find(&self, vdi: &str, state: &VdiState, lock: bool) -> Result<u32> {
        let (number, tag) = match state {
            VdiState::Current => (0, ""),
            VdiState::Number(number) => (*number, ""),
            VdiState::Tag(tag) => (0, tag.as_str()),
        };
        let opcode = if lock { opcode::LOCK_VDI } else { opcode::GET_VDI_INFO };
        let request = DiskRequest { head: head(opcode, flag::WRITE), snapshot: number.into(), ..Default::default() };
        Ok(self.request(request, &names(&[vdi, tag]), &mut [])?.disk.get())
    }

    /// Gives a lock back.
    pub fn release(&self, disk: u32) -> Result<()> {
        let request = DiskRequest { head: head(opcode::RELEASE_VDI, 0), disk: disk.into(), ..Default::default() };
        self.request(request, &[], &mut []).map(drop)
    }

    /// Makes a disk of zeros. Gives its id.
    pub fn create(&self, vdi: &str, size: u64) -> std::result::Result<u32, NoDisk> {
        let head = head(opcode::NEW_VDI, flag::WRITE);
        let request = DiskRequest { head, size: size.into(), ..Default::default() };
        let reply = self.exchange(request, &names(&[vdi]), &mut []).map_err(NoDisk::Unanswered)?;
        Ok(accepted(reply).map_err(NoDisk::Refused)?.disk.get())
    }

    /// Removes a disk.
    pub fn delete(&self, vdi: &str) -> Result<()> {
        let request = DiskRequest { head: head(opcode::DELETE_VDI, flag::WRITE), ..Default::default() };
        self.request(request, &names(&[vdi, ""]), &mut []).map(drop)
    }

    /// Reads of an object.
    pub fn read(&self, object: u64, offset: u64, buf: &mut [u8]) -> Result<()> {
        let head = head(opcode::READ_OBJECT, 0);
        let request = ObjectRequest { head, object: object.into(), offset: offset.into(), ..Default::default() };
        self.request(request, &[], buf).map(drop)
    }

    /// Writes to an object that is there.
    pub fn write(&self, object: u64, offset: u64, data: &[u8]) -> Result<()> {
        let head = head(opcode::WRITE_OBJECT, flag::WRITE);
        let request = ObjectRequest { head, object: object.into(), offset: offset.into(), ..Default::default() };
        self.request(request, data, &mut []).map(drop)
    }

    /// Makes an object, and writes to it.
    pub fn write_new(&self, new: NewObject, offset: u64, data: &[u8]) -> Result<()> {
        let flags = flag::WRITE | if new.from.is_some() { flag::COPY_ON_WRITE } else { 0 };
        let (copies, copy_policy) = new.copies;
        let request = ObjectRequest {
            head: head(opcode::CREATE_AND_WRITE_OBJECT, flags),
            object: new.object.into(),
            from: new.from.unwrap_or(0).into(),
            copies,
            copy_policy,
            offset: offset.into(),
            ..Default::default()
        };
        self.request(request, data, &mut []).map(drop)
    }

    /// Sends a request and `data`, and fills `buf` with what comes back.
    fn request(&self, request: impl Request, data: &[u8], buf: &mut [u8]) -> Result<Reply> {
        accepted(self.exchange(request, data, buf)?)
    }

    /// The same, whatever the server says.
    fn exchange(&self, request: impl Request, data: &[u8], buf: &mut [u8]) -> Result<Reply> {
        let idle = self.idle().pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => self.connect()?,
        };
        // One on which something went wrong is not used again.
        let reply = connection.request(request, data, buf)?;
        if reply.result.get() == result::SUCCESS || reply.head.len.get() == 0 {
            self.idle().push(connection);
        }
        Ok(reply)
    }

    fn connect(&self) -> Result<Channel> {
        let socket = Socket::connect(&self.address).map_err(remote)?;
        Ok(Channel { socket, next_id: 1 })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Channel>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request of either kind.
trait Request: IntoBytes + zerocopy::Immutable {
    fn head(&mut self) -> &mut Head;
}

impl Request for ObjectRequest {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

impl Request for DiskRequest {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

fn head(opcode: u8, flags: u16) -> Head {
    Head { version: VERSION, opcode, flags: flags.into(), ..Head::default() }
}

/// Names, each with the zeros that fill it up.
fn names(names: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(names.len() * NAME);
    for name in names {
        let end = bytes.len() + NAME;
        bytes.extend(name.bytes().take(NAME - 1));
        bytes.resize(end, 0);
    }
    bytes
}

impl Channel {
    /// The reply, and in `buf` what follows it if it is a success.
    fn request(&mut self, mut request: impl Request, data: &[u8], buf: &mut [u8]) -> Result<Reply> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let head = request.head();
        head.id = id.into();
        head.len = u32::try_from(data.len().max(buf.len())).map_err(|_| Error::from(Errno::EINVAL))?.into();
        self.socket.send(request.as_bytes(), data).map_err(lost)?;
        let mut reply = Reply::new_zeroed();
        let mut socket = &self.socket;
        socket.read_exact(reply.as_mut_bytes()).map_err(lost)?;
        if reply.head.id.get() != id {
            return Err(remote("the server answers a request that was never sent".to_owned()));
        }
        let (got, due) = (reply.head.len.get(), buf.len());
        match reply.result.get() {
            result::SUCCESS if got as usize == due => socket.read_exact(buf).map_err(lost)?,
            result::SUCCESS => return Err(remote(format!("the server sends {got} bytes where {due} are due"))),
            _ => {}
        }
        Ok(reply)
    }
}

fn lost(error: io::Error) -> Error {
    remote(match error.kind() {
        io::ErrorKind::UnexpectedEof => "the server has closed the connection".to_owned(),
        _ => format!("the connection to the server is lost: {}", strerror(&error)),
    })
}
