//! `--trace`: understood as the reference understands it, but there are no trace events to choose from.

use super::{Complaint, Program};

/// Keys that a trace option knows; a first word without key is `enable`.
const KEYS: &[&str] = &["enable", "events", "file"];

/// Says what is wrong with a trace option, and that there is nothing to trace.
pub fn apply(program: &Program, spec: &str) -> anyhow::Result<()> {
    let mut pairs = Vec::new();
    for (n, part) in spec.split(',').enumerate() {
        let (key, value) = match part.split_once('=') {
            Some(pair) => pair,
            None if n == 0 => ("enable", part),
            None => (part, "on"),
        };
        if !KEYS.contains(&key) {
            return Err(Complaint::value(format!("Invalid parameter '{key}'")).into());
        }
        pairs.push((key, value));
    }
    for (key, value) in pairs {
        match (key, value.trim_start_matches('-')) {
            ("enable", "help" | "?" | "") => {}
            ("enable", pattern) if pattern.contains('*') => {}
            ("enable", event) => program.warn(&format!("trace event '{event}' does not exist")),
            _ => program.warn(&format!("there are no trace events: '{key}={value}' has no effect")),
        }
    }
    Ok(())
}
