//! `generate`, which help does not list: completions of shells, and manual pages, for those who package the program.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::builder::PossibleValuesParser;
use clap::{Arg, Command, ValueHint};
use clap_complete::Shell;

use super::arguments::{Makes, Takes, known};
use super::exit::Exit;
use super::{Complaint, Program, Subcommand, help, rows, trust};
use crate::drivers::DRIVERS;

/// The operands.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// folder to write to: it gets `completions` and `man`
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    operands: Vec<OsString>,
}

/// What completes for each shell, and the name that it looks for.
const SHELLS: [(Shell, &str); 3] = [(Shell::Bash, "vimg"), (Shell::Zsh, "_vimg"), (Shell::Fish, "vimg.fish")];

impl Subcommand for GenerateArgs {
    const NAME: &'static str = "generate";
    const ABOUT: &'static str = "";
    const USAGE: &'static [&'static str] = &["DIR"];
    const EXAMPLE: &'static str = "vimg generate target/packaging";
    const OWN: bool = true;
    const MAKES: &'static [Makes] = &[Makes::Folder("operands")];

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let [folder] = &self.operands[..] else { return Err(Complaint::usage("Expecting one folder").into()) };
        let (completions, man) = (Path::new(folder).join("completions"), Path::new(folder).join("man"));
        for folder in [&completions, &man] {
            fs::create_dir_all(folder).map_err(|cause| told(folder, &cause))?;
        }
        let whole = described(program);
        for (shell, name) in SHELLS {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut whole.clone(), "vimg", &mut text);
            write(completions.join(name), &text)?;
        }
        for command in std::iter::once(&whole).chain(whole.get_subcommands()) {
            let name = match command.get_name() {
                "vimg" => "vimg".to_owned(),
                name => format!("vimg-{name}"),
            };
            let page = command.clone().display_name(name.clone());
            let mut text = Vec::new();
            clap_mangen::Man::new(page).title(name.to_uppercase()).render(&mut text).context("A manual page")?;
            write(man.join(format!("{name}.1")), &text)?;
        }
        Ok(Exit::Success)
    }
}

fn told(path: &Path, cause: &std::io::Error) -> Complaint {
    Complaint::value(format!("Could not write '{}': {}", path.display(), crate::storage::error::strerror(cause)))
}

fn write(path: PathBuf, text: &[u8]) -> Result<(), Complaint> {
    fs::write(&path, text).map_err(|cause| told(&path, &cause))
}

/// The whole command line, with what options may be given.
fn described(program: &Program) -> Command {
    let subcommands = rows(program).filter(|row| !row.about.is_empty()).map(|row| {
        let command = (row.command)().about(row.about).after_long_help(format!("EXAMPLE:\n{}", row.example));
        let usage = row.usage.join(" ");
        trust::args()
            .into_iter()
            .fold(command, |command, arg| command.mut_arg(arg.get_id().clone(), |arg| arg.hide(false)))
            .mut_args(completed)
            .override_usage(format!("vimg {} {usage}", row.name))
    });
    let about = "Works on the disk images of virtual machines, with the command line of qemu-img";
    help::standard_options().about(about).version(env!("CARGO_PKG_VERSION")).subcommands(subcommands)
}

/// An option with the values that it takes.
fn completed(arg: Arg) -> Arg {
    let values: Vec<&'static str> = match known(&arg).takes {
        Takes::NewFormat => {
            let made = DRIVERS.formats.iter().filter(|format| format.creating().is_some());
            let mut names: Vec<_> = made.map(|format| format.name()).collect();
            names.sort_unstable();
            names
        }
        Takes::Driver => DRIVERS.names(),
        Takes::Cache => ["none", "writeback", "unsafe", "directsync", "writethrough"].to_vec(),
        Takes::Output => ["human", "json"].to_vec(),
        Takes::Preallocation => ["off", "metadata", "falloc", "full"].to_vec(),
        Takes::CreateOptions => {
            let creators = DRIVERS.formats.iter().filter_map(|format| format.creating());
            let mut keys: Vec<_> = creators.flat_map(|create| create.options()).map(|option| option.name).collect();
            keys.sort_unstable();
            keys.dedup();
            keys
        }
        Takes::File => return arg.value_hint(ValueHint::FilePath),
        Takes::Plain | Takes::Object => return arg,
    };
    arg.value_parser(PossibleValuesParser::new(values))
}
