//! A server of HTTP that is far away: each answer begins 20 ms after its request. It counts the bytes that it sends, and
//! leaves the copying to the kernel, so that it takes little of the processors that are not its own.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::sendfile::sendfile64;

const DELAY: Duration = Duration::from_millis(20);

/// What is sent at once at most.
const PIECE: usize = 1 << 20;

static SENT: AtomicU64 = AtomicU64::new(0);
static PORT: OnceLock<u16> = OnceLock::new();

/// Where the files of `dir` are. It is always the same folder.
pub fn url(dir: &Path) -> String {
    let port = PORT.get_or_init(|| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its number").port();
        let dir = dir.to_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let dir = dir.clone();
                std::thread::spawn(move || drop(serve(stream, &dir)));
            }
        });
        port
    });
    format!("http://127.0.0.1:{port}")
}

/// Bytes of files that were sent since the last call.
pub fn take_sent() -> u64 {
    SENT.swap(0, Ordering::SeqCst)
}

fn serve(stream: TcpStream, dir: &Path) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut lines, mut out) = (BufReader::new(stream.try_clone()?), stream);
    loop {
        let (mut first, mut range) = (String::new(), None);
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some((from, to)) = line.strip_prefix("range: bytes=").and_then(|range| range.split_once('-')) {
                range = from.parse::<u64>().ok().map(|from| (from, to.parse().unwrap_or(u64::MAX)));
            }
            match line.is_empty() {
                true => break,
                false if first.is_empty() => first = line,
                false => {}
            }
        }
        std::thread::sleep(DELAY);
        let file = File::open(dir.join(first.split(' ').nth(1).unwrap_or_default().trim_start_matches('/')))?;
        let len = file.metadata()?.len();
        let (from, to) = range.unwrap_or((0, u64::MAX));
        let to = to.min(len - 1);
        let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
        write!(
            out,
            "HTTP/1.1 {status}\r\nAccept-Ranges: bytes\r\nContent-Range: bytes {from}-{to}/{len}\r\nContent-Length: {}\r\n\r\n",
            to + 1 - from
        )?;
        let mut at = from;
        while first.starts_with("get") && at <= to {
            let mut from = at as i64;
            let n = sendfile64(&out, &file, Some(&mut from), PIECE.min((to + 1 - at) as usize))?;
            SENT.fetch_add(n as u64, Ordering::SeqCst);
            at += n as u64;
        }
    }
}
