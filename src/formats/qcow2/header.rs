//! The header: from bytes to [`Header`] and back.
//!
//! Invariant: what is not understood is kept and written back (extra header bytes, unknown extensions).

use crate::block::{Error, Result};

use super::layout::{self, BitmapsExtension, Geometry, HEADER_FULL, HeaderFields};

/// The header with its extensions and the backing file's name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Header {
    /// The fixed fields. `backing_file_offset`, `backing_file_size` and `header_length` are set by
    /// [`Header::to_bytes`].
    pub fields: HeaderFields,
    /// Header bytes past the fields that we know.
    pub extra: Vec<u8>,
    /// Name of the backing file.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Offset and length of the LUKS header.
    pub crypto: Option<(u64, u64)>,
    /// Names of feature bits: type, bit, name. Written as [`layout::FEATURE_NAMES`] whatever was read.
    pub feature_names: Vec<(u8, u8, String)>,
    /// The bitmaps.
    pub bitmaps: Option<BitmapsExtension>,
    /// Extensions that we do not know: type and data.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

impl Header {
    /// What never changes while the image is open.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            version: self.fields.version,
            cluster_bits: self.fields.cluster_bits,
            refcount_order: self.fields.refcount_order,
            extended: self.fields.incompatible & layout::EXTENDED_L2 != 0,
        }
    }

    /// The bytes at the start of the file: header, extensions in the reference's order, backing file name.
    /// Refused if they do not fit in the first cluster.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let v3 = self.fields.version >= 3;
        let mut fields = self.fields;
        fields.header_length = (HEADER_FULL + self.extra.len()) as u32;
        let mut tail = Vec::new();
        let mut put = |kind: u32, data: &[u8]| {
            tail.extend_from_slice(&kind.to_be_bytes());
            tail.extend_from_slice(&(data.len() as u32).to_be_bytes());
            tail.extend_from_slice(data);
            tail.resize(tail.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            put(layout::EXT_BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            put(layout::EXT_DATA_FILE, name.as_bytes());
        }
        if let Some((offset, length)) = self.crypto {
            put(layout::EXT_CRYPTO, &[offset.to_be_bytes(), length.to_be_bytes()].concat());
        }
        // The reference leaves the names out where they would fill a small first cluster.
        if v3 && fields.cluster_bits > 12 {
            let mut table = Vec::with_capacity(layout::FEATURE_NAMES.len() * layout::FEATURE_NAME);
            for (kind, bit, name) in layout::FEATURE_NAMES {
                let start = table.len();
                table.extend_from_slice(&[kind, bit]);
                table.extend_from_slice(name.as_bytes());
                table.resize(start + layout::FEATURE_NAME, 0);
            }
            put(layout::EXT_FEATURE_NAMES, &table);
        }
        if let Some(bitmaps) = &self.bitmaps {
            put(layout::EXT_BITMAPS, &bitmaps.to_bytes());
        }
        for (kind, data) in &self.unknown {
            put(*kind, data);
        }
        put(layout::EXT_END, &[]);
        let head = fields.to_bytes().len() + if v3 { self.extra.len() } else { 0 };
        (fields.backing_file_offset, fields.backing_file_size) = match &self.backing_file {
            Some(name) => ((head + tail.len()) as u64, name.len() as u32),
            None => (0, 0),
        };
        let mut bytes = fields.to_bytes();
        if v3 {
            bytes.extend_from_slice(&self.extra);
        }
        bytes.extend_from_slice(&tail);
        bytes.extend_from_slice(self.backing_file.as_deref().unwrap_or("").as_bytes());
        if bytes.len() as u64 > 1 << fields.cluster_bits {
            return Err(Error::invalid("The header does not fit in the first cluster"));
        }
        Ok(bytes)
    }
}
