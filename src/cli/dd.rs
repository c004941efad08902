//! `dd`: copies some blocks of an image to a new one, in any format.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::arguments::Makes;
use super::exit::Exit;
use super::passphrase::{PassphraseArgs, TargetPassphraseArgs};
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, object, size};
use crate::block::{Error, ImageRef, Node, OpenHow, Opener, OptionValue};
use crate::ops::create::{NewImage, Target};
use crate::ops::dd::pipe::PipedBlocks;
use crate::ops::dd::{self, Blocks};
use crate::ops::ids::IdChoice;
use crate::ops::staged::StagedTarget;
use crate::storage::pipe;

/// The options.
#[derive(Debug, clap::Args)]
pub struct DdArgs {
    /// format of the input, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// the input is named by a list of options key=value,..., not by a file name
    #[arg(long)]
    image_opts: bool,
    /// format of the output, raw if not given
    #[arg(short = 'O', long, value_name = "FMT")]
    output_format: Option<String>,
    /// allow other writers: do not lock the input
    #[arg(short = 'U', long)]
    force_share: bool,
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    #[command(flatten)]
    passphrase: PassphraseArgs,
    #[command(flatten)]
    target_passphrase: TargetPassphraseArgs,
    /// if=FILENAME: the input; of=FILENAME: the output, which is made anew; bs=SIZE: length of a block, 512 if not
    /// given; count=N: blocks to read, skipped ones and all; skip=N: blocks to skip at the start of the input
    #[arg(value_name = "[bs=SIZE] [count=N] [skip=N] if=INPUT of=OUTPUT")]
    operands: Vec<OsString>,
}

/// What operands begin with, in front of `=`.
pub(super) const KEYS: [&str; 5] = ["if", "of", "bs", "count", "skip"];

/// What the operands say. Of several with one name the last counts.
#[derive(Debug, Default)]
struct Operands {
    input: Option<OsString>,
    output: Option<OsString>,
    block: Option<u64>,
    count: Option<u64>,
    skip: Option<u64>,
}

impl Operands {
    fn parse(words: &[OsString]) -> Result<Self, Complaint> {
        let mut operands = Self::default();
        for word in words {
            let bytes = word.as_bytes();
            let end = bytes.iter().position(|byte| *byte == b'=').unwrap_or(bytes.len());
            let (name, value) = bytes.split_at(end);
            let name = String::from_utf8_lossy(name);
            let value = value.strip_prefix(b"=").map(OsStr::from_bytes);
            let unknown = || Complaint::value(format!("unrecognized operand {name}"));
            let value = value.ok_or_else(unknown)?;
            let text = value.to_string_lossy();
            match &*name {
                "if" => operands.input = Some(value.to_owned()),
                "of" => operands.output = Some(value.to_owned()),
                "bs" => operands.block = Some(size::size_within("bs", &text, 1..=i32::MAX as u64)?),
                "count" => operands.count = Some(size::size("count", &text)?),
                "skip" => operands.skip = Some(size::size("skip", &text)?),
                _ => return Err(unknown()),
            }
        }
        Ok(operands)
    }
}

impl Subcommand for DdArgs {
    const NAME: &'static str = "dd";
    const ABOUT: &'static str = "Copy input to output with optional format conversion";
    const USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [-O OUTPUT_FMT] [-U] [--object OBJDEF]",
        "[bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    ];
    const EXAMPLE: &'static str = "vimg dd bs=1M skip=1 count=3 if=disk.raw of=part.raw";
    const MAKES: &'static [Makes] = &[Makes::Behind("operands", "of=")];

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = object::define(program, &self.object)? else { return Ok(Exit::Success) };
        let operands = Operands::parse(&self.operands)?;
        let (Some(input), Some(output)) = (&operands.input, &operands.output) else {
            return Err(Complaint::value("Must specify both input and output files").into());
        };
        let source =
            ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let secrets = self.passphrase.and_target(&self.target_passphrase, program, secrets)?;
        let (image, how) = source.image(program, input)?;
        let opener = program.opener(&secrets).allowing(output.as_ref());
        let opener = if self.image_opts { opener } else { opener.allowing(input.as_ref()) };
        let blocks =
            Blocks { len: operands.block.unwrap_or(512), count: operands.count, skip: operands.skip.unwrap_or(0) };
        let sink = self.pipe_out(output)?;
        if let Some(pipe) = self.pipe_in(input)? {
            let piped = PipedBlocks::find(pipe::open_source(pipe).map_err(Error::from)?, pipe, &blocks)?;
            too_far(program, input, piped.past_end);
            return self.copy_piped(program, &opener, piped, output, sink);
        }
        let source = opener.open(&image, &how);
        program.notices(&opener);
        let source = source?;
        let part = blocks.of(source.virtual_size());
        match sink {
            Some(sink) => {
                too_far(program, input, part.past_end);
                dd::pipe::to_pipe(&source, part, pipe::open_sink(sink).map_err(Error::from)?, sink)?;
            }
            None => {
                let target = self.target(program, &opener, output, part.len, std::slice::from_ref(&source))?;
                too_far(program, input, part.past_end);
                dd::copy(&source, part, target)?;
            }
        }
        Ok(Exit::Success)
    }
}

/// No failure: there is nothing to copy.
fn too_far(program: &Program, input: &OsStr, past_end: bool) {
    if past_end {
        program.error(&format!("{}: cannot skip to specified offset", input.to_string_lossy()));
    }
}

impl DdArgs {
    fn is_raw_output(&self) -> bool {
        self.output_format.as_deref().is_none_or(|format| format == "raw")
    }

    /// The input, if it is a pipe. It cannot be looked at to find out what it is.
    fn pipe_in<'a>(&self, input: &'a OsStr) -> Result<Option<&'a Path>, Complaint> {
        let path = Path::new(input);
        if self.image_opts || !pipe::is_pipe(path) {
            return Ok(None);
        }
        match self.format.as_deref() {
            Some("raw") => Ok(Some(path)),
            _ => Err(Complaint::value(format!(
                "'{}' is a pipe, which can be read as a raw disk only: say -f raw",
                input.to_string_lossy()
            ))),
        }
    }

    /// The output, if it is a pipe.
    fn pipe_out<'a>(&self, output: &'a OsStr) -> Result<Option<&'a Path>, Complaint> {
        let path = Path::new(output);
        match (pipe::is_pipe(path), self.is_raw_output()) {
            (false, _) => Ok(None),
            (true, true) => Ok(Some(path)),
            (true, false) => Err(Complaint::value(format!(
                "'{}' is a pipe: only raw can be written from front to back",
                output.to_string_lossy()
            ))),
        }
    }

    /// Copies what a pipe gives: straight to where it is raw, else by way of a temporary file.
    fn copy_piped(
        &self,
        program: &Program,
        opener: &Opener<'_>,
        piped: PipedBlocks<File>,
        output: &OsStr,
        sink: Option<&Path>,
    ) -> anyhow::Result<Exit> {
        if let Some(sink) = sink {
            piped.to_pipe(pipe::open_sink(sink).map_err(Error::from)?, sink)?;
        } else if self.is_raw_output() {
            piped.to_raw(self.target(program, opener, output, 0, &[])?)?;
        } else {
            let temporary = piped.to_temporary()?;
            let how = OpenHow { format: Some("raw".to_owned()), ..OpenHow::default() };
            let source = opener.open(&ImageRef::name(temporary.path().unwrap_or(Path::new(""))), &how)?;
            let part = Blocks::ALL.of(source.virtual_size());
            dd::copy(&source, part, self.target(program, opener, output, part.len, &[])?)?;
        }
        Ok(Exit::Success)
    }

    fn target(
        &self,
        program: &Program,
        opener: &Opener<'_>,
        name: &OsStr,
        size: u64,
        sources: &[Arc<Node>],
    ) -> anyhow::Result<StagedTarget> {
        let new = self.new_image(opener, name, size)?;
        if self.output_format.is_none() {
            program.warn_of_raw(name, "-O");
        }
        let target = StagedTarget::make(&new, sources, None, opener, NewImage::creating_output);
        program.notices(opener);
        Ok(target?)
    }

    fn new_image(&self, opener: &Opener<'_>, name: &OsStr, size: u64) -> anyhow::Result<NewImage> {
        let format = self.output_format.as_deref().unwrap_or("raw");
        if opener.drivers().find(format).is_none() {
            return Err(Complaint::value("Unknown file format").into());
        }
        let target = Target::find(opener.drivers(), format, Some(name))?;
        let mut options = target.options();
        options.set("size", OptionValue::Size(size))?;
        Ok(NewImage { name: name.to_owned(), format: target.format, size, options, ids: IdChoice::default() })
    }
}
