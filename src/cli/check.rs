//! `check`: looks for damage in an image's tables, and mends it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::arguments::Makes;
use super::common::Common;
use super::exit::Exit;
use super::interrupt::Interrupt;
use super::output::OutputForm;
use super::program::stderr_line;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, cache, help, json};
use crate::block::check::{CheckReport, Findings, Fix};
use crate::block::error::Context;
use crate::block::{OpenHow, Policy, Purpose};
use crate::ops::check;
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    common: Common,
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// how the image is cached: none, writeback, unsafe, directsync, writethrough
    ///
    /// default: writeback
    #[arg(short = 'T', long, value_name = "CACHE")]
    cache: Option<String>,
    /// allow other writers: do not lock the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// form of the output: human or json
    ///
    /// default: human
    #[arg(long, value_name = "human|json", value_parser = OutputForm::parse)]
    output: Option<OutputForm>,
    /// mend the image: space that nothing uses, or all that can be mended
    ///
    /// default: only look
    #[arg(short, long, value_name = "leaks|all", value_parser = fix)]
    repair: Option<Fix>,
    /// mend a copy of the image, which appears as FILE when it is mended, and leave the image alone; all that can be
    /// mended, if -r does not say otherwise
    #[arg(long, value_name = "FILE", help_heading = help::OWN)]
    repair_to: Option<PathBuf>,
    /// image to check
    #[arg(value_name = "FILENAME")]
    operands: Vec<OsString>,
}

fn fix(word: &str) -> Result<Fix, Complaint> {
    match word {
        "leaks" => Ok(Fix::Leaks),
        "all" => Ok(Fix::All),
        other => Err(Complaint::usage(format!("--repair (-r) expects 'leaks' or 'all' not '{other}'"))),
    }
}

impl Subcommand for CheckArgs {
    const NAME: &'static str = "check";
    const ABOUT: &'static str = "Check basic image integrity";
    const USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [-T CACHE] [-r leaks|all] [-U] [-q]",
        "[--output human|json] [--object OBJDEF] FILENAME",
    ];
    const EXAMPLE: &'static str = "vimg check -r all disk.qcow2";
    const MAKES: &'static [Makes] = &[Makes::Files("repair_to")];

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = self.common.define(program)? else { return Ok(Exit::Success) };
        let [name] = &self.operands[..] else {
            return Err(Complaint::usage("Expecting one image file name").into());
        };
        let source =
            ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        let cache = self.cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::source)?;
        source.check()?;
        let copy = self.repair_to.as_deref();
        let fix = self.repair.unwrap_or(if copy.is_some() { Fix::All } else { Fix::Nothing });
        let purpose = if fix.is_asked_for() && copy.is_none() { Purpose::Repair } else { Purpose::Check };
        let interrupt = (purpose == Purpose::Repair).then(Interrupt::catch);
        let (image, how) = source.image(program, name)?;
        let opener = program.opener(&secrets);
        // No backing file is needed for this: the reference misses one all the same, and an untrusted image may name none.
        let no_backing = opener.policy() != Policy::Follow;
        let node = opener.open(&image, &OpenHow { purpose, cache, no_backing, ..how });
        program.notices(&opener);
        let node = node?;
        let (quiet, form) = (self.common.quiet, self.output.unwrap_or_default());
        let human = !quiet && form == OutputForm::Human;
        let show = |report: &CheckReport| {
            if human {
                program.print(&repaired(report));
            }
        };
        let console = Console { name: program.name(), shown: AtomicUsize::new(0) };
        let work = || match copy {
            Some(copy) => check::repair_to(&opener, &node, copy, fix, &console, &show),
            None => check::check(&node, fix, &console, &show),
        };
        let checked = interrupt.as_ref().map_or_else(work, |interrupt| interrupt.during(work));
        program.notices(&opener);
        let Some(report) = checked.context("Check failed")? else {
            program.error("This image format does not support checks");
            return Ok(Exit::Unsupported);
        };
        if report.check_errors > 0 {
            program.error("Check failed");
        }
        match form {
            _ if quiet => {}
            OutputForm::Human => program.print(&text(&report)),
            OutputForm::Json => {
                let name = copy.map_or(name.as_os_str(), Path::as_os_str).to_string_lossy();
                let shown = check::to_json(&report, &name, node.driver().format());
                program.println(&json::pretty(&shown));
            }
        }
        Ok(exit(&report))
    }
}

/// Findings that are shown one by one.
const MOST_SHOWN: usize = 100_000;

/// Findings go to standard error, whatever the output's form. Damage may have no end; what is shown has.
struct Console<'a> {
    name: &'a str,
    shown: AtomicUsize,
}

impl Findings for Console<'_> {
    fn line(&self, text: &str) {
        match self.shown.fetch_add(1, Ordering::Relaxed) {
            ..MOST_SHOWN => stderr_line(text),
            MOST_SHOWN => stderr_line(&format!("{}: further findings are counted, not shown", self.name)),
            _ => {}
        }
    }

    fn error(&self, text: &str) {
        stderr_line(&format!("{}: {text}", self.name));
    }
}

/// The worst of what is still there.
fn exit(report: &CheckReport) -> Exit {
    match report {
        CheckReport { check_errors: 1.., .. } => Exit::Failure,
        CheckReport { corruptions: 1.., .. } => Exit::Corrupt,
        CheckReport { leaks: 1.., .. } => Exit::Leaks,
        _ => Exit::Success,
    }
}

/// What was mended.
fn repaired(CheckReport { leaks_fixed, corruptions_fixed, .. }: &CheckReport) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    \
         {leaks_fixed} leaked clusters\n    {corruptions_fixed} corruptions\n\n\
         Double checking the fixed image now...\n"
    )
}

/// What is there.
fn text(report: &CheckReport) -> String {
    let CheckReport { corruptions, leaks, check_errors, .. } = *report;
    let mut out = String::new();
    if (corruptions, leaks, check_errors) == (0, 0, 0) {
        out.push_str("No errors were found on the image.\n");
    }
    if corruptions > 0 {
        out.push_str(&format!(
            "\n{corruptions} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n"
        ));
    }
    if leaks > 0 {
        out.push_str(&format!(
            "\n{leaks} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n"
        ));
    }
    if check_errors > 0 {
        out.push_str(&format!("\n{check_errors} internal errors have occurred during the check.\n"));
    }
    let (total, allocated) = (report.total_clusters, report.allocated_clusters);
    if total > 0 && allocated > 0 {
        out.push_str(&format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        ));
    }
    if report.image_end > 0 {
        out.push_str(&format!("Image end offset: {}\n", report.image_end));
    }
    out
}

#[allow(clippy::cast_precision_loss)]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}
