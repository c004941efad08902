//! What the user typed and what the user sees.
//!
//! [`SUBCOMMANDS`] is the list of subcommands: one file each, its `mod` line and one row, with a struct that says its options (clap) and a
//! [`Subcommand::run`] that reads like its manual page. Nothing below this stratum prints or exits.

pub mod amend;
mod arguments;
pub mod bench;
mod beside;
pub mod bitmap;
pub mod cache;
pub mod check;
pub mod checksum;
pub mod commit;
mod common;
pub mod compare;
mod completion;
mod console;
pub mod convert;
pub mod create;
pub mod dd;
mod digest;
pub mod exit;
mod generate;
mod getopt;
mod help;
mod help_on;
pub mod human;
mod ids;
pub mod info;
mod interrupt;
pub mod json;
pub mod map;
pub mod measure;
pub mod object;
pub mod options;
pub mod output;
mod passphrase;
pub mod program;
pub mod progress;
pub mod rebase;
pub mod report;
pub mod resize;
mod secret_file;
mod signals;
pub mod size;
pub mod snapshot;
pub mod source;
mod terminal;
mod trace;
mod trust;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{ArgMatches, Command};

use arguments::Makes;
use exit::Exit;
use getopt::{Style, Words};
pub use program::Program;
pub use report::Complaint;

use crate::block::nearest::nearest;

/// One subcommand: its options are the struct that implements this.
pub trait Subcommand: clap::Args {
    /// What it is called.
    const NAME: &'static str;
    /// What it does, in a line of the list of commands.
    const ABOUT: &'static str;
    /// What may follow its name; one line of help each.
    const USAGE: &'static [&'static str];
    /// The same under our own name, where options of our own are added to it.
    const OWN_USAGE: &'static [&'static str] = Self::USAGE;
    /// A command line of it, for the help and the manual.
    const EXAMPLE: &'static str;
    /// True if an operand may look like `-1M`.
    const SIGNED_OPERANDS: bool = false;
    /// True if the help does not list it.
    const HIDDEN: bool = false;
    /// True if it is none of the reference's, and so none where we are called by another name.
    const OWN: bool = false;
    /// How it ends where the value of an option is none.
    const BAD_VALUE: Exit = Exit::Failure;
    /// The files that it makes: a process that is confined may make no others.
    const MAKES: &'static [Makes] = &[];

    /// Does it.
    fn run(self, program: &Program) -> anyhow::Result<Exit>;
}

/// A row of [`SUBCOMMANDS`].
pub struct Row {
    /// What it is called.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// What may follow its name.
    pub usage: &'static [&'static str],
    /// The same under our own name, but for options of our own.
    pub own_usage: &'static [&'static str],
    /// A command line of it.
    pub example: &'static str,
    /// The help does not list it.
    pub hidden: bool,
    signed_operands: bool,
    own: bool,
    bad_value: Exit,
    makes: &'static [Makes],
    command: fn() -> Command,
    run: fn(&ArgMatches, &Program) -> anyhow::Result<Exit>,
}

/// Every subcommand, in alphabetical order.
pub const SUBCOMMANDS: &[Row] = &[
    row::<amend::AmendArgs>(),
    row::<bench::BenchArgs>(),
    row::<bitmap::BitmapArgs>(),
    row::<check::CheckArgs>(),
    row::<checksum::ChecksumArgs>(),
    row::<commit::CommitArgs>(),
    row::<compare::CompareArgs>(),
    row::<convert::ConvertArgs>(),
    row::<create::CreateArgs>(),
    row::<dd::DdArgs>(),
    row::<generate::GenerateArgs>(),
    row::<help_on::HelpArgs>(),
    row::<info::InfoArgs>(),
    row::<map::MapArgs>(),
    row::<measure::MeasureArgs>(),
    row::<rebase::RebaseArgs>(),
    row::<resize::ResizeArgs>(),
    row::<snapshot::SnapshotArgs>(),
];

const fn row<S: Subcommand>() -> Row {
    Row {
        name: S::NAME,
        about: S::ABOUT,
        usage: S::USAGE,
        own_usage: S::OWN_USAGE,
        example: S::EXAMPLE,
        hidden: S::HIDDEN,
        signed_operands: S::SIGNED_OPERANDS,
        own: S::OWN,
        bad_value: S::BAD_VALUE,
        makes: S::MAKES,
        command: || S::augment_args(help::subcommand(S::NAME)),
        run: |matches, program| S::from_arg_matches(matches)?.run(program),
    }
}

/// Runs the program with these arguments, the first being its own name.
pub fn main(argv: Vec<OsString>) -> ExitCode {
    crate::storage::host::ignore_file_size_signal();
    crate::storage::host::raise_open_files_limit();
    let mut argv = argv.into_iter();
    let mut program = Program::new(argv.next().unwrap_or_else(|| "vimg".into()));
    let outcome = dispatch(&mut program, argv.collect());
    let exit = match outcome {
        Ok(exit) => exit,
        Err(error) => {
            report::error(&program, &error);
            exit::of(&error)
        }
    };
    program.finish(exit).into()
}

fn dispatch(program: &mut Program, argv: Vec<OsString>) -> anyhow::Result<Exit> {
    let mut words = getopt::canonical(
        &help::top_level(),
        &argv,
        Style { permute: false, signed_operands: false, own: program.is_vimg() },
    );
    if let Some(at) = words.options.iter().position(|word| word == "--version") {
        // Nothing behind it is looked at.
        words = Words { options: words.options.into_iter().take(at + 1).collect(), ..Words::default() };
    }
    let Some(matches) = parse(help::top_level(), &words)? else {
        help::print_program(program, wants_long_help(&argv))?;
        return Ok(Exit::Success);
    };
    trust::apply(program, &matches)?;
    let before = matches.clone();
    for spec in matches.get_many::<String>("trace").unwrap_or_default() {
        trace::apply(program, spec)?;
    }
    if matches.get_flag("version") {
        help::print_version(program)?;
        return Ok(Exit::Success);
    }
    let mut operands = words.operands.into_iter();
    let name = operands.next().ok_or_else(|| Complaint::usage("Not enough arguments"))?;
    let name = name.to_string_lossy();
    let Some(row) = find(program, &name) else {
        return Err(not_found(program, &name).into());
    };
    program.enter(row.name);
    // Where operands may be signed, options may follow them in any case.
    let permute = row.signed_operands || std::env::var_os("POSIXLY_CORRECT").is_none();
    let style = Style { permute, signed_operands: row.signed_operands, own: program.is_vimg() };
    let argv: Vec<OsString> = operands.collect();
    let long_help = wants_long_help(&argv);
    let words = getopt::canonical(&(row.command)(), &argv, style);
    program.tell_results(output::is_own_json(&(row.command)(), &argv));
    let matches = match parse((row.command)(), &words) {
        Err(error) if error.downcast_ref::<Complaint>().is_some_and(Complaint::is_of_value) => {
            report::error(program, &error);
            return Ok(row.bad_value);
        }
        parsed => parsed?,
    };
    match matches {
        Some(matches) => {
            trust::apply(program, &matches)?;
            program.check_trust()?;
            if program.is_untrusting() {
                trust::confine(&(row.command)(), row.makes, &[&before, &matches])?;
            }
            (row.run)(&matches, program)
        }
        None => {
            help::print_subcommand(program, row, &(row.command)(), long_help)?;
            Ok(Exit::Success)
        }
    }
}

/// The subcommands that there are by the name we are called by.
pub(crate) fn rows(program: &Program) -> impl Iterator<Item = &'static Row> {
    let own = program.is_vimg();
    SUBCOMMANDS.iter().filter(move |row| own || !row.own)
}

#[cfg(test)]
fn arguments_of(row: &Row) -> Vec<String> {
    (row.command)().get_arguments().map(|arg| arg.get_id().to_string()).collect()
}

fn find(program: &Program, name: &str) -> Option<&'static Row> {
    rows(program).find(|row| row.name == name)
}

fn not_found(program: &Program, name: &str) -> Complaint {
    let meant = nearest(name, rows(program).map(|row| row.name));
    Complaint::NoCommand(name.to_owned(), meant.map(str::to_owned))
}

/// Whether the help that is asked for is all that there is.
fn wants_long_help(argv: &[OsString]) -> bool {
    argv.iter().any(|word| word == "--help")
}

/// What clap makes of the words; `None` if help was asked for. The first error on the line is the one reported.
fn parse(command: Command, words: &getopt::Words) -> anyhow::Result<Option<ArgMatches>> {
    use std::error::Error;
    match (command.no_binary_name(true).args_override_self(true).try_get_matches_from(words.line()), &words.error) {
        (Err(error), _) if error.kind() == clap::error::ErrorKind::DisplayHelp => Ok(None),
        (Err(error), _) if error.source().is_some_and(|source| source.is::<Complaint>()) => {
            let complaint = error.source().and_then(|source| source.downcast_ref::<Complaint>());
            Err(complaint.cloned().unwrap_or_else(|| Complaint::usage(error.to_string())).into())
        }
        (_, Some(text)) => Err(Complaint::Getopt(text.clone(), words.meant.clone()).into()),
        (Ok(matches), None) => Ok(Some(matches)),
        (Err(error), None) => Err(Complaint::usage(error.to_string().trim_end()).into()),
    }
}
