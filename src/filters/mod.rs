//! What stands between a format and its file, or over an image. A filter is one file (or folder) here, its `mod`
//! line and one line of [`FILTERS`]. It sees the bytes of one child as a `Storage`; what has several children, or needs the
//! backing chain or other objects, needs more than `Filter::open` is given.

mod blkdebug;

use crate::block::filter::Filter;

/// Every filter there is.
pub const FILTERS: &[&dyn Filter] = &[
    &blkdebug::Blkdebug, //
];
