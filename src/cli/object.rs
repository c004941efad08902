//! `--object`: `TYPE,id=NAME,property=value` or the same as JSON. Secrets are kept for the images that need them.
//!
//! Of the reference's other types those are taken that change nothing here, with the checks of their properties; the
//! rest are refused by name.

mod credentials;
mod members;
mod properties;
mod types;

use serde_json::{Value, json};

use self::credentials::{check_certificates, check_helper, check_shared_keys, read, tls};
use self::members::{Members, PropertyValue, does_not_accept, list};
use self::properties::{check_properties, check_together, last_of, throttle_limits};
use self::types::{ELSEWHERE, ObjectType, Property, PropertyKind, Standing, TYPES};
use super::{Complaint, Program, secret_file};
use crate::block::throttle::Limits;
use crate::block::{SecretBytes, Secrets, TlsCredentials, TlsKind};
use crate::codec::base64;
use crate::storage::error::strerror;
use crate::storage::keyring;

const ID_RULE: &[&str] = &["Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."];

/// An object as it was given, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// The list of types, or of a type's properties, is wanted.
    Help(Option<&'static str>),
    /// A secret.
    Secret(Secret),
    /// A throttle group.
    Throttle(String, Limits),
    /// Credentials for TLS.
    Tls {
        /// Its name.
        id: String,
        /// What they are.
        credentials: TlsCredentials,
        /// A secret that they want.
        needs: Option<String>,
    },
    /// Anything else: nothing here asks for it.
    Other {
        /// Its name.
        id: String,
        /// A secret that it wants.
        needs: Option<String>,
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
    // It may hold a secret, or name a file with one.
    secret_file::keep_from_core_files();
    let given = if text.starts_with('{') { members::json(text)? } else { list(text)? };
    let kind = given.iter().find(|(key, _)| key == "qom-type").map(|(_, value)| value.text("qom-type")).transpose()?;
    let row = kind.and_then(|kind| TYPES.iter().find(|row| row.name == kind));
    if given.iter().any(|(_, value)| *value == PropertyValue::Help) {
        return Ok(Object::Help(row.map(|row| row.name)));
    }
    let kind = kind.ok_or_else(|| Complaint::value("Parameter 'qom-type' is missing"))?;
    let id = || {
        let id = given.iter().rev().find(|(key, _)| key == "id");
        id.ok_or_else(|| Complaint::value("Parameter 'id' is missing"))?.1.text("id")
    };
    let row = match row {
        Some(row) if row.standing != Standing::Listed => row,
        None if ELSEWHERE.contains(&kind) => {
            id()?;
            return Err(Complaint::value(format!("invalid object type: {kind}")));
        }
        _ => return Err(does_not_accept("qom-type", kind, "what '--object help' lists")),
    };
    let id = id()?.to_owned();
    check_properties(&given, row)?;
    let letters = id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    if !(letters && id.starts_with(|c: char| c.is_ascii_alphabetic())) {
        return Err(Complaint::Value("Parameter 'id' expects an identifier".to_owned(), ID_RULE));
    }
    check_together(&given, row)?;
    match row.name {
        "secret" | "secret_keyring" => return Ok(Object::Secret(secret(id, &given)?)),
        "throttle-group" => return Ok(Object::Throttle(id, throttle_limits(&given)?)),
        "tls-creds-anon" => {
            return Ok(Object::Tls { id, credentials: tls(TlsKind::Anonymous, &given)?, needs: None });
        }
        "tls-creds-psk" => {
            check_shared_keys(&given)?;
            return Ok(Object::Tls { id, credentials: tls(TlsKind::SharedKeys, &given)?, needs: None });
        }
        "tls-creds-x509" => {
            let needs = check_certificates(&given)?;
            return Ok(Object::Tls { id, credentials: tls(TlsKind::Certificates, &given)?, needs });
        }
        "pr-manager-helper" => check_helper(&given)?,
        _ => {}
    }
    Ok(Object::Other { id, needs: None })
}

/// A secret, given as such, in a file, or in a keyring of the kernel.
fn secret(id: String, given: &Members) -> Result<Secret, Complaint> {
    let values = last_of(given);
    let text = |name: &str| values.get(name).map(|value| value.text(name)).transpose();
    let data = match (values.get("serial"), text("data")?, text("file")?) {
        (Some(serial), ..) => SecretBytes::from(kernel_key(serial.integer("serial")?)?),
        (None, None, None) => return Err(Complaint::value("Either 'file' or 'data' must be provided")),
        (None, Some(_), Some(_)) => return Err(Complaint::value("'file' and 'data' are mutually exclusive")),
        (None, Some(data), None) => SecretBytes::from(data.as_bytes().to_vec()),
        (None, None, Some(file)) => read("Unable to read", file.as_ref())?,
    };
    let base64 = text("format")? == Some("base64");
    let sealed = match text("keyid")? {
        Some(keyid) => Some(SealedSecret { keyid: keyid.to_owned(), iv: text("iv")?.map(str::to_owned), base64 }),
        None => None,
    };
    // What is encrypted is not looked at before its key.
    let data = if base64 && sealed.is_none() { decoded(data.get())? } else { data };
    Ok(Secret { id, data, sealed })
}

/// What a key of the kernel's holds. Its number was found to be one.
fn kernel_key(serial: i64) -> Result<Vec<u8>, Complaint> {
    let serial = i32::try_from(serial).unwrap_or_default();
    keyring::read(serial)
        .map_err(|error| Complaint::value(format!("Unable to read serial key {serial:08x}: {}", strerror(&error))))
}

fn decoded(text: &[u8]) -> Result<SecretBytes, Complaint> {
    let bytes = base64::decode(text).map(SecretBytes::from);
    bytes.ok_or_else(|| Complaint::value("Base64 data contains invalid characters"))
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
            Object::Secret(Secret { id, .. })
            | Object::Throttle(id, _)
            | Object::Tls { id, .. }
            | Object::Other { id, .. } => id,
        };
        if secrets.has(id) {
            let text = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Complaint::value(text).into());
        }
        match object {
            Object::Secret(secret) => {
                let data = match &secret.sealed {
                    Some(sealed) => unseal(&secrets, secret, sealed)?,
                    None => secret.data.clone(),
                };
                secrets.add(id, data);
            }
            Object::Help(_) => {}
            Object::Throttle(_, limits) => secrets.add_throttle_group(id, *limits),
            Object::Tls { credentials, needs, .. } => {
                needs.as_ref().map_or(Ok(()), |secret| secrets.bytes(secret).map(drop))?;
                secrets.add_tls(id, credentials.clone());
            }
            Object::Other { needs, .. } => {
                needs.as_ref().map_or(Ok(()), |secret| secrets.bytes(secret).map(drop))?;
                secrets.add_other(id);
            }
        }
    }
    Ok(Some(secrets))
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
    let row = kind.and_then(|kind| TYPES.iter().find(|row| row.name == kind));
    if program.tells_results() {
        return program.result(match row {
            Some(row) => json!({"object-type": row.name, "properties": properties_to_json(row)}),
            None => json!({"object-types": TYPES.iter().map(|row| row.name).collect::<Vec<_>>()}),
        });
    }
    let Some(ObjectType { name, properties, .. }) = row else {
        program.println("List of user creatable objects:");
        TYPES.iter().for_each(|row| program.println(&format!("  {}", row.name)));
        return;
    };
    program.println(&format!("{name} options:"));
    let mut lines: Vec<String> = properties
        .iter()
        .map(|property| match property.kind {
            PropertyKind::Text => format!("  {}=<string>", property.name),
            PropertyKind::Serial => format!("  {}=<int32_t>", property.name),
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

/// The properties of a type for programs, by name.
fn properties_to_json(row: &ObjectType) -> Vec<Value> {
    let mut properties: Vec<_> = row.properties.iter().collect();
    properties.sort_by_key(|property| property.name);
    let json = |property: &&Property| {
        let kind = match property.kind {
            PropertyKind::Text | PropertyKind::Choice(..) => "text",
            PropertyKind::Serial | PropertyKind::Integer => "number",
            PropertyKind::Switch => "switch",
            PropertyKind::Numbers => "numbers",
            PropertyKind::Limits => "limits",
            PropertyKind::Rules => "rules",
        };
        let mut object = json!({"name": property.name, "kind": kind, "required": property.required});
        if let PropertyKind::Choice(_, choices) = property.kind {
            object["choices"] = choices.into();
        }
        object
    };
    properties.iter().map(json).collect()
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
            ("foo", "Parameter 'qom-type' does not accept what it was given: it takes what '--object help' lists"),
            ("secret", "Parameter 'id' is missing"),
            ("secret,bogus=x", "Parameter 'id' is missing"),
            ("secret,id=s", "Either 'file' or 'data' must be provided"),
            ("secret,id=s,data=x,file=y", "'file' and 'data' are mutually exclusive"),
            ("secret,id=s,bogus=x", "Parameter 'bogus' is unexpected"),
            (
                "secret,id=s,data=my,bogus=x",
                "Part 4 of an object is no property of a secret: a comma in a value is written twice",
            ),
            ("authz-simple,id=a,identity=b,bogus=x", "Parameter 'bogus' is unexpected"),
            ("secret,id=s,data.x=1", "Parameters 'data.*' are unexpected"),
            ("secret,id=s,data", "Part 3 of an object has no '=': a comma in a value is written twice"),
            ("help,x", "Part 2 of an object has no '=': a comma in a value is written twice"),
            ("secret,,id=s", "Part 2 of an object has no '=': a comma in a value is written twice"),
            ("secret,id=s,=x", "Part 3 of an object does not begin with the name of a property"),
            ("secret,id=1,data=a", "Parameter 'id' expects an identifier"),
            (
                "secret,id=s,data=x,format=foo",
                "Parameter 'format' does not accept what it was given: it takes raw, base64",
            ),
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
    fn secrets_are_not_shown() {
        for text in [
            "secret,id=s,data=geheim",
            "secret,id=s,data=my,geheim",
            "secret,id=s,data=my,geheim=x",
            r#"{"qom-type":"secret","id":"s","data":"geheim"}"#,
            r#"{"qom-type":"secret","id":"s","data":geheim}"#,
        ] {
            assert!(!format!("{:?}", parse(text)).contains("geheim"), "{text}");
        }
        assert!(!format!("{:?}", list("secret,id=s,data=geheim")).contains("geheim"));
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
        assert_eq!(parse("authz-simple,id=a,identity=b"), Ok(Object::Other { id: "a".into(), needs: None }));
    }
}
