//! The format extension: dirty bitmaps of other programs. It is looked at as far as the reference shows it: an image in
//! which it is damaged is not read. Who writes to the image drops it, because nothing keeps it up to date.

use super::layout::{EXTENSION_MAGIC, ExtensionHeader, ParallelsHeader, SECTOR};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::crypto::hash::HashAlgorithm;
use crate::storage::Storage;

/// The largest cluster in which one is looked at.
const MOST_BYTES: u64 = 64 << 20;

/// Refuses one that is damaged.
pub fn check(storage: &dyn Storage, header: &ParallelsHeader) -> Result<()> {
    let Some(sector) = header.extension() else { return Ok(()) };
    let cluster = header.cluster();
    if cluster > MOST_BYTES {
        return Err(Error::unsupported(format!("A Format Extension of {cluster} bytes is too long")));
    }
    let at = sector.checked_mul(SECTOR).filter(|at| i64::try_from(*at).is_ok());
    let at = at.ok_or_else(|| Error::corrupt(format!("No Format Extension can be in sector {sector}")))?;
    let mut head = [0; size_of::<ExtensionHeader>()];
    let reading = "Failed to read Format Extension header";
    storage.read_at(at, &mut head).context(reading)?;
    let start: ExtensionHeader = zerocopy::transmute!(head);
    let magic = start.magic.get();
    if magic != EXTENSION_MAGIC {
        return Err(Error::corrupt(format!(
            "Wrong parallels Format Extension magic: {magic:#x}, expected: {EXTENSION_MAGIC:#x}"
        )));
    }
    let mut rest = vec![0; usize::try_from(cluster).unwrap_or(0).saturating_sub(head.len())];
    storage.read_at(at + head.len() as u64, &mut rest).context(reading)?;
    if HashAlgorithm::Md5.digest(&[&rest])[..] != start.checksum {
        return Err(Error::corrupt("Wrong checksum in Format Extension header. Format extension is corrupted."));
    }
    Ok(())
}
