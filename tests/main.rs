//! One integration binary: it links once, which matters on a small machine.
//!
//! The judge is the installed `qemu-img`; nothing skips in silence when it, or another tool, is missing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bitmaps;
mod both;
mod check;
mod common;
mod compare;
mod compression;
mod contract;
mod convert;
mod encryption;
mod fault;
mod fixtures;
mod formats;
mod guard;
mod hostile;
mod killed;
mod kinds;
mod layering;
mod layers;
mod luks;
mod map;
mod measure;
mod opening;
mod qcow;
mod qcow2_check;
mod qcow2_create;
mod qcow2_read;
mod qcow2_resize;
mod qcow2_write;
mod qed;
mod realdisk;
mod rig;
mod signals;
mod simg;
mod snapshot;
mod storage;
mod streams;
mod truncated;
mod untrusted;
mod vdi;
mod vmdk;
mod vmdk_resize;
mod vpc;
mod walkthrough;
