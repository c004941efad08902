//! vhdx: Hyper-V's virtual hard disk, version 2: dynamic, fixed and differencing.
//!
//! Source: *[MS-VHDX]: Virtual Hard Disk v2 (VHDX) File Format*. `layout` has the structures; `headers`, `log` and
//! `regions` are what an image is opened by, in this order; `state` has the tables, and `space` what of the file is in use.
//!
//! Invariants: no two entries of the BAT name the same mebibyte. What is written needs no log, because each step alone
//! leaves a whole image: data, then the sector bitmap, then the one entry of the BAT that names them, each flushed before
//! the next; a header or region table is written beside the other copy. A stop in between leaves a block that nothing
//! names. A log that somebody else has left is replayed before anything is believed: in the file before it is written
//! to, in memory (`replayed`) else.
//!
//! One lock, over the tables (`one_file.rs`); it is never held while guest data moves. `relinked` is taken within it.

mod check;
mod create;
mod headers;
mod layout;
mod log;
mod map;
mod measure;
mod open;
mod parent;
mod regions;
mod replayed;
mod resize;
mod space;
mod state;

use std::ops::Deref;
use std::sync::{Arc, Mutex};

use self::layout::SIGNATURE;
use self::parent::Parent;
use self::replayed::Replayed;
use self::state::VhdxState;
use crate::block::{BlockDriver, Create, Format, OpenRequest, Result};
use crate::formats::one_file::OneFile;

/// The format.
#[derive(Debug)]
pub struct Vhdx;

impl Format for Vhdx {
    fn name(&self) -> &'static str {
        "vhdx"
    }

    fn also_called(&self) -> &'static [&'static str] {
        &["avhdx"]
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        if head.starts_with(SIGNATURE) { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        open::open(request)
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }

    fn layered(&self) -> bool {
        true
    }
}

#[derive(Debug)]
struct VhdxDriver {
    image: OneFile<VhdxState>,
    /// Bytes of a block.
    block: u64,
    /// Bytes of a logical sector.
    sector: u64,
    fixed: bool,
    parent: Option<Parent>,
    /// What the parent's data write GUID has become since.
    relinked: Mutex<Option<u128>>,
    /// The file, where it has a log that is not replayed in it.
    replayed: Option<Arc<Replayed>>,
}

impl VhdxDriver {
    fn blocks(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.block)
    }
}

impl Deref for VhdxDriver {
    type Target = OneFile<VhdxState>;

    fn deref(&self) -> &OneFile<VhdxState> {
        &self.image
    }
}
