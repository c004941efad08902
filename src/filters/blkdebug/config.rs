//! Rules in a file: groups `[inject-error]`, `[set-state "name"]`, and below each of them lines `key = "value"`. Lines
//! that start with `#`, and empty ones, say nothing.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;

use serde_json::Value;

use super::rules::{RuleOptions, Section};
use crate::block::keys::take_text;
use crate::block::name::check_id;
use crate::block::{Error, ErrorKind, OptionTree, Result};
use crate::storage::error::strerror;

/// Most bytes of such a file.
const MOST: u64 = 1 << 20;

/// The rules of that file.
pub fn read(path: &OsStr) -> Result<Vec<RuleOptions>> {
    let failed =
        |doing: &str, error: &std::io::Error| Error::new(ErrorKind::Io, format!("{doing}: {}", strerror(error)));
    let file = File::open(path).map_err(|error| failed("Could not read blkdebug config file", &error))?;
    let mut text = Vec::new();
    file.take(MOST + 1).read_to_end(&mut text).map_err(|error| failed("Cannot read config file", &error))?;
    if text.len() as u64 > MOST {
        return Err(Error::invalid("Cannot read config file: it is too large"));
    }
    parse(&String::from_utf8_lossy(&text))
}

#[derive(Debug)]
struct Group {
    section: Section,
    options: OptionTree,
}

fn parse(text: &str) -> Result<Vec<RuleOptions>> {
    let mut ids = HashSet::new();
    let mut rules = Vec::new();
    let mut group: Option<Group> = None;
    // A line's end is part of it: that of a header which does not end is shown.
    for line in text.split_inclusive('\n') {
        if line == "\n" || line.starts_with('#') {
            continue;
        }
        if let Some((name, id)) = header(line) {
            if let Some(done) = group.take() {
                rules.push(finish(done, &mut ids)?);
            }
            let section = Section::ALL.into_iter().find(|section| section.name() == name);
            let section = section.ok_or_else(|| Error::invalid(format!("There is no option group '{name}'")))?;
            let id = id.map(|id| ("id".to_owned(), Value::from(id)));
            group = Some(Group { section, options: id.into_iter().collect() });
        } else {
            let (key, value) = pair(line).ok_or_else(|| Error::invalid("parse error"))?;
            let group = group.as_mut().ok_or_else(|| Error::invalid("no group defined"))?;
            group.options.insert(key.to_owned(), value.into());
        }
    }
    if let Some(done) = group {
        rules.push(finish(done, &mut ids)?);
    }
    Ok(rules)
}

fn finish(group: Group, ids: &mut HashSet<(&'static str, String)>) -> Result<RuleOptions> {
    let Group { section, mut options } = group;
    if let Some(id) = take_text(&mut options, "id") {
        check_id(&id)?;
        if !ids.insert((section.name(), id.clone())) {
            return Err(Error::invalid(format!("Duplicate ID '{id}' for {}", section.name())));
        }
    }
    RuleOptions::take(section, options, |key| Error::invalid(format!("Invalid parameter '{key}'")))
}

/// `[NAME]` or `[NAME "ID"`; what follows on the line says nothing.
fn header(line: &str) -> Option<(&str, Option<&str>)> {
    let rest = line.strip_prefix('[')?;
    let word = rest.split(|c: char| c.is_ascii_whitespace()).next().unwrap_or_default();
    let after = rest.get(word.len()..).unwrap_or_default();
    let id = after.trim_start().strip_prefix('"').and_then(|id| id.split_once('"')).map(|(id, _)| id);
    match id.filter(|id| !id.is_empty() && !word.is_empty()) {
        Some(id) => Some((word, Some(id))),
        None => rest.split(']').next().filter(|name| !name.is_empty()).map(|name| (name, None)),
    }
}

/// `KEY = "VALUE"`. A blank has to follow the key; what follows the value says nothing.
fn pair(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_start();
    let key = line.split(|c: char| c.is_ascii_whitespace()).next().filter(|key| !key.is_empty())?;
    let after = line.get(key.len()..).unwrap_or_default().trim_start();
    let quoted = after.strip_prefix('=').and_then(|value| value.trim_start().strip_prefix('"'));
    Some((key, quoted.and_then(|value| value.split('"').next()).unwrap_or_default()))
}
