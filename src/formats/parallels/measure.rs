//! How large a Parallels image becomes: header and BAT, then whole clusters.

use super::Parallels;
use super::create::new_header;
use super::layout::SECTOR;
use crate::block::Result;
use crate::block::measure::{Measure, MeasureRequest, Measured};

impl Measure for Parallels {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let header = new_header(request.options, request.size)?;
        let (start, cluster) = (header.data_offset() * SECTOR, header.cluster());
        let bytes = |clusters: u64| start.saturating_add(clusters.saturating_mul(cluster));
        let required = bytes((request.stored)(cluster)?);
        Ok(Measured { required, fully_allocated: bytes(header.entries()), bitmaps: None })
    }
}
