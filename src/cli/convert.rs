//! `convert`: copies images, joined, to a new or an existing one, in any format.

use std::ffi::OsString;
use std::sync::Arc;

use anyhow::Context;

use super::exit::Exit;
use super::progress::Progress;
use super::source::Source;
use super::{Complaint, Program, Subcommand, cache, object, options, size};
use crate::block::driver::SnapshotKey;
use crate::block::keys::parse_list;
use crate::block::{CreateOptions, Effort, Error, Node, OpenHow, Opener, OptionValue};
use crate::ops::convert::job::{self, Job};
use crate::ops::copy::{CopyOptions, MOST_THREADS, Observer};
use crate::ops::create::{NewImage, Target};
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    /// the names of the sources are lists of options key=value,...
    #[arg(long, alias = "source-image-opts")]
    image_opts: bool,
    /// format of the sources, found out if not given
    #[arg(short = 'f', long = "source-format", value_name = "FMT")]
    format: Option<String>,
    /// how the sources are cached: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 'T', long, value_name = "CACHE")]
    source_cache: Option<String>,
    /// convert an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = snapshot)]
    snapshot: Option<Snapshot>,
    /// format of the target, raw if not given
    #[arg(short = 'O', long, alias = "output-format", value_name = "FMT")]
    target_format: Option<String>,
    /// options of the target's format, key=value,... ('-o help' lists them)
    #[arg(short = 'o', long, alias = "options", value_name = "FMT_OPTS", value_parser = options::list)]
    target_format_options: Vec<String>,
    /// the name of the target is a list of options key=value,... (with -n)
    #[arg(long)]
    target_image_opts: bool,
    /// how the target is cached, unsafe if not given
    #[arg(short = 't', long, alias = "output-cache", value_name = "CACHE")]
    target_cache: Option<String>,
    /// put the target on top of that image, and copy only what that does not hold
    #[arg(short = 'B', short_alias = 'b', long, value_name = "BACKING_FILENAME")]
    backing: Option<String>,
    /// format of the backing image
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// leave out runs of zeros that are at least that long, 4k if not given; 0 writes everything
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = sparse)]
    sparse_size: Option<u64>,
    /// write to an image that is there
    #[arg(short = 'n', long)]
    no_create: bool,
    /// the target reads as zeros already (with -n)
    #[arg(long)]
    target_is_zero: bool,
    /// store compressed
    #[arg(short = 'c')]
    compress: bool,
    /// bear others that write to the sources meanwhile
    #[arg(short = 'U', long)]
    force_share: bool,
    /// write at most that many bytes a second
    #[arg(short = 'r', long, alias = "rate", value_name = "RATE", value_parser = rate)]
    rate_limit: Option<u64>,
    /// number of threads, 1 to 16; one per core if not given
    #[arg(short = 'm', long, value_name = "NUM", value_parser = threads)]
    parallel: Option<usize>,
    /// place data in the order in which it comes: may be faster, and the layout is not the same every time
    #[arg(short = 'W', long)]
    oob_writes: bool,
    /// let the host copy where it can (reflinks): zeros are not looked for
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// what cannot be read becomes zeros
    #[arg(long)]
    salvage: bool,
    /// copy persistent bitmaps
    #[arg(long)]
    bitmaps: bool,
    /// leave out bitmaps that are inconsistent
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// show how far it is
    #[arg(short, long)]
    progress: bool,
    /// print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// images to convert, and last the one to write
    #[arg(value_name = "SRC_FILENAME [SRC_FILENAME2...] TGT_FILENAME")]
    operands: Vec<OsString>,
}

const MOST_SPARSE: u64 = 16 << 20;

fn sparse(text: &str) -> Result<u64, Complaint> {
    let value = size::size("buffer size for sparse output", text)?;
    if value % 512 == 0 && value <= MOST_SPARSE {
        return Ok(value);
    }
    Err(Complaint::value(format!(
        "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {MOST_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
    )))
}

fn rate(text: &str) -> Result<u64, Complaint> {
    size::size("rate limit", text)
}

fn threads(text: &str) -> Result<usize, Complaint> {
    let number = size::number_within("number of coroutines", text, 1..=MOST_THREADS as u64)?;
    Ok(usize::try_from(number).unwrap_or(MOST_THREADS))
}

/// The snapshot that `-l` names, and what the user should write instead.
#[derive(Debug, Clone)]
struct Snapshot {
    key: SnapshotKey,
    warnings: Vec<(String, String)>,
}

/// `-l`: a list of `snapshot.KEY=VALUE`, or else an id or a name.
fn snapshot(text: &str) -> Result<Snapshot, Complaint> {
    if !text.starts_with("snapshot.") {
        return Ok(Snapshot { key: SnapshotKey::IdOrName(text.to_owned()), warnings: Vec::new() });
    }
    let (mut id, mut name) = (None, None);
    let list = parse_list(text, None);
    for (key, value) in list.pairs {
        match key.as_str() {
            "snapshot.id" => id = Some(value),
            "snapshot.name" => name = Some(value),
            _ => {
                return Err(Complaint::Snapshot { warnings: list.warnings, key, text: text.to_owned() });
            }
        }
    }
    Ok(Snapshot { key: SnapshotKey::Exact { id, name }, warnings: list.warnings })
}

/// Shows on the console what the copy reports, from all its threads.
struct ConsoleObserver<'a> {
    progress: &'a Progress,
    /// Prefix of warnings; none under `-q`.
    name: Option<String>,
}

impl Observer for ConsoleObserver<'_> {
    fn wants_progress(&self) -> bool {
        self.progress.wanted()
    }

    fn progress(&self, done: u64, total: u64) {
        self.progress.report(done, total);
    }

    fn note(&self, line: &str) {
        eprintln!("{line}");
    }

    fn warn(&self, text: &str) {
        if let Some(name) = &self.name {
            eprintln!("{name}: warning: {text}");
        }
    }
}

impl Subcommand for Args {
    const NAME: &'static str = "convert";
    const ABOUT: &'static str = "Copy one image to another with optional format conversion";
    const USAGE: &'static [&'static str] = &[
        "[-f SRC_FMT | --image-opts] [-T SRC_CACHE] [-l SNAPSHOT] [-U]",
        "[-O TGT_FMT] [-o TGT_FMT_OPTS] [-t TGT_CACHE] [-n [--target-is-zero]]",
        "[--target-image-opts] [-B BACKING_FILENAME -F BACKING_FMT] [-c] [-S SIZE]",
        "[-r RATE] [-m NUM] [-W] [-C] [--salvage] [--bitmaps [--skip-broken-bitmaps]]",
        "[--object OBJDEF] [-p] [-q] SRC_FILENAME [SRC_FILENAME2...] TGT_FILENAME",
    ];

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        if !object::define(program, &self.object)? {
            return Ok(Exit::Success);
        }
        for (warning, hint) in self.snapshot.iter().flat_map(|snapshot| &snapshot.warnings) {
            program.warn(warning);
            program.line(hint);
        }
        self.check()?;
        let opener = program.opener();
        let given = options::joined(&self.target_format_options).unwrap_or_default();
        let target_format = self.target_format.as_deref().unwrap_or("raw");
        if given.help {
            let name = if self.operands.len() > 1 { self.operands.last() } else { None };
            let target = Target::find(opener.formats(), target_format, name.map(OsString::as_os_str))?;
            options::help(program, target.options().specs(), name.is_none().then_some(target_format));
            return Ok(Exit::Success);
        }
        let Some((name, sources)) = self.operands.split_last().filter(|(_, sources)| !sources.is_empty()) else {
            return Err(Complaint::value("Must specify image file name").into());
        };
        let source_cache = self.source_cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::source)?;
        let progress = Progress::start(self.progress && !self.quiet);
        let sources = self.sources(program, &opener, sources, source_cache)?;
        program.notices(&opener);
        let mut new = if self.no_create { None } else { Some(self.decide(&opener, target_format, name, &given)?) };
        let backing = match &new {
            Some(new) => new.options.text("backing_file").map(str::to_owned),
            None => self.backing.clone(),
        };
        self.check_target(&sources, new.as_ref(), backing.is_some())?;
        if let Some(new) = &mut new {
            new.size = sources.iter().fold(0, |sum, node| sum.saturating_add(node.virtual_size()));
            new.options.set("size", OptionValue::Size(new.size))?;
        }
        let cache = self.target_cache.as_deref().map_or(Ok(CacheMode::Unsafe), cache::target)?;
        let observer = ConsoleObserver { progress: &progress, name: (!self.quiet).then(|| program.name().to_owned()) };
        let job = Job {
            sources: &sources,
            options: self.copy_options(),
            cache,
            target_is_zero: self.target_is_zero,
            backed: backing.is_some(),
            bitmaps: self.bitmaps,
            observer: &observer,
        };
        let done = match new {
            Some(new) => job.to_new(&new, &opener),
            None => {
                let format = if self.target_image_opts { self.target_format.as_deref() } else { Some(target_format) };
                let target = Source { format, image_opts: self.target_image_opts, force_share: false };
                target.check()?;
                let (image, how) = target.image(program, name)?;
                job.to_existing(&image, &how, &opener)
            }
        };
        program.notices(&opener);
        done?;
        if let (Some(source), true) = (sources.first(), self.bitmaps) {
            for name in broken_bitmaps(source)? {
                program.warn(&format!("Skipping inconsistent bitmap '{name}'"));
            }
        }
        Ok(Exit::Success)
    }
}

impl Args {
    /// What does not go together, before anything is looked at.
    fn check(&self) -> Result<(), Complaint> {
        let refuse = |text: &str| Err(Complaint::value(text));
        if self.skip_broken_bitmaps && !self.bitmaps {
            return refuse("Use of --skip-broken-bitmaps requires --bitmaps");
        }
        if self.copy_range_offloading {
            if self.compress {
                return refuse("Cannot enable copy offloading when -c is used");
            }
            if self.sparse_size.is_some() {
                return refuse("Cannot enable copy offloading when -S is used");
            }
            if self.salvage {
                return refuse("Cannot use copy offloading in salvaging mode");
            }
        }
        if self.target_image_opts && !self.no_create {
            return refuse("--target-image-opts requires use of -n flag");
        }
        if self.no_create && !self.target_format_options.is_empty() {
            return refuse("-o has no effect when skipping image creation");
        }
        if self.target_is_zero && !self.no_create {
            return refuse("--target-is-zero requires use of -n flag");
        }
        Ok(())
    }

    fn copy_options(&self) -> CopyOptions {
        CopyOptions {
            sparse: self.sparse_size.unwrap_or(4096),
            threads: self.parallel,
            compress: self.compress,
            effort: Effort::default(),
            reorder: self.oob_writes,
            rate: self.rate_limit.filter(|rate| *rate > 0),
            offload: self.copy_range_offloading,
            salvage: self.salvage,
        }
    }

    /// Opens everything that is read.
    fn sources(
        &self,
        program: &Program,
        opener: &Opener<'_>,
        names: &[OsString],
        cache: CacheMode,
    ) -> anyhow::Result<Vec<Arc<Node>>> {
        let source =
            Source { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let mut nodes = Vec::new();
        for name in names {
            let (image, how) = source.image(program, name)?;
            nodes.push(opener.open(&image, &OpenHow { cache, exclusive: true, ..how })?);
        }
        let Some(snapshot) = &self.snapshot else { return Ok(nodes) };
        if let (SnapshotKey::IdOrName(_), true) = (&snapshot.key, nodes.len() > 1) {
            return Err(Complaint::value("No support for concatenating multiple snapshot").into());
        }
        // Of several sources the first is meant.
        if let Some(node) = nodes.first_mut() {
            *node = job::at_snapshot(node, &snapshot.key).context("Failed to load snapshot")?;
        }
        Ok(nodes)
    }

    /// What the new image shall be, but for its size.
    fn decide(
        &self,
        opener: &Opener<'_>,
        format: &str,
        name: &OsString,
        given: &options::Pairs,
    ) -> anyhow::Result<NewImage> {
        let target = Target::find(opener.formats(), format, Some(name))?;
        let mut options = target.options();
        options::apply(given, &mut options)?;
        let unsupported = |what: &str| Complaint::value(format!("{what} not supported for file format '{format}'"));
        let text = |value: &String| OptionValue::Text(value.clone());
        if let Some(backing) = &self.backing {
            options.set("backing_file", text(backing)).map_err(|_| unsupported("Backing file"))?;
        }
        if let Some(backing_format) = &self.backing_format {
            options.set("backing_fmt", text(backing_format)).map_err(|_| unsupported("Backing file format"))?;
        }
        Ok(NewImage { name: name.clone(), format: target.format, size: 0, options })
    }

    /// What does not go together with what the sources and the target are.
    fn check_target(&self, sources: &[Arc<Node>], new: Option<&NewImage>, backed: bool) -> anyhow::Result<()> {
        let refuse = |text: &str| Err(Complaint::value(text).into());
        if self.target_is_zero && backed {
            return refuse("Cannot use --target-is-zero when the destination image has a backing file");
        }
        if backed && sources.len() > 1 {
            return refuse(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            );
        }
        if let Some(new) = new {
            if backed && new.options.text("backing_fmt").is_none() {
                return refuse("Use of backing file requires explicit backing format");
            }
            if self.compress {
                self.check_compression(new)?;
            }
        }
        if self.bitmaps {
            let [source] = sources else {
                return refuse("Copying bitmaps only possible with single source");
            };
            if let (Some(name), false) = (broken_bitmaps(source)?.first(), self.skip_broken_bitmaps) {
                let error = Error::unsupported(format!("Cannot copy inconsistent bitmap '{name}'"));
                let hint = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it";
                return Err(error.hint(hint).into());
            }
        }
        Ok(())
    }

    fn check_compression(&self, new: &NewImage) -> Result<(), Complaint> {
        let refuse = |text: &str| Err(Complaint::value(text));
        if !new.format.creating().is_some_and(|create| create.compresses()) {
            return refuse("Compression not supported for this file format");
        }
        let encrypted = new.options.switch("encryption") || new.options.text("encrypt.format").is_some();
        if encrypted {
            return refuse("Compression and encryption not supported at the same time");
        }
        if preallocates(&new.options) {
            return refuse("Compression and preallocation not supported at the same time");
        }
        Ok(())
    }
}

fn preallocates(options: &CreateOptions) -> bool {
    options.text("preallocation").is_some_and(|mode| mode != "off")
}

/// The names of inconsistent bitmaps, in the reference's order.
fn broken_bitmaps(source: &Node) -> Result<Vec<String>, Complaint> {
    let bitmaps = source.driver().bitmaps().ok_or_else(|| Complaint::value("Source lacks bitmap support"))?;
    let broken = bitmaps.list().into_iter().rev().filter(|bitmap| !bitmap.consistent);
    Ok(broken.map(|bitmap| bitmap.name).collect())
}
