//! How large a qcow image becomes: header and L1 table, then L2 tables and clusters as they are written.

use super::Qcow;
use super::create::NewQcow;
use crate::block::Result;
use crate::block::measure::{Measure, MeasureRequest, Measured};

impl Measure for Qcow {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let NewQcow { header, size, end, .. } = NewQcow::decide(request.options, request.size)?;
        let (cluster, table) = (1u64 << header.cluster_bits(), 8u64 << header.l2_bits());
        let covers = cluster << header.l2_bits();
        let start = end.next_multiple_of(cluster);
        let bytes = |clusters: u64, tables: u64| match clusters {
            // Nothing is placed behind the L1 table.
            0 => end,
            _ => start + clusters * cluster + tables * table,
        };
        let fully_allocated = bytes(size.div_ceil(cluster), size.div_ceil(covers));
        let required = bytes((request.stored)(cluster)?, (request.stored)(covers)?);
        Ok(Measured { required, fully_allocated, bitmaps: None })
    }
}
