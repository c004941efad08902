//! `sheepdog`: a disk in the objects of a Sheepdog cluster.
//!
//! `names` is how a disk is named, `layout` what goes over the wire, `cluster` the requests, `vdi` the disk as bytes.

mod cluster;
mod layout;
mod names;
mod vdi;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use self::names::{SCHEMES, VdiName, VdiState};
use self::vdi::Vdi;
use super::file::preallocation;
use crate::block::name::in_order;
use crate::block::protocol::{CreateFile, FileRequest, OpenedFile, Protocol, Spelt};
use crate::block::{CreateOptions, Error, OptionKind, OptionSpec, OptionTree, Result};
use crate::storage::staging::Staging;
use crate::storage::{Preallocation, Storage};

/// The protocol.
#[derive(Debug)]
pub struct Sheepdog;

/// What a disk takes beside the format's own options.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new("preallocation", OptionKind::Text, "Preallocation mode (allowed values: off, full)")
        .among(&["off", "full"]),
];

/// A name, which has to be text.
fn checked(name: &OsStr) -> Result<VdiName> {
    let name = name.to_str().ok_or_else(|| Error::invalid("the name of a VDI has to be text"))?;
    VdiName::of_name(name)
}

impl Protocol for Sheepdog {
    fn name(&self) -> &'static str {
        "sheepdog"
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
        let mut name = OsString::from("sheepdog:");
        name.push(rest);
        self.plain(&name)
    }

    fn plain(&self, name: &OsStr) -> Result<Spelt> {
        checked(name)?;
        Ok(Spelt::path(name.to_owned()))
    }

    fn take_name(&self, path: Option<OsString>, _options: &mut OptionTree) -> Result<Option<OsString>> {
        Ok(path)
    }

    fn open(&self, request: FileRequest<'_>) -> Result<OpenedFile> {
        let FileRequest { path, options, write, .. } = request;
        // In the order that they are shown in.
        let given: OptionTree =
            in_order(options).into_iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        let target = VdiName::take(path.as_deref().and_then(OsStr::to_str), options)?;
        let mut strong = given;
        strong.retain(|key, _| !options.contains_key(key));
        if path.is_some() {
            strong.extend(target.options());
        }
        let storage = Arc::new(Vdi::open(&target, write)?);
        let path = path.or_else(|| target.shown().map(OsString::from));
        Ok(OpenedFile { storage, path, based: false, strong, locking: false })
    }

    fn creating(&self) -> Option<&'static dyn CreateFile> {
        Some(&Sheepdog)
    }
}

impl CreateFile for Sheepdog {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn check(&self, path: &Path, options: &CreateOptions, preallocates: bool) -> Result<()> {
        if checked(path.as_os_str())?.state != VdiState::Current {
            return Err(Error::invalid("a new VDI cannot be made as a snapshot"));
        }
        match preallocation(options, preallocates)? {
            Preallocation::Off | Preallocation::Full => Ok(()),
            mode => Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", mode.name()))),
        }
    }

    fn create(
        &self,
        path: &Path,
        options: &CreateOptions,
        _secondary: bool,
        staging: &Staging,
    ) -> Result<Arc<dyn Storage>> {
        let target = checked(path.as_os_str())?;
        let made = Vdi::create(&target, options.number("size"))
            .map_err(|error| Error::from(error).context(format!("Could not create '{}'", path.display())))?;
        let made = Arc::new(made);
        staging.add_made(made.clone());
        Ok(made)
    }
}
