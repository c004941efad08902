//! `--output=json`: four blanks a level, members in the reference's order, empty lists and objects on two lines.

use serde_json::Value;

use super::output::JSON_VERSION;
use crate::block::name::{in_order, quote};

/// The value on lines of its own, without a newline at the end.
pub fn pretty(value: &Value) -> String {
    let mut out = String::new();
    write(value, 0, &mut out);
    out
}

/// The object of a result: the version of its form, the subcommand, and members, in that order.
pub fn result(command: &str, members: Value) -> String {
    let mut object = serde_json::Map::new();
    object.insert("version".to_owned(), JSON_VERSION.into());
    object.insert("command".to_owned(), command.into());
    if let Value::Object(members) = members {
        object.extend(members);
    }
    serde_json::to_string_pretty(&Value::Object(object)).unwrap_or_default()
}

fn write(value: &Value, level: usize, out: &mut String) {
    match value {
        Value::Object(object) => {
            out.push('{');
            let mut separator = "";
            for (key, value) in in_order(object) {
                out.push_str(separator);
                line(level + 1, out);
                quote(key, out);
                out.push_str(": ");
                write(value, level + 1, out);
                separator = ",";
            }
            line(level, out);
            out.push('}');
        }
        Value::Array(list) => {
            out.push('[');
            let mut separator = "";
            for value in list {
                out.push_str(separator);
                line(level + 1, out);
                write(value, level + 1, out);
                separator = ",";
            }
            line(level, out);
            out.push(']');
        }
        Value::String(text) => quote(text, out),
        other => out.push_str(&other.to_string()),
    }
}

fn line(level: usize, out: &mut String) {
    out.push('\n');
    out.extend(std::iter::repeat_n("    ", level));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_reference_s_layout() {
        let value = json!({"virtual-size": 512, "filename": "ü", "children": [{"name": "file",
            "info": {"children": [], "format-specific": {"type": "file", "data": {}}}}], "dirty-flag": false});
        let expected = r#"{
    "children": [
        {
            "name": "file",
            "info": {
                "children": [
                ],
                "format-specific": {
                    "type": "file",
                    "data": {
                    }
                }
            }
        }
    ],
    "virtual-size": 512,
    "filename": "\u00FC",
    "dirty-flag": false
}"#;
        assert_eq!(pretty(&value), expected);
    }
}
