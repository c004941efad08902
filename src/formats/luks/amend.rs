//! Key slots of a LUKS volume that are filled and emptied.

use crate::block::driver::{Amend, AmendRequest};
use crate::block::error::Context;
use crate::block::{BlockDriver, Error, Result};
use crate::formats::luks_slots::{HeaderPlace, SlotChange};

use super::LuksDriver;

impl Amend for LuksDriver {
    fn begin(&self, request: &AmendRequest<'_>) -> Result<Option<Box<dyn BlockDriver>>> {
        let holder = self.files.last().ok_or_else(|| Error::invalid("no file"))?;
        let storage = &*holder.storage;
        let end = storage.len().with_context(|| format!("Could not get size of '{}'", holder.name))?;
        let len = if self.files.len() > 1 { end } else { self.header.payload() };
        let place = HeaderPlace { storage, at: 0, len };
        let change = SlotChange::decide(request, "", &self.files[0].name, &place)?;
        let key =
            self.key.as_ref().filter(|_| self.write).ok_or_else(|| Error::unsupported("Block node is read-only"))?;
        change.apply(&place, key.get())?;
        Ok(None)
    }

    fn finish(&self, _request: &AmendRequest<'_>) -> Result<()> {
        Ok(())
    }
}
