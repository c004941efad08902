//! `map`: shows where each part of an image's disk is, through its whole backing chain.

use std::ffi::OsString;

use super::exit::Exit;
use super::output::OutputForm;
use super::passphrase::PassphraseArgs;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, object, size};
use crate::block;
use crate::ops::map::{self, MapEntries, MapEntry};

/// The options.
#[derive(Debug, clap::Args)]
pub struct MapArgs {
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// where to start, 0 if not given
    #[arg(short, long, value_name = "OFFSET", value_parser = start)]
    start_offset: Option<u64>,
    /// how much to show at most, all that follows if not given
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = length)]
    max_length: Option<u64>,
    /// form of the output: human or json
    ///
    /// default: human
    #[arg(long, value_name = "human|json", value_parser = OutputForm::parse)]
    output: Option<OutputForm>,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// allow other writers: do not lock the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    #[command(flatten)]
    passphrase: PassphraseArgs,
    /// image to map
    #[arg(value_name = "FILENAME")]
    operands: Vec<OsString>,
}

fn start(text: &str) -> Result<u64, Complaint> {
    size::size("start offset", text)
}

fn length(text: &str) -> Result<u64, Complaint> {
    size::size("max length", text)
}

impl Subcommand for MapArgs {
    const NAME: &'static str = "map";
    const ABOUT: &'static str = "Dump image metadata";
    const USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [--start-offset OFFSET] [--max-length LENGTH]",
        "[--output human|json] [-U] [--object OBJDEF] FILENAME",
    ];
    const EXAMPLE: &'static str = "vimg map --output=json overlay.qcow2";

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = object::define(program, &self.object)? else { return Ok(Exit::Success) };
        let secrets = self.passphrase.given_to(program, secrets)?;
        let [name] = &self.operands[..] else {
            return Err(Complaint::usage("Expecting one image file name").into());
        };
        let source =
            ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let (image, how) = source.image(program, name)?;
        let opener = program.opener(&secrets);
        let node = opener.open(&image, &how);
        program.notices(&opener);
        let node = node?.beneath_filters();
        let from = self.start_offset.unwrap_or(0);
        let entries = map::map(&node, from, self.max_length.unwrap_or(u64::MAX));
        match self.output.unwrap_or_default() {
            OutputForm::Human => table(program, entries)?,
            OutputForm::Json => list(program, entries, from)?,
        }
        Ok(Exit::Success)
    }
}

/// The parts that hold data, and where that is.
fn table(program: &Program, entries: MapEntries<'_>) -> anyhow::Result<()> {
    let head = || program.println(&format!("{:<16}{:<16}{:<16}{}", "Offset", "Length", "Mapped to", "File"));
    // There is no table to begin where the first part is none for it; the reference begins one.
    let mut begun = !program.is_vimg();
    if begun {
        head();
    }
    for entry in entries {
        let MapEntry { start, len, zero, data, offset, file, .. } = entry?;
        if !data || zero {
            continue;
        }
        let (Some(offset), Some(file)) = (offset, file) else {
            return Err(block::Error::unsupported("File contains external, encrypted or compressed clusters.").into());
        };
        if !std::mem::replace(&mut begun, true) {
            head();
        }
        program.println(&format!("{:<16}{:<16}{:<16}{file}", hex(start), hex(len), hex(offset)));
    }
    if !begun {
        head();
    }
    Ok(())
}

/// As C writes `%#x`: a zero has no prefix.
fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}

/// All parts. Where there are none, one without length stands for them, as with the reference.
fn list(program: &Program, entries: MapEntries<'_>, from: u64) -> anyhow::Result<()> {
    program.print("[");
    let mut entries = entries.peekable();
    let none = entries.peek().is_none().then_some(Ok(MapEntry { start: from, ..MapEntry::default() }));
    let mut entries = none.into_iter().chain(entries).peekable();
    while let Some(entry) = entries.next() {
        let MapEntry { start, len, depth, present, zero, data, compressed, offset, .. } = entry?;
        let offset = offset.map_or_else(String::new, |offset| format!(", \"offset\": {offset}"));
        let after = if entries.peek().is_some() { ",\n" } else { "]\n" };
        program.print(&format!(
            "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}{offset}}}{after}"
        ));
    }
    Ok(())
}
