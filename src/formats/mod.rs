//! The formats: each knows its own on-disk layout and nothing of the others.
//!
//! A format is one folder (or file) here, its `mod` line and one line of [`FORMATS`]. It needs `Format`'s `name`, `probe`
//! and `open`, and `BlockDriver`'s `format`, `virtual_size`, `extent`, `files` and `info`; all the rest has defaults, which
//! say that it cannot be done. [`bochs`] is a small one that is read, [`vdi`] one that does everything.

pub mod bochs;
mod claims;
pub mod cloop;
pub mod cow;
pub mod dmg;
mod effort;
mod encryption;
pub mod luks;
mod luks_header;
mod luks_slots;
mod one_file;
pub mod parallels;
pub mod qcow;
pub mod qcow2;
pub mod qed;
pub mod raw;
mod runs;
mod sector_cipher;
mod sectors;
pub mod simg;
mod table;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;
pub mod vpc;
mod windows_path;

use crate::block::Format;

/// Every format there is; raw last, because it takes anything.
pub const FORMATS: &[&dyn Format] = &[
    &qcow2::Qcow2, //
    &qcow::Qcow,
    &qed::Qed,
    &parallels::Parallels,
    &vmdk::Vmdk,
    &vdi::Vdi,
    &vpc::Vpc,
    &vhdx::Vhdx,
    &luks::Luks,
    &dmg::Dmg,
    &simg::Simg,
    &bochs::Bochs,
    &cloop::Cloop,
    &cow::Cow,
    &raw::Raw,
];
