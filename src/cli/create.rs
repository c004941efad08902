//! `create`: makes a new, empty image, perhaps on top of a backing file.

use std::ffi::OsString;

use super::exit::Exit;
use super::{Complaint, Program, Subcommand};

/// The options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// format of the new image, raw if not given
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// image to create and, unless there is a backing image, its size
    #[arg(value_name = "FILENAME [SIZE]")]
    operands: Vec<OsString>,
}

impl Subcommand for Args {
    const NAME: &'static str = "create";
    const ABOUT: &'static str = "Create and format a new image file";
    const USAGE: &'static [&'static str] = &["[-f FMT] [-q] FILENAME [SIZE]"];

    fn run(self, _program: &Program) -> anyhow::Result<Exit> {
        let [_name, ..] = &self.operands[..] else {
            return Err(Complaint::usage("Expecting image file name").into());
        };
        anyhow::bail!("not yet: {} {}", self.format, self.quiet)
    }
}
