//! A small server of TFTP on the loopback interface, with one file, and ways to go wrong.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// What it does other than it should.
#[derive(Debug, Clone, Default)]
pub struct Quirks {
    /// Knows no options.
    pub old: bool,
    /// Sends every block twice.
    pub twice: bool,
    /// Does not hear every n-th acknowledgement at first.
    pub deaf: Option<usize>,
    /// Ends with an error behind so many blocks.
    pub fails_at: Option<usize>,
    /// Says that the file is so much longer than it is.
    pub lies: u64,
}

/// The server; it ends when it is dropped.
pub struct Tftp {
    port: u16,
    closed: Arc<AtomicBool>,
}

impl Tftp {
    /// With that file, whatever its name, but for `none`.
    pub fn new(file: Vec<u8>, quirks: Quirks) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let port = socket.local_addr().expect("its number").port();
        let closed = Arc::new(AtomicBool::new(false));
        let (end, file) = (closed.clone(), Arc::new(file));
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                if end.load(Ordering::SeqCst) {
                    return;
                }
                let (file, quirks, request) = (file.clone(), quirks.clone(), buffer[..len].to_vec());
                thread::spawn(move || drop(serve(&request, from, &file, &quirks)));
            }
        });
        Self { port, closed }
    }

    /// The URL of a file.
    pub fn url(&self, name: &str) -> String {
        format!("tftp://127.0.0.1:{}/{name}", self.port)
    }
}

impl Drop for Tftp {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::SeqCst);
        if let Ok(socket) = UdpSocket::bind("127.0.0.1:0") {
            let _ = socket.send_to(&[0], ("127.0.0.1", self.port));
        }
    }
}

fn serve(request: &[u8], to: SocketAddr, file: &[u8], quirks: &Quirks) -> std::io::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(to)?;
    // A watchdog: whoever asked is gone.
    socket.set_read_timeout(Some(Duration::from_secs(120)))?;
    let words: Vec<String> =
        request[2..].split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    if words[0].ends_with("none") {
        socket.send(b"\0\x05\0\x01No such file\0")?;
        return Ok(());
    }
    let option = |name: &str| words.iter().position(|word| word == name).and_then(|at| words[at + 1].parse().ok());
    let len: usize = option("blksize").filter(|_| !quirks.old).unwrap_or(512);
    let mut heard = 0;
    let mut hears = |block: u16| -> std::io::Result<()> {
        let mut buffer = [0; 2048];
        loop {
            let n = socket.recv(&mut buffer)?;
            if buffer[..n] != [0, 4, (block >> 8) as u8, block as u8] {
                continue;
            }
            heard += 1;
            if quirks.deaf.is_none_or(|every| heard % every != 0) {
                return Ok(());
            }
        }
    };
    if !quirks.old {
        socket.send(format!("\0\x06blksize\0{len}\0tsize\0{}\0", file.len() as u64 + quirks.lies).as_bytes())?;
        hears(0)?;
    }
    let mut blocks: Vec<&[u8]> = file.chunks(len).collect();
    if file.len().is_multiple_of(len) {
        blocks.push(&[]);
    }
    for (n, block) in blocks.iter().enumerate() {
        if quirks.fails_at == Some(n) {
            socket.send(b"\0\x05\0\0The disk is gone\0")?;
            return Ok(());
        }
        let number = (n + 1) as u16;
        let packet = [&[0, 3], &number.to_be_bytes()[..], block].concat();
        for _ in 0..=usize::from(quirks.twice) {
            socket.send(&packet)?;
        }
        hears(number)?;
    }
    Ok(())
}
