//! `amend`: changes options that an image was made with.

use std::ffi::OsString;

use super::common::Common;
use super::exit::Exit;
use super::interrupt::Interrupt;
use super::options::Pairs;
use super::passphrase::NewPassphraseArgs;
use super::progress::{Progress, ProgressArgs};
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, cache, options};
use crate::block::driver::AmendRequest;
use crate::block::{CreateOptions, Error, ErrorKind, Format, OpenHow, OptionValue, Purpose, Result, Secrets, format};
use crate::ops::amend;
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct AmendArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    progress: ProgressArgs,
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// how the image is cached: none, writeback, unsafe, directsync, writethrough
    ///
    /// default: writeback
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// do what makes all data unreadable too: erase the last key slot, overwrite one that is in use
    #[arg(long)]
    force: bool,
    /// what is changed, key=value,... ('-o help' lists them)
    #[arg(short, long, value_name = "OPTIONS", value_parser = options::lists())]
    options: Vec<OsString>,
    #[command(flatten)]
    new_passphrase: NewPassphraseArgs,
    /// image to change
    #[arg(value_name = "FILENAME")]
    operands: Vec<OsString>,
}

impl Subcommand for AmendArgs {
    const NAME: &'static str = "amend";
    const ABOUT: &'static str = "Update format-specific options of the image";
    const USAGE: &'static [&'static str] =
        &["[-f FMT | --image-opts] [-t CACHE] [--force] [-p] [-q]", "[--object OBJDEF] -o OPTIONS FILENAME"];
    const EXAMPLE: &'static str = "vimg amend -o lazy_refcounts=on disk.qcow2";

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = self.common.define_with_new(&self.new_passphrase, program)? else {
            return Ok(Exit::Success);
        };
        let given = options::joined(&self.options).ok_or_else(|| Complaint::usage("Must specify options (-o)"))?;
        let wanted = self.progress.ends_line(self.common.quiet);
        let mut progress = None;
        let done = self.amend(program, &secrets, &given, &mut progress);
        if wanted && progress.is_none() {
            // The line of a progress that has not begun.
            program.println("");
        }
        done.map(|()| Exit::Success)
    }
}

impl AmendArgs {
    /// `progress` begins when all is known that can be wrong with the command line.
    fn amend(
        &self,
        program: &Program,
        secrets: &Secrets,
        given: &Pairs,
        progress: &mut Option<Progress>,
    ) -> anyhow::Result<()> {
        let opener = program.opener(secrets);
        let formats = opener.drivers().formats;
        if given.help
            && let Some(name) = &self.format
        {
            return Ok(help(program, format::find(formats, name)?)?);
        }
        let [name] = &self.operands[..] else {
            return Err(Complaint::value("Expecting one image file name").into());
        };
        let cache = self.cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::target)?;
        let source = ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: false };
        source.check()?;
        let interrupt = Interrupt::catch();
        let (image, how) = source.image(program, name)?;
        let node = opener.open(&image, &OpenHow { purpose: Purpose::Write, cache, ..how });
        program.notices(&opener);
        let node = node?;
        amend::amending(&node)?;
        let format = format::find(formats, node.driver().format())?;
        if given.help {
            return Ok(help(program, format)?);
        }
        let mut options = CreateOptions::new(&[format.amend_options()]);
        options::apply(given, &mut options).map_err(|error| match is_for_new(given, format) {
            true => error.hint("This option is only supported for image creation"),
            false => error,
        })?;
        if let Some(OptionValue::Size(size)) = options.given("size") {
            opener.bound(node.name(), *size)?;
        }
        let shown = progress.insert(self.progress.start(program, self.common.quiet, "amend")?);
        let report = |done: u64, total: u64| {
            if done == 0 {
                shown.begin();
            }
            shown.report(done, total);
            if interrupt.is_caught() { Err(Error::new(ErrorKind::Cancelled, "Interrupted")) } else { Ok(()) }
        };
        let request = AmendRequest { options: &options, secrets, force: self.force, progress: &report };
        let done = interrupt.during(|| amend::amend(&node, &request));
        shown.report(1, 1);
        Ok(done?)
    }
}

/// Whether these options are all right, but for what a new image alone can have.
fn is_for_new(given: &Pairs, format: &dyn Format) -> bool {
    let Some(create) = format.creating() else { return false };
    options::apply(given, &mut CreateOptions::new(&[format.amend_options(), create.options()])).is_ok()
}

fn help(program: &Program, format: &dyn Format) -> Result<()> {
    let (name, specs) = (format.name(), format.amend_options());
    if specs.is_empty() {
        return Err(Error::unsupported(format!("Format driver '{name}' does not support option amendment")));
    }
    program.println(&format!("Amend options for '{name}':"));
    options::print_specs(program, specs);
    Ok(())
}
