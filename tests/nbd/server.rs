//! A small server of the network block device protocol (doc/proto.md), and of what it forbids.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::wrong::Wrong;

/// How it behaves.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    /// What it does wrong.
    pub wrong: Option<Wrong>,
    /// It knows simple replies alone.
    pub simple: bool,
    /// It knows extended headers.
    pub extended: bool,
    /// Bytes of the export, if that is longer than its data.
    pub size: Option<u64>,
    /// Reads wait for so many of them, and are answered in the opposite order.
    pub together: usize,
    /// It takes several connections.
    pub several: bool,
    /// Each read takes so long.
    pub delay: Duration,
    /// It ends the connection in place of the reply after so many.
    pub last_after: Option<usize>,
    /// And is there again for another one.
    pub comes_back: bool,
}

impl Manner {
    /// Nothing wrong.
    pub const GOOD: Manner = Manner {
        wrong: None,
        simple: false,
        extended: false,
        size: None,
        together: 1,
        several: false,
        delay: Duration::ZERO,
        last_after: None,
        comes_back: false,
    };
}

/// What all connections see.
#[derive(Default)]
struct Shared {
    bytes: Mutex<Vec<u8>>,
    /// Requests by their commands.
    asked: Mutex<HashMap<u16, usize>>,
}

/// A server that runs until it is dropped.
pub struct Server {
    socket: PathBuf,
    stop: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves those bytes on that socket.
    pub fn start(socket: &Path, bytes: &[u8], manner: Manner) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (stop, connections) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let shared = Arc::new(Shared { bytes: Mutex::new(bytes.to_vec()), ..Shared::default() });
        let thread = thread::spawn({
            let (stop, connections, shared) = (stop.clone(), connections.clone(), shared.clone());
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
                    let shared = shared.clone();
                    // The client sees an error, or that there is no more.
                    clients.push(thread::spawn(move || drop(Client::new(stream.unwrap(), manner, shared).serve())));
                }
                clients.into_iter().for_each(|client| client.join().unwrap());
            }
        });
        Self { socket: socket.to_owned(), stop, connections, shared, thread: Some(thread) }
    }

    /// How many there have been.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// What it has now.
    pub fn bytes(&self) -> Vec<u8> {
        self.shared.bytes.lock().unwrap().clone()
    }

    /// How often a command was sent.
    pub fn asked(&self, command: u16) -> usize {
        self.shared.asked.lock().unwrap().get(&command).copied().unwrap_or(0)
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
    shared: Arc<Shared>,
    structured: bool,
    extended: bool,
    replies: usize,
}

/// A request, or one that waits.
#[derive(Clone, Copy)]
struct Asked {
    cookie: u64,
    at: u64,
    len: u64,
}

const FAILED: u16 = 1 << 15 | 1;

fn ended() -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

impl Client {
    fn new(stream: UnixStream, manner: Manner, shared: Arc<Shared>) -> Self {
        // A client that hangs is no reason to.
        stream.set_read_timeout(Some(Duration::from_secs(600))).unwrap();
        Self { stream, manner, shared, structured: false, extended: false, replies: 0 }
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
            11 if self.manner.extended => {
                (self.structured, self.extended) = (true, true);
                self.option_reply(option, ACK, &[])?;
            }
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
                let size = if self.is(Wrong::Size) { u64::MAX } else { self.size() };
                // It flushes, and makes zeros.
                let flags: u16 = 1 | 1 << 2 | 1 << 6 | if self.manner.several { 1 << 8 } else { 0 };
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

    fn size(&self) -> u64 {
        self.manner.size.unwrap_or_else(|| self.shared.bytes.lock().unwrap().len() as u64)
    }

    /// Takes a request, and answers what can be: whether there may be more.
    fn request(&mut self, waiting: &mut Vec<Asked>) -> io::Result<bool> {
        let magic = u32::from_be_bytes(self.take()?);
        assert_eq!(magic, if self.extended { 0x21e4_1c71 } else { 0x2560_9513 });
        let flags = u16::from_be_bytes(self.take()?);
        let command = u16::from_be_bytes(self.take()?);
        let cookie = u64::from_be_bytes(self.take()?);
        let at = u64::from_be_bytes(self.take()?);
        let len = match self.extended {
            true => u64::from_be_bytes(self.take()?),
            false => u32::from_be_bytes(self.take()?).into(),
        };
        let asked = Asked { cookie, at, len };
        *self.shared.asked.lock().unwrap().entry(command).or_default() += 1;
        // With extended headers the flag says what a length is of.
        assert_eq!(flags & 1 << 5 != 0, self.extended && command == 1);
        match command {
            0 => {
                waiting.push(asked);
                if waiting.len() >= self.manner.together {
                    while let Some(read) = waiting.pop() {
                        self.answer_read(read)?;
                    }
                }
            }
            1 | 6 => {
                let mut data = vec![0; len as usize];
                if command == 1 {
                    self.stream.read_exact(&mut data)?;
                }
                self.may_answer()?;
                if self.is(Wrong::Refuses) {
                    return self.refuse(asked, 28).map(|()| true);
                }
                self.shared.bytes.lock().unwrap()[at as usize..][..len as usize].copy_from_slice(&data);
                self.done(asked)?;
            }
            2 => return Ok(false),
            3 => self.done(asked)?,
            7 => self.answer_status(asked)?,
            _ => self.refuse(asked, 22)?,
        }
        Ok(true)
    }

    fn done(&mut self, asked: Asked) -> io::Result<()> {
        match self.structured {
            true => self.chunk(asked, 0, &[]),
            false => self.simple(asked, 0),
        }
    }

    fn simple(&mut self, asked: Asked, error: u32) -> io::Result<()> {
        let head = [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &asked.cookie.to_be_bytes()].concat();
        self.stream.write_all(&head)
    }

    fn refuse(&mut self, asked: Asked, error: u32) -> io::Result<()> {
        if !self.structured {
            return self.simple(asked, error);
        }
        let message = "not today";
        let payload = [&error.to_be_bytes()[..], &(message.len() as u16).to_be_bytes(), message.as_bytes()].concat();
        // Where it was, and without.
        match asked.cookie % 2 {
            0 => self.chunk(asked, FAILED, &payload),
            _ => self.chunk(asked, FAILED + 1, &[&payload[..], &asked.at.to_be_bytes()].concat()),
        }
    }

    fn may_answer(&mut self) -> io::Result<()> {
        if self.manner.last_after.is_some_and(|last| self.replies >= last) {
            return Err(ended());
        }
        self.replies += 1;
        Ok(())
    }

    fn answer_read(&mut self, asked: Asked) -> io::Result<()> {
        self.may_answer()?;
        thread::sleep(self.manner.delay);
        let Asked { at, len, .. } = asked;
        let mut data = vec![0; len as usize];
        {
            let bytes = self.shared.bytes.lock().unwrap();
            let there = bytes.get(at as usize..).unwrap_or_default();
            let there = &there[..there.len().min(data.len())];
            data[..there.len()].copy_from_slice(there);
        }
        let place = |at: u64, data: &[u8]| [&at.to_be_bytes()[..], data].concat();
        if !self.structured || self.is(Wrong::Simple) {
            self.simple(asked, 0)?;
            return self.stream.write_all(&data);
        }
        const DATA: u16 = 1;
        let (first, second) = data.split_at(data.len() / 2);
        let middle = at + first.len() as u64;
        match self.manner.wrong {
            Some(Wrong::LongChunk) => self.chunk(asked, DATA, &place(at, &[&data[..], &[0]].concat())),
            Some(Wrong::OtherPlace) => self.chunk(asked, DATA, &place(at.wrapping_sub(512), &data)),
            Some(Wrong::Twice) => {
                self.part(asked, DATA, &place(at, first))?;
                self.chunk(asked, DATA, &place(at, first))
            }
            Some(Wrong::Less) => self.chunk(asked, DATA, &place(middle, second)),
            Some(Wrong::Type) => self.chunk(asked, 4, &place(at, &data)),
            Some(Wrong::Empty) => loop {
                self.part(asked, 0, &[])?;
            },
            Some(Wrong::ShortData) => {
                let whole = place(at, &data);
                self.head(asked, 1, DATA, whole.len() as u64)?;
                self.stream.write_all(&whole[..whole.len() / 2])?;
                Err(ended())
            }
            Some(Wrong::Message) => self.chunk(asked, FAILED, &[0, 0, 0, 5, 255, 255, 0]),
            Some(Wrong::Refuses) => self.refuse(asked, 5),
            Some(Wrong::HugeChunk) => {
                self.head(asked, 1, DATA, 1 << 60 | data.len() as u64)?;
                self.stream.write_all(&place(at, &data))
            }
            // In two parts, the second one first.
            _ => {
                self.part(asked, DATA, &place(middle, second))?;
                self.chunk(asked, DATA, &place(at, first))
            }
        }
    }

    fn answer_status(&mut self, asked: Asked) -> io::Result<()> {
        let context: u32 = if self.is(Wrong::Context) { 8 } else { 7 };
        if self.is(Wrong::LongStatus) {
            self.head(asked, 1, if self.extended { 6 } else { 5 }, 0xffff_fffc)?;
            let part = vec![1; 1 << 20];
            loop {
                self.stream.write_all(&part)?;
            }
        }
        // What has no bytes is a hole.
        let stored = (self.shared.bytes.lock().unwrap().len() as u64).saturating_sub(asked.at).min(asked.len);
        let runs = match self.is(Wrong::NoStatus) {
            true => vec![(0, 0)],
            false => [(stored, 0), (asked.len - stored, 3)].into_iter().filter(|(len, _)| *len > 0).collect(),
        };
        let mut status = context.to_be_bytes().to_vec();
        if !self.extended || self.is(Wrong::OldStatus) {
            runs.iter().for_each(|(len, flags)| status.extend([*len as u32, *flags].map(u32::to_be_bytes).concat()));
            return self.chunk(asked, 5, &status);
        }
        let count = runs.len() as u32 + u32::from(self.is(Wrong::Count));
        status.extend(count.to_be_bytes());
        runs.iter().for_each(|(len, flags)| status.extend([*len, (*flags).into()].map(u64::to_be_bytes).concat()));
        self.chunk(asked, 6, &status)
    }

    /// A chunk that is the last one.
    fn chunk(&mut self, asked: Asked, kind: u16, payload: &[u8]) -> io::Result<()> {
        self.head(asked, 1, kind, payload.len() as u64)?;
        self.stream.write_all(payload)
    }

    /// Another one.
    fn part(&mut self, asked: Asked, kind: u16, payload: &[u8]) -> io::Result<()> {
        self.head(asked, 0, kind, payload.len() as u64)?;
        self.stream.write_all(payload)
    }

    fn head(&mut self, asked: Asked, flags: u16, kind: u16, len: u64) -> io::Result<()> {
        let extended = self.extended && !self.is(Wrong::OldHeader);
        let magic: u32 = match (self.is(Wrong::Magic), extended) {
            (true, _) => 0x1234_5678,
            (_, true) => 0x6e8a_278c,
            (_, false) => 0x668e_33ef,
        };
        let cookie = if self.is(Wrong::Cookie) { asked.cookie ^ 0x8000_0000 } else { asked.cookie };
        let at = if self.is(Wrong::Offset) { asked.at ^ 512 } else { asked.at };
        let mut head = magic.to_be_bytes().to_vec();
        head.extend(flags.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        match extended {
            true => head.extend([at, len].map(u64::to_be_bytes).concat()),
            false => head.extend((len as u32).to_be_bytes()),
        }
        self.stream.write_all(&head)
    }
}
