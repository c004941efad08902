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

use super::{Complaint, Program, size};
use crate::block::keys::{self, Dialect, Item};
use crate::block::name;
use crate::storage::confine::Confinement;
use crate::storage::host;

/// Options whose values name files.
const FILES: &[&str] = &["backing", "base", "source_file", "repair_to", "passphrase_file", "target_passphrase_file"];

/// Options whose values are lists in which files are named.
const LISTS: &[&str] = &["object", "options", "target_format_options"];

/// Which of the files that a subcommand names it makes, in its folder: the values of one argument, and which of them.
const MADE: &[(&str, &str, Which)] = &[
    ("create", "name", Which::Any),
    ("convert", "operands", Which::Last),
    ("dd", "operands", Which::Any),
    ("check", "repair_to", Which::Any),
    ("resize", "name", Which::Any),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Any,
    Last,
}

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
            .help("with --untrusted: images may name that file, or files in that folder"),
        Arg::new("max-size")
            .long("max-size")
            .value_name("SIZE")
            .value_parser(|text: &str| size::size("largest disk", text))
            .help("refuse images whose disk is larger than that"),
        Arg::new("max-output")
            .long("max-output")
            .value_name("SIZE")
            .value_parser(|text: &str| size::size("largest file", text))
            .help("write no file that is longer than that"),
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
            .map_err(|errno| Complaint::value(errno.desc()))
            .context("The length of files cannot be limited")?;
    }
    Ok(())
}

/// Leaves this process nothing but what the command line names.
pub fn confine(command: &Command, matches: &[&ArgMatches]) -> anyhow::Result<()> {
    let mut typed = Typed::default();
    let values = |id: &str| -> Vec<OsString> {
        let raw = matches.iter().filter_map(|matches| matches.try_get_raw(id).ok().flatten());
        raw.flat_map(|values| values.map(OsStr::to_owned).collect::<Vec<_>>()).collect()
    };
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        for value in values(id) {
            match () {
                () if id == "allow" => typed.allowed.push(value.into()),
                () if arg.is_positional() || FILES.contains(&id) => typed.name(&value),
                () if LISTS.contains(&id) => typed.list(&value),
                () => {}
            }
        }
    }
    for (_, id, which) in MADE.iter().filter(|(name, ..)| *name == command.get_name()) {
        let named = values(id);
        let skip = if *which == Which::Last { named.len().saturating_sub(1) } else { 0 };
        named.iter().skip(skip).for_each(|word| typed.makes(word));
    }
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
}

/// The folder that a path is in.
fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

impl Typed {
    /// A file that is made: in its folder, or in that of the file that a link of its name leads to.
    fn makes(&mut self, word: &OsStr) {
        let bytes = word.as_bytes().strip_prefix(b"of=").unwrap_or(word.as_bytes());
        let bytes = bytes.strip_prefix(b"file:").unwrap_or(bytes);
        if bytes.starts_with(b"if=") {
            return;
        }
        let path = PathBuf::from(OsStr::from_bytes(bytes));
        // A device or a pipe that is there is written to where it is.
        if std::fs::metadata(&path).is_ok_and(|found| !found.is_file()) {
            return;
        }
        self.folders.push(folder(&path));
        self.folders.extend(std::fs::canonicalize(&path).ok().map(|path| folder(&path)));
    }

    /// A word that is a name: a path, with protocols before it or not, a tree, a list of options.
    fn name(&mut self, word: &OsStr) {
        // `dd` says which is which in the word.
        let bytes = word.as_bytes();
        let bytes = bytes.strip_prefix(b"if=").or_else(|| bytes.strip_prefix(b"of=")).unwrap_or(bytes);
        let word = OsStr::from_bytes(bytes);
        self.names.push(word.into());
        if let Some(text) = name::json_text(word) {
            self.network = true;
            return self.tree(&serde_json::from_str(&text).unwrap_or_default());
        }
        let mut rest = word;
        while let Some((_, below)) = name::protocol(rest) {
            self.network |= below.as_bytes().starts_with(b"//") || rest.as_bytes().starts_with(b"nbd:");
            let config = below.as_bytes().split(|byte| *byte == b':').next().unwrap_or_default();
            self.names.push(OsString::from_vec(config.to_vec()).into());
            self.names.push(below.into());
            rest = match below.as_bytes().iter().position(|byte| *byte == b':') {
                Some(_) if below.len() < rest.len() => below,
                _ => break,
            };
        }
        if bytes.contains(&b'=') {
            self.list(word);
        }
    }

    fn list(&mut self, word: &OsStr) {
        let Some(text) = word.to_str() else {
            let values = word.as_bytes().split(|byte| matches!(byte, b'=' | b','));
            return self.names.extend(values.map(|value| PathBuf::from(OsString::from_vec(value.to_vec()))));
        };
        for item in keys::items(text, Dialect::Words) {
            match item {
                Item::Pair(key, value) => {
                    if key == "data_file" {
                        // It is made with the image.
                        self.makes(OsStr::new(&value));
                    }
                    self.network |= key.ends_with("host") || key.ends_with("path") || value.contains("://");
                    if key == "dir" {
                        // Certificates, and the key to one.
                        self.allowed.push((&value).into());
                    }
                    self.names.push(value.into());
                }
                Item::Word(word) => self.names.push(word.into()),
            }
        }
    }

    fn tree(&mut self, tree: &Value) {
        match tree {
            Value::Object(members) => members.values().for_each(|value| self.tree(value)),
            Value::Array(list) => list.iter().for_each(|value| self.tree(value)),
            Value::String(text) => self.names.push(text.into()),
            _ => {}
        }
    }

    /// Files that are there, as they are named from here and from where files are made; the folders of those that are made;
    /// of other folders the names alone.
    fn confinement(self) -> Confinement {
        let Self { names, allowed, folders, network } = self;
        let beside = folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
        let files: Vec<PathBuf> = names.iter().cloned().chain(beside).collect();
        let listed = names.iter().map(|name| folder(name)).filter(|folder| folder.is_dir()).collect();
        // A pipe that has no name of its own (`/dev/stdout`) is nothing that the kernel could forbid.
        let files = files.into_iter().filter(|name| name.canonicalize().is_ok_and(|name| !name.is_dir()));
        let environment = if network { of_environment(&names) } else { Vec::new() };
        Confinement { usable: files.chain(allowed).chain(folders).chain(environment).collect(), listed, network }
    }
}

/// What the variables of those who start us name that is read for a connection: whom to trust, and who asks a store.
fn of_environment(names: &[PathBuf]) -> Vec<PathBuf> {
    let named = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let at_home = |file: &str| Some(named("HOME")?.join(".aws").join(file));
    let mut found = vec![named("SSL_CERT_FILE"), named("SSL_CERT_DIR")];
    if names.iter().any(|name| name.as_os_str().as_bytes().starts_with(b"s3:")) {
        found.push(named("AWS_SHARED_CREDENTIALS_FILE").or_else(|| at_home("credentials")));
        found.push(named("AWS_CONFIG_FILE").or_else(|| at_home("config")));
    }
    found.into_iter().flatten().filter(|path| path.exists()).collect()
}
