//! The way of a driver to the other files of its layer.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::opened::MadeBeside;
use super::settings::{Names, Settings};
use super::{OpenHow, Opener};
use crate::block::keys::as_text;
use crate::block::{Child, Error, Notice, OptionTree, Related, Result, name};
use crate::storage::Storage;

/// The part that an external data file plays.
pub(super) const DATA_FILE: &str = "data-file";

/// See the module.
pub(super) struct Beside<'a> {
    pub opener: &'a Opener<'a>,
    /// Names are relative to that one.
    pub image: Option<&'a OsStr>,
    pub how: &'a OpenHow,
    pub settings: Settings,
    pub locking: bool,
    /// Whose locks pass to what is opened.
    pub instead: &'a [Arc<dyn Storage>],
    /// What the image names, the user has typed.
    pub own: bool,
    /// What the user says of the external data file.
    pub given: Mutex<OptionTree>,
    /// Files that were made together with the image, by the names that are written in it.
    pub made: MadeBeside,
}

impl Beside<'_> {
    /// Takes the permissions on a file of the layer.
    fn lock(&self, storage: &dyn Storage, role: &str, settings: &Settings) -> Result<()> {
        let access = settings.access();
        let access = match (self.how.exclusive, role) {
            (false, DATA_FILE) => access.of_data_file(),
            _ => access,
        };
        super::lock(storage, access, self.instead)
    }

    /// A name that the image has, seen from where we are. The host is not asked where nothing may come of it: who sees
    /// the answer would learn it.
    fn beside(&self, name: &OsStr) -> Option<OsString> {
        match self.opener.may_search() {
            true => name::find_literally_beside(self.image, name),
            false => name::literally_beside(self.image, name),
        }
    }

    /// Where a file is that the image names. Its name is a path, however it is spelt: never a protocol.
    fn locate(&self, role: &str, name: &OsStr) -> Result<OsString> {
        let shown = name.to_string_lossy();
        let beside = self.beside(name);
        // The reference makes and opens a data file from the working directory on, whichever folder the image is in.
        if role == DATA_FILE && self.opener.may_search() && Path::new(name).exists() {
            let same = |other: &OsString| same_file(Path::new(name), Path::new(other));
            if let Some(other) = beside.filter(|other| Path::new(other).exists() && !same(other)) {
                self.notice(Notice::Warning(format!(
                    "The data file '{shown}' is the one in the working directory, not '{}'",
                    other.to_string_lossy()
                )));
            }
            return Ok(name.into());
        }
        beside.ok_or_else(|| {
            Error::invalid(format!("Cannot tell where the file '{shown}' is, because the image has no plain name"))
        })
    }
}

/// The most files of a folder that are looked at.
const MOST_SIBLINGS: usize = 10_000;

/// The first bytes of a file, which is neither locked nor kept open.
fn head_of(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut head = Vec::new();
    std::fs::File::open(path)?.take(512).read_to_end(&mut head)?;
    Ok(head)
}

fn same_file(a: &Path, b: &Path) -> bool {
    let of = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    of(a).is_some_and(|file| of(b) == Some(file))
}

impl Related for Beside<'_> {
    fn open(&self, role: &str, name: &OsStr) -> Result<Child> {
        let shown = name.to_string_lossy();
        if let Some((_, storage)) = self.made.iter().find(|(made, _)| made == name) {
            self.lock(&**storage, role, &self.settings)?;
            let path = match storage.host() {
                Some(file) => file.name().into(),
                None => name::literally_beside(self.image, name).unwrap_or_else(|| name.into()),
            };
            let driver = self.opener.drivers.of_path(&path)?.name();
            let name = path.to_string_lossy().into_owned();
            return Ok(Child { role: role.to_owned(), name, driver, storage: storage.clone() });
        }
        let mut given = match role {
            DATA_FILE => std::mem::take(&mut *self.given.lock().unwrap_or_else(|e| e.into_inner())),
            _ => OptionTree::new(),
        };
        let path = match given.get("filename").and_then(as_text) {
            Some(_) => None,
            None => Some(self.locate(role, name)?),
        };
        let image = self.image.unwrap_or_default().to_string_lossy();
        let by_image = path.is_some() && !self.own;
        if by_image {
            self.opener.may_open_file(&image, &shown, path.as_deref())?;
        }
        let named = path.clone().or_else(|| given.get("filename").and_then(as_text).map(OsString::from));
        let driver = match given.shift_remove("driver") {
            Some(Value::String(driver)) => Some(driver),
            _ => None,
        };
        let protocol = match driver {
            None => self.opener.drivers.of_path(named.as_deref().unwrap_or_default())?,
            Some(driver) => self.opener.drivers.protocol(&driver).ok_or_else(|| {
                Error::unsupported(format!("The file '{shown}' must be a plain file, not '{driver}'"))
            })?,
        };
        let (opened, settings) =
            self.opener.bytes(protocol, path, given, self.settings, role, &mut Names::default())?;
        if by_image {
            self.opener.may_keep(&image, &shown, &*opened.child.storage)?;
        }
        if self.locking && opened.locking {
            self.lock(&*opened.child.storage, role, &settings)?;
        }
        Ok(opened.child)
    }

    fn shown(&self, name: &OsStr) -> String {
        let path = self.beside(name);
        path.as_deref().unwrap_or(name).to_string_lossy().into_owned()
    }

    fn sibling(&self, end: &str, is: &dyn Fn(&[u8]) -> bool) -> Option<OsString> {
        let image = Path::new(self.image.filter(|_| self.opener.may_search())?);
        let folder = image.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let entries = std::fs::read_dir(folder).ok()?.take(MOST_SIBLINGS).flatten();
        let ends = |name: &OsString| name.as_encoded_bytes().to_ascii_lowercase().ends_with(end.as_bytes());
        let mut names: Vec<OsString> = entries.map(|entry| entry.file_name()).filter(ends).collect();
        names.sort_unstable();
        let shown = image.to_string_lossy();
        names.into_iter().find(|name| {
            let path = folder.join(name);
            let allowed = self.opener.may_open_file(&shown, &name.to_string_lossy(), Some(path.as_os_str())).is_ok();
            let regular = || std::fs::metadata(&path).is_ok_and(|file| file.is_file());
            allowed && regular() && !same_file(&path, image) && head_of(&path).is_ok_and(|head| is(&head))
        })
    }

    fn notice(&self, notice: Notice) {
        self.opener.notice(notice);
    }
}
