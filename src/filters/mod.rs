//! What stands between a format and its file, or over an image. A filter is one file (or folder) here, its `mod`
//! line and one line of [`FILTERS`]. It sees the bytes of its children as a `Storage`, and the image that they are the disk of.

mod blkdebug;
mod blkverify;
mod compress;
mod copy_on_read;
mod preallocate;
mod quorum;
mod throttle;

use crate::block::filter::Filter;

/// Every filter there is.
pub const FILTERS: &[&dyn Filter] = &[
    &blkdebug::Blkdebug, //
    &blkverify::Blkverify,
    &throttle::Throttle,
    &compress::Compress,
    &copy_on_read::CopyOnRead,
    &preallocate::Preallocate,
    &quorum::Quorum,
];
