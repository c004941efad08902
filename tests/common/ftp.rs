//! A small server of FTP on the loopback interface, with one file, and ways to go wrong.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// What it does other than it should.
#[derive(Debug, Clone, Default)]
pub struct Quirks {
    /// Knows no `EPSV`.
    pub old: bool,
    /// Knows no `REST`.
    pub from_the_start: bool,
    /// Ends the n-th transfer after so many bytes.
    pub cut: Option<(usize, usize)>,
    /// Ends all of them so.
    pub cut_all: Option<usize>,
    /// From that transfer on the file is another one.
    pub changed: Option<usize>,
}

struct Shared {
    file: Vec<u8>,
    quirks: Quirks,
    tls: Option<Arc<ServerConfig>>,
    said: Mutex<Vec<String>>,
    transfers: AtomicUsize,
    closed: AtomicBool,
}

/// The server; it ends when it is dropped.
pub struct Ftp {
    port: u16,
    shared: Arc<Shared>,
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl Ftp {
    /// With that file, whatever its name, but for `none`.
    pub fn new(file: Vec<u8>, quirks: Quirks, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its number").port();
        let (said, transfers, closed) = (Mutex::default(), AtomicUsize::new(0), AtomicBool::new(false));
        let shared = Arc::new(Shared { file, quirks, tls, said, transfers, closed });
        let theirs = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if theirs.closed.load(Ordering::SeqCst) {
                    return;
                }
                let shared = theirs.clone();
                if let Ok(stream) = stream {
                    thread::spawn(move || drop(shared.serve(stream)));
                }
            }
        });
        Self { port, shared }
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// All commands so far.
    pub fn said(&self) -> Vec<String> {
        self.shared.said.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Drop for Ftp {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn wrap(&self, stream: TcpStream) -> Box<dyn Stream> {
        match &self.tls {
            Some(config) => Box::new(StreamOwned::new(ServerConnection::new(config.clone()).expect("TLS"), stream)),
            None => Box::new(stream),
        }
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut control = BufReader::new(self.wrap(stream));
        let mut say = String::from("220-Welcome\r\n220 to the test\r\n");
        let (mut from, mut user, mut listener) = (0, String::new(), None::<TcpListener>);
        loop {
            control.get_mut().write_all(say.as_bytes())?;
            control.get_mut().flush()?;
            let mut line = String::new();
            if control.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim_end().to_owned();
            self.said.lock().unwrap_or_else(|e| e.into_inner()).push(line.clone());
            let (verb, argument) = line.split_once(' ').unwrap_or((&line, ""));
            let begun = self.transfers.load(Ordering::SeqCst);
            let stamp = if self.quirks.changed.is_some_and(|n| begun >= n) { 2 } else { 1 };
            say = match verb {
                "USER" => {
                    user = argument.to_owned();
                    "331 Who says so?\r\n".to_owned()
                }
                "PASS" if user == "anonymous" || argument == "pw" => "230 Hello\r\n".to_owned(),
                "PASS" => "530 No\r\n".to_owned(),
                "SIZE" | "MDTM" | "RETR" if argument.ends_with("none") => "550 No such file\r\n".to_owned(),
                "SIZE" => format!("213 {}\r\n", self.file.len()),
                "MDTM" => format!("213 2026112710000{stamp}\r\n"),
                "EPSV" if self.quirks.old => "500 What?\r\n".to_owned(),
                "EPSV" | "PASV" => {
                    let data = TcpListener::bind("127.0.0.1:0")?;
                    let port = data.local_addr()?.port();
                    listener = Some(data);
                    match verb {
                        "EPSV" => format!("229 There (|||{port}|)\r\n"),
                        // Another host than its own: nobody is to go there.
                        _ => format!("227 There (192,0,2,1,{},{})\r\n", port >> 8, port & 255),
                    }
                }
                "REST" if self.quirks.from_the_start => "502 What?\r\n".to_owned(),
                "REST" => {
                    from = argument.parse().unwrap_or(0);
                    "350 From there\r\n".to_owned()
                }
                "RETR" => {
                    let Some(data) = listener.take() else { return Ok(()) };
                    let number = self.transfers.fetch_add(1, Ordering::SeqCst);
                    let (stream, _) = data.accept()?;
                    control.get_mut().write_all(b"150 Here it comes\r\n")?;
                    control.get_mut().flush()?;
                    let rest = &self.file[std::mem::take(&mut from)..];
                    let cut = self.quirks.cut.filter(|(n, _)| *n == number).map(|(_, len)| len);
                    let sent = &rest[..cut.or(self.quirks.cut_all).unwrap_or(rest.len()).min(rest.len())];
                    let mut data = self.wrap(stream);
                    let done = data.write_all(sent).and_then(|()| data.flush());
                    if done.is_ok() && sent.len() == rest.len() { "226 Done\r\n" } else { "426 Not done\r\n" }
                        .to_owned()
                }
                "TYPE" | "PBSZ" | "PROT" => "200 Well\r\n".to_owned(),
                _ => "500 What?\r\n".to_owned(),
            };
        }
    }
}
