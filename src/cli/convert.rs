//! `convert`: copies images, joined, to a new or an existing one, in any format.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::arguments::Makes;
use super::console::ConsoleObserver;
use super::digest::DigestArgs;
use super::exit::Exit;
use super::ids::IdArgs;
use super::interrupt::Interrupt;
use super::output::ResultArgs;
use super::passphrase::{PassphraseArgs, TargetPassphraseArgs};
use super::progress::{ProgressArgs, STANDARD_OUTPUT};
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, cache, help, human, object, options, size};
use crate::block::driver::SnapshotKey;
use crate::block::keys::parse_list;
use crate::block::{Effort, ImageRef, Node, OpenHow, Opener, name};
use crate::crypto::Digest;
use crate::ops::convert::room::{self, LackOfRoom};
use crate::ops::convert::{Conversion, ConvertRequest, Job, Proof, WayOut};
use crate::ops::copy::{CopyOptions, MOST_THREADS};
use crate::ops::create::{NewImage, Target};
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct ConvertArgs {
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    /// sources are named by lists of options key=value,..., not by file names
    #[arg(long, alias = "source-image-opts")]
    image_opts: bool,
    /// format of the sources, detected if not given
    #[arg(short = 'f', long = "source-format", value_name = "FMT")]
    format: Option<String>,
    /// how the sources are cached: none, writeback, unsafe, directsync, writethrough
    ///
    /// default: writeback
    #[arg(short = 'T', long, value_name = "CACHE")]
    source_cache: Option<String>,
    /// convert an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME
    ///
    /// default: the disk as it is now
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = snapshot)]
    snapshot: Option<SnapshotArg>,
    /// format of the target, raw if not given
    #[arg(short = 'O', long, alias = "output-format", value_name = "FMT")]
    target_format: Option<String>,
    /// options of the target's format, key=value,... ('-o help' lists them)
    ///
    /// default: as '-o help' says of each
    #[arg(short = 'o', long, alias = "options", value_name = "FMT_OPTS", value_parser = options::lists())]
    target_format_options: Vec<OsString>,
    /// the target is named by a list of options key=value,... (with -n)
    #[arg(long)]
    target_image_opts: bool,
    /// how the target is cached, unsafe if not given
    #[arg(short = 't', long, alias = "output-cache", value_name = "CACHE")]
    target_cache: Option<String>,
    /// backing file of the target: only what the source has above it is copied
    ///
    /// default: no backing file
    #[arg(short = 'B', short_alias = 'b', long, value_name = "BACKING_FILENAME")]
    backing: Option<OsString>,
    /// format of the backing file
    ///
    /// default: none; it has to be given where -B names a file
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// do not write runs of zeros that are at least this long, 4k if not given; 0 writes everything
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = sparse)]
    sparse_size: Option<u64>,
    /// write to an existing image, do not create the target
    #[arg(short = 'n', long)]
    no_create: bool,
    /// the target reads as zeros already (with -n)
    #[arg(long)]
    target_is_zero: bool,
    /// compress the data of the target, in formats that can
    #[arg(short = 'c')]
    compress: bool,
    /// allow other writers: do not lock the sources
    #[arg(short = 'U', long)]
    force_share: bool,
    /// write at most this many bytes a second
    ///
    /// default: no limit
    #[arg(short = 'r', long, alias = "rate", value_name = "RATE", value_parser = rate)]
    rate_limit: Option<u64>,
    /// number of threads, 1 to 16; if not given one per core, or more where devices or uncached files (cache mode none) gain by it
    #[arg(short = 'm', long, value_name = "NUM", value_parser = threads)]
    parallel: Option<usize>,
    /// write out of order: may be faster, and the layout is not the same every time
    #[arg(short = 'W', long)]
    oob_writes: bool,
    /// let the kernel copy (reflinks) where it can: zeros are not detected
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// go on after read errors: what cannot be read becomes zeros, with a warning
    #[arg(long)]
    salvage: bool,
    /// copy persistent bitmaps
    #[arg(long)]
    bitmaps: bool,
    /// skip persistent bitmaps that are inconsistent
    #[arg(long)]
    skip_broken_bitmaps: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    result: ResultArgs,
    /// print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// write all the same where the file system plainly lacks the room
    #[arg(long, help_heading = help::OWN)]
    no_space_check: bool,
    #[command(flatten)]
    ids: IdArgs,
    #[command(flatten)]
    digest: DigestArgs,
    /// read the target back, and compare it with what was copied: before it gets its name, or where it is an object of a store when it is there
    #[arg(long, help_heading = help::OWN)]
    verify: bool,
    #[command(flatten)]
    passphrase: PassphraseArgs,
    #[command(flatten)]
    target_passphrase: TargetPassphraseArgs,
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

pub(super) fn rate(text: &str) -> Result<u64, Complaint> {
    size::size("rate limit", text)
}

fn threads(text: &str) -> Result<usize, Complaint> {
    let number = size::number_within("number of coroutines", text, 1..=MOST_THREADS as u64)?;
    Ok(usize::try_from(number).unwrap_or(MOST_THREADS))
}

/// The snapshot that `-l` names, and what the user should write instead.
#[derive(Debug, Clone)]
pub(super) struct SnapshotArg {
    pub(super) key: SnapshotKey,
    pub(super) warnings: Vec<(String, String)>,
}

/// `-l`: a list of `snapshot.KEY=VALUE`, or else an id or a name.
pub(super) fn snapshot(text: &str) -> Result<SnapshotArg, Complaint> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotArg { key: SnapshotKey::IdOrName(text.to_owned()), warnings: Vec::new() });
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
    Ok(SnapshotArg { key: SnapshotKey::Exact { id, name }, warnings: list.warnings })
}

/// Said before anything is written.
fn no_room(program: &Program, name: &OsStr, lack: &LackOfRoom) -> Complaint {
    let LackOfRoom { needed, free, folder, without_older } = lack;
    // The last is our own, and hidden from those who call us by another name.
    let ways = match (without_older, program.is_vimg()) {
        (true, true) => {
            " (the older file stays until the new one is complete: -n writes to it in place; \
             --no-space-check writes all the same)"
        }
        (true, false) => " (the older file stays until the new one is complete: -n writes to it in place)",
        (false, true) => " (--no-space-check writes all the same)",
        (false, false) => "",
    };
    Complaint::value(format!(
        "{}: not enough room: {} are needed at least, and {} are free in '{}'{ways}",
        name.to_string_lossy(),
        human::size(*needed),
        human::size(*free),
        folder.display()
    ))
}

impl Subcommand for ConvertArgs {
    const NAME: &'static str = "convert";
    const ABOUT: &'static str = "Copy one image to another with optional format conversion";
    const USAGE: &'static [&'static str] = &[
        "[-f SRC_FMT | --image-opts] [-T SRC_CACHE] [-l SNAPSHOT] [-U]",
        "[-O TGT_FMT] [-o TGT_FMT_OPTS] [-t TGT_CACHE] [-n [--target-is-zero]]",
        "[--target-image-opts] [-B BACKING_FILENAME -F BACKING_FMT] [-c] [-S SIZE]",
        "[-r RATE] [-m NUM] [-W] [-C] [--salvage] [--bitmaps [--skip-broken-bitmaps]]",
        "[--object OBJDEF] [-p] [-q] SRC_FILENAME [SRC_FILENAME2...] TGT_FILENAME",
    ];
    const OWN_USAGE: &'static [&'static str] = &[
        "[-f SRC_FMT | --image-opts] [-T SRC_CACHE] [-l SNAPSHOT] [-U]",
        "[-O TGT_FMT] [-o TGT_FMT_OPTS] [-t TGT_CACHE] [-n [--target-is-zero]]",
        "[--target-image-opts] [-B BACKING_FILENAME -F BACKING_FMT] [-c]",
        "[-S SIZE] [-r RATE] [-m NUM] [-W] [-C] [--salvage]",
        "[--bitmaps [--skip-broken-bitmaps]]",
        "[--object OBJDEF] [-p] [-q] SRC_FILENAME [SRC_FILENAME2...] TGT_FILENAME",
    ];
    const EXAMPLE: &'static str = "vimg convert -p -f raw -O qcow2 -c disk.raw disk.qcow2";
    const MAKES: &'static [Makes] = &[Makes::Last("operands")];

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = object::define(program, &self.object)? else { return Ok(Exit::Success) };
        let secrets = self.passphrase.and_target(&self.target_passphrase, program, secrets)?;
        let warnings = self.snapshot.iter().flat_map(|snapshot| &snapshot.warnings);
        warnings.for_each(|(warning, hint)| program.deprecated(warning, hint));
        let mut request = self.request();
        request.proof = Proof { digest: self.digest.kind()?, expected: self.digest.expected(), verify: self.verify };
        request.check()?;
        self.ids.check(self.no_create, self.oob_writes)?;
        let opener = self.typed().iter().fold(program.opener(&secrets), |opener, path| opener.allowing(path));
        let create_options = options::joined(&self.target_format_options).unwrap_or_default();
        if create_options.help {
            return self.help(program, &opener);
        }
        let Some((name, sources)) = self.operands.split_last().filter(|(_, sources)| !sources.is_empty()) else {
            return Err(Complaint::value("Must specify image file name").into());
        };
        let way = if self.no_create { None } else { WayOut::find(opener.drivers(), self.target_format(), name) };
        if let Some(way) = &way {
            self.check_way(name, way)?;
        }
        self.check_printed(program, name)?;
        // What a store has taken so far is given up.
        let interrupt = way.as_ref().filter(|way| !way.is_pipe()).map(|_| Interrupt::catch());
        let source_cache = self.source_cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::source)?;
        let progress = self.progress.start(program, self.quiet, "convert")?;
        let sources = self.sources(program, &opener, sources, source_cache)?;
        if let [source] = &sources[..] {
            program.works_on(source.name());
        }
        let sources = request.at_snapshot(sources)?;
        program.notices(&opener);
        program.works_on(&name.to_string_lossy());
        let new = if self.no_create { None } else { Some(self.new_image(&opener, name, &create_options)?) };
        let conversion = request.decide(sources, new)?;
        let size = conversion.sources.iter().fold(0, |sum: u64, source| sum.saturating_add(source.virtual_size()));
        opener.bound(&name.to_string_lossy(), size)?;
        if self.target_format.is_none() && !self.no_create {
            program.warn_of_raw(name, "-O");
        }
        let cache = self.target_cache.as_deref().map(cache::target).transpose()?;
        if let Some(new) = conversion.new.as_ref().filter(|_| !self.no_space_check)
            && let Some(lack) = room::lacking(&conversion, new, opener.drivers())
        {
            return Err(no_room(program, name, &lack).into());
        }
        let observer = ConsoleObserver {
            progress: &progress,
            name: (!self.quiet).then(|| program.name().to_owned()),
            interrupt: interrupt.as_ref(),
        };
        let job = Job { conversion: &conversion, cache, observer: &observer };
        let done = match &conversion.new {
            Some(new) => match &way {
                Some(way) => {
                    interrupt.iter().for_each(Interrupt::begin);
                    let done = job.away(new, way, &opener);
                    interrupt.iter().for_each(Interrupt::end);
                    done.map(|digest| (digest, new.size))
                }
                None => job.to_new(new, &opener).map(|digest| (digest, new.size)),
            },
            None => {
                let (image, how) = self.existing_image(program, name)?;
                job.to_existing(&image, &how, &opener)
            }
        };
        program.notices(&opener);
        let (digest, size) = done?;
        for name in &conversion.skipped_bitmaps {
            program.warn(&format!("Skipping inconsistent bitmap '{name}'"));
        }
        // The line of progress ends before anything else is printed.
        drop(progress);
        let digest = digest.filter(|_| self.digest.kind().is_ok_and(|kind| kind.is_some()));
        if let Some(digest) = digest.filter(|_| self.digest.is_shown() && !program.tells_results()) {
            program.println(&digest.to_string());
        }
        program.result(self.result(&conversion, size, digest));
        Ok(Exit::Success)
    }
}

impl ConvertArgs {
    /// Refuses what makes no sense with a target that is written from front to back.
    fn check_way(&self, name: &OsStr, way: &WayOut) -> Result<(), Complaint> {
        let shown = name.to_string_lossy();
        let what = if way.is_pipe() { "a pipe" } else { "written from front to back" };
        let given = !self.target_format_options.is_empty();
        match () {
            () if self.target_format() == "raw" && given => {
                Err(Complaint::value(format!("'{shown}' is {what}: the options of a new raw file mean nothing to it")))
            }
            () if self.verify && way.is_pipe() => {
                Err(Complaint::value(format!("'{shown}' is {what}: it cannot be read back (--verify)")))
            }
            () => Ok(()),
        }
    }

    /// Refuses to print to where the image goes.
    fn check_printed(&self, program: &Program, name: &OsStr) -> anyhow::Result<()> {
        let file = |path: &Path| {
            let found = std::fs::metadata(path).ok().filter(|meta| !meta.file_type().is_char_device());
            found.map(|meta| (meta.dev(), meta.ino()))
        };
        let to_output = |option, printed: bool| printed.then_some((option, STANDARD_OUTPUT));
        let printed = [
            to_output("--output=json", program.tells_results()),
            to_output("--digest", self.digest.is_shown()),
            self.progress.printed(self.quiet)?,
        ];
        let Some(target) = file(Path::new(name)) else { return Ok(()) };
        let there = |fd: i32| file(Path::new(&format!("/dev/fd/{fd}"))) == Some(target);
        match printed.into_iter().flatten().find(|(_, fd)| there(*fd)) {
            Some((option, _)) => {
                Err(Complaint::value(format!("'{}' is where {option} prints to", name.to_string_lossy())).into())
            }
            None => Ok(()),
        }
    }

    /// What was done, for programs: a target of that size was made, or written to.
    fn result(&self, conversion: &Conversion, size: u64, digest: Option<Digest>) -> Value {
        let image = |node: &Arc<Node>| {
            let (name, format) = (node.name(), node.driver().format());
            json!({"filename": name, "format": format, "virtual-size": node.virtual_size()})
        };
        let mut members = json!({"sources": conversion.sources.iter().map(image).collect::<Vec<_>>()});
        let target = self.operands.last().map(|name| name.to_string_lossy());
        let format = if self.target_image_opts { self.target_format.as_deref() } else { Some(self.target_format()) };
        members["target"] = json!({"filename": target, "format": format, "virtual-size": size});
        if let Some(digest) = digest {
            members["digest"] = json!({"kind": digest.kind.name(), "hex": digest.hex()});
        }
        members["verified"] = self.verify.into();
        members
    }

    fn target_format(&self) -> &str {
        self.target_format.as_deref().unwrap_or("raw")
    }

    /// Files that are named here, which images may name too.
    fn typed(&self) -> Vec<PathBuf> {
        let target = self.operands.last().map(OsString::as_os_str);
        let backing = self.backing.as_ref().and_then(|backing| name::beside(target, backing));
        let sources = self.operands.iter().rev().skip(1).filter(|_| !self.image_opts);
        sources.cloned().chain(backing).map(PathBuf::from).collect()
    }

    fn request(&self) -> ConvertRequest {
        ConvertRequest {
            copy: CopyOptions {
                sparse: self.sparse_size.unwrap_or(4096),
                threads: self.parallel,
                compress: self.compress,
                effort: Effort::default(),
                reorder: self.oob_writes,
                rate: self.rate_limit.filter(|rate| *rate > 0),
                offload: self.copy_range_offloading,
                salvage: self.salvage,
            },
            sparse_given: self.sparse_size.is_some(),
            no_create: self.no_create,
            target_is_zero: self.target_is_zero,
            target_image_opts: self.target_image_opts,
            create_options_given: !self.target_format_options.is_empty(),
            backing: self.backing.clone(),
            backing_format: self.backing_format.clone(),
            snapshot: self.snapshot.as_ref().map(|snapshot| snapshot.key.clone()),
            bitmaps: self.bitmaps,
            skip_broken_bitmaps: self.skip_broken_bitmaps,
            proof: Proof::default(),
        }
    }

    /// `-o help`: the options of the target's format, and of its protocol where the target is named.
    fn help(&self, program: &Program, opener: &Opener<'_>) -> anyhow::Result<Exit> {
        let name = if self.operands.len() > 1 { self.operands.last() } else { None };
        let target = Target::find(opener.drivers(), self.target_format(), name.map(OsString::as_os_str))?;
        options::help(program, target.options().specs(), name.is_none().then_some(self.target_format()));
        Ok(Exit::Success)
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
            ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let mut nodes = Vec::new();
        for name in names {
            let (image, how) = source.image(program, name)?;
            nodes.push(opener.open(&image, &OpenHow { cache, exclusive: true, salvage: self.salvage, ..how })?);
        }
        Ok(nodes)
    }

    /// The new image as typed: what follows from the sources is not filled in yet.
    fn new_image(&self, opener: &Opener<'_>, name: &OsStr, given: &options::Pairs) -> anyhow::Result<NewImage> {
        // What is sent whole is no file of its protocol's making.
        let sent = WayOut::find(opener.drivers(), self.target_format(), name).is_some_and(|way| !way.is_pipe());
        let place = if sent { None } else { Some(name) };
        let target = Target::find(opener.drivers(), self.target_format(), place)?;
        let mut options = target.options();
        options::apply(given, &mut options)?;
        Ok(NewImage { name: name.to_owned(), format: target.format, size: 0, options, ids: self.ids.choice() })
    }

    /// The image that is there (`-n`), and how it is opened.
    fn existing_image(&self, program: &Program, name: &OsStr) -> anyhow::Result<(ImageRef, OpenHow)> {
        let format = if self.target_image_opts { self.target_format.as_deref() } else { Some(self.target_format()) };
        let target = ImageArgs { format, image_opts: self.target_image_opts, force_share: false };
        target.check()?;
        target.image(program, name)
    }
}
