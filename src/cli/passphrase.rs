//! Passphrases that no option names: from a file that the user names, or asked for on the terminal with echo off, but
//! not under the reference's name, which asks nothing.
//!
//! Lock order: `known`, held while the user is asked, so that no two prompts mix; then what [`Hidden`] takes.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use nix::errno::Errno;

use super::signals::have_effect;
use super::terminal::Hidden;
use super::{Complaint, Program, help, secret_file};
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
    /// the passphrase of an encrypted target is what FILE holds, but for a line end at its end; without it a terminal is asked
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
    pub fn given_to(&self, program: &Program, secrets: Secrets) -> anyhow::Result<Secrets> {
        let image = self.read()?;
        Ok(Passphrases { read: image.clone(), written: image, ..Passphrases::of(program) }.given_to(secrets))
    }

    /// The same where there is a target.
    pub fn and_target(
        &self,
        target: &TargetPassphraseArgs,
        program: &Program,
        secrets: Secrets,
    ) -> anyhow::Result<Secrets> {
        let read = self.read()?;
        let written = target.target_passphrase_file.as_deref().map(from_file).transpose()?;
        Ok(Passphrases { read, written, ..Passphrases::of(program) }.given_to(secrets))
    }

    /// The same where a key slot gets another one.
    pub fn and_new(&self, new: &NewPassphraseArgs, program: &Program, secrets: Secrets) -> anyhow::Result<Secrets> {
        let image = self.read()?;
        let added = new.new_passphrase_file.as_deref().map(from_file).transpose()?;
        Ok(Passphrases { read: image.clone(), written: image, added, ..Passphrases::of(program) }.given_to(secrets))
    }
}

/// The passphrase that a file holds.
fn from_file(path: &Path) -> anyhow::Result<SecretBytes> {
    secret_file::keep_from_core_files();
    let failed = || format!("Could not read the passphrase file '{}'", path.display());
    let told = |error: io::Error| Complaint::value(strerror(&error));
    let bytes = secret_file::whole_file(path, MOST + 1).map_err(told).with_context(failed)?;
    if bytes.len() > MOST {
        return Err(Complaint::value(format!("it holds more than {MOST} bytes"))).with_context(failed);
    }
    let held = &bytes[..];
    let held = held.strip_suffix(b"\n").map_or(held, |line| line.strip_suffix(b"\r").unwrap_or(line));
    Ok(held.to_vec().into())
}

/// Whether it is of an image that is made.
type Made = bool;

/// See the module.
#[derive(Debug, Default)]
struct Passphrases {
    /// Of images that are read.
    read: Option<SecretBytes>,
    /// Of images that are written to, or made.
    written: Option<SecretBytes>,
    /// Of key slots that are filled.
    added: Option<SecretBytes>,
    /// There is a terminal, which is asked.
    asks: bool,
    /// What was typed, by the names of the images; what is made may get the name of one that is read.
    known: Mutex<BTreeMap<(String, Made), SecretBytes>>,
}

impl Passphrases {
    fn of(program: &Program) -> Self {
        Self { asks: program.is_vimg() && io::stdin().is_terminal(), ..Self::default() }
    }

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
        if !self.asks {
            return Ok(None);
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let added = key_use == KeyUse::Added;
        // What is written to may be what was made before, or what is there.
        let which: &[Made] = match key_use {
            KeyUse::Read => &[false],
            KeyUse::Write => &[true, false],
            KeyUse::New => &[true],
            KeyUse::Added => &[],
        };
        if let Some(passphrase) = which.iter().find_map(|made| known.get(&(image.to_owned(), *made))) {
            return Ok(Some(passphrase.clone()));
        }
        secret_file::keep_from_core_files();
        let what = if added { "New password" } else { "Password" };
        let typed = typed(&format!("{what} for '{image}': "))?;
        let twice = added || key_use == KeyUse::New;
        if twice && self::typed(&format!("Once more, for '{image}': "))? != typed {
            return Err(Error::invalid(format!("The two passwords for '{image}' differ")));
        }
        if !added {
            known.insert((image.to_owned(), key_use == KeyUse::New), typed.clone());
        }
        Ok(Some(typed))
    }

    fn can_ask(&self) -> bool {
        [&self.read, &self.written, &self.added].into_iter().any(Option::is_some) || self.asks
    }
}

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
