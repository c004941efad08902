//! Secrets: passphrases and keys that options name. What they hold is shown nowhere, and wiped when it is dropped.

use std::collections::BTreeMap;
use std::fmt;

use super::{Error, Result};

/// For images that need none.
pub static NO_SECRETS: Secrets = Secrets { objects: BTreeMap::new() };

/// Bytes that nobody may see.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct SecretBytes(Vec<u8>);

impl SecretBytes {
    /// The bytes themselves.
    pub fn get(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for SecretBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBytes")
    }
}

impl Drop for SecretBytes {
    fn drop(&mut self) {
        self.0.fill(0);
        // Bytes that somebody may look at are not left as they were.
        std::hint::black_box(&mut self.0);
    }
}

#[derive(Debug, Clone)]
enum Object {
    Secret(SecretBytes),
    /// Encrypted with another secret.
    Sealed,
    Other,
}

/// The objects that a command line defines, by id. Those that are no secrets are known by name alone.
#[derive(Debug, Clone, Default)]
pub struct Secrets {
    objects: BTreeMap<String, Object>,
}

impl Secrets {
    /// Whether there is an object with that id.
    pub fn has(&self, id: &str) -> bool {
        self.objects.contains_key(id)
    }

    /// Adds a secret.
    pub fn add(&mut self, id: &str, bytes: SecretBytes) {
        self.objects.insert(id.to_owned(), Object::Secret(bytes));
    }

    /// Adds a secret that is encrypted with another one.
    pub fn add_sealed(&mut self, id: &str) {
        self.objects.insert(id.to_owned(), Object::Sealed);
    }

    /// Adds what is no secret.
    pub fn add_other(&mut self, id: &str) {
        self.objects.insert(id.to_owned(), Object::Other);
    }

    /// What that secret holds.
    pub fn bytes(&self, id: &str) -> Result<&SecretBytes> {
        match self.objects.get(id) {
            Some(Object::Secret(bytes)) => Ok(bytes),
            Some(Object::Sealed) => Err(Error::unsupported(format!(
                "The secret '{id}' is encrypted with another one, which is not supported"
            ))),
            Some(Object::Other) => Err(Error::invalid(format!("Object with id '{id}' is not a secret"))),
            None => Err(Error::invalid(format!("No secret with id '{id}'"))),
        }
    }

    /// The same as text.
    pub fn passphrase(&self, id: &str) -> Result<&str> {
        std::str::from_utf8(self.bytes(id)?.get())
            .map_err(|_| Error::invalid(format!("Data from secret {id} is not valid UTF-8")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_by_its_id_and_never_shown() {
        let mut secrets = Secrets::default();
        secrets.add("s", b"open sesame".to_vec().into());
        secrets.add("b", vec![0xff].into());
        secrets.add_sealed("e");
        secrets.add_other("o");
        assert_eq!(secrets.passphrase("s").ok(), Some("open sesame"));
        assert!(!format!("{secrets:?}").contains("sesame"));
        let error = |id| secrets.passphrase(id).map_err(|error| error.message()).unwrap_err();
        assert_eq!(error("b"), "Data from secret b is not valid UTF-8");
        assert_eq!(error("o"), "Object with id 'o' is not a secret");
        assert_eq!(error("n"), "No secret with id 'n'");
        assert_eq!(error("e"), "The secret 'e' is encrypted with another one, which is not supported");
    }
}
