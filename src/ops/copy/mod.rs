//! The copy engine: what the sources hold is written to a target, by as many threads as suit it.
//!
//! The plan ([`plan`]) walks the sources' maps and cuts chunks; the workers ([`engine`]) move them. Both ends are
//! open already: who made the target, and whether it has its name yet, is not decided here. What the user wants is
//! [`CopyOptions`]; what was found out about the target is [`TargetFacts`].

mod ahead;
pub mod digest;
pub mod engine;
mod host_copy;
pub mod onto;
mod piece;
pub mod plan;
mod rate;
mod segment;
pub mod source;
pub mod target;
mod turn;
pub mod zero;

use std::num::NonZero;

pub use digest::{GuestDigest, digest_of};
pub use onto::Onto;
pub use source::{Above, Joined};

use crate::block::{Effort, Error, Node, Result};

/// How the user wants it done.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// The shortest run of zeros that is left out, in bytes; 0: every byte is written.
    pub sparse: u64,
    /// How many threads; `None`: as many as suit the storage.
    pub threads: Option<usize>,
    /// Store compressed units.
    pub compress: bool,
    /// How hard compression tries.
    pub effort: Effort,
    /// Placements need not be in the guest's order.
    pub reorder: bool,
    /// At most that many bytes a second.
    pub rate: Option<u64>,
    /// Let the host copy where it can.
    pub offload: bool,
    /// What cannot be read becomes zeros, with a warning.
    pub salvage: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            sparse: 4096,
            threads: None,
            compress: false,
            effort: Effort::default(),
            reorder: false,
            rate: None,
            offload: false,
            salvage: false,
        }
    }
}

/// What is known of the target before the first byte is copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TargetFacts {
    /// It is made of new files: nobody can see it half done, and what was not written to is zeros.
    pub unnamed: bool,
    /// It reads as zeros now, through all its layers.
    pub reads_zero: bool,
    /// Its own layer stores nothing but zeros.
    pub blank: bool,
    /// Whether it may share data on the disk with the sources, where the file system can.
    pub sharing: Sharing,
    /// In which order it takes what is written.
    pub taking: Taking,
}

/// Whether a target may share data on the disk with the sources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Where the host is asked to copy.
    #[default]
    IfAsked,
    /// In any case.
    Always,
    /// Not at all: its space is to be its own.
    Never,
}

/// In which order a target takes what is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Taking {
    /// In any.
    #[default]
    AnyOrder,
    /// In the guest's alone: it goes from front to back.
    InOrder,
    /// It takes no data of the disk at all: where they would lie is all that is wanted.
    Nothing,
}

/// Receives progress and warnings. Called from all threads.
pub trait Observer: Sync {
    /// Whether a report of progress would be shown now.
    fn wants_progress(&self) -> bool {
        false
    }

    /// `done` of `total` stored bytes have been started on.
    fn progress(&self, done: u64, total: u64) {
        let _ = (done, total);
    }

    /// Whether the user wants it to end here: what was written stays, what is left is not.
    fn is_cancelled(&self) -> bool {
        false
    }

    /// What follows is another kind of work, and nothing of it is done.
    fn phase(&self, name: &'static str) {
        let _ = name;
    }

    /// A line to be shown as it is.
    fn note(&self, line: &str) {
        let _ = line;
    }

    /// Something went wrong, and the copy goes on.
    fn warn(&self, text: &str) {
        let _ = text;
    }
}

/// Ignores them.
#[derive(Debug)]
pub struct Silent;

impl Observer for Silent {}

/// The most threads that can be asked for.
pub const MOST_THREADS: usize = 16;

/// Writes everything that the sources hold to the target. Neither flushes nor closes it.
pub fn copy(
    source: &Joined,
    target: &Node,
    options: &CopyOptions,
    facts: TargetFacts,
    observer: &dyn Observer,
) -> Result<()> {
    copy_with(source, target, options, facts, observer, None)
}

/// The same, with the digest of what the sources hold made on the way.
pub fn copy_with(
    source: &Joined,
    target: &Node,
    options: &CopyOptions,
    facts: TargetFacts,
    observer: &dyn Observer,
    digest: Option<&GuestDigest>,
) -> Result<()> {
    let engine = engine::Engine::new(source, target, options, facts, observer, digest)?;
    if target.virtual_size() < source.total() {
        return Err(Error::invalid("output file is smaller than input file"));
    }
    // More than that are not worth a thread.
    let chunks = usize::try_from(source.total().div_ceil(engine.chunk_len())).unwrap_or(usize::MAX);
    let most = chunks.clamp(1, MOST_THREADS);
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    engine.run(|| options.threads.unwrap_or_else(|| suitable_threads(source, target, cores)).clamp(1, most))
}

/// One thread for each of the cores, or as many as the storage on either side wants requests in flight: each has one at a time. (Where
/// plain data is written to a file, the second of two cores saves 30 to 40 % of the time for 25 % more CPU time.)
fn suitable_threads(source: &Joined, target: &Node, cores: usize) -> usize {
    let below = |node| std::iter::successors(Some(node), |node: &&Node| node.backing().map(|below| &**below));
    let wishes = source
        .layers()
        .chain(below(target))
        .flat_map(|node| node.driver().files())
        .filter_map(|file| file.storage.facts().parallel);
    wishes.max().map_or(cores, |most| cores.max(usize::try_from(most).unwrap_or(MOST_THREADS)))
}

#[cfg(test)]
mod tests;
