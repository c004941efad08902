//! How large a LUKS volume becomes: its header with all key material, then the disk, encrypted byte by byte.

use super::create::{DETACHED, file_end};
use super::{KEY_SECRET, Luks};
use crate::block::measure::{Measure, MeasureRequest, Measured};
use crate::block::{Error, Result};
use crate::crypto::luks::LuksError;
use crate::formats::luks_header::luks_plan;

impl Measure for Luks {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let plan = luks_plan(request.options, "")?;
        if request.options.given(DETACHED).is_some() {
            return Err(Error::invalid(format!("Parameter '{DETACHED}' is unexpected")));
        }
        // Nothing is encrypted: a secret that is named must be there, and none is asked for.
        request.options.text(KEY_SECRET).map_or(Ok(()), |id| request.secrets.passphrase(id).map(drop))?;
        plan.spec.check().map_err(LuksError::from)?;
        let size = file_end(plan.header_bytes(), request.size)?;
        Ok(Measured { required: size, fully_allocated: size, bitmaps: None })
    }
}
