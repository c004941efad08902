//! `nbd`: an export of a server that speaks the network block device protocol (NetworkBlockDevice/nbd, doc/proto.md).
//!
//! `names` is how an export is named, `layout` what goes over the wire, `stream` sockets with and without TLS (`tls`),
//! `handshake` the way to an export, `requests` and `connection` how things are asked of it, `extents` what is known
//! of its holes, `storage` all that as bytes.

mod connection;
mod extents;
mod handshake;
mod layout;
mod names;
mod requests;
mod storage;
mod stream;
mod tls;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use self::handshake::Refusal;
use self::layout::flag;
use self::names::{SCHEMES, Target};
use self::storage::Remote;
use self::tls::Tls;
use super::file::preallocation;
use crate::block::name::in_order;
use crate::block::protocol::{CreateFile, FileRequest, OpenedFile, Protocol, Spelt};
use crate::block::{CreateOptions, Error, ErrorKind, NO_SECRETS, OptionKind, OptionSpec, OptionTree, Result, Secrets};
use crate::storage::staging::Staging;
use crate::storage::{Preallocation, Storage};

/// The protocol.
#[derive(Debug)]
pub struct Nbd;

/// What an export takes beside the format's own options.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new("preallocation", OptionKind::Text, "Preallocation mode (allowed values: off)").among(&["off"]),
];

impl Nbd {
    /// A name, which has to be text.
    fn checked(name: OsString) -> Result<Spelt> {
        let text = name.to_str().ok_or_else(|| Error::invalid("No valid URL specified"))?;
        Target::of_name(text)?;
        Ok(Spelt::path(name))
    }
}

impl Protocol for Nbd {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn schemes(&self) -> &'static [&'static str] {
        SCHEMES
    }

    fn takes(&self, _path: &Path) -> bool {
        false
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn spelt(&self, rest: &OsStr) -> Result<Spelt> {
        let mut name = OsString::from("nbd:");
        name.push(rest);
        Self::checked(name)
    }

    fn plain(&self, name: &OsStr) -> Result<Spelt> {
        Self::checked(name.to_owned())
    }

    fn take_name(&self, path: Option<OsString>, _options: &mut OptionTree) -> Result<Option<OsString>> {
        Ok(path)
    }

    fn open(&self, request: FileRequest<'_>) -> Result<OpenedFile> {
        let FileRequest { path, options, write, cache, secrets, .. } = request;
        // In the order that they are shown in.
        let given: OptionTree =
            in_order(options).into_iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        let target = Target::take(path.as_deref().and_then(OsStr::to_str), options)?;
        // As they were given, but for what says how long to wait.
        let mut strong = given;
        strong.retain(|key, _| !options.contains_key(key) && !["reconnect-delay", "open-timeout"].contains(&&**key));
        if path.is_some() {
            strong.extend(target.options());
        }
        let (shown, same) = target.shown();
        let plain = same && !strong.contains_key("tls-creds");
        let storage = connect(target, secrets, write, cache.write_through())?;
        // The name that was given opens it in any case.
        let path = if plain { Some(shown.into()) } else { path.filter(|_| !strong.contains_key("tls-creds")) };
        Ok(OpenedFile { storage: Arc::new(storage), path, based: false, strong, locking: false })
    }

    fn creating(&self) -> Option<&'static dyn CreateFile> {
        Some(&Nbd)
    }
}

/// Opens an export, for writing if that is wanted.
fn connect(target: Target, secrets: &Secrets, write: bool, write_through: bool) -> Result<Remote> {
    let tls = Tls::of(&target, secrets)?;
    let remote = Remote::open(target, tls, write_through).map_err(|Refusal { text, hints, advice, .. }| {
        let error = Error::new(ErrorKind::Io, text);
        advice.into_iter().fold(hints.into_iter().fold(error, Error::hint), Error::advise)
    })?;
    if write && remote.export().has(flag::READ_ONLY) {
        return Err(Error::new(ErrorKind::Io, "Could not open image: Permission denied"));
    }
    Ok(remote)
}

impl CreateFile for Nbd {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn check(&self, _path: &Path, options: &CreateOptions, preallocates: bool) -> Result<()> {
        match preallocation(options, preallocates)? {
            Preallocation::Off => Ok(()),
            mode => Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", mode.name()))),
        }
    }

    fn create(
        &self,
        path: &Path,
        _options: &CreateOptions,
        _secondary: bool,
        staging: &Staging,
    ) -> Result<Arc<dyn Storage>> {
        let opened = path.to_str().ok_or_else(|| Error::invalid("No valid URL specified")).and_then(|name| {
            let target = Target::take(Some(name), &mut OptionTree::new())?;
            connect(target, &NO_SECRETS, true, false)
        });
        let storage = opened.map_err(|error| {
            error.context(
                "Protocol driver 'nbd' does not support creating new images, so an existing image must be selected as \
                 the target; however, opening the given target as an existing image failed",
            )
        })?;
        Ok(staging.take_remote(Arc::new(storage)))
    }
}
