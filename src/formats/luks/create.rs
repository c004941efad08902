//! New LUKS images: a header with one key slot, or that header alone.

use super::{KEY_SECRET, Luks};
use crate::block::error::Context;
use crate::block::measure::Measure;
use crate::block::{
    Create, CreateOptions, CreateRequest, Error, ErrorKind, KeyUse, OptionKind, OptionSpec, OptionTree, Result,
};
use crate::crypto::luks::LuksError;
use crate::crypto::spec::GENERATORS;
use crate::crypto::{CipherAlgorithm, CipherMode, HashAlgorithm};
use crate::formats::luks_header::{luks_plan, new_volume};
use crate::storage::Preallocation;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new(KEY_SECRET, OptionKind::Text, "ID of the secret that provides the keyslot passphrase"),
    OptionSpec::new("cipher-alg", OptionKind::Text, "Name of encryption cipher algorithm")
        .among(&CipherAlgorithm::NAMES),
    OptionSpec::new("cipher-mode", OptionKind::Text, "Name of encryption cipher mode").among(&CipherMode::NAMES),
    OptionSpec::new("ivgen-alg", OptionKind::Text, "Name of IV generator algorithm").among(&GENERATORS),
    OptionSpec::new("ivgen-hash-alg", OptionKind::Text, "Name of IV generator hash algorithm")
        .among(&HashAlgorithm::NAMES),
    OptionSpec::new("hash-alg", OptionKind::Text, "Name of encryption hash algorithm").among(&HashAlgorithm::NAMES),
    OptionSpec::new("iter-time", OptionKind::Number, "Time to spend in PBKDF in milliseconds"),
    OptionSpec::new(DETACHED, OptionKind::Switch, "Create a detached LUKS header"),
];

/// The option for a header alone.
pub(super) const DETACHED: &str = "detached-header";

impl Create for Luks {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn preallocates(&self) -> bool {
        true
    }

    fn has_size(&self, options: &CreateOptions) -> bool {
        !options.switch(DETACHED)
    }

    fn encrypts(&self, _options: &CreateOptions) -> bool {
        true
    }

    fn open_options(&self, options: &CreateOptions) -> OptionTree {
        OptionTree::from_iter(options.text(KEY_SECRET).map(|id| (KEY_SECRET.to_owned(), id.into())))
    }

    fn measuring(&self) -> Option<&dyn Measure> {
        Some(self)
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        let options = request.options;
        let mut plan = luks_plan(options, "")?;
        plan.detached = options.switch(DETACHED);
        // What has no disk has its size said so.
        if plan.detached && request.size != u64::MAX {
            return Err(Error::invalid(
                "a detached header has no disk: leave out the size, and make the payload's file with -f raw",
            ));
        }
        let fill = preallocation(options)?;
        let image = request.files.name().to_string_lossy();
        let passphrase = request.secrets.key(KEY_SECRET, options.text(KEY_SECRET), &image, KeyUse::New)?;
        plan.spec.check().map_err(LuksError::from)?;
        let end = match plan.detached {
            true => plan.header_bytes(),
            false => file_end(plan.header_bytes(), request.size)?,
        };
        let new = new_volume(&plan, request.ids.uuid("luks"), &passphrase, request.secrets)?;
        let file = request.files.main()?;
        file.set_len(end, fill).map_err(Error::from).map_err(too_large)?;
        file.write_at(0, new.header.bytes()).context("Unable to write LUKS header")?;
        file.write_at(new.material_at, &new.material).context("Unable to write key material")
    }
}

/// The mode of preallocation. Tables there are none, so `metadata` is as good as none.
fn preallocation(options: &CreateOptions) -> Result<Preallocation> {
    let Some(word) = options.text("preallocation") else { return Ok(Preallocation::Off) };
    match Preallocation::parse(word) {
        Some(Preallocation::Metadata) => Ok(Preallocation::Off),
        Some(mode) => Ok(mode),
        None => Err(Error::invalid(format!("invalid parameter value: {word}"))),
    }
}

/// Where a disk of that size ends in the file, if its payload starts there.
pub(super) fn file_end(payload: u64, size: u64) -> Result<u64> {
    payload.checked_add(size).filter(|end| i64::try_from(*end).is_ok()).ok_or_else(requested_too_large)
}

fn requested_too_large() -> Error {
    Error::invalid("The requested file size is too large")
}

fn too_large(error: Error) -> Error {
    if error.kind == ErrorKind::TooLarge { requested_too_large() } else { error }
}
