//! How large a VHD image becomes: for a dynamic one both footers, header and table, then blocks with their bitmaps.

use super::Vpc;
use super::create::{NewVpc, dynamic_bytes};
use super::layout::{BLOCK_SIZE, FOOTER_BYTES, SECTOR};
use crate::block::Result;
use crate::block::measure::{Measure, MeasureRequest, Measured};

impl Measure for Vpc {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let NewVpc { fixed, shape } = NewVpc::decide(request.options, request.size)?;
        if fixed {
            let size = shape.size + FOOTER_BYTES as u64;
            return Ok(Measured { required: size, fully_allocated: size, bitmaps: None });
        }
        let block = u64::from(BLOCK_SIZE);
        let (blocks, start) = dynamic_bytes(shape.size)?;
        // A bit a sector, in whole sectors.
        let stored = block + (block / SECTOR / 8).next_multiple_of(SECTOR);
        let required = start + (request.stored)(block)? * stored;
        Ok(Measured { required, fully_allocated: start + u64::from(blocks) * stored, bitmaps: None })
    }
}
