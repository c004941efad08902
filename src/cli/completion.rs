//! What shells complete, from the tables that the program itself goes by.
//!
//! For bash the script is our own: what `clap_complete` makes knows nothing of lists, and offers options where the name of a
//! file stands. In those of the other shells a word stands where a list does, for which a function of ours is put.

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

/// The drivers of the scripts; tables stand before them.
const BASH: &str = include_str!("completion.bash");
const ZSH: &str = include_str!("completion.zsh");
const FISH: &str = include_str!("completion.fish");

/// The script for a shell.
pub fn script(shell: Shell, whole: &Command) -> Vec<u8> {
    if shell == Shell::Bash {
        return bash(whole).into_bytes();
    }
    let mut text = Vec::new();
    let whole = whole.clone().mut_subcommands(|command| {
        let name = command.get_name().to_owned();
        command.mut_args(|arg| completed(&name, arg))
    });
    clap_complete::generate(shell, &mut whole.clone().mut_args(|arg| completed("", arg)), "vimg", &mut text);
    let text = String::from_utf8_lossy(&text).into_owned();
    match shell {
        Shell::Zsh => zsh(&whole, text),
        _ => fish(&whole, text),
    }
    .into_bytes()
}

/// An option with the values that it takes, or the word for a list or for the operands of `dd`.
fn completed(command: &str, arg: Arg) -> Arg {
    let values = match known(&arg).takes {
        Takes::File if command == "dd" && arg.is_positional() => vec![DD],
        Takes::File if arg.get_id() == "size" => return arg.value_hint(ValueHint::Other),
        Takes::File if command == "help" => return arg.value_hint(ValueHint::Other),
        Takes::File => return arg.value_hint(ValueHint::FilePath),
        Takes::CreateOptions | Takes::AmendOptions => {
            vec![list_of(command)]
        }
        takes => match words(takes) {
            Some(words) => words,
            // Numbers, ids, names within an image; or nothing at all.
            None if arg.get_action().takes_values() => return arg.value_hint(ValueHint::Other),
            None => return arg,
        },
    };
    arg.value_parser(PossibleValuesParser::new(values))
}

/// What stands for the list of keys that a command takes.
fn list_of(command: &str) -> &'static str {
    match command {
        "create" => "VIMG_LIST_CREATE",
        "convert" => "VIMG_LIST_CONVERT",
        "measure" => "VIMG_LIST_MEASURE",
        _ => "VIMG_LIST_AMEND",
    }
}

/// Stands for the operands of `dd`.
const DD: &str = "VIMG_DD";

/// What an option's value may be, where that can be listed.
pub fn words(takes: Takes) -> Option<Vec<&'static str>> {
    match takes {
        Takes::NewFormat => Some(new_formats()),
        Takes::Driver => Some(formats()),
        Takes::Words(words) => Some(words.to_vec()),
        _ => None,
    }
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
    if let Some(words) = words(takes) {
        return Some(format!("words {}", words.join(" ")));
    }
    Some(match takes {
        Takes::CreateOptions | Takes::AmendOptions => {
            let scope = Scope::of(name, takes).map(Scope::name).unwrap_or_default();
            format!("keys {scope} {}", says_format(command, takes).join(" "))
        }
        Takes::File => "file".to_owned(),
        // Numbers, ids, names within an image.
        _ => "nothing".to_owned(),
    })
}

/// The option that says for which format a list of that kind is.
fn says_format(command: &Command, takes: Takes) -> Vec<String> {
    let says = |arg: &&Arg| match takes {
        Takes::AmendOptions => arg.get_id() == "format",
        _ => known(arg).takes == Takes::NewFormat,
    };
    options(command).find(says).map(spellings).unwrap_or_default()
}

/// The lists that there are: what stands for each, its scope, and what says its format.
fn lists(whole: &Command) -> Vec<(&'static str, Scope, Vec<String>)> {
    let mut lists = Vec::new();
    for command in whole.get_subcommands() {
        for takes in options(command).map(|arg| known(arg).takes) {
            if let Some(scope) = Scope::of(command.get_name(), takes) {
                lists.push((list_of(command.get_name()), scope, says_format(command, takes)));
            }
        }
    }
    lists
}

/// The keys of each scope and format, `None` standing for one that is not named.
fn all_keys() -> impl Iterator<Item = (Scope, Option<&'static str>, Keys)> {
    Scope::ALL.into_iter().flat_map(|scope| {
        let of_formats =
            DRIVERS.formats.iter().map(move |format| (scope, Some(format.name()), scope.of_format(format.name())));
        // A format that is not named may be any.
        of_formats.filter(|(_, _, known)| !known.is_empty()).chain([(scope, None, scope.all())])
    })
}

/// The script of clap's, with functions for lists and for `dd`, which call each other by the names that stand for them.
fn zsh(whole: &Command, mut text: String) -> String {
    for (word, scope, says) in lists(whole) {
        text = text.replace(&format!("({word})"), &format!(" _vimg_list {} {}", scope.name(), says.join(" ")));
    }
    text = text.replace(&format!("({DD})"), "_vimg_dd");
    let keys = all_keys().map(|(scope, format, known)| {
        let specs = known.iter().map(|(key, values)| match values.is_empty() {
            true if names_file(key) => format!("{key}:file:_files"),
            true => format!("{key}:value: "),
            false => format!("{key}:value:({})", values.join(" ")),
        });
        let pattern = match format {
            Some(format) => format!("'{} {format}'", scope.name()),
            None => format!("'{} '*", scope.name()),
        };
        (pattern, specs.collect::<Vec<_>>().join("\n"))
    });
    let functions = [
        table("_vimg_keys", "\"$1 $2\"", keys).replace("echo '", "print -r -- '"),
        format!("\n_vimg_dd_keys() {{\n    print -r -- '{}'\n}}\n", dd_keys()),
        ZSH.to_owned(),
    ]
    .concat();
    // What is sourced is called by its last lines.
    match text.rfind("\nif [ \"$funcstack[1]\"") {
        Some(at) => text.insert_str(at, &functions),
        None => text.push_str(&functions),
    }
    text
}

/// Whether an option of a format names a file.
fn names_file(key: &str) -> bool {
    let creators = DRIVERS.formats.iter().filter_map(|format| format.creating());
    creators.flat_map(|create| create.options()).any(|option| option.kind == OptionKind::Name && option.name == key)
}

/// The same.
fn fish(whole: &Command, mut text: String) -> String {
    for (word, scope, says) in lists(whole) {
        let call = format!(" -a \"(__vimg_list {} {})\"", scope.name(), says.join(" "));
        text = text.replace(&format!(" -a \"{word}\\t''\""), &call);
    }
    let case = |pattern: String, of: &str| format!("        case {pattern}\n            printf '%s\\n' {of}\n");
    let (mut keys, mut key_values) = (String::new(), String::new());
    for (scope, format, known) in all_keys() {
        let pattern = format!("{} {}", scope.name(), format.unwrap_or("*"));
        let listed: Vec<&str> = known.keys().copied().collect();
        keys.push_str(&case(format!("'{pattern}'"), &listed.join(" ")));
        for (key, values) in known.iter().filter(|(_, values)| !values.is_empty()) {
            key_values.push_str(&case(format!("'{pattern} {key}'"), &values.join(" ")));
        }
    }
    text.push_str(&format!(
        "\nfunction __vimg_keys\n    switch \"$argv[1] $argv[2]\"\n{keys}    end\nend\n\
         \nfunction __vimg_key_values\n    switch \"$argv[1] $argv[2] $argv[3]\"\n{key_values}    end\nend\n"
    ));
    text.push_str(FISH);
    text.push_str(&format!("\ncomplete -c vimg -n '__fish_vimg_using_subcommand dd' -a '{}'\n", dd_keys()));
    text
}

fn quoted_or(word: Option<&str>, other: &str) -> String {
    word.map_or_else(|| other.to_owned(), |word| format!("'{word}'"))
}

/// What `dd` takes, each as it is begun.
fn dd_keys() -> String {
    dd::KEYS.map(|key| format!("{key}=")).join(" ")
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
    for (scope, format, known) in all_keys() {
        let format = quoted_or(format, "*");
        let listed: Vec<String> = known.keys().map(|key| format!("{key}=")).collect();
        keys.push((format!("'{} '{format}", scope.name()), listed.join(" ")));
        let listed = known.into_iter().filter(|(_, values)| !values.is_empty());
        key_values
            .extend(listed.map(|(key, values)| (format!("'{} '{format}' {key}'", scope.name()), values.join(" "))));
    }
    // How many operands a command has in front of its size.
    let sized = commands.iter().filter_map(|(name, command)| {
        let before = command.get_positionals().position(|operand| operand.get_id() == "size")?;
        Some((format!("'{name}'"), before.to_string()))
    });
    [
        "# Completions of vimg for bash, made by 'vimg generate'.\n".to_owned(),
        format!("\n_vimg_commands() {{\n    echo '{}'\n}}\n", names.join(" ")),
        table("_vimg_options", "$1", all_options),
        table("_vimg_operands", "$1", [("'dd'".to_owned(), dd_keys())]),
        table("_vimg_sized", "$1", sized),
        table("_vimg_takes", "\"$1 $2\"", takes),
        table("_vimg_keys", "\"$1 $2\"", keys),
        table("_vimg_key_values", "\"$1 $2 $3\"", key_values),
        BASH.to_owned(),
    ]
    .concat()
}
