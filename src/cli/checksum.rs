//! `checksum`: the digest of what the guest's disk holds, whatever the format of its image.

use std::borrow::Cow;
use std::ffi::OsString;

use serde_json::{Value, json};

use super::console::ConsoleObserver;
use super::digest::DigestArgs;
use super::exit::{self, Exit};
use super::output::ResultArgs;
use super::passphrase::PassphraseArgs;
use super::progress::{Progress, ProgressArgs};
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, cache, object, report};
use crate::block::OpenHow;
use crate::crypto::{Digest, DigestKind};
use crate::ops::checksum::{self, check};
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct ChecksumArgs {
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    #[command(flatten)]
    result: ResultArgs,
    #[command(flatten)]
    digest: DigestArgs,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// allow other writers: do not lock the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// how the image is cached: none, writeback, unsafe, directsync, writethrough
    ///
    /// default: writeback
    #[arg(short = 'T', long, value_name = "CACHE")]
    cache: Option<String>,
    #[command(flatten)]
    progress: ProgressArgs,
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    #[command(flatten)]
    passphrase: PassphraseArgs,
    /// images to look at
    #[arg(value_name = "FILENAME [FILENAME2...]")]
    operands: Vec<OsString>,
}

impl Subcommand for ChecksumArgs {
    const NAME: &'static str = "checksum";
    const ABOUT: &'static str = "Print a digest of the guest's disk, the same for every format";
    const USAGE: &'static [&'static str] = &[
        "[--digest sha256|blake3|blake3-tree] [--expect-digest DIGEST]",
        "[-f FMT | --image-opts] [-T CACHE] [-U] [-p] [--object OBJDEF]",
        "[--output human|json] FILENAME [FILENAME2...]",
    ];
    const EXAMPLE: &'static str = "vimg checksum --digest sha256 disk.raw disk.qcow2";
    const OWN: bool = true;

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = object::define(program, &self.object)? else { return Ok(Exit::Success) };
        let secrets = self.passphrase.given_to(program, secrets)?;
        if self.operands.is_empty() {
            return Err(Complaint::usage("Expecting image file names").into());
        }
        let kind = self.digest.kind()?.unwrap_or(DigestKind::Blake3Tree);
        let cache = self.cache.as_deref().map_or(Ok(CacheMode::Writeback), cache::source)?;
        let source =
            ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let progress = self.progress.start(program, false, "checksum")?;
        let digest = |name: &OsString, progress: &Progress| -> anyhow::Result<Digest> {
            let (image, how) = source.image(program, name)?;
            let opener = program.opener(&secrets);
            let node = opener.open(&image, &OpenHow { cache, ..how });
            program.notices(&opener);
            let observer = ConsoleObserver { progress, name: Some(program.name().to_owned()), interrupt: None };
            let digest = checksum::of(&[node?], kind, &observer)?;
            self.digest.expected().map_or(Ok(()), |expected| check(&name.to_string_lossy(), digest, expected))?;
            Ok(digest)
        };
        // Of several, one that cannot be read does not keep the others from being.
        let (mut found, mut exit) = (Vec::new(), Exit::Success);
        for name in &self.operands {
            match digest(name, &progress) {
                Ok(digest) => found.push((name.to_string_lossy(), Ok(digest))),
                Err(error) => {
                    report::words(program, &error);
                    exit = exit::of(&error);
                    found.push((name.to_string_lossy(), Err(report::to_json(program, &error))));
                }
            }
        }
        drop(progress);
        let image = |(name, digest): &(Cow<'_, str>, Result<Digest, Value>)| match digest {
            Ok(digest) => json!({"filename": name, "digest": {"kind": digest.kind.name(), "hex": digest.hex()}}),
            Err(error) => json!({"filename": name, "error": error}),
        };
        program.result(json!({"images": found.iter().map(image).collect::<Vec<_>>()}));
        if !program.tells_results() {
            let good = found.iter().filter_map(|(name, digest)| Some((name, digest.as_ref().ok()?)));
            good.for_each(|(name, digest)| program.println(&format!("{digest}  {name}")));
        }
        Ok(exit)
    }
}
