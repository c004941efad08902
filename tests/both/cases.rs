//! Reads a table of cases (the form is described in [`super`]).

use std::collections::{BTreeMap, BTreeSet};

/// One step of a case.
#[derive(Debug)]
pub enum Step {
    /// Makes files.
    Setup(String),
    /// Keeps an image open.
    Hold(String),
    /// What is compared.
    Compare(String),
}

/// What vimg does where it differs on purpose.
#[derive(Debug, Default)]
pub struct Deviation {
    pub why: String,
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub present: Vec<(String, Option<String>)>,
    pub absent: Vec<String>,
}

/// One case.
#[derive(Debug, Default)]
pub struct Case {
    pub title: String,
    pub steps: Vec<Step>,
    /// Files compared by content, and their formats.
    pub content: BTreeMap<String, String>,
    /// Files not compared.
    pub ignored: BTreeSet<String>,
    pub deviation: Option<Deviation>,
}

/// Reads a table; a line that means nothing fails the test.
pub fn parse(table: &str, text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut titles = BTreeSet::new();
    for (number, line) in text.lines().enumerate() {
        let at = || format!("{table}.case, line {}: {line}", number + 1);
        if line.trim().is_empty() || line.starts_with("// ") {
            continue;
        }
        if let Some(title) = line.strip_prefix("## ") {
            assert!(titles.insert(title.to_owned()), "a second case of that title: {}", at());
            cases.push(Case { title: title.to_owned(), ..Case::default() });
            continue;
        }
        let (sign, rest) = line.split_once(' ').unwrap_or((line, ""));
        let case = cases.last_mut().unwrap_or_else(|| panic!("no case yet: {}", at()));
        let rest_owned = rest.to_owned();
        match sign {
            ":" => case.steps.push(Step::Setup(rest_owned)),
            "|" => match case.steps.last_mut() {
                Some(Step::Setup(line) | Step::Compare(line)) => *line += &format!("\n{rest}"),
                _ => panic!("no line to go on with: {}", at()),
            },
            "$" => case.steps.push(Step::Compare(rest_owned)),
            "hold" => case.steps.push(Step::Hold(rest_owned)),
            "~" => {
                let (file, format) = rest.split_once(' ').unwrap_or_else(|| panic!("no format: {}", at()));
                case.content.insert(file.to_owned(), format.to_owned());
            }
            "-" => {
                case.ignored.insert(rest_owned);
            }
            "why:" | "code:" | "out:" | "err:" | "err-:" | "has:" | "not:" => {
                let deviation = case.deviation.get_or_insert_default();
                match sign {
                    "why:" => deviation.why = rest_owned,
                    "code:" => deviation.code = rest.parse().unwrap_or_else(|_| panic!("no number: {}", at())),
                    "out:" => deviation.stdout += &format!("{rest}\n"),
                    "err-:" => deviation.stderr += rest,
                    "err:" => deviation.stderr += &format!("{rest}\n"),
                    "has:" => deviation.present.push(match rest.split_once(' ') {
                        Some((file, format)) => (file.to_owned(), Some(format.to_owned())),
                        None => (rest_owned, None),
                    }),
                    _ => deviation.absent.push(rest_owned),
                }
            }
            _ => panic!("not a line of a table: {}", at()),
        }
    }
    for case in &cases {
        assert!(case.steps.iter().any(|step| matches!(step, Step::Compare(_))), "{}: no command", case.title);
        if let Some(deviation) = &case.deviation {
            assert!(!deviation.why.is_empty(), "{}: no reason", case.title);
        }
    }
    cases
}
