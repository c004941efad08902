//! How an image is named: a plain file name, `file:NAME`, `json:{...}`, or a list of options (`--image-opts`).
//!
//! Invariants: an [`OptionTree`] is flat, its keys are dotted (`file.filename`, `children.0.driver`), its values
//! are scalars, or an empty list or object. Trees typed as JSON are flattened when they are read, so that the
//! same tree means the same whichever way it was typed.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use serde_json::{Map, Value};

use super::keys::{self, OptionTree};
use super::{Error, Result, jsonish};

/// How an image is named.
#[derive(Debug, Clone, PartialEq)]
pub enum ImageRef {
    /// As typed: a file name, perhaps with a protocol, perhaps `json:{...}`.
    Name(OsString),
    /// A list of options, and the text it was read from (for messages).
    Tree(OptionTree, String),
}

impl ImageRef {
    /// A plain name.
    pub fn name(name: impl Into<OsString>) -> Self {
        Self::Name(name.into())
    }

    /// The argument of `--image-opts`: `key=value,...` with dotted keys, `,,` for a comma. A bare first word
    /// refers to a node. Warnings for the user come back beside it, each with the
    /// line below it.
    pub fn image_opts(text: &str) -> Result<(Self, Vec<(String, String)>)> {
        let list = keys::parse_list(text, Some("file"));
        let mut tree = OptionTree::new();
        for (key, value) in list.pairs {
            if key == "id" {
                check_id(&value)?;
            }
            tree.shift_remove(&key);
            tree.insert(key, Value::String(value));
        }
        Ok((Self::Tree(tree, text.to_owned()), list.warnings))
    }

    /// As it was typed, for messages.
    pub fn shown(&self) -> String {
        match self {
            Self::Name(name) => name.to_string_lossy().into_owned(),
            Self::Tree(_, text) => text.clone(),
        }
    }
}

/// Refuses what is no identifier.
pub fn check_id(id: &str) -> Result<()> {
    let good = id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
    if good {
        return Ok(());
    }
    Err(Error::invalid("Parameter 'id' expects an identifier")
        .hint("Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."))
}

/// The tree of a `json:{...}` name (without the prefix).
pub fn parse_json(text: &str) -> Result<OptionTree> {
    let value =
        jsonish::parse(text).map_err(|error| Error::invalid(format!("Could not parse the JSON options: {error}")))?;
    let Value::Object(object) = value else { return Err(Error::invalid("Invalid JSON object given")) };
    Ok(flatten(object))
}

/// Nested objects and lists become dotted keys.
pub fn flatten(object: Map<String, Value>) -> OptionTree {
    let mut flat = OptionTree::new();
    for (key, value) in object {
        flatten_into(&mut flat, key, value);
    }
    flat
}

fn flatten_into(flat: &mut OptionTree, key: String, value: Value) {
    match value {
        Value::Object(object) if !object.is_empty() => {
            for (inner, value) in object {
                flatten_into(flat, format!("{key}.{inner}"), value);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for (index, value) in list.into_iter().enumerate() {
                flatten_into(flat, format!("{key}.{index}"), value);
            }
        }
        value => {
            flat.insert(key, value);
        }
    }
}

/// Takes out the options below `prefix` (`file` takes `file.x` and gives `x`).
pub fn take_below(tree: &mut OptionTree, prefix: &str) -> OptionTree {
    let mut below = OptionTree::new();
    let keys: Vec<String> =
        tree.keys().filter(|key| key.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.'))).cloned().collect();
    for key in keys {
        if let Some(value) = tree.shift_remove(&key) {
            below.insert(key[prefix.len() + 1..].to_owned(), value);
        }
    }
    below
}

/// The order in which the reference keeps members of an object: that of a hash of 512 buckets, the member that
/// was inserted last first within a bucket.
pub fn bucket(key: &str) -> u32 {
    let bytes = key.as_bytes();
    let mut hash = 0x238F_13AF_u32.wrapping_mul(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    for (index, byte) in bytes.iter().enumerate() {
        hash = hash.wrapping_add(u32::from(*byte) << ((5 * index) % 24));
    }
    1_103_515_243_u32.wrapping_mul(hash).wrapping_add(12345) % 512
}

/// The members of an object in that order.
pub fn in_order(object: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut members: Vec<_> = object.iter().collect();
    members.reverse();
    members.sort_by_key(|(key, _)| bucket(key));
    members
}

/// The key that the reference would meet first.
pub fn first_key(tree: &OptionTree) -> Option<&str> {
    in_order(tree).first().map(|(key, _)| key.as_str())
}

/// A JSON value on one line, as the reference writes a `json:` name: ordered members, `": "`, `", "`.
pub fn to_json(value: &Value) -> String {
    let mut out = String::new();
    write_json(value, &mut out);
    out
}

fn write_json(value: &Value, out: &mut String) {
    match value {
        Value::Object(object) => {
            out.push('{');
            for (n, (key, value)) in in_order(object).into_iter().enumerate() {
                if n > 0 {
                    out.push_str(", ");
                }
                quote(key, out);
                out.push_str(": ");
                write_json(value, out);
            }
            out.push('}');
        }
        Value::Array(list) => {
            out.push('[');
            for (n, value) in list.iter().enumerate() {
                if n > 0 {
                    out.push_str(", ");
                }
                write_json(value, out);
            }
            out.push(']');
        }
        Value::String(text) => quote(text, out),
        other => out.push_str(&other.to_string()),
    }
}

/// A JSON string as the reference writes it: everything but printable ASCII is escaped.
pub fn quote(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04X}"));
                }
            }
        }
    }
    out.push('"');
}

/// The protocol that a name starts with, and the rest. A `/` before the first `:` makes it a plain path.
pub fn protocol(name: &OsStr) -> Option<(&OsStr, &OsStr)> {
    let bytes = name.as_bytes();
    let colon = bytes.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    if bytes.get(colon) != Some(&b':') {
        return None;
    }
    let (before, rest) = bytes.split_at(colon);
    Some((OsStr::from_bytes(before), OsStr::from_bytes(rest.get(1..).unwrap_or_default())))
}

/// A name without `json:` before it, or the text after it.
pub fn json_text(name: &OsStr) -> Option<String> {
    let rest = name.as_bytes().strip_prefix(b"json:")?;
    Some(String::from_utf8_lossy(rest).into_owned())
}

/// A name found in an image that has itself that plain name. Textual, as the reference does it. Nothing if the
/// name is relative, and to what cannot be told.
pub fn beside(image: Option<&OsStr>, name: &OsStr) -> Option<OsString> {
    if name.as_bytes().starts_with(b"/") || protocol(name).is_some() {
        return Some(name.to_owned());
    }
    literally_beside(image, name)
}

/// The same for a name that is never taken for a protocol.
pub fn literally_beside(image: Option<&OsStr>, name: &OsStr) -> Option<OsString> {
    if name.as_bytes().starts_with(b"/") {
        return Some(name.to_owned());
    }
    let image = image?.as_bytes();
    let folder = image.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    let mut path = image.get(..folder).unwrap_or_default().to_vec();
    path.extend_from_slice(name.as_bytes());
    Some(OsString::from_vec(path))
}

/// Where a backing file is that an image names: as [`beside`] says, or, where nothing is there and the image's name is
/// a symbolic link, beside what that leads to.
pub fn find_beside(image: Option<&OsStr>, name: &OsStr) -> Option<OsString> {
    if protocol(name).is_some() { beside(image, name) } else { find_literally_beside(image, name) }
}

/// The same for a name that is never taken for a protocol.
pub fn find_literally_beside(image: Option<&OsStr>, name: &OsStr) -> Option<OsString> {
    let first = literally_beside(image, name)?;
    if name.as_bytes().starts_with(b"/") || Path::new(&first).symlink_metadata().is_ok() {
        return Some(first);
    }
    let target = image.and_then(|image| std::fs::canonicalize(image).ok());
    let second = target.and_then(|target| literally_beside(Some(target.as_os_str()), name));
    Some(second.filter(|second| Path::new(second).exists()).unwrap_or(first))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn members_stand_in_the_order_of_the_hash() {
        let node = json!({"virtual-size": 1, "filename": 1, "format": 1, "actual-size": 1, "dirty-flag": 1,
            "cluster-size": 1, "snapshots": 1, "format-specific": 1, "full-backing-filename": 1, "encrypted": 1,
            "backing-filename": 1, "backing-filename-format": 1, "children": 1});
        let names: Vec<_> = in_order(node.as_object().unwrap()).into_iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(
            names,
            [
                "children",
                "backing-filename-format",
                "snapshots",
                "virtual-size",
                "filename",
                "cluster-size",
                "format",
                "actual-size",
                "format-specific",
                "full-backing-filename",
                "encrypted",
                "backing-filename",
                "dirty-flag"
            ]
        );
        let shown = to_json(&json!({"driver": "raw", "size": "512", "offset": 1,
            "file": {"filename": "ü\"\u{7f}", "driver": "file"}}));
        let offset_first = r#"{"offset": 1, "driver": "raw", "size": "512", "file": "#;
        assert_eq!(shown, offset_first.to_owned() + r#"{"driver": "file", "filename": "\u00FC\"\u007F"}}"#);
    }

    #[test]
    fn names_with_and_without_a_protocol() {
        let split =
            |name: &'static str| protocol(OsStr::new(name)).map(|(a, b)| (a.to_str().unwrap(), b.to_str().unwrap()));
        assert_eq!(split("file:a:b"), Some(("file", "a:b")));
        assert_eq!(split(":a"), Some(("", "a")));
        assert_eq!(split("./a:b"), None);
        assert_eq!(split("a"), None);
        let seen =
            |image: &str, name: &str| beside(Some(OsStr::new(image)), OsStr::new(name)).unwrap().into_string().unwrap();
        assert_eq!(seen("sub/x", "../a"), "sub/../a");
        assert_eq!(seen("x", "a"), "a");
        assert_eq!(seen("/d/x", "/a"), "/a");
        assert_eq!(seen("sub/x", "json:{}"), "json:{}");
        assert_eq!(seen("sub/x", "./a:b"), "sub/./a:b");
        assert_eq!(beside(None, OsStr::new("a")), None);
    }

    #[test]
    fn trees_are_flat_however_they_are_typed() {
        let tree = parse_json(r#"{"driver":"raw","file":{"driver":"file","x":[1,{"y":null}],"z":{}}}"#).unwrap();
        let keys: Vec<_> = tree.keys().map(String::as_str).collect();
        assert_eq!(keys, ["driver", "file.driver", "file.x.0", "file.x.1.y", "file.z"]);
        let (ImageRef::Tree(tree, _), warnings) = ImageRef::image_opts("a,,b,file.filename=c,,d,nox,y").unwrap() else {
            panic!("a tree");
        };
        assert_eq!(Value::Object(tree), json!({"file": "a,b", "file.filename": "c,d", "x": "off", "y": "on"}));
        assert_eq!(warnings.len(), 2);
    }
}
