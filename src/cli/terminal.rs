//! The terminal while something is typed that it must not show.
//!
//! Invariant: it is given back as it was found, whatever signal comes while the user types, and to whichever thread: the
//! one that asks hears them, and so does the one that [`Interrupt`](super::interrupt::Interrupt) has; all others that are
//! there by then are deaf. Lock order: `FOUND` is a leaf.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::read;
use zeroize::Zeroizing;

use super::signals::heeded;
use crate::block::SecretBytes;

/// Signals that end or stop the program, or come from the terminal.
const SIGNALS: [Signal; 5] = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGTSTP];

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
pub struct Hidden {
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
    pub fn read_line(prompt: &str) -> nix::Result<std::result::Result<Option<SecretBytes>, Signal>> {
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
