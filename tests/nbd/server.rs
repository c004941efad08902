//! A small server of the network block device protocol (doc/proto.md), and of what it forbids.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What it does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// A greeting that is none.
    Greeting,
    /// Ends in the middle of the greeting.
    ShortGreeting,
    /// A reply to an option that was not sent.
    OptionReply,
    /// A reply to an option that is gigabytes long.
    LongOptionReply,
    /// Contexts without an end.
    Contexts,
    /// Information without an end.
    Information,
    /// The export is not there, and others without an end are.
    Exports,
    /// An export that is longer than a file can be.
    Size,
    /// Blocks of three bytes.
    Blocks,
    /// Replies with another magic number.
    Magic,
    /// Replies to a request that was not sent.
    Cookie,
    /// A simple reply to a read.
    Simple,
    /// A chunk that is longer than what was asked for.
    LongChunk,
    /// A chunk of data before what was asked for.
    OtherPlace,
    /// The same data twice.
    Twice,
    /// Less data than was asked for, and no more to come.
    Less,
    /// A chunk of another type.
    Type,
    /// An empty chunk, and more to come, without an end.
    Empty,
    /// Ends in the middle of the data.
    ShortData,
    /// Block status that is gigabytes long.
    LongStatus,
    /// Block status of no length.
    NoStatus,
    /// Block status of another context.
    Context,
    /// An error with a message longer than itself.
    Message,
}

/// All of it.
pub const WRONG: &[Wrong] = &[
    Wrong::Greeting,
    Wrong::ShortGreeting,
    Wrong::OptionReply,
    Wrong::LongOptionReply,
    Wrong::Contexts,
    Wrong::Information,
    Wrong::Exports,
    Wrong::Size,
    Wrong::Blocks,
    Wrong::Magic,
    Wrong::Cookie,
    Wrong::Simple,
    Wrong::LongChunk,
    Wrong::OtherPlace,
    Wrong::Twice,
    Wrong::Less,
    Wrong::Type,
    Wrong::Empty,
    Wrong::ShortData,
    Wrong::LongStatus,
    Wrong::NoStatus,
    Wrong::Context,
    Wrong::Message,
];

/// How it behaves.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    /// What it does wrong.
    pub wrong: Option<Wrong>,
    /// It knows simple replies alone.
    pub simple: bool,
    /// Reads wait for so many of them, and are answered in the opposite order.
    pub together: usize,
    /// It takes several connections.
    pub several: bool,
    /// It ends the connection in place of the reply after so many.
    pub last_after: Option<usize>,
    /// And is there again for another one.
    pub comes_back: bool,
}

impl Manner {
    /// Nothing wrong.
    pub const GOOD: Manner =
        Manner { wrong: None, simple: false, together: 1, several: false, last_after: None, comes_back: false };
}

/// A server that runs until it is dropped.
pub struct Server {
    socket: PathBuf,
    stop: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves those bytes on that socket.
    pub fn start(socket: &Path, bytes: &[u8], manner: Manner) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (stop, connections) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let thread = thread::spawn({
            let (stop, connections, bytes) = (stop.clone(), connections.clone(), Arc::new(bytes.to_vec()));
            move || {
                let mut clients = Vec::new();
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    let number = connections.fetch_add(1, Ordering::SeqCst);
                    if manner.last_after.is_some() && !manner.comes_back && number > 0 {
                        continue;
                    }
                    let bytes = bytes.clone();
                    // The client sees an error, or that there is no more.
                    clients.push(thread::spawn(move || drop(Client::new(stream.unwrap(), manner, bytes).serve())));
                }
                clients.into_iter().for_each(|client| client.join().unwrap());
            }
        });
        Self { socket: socket.to_owned(), stop, connections, thread: Some(thread) }
    }

    /// How many there have been.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        drop(UnixStream::connect(&self.socket));
        drop(self.thread.take().map(JoinHandle::join));
        drop(std::fs::remove_file(&self.socket));
    }
}

struct Client {
    stream: UnixStream,
    manner: Manner,
    bytes: Arc<Vec<u8>>,
    structured: bool,
    replies: usize,
}

/// A read that waits: cookie, offset, length.
type Waiting = (u64, u64, u32);

fn ended() -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

impl Client {
    fn new(stream: UnixStream, manner: Manner, bytes: Arc<Vec<u8>>) -> Self {
        // A client that hangs is no reason to.
        stream.set_read_timeout(Some(Duration::from_secs(600))).unwrap();
        Self { stream, manner, bytes, structured: false, replies: 0 }
    }

    fn is(&self, wrong: Wrong) -> bool {
        self.manner.wrong == Some(wrong)
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn serve(mut self) -> io::Result<()> {
        if self.is(Wrong::Greeting) {
            return self.stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
        self.stream.write_all(b"NBDMAGICIHAV")?;
        if self.is(Wrong::ShortGreeting) {
            return Err(ended());
        }
        self.stream.write_all(b"EOPT\0\x03")?;
        self.take::<4>()?;
        while !self.option()? {}
        let mut waiting = Vec::new();
        while self.request(&mut waiting)? {}
        Ok(())
    }

    fn option_reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let option = if self.is(Wrong::OptionReply) { 99 } else { option };
        let len = if self.is(Wrong::LongOptionReply) { u32::MAX } else { data.len() as u32 };
        let mut reply = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        for number in [option, kind, len] {
            reply.extend(number.to_be_bytes());
        }
        reply.extend(data);
        self.stream.write_all(&reply)
    }

    /// Answers an option: whether it was the last one.
    fn option(&mut self) -> io::Result<bool> {
        const ACK: u32 = 1;
        const UNSUPPORTED: u32 = 1 << 31 | 1;
        self.take::<8>()?;
        let option = u32::from_be_bytes(self.take()?);
        let mut data = vec![0; u32::from_be_bytes(self.take()?) as usize];
        self.stream.read_exact(&mut data)?;
        match option {
            8 if !self.manner.simple => {
                self.structured = true;
                self.option_reply(option, ACK, &[])?;
            }
            10 => {
                let context = [&7_u32.to_be_bytes()[..], b"base:allocation"].concat();
                while self.is(Wrong::Contexts) {
                    self.option_reply(option, 4, &[])?;
                }
                self.option_reply(option, 4, &context)?;
                self.option_reply(option, ACK, &[])?;
            }
            3 => {
                while self.is(Wrong::Exports) {
                    self.option_reply(option, 2, &[&[255; 4][..], &[9; 4000]].concat())?;
                }
                self.option_reply(option, UNSUPPORTED, &[])?;
            }
            7 if self.is(Wrong::Exports) => self.option_reply(option, 1 << 31 | 6, &[])?,
            7 => {
                let size = if self.is(Wrong::Size) { u64::MAX } else { self.bytes.len() as u64 };
                let flags: u16 = 1 | if self.manner.several { 1 << 8 } else { 0 };
                let export = [&[0; 2][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
                self.option_reply(option, 3, &export)?;
                let least: u32 = if self.is(Wrong::Blocks) { 3 } else { 1 };
                let blocks = [least, 4096, 32 << 20].map(u32::to_be_bytes).concat();
                self.option_reply(option, 3, &[&3_u16.to_be_bytes()[..], &blocks].concat())?;
                while self.is(Wrong::Information) {
                    self.option_reply(option, 3, &[0, 9])?;
                }
                self.option_reply(option, ACK, &[])?;
                return Ok(true);
            }
            _ => self.option_reply(option, UNSUPPORTED, &[])?,
        }
        Ok(false)
    }

    /// Takes a request, and answers what can be: whether there may be more.
    fn request(&mut self, waiting: &mut Vec<Waiting>) -> io::Result<bool> {
        self.take::<6>()?;
        let command = u16::from_be_bytes(self.take()?);
        let cookie = u64::from_be_bytes(self.take()?);
        let at = u64::from_be_bytes(self.take()?);
        let len = u32::from_be_bytes(self.take()?);
        match command {
            0 => {
                waiting.push((cookie, at, len));
                if waiting.len() >= self.manner.together {
                    while let Some(read) = waiting.pop() {
                        self.answer_read(read)?;
                    }
                }
            }
            2 => return Ok(false),
            7 => self.answer_status(cookie, len)?,
            _ => self.chunk(cookie, 1 << 15 | 1, &[0, 0, 0, 22, 0, 0])?,
        }
        Ok(true)
    }

    fn may_answer(&mut self) -> io::Result<()> {
        if self.manner.last_after.is_some_and(|last| self.replies >= last) {
            return Err(ended());
        }
        self.replies += 1;
        Ok(())
    }

    fn answer_read(&mut self, (cookie, at, len): Waiting) -> io::Result<()> {
        self.may_answer()?;
        let data = self.bytes[at as usize..][..len as usize].to_vec();
        let place = |at: u64, data: &[u8]| [&at.to_be_bytes()[..], data].concat();
        if !self.structured || self.is(Wrong::Simple) {
            let head = [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat();
            self.stream.write_all(&head)?;
            return self.stream.write_all(&data);
        }
        const DATA: u16 = 1;
        let (first, second) = data.split_at(data.len() / 2);
        let middle = at + first.len() as u64;
        match self.manner.wrong {
            Some(Wrong::LongChunk) => self.chunk(cookie, DATA, &place(at, &[&data[..], &[0]].concat())),
            Some(Wrong::OtherPlace) => self.chunk(cookie, DATA, &place(at.wrapping_sub(512), &data)),
            Some(Wrong::Twice) => {
                self.part(cookie, DATA, &place(at, first))?;
                self.chunk(cookie, DATA, &place(at, first))
            }
            Some(Wrong::Less) => self.chunk(cookie, DATA, &place(middle, second)),
            Some(Wrong::Type) => self.chunk(cookie, 4, &place(at, &data)),
            Some(Wrong::Empty) => loop {
                self.part(cookie, 0, &[])?;
            },
            Some(Wrong::ShortData) => {
                let whole = place(at, &data);
                self.head(cookie, 1, DATA, whole.len() as u32)?;
                self.stream.write_all(&whole[..whole.len() / 2])?;
                Err(ended())
            }
            Some(Wrong::Message) => self.chunk(cookie, 1 << 15 | 1, &[0, 0, 0, 5, 255, 255, 0]),
            // In two parts, the second one first.
            _ => {
                self.part(cookie, DATA, &place(middle, second))?;
                self.chunk(cookie, DATA, &place(at, first))
            }
        }
    }

    fn answer_status(&mut self, cookie: u64, len: u32) -> io::Result<()> {
        let context: u32 = if self.is(Wrong::Context) { 8 } else { 7 };
        let len = if self.is(Wrong::NoStatus) { 0 } else { len };
        let status = [context, len, 0].map(u32::to_be_bytes).concat();
        if self.is(Wrong::LongStatus) {
            self.head(cookie, 1, 5, 0xffff_fffc)?;
            let part = vec![1; 1 << 20];
            loop {
                self.stream.write_all(&part)?;
            }
        }
        self.chunk(cookie, 5, &status)
    }

    /// A chunk that is the last one.
    fn chunk(&mut self, cookie: u64, kind: u16, payload: &[u8]) -> io::Result<()> {
        self.head(cookie, 1, kind, payload.len() as u32)?;
        self.stream.write_all(payload)
    }

    /// Another one.
    fn part(&mut self, cookie: u64, kind: u16, payload: &[u8]) -> io::Result<()> {
        self.head(cookie, 0, kind, payload.len() as u32)?;
        self.stream.write_all(payload)
    }

    fn head(&mut self, cookie: u64, flags: u16, kind: u16, len: u32) -> io::Result<()> {
        let magic: u32 = if self.is(Wrong::Magic) { 0x1234_5678 } else { 0x668e_33ef };
        let cookie = if self.is(Wrong::Cookie) { cookie ^ 0x8000_0000 } else { cookie };
        let mut head = magic.to_be_bytes().to_vec();
        head.extend(flags.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(len.to_be_bytes());
        self.stream.write_all(&head)
    }
}
