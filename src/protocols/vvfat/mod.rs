//! `vvfat`, spelt `fat:[TYPE:][floppy:]FOLDER`: a folder of the host as a disk with a FAT file system, read-only.
//!
//! `shape.rs` says where everything lies, `tree.rs` gives clusters to what is in the folder, `names.rs` makes short and
//! long names, `disk.rs` puts the bytes together; `layout.rs` is what is on the disk.

mod disk;
#[allow(missing_docs)]
mod layout;
mod names;
mod shape;
mod tree;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use self::disk::FatDisk;
use self::shape::{Fat, Shape};
use crate::block::keys::{take_number, take_switch, take_text};
use crate::block::protocol::{CreateFile, FileRequest, OpenedFile, Protocol, Spelt};
use crate::block::{Error, OptionTree, Result};

/// The protocol.
#[derive(Debug)]
pub struct Vvfat;

/// What the disk is called.
const LABEL: &str = "QEMU VVFAT";
/// Options that say what is on the disk.
const STRONG: [&str; 5] = ["fat-type", "dir", "label", "floppy", "rw"];

impl Protocol for Vvfat {
    fn name(&self) -> &'static str {
        "vvfat"
    }

    fn prefix(&self) -> &'static str {
        "fat"
    }

    fn takes(&self, _path: &Path) -> bool {
        false
    }

    fn spelt(&self, rest: &OsStr) -> Result<Spelt> {
        let text = rest.to_str().ok_or_else(|| Error::invalid("The name of the folder is not Unicode text"))?;
        // Words that mean nothing are passed over.
        let (words, folder) = text.rsplit_once(':').unwrap_or(("", text));
        let has = |wanted: &str| words.split(':').any(|word| word == wanted);
        let kind = [32, 16, 12].into_iter().find(|kind| has(&kind.to_string()));
        let options = [
            ("fat-type", Value::from(kind.unwrap_or(0))),
            ("dir", Value::from(folder)),
            ("floppy", Value::from(has("floppy"))),
            ("rw", Value::from(has("rw"))),
        ];
        Ok(Spelt { path: None, options: options.map(|(key, value)| (key.to_owned(), value)).into_iter().collect() })
    }

    fn plain(&self, _name: &OsStr) -> Result<Spelt> {
        Err(Error::invalid("File name string must start with 'fat:'"))
    }

    fn take_name(&self, _path: Option<OsString>, options: &mut OptionTree) -> Result<Option<OsString>> {
        match options.contains_key("dir") {
            true => Ok(None),
            false => Err(Error::invalid("vvfat block driver requires a 'dir' option")),
        }
    }

    fn open(&self, request: FileRequest<'_>) -> Result<OpenedFile> {
        let options: &mut OptionTree = request.options;
        let given = STRONG.iter().filter_map(|key| Some(((*key).to_owned(), options.get(*key)?.clone())));
        let strong: Map<String, Value> = given.collect();
        let folder = take_text(options, "dir").unwrap_or_default();
        let kind = take_number(options, "fat-type")?.unwrap_or(0);
        let floppy = take_switch(options, "floppy")?.unwrap_or(false);
        let write = take_switch(options, "rw")?.unwrap_or(false);
        let mut label = [b' '; 11];
        let text = take_text(options, "label").unwrap_or_else(|| LABEL.to_owned());
        if text.len() > label.len() {
            return Err(Error::invalid("vvfat label cannot be longer than 11 bytes"));
        }
        for (byte, letter) in label.iter_mut().zip(text.bytes()) {
            *byte = letter;
        }
        let shape = match (kind, floppy) {
            (12, false) => Shape::disk(Fat::Fat12),
            (0 | 16, false) => Shape::disk(Fat::Fat16),
            (32, false) => Shape::disk(Fat::Fat32),
            (12, true) => Shape::floppy(Fat::Fat12, false),
            (0, true) => Shape::floppy(Fat::Fat12, true),
            (16, true) => Shape::floppy(Fat::Fat16, true),
            (32, true) => return Err(Error::unsupported("A floppy disk is too small for FAT32")),
            _ => return Err(Error::invalid("Valid FAT types are only 12, 16 and 32")),
        };
        match (request.write, write) {
            (false, true) => return Err(Error::invalid("Unable to set VVFAT to 'rw' when drive is read-only")),
            (true, true) => return Err(Error::unsupported("A folder is not written to: vvfat is read-only (no 'rw')")),
            (true, false) => return Err(Error::invalid("Image is read-only")),
            (false, false) => {}
        }
        let tree = tree::read(Path::new(&folder), &shape, &label)?;
        let storage = Arc::new(FatDisk::new(&shape, tree, &label));
        Ok(OpenedFile { storage, path: None, based: false, strong, locking: false })
    }

    fn creating(&self) -> Option<&'static dyn CreateFile> {
        None
    }
}
