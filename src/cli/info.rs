//! `info`: shows what is known of an image, or of a whole backing chain.

use std::ffi::OsString;

use serde_json::{Value, json as tree};

use super::exit::{self, Exit};
use super::output::OutputForm;
use super::passphrase::PassphraseArgs;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, cache, human, json, object, report};
use crate::block::OpenHow;
use crate::ops::info::{self, Info};
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct InfoArgs {
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// form of the output: human or json
    ///
    /// default: human
    #[arg(long, value_name = "human|json", value_parser = OutputForm::parse)]
    output: Option<OutputForm>,
    /// show the whole backing chain
    #[arg(short, long)]
    backing_chain: bool,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// allow other writers: do not lock the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// how the image is cached: none, writeback, unsafe, directsync, writethrough
    ///
    /// default: writeback
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    #[command(flatten)]
    passphrase: PassphraseArgs,
    /// image to show
    #[arg(value_name = "FILENAME")]
    operands: Vec<OsString>,
}

impl Subcommand for InfoArgs {
    const NAME: &'static str = "info";
    const ABOUT: &'static str = "Display information about an image";
    const USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [--backing-chain] [-U] [-t CACHE]",
        "[--object OBJDEF] [--output human|json] FILENAME",
    ];
    const OWN_USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [--backing-chain] [-U] [-t CACHE]",
        "[--object OBJDEF] [--output human|json] FILENAME [FILENAME2...]",
    ];
    const EXAMPLE: &'static str = "vimg info --output=json --backing-chain overlay.qcow2";

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = object::define(program, &self.object)? else { return Ok(Exit::Success) };
        let secrets = self.passphrase.given_to(program, secrets)?;
        if self.operands.is_empty() || (self.operands.len() > 1 && !program.is_vimg()) {
            return Err(Complaint::usage("Expecting one image file name").into());
        }
        let source =
            ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let cache = self.cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::target)?;
        let look = |name: &OsString| -> anyhow::Result<Vec<Info>> {
            let (image, how) = source.image(program, name)?;
            let opener = program.opener(&secrets);
            let infos = info::chain(&opener, &image, &OpenHow { cache, ..how }, self.backing_chain);
            program.notices(&opener);
            Ok(infos?)
        };
        if let [name] = &self.operands[..] {
            let infos = look(name)?;
            match self.output {
                Some(OutputForm::Json) => program.println(&json::pretty(&self.tree(program, &infos))),
                _ => program.print(&texts(program, &infos)),
            }
            return Ok(Exit::Success);
        }
        // Of several, those that cannot be shown do not keep the others from being.
        let (mut trees, mut shown, mut exit) = (Vec::new(), Vec::new(), Exit::Success);
        for name in &self.operands {
            match look(name) {
                Ok(infos) => {
                    trees.push(self.tree(program, &infos));
                    shown.push(texts(program, &infos));
                }
                Err(error) => {
                    report::error(program, &error);
                    exit = exit::of(&error);
                    trees.push(tree!({"filename": name.to_string_lossy(), "error": report::to_json(program, &error)}));
                }
            }
        }
        match self.output {
            Some(OutputForm::Json) => program.println(&json::pretty(&trees.into())),
            _ => program.print(&shown.join("\n")),
        }
        Ok(exit)
    }
}

impl InfoArgs {
    /// What JSON shows of one image: all layers, or the only one that was looked at. Where it is not trusted, with the
    /// files that it names.
    fn tree(&self, program: &Program, infos: &[Info]) -> Value {
        let one = |info: &Info| {
            let mut tree = info::to_json(info);
            if program.is_untrusting() {
                tree["external-references"] = info::references_json(info);
            }
            tree
        };
        match infos {
            [info] if !self.backing_chain => one(info),
            _ => infos.iter().map(one).collect(),
        }
    }
}

/// A paragraph for each layer, the same.
fn texts(program: &Program, infos: &[Info]) -> String {
    let one = |info: &Info| {
        let mut shown = text(info, 0, "/");
        if program.is_untrusting() && !info.references.is_empty() {
            shown.push_str("External references:\n");
            info.references.iter().for_each(|(kind, name)| shown.push_str(&format!("    {kind}: {name}\n")));
        }
        shown
    };
    infos.iter().map(one).collect::<Vec<_>>().join("\n")
}

/// A node and what it is made of.
fn text(info: &Info, level: usize, path: &str) -> String {
    let mut out = String::new();
    let mut line = |text: &str| {
        out.extend(std::iter::repeat_n("    ", level));
        out.push_str(text);
        out.push('\n');
    };
    let on_host = info.actual_size.map_or_else(|| "unavailable".to_owned(), human::size);
    if level > 0 && info.children.is_empty() {
        line(&format!("filename: {}", info.filename));
        line(&format!("protocol type: {}", info.format));
        line(&format!("file length: {}", human::size_and_bytes(info.virtual_size)));
        line(&format!("disk size: {on_host}"));
    } else {
        line(&format!("image: {}", info.filename));
        line(&format!("file format: {}", info.format));
        line(&format!("virtual size: {}", human::size_and_bytes(info.virtual_size)));
        line(&format!("disk size: {on_host}"));
    }
    if info.encrypted {
        line("encrypted: yes");
    }
    if let Some(size) = info.cluster_size {
        line(&format!("cluster_size: {size}"));
    }
    if info.dirty == Some(true) {
        line("cleanly shut down: no");
    }
    if let Some(backing) = &info.backing {
        let place = match &backing.path {
            None => " (cannot determine actual path)".to_owned(),
            Some(_) if info::same_name(backing) => String::new(),
            Some(path) => format!(" (actual path: {})", path.to_string_lossy()),
        };
        line(&format!("backing file: {}{place}", backing.name.display()));
        if let Some(format) = &backing.format {
            line(&format!("backing file format: {format}"));
        }
    }
    if !info.snapshots.is_empty() {
        line("Snapshot list:");
        line(&human::snapshot_head());
        info.snapshots.iter().for_each(|snapshot| line(&human::snapshot_row(snapshot)));
    }
    if let Some((_, members)) = &info.specific
        && !members.is_empty()
    {
        line("Format specific information:");
        out.push_str(&facts(&Value::Object(members.clone()), level + 1));
    }
    for (role, child) in &info.children {
        let path = format!("{path}{role}");
        out.extend(std::iter::repeat_n("    ", level));
        out.push_str(&format!("Child node '{path}':\n"));
        out.push_str(&text(child, level + 1, &format!("{path}/")));
    }
    out
}

/// Members of an object, or elements of a list, a line each; what has members itself goes a level deeper.
fn facts(value: &Value, level: usize) -> String {
    let members: Vec<(String, &Value)> = match value {
        Value::Object(object) => crate::block::name::in_order(object)
            .into_iter()
            .map(|(key, value)| (key.replace('-', " "), value))
            .collect(),
        Value::Array(list) => list.iter().enumerate().map(|(n, value)| (format!("[{n}]"), value)).collect(),
        _ => Vec::new(),
    };
    let mut out = String::new();
    for (key, value) in members {
        out.extend(std::iter::repeat_n("    ", level));
        match value {
            Value::Object(_) | Value::Array(_) => {
                out.push_str(&format!("{key}:\n"));
                out.push_str(&facts(value, level + 1));
            }
            Value::String(text) => out.push_str(&format!("{key}: {text}\n")),
            other => out.push_str(&format!("{key}: {other}\n")),
        }
    }
    out
}
