//! How much room a new image takes, before it is made.

use super::driver::BitmapInfo;
use super::{CreateOptions, Result, Secrets};

/// An image that is to be made, and what it is to hold.
pub struct MeasureRequest<'a> {
    /// The guest's disk size in bytes, as asked for.
    pub size: u64,
    /// All `-o` options.
    pub options: &'a CreateOptions,
    /// In how many units of so many bytes (from the start of the disk on) there is something to be written: what the
    /// source stores and its maps do not call zeros.
    pub stored: &'a dyn Fn(u64) -> Result<u64>,
    /// The source's persistent bitmaps, if it can have any.
    pub bitmaps: Option<&'a [BitmapInfo]>,
    /// Where keys are that the options name.
    pub secrets: &'a Secrets,
}

/// How many bytes all files of an image have together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Measured {
    /// Once what the source stores is written, if none of it turns out to be zeros: at most.
    pub required: u64,
    /// Once all of the disk is written.
    pub fully_allocated: u64,
    /// What the source's bitmaps take beside that; `None` where they are not kept.
    pub bitmaps: Option<u64>,
}

/// Able to be measured.
pub trait Measure {
    /// Refuses what cannot be made.
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured>;
}
