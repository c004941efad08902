//! `create`: makes a new, empty image, perhaps on top of a backing file.

use std::ffi::OsString;

use anyhow::Context;
use serde_json::{Map, Value, json};

use super::arguments::Makes;
use super::common::Common;
use super::exit::Exit;
use super::ids::IdArgs;
use super::output::ResultArgs;
use super::{Complaint, Program, Subcommand, options, size};
use crate::ops::create::{self, NewImage, Target, Wanted};

/// The options.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    ids: IdArgs,
    #[command(flatten)]
    result: ResultArgs,
    /// format of the new image, raw if not given
    #[arg(id = "target_format", short = 'f', long = "format", value_name = "FMT")]
    format: Option<String>,
    /// backing file: what the new image does not hold itself is read from it
    ///
    /// default: no backing file
    #[arg(short, long, value_name = "BACKING_FILENAME")]
    backing: Option<OsString>,
    /// format of the backing file
    ///
    /// default: none; it has to be given where -b names a file
    #[arg(short = 'F', short_alias = 'B', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// do not open the backing file
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// options of the format, key=value,... ('-o help' lists them)
    ///
    /// default: as '-o help' says of each
    #[arg(id = "target_format_options", short = 'o', long = "options", value_name = "FMT_OPTS", value_parser = options::lists())]
    options: Vec<OsString>,
    /// image to create; one that is there already is replaced
    #[arg(value_name = "FILENAME")]
    name: Option<OsString>,
    /// size of the guest's disk in bytes, or with a suffix k, M, G, T, P, E (powers of 1024); with a backing file, that file's size if not given
    #[arg(value_name = "SIZE[bkKMGTPE]")]
    size: Option<OsString>,
    #[arg(hide = true)]
    extra: Vec<OsString>,
}

impl Subcommand for CreateArgs {
    const NAME: &'static str = "create";
    const ABOUT: &'static str = "Create and format a new image file";
    const USAGE: &'static [&'static str] = &[
        "[-f FMT] [-o FMT_OPTS] [-b BACKING_FILENAME [-F BACKING_FMT]]",
        "[--object OBJDEF] [-u] [-q] FILENAME [SIZE[bkKMGTPE]]",
    ];
    const EXAMPLE: &'static str = "vimg create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2";
    const MAKES: &'static [Makes] = &[Makes::Files("name")];

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = self.common.define(program)? else { return Ok(Exit::Success) };
        let opener = program.opener(&secrets);
        let format = self.format.as_deref().unwrap_or("raw");
        let given = options::joined(&self.options).unwrap_or_default();
        if given.help {
            let target = Target::find(opener.drivers(), format, self.name.as_deref())?;
            options::help(program, target.options().specs(), self.name.is_none().then_some(format));
            return Ok(Exit::Success);
        }
        let name = self.name.ok_or_else(|| Complaint::usage("Expecting image file name"))?;
        let bytes = self.size.map(|text| size::size("image size", &text.to_string_lossy())).transpose()?;
        if let Some(extra) = self.extra.first() {
            return Err(Complaint::usage(format!("Unexpected argument: {}", extra.to_string_lossy())).into());
        }
        let shown = name.to_string_lossy().into_owned();
        program.works_on(&shown);
        let new = || -> anyhow::Result<NewImage> {
            let target = Target::find(opener.drivers(), format, Some(&name))?;
            let mut options = target.options();
            options::apply(&given, &mut options)?;
            let wanted = Wanted {
                name: &name,
                target,
                size: bytes,
                options,
                backing: self.backing,
                backing_format: self.backing_format,
                backing_unseen: self.backing_unsafe,
                ids: self.ids.choice(),
            };
            Ok(wanted.decide(&opener)?)
        }();
        program.notices(&opener);
        let new = new.with_context(|| shown.clone())?;
        if self.format.is_none() {
            program.warn_of_raw(&new.name, "-f");
        }
        if !self.common.quiet && !program.tells_results() {
            program.println(&formatting(&new));
            program.flush();
        }
        let warnings = create::create(&new, &opener).with_context(|| shown)?;
        warnings.iter().for_each(|text| program.warn(text));
        let options: Map<String, Value> =
            new.options.shown().into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect();
        let (name, format) = (new.shown(), new.format.name());
        program.result(json!({"filename": name, "format": format, "virtual-size": new.size, "options": options}));
        Ok(Exit::Success)
    }
}

/// The line that says what is about to be made.
fn formatting(new: &NewImage) -> String {
    let mut line = format!("Formatting '{}', fmt={}", new.name.to_string_lossy(), new.format.name());
    for (key, value) in new.options.shown() {
        line.push_str(&format!(" {key}={value}"));
    }
    line
}
