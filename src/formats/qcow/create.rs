//! New qcow images.

use std::ffi::OsStr;

use super::Qcow;
use super::layout::{HEADER_BYTES, MAX_BACKING_NAME, MAX_L1, QcowHeader, too_large};
use crate::block::error::Context;
use crate::block::measure::Measure;
use crate::block::{Create, CreateOptions, CreateRequest, Error, OptionKind, OptionSpec, OptionTree, Result};
use crate::formats::encryption;
use crate::storage::{Preallocation, Zeroing};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new("backing_file", OptionKind::Name, "File name of a base image"),
    OptionSpec::new("backing_fmt", OptionKind::Text, "Format of the backing image"),
    OptionSpec::new(
        "encryption",
        OptionKind::Switch,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    OptionSpec::new("encrypt.format", OptionKind::Text, "Encrypt the image, format choices: 'aes'").among(&["aes"]),
    OptionSpec::new("encrypt.key-secret", OptionKind::Text, "ID of the secret that provides the AES encryption key"),
];

/// Zeros of a new L1 table up to this length are written, past it they are a hole.
const WRITTEN: u64 = 16 << 20;

/// A new image, decided.
pub struct NewQcow<'a> {
    /// Its header.
    pub header: QcowHeader,
    /// The size of the disk in bytes.
    pub size: u64,
    /// Where its L1 table ends.
    pub end: u64,
    table: u64,
    backing: Option<&'a OsStr>,
    encrypted: bool,
}

impl<'a> NewQcow<'a> {
    /// Every check that needs no file and no key.
    pub fn decide(options: &'a CreateOptions, size: u64) -> Result<Self> {
        let encrypted = is_encrypted(options)?;
        let size = size.checked_next_multiple_of(512).ok_or_else(too_large)?;
        if size == 0 {
            return Err(Error::invalid("Image size is too small, cannot be zero length"));
        }
        // Only the name is kept: the format has no place for the backing file's format.
        let backing = options.name("backing_file").filter(|name| !name.is_empty());
        let length = backing.map(|name| u32::try_from(name.len()).unwrap_or(u32::MAX));
        if length.is_some_and(|length| length > MAX_BACKING_NAME) {
            return Err(Error::invalid("Backing file name too long"));
        }
        let header = QcowHeader::new(size, length, encrypted);
        let entries = header.l1_entries(size).filter(|entries| *entries <= MAX_L1).ok_or_else(too_large)?;
        let table = (entries * 8).next_multiple_of(512);
        let end = header.l1_offset() + table;
        Ok(Self { header, size, end, table, backing, encrypted })
    }
}

impl Create for Qcow {
    fn grows(&self, options: &CreateOptions) -> bool {
        let _ = options;
        true
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn compresses(&self) -> bool {
        true
    }

    fn encrypts(&self, options: &CreateOptions) -> bool {
        encryption::is_asked_for(options)
    }

    fn open_options(&self, options: &CreateOptions) -> OptionTree {
        encryption::open_options(options)
    }

    fn measuring(&self) -> Option<&dyn Measure> {
        Some(self)
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        let NewQcow { header, end, table, backing, encrypted, .. } = NewQcow::decide(request.options, request.size)?;
        if encrypted {
            // Nothing but data is encrypted with it. Whoever makes an image knows that it is there.
            encryption::new_key(request)?;
        }
        let mut bytes = header.bytes().to_vec();
        bytes.extend(backing.unwrap_or_default().as_encoded_bytes());
        debug_assert!(header.l1_offset() >= bytes.len() as u64 && bytes.len() >= HEADER_BYTES);
        let written = if table <= WRITTEN { end } else { header.l1_offset() };
        bytes.resize(usize::try_from(written).map_err(|_| too_large())?, 0);
        let file = request.files.main()?;
        file.write_at(0, &bytes).context("Could not write the qcow header")?;
        if written < end {
            if !file.facts().new_reads_zero {
                file.zero(written, end - written, Zeroing::Punch).context("Could not clear the device")?;
            }
            file.set_len(end, Preallocation::Off).context("Could not resize file")?;
        }
        Ok(())
    }
}

/// Whether the image is to be encrypted.
fn is_encrypted(options: &CreateOptions) -> Result<bool> {
    match encryption::format(options)? {
        None => Ok(false),
        Some("aes") => Ok(true),
        Some("luks") => Err(Error::unsupported("Unsupported encryption format")),
        Some(other) => Err(Error::invalid(format!("Parameter 'format' does not accept value '{other}'"))),
    }
}
