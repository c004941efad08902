//! Encrypted images: the key, and what their clusters are encrypted with.
//!
//! Source: specification, section "Data encryption". Compressed clusters are not encrypted.

use crate::block::{Error, OptionTree, Purpose, Result, Secrets};
use crate::formats::encryption::{self, KEY_SECRET};
use crate::formats::legacy_aes::LegacyAes;

use super::header::Qcow2Header;
use super::layout;

/// Takes the options about encryption, and makes the cipher of an image that has one, unless its header alone is
/// looked at.
pub fn unlock(
    options: &mut OptionTree,
    header: &Qcow2Header,
    name: &str,
    purpose: Purpose,
    secrets: &Secrets,
) -> Result<Option<LegacyAes>> {
    let format = match header.fields.crypt_method {
        layout::CRYPT_AES => Some("aes"),
        layout::CRYPT_LUKS => Some("luks"),
        _ => None,
    };
    let id = encryption::take_key(options, format)?;
    let Some(format) = format.filter(|_| !purpose.only_looks()) else { return Ok(None) };
    let key = secrets.key(KEY_SECRET, id.as_deref(), name, purpose.into())?;
    match format {
        "aes" => Ok(Some(LegacyAes::new(&key)?)),
        _ => Err(Error::unsupported(format!("'{format}' encryption is not supported"))),
    }
}
