//! `--object`: `TYPE,id=NAME,property=value` or the same as JSON. Secrets are kept for the images that need them.
//!
//! Of the reference's other types those are taken that change nothing here; the rest are refused by name.

use serde_json::Value;

use super::{Complaint, Program};
use crate::block::jsonish;
use crate::block::keys::{self, Dialect, Item};
use crate::block::{SecretBytes, Secrets};
use crate::codec::base64;
use crate::storage::error::strerror;

#[derive(Clone, Copy)]
enum PropertyKind {
    Text,
    Integer,
    Choice(&'static str, &'static [&'static str]),
}

struct Property {
    name: &'static str,
    kind: PropertyKind,
    required: bool,
}

const fn property(name: &'static str, kind: PropertyKind) -> Property {
    Property { name, kind, required: false }
}

/// Every type; `None` for those that are not supported here. Properties in the order in which they are checked.
const TYPES: &[(&str, Option<&[Property]>)] = &[
    ("authz-list", None),
    ("authz-list-file", None),
    ("authz-simple", Some(&[Property { name: "identity", kind: PropertyKind::Text, required: true }])),
    (
        "main-loop",
        Some(&[
            property("aio-max-batch", PropertyKind::Integer),
            property("thread-pool-min", PropertyKind::Integer),
            property("thread-pool-max", PropertyKind::Integer),
        ]),
    ),
    ("pr-manager-helper", None),
    (
        "secret",
        Some(&[
            property("format", PropertyKind::Choice("QCryptoSecretFormat", &["raw", "base64"])),
            property("keyid", PropertyKind::Text),
            property("iv", PropertyKind::Text),
            property("data", PropertyKind::Text),
            property("file", PropertyKind::Text),
        ]),
    ),
    ("secret_keyring", None),
    ("thread-context", None),
    ("throttle-group", None),
    ("tls-creds-anon", None),
    ("tls-creds-psk", None),
    ("tls-creds-x509", None),
];

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
    let row = kind.as_deref().and_then(|kind| TYPES.iter().find(|(name, _)| *name == kind));
    if given.iter().any(|(_, value)| *value == PropertyValue::Help) {
        return Ok(Object::Help(row.map(|(name, _)| *name)));
    }
    let kind = kind.ok_or_else(|| Complaint::value("Parameter 'qom-type' is missing"))?;
    let (kind, properties) = row.ok_or_else(|| does_not_accept("qom-type", &kind))?;
    let unsupported = || Complaint::value(format!("Objects of type '{kind}' are not supported"));
    let properties = properties.ok_or_else(unsupported)?;
    let find = |name: &str| given.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value);
    let id = find("id").ok_or_else(|| Complaint::value("Parameter 'id' is missing"))?.text("id")?;
    for Property { name, kind, required } in properties {
        match (find(name), kind) {
            (None, _) if *required => return Err(Complaint::value(format!("Parameter '{name}' is missing"))),
            (None, _) => {}
            (Some(value), PropertyKind::Text) => drop(value.text(name)?),
            (Some(value), PropertyKind::Integer) => value.integer(name)?,
            (Some(value), PropertyKind::Choice(_, choices)) => {
                let text = value.text(name)?;
                if !choices.contains(&text.as_str()) {
                    return Err(does_not_accept(name, &text));
                }
            }
        }
    }
    let known = |key: &str| key == "qom-type" || key == "id" || properties.iter().any(|property| property.name == key);
    if let Some((key, _)) = given.iter().find(|(key, _)| !known(key)) {
        return Err(match key.split_once('.') {
            Some((head, _)) => Complaint::value(format!("Parameters '{head}.*' are unexpected")),
            None => Complaint::value(format!("Parameter '{key}' is unexpected")),
        });
    }
    let text = |name: &str| find(name).map(|value| value.text(name)).transpose();
    let object = if *kind == "secret" {
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
            _ => Err(Complaint::value(format!("Invalid parameter type for '{name}', expected: string"))),
        }
    }

    fn integer(&self, name: &str) -> Result<(), Complaint> {
        match self {
            Self::Text(text) if text.parse::<i64>().is_ok() => Ok(()),
            Self::Text(_) => Err(Complaint::value(format!("Parameter '{name}' expects integer"))),
            Self::Typed(Value::Number(number)) if number.is_i64() => Ok(()),
            _ => Err(Complaint::value(format!("Invalid parameter type for '{name}', expected: integer"))),
        }
    }
}

type Members = Vec<(String, PropertyValue)>;

fn json(text: &str) -> Result<Members, Complaint> {
    match jsonish::parse(text).map_err(|fault| Complaint::value(fault.to_string()))? {
        Value::Object(members) => {
            Ok(members.into_iter().map(|(key, value)| (key, PropertyValue::Typed(value))).collect())
        }
        _ => Err(Complaint::value("Invalid JSON object given")),
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
    let Some((name, properties)) = kind.and_then(|kind| TYPES.iter().find(|(name, _)| *name == kind)) else {
        program.println("List of user creatable objects:");
        TYPES.iter().for_each(|(name, _)| program.println(&format!("  {name}")));
        return;
    };
    let Some(properties) = properties else {
        program.println(&format!("{name} is not supported"));
        return;
    };
    program.println(&format!("{name} options:"));
    let mut lines: Vec<String> = properties
        .iter()
        .map(|property| match property.kind {
            PropertyKind::Text => format!("  {}=<string>", property.name),
            PropertyKind::Integer => format!("  {}=<int>", property.name),
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
