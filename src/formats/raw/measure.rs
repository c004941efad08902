//! How large a raw file becomes: whole sectors of the disk.

use super::{Raw, SECTOR};
use crate::block::measure::{Measure, MeasureRequest, Measured};
use crate::block::{Error, Result};

impl Measure for Raw {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let size = request.size.checked_next_multiple_of(SECTOR);
        let size = size.ok_or_else(|| Error::invalid("The image size is too large"))?;
        Ok(Measured { required: size, fully_allocated: size, bitmaps: None })
    }
}
