//! The options that begin those subcommands which change an image and say so.

use super::{Complaint, Program, object};
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
}

impl Common {
    /// See [`object::define`].
    pub fn define(&self, program: &Program) -> Result<Option<Secrets>, Complaint> {
        object::define(program, &self.object)
    }
}
