//! What images with a LUKS header have in common, whichever format it lies in: what `info` shows
//! of it, and what its faults are to whoever opens an image.

use serde_json::{Map, Value, json};

use crate::block::{Error, ErrorKind};
use crate::crypto::luks::{LuksError, LuksHeader};

impl From<LuksError> for Error {
    fn from(error: LuksError) -> Self {
        let kind = match &error {
            LuksError::Header(_) => ErrorKind::Corrupt,
            LuksError::Version(_) | LuksError::TooManyIterations(_) | LuksError::Crypto(_) => ErrorKind::Unsupported,
            LuksError::Passphrase | LuksError::TooLong(_) => ErrorKind::Invalid,
            LuksError::Random(_) => ErrorKind::Io,
        };
        let advice = match error {
            LuksError::Version(2) => Some(
                "Open it with 'cryptsetup open' and use what that maps, or make it LUKS1 with 'cryptsetup convert \
                 --type luks1', where its keys allow that.",
            ),
            _ => None,
        };
        let error = Self::new(kind, error.to_string());
        match advice {
            Some(advice) => error.hint(advice),
            None => error,
        }
    }
}

/// What `info` shows of a header, by the reference's names.
pub fn luks_facts(header: &LuksHeader, detached: bool) -> Map<String, Value> {
    let slots = header.slots().map(|slot| match slot.active {
        true => json!({
            "active": true,
            "iters": slot.iterations,
            "key-offset": slot.material,
            "stripes": slot.stripes,
        }),
        false => json!({ "active": false, "key-offset": slot.material }),
    });
    let spec = header.spec();
    let mut facts = Map::new();
    let mut put = |key: &str, value: Value| facts.insert(key.to_owned(), value);
    put("ivgen-alg", spec.iv.name().into());
    put("detached-header", detached.into());
    put("hash-alg", header.hash().name().into());
    put("cipher-alg", spec.cipher.name().into());
    put("uuid", header.uuid().into());
    if let Some(hash) = spec.iv.hash() {
        put("ivgen-hash-alg", hash.name().into());
    }
    put("cipher-mode", spec.mode.name().into());
    put("slots", slots.to_vec().into());
    put("payload-offset", header.payload().into());
    put("master-key-iters", header.iterations().into());
    facts
}
