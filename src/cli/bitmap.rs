//! `bitmap`: adds, removes and changes an image's persistent bitmaps.

use std::ffi::OsString;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::exit::Exit;
use super::interrupt::Interrupt;
use super::passphrase::PassphraseArgs;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, object, size};
use crate::block::{ImageRef, OpenHow, Purpose};
use crate::ops::bitmap::{self, BitmapAction};

/// The options.
#[derive(Debug, clap::Args)]
pub struct BitmapArgs {
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    #[command(flatten)]
    actions: ActionArgs,
    /// with --add: the bytes for which one bit stands, a power of two; a cluster, but at least 4k and at most 64k, if not given
    #[arg(short, long, value_name = "SIZE[KMGTPE]", value_parser = granularity)]
    granularity: Option<u64>,
    /// image with the bitmap that is merged, if it is another one
    ///
    /// default: FILENAME
    #[arg(short = 'b', long, value_name = "SRC_FILENAME")]
    source_file: Option<OsString>,
    /// format of that image, detected if not given
    #[arg(short = 'F', long, value_name = "SRC_FMT")]
    source_format: Option<String>,
    /// a QEMU object, such as a secret with a passphrase
    #[arg(long, value_name = "OBJDEF", value_parser = object::parse)]
    object: Vec<object::Object>,
    #[command(flatten)]
    passphrase: PassphraseArgs,
    /// image, and the bitmap's name
    #[arg(value_name = "FILENAME BITMAP")]
    operands: Vec<OsString>,
}

/// What is done, in the order of the command line; the granularity of a bitmap that is added is not known yet.
#[derive(Debug, Default)]
struct ActionArgs(Vec<BitmapAction>);

/// Those that take no value: their names, what they are, and what they do.
const ACTIONS: [(&str, BitmapAction, &str); 5] = [
    ("add", BitmapAction::Add(None), "make the bitmap, which follows what is written from now on"),
    ("remove", BitmapAction::Remove, "remove the bitmap"),
    ("clear", BitmapAction::Clear, "clear all bits of the bitmap"),
    ("enable", BitmapAction::Enable, "let the bitmap follow what is written from now on"),
    ("disable", BitmapAction::Disable, "let the bitmap follow what is written no more"),
];
const MERGE: &str = "merge";

impl Args for ActionArgs {
    fn augment_args(command: Command) -> Command {
        // They may stand several times: a value that nobody gives says where each stands.
        let plain = ACTIONS.iter().map(|(name, _, help)| {
            let arg = Arg::new(*name).long(*name).action(ArgAction::Append).help(*help);
            arg.num_args(0..=1).require_equals(true).default_missing_value("")
        });
        let merge = Arg::new(MERGE).long(MERGE).value_name("SOURCE").action(ArgAction::Append);
        command.args(plain).arg(merge.help("set the bits too that are set in the bitmap of that name"))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ActionArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found: Vec<(usize, BitmapAction)> = Vec::new();
        for (name, action, _) in &ACTIONS {
            found.extend(matches.indices_of(name).unwrap_or_default().map(|at| (at, action.clone())));
        }
        let sources = matches.get_many::<String>(MERGE).unwrap_or_default().cloned().map(BitmapAction::Merge);
        found.extend(matches.indices_of(MERGE).unwrap_or_default().zip(sources));
        found.sort_by_key(|(at, _)| *at);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Subcommand for BitmapArgs {
    const NAME: &'static str = "bitmap";
    const ABOUT: &'static str = "Perform modifications of the persistent bitmap in the image";
    const USAGE: &'static [&'static str] = &[
        "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)...",
        "[-f FMT | --image-opts] [-b SRC_FILENAME [-F SRC_FMT]] [-g SIZE]",
        "[--object OBJDEF] FILENAME BITMAP",
    ];
    const OWN_USAGE: &'static [&'static str] = &[
        "(--merge SOURCE | --add | --remove | --clear | --enable",
        "| --disable)... [-f FMT | --image-opts] [-b SRC_FILENAME [-F SRC_FMT]]",
        "[-g SIZE] [--object OBJDEF] FILENAME BITMAP",
    ];
    const EXAMPLE: &'static str = "vimg bitmap --add disk.qcow2 since-monday";

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let Some(secrets) = object::define(program, &self.object)? else { return Ok(Exit::Success) };
        let secrets = self.passphrase.given_to(program, secrets)?;
        let actions = self.actions()?;
        let [name, bitmap] = &self.operands[..] else {
            return Err(Complaint::value("Expecting filename and bitmap name").into());
        };
        let source = ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: false };
        source.check()?;
        let interrupt = Interrupt::catch();
        let (image, how) = source.image(program, name)?;
        let opener = program.opener(&secrets);
        // Bitmaps are a layer's own: what lies below it need not be there.
        let node = opener.open(&image, &OpenHow { purpose: Purpose::Write, no_backing: true, ..how });
        program.notices(&opener);
        let node = node?;
        let merged = self.source_file.as_ref().map(|name| {
            let how = OpenHow { format: self.source_format.clone(), no_backing: true, ..OpenHow::default() };
            let merged = opener.open(&ImageRef::name(name), &how);
            program.notices(&opener);
            merged
        });
        let merged = merged.transpose()?;
        interrupt.during(|| bitmap::change(&node, &bitmap.to_string_lossy(), &actions, merged.as_deref()))?;
        Ok(Exit::Success)
    }
}

impl BitmapArgs {
    /// What is done, and with what.
    fn actions(&self) -> Result<Vec<BitmapAction>, Complaint> {
        let mut actions = self.actions.0.clone();
        let any = |is: fn(&BitmapAction) -> bool| self.actions.0.iter().any(is);
        let merges = any(|action| matches!(action, BitmapAction::Merge(_)));
        let refused = if actions.is_empty() {
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        } else if self.granularity.is_some() && !any(|action| matches!(action, BitmapAction::Add(_))) {
            "granularity only supported with --add"
        } else if self.source_format.is_some() && self.source_file.is_none() {
            "-F only supported with -b"
        } else if self.source_file.is_some() && !merges {
            "Merge bitmap source file only supported with --merge"
        } else {
            for action in &mut actions {
                if let BitmapAction::Add(granularity) = action {
                    // None is as good as none given.
                    *granularity = self.granularity.filter(|bytes| *bytes != 0);
                }
            }
            return Ok(actions);
        };
        Err(Complaint::value(refused))
    }
}

fn granularity(text: &str) -> Result<u64, Complaint> {
    size::size("granularity", text)
}
