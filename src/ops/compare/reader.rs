//! Reads the runs of one side: a compressed unit is decoded as a whole and kept for the runs that follow in it.

use crate::block::io::Scratch;
use crate::block::{CompressedUnit, Error, ExtentKind, Mapping, Result};

/// Bytes that are read at once: what both sides read is still in the processor's cache when it is compared.
pub const PIECE: u64 = 256 << 10;

/// See the module.
#[derive(Debug, Default)]
pub struct SideReader {
    bytes: Vec<u8>,
    /// The unit that `bytes` is, and the layer that it is of.
    unit: Option<(usize, CompressedUnit)>,
    scratch: Scratch,
}

impl SideReader {
    /// The `n` (at most [`PIECE`]) bytes of a run that lie `skip` bytes behind its start.
    pub fn read(&mut self, run: &Mapping<'_>, skip: u64, n: usize) -> Result<&[u8]> {
        let ExtentKind::Compressed(unit) = run.kind else {
            self.unit = None;
            self.bytes.resize(n.max(self.bytes.len()), 0);
            let buf = self.bytes.get_mut(..n).ok_or_else(too_long)?;
            run.after(skip).read(buf, &mut self.scratch)?;
            return Ok(buf);
        };
        let wanted = (std::ptr::from_ref(&**run.node.layer()).addr(), unit);
        let len = usize::try_from(unit.len).map_err(|_| too_long())?;
        if self.unit != Some(wanted) {
            self.unit = None;
            self.bytes.resize(len.max(self.bytes.len()), 0);
            let whole = Mapping { start: unit.start, len: unit.len, ..*run };
            whole.read(self.bytes.get_mut(..len).ok_or_else(too_long)?, &mut self.scratch)?;
            self.unit = Some(wanted);
        }
        let from = (run.start + skip).get().checked_sub(unit.start.get()).and_then(|from| usize::try_from(from).ok());
        let part = from.and_then(|from| self.bytes.get(..len)?.get(from..from.checked_add(n)?));
        part.ok_or_else(too_long)
    }
}

fn too_long() -> Error {
    Error::corrupt("a run of the image is longer than what it lies in")
}
