//! `rebase`: gives an image another backing file, or none.

use std::ffi::OsString;
use std::sync::Arc;

use serde_json::json;

use super::common::Common;
use super::console::ConsoleObserver;
use super::exit::Exit;
use super::interrupt::Interrupt;
use super::output::ResultArgs;
use super::progress::ProgressArgs;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, cache};
use crate::block::error::Context;
use crate::block::{BackingRef, ImageRef, Node, OpenHow, Opener, Purpose};
use crate::ops::rebase::{self, NewBacking};
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct RebaseArgs {
    #[command(flatten)]
    common: Common,
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// how the image is cached, writeback if not given
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// the new backing file, its name seen from the image's folder; "" for none
    #[arg(short, long, value_name = "BACKING_FILENAME")]
    backing: Option<OsString>,
    /// format of the new backing file
    #[arg(short = 'F', short_alias = 'B', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// how the new backing file is cached, writeback if not given
    #[arg(short = 'T', long, value_name = "CACHE")]
    backing_cache: Option<String>,
    /// change the name alone: the new backing file holds what the old one did, and need not be there
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// compress what is copied from the old backing file
    #[arg(short, long)]
    compress: bool,
    /// allow other writers: do not lock the new backing file
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    result: ResultArgs,
    /// image that gets the new backing file
    #[arg(value_name = "FILENAME")]
    operands: Vec<OsString>,
}

impl Subcommand for RebaseArgs {
    const NAME: &'static str = "rebase";
    const ABOUT: &'static str = "Change backing file of the image";
    const USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [-t CACHE] [-b BACKING_FILENAME [-B BACKING_FMT]",
        "[-T CACHE]] [-u] [-c] [-U] [--object OBJDEF] [-p] [-q] FILENAME",
    ];
    const OWN_USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [-t CACHE]",
        "[-b BACKING_FILENAME [-F BACKING_FMT] [-T CACHE]] [-u] [-c] [-U]",
        "[--object OBJDEF] [-p] [-q] FILENAME",
    ];
    const EXAMPLE: &'static str = "vimg rebase -b other.qcow2 -F qcow2 overlay.qcow2";

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = self.common.define(program)? else { return Ok(Exit::Success) };
        let [name] = &self.operands[..] else {
            return Err(Complaint::usage("Expecting one image file name").into());
        };
        if !self.backing_unsafe && self.backing.is_none() {
            return Err(Complaint::usage("Must specify backing file (-b) or use unsafe mode (-u)").into());
        }
        let source = ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: false };
        source.check()?;
        let interrupt = Interrupt::catch();
        let progress = self.progress.start(program, self.common.quiet, "rebase")?;
        let cache = self.cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::target)?;
        let backing_cache = self.backing_cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::source)?;
        let (image, how) = source.image(program, name)?;
        let opener = program.opener(&secrets);
        let how = OpenHow { purpose: Purpose::Write, no_backing: self.backing_unsafe, cache, ..how };
        let node = opener.open(&image, &how);
        program.notices(&opener);
        let opened = node?;
        program.works_on(opened.name());
        let node = opened.beneath_filters();
        if self.compress && !self.backing_unsafe {
            rebase::check_compression(&node)?;
        }
        let new = self.new_backing(&opener, &node, backing_cache);
        program.notices(&opener);
        let new = new?;
        let name = (!self.common.quiet).then(|| program.name().to_owned());
        let observer = ConsoleObserver { progress: &progress, name, interrupt: Some(&interrupt) };
        interrupt.begin();
        let done = match self.backing_unsafe {
            true => rebase::rename(&node, &new),
            false => rebase::rebase(&node, &new, self.compress, &observer),
        };
        interrupt.end();
        done?;
        progress.report(1, 1);
        let (backing, format) = (new.typed.as_deref().filter(|name| !name.is_empty()), &self.backing_format);
        let members = json!({"filename": node.name(), "backing-filename": backing, "backing-filename-format": format});
        program.result(members);
        Ok(Exit::Success)
    }
}

impl RebaseArgs {
    /// What the image is to stand on, opened as far as it has to be.
    fn new_backing(&self, opener: &Opener<'_>, node: &Node, cache: CacheMode) -> anyhow::Result<NewBacking> {
        let format = self.backing_format.as_deref();
        if let Some(format) = format.filter(|format| opener.drivers().find(format).is_none()) {
            return Err(Complaint::value(format!("Invalid format name: '{format}'")).into());
        }
        let typed = self.backing.as_ref().map(|name| name.to_string_lossy().into_owned());
        let Some(name) = self.backing.as_ref().filter(|name| !name.is_empty()) else {
            return Ok(NewBacking { named: None, typed, below: None });
        };
        let named = BackingRef { name: name.clone(), format: format.map(str::to_owned), elsewhere: Vec::new() };
        let how =
            OpenHow { format: format.map(str::to_owned), force_share: self.force_share, cache, ..OpenHow::default() };
        // Some formats write down what the backing file is, whoever vouches for it.
        let needed = !self.backing_unsafe || node.driver().content_id().is_some();
        let open = || -> crate::block::Result<Arc<Node>> {
            opener.open_named(&ImageRef::name(&rebase::path_of(node, name)?), &how)
        };
        let below = needed.then(open).transpose();
        let below = below.with_context(|| format!("Could not open new backing file '{}'", name.display()))?;
        Ok(NewBacking { named: Some(named), typed, below })
    }
}
