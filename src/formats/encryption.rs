//! What qcow and qcow2 have in common where they are encrypted: the options by which they are opened and made.

use crate::block::keys::as_text;
use crate::block::name::{first_key, take_below};
use crate::block::{CreateOptions, CreateRequest, Error, KeyUse, OptionSpec, OptionTree, Result, SecretBytes};

/// The option that names the secret with the key.
pub const KEY_SECRET: &str = "encrypt.key-secret";

/// Takes the options of the group `encrypt` for a layer that is encrypted as `is` says, and gives the id of the secret
/// that they name. A layer that is not encrypted needs none, and takes any.
pub fn take_key(options: &mut OptionTree, is: Option<&str>) -> Result<Option<String>> {
    let mut group = take_below(options, "encrypt");
    let wanted = group.shift_remove("format").as_ref().and_then(as_text);
    match (is, wanted) {
        (None, Some(wanted)) => {
            let text = format!("No encryption in image header, but options specified format '{wanted}'");
            return Err(Error::invalid(text));
        }
        (Some(is), Some(wanted)) if wanted != is => {
            let text = format!("Header reported '{is}' encryption format but options specify '{wanted}'");
            return Err(Error::invalid(text));
        }
        (None, None) => return Ok(None),
        (Some(_), _) => {}
    }
    let key = group.shift_remove("key-secret");
    if let Some(unknown) = first_key(&group) {
        let word = unknown.split('.').next().unwrap_or_default();
        return Err(Error::invalid(format!("Parameter '{word}' is unexpected")));
    }
    Ok(key.as_ref().and_then(as_text))
}

/// The options that open an image which was made with these.
pub fn open_options(options: &CreateOptions) -> OptionTree {
    let encrypted = matches!(format(options), Ok(Some(_)));
    let id = options.text(KEY_SECRET).filter(|_| encrypted);
    OptionTree::from_iter(id.map(|id| (KEY_SECRET.to_owned(), id.into())))
}

/// Whether an image with these options is to be encrypted, be they right or not.
pub fn is_asked_for(options: &CreateOptions) -> bool {
    options.switch("encryption") || options.text("encrypt.format").is_some()
}

/// Refuses two words for the same.
pub fn check_alias(options: &CreateOptions) -> Result<()> {
    match options.switch("encryption") && options.text("encrypt.format").is_some() {
        true => Err(Error::invalid("'encrypt.format' and its alias 'encryption' can't be used at the same time")),
        false => Ok(()),
    }
}

/// How a new image is to be encrypted: as it was typed.
pub fn format(options: &CreateOptions) -> Result<Option<&str>> {
    check_alias(options)?;
    match (options.switch("encryption"), options.text("encrypt.format")) {
        (true, _) => Ok(Some("aes")),
        (false, Some(format)) => Ok(Some(format)),
        (false, None) => {
            let given = |spec: &OptionSpec| spec.name.starts_with("encrypt.") && options.given(spec.name).is_some();
            match options.specs().iter().any(given) {
                true => Err(Error::invalid("Parameter 'encrypt.format' is missing")),
                false => Ok(None),
            }
        }
    }
}

/// Refuses options of the group that are not among those that the chosen way to encrypt takes.
pub fn only(options: &CreateOptions, known: &[&str]) -> Result<()> {
    let other = |name: &str| name.starts_with("encrypt.") && options.given(name).is_some() && !known.contains(&name);
    let unknown = options.specs().iter().find(|spec| other(spec.name));
    unknown.map_or(Ok(()), |spec| Err(Error::invalid(format!("Parameter '{}' is unexpected", spec.name))))
}

/// The passphrase of a new image.
pub fn new_key(request: &CreateRequest<'_>) -> Result<SecretBytes> {
    let image = request.files.name().to_string_lossy();
    request.secrets.key(KEY_SECRET, request.options.text(KEY_SECRET), &image, KeyUse::New)
}
