//! A protocol's name in the place of a new image's format: its bytes are the disk, as those of raw are. And how new
//! bytes that are a disk come to be, which is the same for both.

use super::bare::Bare;
use super::error::Context;
use super::options::OptionSpec;
use super::protocol::{CreateFile, Protocol};
use super::{BlockDriver, Create, CreateOptions, CreateRequest, FileOrder, Format, OpenRequest, Result};
use crate::storage::{Preallocation, Storage};

const SECTOR: u64 = 512;

/// A protocol as a format: bytes of its making that hold nothing but the disk.
#[derive(Debug, Clone, Copy)]
pub struct Bytes(&'static dyn Protocol);

impl Bytes {
    /// All `N` protocols of a table.
    pub const fn all<const N: usize>(protocols: &[&'static dyn Protocol]) -> [Self; N] {
        let mut all = [Self(protocols[0]); N];
        let mut at = 1;
        while at < N {
            all[at] = Self(protocols[at]);
            at += 1;
        }
        all
    }

    fn maker(&self) -> Option<&'static dyn CreateFile> {
        self.0.creating()
    }
}

impl Format for Bytes {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn probe(&self, _head: &[u8], _name: &str) -> u32 {
        // Any bytes will do.
        1
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let write = request.purpose.writes();
        Ok(Box::new(Bare::open(self.name(), request.file, write)?))
    }

    fn creating(&self) -> Option<&dyn Create> {
        self.maker().map(|_| self as &dyn Create)
    }
}

impl Create for Bytes {
    fn options(&self) -> &'static [OptionSpec] {
        self.maker().map_or(&[], |maker| maker.options())
    }

    fn file_order(&self, _options: &CreateOptions) -> FileOrder {
        FileOrder::Laid
    }

    fn preallocates(&self) -> bool {
        // Though it is among the options: they are the protocol's.
        false
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        make_disk(request)
    }
}

/// Makes the main file of a request as long as the disk, in whole sectors, with the preallocation that is asked for.
pub fn make_disk(request: &CreateRequest<'_>) -> Result<()> {
    let size = request.size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
    let fill = request.options.text("preallocation").and_then(Preallocation::parse).unwrap_or_default();
    let file = request.files.main()?;
    file.set_len(size, fill)?;
    if !file.facts().fixed_len {
        return allocate_start(&*file, size, fill);
    }
    // What would still be recognised as something else goes away.
    let room = file.len().context("Could not get size")?;
    let zeros = vec![0; usize::try_from(SECTOR.min(room)).unwrap_or(0)];
    file.write_at(0, &zeros).context("Could not write")
}

/// Allocates the first block of a file that was empty, in whole sectors: the reference does it for the sake of
/// probing alignment.
pub fn allocate_start(file: &dyn Storage, len: u64, fill: Preallocation) -> Result<()> {
    let head = match len {
        _ if fill != Preallocation::Off => return Ok(()),
        0 => return Ok(()),
        1..4096 => SECTOR,
        _ => 4096,
    };
    let zeros = vec![0; usize::try_from(head).unwrap_or(0)];
    file.write_at(0, &zeros).context("Could not write")
}
