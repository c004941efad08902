//! How large a VDI image becomes: header and block map, then whole blocks.

use super::Vdi;
use super::create::new_blocks;
use super::layout::{BLOCK_SIZE, SECTOR_START, VdiHeader};
use crate::block::Result;
use crate::block::measure::{Measure, MeasureRequest, Measured};

impl Measure for Vdi {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let (size, blocks) = new_blocks(request.size)?;
        let fixed = request.options.switch("static");
        // On XFS and Btrfs it starts a few sectors later, behind a hole.
        let header = VdiHeader::new(size, fixed, blocks, SECTOR_START, [0; 16], [0; 16]);
        let start = u64::from(header.data_offset());
        let block = u64::from(BLOCK_SIZE);
        let fully_allocated = start + u64::from(blocks) * block;
        let required = match if fixed { blocks.into() } else { (request.stored)(block)? } {
            // The map ends before the place for data does.
            0 => u64::from(header.map_offset()) + (u64::from(blocks) * 4).next_multiple_of(512),
            stored => start + stored * block,
        };
        Ok(Measured { required, fully_allocated, bitmaps: None })
    }
}
