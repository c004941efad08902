//! `--object`: `TYPE,id=NAME,property=value` or the same as JSON. Secrets are kept for the images that need them.
//!
//! Of the reference's other types those are taken that change nothing here, with the checks of their properties; the
//! rest are refused by name.

mod types;

use std::collections::BTreeMap;

use serde_json::Value;

use self::types::{ELSEWHERE, MATCHES, ObjectType, POLICIES, Property, PropertyKind, Standing, TYPES, throttle_fault};
use super::{Complaint, Program};
use crate::block::jsonish;
use crate::block::keys::{self, Dialect, Item};
use crate::block::{SecretBytes, Secrets};
use crate::codec::base64;
use crate::storage::error::strerror;

const ID_RULE: &[&str] = &["Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."];

/// An object as it was given, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// The list of types, or of a type's properties, is wanted.
    Help(Option<&'static str>),
    /// A secret.
    Secret(Secret),
    /// Anything else: nothing here asks for it.
    Other {
        /// Its name.
        id: String,
    },
}

/// A secret: a passphrase or key that images refer to by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Its name.
    pub id: String,
    /// What it holds. What is encrypted is as it was given.
    pub data: SecretBytes,
    /// How it is encrypted.
    pub sealed: Option<SealedSecret>,
}

/// How a secret is encrypted with another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedSecret {
    /// The other's name.
    keyid: String,
    /// The initialisation vector, in base64.
    iv: Option<String>,
    /// Whether the encrypted bytes are in base64.
    base64: bool,
}

/// Reads the value of `--object`.
pub fn parse(text: &str) -> Result<Object, Complaint> {
    let given = if text.starts_with('{') { json(text)? } else { list(text)? };
    let kind = given.iter().find(|(key, _)| key == "qom-type").map(|(_, value)| value.text("qom-type")).transpose()?;
    let row = kind.as_deref().and_then(|kind| TYPES.iter().find(|row| row.name == kind));
    if given.iter().any(|(_, value)| *value == PropertyValue::Help) {
        return Ok(Object::Help(row.map(|row| row.name)));
    }
    let kind = kind.ok_or_else(|| Complaint::value("Parameter 'qom-type' is missing"))?;
    let find = |name: &str| given.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value);
    let id = || find("id").ok_or_else(|| Complaint::value("Parameter 'id' is missing"))?.text("id");
    let row = match row {
        Some(row) if row.standing != Standing::Listed => row,
        None if ELSEWHERE.contains(&kind.as_str()) => {
            id()?;
            return Err(Complaint::value(format!("invalid object type: {kind}")));
        }
        _ => return Err(does_not_accept("qom-type", &kind)),
    };
    let id = id()?;
    check_properties(&given, row.properties)?;
    check_together(&given, row)?;
    let text = |name: &str| find(name).map(|value| value.text(name)).transpose();
    let object = if kind == "secret" {
        let data = match (text("data")?, text("file")?) {
            (None, None) => return Err(Complaint::value("Either 'file' or 'data' must be provided")),
            (Some(_), Some(_)) => return Err(Complaint::value("'file' and 'data' are mutually exclusive")),
            (Some(data), None) => SecretBytes::from(data.into_bytes()),
            (None, Some(file)) => SecretBytes::from(read(&file)?),
        };
        let base64 = text("format")?.as_deref() == Some("base64");
        let sealed = match text("keyid")? {
            Some(keyid) => Some(SealedSecret { keyid, iv: text("iv")?, base64 }),
            None => None,
        };
        // What is encrypted is not looked at before its key.
        let data = if base64 && sealed.is_none() { decoded(data.get())? } else { data };
        Object::Secret(Secret { id: id.clone(), data, sealed })
    } else {
        Object::Other { id: id.clone() }
    };
    let letters = id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    if !(letters && id.starts_with(|c: char| c.is_ascii_alphabetic())) {
        return Err(Complaint::Value("Parameter 'id' expects an identifier".to_owned(), ID_RULE));
    }
    Ok(object)
}

/// The last of the values that each property was given.
fn last_of(given: &Members) -> BTreeMap<&str, &PropertyValue> {
    given.iter().map(|(key, value)| (key.as_str(), value)).collect()
}

/// Whether every property is there that must be, is one, and has a value that it can have.
fn check_properties(given: &Members, properties: &[Property]) -> Result<(), Complaint> {
    let mut left = last_of(given);
    left.remove("qom-type");
    left.remove("id");
    for Property { name, kind, required } in properties {
        let value = left.remove(*name);
        let head = format!("{name}.");
        let mut inner = BTreeMap::new();
        if matches!(kind, PropertyKind::Numbers | PropertyKind::Limits | PropertyKind::Rules) {
            let keys: Vec<&str> = left.keys().copied().filter(|key| key.starts_with(&head)).collect();
            inner.extend(keys.into_iter().filter_map(|key| Some((key.strip_prefix(&head)?, left.remove(key)?))));
        }
        match (kind, value) {
            (PropertyKind::Numbers | PropertyKind::Rules, Some(_)) => return Err(wrong_type(name, "array")),
            (PropertyKind::Limits, Some(_)) => return Err(wrong_type(name, "object")),
            (PropertyKind::Numbers, None) => check_numbers(name, &inner)?,
            (PropertyKind::Rules, None) => check_rules(name, &inner)?,
            (PropertyKind::Limits, None) => {
                let limit = |key: &str| properties.iter().any(|known| known.name.strip_prefix("x-") == Some(key));
                for (key, value) in inner {
                    let key = format!("{name}.{key}");
                    if !limit(&key[head.len()..]) {
                        return Err(unexpected(&key));
                    }
                    value.integer(&key)?;
                }
            }
            (_, None) if *required => return Err(Complaint::value(format!("Parameter '{name}' is missing"))),
            (_, None) => {}
            (PropertyKind::Text, Some(value)) => drop(value.text(name)?),
            (PropertyKind::Integer, Some(value)) => drop(value.integer(name)?),
            (PropertyKind::Switch, Some(value)) => value.switch(name)?,
            (PropertyKind::Choice(_, choices), Some(value)) => value.choice(name, choices)?,
        }
    }
    // In the order in which they were given.
    match given.iter().find(|(key, _)| left.contains_key(key.as_str())) {
        Some((key, _)) => Err(match key.split_once('.') {
            Some((head, _)) if properties.iter().any(|property| property.name == head) => {
                Complaint::value(format!("Parameters '{head}.*' are unexpected"))
            }
            Some((head, _)) => unexpected(head),
            None => unexpected(key),
        }),
        None => Ok(()),
    }
}

/// The elements of a list, by what stands behind its name; each with what stands behind its number.
type Elements<'a> = BTreeMap<usize, Vec<(&'a str, &'a PropertyValue)>>;

fn elements<'a>(name: &str, inner: &BTreeMap<&'a str, &'a PropertyValue>) -> Result<Elements<'a>, Complaint> {
    let mut elements = Elements::new();
    for (key, value) in inner {
        let (number, rest) = key.split_once('.').unwrap_or((*key, ""));
        let number = number.parse().map_err(|_| wrong_type(name, "array"))?;
        elements.entry(number).or_default().push((rest, *value));
    }
    match elements.keys().enumerate().find(|(n, number)| n != *number) {
        Some((n, _)) => Err(Complaint::value(format!("Parameter '{name}.{n}' missing"))),
        None => Ok(elements),
    }
}

fn check_numbers(name: &str, inner: &BTreeMap<&str, &PropertyValue>) -> Result<(), Complaint> {
    for (number, values) in elements(name, inner)? {
        let key = format!("{name}.{number}");
        for (rest, value) in values {
            if !rest.is_empty() {
                return Err(wrong_type(&key, "integer"));
            }
            // The reference has no name for it.
            u16::try_from(value.integer(&key)?).map_err(|_| Complaint::value("Parameter 'null' expects uint16_t"))?;
        }
    }
    Ok(())
}

fn check_rules(name: &str, inner: &BTreeMap<&str, &PropertyValue>) -> Result<(), Complaint> {
    for (number, values) in elements(name, inner)? {
        let key = format!("{name}.{number}");
        if values.iter().any(|(rest, _)| rest.is_empty()) {
            return Err(wrong_type(&key, "object"));
        }
        for wanted in ["match", "policy"] {
            if !values.iter().any(|(rest, _)| *rest == wanted) {
                return Err(Complaint::value(format!("Parameter '{key}.{wanted}' is missing")));
            }
        }
        for (rest, value) in values {
            match rest {
                "match" => drop(value.text(&format!("{key}.match"))?),
                "policy" => value.choice("policy", POLICIES)?,
                "format" => value.choice("format", MATCHES)?,
                _ => return Err(unexpected(&format!("{key}.{rest}"))),
            }
        }
    }
    Ok(())
}

/// What properties must be together; and whether the type can be had at all.
fn check_together(given: &Members, row: &ObjectType) -> Result<(), Complaint> {
    let values = last_of(given);
    match row.name {
        "throttle-group" => {
            let mut limits = BTreeMap::new();
            for (key, value) in &values {
                let Some(name) = key.strip_prefix("x-").or_else(|| key.strip_prefix("limits.")) else { continue };
                let value = value.integer(key)?;
                if value < 0 && key.starts_with("x-") {
                    return Err(Complaint::value("Property values cannot be negative"));
                }
                if name.ends_with("-length") && u32::try_from(value).is_err() {
                    let text = format!("{name} value must be in the range [0, 4294967295]");
                    return Err(Complaint::value(text));
                }
                limits.insert(name, value);
            }
            throttle_fault(&limits).map_or(Ok(()), |fault| Err(Complaint::value(fault)))
        }
        "thread-context" => {
            let any = |head: &str| values.keys().any(|key| key.starts_with(head));
            match any("cpu-affinity.") && any("node-affinity.") {
                true => Err(Complaint::value("Mixing CPU and node affinity not supported")),
                false => Ok(()),
            }
        }
        "tls-creds-psk" | "tls-creds-x509" if !values.contains_key("dir") => {
            Err(Complaint::value("Missing 'dir' property value"))
        }
        name if row.standing == Standing::Refused => {
            Err(Complaint::value(format!("Objects of type '{name}' are not supported")))
        }
        _ => Ok(()),
    }
}

fn wrong_type(name: &str, expected: &str) -> Complaint {
    Complaint::value(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

fn unexpected(name: &str) -> Complaint {
    Complaint::value(format!("Parameter '{name}' is unexpected"))
}

fn does_not_accept(name: &str, value: &str) -> Complaint {
    Complaint::value(format!("Parameter '{name}' does not accept value '{value}'"))
}

fn decoded(text: &[u8]) -> Result<SecretBytes, Complaint> {
    let bytes = base64::decode(text).map(SecretBytes::from);
    bytes.ok_or_else(|| Complaint::value("Base64 data contains invalid characters"))
}

fn read(file: &str) -> Result<Vec<u8>, Complaint> {
    std::fs::read(file).map_err(|error| {
        let doing = match error.raw_os_error() {
            Some(code) if code == nix::errno::Errno::EISDIR as i32 => "Error reading file",
            _ => "Failed to open file",
        };
        Complaint::value(format!("Unable to read {file}: {doing} “{file}”: {}", strerror(&error)))
    })
}

#[derive(Debug, Clone, PartialEq)]
enum PropertyValue {
    Text(String),
    Typed(Value),
    Help,
}

impl PropertyValue {
    fn text(&self, name: &str) -> Result<String, Complaint> {
        match self {
            Self::Text(text) | Self::Typed(Value::String(text)) => Ok(text.clone()),
            _ => Err(wrong_type(name, "string")),
        }
    }

    fn integer(&self, name: &str) -> Result<i64, Complaint> {
        let number = match self {
            Self::Text(text) => {
                return text.parse().map_err(|_| Complaint::value(format!("Parameter '{name}' expects integer")));
            }
            Self::Typed(value) => value.as_i64(),
            Self::Help => None,
        };
        number.ok_or_else(|| wrong_type(name, "integer"))
    }

    fn switch(&self, name: &str) -> Result<(), Complaint> {
        match self {
            Self::Text(text) if text == "on" || text == "off" => Ok(()),
            Self::Text(_) => Err(Complaint::value(format!("Parameter '{name}' expects 'on' or 'off'"))),
            Self::Typed(Value::Bool(_)) => Ok(()),
            _ => Err(wrong_type(name, "boolean")),
        }
    }

    fn choice(&self, name: &str, choices: &[&str]) -> Result<(), Complaint> {
        let text = self.text(name)?;
        if choices.contains(&text.as_str()) { Ok(()) } else { Err(does_not_accept(name, &text)) }
    }
}

type Members = Vec<(String, PropertyValue)>;

fn json(text: &str) -> Result<Members, Complaint> {
    match jsonish::parse(text).map_err(|fault| Complaint::value(fault.to_string()))? {
        Value::Object(members) => {
            let mut flat = Members::new();
            for (key, value) in members {
                let nested = |kind| matches!(kind, PropertyKind::Numbers | PropertyKind::Limits | PropertyKind::Rules);
                let mut all = TYPES.iter().flat_map(|row| row.properties);
                match all.any(|property| property.name == key && nested(property.kind)) {
                    true => flatten(key, value, &mut flat),
                    false => flat.push((key, PropertyValue::Typed(value))),
                }
            }
            Ok(flat)
        }
        _ => Err(Complaint::value("Invalid JSON object given")),
    }
}

/// What a property holds of others, by the names that they have in the other form. It is as deep as the parser lets it.
fn flatten(key: String, value: Value, flat: &mut Members) {
    match value {
        Value::Object(members) => {
            members.into_iter().for_each(|(name, value)| flatten(format!("{key}.{name}"), value, flat));
        }
        Value::Array(values) => {
            values.into_iter().enumerate().for_each(|(n, value)| flatten(format!("{key}.{n}"), value, flat));
        }
        value => flat.push((key, PropertyValue::Typed(value))),
    }
}

/// `key=value` pairs; the first may be the type alone.
fn list(text: &str) -> Result<Members, Complaint> {
    let mut members = Members::new();
    for item in keys::items(text, Dialect::Words) {
        let member = match item {
            Item::Pair(key, value) => {
                check_key(&key)?;
                (key, PropertyValue::Text(value))
            }
            Item::Word(word) if keys::is_help(&word) => (word, PropertyValue::Help),
            Item::Word(word) if members.is_empty() && !word.is_empty() => {
                ("qom-type".to_owned(), PropertyValue::Text(word))
            }
            Item::Word(word) => {
                check_key(&word)?;
                return Err(Complaint::value(format!("Expected '=' after parameter '{word}'")));
            }
        };
        members.push(member);
    }
    Ok(members)
}

/// Refuses what is no key: words that begin with a letter, or behind a dot numbers too.
fn check_key(key: &str) -> Result<(), Complaint> {
    let invalid = || Complaint::value(format!("Invalid parameter '{key}'"));
    for (n, word) in key.split('.').enumerate() {
        // Vendors' words are `__VENDOR_WORD`.
        let bare = word.strip_prefix("__").and_then(|rest| rest.split_once('_')).map_or(word, |(_, rest)| rest);
        let number = n > 0 && bare.starts_with(|c: char| c.is_ascii_digit());
        if !number && !bare.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(invalid());
        }
    }
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if key.chars().all(known) { Ok(()) } else { Err(invalid()) }
}

/// Brings the objects of a command line into being. `None`: help was asked for and shown, and nothing else is
/// to be done.
pub fn define(program: &Program, objects: &[Object]) -> anyhow::Result<Option<Secrets>> {
    let mut secrets = Secrets::default();
    for object in objects {
        let id = match object {
            Object::Help(kind) => {
                help(program, *kind);
                return Ok(None);
            }
            Object::Secret(Secret { id, .. }) | Object::Other { id } => id,
        };
        if secrets.has(id) {
            let text = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Complaint::value(text).into());
        }
        match object {
            Object::Secret(secret) => {
                keep_from_core_files();
                let data = match &secret.sealed {
                    Some(sealed) => unseal(&secrets, secret, sealed)?,
                    None => secret.data.clone(),
                };
                secrets.add(id, data);
            }
            Object::Help(_) | Object::Other { .. } => secrets.add_other(id),
        }
    }
    Ok(Some(secrets))
}

/// From here on no core file of this program is written, and nobody but root can look into it.
pub fn keep_from_core_files() {
    // Where the kernel refuses, a passphrase is still wanted.
    let _ = nix::sys::prctl::set_dumpable(false);
}

/// Decrypts a secret. Checks are in the reference's order.
fn unseal(secrets: &Secrets, secret: &Secret, sealed: &SealedSecret) -> anyhow::Result<SecretBytes> {
    let SealedSecret { keyid, iv, base64 } = sealed;
    if *keyid == secret.id {
        return Err(Complaint::value(format!("Secret with id '{keyid}' has no data")).into());
    }
    let key = secrets.bytes(keyid)?;
    let key: &[u8; 32] = key.get().try_into().map_err(|_| Complaint::value("Key should be 32 bytes in length"))?;
    let iv = iv.as_ref().ok_or_else(|| Complaint::value("IV is required to decrypt secret"))?;
    let iv = decoded(iv.as_bytes())?;
    let iv: &[u8; 16] = iv
        .get()
        .try_into()
        .map_err(|_| Complaint::value(format!("IV should be 16 bytes in length not {}", iv.get().len())))?;
    let data = if *base64 { decoded(secret.data.get())? } else { secret.data.clone() };
    Ok(data.unsealed(key, iv)?)
}

fn help(program: &Program, kind: Option<&str>) {
    let Some(ObjectType { name, properties, .. }) = kind.and_then(|kind| TYPES.iter().find(|row| row.name == kind))
    else {
        program.println("List of user creatable objects:");
        TYPES.iter().for_each(|row| program.println(&format!("  {}", row.name)));
        return;
    };
    program.println(&format!("{name} options:"));
    let mut lines: Vec<String> = properties
        .iter()
        .map(|property| match property.kind {
            PropertyKind::Text => format!("  {}=<string>", property.name),
            PropertyKind::Integer if property.name == "serial" => format!("  {}=<int32_t>", property.name),
            PropertyKind::Integer | PropertyKind::Numbers => format!("  {}=<int>", property.name),
            PropertyKind::Switch => format!("  {}=<bool>", property.name),
            PropertyKind::Limits => format!("  {}=<ThrottleLimits>", property.name),
            PropertyKind::Rules => format!("  {}=<QAuthZListRule>", property.name),
            PropertyKind::Choice(type_name, _) => format!("  {}=<{type_name}>", property.name),
        })
        .collect();
    lines.sort();
    lines.iter().for_each(|line| program.println(line));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn bad(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn bad_objects_are_told_apart_as_the_reference_does() {
        for (text, answer) in [
            ("", "Parameter 'qom-type' is missing"),
            ("id=x", "Parameter 'qom-type' is missing"),
            ("foo", "Parameter 'qom-type' does not accept value 'foo'"),
            ("secret", "Parameter 'id' is missing"),
            ("secret,bogus=x", "Parameter 'id' is missing"),
            ("secret,id=s", "Either 'file' or 'data' must be provided"),
            ("secret,id=s,data=x,file=y", "'file' and 'data' are mutually exclusive"),
            ("secret,id=s,bogus=x", "Parameter 'bogus' is unexpected"),
            ("secret,id=s,data.x=1", "Parameters 'data.*' are unexpected"),
            ("secret,id=s,data", "Expected '=' after parameter 'data'"),
            ("help,x", "Expected '=' after parameter 'x'"),
            ("secret,,id=s", "Invalid parameter ''"),
            ("secret,id=s,=x", "Invalid parameter ''"),
            ("secret,id=1,data=a", "Parameter 'id' expects an identifier"),
            ("secret,id=s,data=x,format=foo", "Parameter 'format' does not accept value 'foo'"),
            (
                "secret,id=s,file=/no/file",
                "Unable to read /no/file: Failed to open file “/no/file”: No such file or directory",
            ),
            ("authz-simple,id=a", "Parameter 'identity' is missing"),
            ("main-loop,id=m,aio-max-batch=x", "Parameter 'aio-max-batch' expects integer"),
            (r#"{"qom-type":"secret","id":"s","data":1}"#, "Invalid parameter type for 'data', expected: string"),
            (r#"{"id":"x"}"#, "Parameter 'qom-type' is missing"),
        ] {
            assert_eq!(bad(text), answer, "{text}");
        }
    }

    #[test]
    fn good_objects() {
        let Ok(Object::Secret(secret)) = parse("secret,id=s,data=a,,b") else { panic!("a secret") };
        assert_eq!((secret.id.as_str(), secret.data.get()), ("s", &b"a,b"[..]));
        let Ok(Object::Secret(secret)) = parse("secret,id=s,data=YQ==,format=base64") else { panic!("a secret") };
        assert_eq!(secret.data.get(), b"a");
        assert!(parse(r#"{"qom-type":"secret","id":"s","data":"abc"}"#).is_ok());
        assert!(parse("secret,data=x,data=y,id=s,").is_ok());
        assert_eq!(parse("x,help"), Ok(Object::Help(None)));
        assert_eq!(parse("secret,help"), Ok(Object::Help(Some("secret"))));
        assert_eq!(parse("authz-simple,id=a,identity=b"), Ok(Object::Other { id: "a".into() }));
    }
}
