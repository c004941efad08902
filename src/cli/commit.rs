//! `commit`: what an overlay stores moves into its backing file.

use std::ffi::OsString;

use serde_json::json;

use super::arguments::Makes;
use super::common::Common;
use super::console::ConsoleObserver;
use super::convert::rate;
use super::exit::Exit;
use super::interrupt::Interrupt;
use super::output::ResultArgs;
use super::progress::ProgressArgs;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, cache};
use crate::block::{Error, Node, OpenHow, Purpose};
use crate::ops::commit::{self, Commit};
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct CommitArgs {
    #[command(flatten)]
    common: Common,
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// how the images are cached, writeback if not given
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// image in the backing chain that gets the data, not the next one below (the image is not emptied then)
    #[arg(short, long, value_name = "BASE_IMG")]
    base: Option<OsString>,
    /// do not empty the image
    #[arg(short, long)]
    drop: bool,
    /// write at most this many bytes a second
    ///
    /// default: no limit
    #[arg(short = 'r', long, alias = "rate", value_name = "RATE", value_parser = rate)]
    rate_limit: Option<u64>,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    result: ResultArgs,
    /// image whose data is committed
    #[arg(value_name = "FILENAME")]
    operands: Vec<OsString>,
}

impl Subcommand for CommitArgs {
    const NAME: &'static str = "commit";
    const ABOUT: &'static str = "Commit image to its backing file";
    const USAGE: &'static [&'static str] =
        &["[-f FMT | --image-opts] [-t CACHE] [-b BASE_IMG] [-d] [-r RATE]", "[--object OBJDEF] [-p] [-q] FILENAME"];
    const EXAMPLE: &'static str = "vimg commit overlay.qcow2";
    // A base of several files that grows may get another one.
    const MAKES: &'static [Makes] = &[Makes::Files("base"), Makes::Files("allow")];

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = self.common.define(program)? else { return Ok(Exit::Success) };
        let [name] = &self.operands[..] else {
            return Err(Complaint::usage("Expecting one image file name").into());
        };
        let source = ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: false };
        source.check()?;
        let interrupt = Interrupt::catch();
        let progress = self.progress.start(program, self.common.quiet, "commit")?;
        let cache = self.cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::target)?;
        let (image, how) = source.image(program, name)?;
        let opener = program.opener(&secrets);
        let node = opener.open(&image, &OpenHow { purpose: Purpose::Commit, cache, ..how });
        program.notices(&opener);
        let opened = node?;
        program.works_on(opened.name());
        let node = opened.beneath_filters();
        let plan = self.plan(&node, cache)?;
        progress.begin();
        interrupt.begin();
        let name = (!self.common.quiet).then(|| program.name().to_owned());
        let observer = ConsoleObserver { progress: &progress, name, interrupt: Some(&interrupt) };
        let done = commit::commit(&opener, &node, &plan, &observer);
        interrupt.end();
        program.notices(&opener);
        done?;
        drop(progress);
        if !self.common.quiet && !program.tells_results() {
            program.println("Image committed.");
        }
        let below = std::iter::successors(Some(&*node), |node| node.backing().map(|below| &**below)).nth(plan.depth);
        let base = below.map(|below| below.name().to_owned());
        program.result(json!({"filename": node.name(), "base": base, "emptied": !plan.keep}));
        Ok(Exit::Success)
    }
}

impl CommitArgs {
    fn plan(&self, node: &Node, cache: CacheMode) -> Result<Commit, Error> {
        let depth = match &self.base {
            Some(base) => commit::depth_of(node, base)?,
            None => 1,
        };
        let keep = self.drop || self.base.is_some();
        Ok(Commit { depth, keep, rate: self.rate_limit.filter(|rate| *rate > 0), cache })
    }
}
