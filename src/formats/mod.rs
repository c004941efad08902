//! The formats: each knows its own on-disk layout and nothing of the others.

mod effort;
mod one_file;
pub mod qcow;
pub mod qcow2;
pub mod raw;
mod runs;
mod table;
pub mod vdi;
pub mod vmdk;
pub mod vpc;

use crate::block::Format;

/// Every format there is; raw last, because it takes anything.
pub const FORMATS: &[&dyn Format] = &[
    &qcow2::Qcow2, //
    &qcow::Qcow,
    &vmdk::Vmdk,
    &vdi::Vdi,
    &vpc::Vpc,
    &raw::Raw,
];
