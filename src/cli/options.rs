//! `-o`: lists of `key=value`, and their help.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::builder::{OsStringValueParser, TypedValueParser};
use serde_json::{Value, json};

use super::{Complaint, Program};
use crate::block::keys::{self, Dialect, Item};
use crate::block::{self, CreateOptions, OptionKind, OptionSpec, OptionValue, number};

/// Reads a word of the command line that is a list.
pub fn lists() -> impl TypedValueParser<Value = OsString> {
    OsStringValueParser::new().try_map(|text| list(&text).map(|()| text))
}

/// Refuses a list that has not even the form of one: not empty, no comma without need at its ends.
fn list(text: &OsStr) -> Result<(), Complaint> {
    let bytes = text.as_bytes();
    let commas = bytes.iter().rev().take_while(|byte| **byte == b',').count();
    if bytes.is_empty() || bytes.starts_with(b",") || commas % 2 == 1 {
        return Err(Complaint::value(format!("Invalid option list: {}", text.display())));
    }
    Ok(())
}

/// What stands in a list: keys with their values, and whether help is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pairs {
    /// In the order given. A value may be a file's name, which need not be text.
    pub pairs: Vec<(String, OsString)>,
    /// `help` or `?` stands among them.
    pub help: bool,
}

/// Reads a list. `key` alone is `key=on`, `nokey` is `key=off`.
pub fn pairs(list: &OsStr) -> Pairs {
    // What is no text is read as one character a byte: commas and equals signs are themselves in both.
    let text =
        list.to_str().map_or_else(|| Cow::Owned(list.as_bytes().iter().copied().map(char::from).collect()), Cow::from);
    let is_text = list.to_str().is_some();
    let name = |text: String| match is_text {
        true => OsString::from(text),
        false => OsString::from_vec(text.chars().map(|c| u8::try_from(c).unwrap_or(b'?')).collect()),
    };
    let mut found = Pairs::default();
    for item in keys::items(&text, Dialect::Words) {
        match item {
            Item::Pair(key, value) => found.pairs.push((key, name(value))),
            Item::Word(word) if keys::is_help(&word) => found.help = true,
            Item::Word(word) => {
                let (key, on) = keys::switch(&word);
                found.pairs.push((key.to_owned(), on.into()));
            }
        }
    }
    found
}

/// All `-o` lists of a command line as one; `None` where there are none.
pub fn joined(lists: &[OsString]) -> Option<Pairs> {
    (!lists.is_empty()).then(|| pairs(&lists.join(OsStr::new(","))))
}

/// Gives the options their values, in the order given.
pub fn apply(given: &Pairs, options: &mut CreateOptions) -> block::Result<()> {
    for (key, value) in &given.pairs {
        let text = &*value.to_string_lossy();
        let value = match options.spec(key).ok_or_else(|| options.unknown(key))?.kind {
            OptionKind::Text => OptionValue::Text(text.to_owned()),
            OptionKind::Name => OptionValue::Name(value.clone()),
            OptionKind::Size => OptionValue::Size(number::key_size(key, text)?),
            OptionKind::Number => OptionValue::Number(number::key_number(key, text)?),
            OptionKind::Switch => OptionValue::Switch(number::key_switch(key, text)?),
        };
        options.set_typed(key, value, text)?;
    }
    Ok(())
}

/// The list of options that `-o help` shows; those that the reference does not have only under our own name. `format` where no file was named: its protocol is not known then.
pub fn help(program: &Program, specs: &[OptionSpec], format: Option<&str>) {
    if program.tells_results() {
        let list: Vec<Value> = shown(program, specs).into_iter().map(to_json).collect();
        return program.result(json!({"supported-options": list}));
    }
    match format {
        Some(format) => program.println(&format!("Supported {format} options:")),
        None => program.println("Supported options:"),
    }
    print_specs(program, specs);
    if format.is_some() {
        program.print(
            "\nThe protocol level may support further options.\nSpecify the target filename to include those options.\n",
        );
    }
}

/// Those that are shown, in their order.
fn shown<'a>(program: &Program, specs: &'a [OptionSpec]) -> Vec<&'a OptionSpec> {
    let mut specs: Vec<&OptionSpec> = specs.iter().filter(|spec| !spec.own || program.is_vimg()).collect();
    specs.sort_by_key(|spec| spec.name);
    specs
}

/// An option for programs.
fn to_json(spec: &OptionSpec) -> Value {
    let kind = match spec.kind {
        OptionKind::Text => "text",
        OptionKind::Name => "file",
        OptionKind::Size => "size",
        OptionKind::Number => "number",
        OptionKind::Switch => "switch",
    };
    let mut option = json!({"name": spec.name, "kind": kind, "help": spec.help});
    if let Some(default) = spec.default {
        option["default"] = default.into();
    }
    if !spec.choices.is_empty() {
        option["choices"] = spec.choices.into();
    }
    option
}

/// A line for each option.
pub fn print_specs(program: &Program, specs: &[OptionSpec]) {
    for spec in shown(program, specs) {
        let name = format!("  {}={}", spec.name, spec.kind.shown());
        program.println(&format!("{name:24} - {}", spec.help));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_a_form() {
        for bad in ["", ",", ",,", ",a", "a,", "a,,,"] {
            assert_eq!(list(OsStr::new(bad)).unwrap_err().to_string(), format!("Invalid option list: {bad}"));
        }
        for good in ["a", "a,,", "a=b,c", "a=,,,,"] {
            assert!(list(OsStr::new(good)).is_ok(), "{good}");
        }
    }

    #[test]
    fn lists_are_read() {
        let read = |text: &str| {
            let Pairs { pairs, help } = pairs(OsStr::new(text));
            (pairs.iter().map(|(k, v)| format!("{k}|{}", v.display())).collect::<Vec<_>>().join(" "), help)
        };
        for (text, shown, help) in [
            ("size=1M", "size|1M", false),
            ("size=1M,,nocow=on,x", "size|1M,nocow=on x|on", false),
            ("nocow", "cow|off", false),
            ("nocow=on", "nocow|on", false),
            ("x,help", "x|on", true),
            ("?", "", true),
            ("help=1", "help|1", false),
            ("nohelp", "help|off", false),
            ("a=b=c,d=", "a|b=c d|", false),
            ("=1", "|1", false),
            ("no", "|off", false),
            ("a=x,,", "a|x,", false),
            ("a,,b=1", "a|on |on b|1", false),
        ] {
            assert_eq!(read(text), (shown.to_owned(), help), "{text}");
        }
        let bytes = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        let read = pairs(&bytes(b"data_file=\xff,,\xc3\xa9,nocow"));
        assert_eq!(read.pairs, [("data_file".to_owned(), bytes(b"\xff,\xc3\xa9")), ("cow".to_owned(), "off".into())]);
    }

    #[test]
    fn values_are_checked() {
        let specs = [
            OptionSpec::new("s", OptionKind::Size, ""),
            OptionSpec::new("n", OptionKind::Number, ""),
            OptionSpec::new("b", OptionKind::Switch, ""),
            OptionSpec::new("t", OptionKind::Text, "").or("d"),
        ];
        let line = |text: &str| {
            let mut options = CreateOptions::new(&[&specs]);
            apply(&pairs(OsStr::new(text)), &mut options).map_err(|bad| bad.to_string())?;
            Ok::<_, String>(options.shown().iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(line("b=y,n=-1,s=1k"), Ok("s=1024 n=-1 b=y t=d".into()));
        assert_eq!(line("t=a,,b,t=c,,d"), Ok("t=c,,d".into()));
        assert_eq!(line("b=1"), Err("Parameter 'b' expects 'on' or 'off'".into()));
        assert_eq!(line("b=1,z"), Err("Parameter 'b' expects 'on' or 'off'".into()));
        assert_eq!(line("z,b=1"), Err("Invalid parameter 'z'".into()));
        assert_eq!(line("s"), Err("Parameter 's' expects a non-negative number below 2^64".into()));
        assert_eq!(line("s=16E"), Err("Value '16E' is out of range for parameter 's'".into()));
    }
}
