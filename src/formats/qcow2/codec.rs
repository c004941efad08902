//! Compressed clusters: raw deflate or zstd, by the header's compression type.
//!
//! Deflate is written with a 4 KiB window unless another is asked for: that is what strict readers set up. It is read
//! with any.

use crate::block::{Compress, CompressedUnit, CreateOptions, Effort, Encoded, Error, GuestOffset, Result};
use crate::codec::deflate::{self, How, Stream};
use crate::codec::{sample, zstd};

use super::Qcow2Driver;
use super::layout::ZSTD;
use crate::formats::effort;

/// See [`Create::effort`](crate::block::Create::effort).
pub fn effort(options: &CreateOptions, compress: bool) -> Result<Effort> {
    if !compress {
        effort::refuse(options, "without compression (-c)")?;
    }
    let zstd = options.text("compression_type") == Some("zstd");
    if zstd && options.given(effort::WINDOW.name).is_some() {
        return Err(Error::invalid(format!("'{}' has no effect on zstd", effort::WINDOW.name)));
    }
    let wide = effort::wide(options)?;
    let levels = match (zstd, wide) {
        (true, _) => zstd::LEVELS,
        (_, true) => Stream::Full.levels(),
        (_, false) => Stream::Narrow.levels(),
    };
    Ok(Effort { level: effort::level(options, levels)?, wide })
}

impl Qcow2Driver {
    /// See [`BlockDriver::decode`](crate::block::BlockDriver::decode).
    pub(super) fn decode_unit(&self, _unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        let decoded = match self.compression {
            ZSTD => zstd::decode(input, out),
            _ => deflate::decode(deflate::Wrap::Raw, input, out),
        };
        // The reference has no more to say than this, and scripts look for it.
        decoded.map_err(|_| Error::corrupt("Input/output error"))
    }
}

impl Compress for Qcow2Driver {
    fn begin(&self) {
        self.lock_alloc().will_compress();
    }

    fn encode(&self, at: GuestOffset, plain: &[u8], effort: Effort, out: &mut Vec<u8>) -> Result<Encoded> {
        // What is as long as a cluster is stored as one.
        let limit = plain.len().saturating_sub(1);
        let encoded = match self.compression {
            ZSTD => zstd::encode(effort.level.map_or(zstd::LEVEL, i32::from), plain, out, limit),
            // zstd finds out by itself, and as fast.
            _ if sample::hopeless(plain, out) => Ok(false),
            _ => {
                let how = if effort.wide { How::QCOW_FULL } else { How::QCOW };
                deflate::encode(How { level: effort.level.unwrap_or(how.level), ..how }, plain, out, limit)
            }
        };
        match encoded {
            Ok(true) => Ok(Encoded::Smaller),
            Ok(false) => Ok(Encoded::Incompressible),
            Err(error) => Err(Error::unsupported(format!("could not compress the cluster at {at}: {error}"))),
        }
    }
}
