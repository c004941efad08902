//! How large a VHDX image becomes: headers, log, BAT and metadata, then whole blocks.

use super::Vhdx;
use super::create::NewVhdx;
use crate::block::Result;
use crate::block::measure::{Measure, MeasureRequest, Measured};

impl Measure for Vhdx {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let new = NewVhdx::decide(request.options, request.size)?;
        let (block, end) = (new.shape.block, new.end());
        let required = if new.shape.fixed { end } else { new.start() + (request.stored)(block)? * block };
        Ok(Measured { required, fully_allocated: end, bitmaps: None })
    }
}
