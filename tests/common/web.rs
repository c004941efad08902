//! A small server of HTTP on the loopback interface, which does as it is told: ranges, and every way to get them wrong.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// What was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// How many requests came before it.
    pub number: usize,
    /// Its first line.
    pub line: String,
    /// The path and query.
    pub path: String,
    /// The range, the last byte included.
    pub range: Option<(u64, u64)>,
    /// The headers, as they came.
    pub headers: Vec<String>,
    /// What came along.
    pub body: Vec<u8>,
}

impl Request {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The number, such as 206.
    pub status: u16,
    /// Names and values. The length of the body is added.
    pub headers: Vec<(&'static str, String)>,
    /// All of the body that is promised.
    pub body: Vec<u8>,
    /// So much of it is sent, and then the connection ends.
    pub cut: Option<usize>,
}

impl Reply {
    /// With nothing in it.
    pub fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), cut: None }
    }

    /// It is elsewhere.
    pub fn elsewhere(location: impl Into<String>) -> Self {
        Self::empty(302).with("Location", location)
    }

    /// The range of a file that was asked for.
    pub fn part(file: &[u8], request: &Request) -> Self {
        let Some((from, to)) = request.range else { return Self::whole(file) };
        let len = file.len() as u64;
        if from >= len {
            return Self::empty(416).with("Content-Range", format!("bytes */{len}"));
        }
        let to = to.min(len - 1);
        let body = file[from as usize..=to as usize].to_vec();
        Self { body, ..Self::empty(206) }.with("Content-Range", format!("bytes {from}-{to}/{len}"))
    }

    /// All of a file.
    pub fn whole(file: &[u8]) -> Self {
        Self { body: file.to_vec(), ..Self::empty(200) }
    }

    /// With that header, in place of one of that name.
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.retain(|(key, _)| *key != name);
        self.headers.push((name, value.into()));
        self
    }

    /// With a body that ends too early.
    pub fn cut(self, sent: usize) -> Self {
        Self { cut: Some(sent), ..self }
    }
}

/// What is known of the requests.
#[derive(Debug, Default)]
struct Seen {
    requests: Mutex<Vec<Request>>,
    sent: AtomicU64,
    closed: AtomicBool,
}

/// The server; it ends when it is dropped.
pub struct Web {
    port: u16,
    seen: Arc<Seen>,
}

type Answering = dyn Fn(&Request) -> Reply + Send + Sync;

impl Web {
    /// A server that answers so.
    pub fn new(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its number").port();
        let seen = Arc::new(Seen::default());
        let (shared, answer): (_, Arc<Answering>) = (seen.clone(), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.closed.load(Ordering::SeqCst) {
                    return;
                }
                let (seen, answer) = (shared.clone(), answer.clone());
                if let Ok(stream) = stream {
                    thread::spawn(move || drop(serve(stream, &seen, &*answer)));
                }
            }
        });
        Self { port, seen }
    }

    /// A server that gives ranges of one file, whatever its name.
    pub fn of(file: Vec<u8>) -> Self {
        Self::new(move |request| Reply::part(&file, request).with("ETag", "\"1\""))
    }

    /// The URL of a file.
    pub fn url(&self, name: &str) -> String {
        format!("http://127.0.0.1:{}/{name}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.seen.requests.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Bytes of files that were sent.
    pub fn sent(&self) -> u64 {
        self.seen.sent.load(Ordering::SeqCst)
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.seen.closed.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(stream: TcpStream, seen: &Seen, answer: &Answering) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut out = stream;
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line)? == 0 {
                return Ok(());
            }
            match line.trim_end() {
                "" => break,
                line => head.push(line.to_owned()),
            }
        }
        let line = head.remove(0);
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let range = head.iter().find_map(|line| {
            let line = line.to_ascii_lowercase();
            let (from, to) = line.strip_prefix("range: bytes=")?.split_once('-')?;
            Some((from.parse().ok()?, to.parse().unwrap_or(u64::MAX)))
        });
        let len = head.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case("Content-Length").then(|| value.trim().parse().ok())?
        });
        let mut body = vec![0; len.unwrap_or(0)];
        lines.read_exact(&mut body)?;
        let request = {
            let mut requests = seen.requests.lock().unwrap_or_else(|e| e.into_inner());
            let request = Request { number: requests.len(), line, path, range, headers: head, body };
            // What was sent is looked at by whoever answers.
            requests.push(Request { body: Vec::new(), ..request.clone() });
            request
        };
        if request.line.starts_with("CONNECT ") {
            return tunnel(&request.path, lines, out);
        }
        let reply = answer(&request);
        let mut text = format!("HTTP/1.1 {} Told\r\nContent-Length: {}\r\n", reply.status, reply.body.len());
        for (name, value) in &reply.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        out.write_all(format!("{text}\r\n").as_bytes())?;
        let body = &reply.body[..reply.cut.unwrap_or(usize::MAX).min(reply.body.len())];
        out.write_all(body)?;
        seen.sent.fetch_add(body.len() as u64, Ordering::SeqCst);
        if reply.cut.is_some() {
            return out.shutdown(Shutdown::Both);
        }
    }
}

/// What a proxy does for `CONNECT host:port`.
fn tunnel(to: &str, mut client: BufReader<TcpStream>, mut out: TcpStream) -> std::io::Result<()> {
    let mut server = TcpStream::connect(to)?;
    out.write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
    let mut back = server.try_clone()?;
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(n @ 1..) = back.read(&mut buffer) {
            if out.write_all(&buffer[..n]).is_err() {
                return;
            }
        }
        let _ = out.shutdown(Shutdown::Both);
    });
    std::io::copy(&mut client, &mut server)?;
    server.shutdown(Shutdown::Both)
}
