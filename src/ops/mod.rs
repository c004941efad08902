//! What is done to images. No printing, no exit.

pub mod amend;
pub mod bench;
pub mod bitmap;
pub mod check;
pub mod checksum;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod copy;
pub mod create;
pub mod dd;
pub mod ids;
pub mod info;
pub mod lengths;
pub mod map;
pub mod measure;
mod read_from;
pub mod rebase;
pub mod resize;
pub mod snapshot;
pub mod staged;
pub mod written;
