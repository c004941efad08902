//! The options that begin those subcommands which change an image and say so.

use super::passphrase::{NewPassphraseArgs, PassphraseArgs};
use super::{Program, object};
use crate::block::Secrets;

/// The options.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    #[command(flatten)]
    passphrase: PassphraseArgs,
}

impl Common {
    /// See [`object::define`]. What no secret is named for is asked for.
    pub fn define(&self, program: &Program) -> anyhow::Result<Option<Secrets>> {
        let secrets = object::define(program, &self.object)?;
        secrets.map(|secrets| self.passphrase.given_to(program, secrets)).transpose()
    }

    /// The same where a key slot may get a passphrase.
    pub fn define_with_new(&self, new: &NewPassphraseArgs, program: &Program) -> anyhow::Result<Option<Secrets>> {
        let secrets = object::define(program, &self.object)?;
        secrets.map(|secrets| self.passphrase.and_new(new, program, secrets)).transpose()
    }
}
