//! `-o`: lists of `key=value`, and their help.

use super::{Complaint, Program};
use crate::block::keys::{self, Dialect, Item};
use crate::block::{self, CreateOptions, Error, OptionKind, OptionSpec, OptionValue, number};

/// A list that has at least the form of one: not empty, no comma without need at its ends.
pub fn list(text: &str) -> Result<String, Complaint> {
    let commas = text.len() - text.trim_end_matches(',').len();
    if text.is_empty() || text.starts_with(',') || commas % 2 == 1 {
        return Err(Complaint::value(format!("Invalid option list: {text}")));
    }
    Ok(text.to_owned())
}

/// What stands in a list: keys with their values, and whether help is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pairs {
    /// In the order given.
    pub pairs: Vec<(String, String)>,
    /// `help` or `?` stands among them.
    pub help: bool,
}

/// Reads a list. `key` alone is `key=on`, `nokey` is `key=off`.
pub fn pairs(text: &str) -> Pairs {
    let mut found = Pairs::default();
    for item in keys::items(text, Dialect::Words) {
        match item {
            Item::Pair(key, value) => found.pairs.push((key, value)),
            Item::Word(word) if keys::is_help(&word) => found.help = true,
            Item::Word(word) => {
                let (key, on) = keys::switch(&word);
                found.pairs.push((key.to_owned(), on.to_owned()));
            }
        }
    }
    found
}

/// All `-o` lists of a command line as one; `None` where there are none.
pub fn joined(lists: &[String]) -> Option<Pairs> {
    (!lists.is_empty()).then(|| pairs(&lists.join(",")))
}

/// Gives the options their values, in the order given.
pub fn apply(given: &Pairs, options: &mut CreateOptions) -> block::Result<()> {
    for (key, text) in &given.pairs {
        let unknown = || Error::invalid(format!("Invalid parameter '{key}'"));
        let value = match options.spec(key).ok_or_else(unknown)?.kind {
            OptionKind::Text => OptionValue::Text(text.clone()),
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
    match format {
        Some(format) => program.println(&format!("Supported {format} options:")),
        None => program.println("Supported options:"),
    }
    let mut specs: Vec<&OptionSpec> = specs.iter().filter(|spec| !spec.own || program.name() == "vimg").collect();
    specs.sort_by_key(|spec| spec.name);
    for spec in specs {
        let name = format!("  {}={}", spec.name, spec.kind.shown());
        program.println(&format!("{name:24} - {}", spec.help));
    }
    if format.is_some() {
        program.print(
            "\nThe protocol level may support further options.\nSpecify the target filename to include those options.\n",
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_a_form() {
        for bad in ["", ",", ",,", ",a", "a,", "a,,,"] {
            assert_eq!(list(bad).unwrap_err().to_string(), format!("Invalid option list: {bad}"));
        }
        for good in ["a", "a,,", "a=b,c", "a=,,,,"] {
            assert!(list(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn lists_are_read() {
        let read = |text: &str| {
            let Pairs { pairs, help } = pairs(text);
            (pairs.iter().map(|(k, v)| format!("{k}|{v}")).collect::<Vec<_>>().join(" "), help)
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
            apply(&pairs(text), &mut options).map_err(|bad| bad.to_string())?;
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
