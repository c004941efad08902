//! Files of the host as nodes: which protocol a name means, its options, and a bare file opened as an image.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::Value;

use super::generic::Settings;
use super::info::ImageInfo;
use super::keys::{take_number, take_switch, take_text};
use super::name::{first_key, protocol as split};
use super::{BlockDriver, Child, Error, Extent, Format, GuestOffset, HostPlace, OpenRequest, OptionTree, Result};
use crate::block::error::Context;
use crate::storage::{Kind as FileKind, Storage};

/// A way to files of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Regular files.
    File,
    /// Block and character devices.
    HostDevice,
}

impl Protocol {
    /// The protocol with that name.
    pub fn find(name: &str) -> Option<Self> {
        match name {
            "file" => Some(Self::File),
            "host_device" => Some(Self::HostDevice),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::HostDevice => "host_device",
        }
    }

    /// The protocol for what is there under a plain name.
    pub fn of_path(path: &OsStr) -> Self {
        use std::os::unix::fs::FileTypeExt;
        match std::fs::metadata(Path::new(path)) {
            Ok(meta) if meta.file_type().is_block_device() || meta.file_type().is_char_device() => Self::HostDevice,
            _ => Self::File,
        }
    }

    /// The protocol that a name means, and the name as that protocol knows it.
    pub fn of_name(name: &OsStr) -> Result<(Self, OsString)> {
        let Some((prefix, rest)) = split(name) else { return Ok((Self::of_path(name), name.to_owned())) };
        let protocol = Self::find(&prefix.to_string_lossy())
            .ok_or_else(|| Error::invalid(format!("Unknown protocol '{}'", prefix.to_string_lossy())))?;
        // What is left is a path; it must not be taken for another protocol when it is seen again.
        let mut path = OsString::new();
        if split(rest).is_some() {
            path.push("./");
        }
        path.push(rest);
        Ok((protocol, path))
    }
}

/// The name of a file that is to be opened: `path`, where it was not given as an option (that must be text).
pub fn file_name(protocol: Protocol, path: Option<OsString>, options: &mut OptionTree) -> Result<OsString> {
    let named = match options.shift_remove("filename") {
        Some(Value::String(name)) => Some(OsString::from(name)),
        _ => None,
    };
    path.or(named)
        .filter(|path| !path.is_empty())
        .ok_or_else(|| Error::invalid(format!("The '{}' block driver requires a file name", protocol.name())))
}

/// Takes the options of a file that is to be opened: whether it is locked.
pub fn take_locking(settings: &Settings, options: &mut OptionTree) -> Result<bool> {
    take_number(options, "aio-max-batch")?;
    take_switch(options, "drop-cache")?;
    take_switch(options, "x-check-cache-dropped")?;
    let bad = |value: &str| Error::invalid(format!("invalid parameter value: {value}"));
    // How the kernel is asked does not change what is read and written.
    let native = match take_text(options, "aio").as_deref() {
        None | Some("threads" | "io_uring") => false,
        Some("native") => true,
        Some(other) => return Err(bad(other)),
    };
    let locking = match take_text(options, "locking").as_deref() {
        None | Some("auto" | "on") => true,
        Some("off") => false,
        Some(other) => return Err(bad(other)),
    };
    if let Some(id) = take_text(options, "pr-manager") {
        return Err(Error::invalid(format!("No persistent reservation manager with id '{id}'")));
    }
    if native && !settings.direct() {
        return Err(Error::invalid(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    Ok(locking)
}

/// Refuses what is left of a file's options.
pub fn refuse_rest(protocol: Protocol, options: &OptionTree) -> Result<()> {
    match first_key(options) {
        None => Ok(()),
        Some(key) => {
            Err(Error::invalid(format!("Block protocol '{}' doesn't support the option '{key}'", protocol.name())))
        }
    }
}

/// Refuses a file that is not for that protocol.
pub fn check_kind(protocol: Protocol, path: &OsStr, storage: &dyn Storage) -> Result<()> {
    let regular = storage.host().is_none_or(|file| file.kind() == FileKind::Regular);
    match (protocol, regular) {
        (Protocol::File, true) | (Protocol::HostDevice, false) => Ok(()),
        _ => Err(wrong_kind(protocol, path)),
    }
}

/// The refusal of a file that is not for that protocol.
pub fn wrong_kind(protocol: Protocol, path: &OsStr) -> Error {
    let wanted = match protocol {
        Protocol::File => "a regular file",
        Protocol::HostDevice => "either a character or block device",
    };
    let name = String::from_utf8_lossy(path.as_bytes());
    Error::invalid(format!("'{}' driver requires '{name}' to be {wanted}", protocol.name()))
}

impl Format for Protocol {
    fn name(&self) -> &'static str {
        Protocol::name(*self)
    }

    fn probe(&self, _head: &[u8], _name: &str) -> u32 {
        0
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let format: &'static dyn Format = match self {
            Self::File => &Self::File,
            Self::HostDevice => &Self::HostDevice,
        };
        let name = &request.file.name;
        let length = request.file.storage.len().with_context(|| format!("Could not get size of '{name}'"))?;
        let size = length.checked_next_multiple_of(512).unwrap_or(length);
        Ok(Box::new(Bare { format, size, files: [request.file] }))
    }
}

/// A bare file: bytes that no format has a say in. Read-only: whoever wants to write says `raw`.
#[derive(Debug)]
struct Bare {
    format: &'static dyn Format,
    size: u64,
    files: [Child; 1],
}

impl BlockDriver for Bare {
    fn format(&self) -> &'static dyn Format {
        self.format
    }

    fn virtual_size(&self) -> u64 {
        self.size
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let [file] = &self.files;
        file.extent(at, HostPlace::main(at.get()), max)
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::plain(None))
    }
}
