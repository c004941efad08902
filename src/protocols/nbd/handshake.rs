//! From a connected socket to an export that can be read: "Handshake phase" of doc/proto.md. What can be had of
//! TLS, extended headers, structured replies and the context that tells holes is asked for in that order; of servers
//! that know no options the export is taken as it is.
//!
//! Invariants: no reply is longer, and no option has more replies, than a client can have a use for.

use std::io::{self, ErrorKind, Read};
use std::sync::Arc;
use std::time::Duration;

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    self, BASE_ALLOCATION, BlockSizes, DEFAULT_MAXIMUM, ExportReply, OldstyleExport, OptionHeader, OptionReply,
    RESERVED, info, option, reply,
};
use super::names::Target;
use super::stream::{ReceiveHalf, SendHalf, halves, secure_halves};
use super::tls::Tls;
use crate::protocols::server::Socket;
use crate::storage::error::strerror;

/// What is known of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// What offsets and lengths are multiples of; a power of two.
    pub minimum: u32,
    /// What is fastest, if the server says so.
    pub preferred: Option<u32>,
    /// The longest payload; a multiple of the least.
    pub maximum: u32,
    /// Replies may come in chunks.
    pub structured: bool,
    /// And with extended headers.
    pub extended: bool,
    /// The number of the context that tells holes.
    pub context: Option<u32>,
}

impl Export {
    /// Whether the server has that flag set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Why there is no connection: a text, and what the server says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong.
    pub text: String,
    /// Lines to show after it.
    pub hints: Vec<String>,
    /// What there is instead.
    pub advice: Option<String>,
    /// Another try may go better.
    pub passing: bool,
}

impl From<String> for Refusal {
    fn from(text: String) -> Self {
        Self { text, hints: Vec::new(), advice: None, passing: false }
    }
}

impl From<&str> for Refusal {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

type Result<T> = std::result::Result<T, Refusal>;

/// A connection that is ready for requests.
pub struct Ready {
    /// To send.
    pub send: SendHalf,
    /// To receive.
    pub receive: ReceiveHalf,
    /// What is there.
    pub export: Export,
}

/// The longest reply to an option: a string, and what goes with it.
const LONGEST_REPLY: u32 = 2 * layout::LONGEST_STRING as u32;
/// Replies to one option.
const MOST_REPLIES: usize = 1024;

/// Names of exports that are shown.
const NAMES_SHOWN: usize = 16;

/// Connects, and opens the export. No answer is waited for longer than `timeout`.
pub fn open(target: &Target, tls: Option<&Tls>, timeout: Option<Duration>) -> Result<Ready> {
    let connected = Socket::connect(&target.address);
    let socket = Arc::new(connected.map_err(|text| Refusal { passing: true, ..text.into() })?);
    let set = |timeout| socket.set_timeout(timeout).map_err(|error| Refusal::from(strerror(&error)));
    set(timeout)?;
    let (send, receive) = halves(socket.clone());
    let ready = Haggle { send, receive, target }.run(tls)?;
    set(None)?;
    Ok(ready)
}

struct Haggle<'a> {
    send: SendHalf,
    receive: ReceiveHalf,
    target: &'a Target,
}

impl Haggle<'_> {
    fn run(mut self, tls: Option<&Tls>) -> Result<Ready> {
        let magic = self.read::<U64>("initial magic")?.get();
        if magic != layout::MAGIC {
            return Err(format!("Bad initial magic received: 0x{magic:016x}").into());
        }
        let style = self.read::<U64>("server magic")?.get();
        match style {
            layout::OPTION_MAGIC => self.newstyle(tls),
            layout::OLDSTYLE_MAGIC if tls.is_some() => Err("Server does not support STARTTLS".into()),
            layout::OLDSTYLE_MAGIC => self.oldstyle(),
            _ => Err(format!("Bad server magic received: 0x{style:016x}").into()),
        }
    }

    fn oldstyle(mut self) -> Result<Ready> {
        if !self.target.export.is_empty() {
            return Err("Server does not support non-empty export names".into());
        }
        let export: OldstyleExport = self.read("export length")?;
        self.read::<[u8; RESERVED]>("reserved block")?;
        let flags = u16::try_from(export.flags.get() & 0xffff).unwrap_or_default();
        self.ready(Export { size: export.size.get(), flags, ..UNTOLD })
    }

    fn newstyle(mut self, tls: Option<&Tls>) -> Result<Ready> {
        let offered = self.read::<U16>("server flags")?.get();
        let agreed = offered & (layout::FIXED_NEWSTYLE | layout::NO_ZEROES);
        self.write(U32::new(u32::from(agreed)).as_bytes(), &[])?;
        let padded = agreed & layout::NO_ZEROES == 0;
        if agreed & layout::FIXED_NEWSTYLE == 0 {
            if tls.is_some() {
                return Err("Server does not support STARTTLS".into());
            }
            return self.export_name(padded);
        }
        if let Some(tls) = tls {
            self = self.start_tls(tls)?;
        }
        let mut export = UNTOLD;
        export.extended = self.simple_option(option::EXTENDED_HEADERS)?;
        export.structured = export.extended || self.simple_option(option::STRUCTURED_REPLY)?;
        if export.structured {
            export.context = self.set_context()?;
        }
        if export.context.is_none() && self.target.context != BASE_ALLOCATION {
            return Err("Could not open image: Invalid argument".into());
        }
        match self.go(&mut export)? {
            true => self.ready(export),
            false => self.export_name(padded),
        }
    }

    /// An option without data: whether the server agrees.
    fn simple_option(&mut self, option: u32) -> Result<bool> {
        self.option(option, &[])?;
        match self.reply(option)? {
            (reply::ACK, _) => Ok(true),
            // What is wrong with more than the option comes up again with the export itself.
            (kind, _) if kind & reply::ERROR != 0 => Ok(false),
            (kind, _) => Err(unexpected(option, kind)),
        }
    }

    fn start_tls(mut self, tls: &Tls) -> Result<Self> {
        self.option(option::STARTTLS, &[])?;
        match self.reply(option::STARTTLS)? {
            (reply::ACK, _) => {}
            (kind, data) if kind & reply::ERROR != 0 => {
                return Err(Refusal {
                    hints: reported(&data),
                    ..Refusal::from("Server rejected request for starttls")
                });
            }
            (kind, _) => return Err(unexpected(option::STARTTLS, kind)),
        }
        if self.receive.has_more() {
            // What is not encrypted has no business there.
            return Err("Server sent data before TLS was begun".into());
        }
        let socket = self.send.socket().clone();
        let begun = tls.begin(&socket)?;
        (self.send, self.receive) = secure_halves(socket, begun);
        Ok(self)
    }

    /// Chooses the context that tells holes: its number, if the server has it.
    fn set_context(&mut self) -> Result<Option<u32>> {
        const OPTION: u32 = option::SET_META_CONTEXT;
        let mut data = string(&self.target.export);
        data.extend_from_slice(U32::new(1).as_bytes());
        data.extend(string(&self.target.context));
        self.option(OPTION, &data)?;
        let mut found = None;
        for _ in 0..MOST_REPLIES {
            match self.reply(OPTION)? {
                (reply::ACK, _) => return Ok(found),
                (reply::META_CONTEXT, data) => {
                    let (number, name) =
                        U32::read_from_prefix(&data).map_err(|_| "Server sent a metadata context without a number")?;
                    if name != self.target.context.as_bytes() || found.is_some() {
                        return Err("Server sent a metadata context that was not asked for".into());
                    }
                    found = Some(number.get());
                }
                (kind, _) if kind & reply::ERROR != 0 => return Ok(None),
                (kind, _) => return Err(unexpected(OPTION, kind)),
            }
        }
        Err("Server sent too many metadata contexts".into())
    }

    /// Asks for the export; `false` if the server does not know the option.
    fn go(&mut self, export: &mut Export) -> Result<bool> {
        let mut data = string(&self.target.export);
        data.extend_from_slice(U16::new(1).as_bytes());
        data.extend_from_slice(U16::new(info::BLOCK_SIZE).as_bytes());
        self.option(option::GO, &data)?;
        let mut told = false;
        for _ in 0..MOST_REPLIES {
            match self.reply(option::GO)? {
                (reply::ACK, _) if told => return Ok(true),
                (reply::ACK, _) => return Err("Server did not say how long the export is".into()),
                (reply::INFO, data) => told |= self.take_info(&data, export)?,
                (reply::UNSUPPORTED, _) if !told => return Ok(false),
                (kind, data) if kind & reply::ERROR != 0 => return Err(self.refused(option::GO, kind, &data)),
                (kind, _) => return Err(unexpected(option::GO, kind)),
            }
        }
        Err("Server sent too much about the export".into())
    }

    /// Takes a reply that tells of the export: whether it was the one that must come.
    fn take_info(&self, data: &[u8], export: &mut Export) -> Result<bool> {
        let short = |_| Refusal::from("Server sent too little about the export");
        let (kind, rest) = U16::read_from_prefix(data).map_err(|_| "Server sent too little about the export")?;
        match kind.get() {
            info::EXPORT => {
                let told = ExportReply::read_from_bytes(rest).map_err(|_| short(()))?;
                (export.size, export.flags) = (told.size.get(), told.flags.get());
                Ok(true)
            }
            info::BLOCK_SIZE => {
                let sizes = BlockSizes::read_from_bytes(rest).map_err(|_| short(()))?;
                let (minimum, preferred) = (sizes.minimum.get(), sizes.preferred.get());
                let maximum = sizes.maximum.get();
                // "Block size constraints": powers of two, and the longest payload a multiple of the least.
                if !minimum.is_power_of_two() || minimum > 1 << 16 || maximum < minimum {
                    let text = format!("Server asks for blocks of {minimum} to {maximum} bytes, which cannot be");
                    return Err(text.into());
                }
                export.minimum = minimum;
                export.preferred = Some(preferred).filter(|size| size.is_power_of_two() && *size >= minimum);
                export.maximum = maximum.min(DEFAULT_MAXIMUM) / minimum * minimum;
                Ok(false)
            }
            _ => Ok(false),
        }
    }

    /// The way that every server knows; one that does not have the export just ends the connection.
    fn export_name(mut self, padded: bool) -> Result<Ready> {
        let name = self.target.export.as_bytes().to_vec();
        self.option(option::EXPORT_NAME, &name)?;
        let told: ExportReply = self.read("export length")?;
        if padded {
            self.read::<[u8; RESERVED]>("reserved block")?;
        }
        self.ready(Export { size: told.size.get(), flags: told.flags.get(), ..UNTOLD })
    }

    fn ready(self, export: Export) -> Result<Ready> {
        let Self { send, receive, .. } = self;
        match i64::try_from(export.size) {
            Ok(_) => Ok(Ready { send, receive, export }),
            Err(_) => Err(format!("Server has an export of {} bytes, which is too long", export.size).into()),
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let len = u32::try_from(data.len()).map_err(|_| "an option is too long")?;
        let (magic, option, len) = (layout::OPTION_MAGIC.into(), option.into(), len.into());
        self.write(OptionHeader { magic, option, len }.as_bytes(), data)
    }

    /// The kind of a reply, and its data.
    fn reply(&mut self, option: u32) -> Result<(u32, Vec<u8>)> {
        let head: OptionReply = self.read("option reply")?;
        if head.magic.get() != layout::OPTION_REPLY_MAGIC {
            return Err("Unexpected option reply magic".into());
        }
        if head.option.get() != option {
            return Err("Unexpected option type in reply".into());
        }
        let len = head.len.get();
        if len > LONGEST_REPLY {
            return Err(format!("Server sent an option reply of {len} bytes, which is too long").into());
        }
        let mut data = vec![0; usize::try_from(len).unwrap_or_default()];
        self.receive.read_exact(&mut data).map_err(|error| failed("read", "option reply", &error))?;
        Ok((head.kind.get(), data))
    }

    /// The exports that the server has, as far as it tells.
    fn list(&mut self) -> Result<Vec<String>> {
        self.option(option::LIST, &[])?;
        let mut names = Vec::new();
        for _ in 0..MOST_REPLIES {
            match self.reply(option::LIST)? {
                (reply::SERVER, data) => {
                    let (len, rest) =
                        U32::read_from_prefix(&data).map_err(|_| "Server sent an export without a name")?;
                    let name = usize::try_from(len.get()).ok().and_then(|len| rest.get(..len));
                    names.push(String::from_utf8_lossy(name.unwrap_or_default()).escape_debug().to_string());
                }
                _ => break,
            }
        }
        Ok(names)
    }

    /// What an error that answers an option says.
    fn refused(&mut self, option: u32, kind: u32, data: &[u8]) -> Refusal {
        let names = if kind == reply::UNKNOWN { self.list().unwrap_or_default() } else { Vec::new() };
        // Politely; whether it is heard or not.
        let _ = self.option(option::ABORT, &[]);
        let shown = match option {
            option::GO => "7 (go)".to_owned(),
            other => other.to_string(),
        };
        let (text, hint) = match kind {
            reply::UNKNOWN => ("Requested export not available".to_owned(), None),
            reply::POLICY => (format!("Denied by server for option {shown}"), None),
            reply::INVALID => (format!("Invalid parameters for option {shown}"), None),
            reply::PLATFORM => (format!("Server lacks support for option {shown}"), None),
            reply::TLS_REQUIRED => {
                let hint = "Did you forget a valid tls-creds?";
                (format!("TLS negotiation required before option {shown}"), Some(hint.to_owned()))
            }
            reply::SHUTDOWN => (format!("Server shutting down before option {shown}"), None),
            reply::BLOCK_SIZE_REQUIRED => (format!("Server requires INFO_BLOCK_SIZE for option {shown}"), None),
            reply::TOO_BIG => (format!("Server deems option {shown} too big"), None),
            reply::UNSUPPORTED => (format!("Unsupported option type {shown}"), None),
            other => (format!("Unknown error code {} when asking for option {shown}", other & !reply::ERROR), None),
        };
        let hints = hint.into_iter().chain(reported(data)).collect();
        Refusal { hints, advice: shown_names(&names), passing: kind == reply::SHUTDOWN, text }
    }

    fn read<T: FromBytes + IntoBytes>(&mut self, what: &str) -> Result<T> {
        let mut value = T::new_zeroed();
        self.receive.read_exact(value.as_mut_bytes()).map_err(|error| failed("read", what, &error))?;
        Ok(value)
    }

    fn write(&mut self, head: &[u8], data: &[u8]) -> Result<()> {
        self.send.send(head, data).map_err(|error| failed("send", "option", &error))
    }
}

/// An export of which nothing is told.
const UNTOLD: Export = Export {
    size: 0,
    flags: 0,
    minimum: 1,
    preferred: None,
    maximum: DEFAULT_MAXIMUM,
    structured: false,
    extended: false,
    context: None,
};

/// A string, behind its length.
fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    [U32::new(len).as_bytes(), text.as_bytes()].concat()
}

/// The first of the exports that a server has.
fn shown_names(names: &[String]) -> Option<String> {
    let shown: Vec<String> = names.iter().take(NAMES_SHOWN).map(|name| format!("'{name}'")).collect();
    let more = if names.len() > NAMES_SHOWN { ", ..." } else { "" };
    (!shown.is_empty()).then(|| format!("the server has {}{more}", shown.join(", ")))
}

/// The message of an error, if it has one that can be shown.
fn reported(data: &[u8]) -> Vec<String> {
    let text: String = String::from_utf8_lossy(data).chars().filter(|c| !c.is_control()).collect();
    if text.is_empty() { Vec::new() } else { vec![format!("server reported: {text}")] }
}

fn unexpected(option: u32, kind: u32) -> Refusal {
    format!("Server answers option {option} with {kind}, which is no answer").into()
}

fn failed(doing: &str, what: &str, error: &io::Error) -> Refusal {
    let why = match error.kind() {
        ErrorKind::UnexpectedEof => "Unexpected end-of-file before all data were read".to_owned(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "no answer".to_owned(),
        _ => strerror(error),
    };
    Refusal { passing: true, ..format!("Failed to {doing} {what}: {why}").into() }
}
