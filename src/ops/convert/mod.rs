//! Converting: the sources are copied to a new image, or to one that is there.

pub mod bitmaps;
pub mod job;
