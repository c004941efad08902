//! Files that objects name: secrets, and what TLS wants. What is wrong with them is said in the reference's words.
//!
//! Nothing here speaks TLS: of certificates no more is looked at than whether there are any. Who does gets
//! [`TlsCredentials`].

use std::path::{Path, PathBuf};

use super::members::Members;
use super::properties::last_of;
use crate::block::{SecretBytes, TlsCredentials, TlsKind};
use crate::cli::{Complaint, secret_file};
use crate::storage::error::strerror;

/// The bytes of a file, or why there are none: `doing` and the file's name come first.
pub(super) fn read(doing: &str, file: &Path) -> Result<SecretBytes, Complaint> {
    secret_file::whole_file(file, usize::MAX).map(SecretBytes::from).map_err(|error| {
        let step = match error.raw_os_error() {
            Some(code) if code == nix::errno::Errno::EISDIR as i32 => "Error reading file",
            _ => "Failed to open file",
        };
        let file = file.display();
        Complaint::value(format!("{doing} {file}: {step} “{file}”: {}", strerror(&error)))
    })
}

/// What both types of credentials are given.
struct Credentials {
    dir: String,
    server: bool,
}

impl Credentials {
    fn of(given: &Members) -> Result<Self, Complaint> {
        let values = last_of(given);
        let text = |name: &str| values.get(name).map(|value| value.text(name)).transpose();
        let server = text("endpoint")? == Some("server");
        Ok(Self { dir: text("dir")?.unwrap_or_default().to_owned(), server })
    }

    /// The file of that name, or nothing, where it is not there and need not be.
    fn file(&self, name: &str, needed: bool) -> Result<Option<PathBuf>, Complaint> {
        let path = PathBuf::from(format!("{}/{name}", self.dir));
        match std::fs::metadata(&path) {
            Ok(_) => Ok(Some(path)),
            Err(error) if !needed && error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                let (path, why) = (path.display(), strerror(&error));
                Err(Complaint::value(format!("Unable to access credentials {path}: {why}")))
            }
        }
    }
}

/// Credentials of a kind, as they were given.
pub(super) fn tls(kind: TlsKind, given: &Members) -> Result<TlsCredentials, Complaint> {
    let Credentials { dir, server } = Credentials::of(given)?;
    let values = last_of(given);
    let verify_peer = values.get("verify-peer").is_none_or(|value| value.is_on());
    let encrypted_key = values.contains_key("passwordid");
    Ok(TlsCredentials { kind, dir: dir.into(), server, verify_peer, encrypted_key })
}

/// `tls-creds-psk`: a file of `name:key` lines, with the key in hexadecimal digits.
pub(super) fn check_shared_keys(given: &Members) -> Result<(), Complaint> {
    let credentials = Credentials::of(given)?;
    let values = last_of(given);
    let user = values.get("username").map(|user| user.text("username")).transpose()?;
    let file = credentials.file("keys.psk", true)?.unwrap_or_default();
    if credentials.server {
        return match user {
            Some(_) => Err(Complaint::value("username should not be set when endpoint=server")),
            None => Ok(()),
        };
    }
    let user = user.unwrap_or("qemu");
    let text = read("Cannot read PSK file", &file)?;
    let key =
        text.get().split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(user.as_bytes())?.strip_prefix(b":"));
    let Some(key) = key.filter(|_| !user.is_empty()) else {
        return Err(Complaint::value(format!("Username {user} not found in PSK file {}", file.display())));
    };
    let wrong = |why: &str| Err(Complaint::value(format!("Cannot set PSK client credentials: {why}")));
    match key.len() {
        _ if !key.iter().all(u8::is_ascii_hexdigit) || !key.len().is_multiple_of(2) => wrong("Error in parsing."),
        0..SHORTEST_KEY => wrong("The request is invalid."),
        _ => Ok(()),
    }
}

/// Digits of the shortest key.
const SHORTEST_KEY: usize = 8;

/// `tls-creds-x509`: certificates and keys by fixed names. The secret that is wanted to read the key, where there is one.
pub(super) fn check_certificates(given: &Members) -> Result<Option<String>, Complaint> {
    let credentials = Credentials::of(given)?;
    let sane = last_of(given).get("sanity-check").is_none_or(|value| value.is_on());
    let side = if credentials.server { "server" } else { "client" };
    let authority = credentials.file("ca-cert.pem", true)?.unwrap_or_default();
    let certificate = credentials.file(&format!("{side}-cert.pem"), credentials.server)?;
    let key = credentials.file(&format!("{side}-key.pem"), credentials.server)?;
    let values = last_of(given);
    let needs = values.get("passwordid").map(|id| id.text("passwordid")).transpose()?;
    let needs = needs.filter(|_| certificate.is_some() && key.is_some()).map(str::to_owned);
    if !sane {
        return Ok(needs);
    }
    if let Some(certificate) = certificate {
        let doing = format!("Cannot load {side} certificate");
        if !has_certificate(read(&doing, &certificate)?.get()) {
            let (file, why) = (certificate.display(), "Base64 unexpected header error.");
            return Err(Complaint::value(format!("Unable to import {side} certificate {file}: {why}")));
        }
    }
    match has_certificate(read("Cannot load CA cert list", &authority)?.get()) {
        true => Ok(needs),
        false => Err(Complaint::value(format!("Unable to import CA certificate list {}", authority.display()))),
    }
}

/// Whether there is anything of the form (RFC 7468) that certificates come in.
fn has_certificate(text: &[u8]) -> bool {
    const BEGIN: [&[u8]; 2] = [b"-----BEGIN CERTIFICATE-----", b"-----BEGIN X509 CERTIFICATE-----"];
    text.split(|byte| *byte == b'\n').any(|line| BEGIN.contains(&line.trim_ascii_end()))
}

/// `pr-manager-helper`: a socket that its program listens on.
pub(super) fn check_helper(given: &Members) -> Result<(), Complaint> {
    let values = last_of(given);
    let path = values.get("path").map(|path| path.text("path")).transpose()?.unwrap_or_default();
    if path.len() >= LONGEST_SOCKET {
        let text = format!("UNIX socket path '{path}' is too long");
        return Err(Complaint::Value(text, &["Path must be less than 108 bytes"]));
    }
    if let Err(error) = std::os::unix::net::UnixStream::connect(path) {
        return Err(Complaint::value(format!("Failed to connect to '{path}': {}", strerror(&error))));
    }
    // There is nothing here that it could do anything for.
    Err(Complaint::value("Objects of type 'pr-manager-helper' are not supported"))
}

/// Bytes of a socket's address (unix(7)).
const LONGEST_SOCKET: usize = 108;
