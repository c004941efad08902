//! Help and version texts, made from the tables: [`SUBCOMMANDS`], clap's description of the options, [`DRIVERS`].

use clap::{Arg, ArgAction, Command};

use super::{Program, Row, SUBCOMMANDS, getopt};
use crate::drivers::DRIVERS;

/// The version of the reference that vimg stands in for: shown by a link of another name, for programs that
/// parse it.
const REFERENCE: &str = "10.0.2";

/// The heading of a subcommand's options that the reference does not have: they are not abbreviated, and shown under
/// our own name alone.
pub const OWN: &str = "own";

/// Whether an option is one that the reference does not have.
pub fn is_own(arg: &Arg) -> bool {
    arg.is_hide_set() || arg.get_help_heading() == Some(OWN)
}

/// A clap command with the options that all have.
pub fn command(name: &'static str) -> Command {
    Command::new(name)
        .disable_help_flag(true)
        .disable_version_flag(true)
        .arg(Arg::new("help").short('h').long("help").action(ArgAction::Help).help("print this help and exit"))
        .args(trust())
}

/// What images may make us open: before the subcommand, or behind it. Shown by the help of the program alone.
fn trust() -> [Arg; 2] {
    [
        Arg::new("untrusted")
            .long("untrusted")
            .action(ArgAction::SetTrue)
            .help("refuse images that name other files: backing files, data files, extents"),
        Arg::new("allow")
            .long("allow")
            .value_name("DIR_OR_FILE")
            .value_parser(clap::value_parser!(std::ffi::OsString))
            .action(ArgAction::Append)
            .help("with --untrusted: images may name that file, or files in that folder"),
    ]
}

/// A clap command of a subcommand.
pub fn subcommand(name: &'static str) -> Command {
    without_own(command(name))
}

/// The same, with the options that the reference does not have hidden.
fn without_own(command: Command) -> Command {
    ["untrusted", "allow"].into_iter().fold(command, |command, id| command.mut_arg(id, |arg| arg.hide(true)))
}

/// What may stand before the subcommand.
pub fn top_level() -> Command {
    command("vimg").args([
        Arg::new("version").short('V').long("version").action(ArgAction::SetTrue).help("print the version and exit"),
        Arg::new("trace")
            .short('T')
            .long("trace")
            .value_name("TRACE")
            .action(ArgAction::Append)
            .help("choose trace events: [[enable=]PATTERN][,events=FILE][,file=FILE]"),
        Arg::new("rest")
            .value_parser(clap::value_parser!(std::ffi::OsString))
            .action(ArgAction::Append)
            .num_args(0..)
            .hide(true),
    ])
}

/// The lines of `--version`.
pub fn print_version(program: &Program) -> anyhow::Result<()> {
    let own = env!("CARGO_PKG_VERSION");
    match program.name() {
        "vimg" => program.println(&format!("vimg version {own}")),
        other => program.println(&format!("{other} version {REFERENCE} (vimg {own})")),
    }
    program.println("Copyright (c) 2026 The vimg developers");
    Ok(())
}

/// The help of the whole program.
pub fn print_program(program: &Program) -> anyhow::Result<()> {
    print_version(program)?;
    let name = program.name();
    program.print(&format!(
        "Works on the disk images of virtual machines.  Usage:\n\n  {name} [standard options] COMMAND [--help | command options]\n\nStandard options:\n"
    ));
    // What vimg adds is not shown where it stands in for the reference.
    let options = match name {
        "vimg" => top_level(),
        _ => without_own(top_level()),
    };
    print_options(program, &options);
    program.print(&format!("\nRecognized commands (see {name} COMMAND --help for the options of each):\n\n"));
    for row in SUBCOMMANDS {
        program.println(&format!("  {} - {}", row.name, row.about));
    }
    program.print("\nSupported image formats:\n\n");
    program.print(&wrapped(&DRIVERS.names().join(" "), 2, 75));
    Ok(())
}

/// The help of one subcommand.
pub fn print_subcommand(program: &Program, row: &Row, command: &Command) -> anyhow::Result<()> {
    program.print(&format!("{}.  Usage:\n\n", row.about));
    for (n, line) in row.usage.iter().enumerate() {
        let lead = if n == 0 { format!("  {} {} ", program.name(), row.name) } else { " ".repeat(8) };
        program.println(&format!("{lead}{line}"));
    }
    program.print("\nArguments:\n");
    print_options(program, command);
    Ok(())
}

/// One paragraph an option: its names on a line, what it does below.
fn print_options(program: &Program, command: &Command) {
    let shown = |arg: &&Arg| !arg.is_hide_set() && (program.is_vimg() || !is_own(arg));
    let mut args: Vec<&Arg> = command.get_arguments().filter(shown).collect();
    args.sort_by_key(|arg| arg.is_positional());
    for arg in args {
        let value = arg.get_value_names().and_then(|names| names.first()).map(|name| name.as_str());
        let mut names: Vec<String> = arg.get_short().map(|short| format!("-{short}")).into_iter().collect();
        names.extend(arg.get_long().map(|long| format!("--{long}")));
        let names = names.join(", ");
        let line = match (arg.is_positional(), getopt::takes_value(arg)) {
            (true, _) => value.unwrap_or_default().to_owned(),
            (false, true) => format!("{names} {}", value.unwrap_or("VALUE")),
            (false, false) => names,
        };
        program.println(&format!("  {line}"));
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        help.lines().for_each(|line| program.print(&wrapped(line, 5, 75)));
    }
}

/// Words in lines of at most `width` columns, each behind `indent` blanks.
fn wrapped(text: &str, indent: usize, width: usize) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.last_mut();
        match last {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if indent + line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines.iter().map(|line| format!("{}{line}\n", " ".repeat(indent))).collect()
}
