//! What is known of options by their ids, beside what is said where they are declared: [`KNOWN`] is the list, from which the
//! groups of the help, the values that shells complete, and the files that a confined process may open are taken.
//!
//! An option of a kind that is there has the id of that kind, whatever the subcommand.

use crate::crypto::DigestKind;
use crate::storage::{CacheMode, Preallocation};

/// Where the help shows an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// What is worked on.
    Operands,
    /// The image that is there.
    Image,
    /// The image that is made or written to.
    Target,
    /// All else.
    Work,
    /// What is printed.
    Shown,
    /// What images may make us do.
    Trust,
}

impl Group {
    /// In the order of the help.
    pub const ALL: [Self; 6] = [Self::Operands, Self::Image, Self::Target, Self::Work, Self::Shown, Self::Trust];

    /// The line above the group.
    pub fn title(self) -> &'static str {
        match self {
            Self::Operands => "Operands",
            Self::Image => "Image",
            Self::Target => "Target",
            Self::Work => "How it is done",
            Self::Shown => "What is shown",
            Self::Trust => "Images that are not trusted",
        }
    }
}

/// What an option's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// Nothing, or nothing that matters here.
    Plain,
    /// The name of a file.
    File,
    /// A list in which files may be named.
    Object,
    /// `key=value` of a new image's format, in which files may be named.
    CreateOptions,
    /// The same of what can be amended.
    AmendOptions,
    /// The name of a driver.
    Driver,
    /// The name of a format that can be made.
    NewFormat,
    /// One of these words, or another one that says more.
    Words(&'static [&'static str]),
}

const CACHE: Takes = Takes::Words(&CacheMode::NAMES);

/// A row of [`KNOWN`].
#[derive(Debug)]
pub struct Known {
    /// The option's id.
    pub id: &'static str,
    /// Its group.
    pub group: Group,
    /// Its value.
    pub takes: Takes,
}

const fn row(id: &'static str, group: Group, takes: Takes) -> Known {
    Known { id, group, takes }
}

/// The options; one that is not there is about how the work is done.
pub const KNOWN: &[Known] = &[
    row("format", Group::Image, Takes::Driver),
    row("image_opts", Group::Image, Takes::Plain),
    row("source_cache", Group::Image, CACHE),
    row("cache", Group::Image, CACHE),
    row("snapshot", Group::Image, Takes::Plain),
    row("force_share", Group::Image, Takes::Plain),
    row("object", Group::Image, Takes::Object),
    row("passphrase_file", Group::Image, Takes::File),
    row("new_passphrase_file", Group::Image, Takes::File),
    row("a_format", Group::Image, Takes::Driver),
    row("b_format", Group::Image, Takes::Driver),
    row("source_file", Group::Image, Takes::File),
    row("source_format", Group::Image, Takes::Driver),
    row("options", Group::Image, Takes::AmendOptions),
    row("target_format", Group::Target, Takes::NewFormat),
    row("output_format", Group::Target, Takes::NewFormat),
    row("target_format_options", Group::Target, Takes::CreateOptions),
    row("target_image_opts", Group::Target, Takes::Plain),
    row("target_cache", Group::Target, CACHE),
    row("backing", Group::Target, Takes::File),
    row("backing_format", Group::Target, Takes::Driver),
    row("backing_cache", Group::Target, CACHE),
    row("backing_unsafe", Group::Target, Takes::Plain),
    row("no_create", Group::Target, Takes::Plain),
    row("target_is_zero", Group::Target, Takes::Plain),
    row("compress", Group::Target, Takes::Plain),
    row("target_passphrase_file", Group::Target, Takes::File),
    row("reproducible", Group::Target, Takes::Plain),
    row("uuid", Group::Target, Takes::Plain),
    row("cid", Group::Target, Takes::Plain),
    row("repair_to", Group::Target, Takes::File),
    row("repair", Group::Work, Takes::Words(&["leaks", "all"])),
    row("aio", Group::Work, Takes::Words(&["threads", "native", "io_uring"])),
    row("base", Group::Work, Takes::File),
    row("preallocation", Group::Work, Takes::Words(&Preallocation::NAMES)),
    row("progress", Group::Shown, Takes::Words(&["human", "json", "json:"])),
    row("quiet", Group::Shown, Takes::Plain),
    row("output", Group::Shown, Takes::Words(&["human", "json"])),
    row("digest", Group::Shown, Takes::Words(&DigestKind::NAMES)),
    row("help", Group::Shown, Takes::Plain),
    row("untrusted", Group::Trust, Takes::Plain),
    row("allow", Group::Trust, Takes::File),
    row("max-size", Group::Trust, Takes::Plain),
    row("max-output", Group::Trust, Takes::Plain),
];

/// What is known of an argument.
pub fn known(arg: &clap::Arg) -> Known {
    let id = arg.get_id().as_str();
    match KNOWN.iter().find(|known| known.id == id) {
        _ if arg.is_positional() => row("", Group::Operands, Takes::File),
        Some(known) => Known { ..*known },
        None => row("", Group::Work, Takes::Plain),
    }
}

/// Whether a value follows. None does where none has to: so clap is told of what may stand several times, in an order
/// that counts.
pub fn takes_value(arg: &clap::Arg) -> bool {
    arg.get_action().takes_values() && arg.get_num_args().is_none_or(|values| values.min_values() > 0)
}

/// Files that a subcommand makes, by the argument that names them.
#[derive(Debug, Clone, Copy)]
pub enum Makes {
    /// Each value, or files in the same folder.
    Files(&'static str),
    /// The last one.
    Last(&'static str),
    /// What follows these letters, in values that start with them.
    Behind(&'static str, &'static str),
    /// All in a folder, which need not be there.
    Folder(&'static str),
}

impl Makes {
    /// The argument.
    pub fn argument(self) -> &'static str {
        match self {
            Self::Files(id) | Self::Last(id) | Self::Behind(id, _) | Self::Folder(id) => id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::KNOWN;
    use crate::cli::{SUBCOMMANDS, arguments_of};

    /// Every row is an option's, and every argument that a subcommand says it makes files of is its own.
    #[test]
    fn the_table_names_arguments_that_there_are() {
        let all: Vec<Vec<String>> = SUBCOMMANDS.iter().map(arguments_of).collect();
        for known in KNOWN {
            assert!(all.iter().flatten().any(|id| id == known.id), "{}", known.id);
        }
        for (row, ids) in SUBCOMMANDS.iter().zip(&all) {
            assert!(row.makes.iter().all(|makes| ids.iter().any(|id| id == makes.argument())), "{}", row.name);
        }
    }
}
