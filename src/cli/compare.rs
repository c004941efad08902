//! `compare`: says whether the disks of two images hold the same, in whatever formats they are stored.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Arc;

use super::exit::Exit;
use super::passphrase::PassphraseArgs;
use super::progress::{Progress, ProgressArgs};
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, cache, object, report};
use crate::block::{Node, OpenHow, Opener};
use crate::ops::compare::{CompareFailure, CompareOptions, CompareStep, Comparison, Difference, Side};
use crate::ops::copy::Observer;
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct CompareArgs {
    /// format of the first image, detected if not given
    #[arg(short = 'f', long, alias = "left-format", value_name = "FMT")]
    a_format: Option<String>,
    /// format of the second image, detected if not given
    #[arg(short = 'F', long, alias = "right-format", value_name = "FMT")]
    b_format: Option<String>,
    /// sizes, and what is allocated, have to be the same too
    #[arg(short, long)]
    strict: bool,
    /// how the images are cached: none, writeback, unsafe, directsync, writethrough
    ///
    /// default: writeback
    #[arg(short = 'T', long, value_name = "CACHE")]
    cache: Option<String>,
    /// images are named by lists of options key=value,..., not by file names
    #[arg(long)]
    image_opts: bool,
    /// allow other writers: do not lock the images
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    /// print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    #[command(flatten)]
    passphrase: PassphraseArgs,
    /// images to compare
    #[arg(value_name = "FILENAME1 FILENAME2")]
    operands: Vec<OsString>,
}

/// A report of progress is made when it has moved by more than this, in percent.
const STEP: f64 = 2.0;

impl Observer for Progress {
    fn wants_progress(&self) -> bool {
        self.wanted()
    }

    fn progress(&self, done: u64, total: u64) {
        self.report(done, total);
    }
}

impl Subcommand for CompareArgs {
    const NAME: &'static str = "compare";
    const ABOUT: &'static str = "Check if two images have the same content";
    const USAGE: &'static [&'static str] =
        &["[[-f FMT] [-F FMT] | --image-opts] [-s] [-T CACHE] [-U]", "[--object OBJDEF] [-p] [-q] FILENAME1 FILENAME2"];
    const EXAMPLE: &'static str = "vimg compare disk.raw disk.qcow2";
    const BAD_VALUE: Exit = Exit::NotOpened;

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let names = match &self.operands[..] {
            [left, right] => [left, right],
            _ => return Err(Complaint::usage("Expecting two image file names").into()),
        };
        match self.compare(program, names) {
            Ok(exit) => Ok(exit),
            Err(error) => {
                report::error(program, &error);
                Ok(Exit::NotOpened)
            }
        }
    }
}

impl CompareArgs {
    /// What fails here fails before anything is compared.
    fn compare(&self, program: &Program, names: [&OsString; 2]) -> anyhow::Result<Exit> {
        let Some(secrets) = object::define(program, &self.object)? else { return Ok(Exit::Success) };
        let secrets = self.passphrase.given_to(program, secrets)?;
        let typed = names.iter().filter(|_| !self.image_opts).map(PathBuf::from);
        let opener = typed.fold(program.opener(&secrets), |opener, path| opener.allowing(&path));
        let cache = self.cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::source)?;
        let [left, right] = names;
        let progress = self.progress.start_with_step(program, self.quiet, "compare", STEP)?;
        let left_node = self.open(program, &opener, left, &self.a_format, cache)?;
        let right_node = self.open(program, &opener, right, &self.b_format, cache)?;
        let options = CompareOptions { strict: self.strict, threads: None };
        let comparison = Comparison::new(&left_node, &right_node, options, &progress);
        let say = |text: &str| {
            if !self.quiet {
                program.println(text);
                // Before what progress shows next.
                program.flush();
            }
        };
        let mut found = comparison.common();
        if comparison.sizes_differ() && matches!(found, Ok(None)) {
            say("Warning: Image size mismatch!");
            found = comparison.rest();
        }
        Ok(match found {
            Ok(None) => {
                say("Images are identical.");
                Exit::Success
            }
            Ok(Some(difference)) => {
                say(&match difference {
                    Difference::Size => "Strict mode: Image size mismatch!".to_owned(),
                    Difference::Status(at) => format!("Strict mode: Offset {at} block status mismatch!"),
                    Difference::Content(at) => format!("Content mismatch at offset {at}!"),
                });
                Exit::Failure
            }
            Err(failure) => {
                let names = if failure.side == Side::Left { (left, &left_node) } else { (right, &right_node) };
                tell(program, &failure, names)
            }
        })
    }

    fn open(
        &self,
        program: &Program,
        opener: &Opener<'_>,
        name: &OsStr,
        format: &Option<String>,
        cache: CacheMode,
    ) -> anyhow::Result<Arc<Node>> {
        let source =
            ImageArgs { format: format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let (image, how) = source.image(program, name)?;
        let node = opener.open(&image, &OpenHow { cache, ..how });
        program.notices(opener);
        Ok(node?)
    }
}

/// Says why the images cannot be compared.
fn tell(program: &Program, failure: &CompareFailure, (typed, node): (&OsString, &Arc<Node>)) -> Exit {
    failure.error.all_notes().iter().for_each(|note| program.line(note));
    let (at, typed) = (failure.at, typed.to_string_lossy());
    let (what, exit) = match failure.step {
        CompareStep::Status => (format!("Sector allocation test failed for {typed}"), Exit::NoStatus),
        CompareStep::Read => (format!("Error while reading offset {at} of {typed}"), Exit::Unreadable),
        CompareStep::Whole => (format!("Error while reading {typed}"), Exit::Unreadable),
    };
    let cause = failure.cause(node.name());
    program.error(&cause.map_or_else(|| what.clone(), |cause| format!("{what}: {cause}")));
    failure.error.all_hints().iter().for_each(|hint| program.line(hint));
    exit
}
