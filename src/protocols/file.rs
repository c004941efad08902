//! `file`: regular files of the host, and what they share with devices: names, options, opening.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::block::drivers::plain_path;
use crate::block::keys::{take_number, take_switch, take_text};
use crate::block::protocol::{CreateFile, FileRequest, OpenedFile, Protocol, Spelt};
use crate::block::{CreateOptions, Error, OptionKind, OptionSpec, OptionTree, Result};
use crate::storage::file::{FileHow, HostFile};
use crate::storage::staging::{CreateHow, Staging};
use crate::storage::{self, FileKind, Preallocation, Storage};

/// The protocol.
#[derive(Debug)]
pub struct File;

/// The option for a file that is written over in place on file systems that else do not.
const NOCOW: &str = "nocow";

/// What a regular file takes beside the format's own options.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new(NOCOW, OptionKind::Switch, "Turn off copy-on-write (valid only on btrfs)"),
    OptionSpec::new("preallocation", OptionKind::Text, "Preallocation mode (allowed values: off, falloc, full)")
        .among(&["off", "falloc", "full"]),
    OptionSpec::new("extent_size_hint", OptionKind::Size, "Extent size hint for the image file, 0 to disable"),
];

impl Protocol for File {
    fn name(&self) -> &'static str {
        "file"
    }

    fn takes(&self, _path: &Path) -> bool {
        true
    }

    fn spelt(&self, rest: &OsStr) -> Result<Spelt> {
        Ok(Spelt::path(plain_path(rest)))
    }

    fn plain(&self, name: &OsStr) -> Result<Spelt> {
        Ok(Spelt::path(name.to_owned()))
    }

    fn take_name(&self, path: Option<OsString>, options: &mut OptionTree) -> Result<Option<OsString>> {
        file_name(self.name(), path, options).map(Some)
    }

    fn open(&self, request: FileRequest<'_>) -> Result<OpenedFile> {
        open_host(self.name(), request, "a regular file", |kind| kind == FileKind::Regular)
    }

    fn creating(&self) -> Option<&'static dyn CreateFile> {
        Some(&File)
    }
}

impl CreateFile for File {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn check(&self, path: &Path, options: &CreateOptions, preallocates: bool) -> Result<()> {
        match preallocation(options, preallocates)? {
            Preallocation::Off | Preallocation::Falloc | Preallocation::Full => {}
            mode => return Err(Error::unsupported(format!("Unsupported preallocation mode: {}", mode.name()))),
        }
        match is_device(path) {
            // Only a name that says `file:` leads here with one.
            true => Err(Error::invalid("Could not resize file: Invalid argument")),
            false => Ok(()),
        }
    }

    fn may_share(&self, options: &CreateOptions) -> bool {
        !options.switch(NOCOW)
    }

    fn create(
        &self,
        path: &Path,
        options: &CreateOptions,
        secondary: bool,
        staging: &Staging,
    ) -> Result<Arc<dyn Storage>> {
        let how = CreateHow {
            nocow: options.switch(NOCOW),
            extent_size_hint: options.number("extent_size_hint"),
            secondary,
            like: None,
        };
        Ok(staging.create_with(path, &how)?)
    }
}

/// The preallocation that is asked of the file itself.
pub fn preallocation(options: &CreateOptions, preallocates: bool) -> Result<Preallocation> {
    match options.text("preallocation").filter(|_| !preallocates) {
        None => Ok(Preallocation::Off),
        Some(word) => {
            Preallocation::parse(word).ok_or_else(|| Error::invalid(format!("invalid parameter value: {word}")))
        }
    }
}

/// Opens what is there under a name of the host, if its kind is `wanted`.
pub fn open_host(
    driver: &'static str,
    request: FileRequest<'_>,
    wanted: &str,
    is_wanted: impl Fn(FileKind) -> bool,
) -> Result<OpenedFile> {
    let FileRequest { path, options, write, cache, native_aio, keep_space, .. } = request;
    let path = path.unwrap_or_default();
    let locking = take_locking(cache.direct(), native_aio, options)?;
    let wrong = || Error::invalid(format!("'{driver}' driver requires '{}' to be {wanted}", path.to_string_lossy()));
    let how = FileHow { write, cache, keep_space, ..FileHow::default() };
    let storage = match HostFile::open(Path::new(&path), &how) {
        Ok(file) if is_wanted(file.kind()) => Arc::new(file),
        Ok(_) | Err(storage::Error::WrongKind { .. }) => return Err(wrong()),
        Err(error) => return Err(error.into()),
    };
    let strong = Map::from_iter([("filename".to_owned(), Value::from(path.to_string_lossy()))]);
    Ok(OpenedFile { storage, path: Some(path), based: true, strong, locking })
}

/// The name of what is to be opened: `path`, where it was not given as an option (that must be text).
pub fn file_name(driver: &str, path: Option<OsString>, options: &mut OptionTree) -> Result<OsString> {
    let named = match options.shift_remove("filename") {
        Some(Value::String(name)) => Some(OsString::from(name)),
        _ => None,
    };
    path.or(named)
        .filter(|path| !path.is_empty())
        .ok_or_else(|| Error::invalid(format!("The '{driver}' block driver requires a file name")))
}

/// Takes the options that all files of the host have: whether the file is locked.
fn take_locking(direct: bool, native_aio: bool, options: &mut OptionTree) -> Result<bool> {
    take_number(options, "aio-max-batch")?;
    take_switch(options, "drop-cache")?;
    take_switch(options, "x-check-cache-dropped")?;
    let bad = |value: &str| Error::invalid(format!("invalid parameter value: {value}"));
    // How the kernel is asked does not change what is read and written.
    let native = match take_text(options, "aio").as_deref() {
        None => native_aio,
        Some("threads" | "io_uring") => false,
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
    if native && !direct {
        return Err(Error::invalid(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    Ok(locking)
}

/// Whether there is a device under that name.
pub fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| is_device_type(meta.file_type()))
}

/// Whether it is a device.
pub fn is_device_type(kind: std::fs::FileType) -> bool {
    kind.is_block_device() || kind.is_char_device()
}
