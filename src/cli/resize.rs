//! `resize`: gives the guest's disk another size.

use std::ffi::OsString;

use serde_json::json;

use super::arguments::Makes;
use super::common::Common;
use super::exit::Exit;
use super::interrupt::Interrupt;
use super::output::ResultArgs;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand};
use crate::block::nearest::nearest;
use crate::block::{self, OpenHow, Purpose, number};
use crate::ops::resize::{self, Decision, NewSize};
use crate::storage::Preallocation;

/// The options.
#[derive(Debug, clap::Args)]
pub struct ResizeArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    result: ResultArgs,
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// how the new space is allocated: off, metadata, falloc or full
    ///
    /// default: off
    #[arg(long, value_name = "PREALLOC", value_parser = preallocation)]
    preallocation: Option<Preallocation>,
    /// allow the image to be made smaller, which deletes what lies past the new end
    #[arg(long)]
    shrink: bool,
    /// image to resize
    #[arg(value_name = "FILENAME")]
    name: Option<OsString>,
    /// size of the guest's disk, or behind a sign how much is added or taken away; with a suffix k, M, G, T, P, E (powers of 1024)
    #[arg(value_name = "[+-]SIZE[bkKMGTPE]", allow_hyphen_values = true)]
    size: Option<OsString>,
    #[arg(hide = true, allow_hyphen_values = true)]
    extra: Vec<OsString>,
}

const SHRINK_HINT: &str = "Use the --shrink option to perform a shrink operation.";

const SHRINK_WARNING: &str = "Shrinking an image will delete all data beyond the shrunken image's end. \
    Before performing such an operation, make sure there is no important data there.";

impl Subcommand for ResizeArgs {
    const NAME: &'static str = "resize";
    const ABOUT: &'static str = "Resize an image to the new size";
    const USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [--preallocation PREALLOC] [--shrink]",
        "[--object OBJDEF] [-q] FILENAME [+-]SIZE[bkKMGTPE]",
    ];
    const EXAMPLE: &'static str = "vimg resize disk.qcow2 +10G";
    const SIGNED_OPERANDS: bool = true;
    const MAKES: &'static [Makes] = &[Makes::Files("name")];

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = self.common.define(program)? else { return Ok(Exit::Success) };
        let (Some(name), Some(new)) = (&self.name, &self.size) else {
            return Err(Complaint::usage("Expecting image file name and size").into());
        };
        if !self.extra.is_empty() {
            return Err(Complaint::usage("Extra argument(s) in command line").into());
        }
        let new = new_size(&new.to_string_lossy())?;
        let fill = self.preallocation.unwrap_or_default();
        let source = ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: false };
        source.check()?;
        // Room that is reserved or written may take long: there a signal has its usual effect.
        let interrupt = matches!(fill, Preallocation::Off | Preallocation::Metadata).then(Interrupt::catch);
        let (image, how) = source.image(program, name)?;
        let opener = program.opener(&secrets);
        let node = opener.open(&image, &OpenHow { purpose: Purpose::Write, ..how });
        program.notices(&opener);
        let node = node?;
        program.works_on(node.name());
        let old = node.virtual_size();
        match resize::decide(&node, new, fill, self.shrink)? {
            Decision::WouldShrink if program.tells_results() => {
                return Err(Complaint::value(SHRINK_HINT).into());
            }
            Decision::WouldShrink => {
                program.error(SHRINK_HINT);
                program.warn(SHRINK_WARNING);
                return Ok(Exit::Failure);
            }
            Decision::Resize(size) => {
                opener.bound(node.name(), size)?;
                let work = || resize::resize(&node, size, fill);
                interrupt.as_ref().map_or_else(work, |interrupt| interrupt.during(work))?;
            }
        }
        if !self.common.quiet && !program.tells_results() {
            program.println("Image resized.");
        }
        let (name, format, size) = (node.name(), node.driver().format(), node.virtual_size());
        let members = json!({"filename": name, "format": format, "old-virtual-size": old, "virtual-size": size});
        program.result(members);
        Ok(Exit::Success)
    }
}

fn preallocation(word: &str) -> Result<Preallocation, Complaint> {
    let meant = || nearest(word, Preallocation::NAMES);
    Preallocation::parse(word)
        .ok_or_else(|| Complaint::misspelt(format!("Invalid preallocation mode '{word}'"), meant()))
}

fn new_size(text: &str) -> block::Result<NewSize> {
    let (make, sign): (fn(u64) -> NewSize, _) = match text.get(..1) {
        Some("+") => (NewSize::More, "+"),
        Some("-") => (NewSize::Less, "-"),
        _ => (NewSize::Absolute, ""),
    };
    number::key_size_behind(sign, "size", text.strip_prefix(sign).unwrap_or(text)).map(make)
}
