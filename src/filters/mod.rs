//! What stands between a format and its file, or over an image. A filter is one file (or folder) here and one line of
//! [`FILTERS`].

mod blkdebug;

use crate::block::filter::Filter;

/// Every filter there is.
pub const FILTERS: &[&dyn Filter] = &[
    &blkdebug::Blkdebug, //
];
