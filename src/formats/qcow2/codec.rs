//! Compressed clusters: raw deflate with a 4 KiB window, or zstd, by the header's compression type.

use crate::block::{Compress, CompressedUnit, Encoded, Error, GuestOffset, Result};
use crate::codec::{deflate, zstd};

use super::Qcow2Driver;
use super::layout::ZSTD;

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

    fn encode(&self, at: GuestOffset, plain: &[u8], out: &mut Vec<u8>) -> Result<Encoded> {
        // What is as long as a cluster is stored as one.
        let limit = plain.len().saturating_sub(1);
        let encoded = match self.compression {
            ZSTD => zstd::encode(zstd::LEVEL, plain, out, limit),
            _ => deflate::encode(deflate::How::QCOW, plain, out, limit),
        };
        match encoded {
            Ok(true) => Ok(Encoded::Smaller),
            Ok(false) => Ok(Encoded::Incompressible),
            Err(error) => Err(Error::unsupported(format!("could not compress the cluster at {at}: {error}"))),
        }
    }
}
