//! `host_device` and `host_cdrom`: block and character devices of the host. They are opened as they are, never made.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use super::file::{file_name, is_device, is_device_type, open_host, preallocation};
use crate::block::drivers::plain_path;
use crate::block::protocol::{CreateFile, FileRequest, OpenedFile, Protocol, Spelt};
use crate::block::{CreateOptions, Error, OptionKind, OptionSpec, OptionTree, Result};
use crate::storage::error::strerror;
use crate::storage::staging::{CreateHow, Staging};
use crate::storage::{FileKind, Preallocation, Storage};

/// The protocol, under one of its names.
#[derive(Debug)]
pub struct HostDevice {
    name: &'static str,
    /// Plain names of devices are this one's.
    default: bool,
}

/// Any device.
pub const DEVICE: HostDevice = HostDevice { name: "host_device", default: true };
/// A drive with a medium, if the user says so.
pub const CDROM: HostDevice = HostDevice { name: "host_cdrom", default: false };

const WANTED: &str = "either a character or block device";

/// What a device takes beside the format's own options.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new("preallocation", OptionKind::Text, "Preallocation mode (allowed values: off)").among(&["off"]),
];

impl Protocol for HostDevice {
    fn name(&self) -> &'static str {
        self.name
    }

    fn takes(&self, path: &Path) -> bool {
        self.default && is_device(path)
    }

    fn spelt(&self, rest: &OsStr) -> Result<Spelt> {
        Ok(Spelt::path(plain_path(rest)))
    }

    fn plain(&self, name: &OsStr) -> Result<Spelt> {
        Ok(Spelt::path(name.to_owned()))
    }

    fn take_name(&self, path: Option<OsString>, options: &mut OptionTree) -> Result<Option<OsString>> {
        file_name(self.name, path, options).map(Some)
    }

    fn open(&self, request: FileRequest<'_>) -> Result<OpenedFile> {
        open_host(self.name, request, WANTED, |kind| kind != FileKind::Regular)
    }

    fn creating(&self) -> Option<&'static dyn CreateFile> {
        if self.default { Some(&DEVICE) } else { Some(&CDROM) }
    }
}

impl CreateFile for HostDevice {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn check(&self, path: &Path, options: &CreateOptions, preallocates: bool) -> Result<()> {
        match preallocation(options, preallocates)? {
            Preallocation::Off => {}
            mode => return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", mode.name()))),
        }
        let (name, shown) = (self.name, path.display());
        let wrong = match std::fs::metadata(path) {
            _ if path.as_os_str().is_empty() => format!("The '{name}' block driver requires a file name"),
            Ok(meta) if is_device_type(meta.file_type()) => return Ok(()),
            Ok(_) => format!("'{name}' driver requires '{shown}' to be {WANTED}"),
            Err(error) => format!("Could not open '{shown}': {}", strerror(&error)),
        };
        Err(Error::invalid(format!(
            "Protocol driver '{name}' does not support creating new images, so an existing image must be selected as \
             the target; however, opening the given target as an existing image failed: {wrong}"
        )))
    }

    fn create(
        &self,
        path: &Path,
        _options: &CreateOptions,
        secondary: bool,
        staging: &Staging,
    ) -> Result<Arc<dyn Storage>> {
        Ok(staging.create_with(path, &CreateHow { secondary, ..CreateHow::default() })?)
    }
}
