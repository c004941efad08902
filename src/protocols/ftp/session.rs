//! A connection with a server: commands, answers, and one transfer at a time.
//!
//! Invariant: no command has a line end in it but the last one (names come from URLs, which refuse them).

use std::io::{BufRead, BufReader, Read, Write};

use zeroize::Zeroizing;

use super::wire::{Dialer, Wire, broken};
use crate::protocols::url::Login;
use crate::protocols::url::again::Trouble;

/// The longest line of an answer, and the most lines of one.
const LONGEST_LINE: u64 = 4096;
const MOST_LINES: usize = 1000;

type Said<T> = std::result::Result<T, Trouble>;

/// See the module.
#[derive(Debug)]
pub struct Session {
    control: BufReader<Wire>,
    transfer: Option<Transfer>,
}

/// A file on its way.
#[derive(Debug)]
struct Transfer {
    data: Wire,
    /// Where in the file the next byte is.
    at: u64,
}

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileFacts {
    /// How long it is.
    pub len: u64,
    /// When it was changed last, where the server tells.
    changed: Option<String>,
}

/// An answer: its number, and its last line without that.
struct Answer {
    code: u16,
    text: String,
}

impl Answer {
    fn refused(&self) -> Trouble {
        let text = format!("the server says: {} {}", self.code, self.text);
        // RFC 959, section 4.2.1: 4xx may go better another time.
        if self.code / 100 == 4 { Trouble::passing(text) } else { Trouble::lasting(text) }
    }
}

impl Session {
    /// Connects and logs in.
    pub fn begin(dialer: &Dialer, login: &Login) -> Said<Self> {
        let mut session = Self { control: BufReader::new(dialer.control()?), transfer: None };
        let mut greeting = session.answer()?;
        if greeting.code == 120 {
            greeting = session.answer()?;
        }
        if greeting.code != 220 {
            return Err(greeting.refused());
        }
        let mut answer = session.command(b"USER", login.name.as_bytes())?;
        if answer.code == 331 {
            answer = session.command(b"PASS", login.password.get())?;
        }
        match answer.code {
            230 | 202 => {}
            421 => return Err(answer.refused()),
            code => return Err(Trouble::lasting(format!("Access denied: {code}"))),
        }
        if dialer.is_secure() {
            session.expect(b"PBSZ", b"0", 200)?;
            session.expect(b"PROT", b"P", 200)?;
        }
        session.expect(b"TYPE", b"I", 200)?;
        Ok(session)
    }

    /// What the server knows of a file.
    pub fn facts_of(&mut self, path: &[u8]) -> Said<FileFacts> {
        let size = self.command(b"SIZE", path)?;
        let len = match size.code {
            213 => size.text.trim().parse().ok(),
            550 => return Err(Trouble::lasting("The file does not exist")),
            _ => None,
        };
        let len = len.ok_or_else(|| Trouble::lasting("Server didn't report file size."))?;
        let changed = self.command(b"MDTM", path)?;
        Ok(FileFacts { len, changed: (changed.code == 213).then_some(changed.text) })
    }

    /// Where the transfer stands that is under way.
    pub fn stands_at(&self) -> Option<u64> {
        self.transfer.as_ref().map(|transfer| transfer.at)
    }

    /// Fills `buf` with a file's bytes from `at` on, all of which it has.
    pub fn read(
        &mut self,
        dialer: &Dialer,
        path: &[u8],
        facts: &FileFacts,
        at: u64,
        buf: &mut [u8],
    ) -> (usize, Said<()>) {
        if self.stands_at() != Some(at)
            && let Err(trouble) = self.start(dialer, path, facts, at)
        {
            return (0, Err(trouble));
        }
        let Some(transfer) = &mut self.transfer else { return (0, Err(Trouble::passing("nothing comes"))) };
        let mut done = 0;
        while done < buf.len() {
            match transfer.data.read(&mut buf[done..]) {
                Ok(0) => return (done, Err(Trouble::passing("the server closed the connection"))),
                Ok(n) => {
                    done += n;
                    transfer.at += n as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return (done, Err(broken(&error))),
            }
        }
        let whole = transfer.at >= facts.len;
        (done, if whole { self.end() } else { Ok(()) })
    }

    /// Has a file sent from `at` on.
    fn start(&mut self, dialer: &Dialer, path: &[u8], facts: &FileFacts, at: u64) -> Said<()> {
        self.end()?;
        if self.facts_of(path)? != *facts {
            return Err(Trouble::lasting("the file has been changed on the server while it was read"));
        }
        let port = self.passive()?;
        if at > 0 {
            let answer = self.command(b"REST", at.to_string().as_bytes())?;
            if answer.code != 350 {
                return Err(Trouble::lasting("Server does not support 'range' (byte ranges)."));
            }
        }
        let data = dialer.data(port)?;
        let answer = self.command(b"RETR", path)?;
        if !matches!(answer.code, 125 | 150) {
            return Err(answer.refused());
        }
        let data = data.encrypted(dialer)?;
        self.transfer = Some(Transfer { data, at });
        Ok(())
    }

    /// Ends the transfer that is under way. However the server takes that, it says one thing to it.
    fn end(&mut self) -> Said<()> {
        match self.transfer.take() {
            Some(transfer) => {
                drop(transfer);
                self.answer().map(drop)
            }
            None => Ok(()),
        }
    }

    /// The port where the data of the next transfer is. The host is the server's own, whatever it says (RFC 2577).
    fn passive(&mut self) -> Said<u16> {
        let extended = self.command(b"EPSV", b"")?;
        if extended.code == 229 {
            return extended_port(&extended.text).ok_or_else(|| extended.refused());
        }
        let passive = self.command(b"PASV", b"")?;
        match passive.code {
            227 => passive_port(&passive.text).ok_or_else(|| passive.refused()),
            _ => Err(passive.refused()),
        }
    }

    fn expect(&mut self, verb: &[u8], argument: &[u8], code: u16) -> Said<()> {
        let answer = self.command(verb, argument)?;
        if answer.code == code { Ok(()) } else { Err(answer.refused()) }
    }

    fn command(&mut self, verb: &[u8], argument: &[u8]) -> Said<Answer> {
        if argument.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
            return Err(Trouble::lasting("The name or password has a line end"));
        }
        let space: &[u8] = if argument.is_empty() { b"" } else { b" " };
        let line = Zeroizing::new([verb, space, argument, b"\r\n"].concat());
        let wire = self.control.get_mut();
        wire.write_all(&line).and_then(|()| wire.flush()).map_err(|error| broken(&error))?;
        self.answer()
    }

    /// An answer, perhaps of several lines (RFC 959, section 4.2).
    fn answer(&mut self) -> Said<Answer> {
        let strange = || Trouble::passing("the server does not speak FTP as it should");
        let mut several = None;
        for _ in 0..MOST_LINES {
            let mut line = Vec::new();
            let read = (&mut self.control).take(LONGEST_LINE).read_until(b'\n', &mut line);
            if read.map_err(|error| broken(&error))? == 0 {
                return Err(Trouble::passing("the server closed the connection"));
            }
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end();
            let code = line.get(..3).and_then(|digits| digits.parse::<u16>().ok());
            let goes_on = line.as_bytes().get(3) == Some(&b'-');
            match (several, code) {
                (None, Some(code)) if goes_on => several = Some(code),
                (None, None) => return Err(strange()),
                (started, Some(code)) if !goes_on && started.is_none_or(|start| start == code) => {
                    let text = line.get(4..).unwrap_or_default();
                    return Ok(Answer { code, text: text.chars().filter(|c| !c.is_control()).collect() });
                }
                _ => {}
            }
        }
        Err(strange())
    }
}

/// RFC 2428, section 3: `(|||port|)`.
fn extended_port(text: &str) -> Option<u16> {
    let inner = text.split_once('(')?.1.split_once(')')?.0;
    let mark = inner.chars().next()?;
    inner.split(mark).nth(3)?.parse().ok()
}

/// RFC 959, section 4.2.2: `h1,h2,h3,h4,p1,p2`.
fn passive_port(text: &str) -> Option<u16> {
    let start = text.find(|c: char| c.is_ascii_digit())?;
    let numbers = text.get(start..)?.split(|c: char| !c.is_ascii_digit());
    let numbers: Vec<u8> = numbers.take(6).map_while(|n| n.parse().ok()).collect();
    match numbers[..] {
        [_, _, _, _, high, low] => Some(u16::from_be_bytes([high, low])),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports() {
        assert_eq!(extended_port("Entering Extended Passive Mode (|||6446|)"), Some(6446));
        assert_eq!(extended_port("x (!!!1!)"), Some(1));
        assert_eq!(passive_port("Entering Passive Mode (10,0,0,1,4,2)."), Some(1026));
        assert_eq!(passive_port("=127,0,0,1,255,255"), Some(65535));
        for bad in ["", "(|||x|)", "(||1|)", "()", "(|||70000|)"] {
            assert_eq!(extended_port(bad), None, "{bad}");
        }
        for bad in ["", "1,2,3", "1,2,3,4,5,256", "a"] {
            assert_eq!(passive_port(bad), None, "{bad}");
        }
    }
}
