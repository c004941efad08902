//! What a layer can do about those below it: name another backing file, give up what it stores over the one that it has.

use super::{BackingRef, BlockDriver, Error, Result};

/// The refusal of another backing file by a layer whose format is tied to the one that it was made on.
pub fn keeps_its_parent(layer: &dyn BlockDriver) -> Error {
    let format = layer.format();
    Error::unsupported(format!("Operation not supported: a {format} image keeps the parent that it was made on"))
        .hint("Convert it to qcow2, and rebase that.")
}

/// Able to name another backing file.
pub trait BackingChange {
    /// Refuses a name that the header cannot hold, and a layer that cannot lie below. Changes nothing.
    fn check(&self, new: Option<&BackingRef>, below: Option<&dyn BlockDriver>) -> Result<()>;

    /// From here on what is written changes nothing of what the disk shows: zeros are kept as such even where nothing
    /// lies below yet that would show, and the [`content_id`](BlockDriver::content_id) stays.
    fn begin(&self);

    /// Names it in the header, or none, in one write; all that was written before is on stable storage then. `below`
    /// is that layer, for a format that writes down what it is.
    fn change(&self, new: Option<&BackingRef>, below: Option<&dyn BlockDriver>) -> Result<()>;

    /// The layer below has another [`content_id`](BlockDriver::content_id), and is still the right one.
    fn follow(&self, below: &dyn BlockDriver) -> Result<()> {
        let _ = below;
        Ok(())
    }
}

/// Able to give up all that it stores over its backing file, which holds the same.
pub trait Emptying {
    /// Does it. Wherever it stops, what is still stored and what is shown from below are the same.
    fn make_empty(&self) -> Result<()>;
}
