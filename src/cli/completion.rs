//! What shells complete, from the tables that the program itself goes by.
//!
//! For bash the script is our own: what `clap_complete` makes knows nothing of lists, and offers options where the name of a
//! file stands. Those of the other shells complete a list's first key alone.

use std::collections::BTreeMap;
use std::ffi::OsStr;

use clap::builder::PossibleValuesParser;
use clap::{Arg, Command, ValueHint};
use clap_complete::Shell;

use super::arguments::{Takes, known, takes_value};
use super::dd;
use crate::block::{CreateOptions, Format, OptionKind, OptionSpec};
use crate::drivers::DRIVERS;
use crate::ops::create::Target;

/// What completes for each shell, and the name that it looks for.
pub const SHELLS: [(Shell, &str); 3] = [(Shell::Bash, "vimg"), (Shell::Zsh, "_vimg"), (Shell::Fish, "vimg.fish")];

/// The driver of the script for bash; tables stand before it.
const BASH: &str = include_str!("completion.bash");

/// The script for a shell.
pub fn script(shell: Shell, whole: &Command) -> Vec<u8> {
    if shell == Shell::Bash {
        return bash(whole).into_bytes();
    }
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut whole.clone(), "vimg", &mut text);
    text
}

/// An option with the values that it takes.
pub fn completed(arg: Arg) -> Arg {
    let values = match known(&arg).takes {
        Takes::NewFormat => new_formats(),
        Takes::Driver => formats(),
        Takes::Words(words) => words.to_vec(),
        Takes::CreateOptions => Scope::Convert.all().into_keys().collect(),
        Takes::AmendOptions => Scope::Amend.all().into_keys().collect(),
        Takes::File => return arg.value_hint(ValueHint::FilePath),
        Takes::Plain | Takes::Object => return arg,
    };
    arg.value_parser(PossibleValuesParser::new(values))
}

/// The formats that there are.
fn formats() -> Vec<&'static str> {
    formats_that(|_| true)
}

/// Those that can be made.
fn new_formats() -> Vec<&'static str> {
    formats_that(|format| format.creating().is_some())
}

fn formats_that(wanted: fn(&dyn Format) -> bool) -> Vec<&'static str> {
    let known = DRIVERS.formats.iter().filter(|format| wanted(**format));
    let mut names: Vec<_> = known.map(|format| format.name()).collect();
    names.sort_unstable();
    names
}

/// What keys of `key=value` are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// New images without data.
    Create,
    /// Those that are converted to.
    Convert,
    /// Images that are there.
    Amend,
}

/// The values of each key; none where they cannot be listed.
type Keys = BTreeMap<&'static str, Vec<&'static str>>;

impl Scope {
    const ALL: [Self; 3] = [Self::Create, Self::Convert, Self::Amend];

    /// How the script calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Convert => "convert",
            Self::Amend => "amend",
        }
    }

    /// What the option of that command is for.
    fn of(command: &str, takes: Takes) -> Option<Self> {
        match (takes, command) {
            (Takes::CreateOptions, "convert") => Some(Self::Convert),
            (Takes::CreateOptions, _) => Some(Self::Create),
            (Takes::AmendOptions, _) => Some(Self::Amend),
            _ => None,
        }
    }

    /// Those that a format has.
    fn of_format(self, format: &str) -> Keys {
        let options = match self {
            Self::Amend => DRIVERS.format(format).map(|format| CreateOptions::new(&[format.amend_options()])),
            _ => Target::find(DRIVERS, format, Some(OsStr::new("file"))).ok().map(|target| target.options()),
        };
        let options = options.unwrap_or_default();
        let specs = options.specs().iter().filter(|spec| self == Self::Convert || !spec.encoding);
        specs.map(|spec| (spec.name, values(spec))).collect()
    }

    /// Those of all formats.
    fn all(self) -> Keys {
        let mut all = Keys::new();
        for format in DRIVERS.formats {
            for (key, values) in self.of_format(format.name()) {
                let known = all.entry(key).or_default();
                known.extend(values);
                known.sort_unstable();
                known.dedup();
            }
        }
        all
    }
}

/// What there is to choose from.
fn values(spec: &OptionSpec) -> Vec<&'static str> {
    match (spec.kind, spec.name) {
        (OptionKind::Switch, _) => vec!["on", "off"],
        (_, "backing_fmt") if spec.choices.is_empty() => formats(),
        _ => spec.choices.to_vec(),
    }
}

/// How an option can be written.
fn spellings(arg: &Arg) -> Vec<String> {
    let short = arg.get_short().map(|short| format!("-{short}"));
    short.into_iter().chain(arg.get_long().map(|long| format!("--{long}"))).collect()
}

fn options(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| !arg.is_positional() && !arg.is_hide_set())
}

/// What follows an option, as the script reads it; `None` where nothing does.
fn follows(name: &str, command: &Command, arg: &Arg) -> Option<String> {
    if !takes_value(arg) {
        let Takes::Words(words) = known(arg).takes else { return None };
        return arg.get_action().takes_values().then(|| format!("optional {}", words.join(" ")));
    }
    let takes = known(arg).takes;
    let words = |words: &[&str]| format!("words {}", words.join(" "));
    Some(match takes {
        Takes::NewFormat => words(&new_formats()),
        Takes::Driver => words(&formats()),
        Takes::Words(list) => words(list),
        Takes::CreateOptions | Takes::AmendOptions => {
            let scope = Scope::of(name, takes).map(Scope::name).unwrap_or_default();
            let says = |arg: &&Arg| match takes {
                Takes::AmendOptions => arg.get_id() == "format",
                _ => known(arg).takes == Takes::NewFormat,
            };
            let format = options(command).find(says).map(spellings).unwrap_or_default();
            format!("keys {scope} {}", format.join(" "))
        }
        Takes::File | Takes::Plain | Takes::Object => "file".to_owned(),
    })
}

/// A function of the script: what it says to each pattern.
fn table(name: &str, of: &str, rows: impl IntoIterator<Item = (String, String)>) -> String {
    let rows: String =
        rows.into_iter().map(|(pattern, text)| format!("        {pattern}) echo '{text}' ;;\n")).collect();
    format!("\n{name}() {{\n    case {of} in\n{rows}        *) return 1 ;;\n    esac\n}}\n")
}

fn bash(whole: &Command) -> String {
    let commands: Vec<(&str, &Command)> = std::iter::once(("", whole))
        .chain(whole.get_subcommands().map(|command| (command.get_name(), command)))
        .collect();
    let names: Vec<&str> = commands.iter().map(|(name, _)| *name).filter(|name| !name.is_empty()).collect();
    let all_options = commands.iter().map(|(name, command)| {
        let spelt: Vec<String> = options(command).flat_map(spellings).collect();
        (format!("'{name}'"), spelt.join(" "))
    });
    let takes = commands.iter().flat_map(|(name, command)| {
        options(command).filter_map(move |arg| {
            let patterns: Vec<String> = spellings(arg).iter().map(|spelt| format!("'{name} {spelt}'")).collect();
            Some((patterns.join(" | "), follows(name, command, arg)?))
        })
    });
    let (mut keys, mut key_values) = (Vec::new(), Vec::new());
    for scope in Scope::ALL {
        let of_formats =
            DRIVERS.formats.iter().map(|format| (format!("'{}'", format.name()), scope.of_format(format.name())));
        // A format that is not named may be any.
        for (format, known) in of_formats.filter(|(_, known)| !known.is_empty()).chain([("*".to_owned(), scope.all())])
        {
            let listed: Vec<String> = known.keys().map(|key| format!("{key}=")).collect();
            keys.push((format!("'{} '{format}", scope.name()), listed.join(" ")));
            let listed = known.into_iter().filter(|(_, values)| !values.is_empty());
            key_values
                .extend(listed.map(|(key, values)| (format!("'{} '{format}' {key}'", scope.name()), values.join(" "))));
        }
    }
    [
        "# Completions of vimg for bash, made by 'vimg generate'.\n".to_owned(),
        format!("\n_vimg_commands() {{\n    echo '{}'\n}}\n", names.join(" ")),
        table("_vimg_options", "$1", all_options),
        table("_vimg_operands", "$1", [("'dd'".to_owned(), dd::KEYS.map(|key| format!("{key}=")).join(" "))]),
        table("_vimg_takes", "\"$1 $2\"", takes),
        table("_vimg_keys", "\"$1 $2\"", keys),
        table("_vimg_key_values", "\"$1 $2 $3\"", key_values),
        BASH.to_owned(),
    ]
    .concat()
}
