//! `generate`, which help does not list: completions of shells, and manual pages, for those who package the program.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Arg, Command, ValueHint};

use super::arguments::{Makes, known};
use super::completion::{self, SHELLS};
use super::exit::Exit;
use super::{Complaint, Program, Subcommand, help, rows, trust};

/// The operands.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// folder to write to: it gets `completions` and `man`
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    operands: Vec<OsString>,
}

impl Subcommand for GenerateArgs {
    const NAME: &'static str = "generate";
    const ABOUT: &'static str = "Make the completions of shells, and manual pages, for packages";
    const HIDDEN: bool = true;
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
            write(completions.join(name), &completion::script(shell, &whole))?;
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

/// An option whose help says all that its value may be.
fn explained(arg: Arg) -> Arg {
    let short = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let help = arg.get_long_help().map_or(short, ToString::to_string);
    match completion::words(known(&arg).takes) {
        Some(words) if !words.iter().all(|word| help.contains(word)) => {
            arg.long_help(format!("{help}\n\none of: {}", words.join(", ")))
        }
        _ => arg,
    }
}

/// The whole command line.
fn described(program: &Program) -> Command {
    let subcommands = rows(program).filter(|row| !row.hidden).map(|row| {
        let command = (row.command)().about(row.about).after_long_help(format!("EXAMPLE:\n{}", row.example));
        let usage = row.usage.join(" ");
        trust::args()
            .into_iter()
            .fold(command, |command, arg| command.mut_arg(arg.get_id().clone(), |arg| arg.hide(false)))
            .mut_args(explained)
            .override_usage(format!("vimg {} {usage}", row.name))
    });
    let about = "Works on the disk images of virtual machines, with the command line of qemu-img";
    let usage = "vimg [options] COMMAND [command options]";
    help::standard_options()
        .override_usage(usage)
        .about(about)
        .version(env!("CARGO_PKG_VERSION"))
        .subcommands(subcommands)
}
