//! What clap cannot do of `getopt_long`: ambiguous prefixes with their possibilities, `-f=x` whose value is `=x`,
//! `POSIXLY_CORRECT`, and that errors are found from left to right.
//!
//! The options are read from the clap command itself. The words up to the first error are put in a form that
//! clap cannot misunderstand (`--long=value`, operands after `--`); clap does the rest.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{Arg, Command};

use super::arguments::takes_value;
use super::help;
use crate::block::nearest::nearest;

/// How words are taken.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Options may follow operands.
    pub permute: bool,
    /// A word like `-1M` that follows an operand is an operand.
    pub signed_operands: bool,
    /// Options that take no value with the reference may take one (`--progress=json`).
    pub own: bool,
}

/// The command line, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// The options, one word each.
    pub options: Vec<OsString>,
    /// The operands.
    pub operands: Vec<OsString>,
    /// What is wrong with the first bad option; nothing after it was looked at.
    pub error: Option<String>,
    /// The option that was probably meant.
    pub meant: Option<String>,
}

impl Words {
    /// The line for clap.
    pub fn line(&self) -> Vec<OsString> {
        let separator = std::iter::once(OsString::from("--"));
        self.options.iter().cloned().chain(separator).chain(self.operands.iter().cloned()).collect()
    }
}

/// Sorts the words of a command line.
pub fn canonical(command: &Command, argv: &[OsString], style: Style) -> Words {
    let mut words = Words::default();
    let mut rest = argv.iter();
    while let Some(word) = rest.next() {
        let bytes = word.as_bytes();
        let signed = style.signed_operands
            && !words.operands.is_empty()
            && bytes.first() == Some(&b'-')
            && bytes.get(1).is_some_and(u8::is_ascii_digit);
        let outcome = match bytes {
            b"--" => {
                words.operands.extend(rest.cloned());
                break;
            }
            _ if signed => Err(None),
            [b'-', b'-', name @ ..] => long(command, name, style.own, &mut rest, &mut words.options).map_err(Some),
            [b'-', letters @ ..] if !letters.is_empty() => {
                short(command, letters, &mut rest, &mut words.options).map_err(Some)
            }
            _ => Err(None),
        };
        match outcome {
            Ok(()) => {}
            Err(Some(error)) => {
                words.error = Some(error);
                words.meant = meant(command, bytes);
                break;
            }
            Err(None) => {
                words.operands.push(word.clone());
                if !style.permute {
                    words.operands.extend(rest.cloned());
                    break;
                }
            }
        }
    }
    words
}

type Rest<'a> = std::slice::Iter<'a, OsString>;

/// The option that was probably meant by a word that is none.
fn meant(command: &Command, word: &[u8]) -> Option<String> {
    let name = word.strip_prefix(b"--")?.split(|byte| *byte == b'=').next()?;
    let known = long_names(command).map(|(known, _)| known).filter(|known| known.as_bytes() != name);
    nearest(&String::from_utf8_lossy(name), known).map(|meant| format!("--{meant}"))
}

/// Every long name with its option, in the order of declaration.
fn long_names(command: &Command) -> impl Iterator<Item = (&str, &Arg)> {
    command.get_arguments().filter(|arg| !arg.is_positional()).flat_map(|arg| {
        let aliases = arg.get_all_aliases().unwrap_or_default();
        arg.get_long().into_iter().chain(aliases).map(move |name| (name, arg))
    })
}

fn long(
    command: &Command,
    word: &[u8],
    own: bool,
    rest: &mut Rest<'_>,
    options: &mut Vec<OsString>,
) -> Result<(), String> {
    let (name, value) = match word.iter().position(|b| *b == b'=') {
        Some(at) => (&word[..at], Some(OsStr::from_bytes(&word[at + 1..]))),
        None => (word, None),
    };
    // The reference shows the value too, which may be a secret.
    let shown = String::from_utf8_lossy(if own { name } else { word });
    let exact = long_names(command).find(|(known, _)| known.as_bytes() == name);
    let (known, arg) = match exact {
        Some(found) => found,
        None => {
            // An option of our own is not abbreviated: it must not change what a qemu-img command line means.
            let mut candidates =
                long_names(command).filter(|(known, arg)| known.as_bytes().starts_with(name) && !help::is_own(arg));
            let first = candidates.next().ok_or_else(|| format!("unrecognized option '--{shown}'"))?;
            let others: Vec<_> = candidates.filter(|(_, arg)| arg.get_id() != first.1.get_id()).collect();
            if !others.is_empty() {
                let mut text = format!("option '--{shown}' is ambiguous; possibilities:");
                for (name, _) in std::iter::once(&first).chain(&others) {
                    text.push_str(&format!(" '--{name}'"));
                }
                return Err(text);
            }
            first
        }
    };
    let takes_value = takes_value(arg);
    let value = match (takes_value, value) {
        (false, Some(value)) if own && may_take_value(arg) => Some(value),
        (false, Some(_)) => return Err(format!("option '--{known}' doesn't allow an argument")),
        (false, None) => None,
        (true, Some(value)) => Some(value),
        (true, None) => {
            Some(rest.next().ok_or_else(|| format!("option '--{known}' requires an argument"))?.as_os_str())
        }
    };
    options.push(one_word(arg, value));
    Ok(())
}

fn short(command: &Command, letters: &[u8], rest: &mut Rest<'_>, options: &mut Vec<OsString>) -> Result<(), String> {
    let has = |arg: &&Arg, letter: char| {
        arg.get_short() == Some(letter) || arg.get_all_short_aliases().is_some_and(|all| all.contains(&letter))
    };
    let mut letters = letters;
    while let [letter, after @ ..] = letters {
        let letter = char::from(*letter);
        let arg = command
            .get_arguments()
            .find(|arg| has(arg, letter))
            .ok_or_else(|| format!("invalid option -- '{letter}'"))?;
        if takes_value(arg) {
            let value = match after {
                [] => rest.next().ok_or_else(|| format!("option requires an argument -- '{letter}'"))?.as_os_str(),
                value => OsStr::from_bytes(value),
            };
            options.push(one_word(arg, Some(value)));
            return Ok(());
        }
        options.push(one_word(arg, None));
        letters = after;
    }
    Ok(())
}

fn may_take_value(arg: &Arg) -> bool {
    arg.get_action().takes_values() && arg.get_num_args().is_none_or(|values| values.max_values() > 0)
}

/// The option as one word: `--long`, `--long=value`, or where it has no long name `-s`, `-s=value`.
fn one_word(arg: &Arg, value: Option<&OsStr>) -> OsString {
    let mut word = match (arg.get_long(), arg.get_short()) {
        (Some(long), _) => format!("--{long}"),
        (None, Some(short)) => format!("-{short}"),
        (None, None) => String::new(),
    }
    .into_bytes();
    if let Some(value) = value {
        word.push(b'=');
        word.extend_from_slice(value.as_bytes());
    }
    OsString::from_vec(word)
}

#[cfg(test)]
mod tests {
    use clap::{ArgAction, Command};

    use super::*;

    fn command() -> Command {
        Command::new("x").disable_help_flag(true).args([
            Arg::new("help").short('h').long("help").action(ArgAction::Help),
            Arg::new("backing").short('b').long("backing"),
            Arg::new("backing-format").short('F').long("backing-format").short_alias('B').alias("backing-fmt"),
            Arg::new("quiet").short('q').long("quiet").action(ArgAction::SetTrue),
            Arg::new("only").short('o').action(ArgAction::Append),
            Arg::new("files").action(ArgAction::Append),
        ])
    }

    fn sorted(line: &str, style: Style) -> (String, String, Option<String>) {
        let argv: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let words = canonical(&command(), &argv, style);
        let join = |words: &[OsString]| words.join(OsStr::new(" ")).to_string_lossy().into_owned();
        (join(&words.options), join(&words.operands), words.error)
    }

    #[test]
    fn words_are_sorted_as_getopt_sorts_them() {
        let style = Style { permute: true, signed_operands: false, own: false };
        let good = |line: &str, options: &str, operands: &str| {
            assert_eq!(sorted(line, style), (options.to_owned(), operands.to_owned(), None), "{line}");
        };
        good("a -q b", "--quiet", "a b");
        good("-qbx a", "--quiet --backing=x", "a");
        good("-b=x a", "--backing==x", "a");
        good("-b -q a", "--backing=-q", "a");
        good("-b -- a", "--backing=--", "a");
        good("-q -- -q", "--quiet", "-q");
        good("- -B raw", "--backing-format=raw", "-");
        good("--backing-f raw", "--backing-format=raw", "");
        good("--backing x", "--backing=x", "");
        good("--q --backing= -ofoo", "--quiet --backing= -o=foo", "");
        let bad = |line: &str, text: &str| assert_eq!(sorted(line, style).2.as_deref(), Some(text), "{line}");
        bad("--bogus=1", "unrecognized option '--bogus=1'");
        bad("-qZ", "invalid option -- 'Z'");
        bad("a -b", "option requires an argument -- 'b'");
        bad("--backing", "option '--backing' requires an argument");
        bad("--q=1", "option '--quiet' doesn't allow an argument");
        bad(
            "--b=1 --bogus",
            "option '--b=1' is ambiguous; possibilities: '--backing' '--backing-format' '--backing-fmt'",
        );
    }

    #[test]
    fn styles() {
        let posix = Style { permute: false, signed_operands: false, own: false };
        assert_eq!(sorted("-q a -q", posix), ("--quiet".into(), "a -q".into(), None));
        let signed = Style { permute: true, signed_operands: true, own: false };
        assert_eq!(sorted("a -1M -q", signed), ("--quiet".into(), "a -1M".into(), None));
        assert_eq!(sorted("-1M a", signed).2.as_deref(), Some("invalid option -- '1'"));
    }
}
