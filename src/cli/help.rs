//! Help and version texts, made from the tables: `SUBCOMMANDS`, clap's description of the options, `DRIVERS`.

use clap::{Arg, ArgAction, Command};

use super::arguments::{Group, known, takes_value};
use super::{Program, Row, rows, trust};
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
        .args(trust::args())
}

/// A clap command of a subcommand.
pub fn subcommand(name: &'static str) -> Command {
    without_own(command(name))
}

/// The same, with the options that the reference does not have hidden.
fn without_own(command: Command) -> Command {
    let ids = trust::args().map(|arg| arg.get_id().clone());
    ids.into_iter().fold(command, |command, id| command.mut_arg(id, |arg| arg.hide(true)))
}

/// What may stand before the subcommand, and all that follows.
pub fn top_level() -> Command {
    let rest = Arg::new("rest").value_parser(clap::value_parser!(std::ffi::OsString)).action(ArgAction::Append);
    standard_options().arg(rest.num_args(0..).hide(true))
}

/// What may stand before the subcommand.
pub fn standard_options() -> Command {
    command("vimg").args([
        Arg::new("version").short('V').long("version").action(ArgAction::SetTrue).help("print the version and exit"),
        Arg::new("trace")
            .short('T')
            .long("trace")
            .value_name("TRACE")
            .action(ArgAction::Append)
            .help("choose trace events: [[enable=]PATTERN][,events=FILE][,file=FILE]"),
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

/// The help of the whole program: under our own name a line a command and an option where it is short (`-h`).
pub fn print_program(program: &Program, long: bool) -> anyhow::Result<()> {
    if program.is_vimg() {
        own_help(program, long);
        return Ok(());
    }
    print_version(program)?;
    let name = program.name();
    program.print(&format!(
        "Works on the disk images of virtual machines.  Usage:\n\n  {name} [standard options] COMMAND [--help | command options]\n\nStandard options:\n"
    ));
    // What vimg adds is not shown where it stands in for the reference.
    print_options(program, &without_own(top_level()));
    program.print(&format!("\nRecognized commands (see {name} COMMAND --help for the options of each):\n\n"));
    for row in rows(program).filter(|row| !row.hidden) {
        program.println(&format!("  {} - {}", row.name, row.about));
    }
    program.print("\nSupported image formats:\n\n");
    program.print(&wrapped(&DRIVERS.names().join(" "), 2, 75));
    Ok(())
}

/// What the long help gives to try.
const EXAMPLES: [&str; 4] = [
    "vimg create -f qcow2 disk.qcow2 40G",
    "vimg info disk.qcow2",
    "vimg convert -p -O qcow2 disk.vmdk disk.qcow2",
    "vimg check -r all disk.qcow2",
];

fn own_help(program: &Program, long: bool) {
    program.print(&format!(
        "vimg {} works on the disk images of virtual machines.  Usage:\n\n  vimg [options] COMMAND [-h | --help | command options]\n",
        env!("CARGO_PKG_VERSION")
    ));
    program.print("\nCommands:\n");
    for row in rows(program).filter(|row| !row.hidden) {
        program.println(&format!("  {:10}{}", row.name, row.about));
    }
    program.print("\nOptions before the command:\n");
    let options = top_level();
    let (trusted, standard): (Vec<&Arg>, Vec<&Arg>) =
        options.get_arguments().filter(|arg| !arg.is_hide_set()).partition(|arg| is_trust(arg));
    standard.into_iter().for_each(|arg| print_option(program, arg, long));
    program.print(&format!("\n{}, before the command or behind it:\n", Group::Trust.title()));
    trusted.into_iter().for_each(|arg| print_option(program, arg, long));
    if !long {
        program.print("\n'vimg --help' tells more, 'vimg COMMAND -h' (or --help) tells of a command.\n");
        return;
    }
    let names = |title: &str, names: Vec<&str>| {
        program.print(&format!("\n{title}:\n{}", wrapped(&names.join(" "), 2, 78)));
    };
    names(
        "Formats (the README's tables say what can be done with each)",
        DRIVERS.formats.iter().map(|format| format.name()).collect(),
    );
    names("Protocols, by which images are reached", DRIVERS.protocols.iter().map(|protocol| protocol.name()).collect());
    names("Filters (by json: and --image-opts)", DRIVERS.filters.iter().map(|filter| filter.name()).collect());
    program.print(
        "\nAn option without a value is off unless it is given; 'vimg COMMAND --help' has\nthe others' defaults.\n",
    );
    program.print("\nExamples:\n");
    EXAMPLES.iter().for_each(|line| program.println(&format!("  {line}")));
}

/// The help of one subcommand: under our own name in groups, a line an option where it is short (`-h`), with an example
/// where it is long; else as the reference has it.
pub fn print_subcommand(program: &Program, row: &Row, command: &Command, long: bool) -> anyhow::Result<()> {
    program.print(&format!("{}.  Usage:\n\n", row.about));
    let usage =
        if program.is_vimg() { own_usage(row, command) } else { row.usage.iter().map(ToString::to_string).collect() };
    for (n, line) in usage.iter().enumerate() {
        let lead = if n == 0 { format!("  {} {} ", program.name(), row.name) } else { " ".repeat(8) };
        program.println(&format!("{lead}{line}"));
    }
    if !program.is_vimg() {
        program.print("\nArguments:\n");
        print_options(program, command);
        return Ok(());
    }
    for (group, args) in grouped(command) {
        program.print(&format!("\n{group}:\n"));
        args.into_iter().for_each(|arg| print_option(program, arg, long));
    }
    if long {
        program.print(&format!("\nExample:\n  {}\n", row.example));
    } else {
        program.print(&format!("\n'{} {} --help' tells more.\n", program.name(), row.name));
    }
    Ok(())
}

/// What may follow a subcommand's name, with options of our own before the line that ends with the operands.
fn own_usage(row: &Row, command: &Command) -> Vec<String> {
    let mut lines: Vec<String> = row.own_usage.iter().map(ToString::to_string).collect();
    let last = lines.pop();
    let known = |arg: &Arg| {
        let long = arg.get_long().map(|long| format!("--{long}"));
        long.is_none_or(|long| row.own_usage.iter().any(|line| line.contains(&format!("[{long}"))))
    };
    let own = command.get_arguments().filter(|arg| is_own(arg) && !known(arg));
    let mut line = String::new();
    for arg in own {
        let word = format!("[{}]", spelt(arg));
        if line.len() + word.len() > 70 {
            lines.push(std::mem::take(&mut line));
        }
        line.push_str(if line.is_empty() { "" } else { " " });
        line.push_str(&word);
    }
    lines.extend((!line.is_empty()).then_some(line));
    lines.extend(last);
    lines
}

/// The groups, each with what is in it; empty ones are left out.
fn grouped(command: &Command) -> Vec<(&'static str, Vec<&Arg>)> {
    let shown: Vec<&Arg> = command.get_arguments().filter(|arg| !arg.is_hide_set() || is_trust(arg)).collect();
    let of = |group: Group| shown.iter().copied().filter(|arg| known(arg).group == group).collect::<Vec<_>>();
    let groups = Group::ALL.map(|group| (group.title(), of(group)));
    groups.into_iter().filter(|(_, args)| !args.is_empty()).collect()
}

fn is_trust(arg: &Arg) -> bool {
    trust::args().iter().any(|other| other.get_id() == arg.get_id())
}

/// How an option is written.
fn spelt(arg: &Arg) -> String {
    let value = arg.get_value_names().and_then(|names| names.first()).map(|name| name.as_str());
    let mut names: Vec<String> = arg.get_short().map(|short| format!("-{short}")).into_iter().collect();
    names.extend(arg.get_long().map(|long| format!("--{long}")));
    let names = names.join(", ");
    match (arg.is_positional(), takes_value(arg)) {
        (true, _) => value.unwrap_or_default().to_owned(),
        (false, true) => format!("{names} {}", value.unwrap_or("VALUE")),
        (false, false) => names,
    }
}

/// One option: on a line as far as it goes, or with all that there is to say below.
fn print_option(program: &Program, arg: &Arg, long: bool) {
    const COLUMN: usize = 34;
    const WIDTH: usize = 79;
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    if long {
        program.println(&format!("  {}", spelt(arg)));
        // Its paragraphs: what it does, and what holds where it is not given.
        let help = arg.get_long_help().map_or(help, ToString::to_string);
        let lines = help.lines().filter(|line| !line.is_empty());
        return lines.for_each(|line| program.print(&wrapped(line, 6, 78)));
    }
    // What follows the first clause is for the long help.
    let first = help.lines().next().unwrap_or_default();
    let end = [": ", "; ", " ("].iter().filter_map(|mark| first.find(mark)).min().unwrap_or(first.len());
    let brief = wrapped(&first[..end], COLUMN, WIDTH);
    let spelt = format!("  {}", spelt(arg));
    match spelt.chars().count() < COLUMN {
        true => program.print(&format!("{spelt:COLUMN$}{}", brief.trim_start())),
        false => program.print(&format!("{spelt}\n{brief}")),
    }
}

/// One paragraph an option: its names on a line, what it does below.
fn print_options(program: &Program, command: &Command) {
    let shown = |arg: &&Arg| !arg.is_hide_set() && (program.is_vimg() || !is_own(arg));
    let mut args: Vec<&Arg> = command.get_arguments().filter(shown).collect();
    args.sort_by_key(|arg| arg.is_positional());
    for arg in args {
        let line = spelt(arg);
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
