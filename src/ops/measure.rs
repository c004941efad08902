//! `measure`: how much room an image takes, before it is made.

use crate::block::driver::BitmapInfo;
use crate::block::measure::{MeasureRequest, Measured};
use crate::block::{CreateOptions, Error, Format, GuestOffset, MapCursor, Node, Result, Secrets};

/// What is to be made.
pub struct MeasuredTarget<'a> {
    /// Its format.
    pub format: &'static dyn Format,
    /// All `-o` options.
    pub options: &'a CreateOptions,
    /// Where keys are that the options name.
    pub secrets: &'a Secrets,
}

impl MeasuredTarget<'_> {
    /// For a disk of that size, of which nothing is stored yet.
    pub fn of_size(&self, size: u64) -> Result<Measured> {
        self.measure(size, &|_| Ok(0), None)
    }

    /// For what an image holds, through its whole chain.
    pub fn of_image(&self, source: &Node) -> Result<Measured> {
        let listed = || source.driver().bitmaps().map_or_else(Vec::new, |bitmaps| bitmaps.list());
        let bitmaps = source.driver().knows_bitmaps().then(listed);
        let size = source.virtual_size();
        // What of it lies above the new image's backing file is not looked for.
        let backed = self.options.name("backing_file").is_some();
        let stored = |unit: u64| if backed { Ok(size.div_ceil(unit)) } else { stored_units(source, unit) };
        self.measure(size, &stored, bitmaps.as_deref())
    }

    fn measure(
        &self,
        size: u64,
        stored: &dyn Fn(u64) -> Result<u64>,
        bitmaps: Option<&[BitmapInfo]>,
    ) -> Result<Measured> {
        let measuring = self.format.creating().and_then(|create| create.measuring()).ok_or_else(|| {
            Error::unsupported(format!("Block driver '{}' does not support size measurement", self.format.name()))
        })?;
        let Self { options, secrets, .. } = *self;
        let measured = measuring.measure(&MeasureRequest { size, options, stored, bitmaps, secrets });
        measured.map_err(|error| options.advising(error))
    }
}

/// In how many units of that many bytes a chain stores something.
fn stored_units(node: &Node, unit: u64) -> Result<u64> {
    let (mut cursor, size) = (MapCursor::new(node), node.virtual_size());
    let (mut at, mut counted, mut units) = (0u64, 0u64, 0u64);
    while at < size {
        let run = cursor.map(GuestOffset(at), size - at)?;
        let end = at.saturating_add(run.len);
        if !run.is_zero() {
            let (first, last) = ((at / unit.max(1)).max(counted), end.div_ceil(unit.max(1)));
            units += last.saturating_sub(first);
            counted = counted.max(last);
        }
        at = end;
    }
    Ok(units)
}
