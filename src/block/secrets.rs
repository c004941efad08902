//! Secrets: passphrases and keys that options name, or that are asked for. What they hold is shown nowhere, and wiped
//! when it is dropped.
//!
//! Lock order: that of the opened keys is held for a look or an addition; whoever asks keeps its own lock while it does.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use zeroize::Zeroizing;

use super::throttle::{Limits, ThrottleGroup};
use super::{Error, Purpose, Result};

/// For images that need none.
pub static NO_SECRETS: Secrets = Secrets { objects: BTreeMap::new(), unnamed: None, opened: Mutex::new(Vec::new()) };

/// Bytes that nobody may see.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct SecretBytes(Zeroizing<Vec<u8>>);

impl SecretBytes {
    /// The bytes themselves.
    pub fn get(&self) -> &[u8] {
        &self.0
    }

    /// The same, to be changed. What it grows by may leave a copy behind: it is not to grow.
    pub(super) fn get_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }

    /// Decrypts what is encrypted with another secret: see `sealed`.
    pub fn unsealed(&self, key: &[u8; 32], iv: &[u8; 16]) -> Result<Self> {
        super::sealed::open(key, iv, self)
    }
}

impl From<Zeroizing<Vec<u8>>> for SecretBytes {
    fn from(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }
}

impl From<Vec<u8>> for SecretBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBytes")
    }
}

/// What a passphrase is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyUse {
    /// The image is read.
    Read,
    /// It is written to, or what was written is read back.
    Write,
    /// It is made.
    New,
    /// It opens with this one too from now on.
    Added,
}

impl From<Purpose> for KeyUse {
    fn from(purpose: Purpose) -> Self {
        if purpose.writes() || purpose == Purpose::ReadBack { Self::Write } else { Self::Read }
    }
}

/// Where passphrases come from that no option names: a file, or the user.
pub trait AskPassphrase: Send + Sync + fmt::Debug {
    /// The passphrase of the image with that name, or nothing, if nobody can be asked.
    fn ask(&self, image: &str, key_use: KeyUse) -> Result<Option<SecretBytes>>;
    /// Whether there is a file, or somebody, to ask.
    fn can_ask(&self) -> bool;
}

/// Credentials for TLS: files of fixed names in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsCredentials {
    /// What they are.
    pub kind: TlsKind,
    /// The folder.
    pub dir: PathBuf,
    /// They are for servers.
    pub server: bool,
    /// The other side must prove who it is.
    pub verify_peer: bool,
    /// The key needs a passphrase.
    pub encrypted_key: bool,
}

/// How the two sides of a TLS connection know each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsKind {
    /// By certificates.
    Certificates,
    /// By keys that both have.
    SharedKeys,
    /// Not at all.
    Anonymous,
}

#[derive(Debug, Clone)]
enum SecretObject {
    Secret(SecretBytes),
    Throttle(Arc<ThrottleGroup>),
    Tls(TlsCredentials),
    Other,
}

/// The objects that a command line defines, by id. Those that are no secrets are known by name alone.
#[derive(Debug, Default)]
pub struct Secrets {
    objects: BTreeMap<String, SecretObject>,
    unnamed: Option<Arc<dyn AskPassphrase>>,
    opened: Mutex<Vec<OpenedKey>>,
}

/// A key that a passphrase has got out of a header.
#[derive(Debug)]
struct OpenedKey {
    header: Vec<u8>,
    passphrase: SecretBytes,
    key: SecretBytes,
}

impl Secrets {
    /// The same, but where no secret is named that one is asked.
    pub fn or_ask(mut self, unnamed: Arc<dyn AskPassphrase>) -> Self {
        self.unnamed = Some(unnamed);
        self
    }

    /// Whether there is an object with that id.
    pub fn has(&self, id: &str) -> bool {
        self.objects.contains_key(id)
    }

    /// Adds a secret.
    pub fn add(&mut self, id: &str, bytes: SecretBytes) {
        self.objects.insert(id.to_owned(), SecretObject::Secret(bytes));
    }

    /// Adds what is no secret.
    pub fn add_other(&mut self, id: &str) {
        self.objects.insert(id.to_owned(), SecretObject::Other);
    }

    /// Adds a throttle group.
    pub fn add_throttle_group(&mut self, id: &str, limits: Limits) {
        self.objects.insert(id.to_owned(), SecretObject::Throttle(Arc::new(ThrottleGroup::new(limits))));
    }

    /// The throttle group with that id.
    pub fn throttle_group(&self, id: &str) -> Option<&Arc<ThrottleGroup>> {
        match self.objects.get(id) {
            Some(SecretObject::Throttle(group)) => Some(group),
            _ => None,
        }
    }

    /// Adds credentials for TLS.
    pub fn add_tls(&mut self, id: &str, credentials: TlsCredentials) {
        self.objects.insert(id.to_owned(), SecretObject::Tls(credentials));
    }

    /// The credentials for TLS of that id.
    pub fn tls(&self, id: &str) -> Result<&TlsCredentials> {
        match self.objects.get(id) {
            Some(SecretObject::Tls(credentials)) => Ok(credentials),
            Some(_) => Err(Error::invalid(format!("Object with id '{id}' is not TLS credentials"))),
            None => Err(Error::invalid(format!("No TLS credentials with id '{id}'"))),
        }
    }

    /// What that secret holds.
    pub fn bytes(&self, id: &str) -> Result<&SecretBytes> {
        match self.objects.get(id) {
            Some(SecretObject::Secret(bytes)) => Ok(bytes),
            Some(_) => Err(Error::invalid(format!("Object with id '{id}' is not a secret"))),
            None => Err(Error::invalid(format!("No secret with id '{id}'"))),
        }
    }

    /// The same as text.
    pub fn passphrase(&self, id: &str) -> Result<&str> {
        as_text(self.bytes(id)?.get())
            .ok_or_else(|| Error::invalid(format!("Data from secret {id} is not valid UTF-8")))
    }

    /// The passphrase of an image: the secret with that id, which the option `option` names, or, if it names none,
    /// what is asked for.
    pub fn key(&self, option: &str, id: Option<&str>, image: &str, key_use: KeyUse) -> Result<SecretBytes> {
        if let Some(id) = id {
            return Ok(self.passphrase(id)?.as_bytes().to_vec().into());
        }
        let required = || Error::invalid(format!("Parameter '{option}' is required for cipher"));
        self.asked(image, key_use)?.ok_or_else(required)
    }

    /// The passphrase of an image for which no option names a secret, if there is a file, or somebody, to ask.
    pub fn asked(&self, image: &str, key_use: KeyUse) -> Result<Option<SecretBytes>> {
        let Some(unnamed) = &self.unnamed else { return Ok(None) };
        let key = unnamed.ask(image, key_use)?;
        // An image that is there may have any; a new one must be one that other programs can say.
        let new = matches!(key_use, KeyUse::New | KeyUse::Added);
        if new && key.as_ref().is_some_and(|key| as_text(key.get()).is_none()) {
            return Err(Error::invalid(format!(
                "The passphrase for '{image}' is not valid UTF-8 without NUL: qemu-img could not open the image with it"
            )));
        }
        Ok(key)
    }

    /// The key that the passphrase got out of that very header before. It takes seconds to get at, by design: once is
    /// enough for an image that is made and then opened.
    pub fn opened(&self, header: &[u8], passphrase: &SecretBytes) -> Option<SecretBytes> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let found = opened.iter().find(|known| known.header == header && known.passphrase == *passphrase);
        found.map(|known| known.key.clone())
    }

    /// Keeps a key for [`Self::opened`].
    pub fn keep_opened(&self, header: &[u8], passphrase: &SecretBytes, key: SecretBytes) {
        let known = OpenedKey { header: header.to_vec(), passphrase: passphrase.clone(), key };
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).push(known);
    }

    /// Whether a key without an id can be had by asking.
    pub fn can_ask(&self) -> bool {
        self.unnamed.as_ref().is_some_and(|unnamed| unnamed.can_ask())
    }
}

/// A passphrase as text, in which the reference takes no NUL.
fn as_text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Asked;

    impl AskPassphrase for Asked {
        fn ask(&self, image: &str, _key_use: KeyUse) -> Result<Option<SecretBytes>> {
            Ok((image == "a").then(|| b"typed".to_vec().into()))
        }

        fn can_ask(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_secret_is_found_by_its_id_and_never_shown() {
        let mut secrets = Secrets::default();
        secrets.add("s", b"open sesame".to_vec().into());
        secrets.add("b", vec![0xff].into());
        secrets.add_other("o");
        assert_eq!(secrets.passphrase("s").ok(), Some("open sesame"));
        assert!(!format!("{secrets:?}").contains("sesame"));
        let error = |id| secrets.passphrase(id).map_err(|error| error.message()).unwrap_err();
        assert_eq!(error("b"), "Data from secret b is not valid UTF-8");
        assert_eq!(error("o"), "Object with id 'o' is not a secret");
        assert_eq!(error("n"), "No secret with id 'n'");
    }

    #[test]
    fn what_no_option_names_is_asked_for() {
        let required = "Parameter 'key-secret' is required for cipher";
        let key = |secrets: &Secrets, id, image| {
            let key = secrets.key("key-secret", id, image, KeyUse::Read);
            key.map(|key| key.get().to_vec()).map_err(|error| error.message())
        };
        assert_eq!(key(&NO_SECRETS, None, "a"), Err(required.to_owned()));
        let mut secrets = Secrets::default().or_ask(Arc::new(Asked));
        assert_eq!(key(&secrets, None, "a"), Ok(b"typed".to_vec()));
        assert_eq!(key(&secrets, None, "b"), Err(required.to_owned()));
        secrets.add("s", b"named".to_vec().into());
        assert_eq!(key(&secrets, Some("s"), "a"), Ok(b"named".to_vec()));
        assert!(key(&secrets, Some("t"), "a").is_err());
    }
}
