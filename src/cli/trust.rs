//! `--untrusted`, `--allow`, `--max-size`, `--max-output`: what images may make us do.
//!
//! The policy of the opener is the rule, and says what is wrong. Behind it stands [`Confinement`]: should there be a way
//! past the policy, the kernel still opens nothing but what the command line names.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::Value;

use super::arguments::{Makes, Takes, known};
use super::{Complaint, Program, size};
use crate::block::keys::{self, Dialect, Item};
use crate::block::name;
use crate::block::protocol::Protocol;
use crate::block::{Named, files_named};
use crate::drivers::DRIVERS;
use crate::storage::confine::Confinement;
use crate::storage::error::strerror;
use crate::storage::{host, pipe, temporary};

/// The options: before the subcommand, or behind it.
pub fn args() -> [Arg; 4] {
    [
        Arg::new("untrusted")
            .long("untrusted")
            .action(ArgAction::SetTrue)
            .help("refuse images that name other files: backing files, data files, extents"),
        Arg::new("allow")
            .long("allow")
            .value_name("DIR_OR_FILE")
            .value_parser(clap::value_parser!(OsString))
            .action(ArgAction::Append)
            .help("let images name that file, or files in that folder, all the same")
            .long_help("let images name that file, or files in that folder, all the same where --untrusted is given; may be given several times\n\ndefault: what the command line names itself"),
        Arg::new("max-size")
            .long("max-size")
            .value_name("SIZE")
            .value_parser(|text: &str| size::size("largest disk", text))
            .help("refuse disks that are larger than that")
            .long_help("refuse images whose disk is larger than that, and make none that is\n\ndefault: no limit"),
        Arg::new("max-output")
            .long("max-output")
            .value_name("SIZE")
            .value_parser(|text: &str| size::size("largest file", text))
            .help("write no file that is longer than that")
            .long_help("write no file that is longer than that\n\ndefault: no limit"),
    ]
}

/// Takes what is said of images that are not trusted.
pub fn apply(program: &mut Program, matches: &ArgMatches) -> anyhow::Result<()> {
    if matches.get_flag("untrusted") {
        program.distrust();
    }
    for path in matches.get_many::<OsString>("allow").unwrap_or_default() {
        program.allow(path)?;
    }
    if let Some(size) = matches.get_one::<u64>("max-size") {
        program.limit_disks(*size);
    }
    if let Some(size) = matches.get_one::<u64>("max-output") {
        host::limit_file_size(*size)
            .map_err(|errno| Complaint::value(strerror(&errno.into())))
            .context("The length of files cannot be limited")?;
        program.limit_files(*size);
    }
    Ok(())
}

/// Leaves this process nothing but what the command line names, and what is made beside it.
pub fn confine(command: &Command, makes: &[Makes], matches: &[&ArgMatches]) -> anyhow::Result<()> {
    let mut typed = Typed::default();
    let values = |id: &str| -> Vec<OsString> {
        let raw = matches.iter().filter_map(|matches| matches.try_get_raw(id).ok().flatten());
        raw.flat_map(|values| values.map(OsStr::to_owned).collect::<Vec<_>>()).collect()
    };
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        for value in values(id) {
            match known(arg).takes {
                Takes::File if id == "allow" => {
                    typed.allowed.extend(files_named(DRIVERS, &value).unwrap_or_default());
                    typed.allowed.push(value.into());
                }
                Takes::File => typed.name(&value),
                Takes::Object | Takes::CreateOptions | Takes::AmendOptions => typed.list(&value),
                Takes::Driver => typed.driver(&value.to_string_lossy()),
                Takes::NewFormat => {
                    typed.driver(&value.to_string_lossy());
                    typed.in_any_order |= value != "raw";
                }
                Takes::Plain | Takes::Words(_) => {}
            }
        }
    }
    for how in makes {
        let named = values(how.argument());
        match how {
            Makes::Files(_) => named.iter().for_each(|word| typed.makes(word)),
            Makes::Last(_) => named.iter().rev().take(1).for_each(|word| typed.makes(word)),
            Makes::Behind(_, letters) => {
                let rest = named.iter().filter_map(|word| word.as_bytes().strip_prefix(letters.as_bytes()));
                rest.for_each(|word| typed.makes(OsStr::from_bytes(word)));
            }
            Makes::Folder(_) => typed.folders.extend(named.iter().map(|word| existing(Path::new(word)))),
        }
    }
    // No folder for them is within reach then.
    (0..typed.kept).try_for_each(|_| temporary::make_ahead()).context("A temporary file cannot be made")?;
    typed.confinement().apply().context("Landlock cannot be set up")?;
    Ok(())
}

/// What may be the name of a file among the words of the command line.
#[derive(Default)]
struct Typed {
    names: Vec<PathBuf>,
    allowed: Vec<PathBuf>,
    /// Folders in which files are made.
    folders: Vec<PathBuf>,
    network: bool,
    /// Servers of which what has come is kept in a temporary file.
    kept: usize,
    /// What is made is not written from front to back.
    in_any_order: bool,
    /// Something takes what is made from front to back alone.
    sends: bool,
    /// What protocols read that are named.
    credentials: Vec<PathBuf>,
}

/// The folder that a path is in.
fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The folder, or the nearest above it that is there.
fn existing(path: &Path) -> PathBuf {
    let found = path.ancestors().find(|path| path.is_dir());
    found.unwrap_or(Path::new(".")).to_owned()
}

/// Whether a new image's option of that name is a file that is made with it.
fn is_made(key: &str) -> bool {
    let creators = DRIVERS.formats.iter().filter_map(|format| format.creating());
    creators.flat_map(|create| create.options()).any(|option| option.makes_file && option.name == key)
}

impl Typed {
    /// A file that is made: in its folder, or in that of the file that a link of its name leads to.
    fn makes(&mut self, word: &OsStr) {
        let bytes = word.as_bytes();
        let path = PathBuf::from(OsStr::from_bytes(bytes.strip_prefix(b"file:").unwrap_or(bytes)));
        // A device or a pipe that is there is written to where it is.
        if std::fs::metadata(&path).is_ok_and(|found| !found.is_file()) {
            self.sends |= pipe::is_pipe(&path);
            return;
        }
        if let Ok(Named::Protocol(protocol, _)) = DRIVERS.of_name(word) {
            self.sends |= protocol.sending().is_some();
        }
        self.folders.push(folder(&path));
        self.folders.extend(std::fs::canonicalize(&path).ok().map(|path| folder(&path)));
    }

    /// A word that is a name: a path, with protocols before it or not, a tree, a list of options.
    fn name(&mut self, word: &OsStr) {
        if let Some(text) = name::json_text(word) {
            return self.tree("", &serde_json::from_str(&text).unwrap_or_default());
        }
        self.path(word);
        if let Some(at) = word.as_bytes().iter().position(|byte| *byte == b'=') {
            // The operand of a key (`if=NAME`), or a list.
            self.path(OsStr::from_bytes(word.as_bytes().get(at + 1..).unwrap_or_default()));
            self.list(word);
        }
    }

    /// A path, with protocols before it or not.
    fn path(&mut self, word: &OsStr) {
        self.names.push(word.into());
        let mut rest = word;
        while let Some((_, below)) = name::protocol(rest) {
            if let Ok(Named::Protocol(protocol, _)) = DRIVERS.of_name(rest) {
                self.protocol(protocol);
            }
            let config = below.as_bytes().split(|byte| *byte == b':').next().unwrap_or_default();
            self.names.push(OsString::from_vec(config.to_vec()).into());
            self.names.push(below.into());
            rest = below;
        }
    }

    /// The name of a driver.
    fn driver(&mut self, name: &str) {
        if let Some(protocol) = DRIVERS.protocol(name) {
            self.protocol(protocol);
        }
    }

    fn protocol(&mut self, protocol: &dyn Protocol) {
        self.network |= protocol.is_remote();
        if protocol.keeps_what_comes() {
            self.kept += 1;
        }
        self.credentials.extend(protocol.credentials());
    }

    fn list(&mut self, word: &OsStr) {
        let Some(text) = word.to_str() else {
            let values = word.as_bytes().split(|byte| matches!(byte, b'=' | b','));
            return self.names.extend(values.map(|value| PathBuf::from(OsString::from_vec(value.to_vec()))));
        };
        for item in keys::items(text, Dialect::Words) {
            match item {
                Item::Pair(key, value) => self.value(&key, &value),
                Item::Word(word) => self.names.push(word.into()),
            }
        }
    }

    /// What a key is given.
    fn value(&mut self, key: &str, value: &str) {
        if is_made(key) {
            self.makes(OsStr::new(value));
        }
        match key.rsplit('.').next() {
            Some("driver") => self.driver(value),
            // Certificates, and the key to one.
            Some("dir") => self.allowed.push(value.into()),
            _ => {}
        }
        self.path(OsStr::new(value));
    }

    fn tree(&mut self, key: &str, tree: &Value) {
        match tree {
            Value::Object(members) => members.iter().for_each(|(key, value)| self.tree(key, value)),
            Value::Array(list) => list.iter().for_each(|value| self.tree(key, value)),
            Value::String(text) => self.value(key, text),
            _ => {}
        }
    }

    /// Files that are there, as they are named from here and from where files are made; the folders of those that are made;
    /// of other folders the names alone.
    fn confinement(self) -> Confinement {
        let Self { names, allowed, mut folders, network, credentials, in_any_order, sends, kept: _ } = self;
        if sends && in_any_order {
            folders.push(temporary::large_folder());
        }
        let beside = folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
        let files: Vec<PathBuf> = names.iter().cloned().chain(beside).collect();
        let listed = names.iter().map(|name| folder(name)).filter(|folder| folder.is_dir()).collect();
        // A pipe that has no name of its own (`/dev/stdout`) is nothing that the kernel could forbid.
        let files = files.into_iter().filter(|name| name.canonicalize().is_ok_and(|name| !name.is_dir()));
        let trusted = if network { authorities() } else { Vec::new() };
        let read = credentials.into_iter().chain(trusted).filter(|path| path.exists());
        Confinement { usable: files.chain(allowed).chain(folders).chain(read).collect(), listed, network }
    }
}

/// Whom to trust, where the variables of those who start us say so.
fn authorities() -> Vec<PathBuf> {
    let named = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    ["SSL_CERT_FILE", "SSL_CERT_DIR"].into_iter().filter_map(named).collect()
}
