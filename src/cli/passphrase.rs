//! Passphrases that no option names: from a file that the user names, or asked for on the terminal with echo off.
//!
//! Invariant: the terminal is given back as it was found, whatever signal comes while the user types, and to whichever
//! thread: the one that asks hears them, and so does the one that [`Interrupt`](super::interrupt::Interrupt) has; all
//! others that are there by then are deaf. Lock order: `known`, held while the user is asked, so that no two prompts mix;
//! `FOUND` is a leaf.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::read;
use zeroize::Zeroizing;

use super::interrupt::{have_effect, heeded};
use super::{Complaint, help, object};
use crate::block::secrets::AskPassphrase;
use crate::block::{Error, KeyUse, Result, SecretBytes, Secrets};
use crate::storage::error::strerror;

/// The most bytes of a passphrase. (A terminal gives 4095 in a line.)
const MOST: usize = 1 << 20;

/// The option that is vimg's own way to the passphrase of the image, or of those that are read.
#[derive(Debug, clap::Args)]
pub struct PassphraseArgs {
    /// the passphrase of an encrypted image (of those that are read, where there is a target) is what FILE holds, but for a line end at its end; without it a terminal is asked
    #[arg(long, value_name = "FILE", help_heading = help::OWN)]
    passphrase_file: Option<PathBuf>,
}

/// The same for a target.
#[derive(Debug, clap::Args)]
pub struct TargetPassphraseArgs {
    /// the same for the target
    #[arg(long, value_name = "FILE", help_heading = help::OWN)]
    target_passphrase_file: Option<PathBuf>,
}

/// The same for what opens an image from now on, too.
#[derive(Debug, clap::Args)]
pub struct NewPassphraseArgs {
    /// the passphrase that a key slot gets is what FILE holds, in the same way
    #[arg(long, value_name = "FILE", help_heading = help::OWN)]
    new_passphrase_file: Option<PathBuf>,
}

impl PassphraseArgs {
    fn read(&self) -> anyhow::Result<Option<SecretBytes>> {
        self.passphrase_file.as_deref().map(from_file).transpose()
    }

    /// Where images that name no secret get their passphrases.
    pub fn given_to(&self, secrets: Secrets) -> anyhow::Result<Secrets> {
        let image = self.read()?;
        Ok(Passphrases { read: image.clone(), written: image, ..Passphrases::default() }.given_to(secrets))
    }

    /// The same where there is a target.
    pub fn and_target(&self, target: &TargetPassphraseArgs, secrets: Secrets) -> anyhow::Result<Secrets> {
        let read = self.read()?;
        let written = target.target_passphrase_file.as_deref().map(from_file).transpose()?;
        Ok(Passphrases { read, written, ..Passphrases::default() }.given_to(secrets))
    }

    /// The same where a key slot gets another one.
    pub fn and_new(&self, new: &NewPassphraseArgs, secrets: Secrets) -> anyhow::Result<Secrets> {
        let image = self.read()?;
        let added = new.new_passphrase_file.as_deref().map(from_file).transpose()?;
        Ok(Passphrases { read: image.clone(), written: image, added, ..Passphrases::default() }.given_to(secrets))
    }
}

/// The passphrase that a file holds.
fn from_file(path: &Path) -> anyhow::Result<SecretBytes> {
    object::keep_from_core_files();
    let failed = || format!("Could not read the passphrase file '{}'", path.display());
    let told = |error: io::Error| Complaint::value(strerror(&error));
    let bytes = whole_file(path, MOST + 1).map_err(told).with_context(failed)?;
    if bytes.len() > MOST {
        return Err(Complaint::value(format!("it holds more than {MOST} bytes"))).with_context(failed);
    }
    let held = &bytes[..];
    let held = held.strip_suffix(b"\n").map_or(held, |line| line.strip_suffix(b"\r").unwrap_or(line));
    Ok(held.to_vec().into())
}

/// What a file holds, but for what lies behind so many bytes. What grows leaves copies behind: each is wiped.
pub(super) fn whole_file(path: &Path, most: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut file = File::open(path)?;
    let mut bytes = Zeroizing::new(vec![0; most.min(4096)]);
    let mut length = 0;
    loop {
        if length == bytes.len() {
            if length == most {
                break;
            }
            let mut longer = Zeroizing::new(vec![0; length.saturating_mul(2).min(most)]);
            longer[..length].copy_from_slice(&bytes);
            bytes = longer;
        }
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(n) => length += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(length);
    Ok(bytes)
}

/// See the module.
#[derive(Debug, Default)]
struct Passphrases {
    /// Of images that are read.
    read: Option<SecretBytes>,
    /// Of images that are written to, or made.
    written: Option<SecretBytes>,
    /// Of key slots that are filled.
    added: Option<SecretBytes>,
    /// What was typed, by the names of the images.
    known: Mutex<BTreeMap<String, SecretBytes>>,
}

impl Passphrases {
    fn given_to(self, secrets: Secrets) -> Secrets {
        secrets.or_ask(Arc::new(self))
    }
}

impl AskPassphrase for Passphrases {
    fn ask(&self, image: &str, key_use: KeyUse) -> Result<Option<SecretBytes>> {
        let file = match key_use {
            KeyUse::Read => &self.read,
            KeyUse::Write | KeyUse::New => &self.written,
            KeyUse::Added => &self.added,
        };
        if let Some(passphrase) = file {
            return Ok(Some(passphrase.clone()));
        }
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let added = key_use == KeyUse::Added;
        if let Some(passphrase) = known.get(image).filter(|_| !added) {
            return Ok(Some(passphrase.clone()));
        }
        object::keep_from_core_files();
        let what = if added { "New password" } else { "Password" };
        let typed = typed(&format!("{what} for '{image}': "))?;
        let twice = added || key_use == KeyUse::New;
        if twice && self::typed(&format!("Once more, for '{image}': "))? != typed {
            return Err(Error::invalid(format!("The two passwords for '{image}' differ")));
        }
        if !added {
            known.insert(image.to_owned(), typed.clone());
        }
        Ok(Some(typed))
    }

    fn can_ask(&self) -> bool {
        [&self.read, &self.written, &self.added].into_iter().any(Option::is_some) || io::stdin().is_terminal()
    }
}

/// Signals that end or stop the program, or come from the terminal.
const SIGNALS: [Signal; 5] = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGTSTP];

/// A line that is typed and not shown, without its end.
fn typed(prompt: &str) -> Result<SecretBytes> {
    let failed = |error: Errno| {
        Error::invalid(format!("Could not read a password from the terminal: {}", strerror(&error.into())))
    };
    let line = loop {
        match Hidden::read_line(prompt).map_err(failed)? {
            Ok(line) => break line,
            // Should the program go on afterwards, it asks again.
            Err(signal) => have_effect(signal),
        }
    };
    line.ok_or_else(|| Error::invalid("No password was typed"))
}

/// To where the user looks.
fn show(prompt: &str) {
    let stderr = io::stderr();
    // Where it cannot be written there is nobody to tell.
    let _ = match OpenOptions::new().write(true).open("/dev/tty") {
        Ok(mut terminal) if !stderr.is_terminal() => terminal.write_all(prompt.as_bytes()),
        _ => stderr.lock().write_all(prompt.as_bytes()),
    };
}

/// How the terminal was found that has its echo off.
static FOUND: Mutex<Option<Termios>> = Mutex::new(None);

/// Gives the terminal back as it was found; false if it was never taken.
pub fn give_terminal_back() -> bool {
    let found = FOUND.lock().unwrap_or_else(PoisonError::into_inner).take();
    // Where it cannot be done there is no terminal any more.
    let given = |before: Termios| tcsetattr(io::stdin(), SetArg::TCSADRAIN, &before).is_ok();
    found.map(given).is_some()
}

/// The terminal with echo off, and signals held back; as it was when dropped.
struct Hidden {
    blocked: SigSet,
    signals: SignalFd,
}

impl Hidden {
    fn start() -> nix::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let set = heeded(&SIGNALS);
        let blocked = set.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        let hidden = match signals {
            Ok(signals) => Self { blocked, signals },
            Err(error) => {
                blocked.thread_set_mask()?;
                return Err(error);
            }
        };
        let mut silent = before.clone();
        *FOUND.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        silent.local_flags.remove(LocalFlags::ECHO);
        // The end of the line is shown all the same, and editing is the terminal's own.
        silent.local_flags.insert(LocalFlags::ECHONL | LocalFlags::ICANON | LocalFlags::ISIG);
        tcsetattr(io::stdin(), SetArg::TCSAFLUSH, &silent)?;
        Ok(hidden)
    }

    /// A line; nothing at the end of what there is to read; or the signal that came instead.
    fn read_line(prompt: &str) -> nix::Result<std::result::Result<Option<SecretBytes>, Signal>> {
        let hidden = Self::start()?;
        // Not before echo is off: what is typed earlier is shown, and thrown away.
        show(prompt);
        let mut line = Zeroizing::new(Vec::with_capacity(8192));
        let mut piece = Zeroizing::new([0; 4096]);
        loop {
            let stdin = io::stdin();
            let mut wanted =
                [PollFd::new(hidden.signals.as_fd(), PollFlags::POLLIN), PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            if let Some(signal) = hidden.signals.read_signal()? {
                let signal = i32::try_from(signal.ssi_signo).map_err(|_| Errno::EINVAL)?;
                return Ok(Err(Signal::try_from(signal)?));
            }
            if !wanted[1].any().unwrap_or(false) {
                continue;
            }
            let n = match read(&stdin, &mut *piece) {
                Err(Errno::EINTR | Errno::EAGAIN) => continue,
                other => other?,
            };
            let got = piece.get(..n).unwrap_or_default();
            if let Some(rest) = got.strip_suffix(b"\n") {
                line.extend_from_slice(rest);
                return Ok(Ok(Some(line.to_vec().into())));
            }
            line.extend_from_slice(got);
            if n == 0 || line.len() > 4096 {
                return Ok(Ok((!line.is_empty()).then(|| line.to_vec().into())));
            }
        }
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        give_terminal_back();
        let _ = self.blocked.thread_set_mask();
    }
}
