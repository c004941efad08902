//! Converting: the sources are copied to a new image, or to one that is there.
//!
//! [`ConvertRequest`] is what is asked for, [`Conversion`] what was decided, [`Job`] does it.

mod away;
pub mod bitmaps;
pub mod decide;
pub mod job;
pub mod room;
pub mod way_out;

pub use decide::{Conversion, ConvertRequest, Proof};
pub use job::Job;
pub use way_out::WayOut;
