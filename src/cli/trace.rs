//! `--trace`: understood as the reference understands it, but there are no trace events to choose from.

use super::{Complaint, Program};
use crate::block::keys;

/// Keys that a trace option knows.
const KEYS: &[&str] = &["enable", "events", "file"];

/// Says what is wrong with a trace option, and that there is nothing to trace.
pub fn apply(program: &Program, spec: &str) -> anyhow::Result<()> {
    let list = keys::parse_list(spec, Some("enable"));
    list.warnings.iter().for_each(|(warning, hint)| program.deprecated(warning, hint));
    if let Some((key, _)) = list.pairs.iter().find(|(key, _)| !KEYS.contains(&key.as_str())) {
        return Err(Complaint::value(format!("Invalid parameter '{key}'")).into());
    }
    for key in KEYS {
        // Of several the last one counts.
        let Some((_, value)) = list.pairs.iter().rev().find(|(other, _)| other == key) else { continue };
        match (*key, value.trim_start_matches('-')) {
            ("enable", "help" | "?") => {}
            ("enable", pattern) if pattern.contains('*') => {}
            ("enable", event) => program.warn(&format!("trace event '{event}' does not exist")),
            _ => program.warn(&format!("there are no trace events: '{key}={value}' has no effect")),
        }
    }
    Ok(())
}
