//! `compare`: whether two disks hold the same.
//!
//! The plan (`plan`) walks both maps in step and leaves out what is equal without a look: zeros on both sides, the
//! same bytes of the same file. The workers (`engine`) read and compare the rest. What is told is what comes first on
//! the disk, whatever the number of threads.

mod engine;
mod plan;
mod reader;

use std::num::NonZero;

use self::engine::Engine;
use crate::block::{Error, ErrorKind, Node};
use crate::ops::copy::{MOST_THREADS, Observer};
use crate::ops::lengths::{self, FileLengths};

/// How it is done.
#[derive(Debug, Clone, Copy, Default)]
pub struct CompareOptions {
    /// Sizes, and what the maps say of each part, have to be the same too.
    pub strict: bool,
    /// How many threads; `None`: one a core.
    pub threads: Option<usize>,
}

/// What differs first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// The sizes (where that matters).
    Size,
    /// What the maps say, from there on (where that matters).
    Status(u64),
    /// The bytes, in the sector that starts there.
    Content(u64),
}

/// What could not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompareStep {
    /// To ask a map.
    Status,
    /// To read.
    Read,
    /// To read all of it: a file got shorter meanwhile.
    Whole,
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first.
    Left,
    /// The second.
    Right,
}

/// Why there is no answer.
#[derive(Debug)]
pub struct CompareFailure {
    /// What could not be done.
    pub step: CompareStep,
    /// With which of the two.
    pub side: Side,
    /// Where on the disk.
    pub at: u64,
    /// The cause.
    pub error: Error,
}

impl CompareFailure {
    /// The cause, and in which file it is where that is another than `name`. Nothing where the reference says nothing:
    /// what is wrong with tables has been said by then.
    pub fn cause(&self, name: &str) -> Option<String> {
        if self.step == CompareStep::Status && self.error.kind != ErrorKind::Truncated {
            return None;
        }
        let cause = self.error.cause();
        let elsewhere = self.error.place().map(|place| &place.file).filter(|file| *file != name);
        Some(elsewhere.map_or_else(|| cause.clone(), |file| format!("{file}: {cause}")))
    }
}

/// Two disks to be compared.
#[derive(Clone, Copy)]
pub struct Comparison<'a> {
    left: &'a Node,
    right: &'a Node,
    options: CompareOptions,
    observer: &'a dyn Observer,
}

type Outcome = Result<Option<Difference>, Box<CompareFailure>>;

impl<'a> Comparison<'a> {
    /// Nothing is looked at yet.
    pub fn new(left: &'a Node, right: &'a Node, options: CompareOptions, observer: &'a dyn Observer) -> Self {
        Self { left, right, options, observer }
    }

    fn sizes(&self) -> (u64, u64) {
        (self.left.virtual_size(), self.right.virtual_size())
    }

    /// Whether one disk is longer.
    pub fn sizes_differ(&self) -> bool {
        self.sizes().0 != self.sizes().1
    }

    /// Compares what both disks have.
    pub fn common(&self) -> Outcome {
        if self.options.strict && self.sizes_differ() {
            return Ok(Some(Difference::Size));
        }
        let (left, right) = self.sizes();
        self.part(0, left.min(right))
    }

    /// Compares what the longer disk has beyond the shorter one with zeros.
    pub fn rest(&self) -> Outcome {
        let (left, right) = self.sizes();
        self.part(left.min(right), left.max(right))
    }

    fn part(&self, from: u64, to: u64) -> Outcome {
        // Not worth a thread.
        let chunks = usize::try_from((to - from).div_ceil(plan::CHUNK)).unwrap_or(usize::MAX);
        let cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads = self.options.threads.unwrap_or_else(cores).clamp(1, MOST_THREADS);
        let whole = |side, at| move |error| Box::new(CompareFailure { step: CompareStep::Whole, side, at, error });
        let lengths = |node, side| FileLengths::of(lengths::layers(node)).map_err(whole(side, from));
        let (left, right) = (lengths(self.left, Side::Left)?, lengths(self.right, Side::Right)?);
        let found = Engine::new(self, from, to).run(threads.min(chunks.max(1)));
        if found.is_ok() {
            left.check().map_err(whole(Side::Left, to))?;
            right.check().map_err(whole(Side::Right, to))?;
        }
        found
    }
}
