//! How large a LUKS volume becomes: its header with all key material, then the disk, encrypted byte by byte.

use super::create::file_end;
use super::{KEY_SECRET, Luks};
use crate::block::measure::{Measure, MeasureRequest, Measured};
use crate::block::{Error, KeyUse, Result};
use crate::crypto::luks::LuksError;
use crate::formats::luks_header::luks_plan;

impl Measure for Luks {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let plan = luks_plan(request.options, "")?;
        let id = request.options.text(KEY_SECRET);
        let id = id.ok_or_else(|| Error::invalid(format!("Parameter '{KEY_SECRET}' is required for cipher")))?;
        request.secrets.key(KEY_SECRET, Some(id), "", KeyUse::New)?;
        plan.spec.check().map_err(LuksError::from)?;
        let size = file_end(plan.header_bytes(), request.size)?;
        Ok(Measured { required: size, fully_allocated: size, bitmaps: None })
    }
}
