//! `--output`: for people, or for programs.

use std::ffi::OsString;

use clap::Command;

use super::{Complaint, help};

/// The version of what `--output=json` of our own and `--progress=json` print: it changes where a program that reads
/// them would have to.
pub const JSON_VERSION: u32 = 1;

/// `--output` of the subcommands that print no JSON with the reference: what was done, or why not, as one object.
#[derive(Debug, clap::Args)]
pub struct ResultArgs {
    /// form of the result: human or json
    ///
    /// default: human
    #[arg(long, value_name = "human|json", value_parser = OutputForm::parse, help_heading = help::OWN)]
    output: Option<OutputForm>,
}

/// Whether JSON is asked for by an option that is our own: looked for before the words are sorted, so that what is wrong
/// with them is told so.
pub fn is_own_json(command: &Command, argv: &[OsString]) -> bool {
    let own = command.get_arguments().any(|arg| arg.get_id() == "output" && help::is_own(arg));
    let mut words =
        argv.iter().take_while(|word| *word != "--").map(|word| word.to_str().unwrap_or_default()).peekable();
    let mut form = "";
    while let Some(word) = words.next() {
        form = match word.strip_prefix("--output") {
            Some("") => words.peek().copied().unwrap_or_default(),
            Some(value) => value.strip_prefix('=').unwrap_or(form),
            None => form,
        };
    }
    own && form == "json"
}

/// The form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OutputForm {
    /// Text.
    #[default]
    Human,
    /// JSON.
    Json,
}

impl OutputForm {
    /// The form with that word.
    pub fn parse(word: &str) -> Result<Self, Complaint> {
        match word {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(Complaint::usage(format!("--output expects 'human' or 'json', not '{other}'"))),
        }
    }
}
