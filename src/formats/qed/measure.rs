//! How large a QED image becomes: header and L1 table, then L2 tables and clusters as they are written.

use super::Qed;
use super::create::NewQed;
use crate::block::Result;
use crate::block::measure::{Measure, MeasureRequest, Measured};

impl Measure for Qed {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let header = NewQed::decide(request.options, request.size)?.header;
        let (cluster, table) = (header.cluster(), header.table_bytes());
        let covers = (table / 8).saturating_mul(cluster);
        let start = header.l1_offset() + table;
        let bytes = |clusters: u64, tables: u64| {
            start.saturating_add(clusters.saturating_mul(cluster)).saturating_add(tables.saturating_mul(table))
        };
        let fully_allocated = bytes(header.size().div_ceil(cluster), header.size().div_ceil(covers));
        let required = bytes((request.stored)(cluster)?, (request.stored)(covers)?);
        Ok(Measured { required, fully_allocated, bitmaps: None })
    }
}
