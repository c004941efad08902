//! Requests as bytes, and what is made of the replies to them: "Transmission phase" of doc/proto.md.
//!
//! Invariants: a reply fills nothing but what its request asked for, and all of it, or it is an error; no payload
//! that is longer than it can be is read into memory.

use std::io::{self, ErrorKind, Read};

use nix::errno::Errno;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::handshake::Export;
use super::layout::{
    self, ChunkHeader, DONE, ErrorPayload, ExtendedChunkHeader, ExtendedRequest, ExtendedStatus, Hole, Request,
    SimpleReply, Status, chunk, command, command_flag, error,
};
use super::stream::ReceiveHalf;
use crate::storage::error::strerror;

/// What is asked of a server.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// One of [`command`].
    pub command: u16,
    /// Of [`command_flag`].
    pub flags: u16,
    /// Where.
    pub at: u64,
    /// How long.
    pub len: u64,
    /// What is written.
    pub data: &'a [u8],
}

impl<'a> Ask<'a> {
    /// One without data.
    pub fn new(command: u16, at: u64, len: u64) -> Self {
        Self { command, flags: 0, at, len, data: &[] }
    }

    /// One that writes.
    pub fn write(at: u64, data: &'a [u8]) -> Self {
        Self { data, ..Self::new(command::WRITE, at, data.len() as u64) }
    }

    /// The request's header.
    pub fn head(&self, export: &Export, cookie: u64) -> Vec<u8> {
        let (cookie, offset, command) = (cookie.into(), self.at.into(), self.command.into());
        if export.extended {
            let payload = if self.command == command::WRITE { command_flag::PAYLOAD_LEN } else { 0 };
            let (magic, flags) = (layout::EXTENDED_REQUEST_MAGIC.into(), (self.flags | payload).into());
            return ExtendedRequest { magic, flags, command, cookie, offset, len: self.len.into() }.as_bytes().to_vec();
        }
        let len = u32::try_from(self.len).unwrap_or(u32::MAX).into();
        let (magic, flags) = (layout::REQUEST_MAGIC.into(), self.flags.into());
        Request { magic, flags, command, cookie, offset, len }.as_bytes().to_vec()
    }
}

/// Why a connection is of no use any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// What happened.
    pub text: String,
    /// The server, or the way to it, is gone, and may come back. Else it does not keep to the protocol.
    pub passing: bool,
}

impl Lost {
    /// The server does not keep to the protocol.
    fn broken(text: impl Into<String>) -> Self {
        Self { text: text.into(), passing: false }
    }
}

impl From<io::Error> for Lost {
    fn from(error: io::Error) -> Self {
        let text = match error.kind() {
            ErrorKind::UnexpectedEof
            | ErrorKind::BrokenPipe
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted => "the server has closed the connection".to_owned(),
            _ => format!("the connection to the server is lost: {}", strerror(&error)),
        };
        Self { text, passing: error.kind() != ErrorKind::InvalidData }
    }
}

/// What stands at the start of a reply, or of a chunk of one.
#[derive(Debug, Clone, Copy)]
pub struct ReplyHead {
    /// Of the request that it is for.
    pub cookie: u64,
    /// Of the same, with an extended header.
    offset: Option<u64>,
    kind: HeadKind,
}

#[derive(Debug, Clone, Copy)]
enum HeadKind {
    Simple { error: u32 },
    Chunk { done: bool, kind: u16, len: u64 },
}

impl ReplyHead {
    /// The next one.
    pub fn read(receive: &mut ReceiveHalf, export: &Export) -> Result<Self, Lost> {
        let magic = read::<U32>(receive)?.get();
        match magic {
            layout::SIMPLE_MAGIC if !export.extended => {
                let reply: SimpleReply = read(receive)?;
                let kind = HeadKind::Simple { error: reply.error.get() };
                Ok(Self { cookie: reply.cookie.get(), offset: None, kind })
            }
            layout::CHUNK_MAGIC if export.structured && !export.extended => {
                let head: ChunkHeader = read(receive)?;
                let (done, kind, len) = (head.flags.get() & DONE != 0, head.kind.get(), head.len.get().into());
                Ok(Self { cookie: head.cookie.get(), offset: None, kind: HeadKind::Chunk { done, kind, len } })
            }
            layout::EXTENDED_CHUNK_MAGIC if export.extended => {
                let head: ExtendedChunkHeader = read(receive)?;
                let (done, kind, len) = (head.flags.get() & DONE != 0, head.kind.get(), head.len.get());
                Ok(Self {
                    cookie: head.cookie.get(),
                    offset: Some(head.offset.get()),
                    kind: HeadKind::Chunk { done, kind, len },
                })
            }
            _ => Err(Lost::broken(format!("the server sent a reply with the wrong magic number 0x{magic:08x}"))),
        }
    }
}

/// A run of what the context says: its length, and flags.
pub type StatusRun = (u64, u64);

/// Where the answer to a request goes.
#[derive(Debug)]
pub enum Sink<'a> {
    /// Done is done.
    Nothing,
    /// What is read.
    Data(&'a mut [u8]),
    /// What is known of a range.
    Status(&'a mut Vec<StatusRun>),
}

impl Sink<'_> {
    /// The same once more: what was answered before counts no more.
    pub fn again(&mut self) -> Sink<'_> {
        match self {
            Self::Nothing => Sink::Nothing,
            Self::Data(buf) => Sink::Data(buf),
            Self::Status(runs) => {
                runs.clear();
                Sink::Status(runs)
            }
        }
    }
}

/// The most runs of one reply: what servers send is below that.
const MOST_RUNS: u64 = 1 << 20;
/// The longest payload of an error.
const LONGEST_ERROR: u64 = 2 * layout::LONGEST_STRING as u64;

/// A reply that comes in.
#[derive(Debug)]
pub struct Reply<'a> {
    at: u64,
    len: u64,
    sink: Sink<'a>,
    /// Bytes that have come, from the start on without a gap.
    filled: u64,
    /// Those that came before what is in front of them: start and end.
    apart: Vec<(u64, u64)>,
    error: Option<Errno>,
}

impl<'a> Reply<'a> {
    /// To that request.
    pub fn new(ask: &Ask<'_>, sink: Sink<'a>) -> Self {
        Self { at: ask.at, len: ask.len, sink, filled: 0, apart: Vec::new(), error: None }
    }

    /// Takes a chunk: whether it was the last one.
    pub fn take(&mut self, head: &ReplyHead, receive: &mut ReceiveHalf, export: &Export) -> Result<bool, Lost> {
        if head.offset.is_some_and(|offset| offset != self.at) {
            return Err(Lost::broken("the server answers a request for another offset"));
        }
        match head.kind {
            HeadKind::Simple { error: 0 } => {
                match &mut self.sink {
                    Sink::Data(_) if export.structured => {
                        return Err(Lost::broken("the server sent a simple reply to a read"));
                    }
                    Sink::Data(buf) => receive.read_exact(buf)?,
                    Sink::Status(_) => return Err(Lost::broken("the server sent no block status")),
                    Sink::Nothing => {}
                }
                self.filled = self.len;
                Ok(true)
            }
            HeadKind::Simple { error } => {
                self.error = Some(errno(error));
                Ok(true)
            }
            HeadKind::Chunk { done, kind, len } => {
                self.take_chunk(kind, len, receive, export)?;
                if kind == chunk::NONE && !done {
                    return Err(Lost::broken("the server sent an empty chunk in the middle of a reply"));
                }
                Ok(done)
            }
        }
    }

    fn take_chunk(&mut self, kind: u16, len: u64, receive: &mut ReceiveHalf, export: &Export) -> Result<(), Lost> {
        let wrong = || Lost::broken(format!("the server sent a chunk of type {kind} and {len} bytes, which cannot be"));
        match kind {
            chunk::NONE if len == 0 => Ok(()),
            chunk::OFFSET_DATA if matches!(self.sink, Sink::Data(_)) => {
                let len = len.checked_sub(8).filter(|len| *len > 0).ok_or_else(wrong)?;
                let at = read::<U64>(receive)?.get();
                let part = self.part(at, len).ok_or_else(wrong)?;
                Ok(receive.read_exact(part)?)
            }
            chunk::OFFSET_HOLE if matches!(self.sink, Sink::Data(_)) && len == size_of::<Hole>() as u64 => {
                let hole: Hole = read(receive)?;
                let part = self.part(hole.offset.get(), hole.len.get().into()).ok_or_else(wrong)?;
                part.fill(0);
                Ok(())
            }
            chunk::BLOCK_STATUS if !export.extended => self.take_status::<Status>(len, 4, receive, export),
            chunk::BLOCK_STATUS_EXT if export.extended => self.take_status::<ExtendedStatus>(len, 8, receive, export),
            kind if kind & chunk::ERROR != 0 => {
                let len = len.checked_sub(size_of::<ErrorPayload>() as u64).filter(|len| *len <= LONGEST_ERROR);
                let len = len.ok_or_else(wrong)?;
                let payload: ErrorPayload = read(receive)?;
                if u64::from(payload.len.get()) > len {
                    return Err(wrong());
                }
                // The message, and perhaps where it was. The number says what the caller can act on.
                io::copy(&mut receive.take(len), &mut io::sink())?;
                self.error.get_or_insert(errno(payload.error.get()));
                Ok(())
            }
            _ => Err(wrong()),
        }
    }

    /// The part of the buffer that starts at that offset of the export, if it was asked for and has not come before.
    fn part(&mut self, at: u64, len: u64) -> Option<&mut [u8]> {
        let start = at.checked_sub(self.at)?;
        let end = start.checked_add(len).filter(|end| *end <= self.len)?;
        if start == self.filled && self.apart.is_empty() {
            self.filled = end;
        } else {
            // Kept in order; what overlaps is refused.
            let next = self.apart.partition_point(|(other, _)| *other < start);
            let before = next.checked_sub(1).and_then(|before| self.apart.get(before)).map_or(self.filled, |run| run.1);
            let after = self.apart.get(next).map_or(self.len, |run| run.0);
            if len == 0 || start < before || end > after || self.apart.len() >= MOST_APART {
                return None;
            }
            self.apart.insert(next, (start, end));
            let joined = self.apart.iter().take_while(|(start, end)| {
                let joins = *start == self.filled;
                if joins {
                    self.filled = *end;
                }
                joins
            });
            let joined = joined.count();
            self.apart.drain(..joined);
        }
        let Sink::Data(buf) = &mut self.sink else { return None };
        buf.get_mut(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }

    /// Runs of the context, behind `fixed` bytes that begin with its number.
    fn take_status<T: FromBytes + IntoBytes + Run>(
        &mut self,
        len: u64,
        fixed: u64,
        receive: &mut ReceiveHalf,
        export: &Export,
    ) -> Result<(), Lost> {
        let each = size_of::<T>() as u64;
        let Sink::Status(runs) = &mut self.sink else {
            return Err(Lost::broken("the server sent block status that was not asked for"));
        };
        let bytes = len.checked_sub(fixed).filter(|bytes| bytes.is_multiple_of(each) && *bytes > 0);
        let count = bytes.map(|bytes| bytes / each).filter(|count| *count <= MOST_RUNS && runs.is_empty());
        let Some(count) = count else {
            return Err(Lost::broken(format!("the server sent block status of {len} bytes, which cannot be")));
        };
        let context = read::<U32>(receive)?.get();
        if fixed > 4 && u64::from(read::<U32>(receive)?.get()) != count {
            return Err(Lost::broken("the server sent block status of another length than it says"));
        }
        let known = export.context == Some(context);
        let mut covered: u64 = 0;
        for _ in 0..count {
            let (len, flags) = read::<T>(receive)?.of();
            covered = covered.checked_add(len).filter(|_| len > 0).unwrap_or(u64::MAX);
            if covered == u64::MAX {
                return Err(Lost::broken("the server sent block status of no length"));
            }
            match runs.last_mut() {
                Some((last, same)) if *same == flags => *last += len,
                _ => runs.push((len, flags)),
            }
        }
        if known { Ok(()) } else { Err(Lost::broken("the server sent block status of another context")) }
    }

    /// What has come of it, after the last chunk: the server's error, if it has one.
    pub fn finish(self) -> Result<Result<(), Errno>, Lost> {
        if let Some(error) = self.error {
            return Ok(Err(error));
        }
        match self.sink {
            Sink::Data(_) if self.filled < self.len => {
                let (filled, len) = (self.filled, self.len);
                Err(Lost::broken(format!("the server sent {filled} bytes where {len} were asked for")))
            }
            Sink::Status(runs) if runs.is_empty() => Err(Lost::broken("the server sent no block status")),
            _ => Ok(Ok(())),
        }
    }
}

/// The most pieces of a reply that wait for those before them.
const MOST_APART: usize = 4096;

/// A run as it is on the wire.
trait Run {
    fn of(&self) -> StatusRun;
}

impl Run for Status {
    fn of(&self) -> StatusRun {
        (self.len.get().into(), self.flags.get().into())
    }
}

impl Run for ExtendedStatus {
    fn of(&self) -> StatusRun {
        (self.len.get(), self.flags.get())
    }
}

fn read<T: FromBytes + IntoBytes>(receive: &mut ReceiveHalf) -> io::Result<T> {
    let mut value = T::new_zeroed();
    receive.read_exact(value.as_mut_bytes())?;
    Ok(value)
}

/// The host's number of an error ("Error values"); what is not known is no better than `EINVAL`.
fn errno(number: u32) -> Errno {
    match number {
        error::EPERM => Errno::EPERM,
        error::EIO => Errno::EIO,
        error::ENOMEM => Errno::ENOMEM,
        error::ENOSPC => Errno::ENOSPC,
        error::EOVERFLOW => Errno::EOVERFLOW,
        error::ENOTSUP => Errno::ENOTSUP,
        error::ESHUTDOWN => Errno::ESHUTDOWN,
        _ => Errno::EINVAL,
    }
}
