//! `measure`: says how much room an image takes, before it is made.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use anyhow::Context;
use serde_json::{Map, Value};

use super::convert::{SnapshotArg, snapshot};
use super::exit::Exit;
use super::output::OutputForm;
use super::passphrase::PassphraseArgs;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, json, object, options, size};
use crate::block::measure::Measured;
use crate::block::{Node, Opener};
use crate::ops::convert::decide::at_snapshot;
use crate::ops::create::Target;
use crate::ops::measure::MeasuredTarget;

/// The options.
#[derive(Debug, clap::Args)]
pub struct MeasureArgs {
    /// format of the new image, raw if not given
    #[arg(short = 'O', long, value_name = "FMT")]
    target_format: Option<String>,
    /// options of the new image's format, key=value,...
    #[arg(short = 'o', long, alias = "options", value_name = "FMT_OPTS", value_parser = options::lists())]
    target_format_options: Vec<OsString>,
    /// the size of a new disk that holds nothing yet, in place of FILENAME
    #[arg(short, long, value_name = "SIZE", value_parser = disk)]
    size: Option<u64>,
    /// format of FILENAME, detected if not given
    #[arg(short = 'f', long = "source-format", alias = "format", value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options key=value,...
    #[arg(long, alias = "source-image-opts")]
    image_opts: bool,
    /// measure for an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME
    ///
    /// default: the disk as it is now
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = snapshot)]
    snapshot: Option<SnapshotArg>,
    /// allow other writers: do not lock FILENAME
    #[arg(short = 'U', long)]
    force_share: bool,
    /// form of the output: human or json
    ///
    /// default: human
    #[arg(long, value_name = "human|json", value_parser = OutputForm::parse)]
    output: Option<OutputForm>,
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    #[command(flatten)]
    passphrase: PassphraseArgs,
    /// image whose content the new one shall hold
    #[arg(value_name = "FILENAME")]
    operands: Vec<OsString>,
}

fn disk(text: &str) -> Result<u64, Complaint> {
    size::size("image size", text)
}

impl Subcommand for MeasureArgs {
    const NAME: &'static str = "measure";
    const ABOUT: &'static str = "Calculate file size required for a new image";
    const USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [-l SNAPSHOT] [-U] [-O TGT_FMT]",
        "[-o TGT_FMT_OPTS] [--output human|json] [--object OBJDEF]",
        "(--size SIZE | FILENAME)",
    ];
    const EXAMPLE: &'static str = "vimg measure -O vmdk -o subformat=streamOptimized disk.qcow2";

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = object::define(program, &self.object)? else { return Ok(Exit::Success) };
        let secrets = self.passphrase.given_to(program, secrets)?;
        let warnings = self.snapshot.iter().flat_map(|snapshot| &snapshot.warnings);
        warnings.for_each(|(warning, hint)| program.deprecated(warning, hint));
        let wrong = |text: &str| Err(Complaint::value(text).into());
        let name = match &self.operands[..] {
            [] => None,
            [name] => Some(name),
            _ => return wrong("At most one filename argument is allowed."),
        };
        if name.is_none() && (self.image_opts || self.format.is_some() || self.snapshot.is_some()) {
            return wrong("--image-opts, -f, and -l require a filename argument.");
        }
        let opener = program.opener(&secrets);
        let source = match (name, self.size) {
            (None, None) => return wrong("Either --size N or one filename must be specified."),
            (Some(_), Some(_)) => return wrong("--size N cannot be used together with a filename."),
            (Some(name), None) => Some(self.source(program, &opener, name)?),
            (None, Some(_)) => None,
        };
        let format = self.target_format.as_deref().unwrap_or("raw");
        // The options of plain files go with those of the format.
        let target = Target::find(opener.drivers(), format, Some(OsStr::new("file")))?;
        let mut create_options = target.options();
        let given = options::joined(&self.target_format_options).unwrap_or_default();
        let taken = match given.help {
            true => Err(crate::block::Error::invalid("Invalid parameter 'help'")),
            false => options::apply(&given, &mut create_options),
        };
        if let Err(error) = taken {
            program.error(&error.message());
            error.all_hints().iter().for_each(|hint| program.line(hint));
            return wrong(&format!("Invalid options for file format '{format}'"));
        }
        let target = MeasuredTarget { format: target.format, options: &create_options, secrets: &secrets };
        let measured = match &source {
            Some(node) => target.of_image(node)?,
            None => target.of_size(self.size.unwrap_or(0))?,
        };
        match self.output.unwrap_or_default() {
            OutputForm::Human => text(program, &measured),
            OutputForm::Json => program.println(&json::pretty(&tree(&measured))),
        }
        Ok(Exit::Success)
    }
}

impl MeasureArgs {
    /// The image that is measured, as it was at the snapshot that was asked for.
    fn source(&self, program: &Program, opener: &Opener<'_>, name: &OsStr) -> anyhow::Result<Arc<Node>> {
        let source =
            ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let (image, how) = source.image(program, name)?;
        let node = opener.open(&image, &how);
        program.notices(opener);
        let node = node?;
        match &self.snapshot {
            Some(snapshot) => at_snapshot(&node, &snapshot.key).context("Failed to load snapshot"),
            None => Ok(node),
        }
    }
}

fn text(program: &Program, measured: &Measured) {
    program.println(&format!("required size: {}", measured.required));
    program.println(&format!("fully allocated size: {}", measured.fully_allocated));
    if let Some(bitmaps) = measured.bitmaps {
        program.println(&format!("bitmaps size: {bitmaps}"));
    }
}

fn tree(measured: &Measured) -> Value {
    let mut tree = Map::new();
    tree.extend(measured.bitmaps.map(|bitmaps| ("bitmaps".to_owned(), bitmaps.into())));
    tree.insert("required".to_owned(), measured.required.into());
    tree.insert("fully-allocated".to_owned(), measured.fully_allocated.into());
    Value::Object(tree)
}
