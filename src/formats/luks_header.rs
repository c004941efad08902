//! What images with a LUKS header have in common, whichever format it lies in: the options of a new one, what `info`
//! shows of it, and what its faults are to whoever opens an image.

use serde_json::{Map, Value, json};

use crate::block::{CreateOptions, Error, ErrorKind, Result, SecretBytes, Secrets};
use crate::crypto::luks::{LuksError, LuksHeader, LuksPlan, NewVolume};
use crate::crypto::spec::GENERATORS;
use crate::crypto::{CipherAlgorithm, CipherMode, CipherSpec, HashAlgorithm, IvGenerator};

impl From<LuksError> for Error {
    fn from(error: LuksError) -> Self {
        let kind = match &error {
            LuksError::Header(_) => ErrorKind::Corrupt,
            LuksError::Version(_) | LuksError::TooManyIterations { .. } | LuksError::Crypto(_) => {
                ErrorKind::Unsupported
            }
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

/// The master key of a volume. `read` fills a buffer from that offset on, in bytes from the header's start.
pub fn unlock(
    secrets: &Secrets,
    header: &LuksHeader,
    passphrase: &SecretBytes,
    read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<SecretBytes> {
    if let Some(key) = secrets.opened(header.bytes(), passphrase) {
        return Ok(key);
    }
    let key = SecretBytes::from(header.unlock(passphrase.get(), read)?.to_vec());
    secrets.keep_opened(header.bytes(), passphrase, key.clone());
    Ok(key)
}

/// Makes a new volume, which this process opens again without deriving its key once more.
pub fn new_volume(plan: &LuksPlan, uuid: [u8; 16], passphrase: &SecretBytes, secrets: &Secrets) -> Result<NewVolume> {
    let new = plan.make(&uuid_text(uuid), passphrase.get())?;
    secrets.keep_opened(new.header.bytes(), passphrase, SecretBytes::from(new.key.to_vec()));
    Ok(new)
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

/// What the options of a new image ask for. `prefix` stands before their names, as in `encrypt.cipher-alg`; errors name
/// them without it.
pub fn luks_plan(options: &CreateOptions, prefix: &str) -> Result<LuksPlan> {
    let cipher = choice(options, prefix, "cipher-alg", CipherAlgorithm::parse)?;
    let mode = choice(options, prefix, "cipher-mode", CipherMode::parse)?;
    let generator = choice(options, prefix, "ivgen-alg", |name| GENERATORS.into_iter().find(|known| *known == name))?;
    let iv_hash = choice(options, prefix, "ivgen-hash-alg", HashAlgorithm::parse)?;
    let hash = choice(options, prefix, "hash-alg", HashAlgorithm::parse)?;
    let essiv_hash = iv_hash.or(Some(HashAlgorithm::Sha256));
    let iv = generator.and_then(|name| IvGenerator::parse(name, essiv_hash)).unwrap_or(IvGenerator::Plain64);
    let spec =
        CipherSpec { cipher: cipher.unwrap_or(CipherAlgorithm::AES_256), mode: mode.unwrap_or(CipherMode::Xts), iv };
    Ok(LuksPlan {
        spec,
        idle_hash: iv_hash,
        hash: hash.unwrap_or(HashAlgorithm::Sha256),
        time: options.number(&format!("{prefix}iter-time")).unwrap_or(LuksPlan::TIME),
        detached: false,
    })
}

/// The value of an option that is one of a list, or nothing where it is not given.
fn choice<T>(
    options: &CreateOptions,
    prefix: &str,
    name: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>> {
    let Some(value) = options.text(&format!("{prefix}{name}")) else { return Ok(None) };
    let unknown = || Error::invalid(format!("Parameter '{name}' does not accept value '{value}'"));
    parse(value).map(Some).ok_or_else(unknown)
}

/// A UUID as a header has it.
pub fn uuid_text(uuid: [u8; 16]) -> String {
    let mut text = String::new();
    for (n, byte) in uuid.iter().enumerate() {
        if [4, 6, 8, 10].contains(&n) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
