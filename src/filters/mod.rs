//! What stands between a format and its file, or over an image. A filter is one file (or folder) here, its `mod`
//! line and one line of [`FILTERS`]. It sees the bytes of one child as a `Storage`, and the image that they are the disk of;
//! what has several children needs more than `Filter::open` is given.

mod blkdebug;
mod compress;
mod copy_on_read;
mod preallocate;
mod throttle;

use crate::block::filter::Filter;

/// Every filter there is.
pub const FILTERS: &[&dyn Filter] = &[
    &blkdebug::Blkdebug, //
    &throttle::Throttle,
    &compress::Compress,
    &copy_on_read::CopyOnRead,
    &preallocate::Preallocate,
];
