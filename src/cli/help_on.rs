//! `help`: the help of the program, or of a subcommand.

use std::ffi::OsString;

use super::exit::Exit;
use super::{Complaint, Program, Subcommand, find, help, not_found};

/// The operands.
#[derive(Debug, clap::Args)]
pub struct HelpArgs {
    /// command to tell of, all of them if not given
    #[arg(value_name = "COMMAND")]
    operands: Vec<OsString>,
}

impl Subcommand for HelpArgs {
    const NAME: &'static str = "help";
    const ABOUT: &'static str = "Print the help of the program, or of a command";
    const USAGE: &'static [&'static str] = &["[COMMAND]"];
    const EXAMPLE: &'static str = "vimg help convert";
    const OWN: bool = true;

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        match &self.operands[..] {
            [] => help::print_program(program, true)?,
            [name] => {
                let name = name.to_string_lossy();
                let row = find(program, &name).ok_or_else(|| not_found(program, &name))?;
                help::print_subcommand(program, row, &(row.command)(), true)?;
            }
            _ => return Err(Complaint::usage("Expecting one command").into()),
        }
        Ok(Exit::Success)
    }
}
