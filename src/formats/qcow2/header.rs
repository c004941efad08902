//! The header: from bytes to [`Qcow2Header`] and back.
//!
//! Invariant: what is not understood is kept and written back (extra header bytes, unknown extensions). Every length
//! is checked against the first cluster before it is used.

use std::ffi::{OsStr, OsString};
use std::mem::offset_of;
use std::os::unix::ffi::OsStrExt;

use crate::block::error::{Context, Operation, Place};
use crate::block::{BackingRef, Child, Error, Result};

use super::geometry::Geometry;
use super::layout::{self, BitmapsExtension, HEADER_FULL, HEADER_V2, HEADER_V3, HeaderFields, StoredHeader};

/// What errors call it.
pub const HEADER: &str = "the qcow2 header";

/// Bytes that are read of the first cluster before all of it is: nearly every header ends within them.
const HEAD_BYTES: usize = 4096;

/// Reads the start of an image. The text of the error is the reference's.
fn read_head(file: &Child, head: &mut [u8]) -> Result<()> {
    let place = || Place::of_table(Operation::Read, &file.name, HEADER, 0);
    let read = file.storage.read_at(0, head).context("Could not read qcow2 header");
    read.map_err(|error| error.placed(place()))
}

/// The header with its extensions and the backing file's name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Qcow2Header {
    /// The fixed fields. `backing_file_offset`, `backing_file_size` and `header_length` are set by
    /// [`Qcow2Header::to_bytes`].
    pub fields: HeaderFields,
    /// Header bytes past the fields that we know.
    pub extra: Vec<u8>,
    /// Name of the backing file: bytes, which need not be text.
    pub backing_file: Option<OsString>,
    /// Its format.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<OsString>,
    /// Offset and length of the LUKS header.
    pub crypto: Option<(u64, u64)>,
    /// Names of feature bits: type, bit, name. Written as [`layout::FEATURE_NAMES`] whatever was read.
    pub feature_names: Vec<(u8, u8, String)>,
    /// The bitmaps.
    pub bitmaps: Option<BitmapsExtension>,
    /// Extensions that we do not know: type and data.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

impl Qcow2Header {
    /// Reads and checks everything that lies in the first cluster. The texts of the refusals are the reference's.
    pub fn read(file: &Child) -> Result<Self> {
        Self::read_with(file, false)
    }

    /// The same for a check, which has its own words for a refcount table and a snapshot table that cannot be.
    pub fn read_damaged(file: &Child) -> Result<Self> {
        Self::read_with(file, true)
    }

    fn read_with(file: &Child, damaged: bool) -> Result<Self> {
        let length = file.storage.len().context("Could not read qcow2 header")?;
        let mut start = [0; HEADER_FULL];
        read_head(file, &mut start)?;
        if layout::word32(&start, 0) != Some(layout::MAGIC) {
            return Err(Error::invalid("Image is not in qcow2 format").in_field(offset_of!(StoredHeader, magic)));
        }
        let fields = HeaderFields::of_any_version(&start);
        if !(2..=3).contains(&fields.version) {
            let error = Error::unsupported(format!("Unsupported qcow2 version {}", fields.version));
            return Err(error.in_field(offset_of!(StoredHeader, version)));
        }
        // What a cut file lacks reads as zeros, as it does for the reference.
        if !(layout::MIN_CLUSTER_BITS..=layout::MAX_CLUSTER_BITS).contains(&fields.cluster_bits) {
            let error = Error::unsupported(format!("Unsupported cluster size: 2^{}", fields.cluster_bits));
            return Err(error.in_field(offset_of!(StoredHeader, cluster_bits)));
        }
        if length < HEADER_V2 as u64 {
            return Err(Error::corrupt("qcow2 header too short"));
        }
        let cluster = 1u64 << fields.cluster_bits;
        if fields.version >= 3 {
            if fields.header_length < HEADER_V3 as u32 || length < HEADER_V3 as u64 {
                return Err(Error::corrupt("qcow2 header too short").in_field(offset_of!(StoredHeader, header_length)));
            }
            if u64::from(fields.header_length) > cluster {
                return Err(Error::corrupt("qcow2 header exceeds cluster size")
                    .in_field(offset_of!(StoredHeader, header_length)));
            }
        }
        if fields.backing_file_offset > cluster {
            return Err(
                Error::corrupt("Invalid backing file offset").in_field(offset_of!(StoredHeader, backing_file_offset))
            );
        }
        let cluster = usize::try_from(cluster).map_err(|_| Error::corrupt("qcow2 header exceeds cluster size"))?;
        let mut head = vec![0; cluster.min(HEAD_BYTES)];
        read_head(file, &mut head)?;
        if head.len() < cluster && !holds_all(&fields, &head) {
            head.resize(cluster, 0);
            read_head(file, &mut head)?;
        }
        Self::parse(fields, &head, damaged)
    }

    /// The same, from the first cluster, or from as much of it as holds everything.
    fn parse(fields: HeaderFields, head: &[u8], damaged: bool) -> Result<Self> {
        let after = fields.header_length as usize;
        let extra = if fields.version >= 3 { head.get(HEADER_FULL..after).unwrap_or(&[]) } else { &[] };
        let mut header = Self { fields, extra: extra.to_vec(), ..Self::default() };
        let end = match fields.backing_file_offset {
            0 => head.len(),
            offset => usize::try_from(offset).unwrap_or(usize::MAX).min(head.len()),
        };
        let (extensions, whole) = extensions(head.get(after..end).unwrap_or(&[]));
        // Names first: a feature that we do not know may change what everything else means.
        for (kind, data) in &extensions {
            if *kind == layout::EXT_FEATURE_NAMES {
                header.feature_names = feature_names(data);
            }
        }
        header.check_features()?;
        header.check_fields(damaged)?;
        for (kind, data) in extensions {
            header.take_extension(kind, data)?;
        }
        whole?;
        if fields.crypt_method == layout::CRYPT_LUKS && header.crypto.is_none() {
            return Err(Error::corrupt("Missing CRYPTO header for crypt method 2")
                .in_field(offset_of!(StoredHeader, crypt_method)));
        }
        if fields.backing_file_offset != 0 {
            let room = head.get(end..).unwrap_or(&[]);
            let len = fields.backing_file_size;
            if len > layout::MAX_BACKING_NAME || len as usize > room.len() {
                return Err(
                    Error::corrupt("Backing file name too long").in_field(offset_of!(StoredHeader, backing_file_size))
                );
            }
            let name = c_name(room.get(..len as usize).unwrap_or(&[]));
            header.backing_file = (!name.is_empty()).then_some(name);
        }
        Ok(header)
    }

    fn check_features(&self) -> Result<()> {
        let mut unknown = self.fields.incompatible & !layout::INCOMPATIBLE;
        if unknown != 0 {
            let mut names = Vec::new();
            for (kind, bit, name) in &self.feature_names {
                let mask = 1u64.checked_shl(u32::from(*bit)).unwrap_or(0);
                if *kind == 0 && unknown & mask != 0 {
                    names.push(name.clone());
                    unknown &= !mask;
                }
            }
            if unknown != 0 {
                names.push(format!("Unknown incompatible feature: {unknown:x}"));
            }
            let error = Error::unsupported(format!("Unsupported qcow2 feature(s): {}", names.join(", ")));
            return Err(error.in_field(offset_of!(StoredHeader, incompatible)));
        }
        let (kind, marked) = (self.fields.compression_type, self.fields.incompatible & layout::COMPRESSION != 0);
        let complaint = match (kind, marked) {
            (layout::ZLIB, true) => "qcow2: Compression type incompatible feature bit must not be set".to_owned(),
            (layout::ZLIB, false) | (layout::ZSTD, true) => return Ok(()),
            (layout::ZSTD, false) => "qcow2: Compression type incompatible feature bit must be set".to_owned(),
            _ => format!("qcow2: unknown compression type: {kind}"),
        };
        Err(Error::unsupported(complaint).in_field(offset_of!(StoredHeader, compression_type)))
    }

    /// The fixed fields that place and size the tables.
    fn check_fields(&self, damaged: bool) -> Result<()> {
        let (fields, geometry) = (&self.fields, self.geometry());
        let corrupt = |text: &str, field: usize| Err(Error::corrupt(text).in_field(field));
        if geometry.extended && geometry.subcluster_size() < layout::SECTOR {
            let size = geometry.subcluster_size();
            let error = Error::unsupported(format!("Unsupported subcluster size: {size}"));
            return Err(error.in_field(offset_of!(StoredHeader, cluster_bits)));
        }
        if fields.refcount_order > layout::MAX_REFCOUNT_ORDER {
            let error = Error::unsupported("Reference count entry width too large; may not exceed 64 bits");
            return Err(error.in_field(offset_of!(StoredHeader, refcount_order)));
        }
        if fields.refcount_table_clusters == 0 && !damaged {
            return corrupt(
                "Image does not contain a reference count table",
                offset_of!(StoredHeader, refcount_table_clusters),
            );
        }
        let refcounts = u64::from(fields.refcount_table_clusters) << geometry.cluster_bits;
        if refcounts > layout::MAX_REFCOUNT_TABLE_BYTES {
            return corrupt("Reference count table too large", offset_of!(StoredHeader, refcount_table_clusters));
        }
        if !geometry.places(fields.refcount_table_offset, refcounts) {
            return corrupt("Reference count table offset invalid", offset_of!(StoredHeader, refcount_table_offset));
        }
        if fields.nb_snapshots > layout::MAX_SNAPSHOTS && !damaged {
            return corrupt("Snapshot table too large", offset_of!(StoredHeader, nb_snapshots));
        }
        let snapshots = u64::from(fields.nb_snapshots) * layout::SNAPSHOT_ENTRY as u64;
        if !geometry.places(fields.snapshots_offset, snapshots) && !damaged {
            return corrupt("Snapshot table offset invalid", offset_of!(StoredHeader, snapshots_offset));
        }
        let l1 = u64::from(fields.l1_size) * layout::ENTRY;
        if l1 > layout::MAX_L1_BYTES {
            return corrupt("Active L1 table too large", offset_of!(StoredHeader, l1_size));
        }
        if !geometry.places(fields.l1_table_offset, l1) {
            return corrupt("Active L1 table offset invalid", offset_of!(StoredHeader, l1_table_offset));
        }
        if i64::try_from(fields.size).is_err() {
            return corrupt("Could not refresh total sector count: File too large", offset_of!(StoredHeader, size));
        }
        let wanted = geometry.l1_entries_for(fields.size);
        if wanted > i32::MAX as u64 {
            return corrupt("Image is too big", offset_of!(StoredHeader, size));
        }
        if u64::from(fields.l1_size) < wanted {
            return corrupt("L1 table is too small", offset_of!(StoredHeader, l1_size));
        }
        if fields.crypt_method > layout::CRYPT_LUKS {
            let error = Error::unsupported(format!("Unsupported encryption method {}", fields.crypt_method));
            return Err(error.in_field(offset_of!(StoredHeader, crypt_method)));
        }
        Ok(())
    }

    fn take_extension(&mut self, kind: u32, data: &[u8]) -> Result<()> {
        match kind {
            layout::EXT_BACKING_FORMAT => {
                if data.len() >= 16 {
                    let text = format!("ERROR: ext_backing_format: len={} too large (>=16)", data.len());
                    return Err(Error::corrupt(text));
                }
                self.backing_format = Some(c_string(data)).filter(|format| !format.is_empty());
            }
            layout::EXT_FEATURE_NAMES => {}
            layout::EXT_DATA_FILE => self.data_file = Some(c_name(data)),
            layout::EXT_CRYPTO => self.crypto = Some(self.crypto_extension(data)?),
            layout::EXT_BITMAPS => self.bitmaps = Some(self.bitmaps_extension(data)?),
            _ => self.unknown.push((kind, data.to_vec())),
        }
        Ok(())
    }

    fn crypto_extension(&self, data: &[u8]) -> Result<(u64, u64)> {
        if self.fields.crypt_method != layout::CRYPT_LUKS {
            return Err(Error::corrupt("CRYPTO header extension only expected with LUKS encryption method"));
        }
        if data.len() != layout::CRYPTO_EXT {
            let (is, should) = (data.len(), layout::CRYPTO_EXT);
            return Err(Error::corrupt(format!("CRYPTO header extension size {is}, but expected size {should}")));
        }
        let (offset, length) = (layout::word(data, 0).unwrap_or(0), layout::word(data, 8).unwrap_or(0));
        let cluster = self.geometry().cluster_size();
        if !offset.is_multiple_of(cluster) {
            return Err(Error::corrupt(format!(
                "Encryption header offset '{offset}' is not a multiple of cluster size '{cluster}'"
            )));
        }
        Ok((offset, length))
    }

    fn bitmaps_extension(&self, data: &[u8]) -> Result<BitmapsExtension> {
        let bitmaps: &[u8; layout::BITMAPS_EXT] =
            data.try_into().map_err(|_| Error::corrupt("bitmaps_ext: Invalid extension length"))?;
        let bitmaps = BitmapsExtension::read(bitmaps);
        // Without the autoclear bit nothing in it means anything.
        if self.fields.autoclear & layout::BITMAPS == 0 {
            return Ok(bitmaps);
        }
        let complaint = if bitmaps.reserved != 0 {
            "bitmaps_ext: Reserved field is not zero".to_owned()
        } else if bitmaps.count > layout::MAX_BITMAPS {
            format!(
                "bitmaps_ext: Image has {} bitmaps, exceeding the QEMU supported maximum of {}",
                bitmaps.count,
                layout::MAX_BITMAPS
            )
        } else if bitmaps.count == 0 {
            "found bitmaps extension with zero bitmaps".to_owned()
        } else if !bitmaps.directory_offset.is_multiple_of(self.geometry().cluster_size()) {
            "bitmaps_ext: invalid bitmap directory offset".to_owned()
        } else if bitmaps.directory_size > layout::MAX_BITMAP_DIRECTORY_BYTES {
            format!(
                "bitmaps_ext: bitmap directory size ({}) exceeds the maximum supported size ({})",
                bitmaps.directory_size,
                layout::MAX_BITMAP_DIRECTORY_BYTES
            )
        } else {
            return Ok(bitmaps);
        };
        Err(Error::corrupt(complaint))
    }

    /// Whether there are bitmaps that a program without them may have made wrong: they are as good as gone.
    pub fn has_stale_bitmaps(&self) -> bool {
        self.bitmaps.is_some() && self.fields.autoclear & layout::BITMAPS == 0
    }

    /// Forgets stale bitmaps, and the autoclear bits that we do not know, as whoever writes to the image has to.
    pub fn clear_stale(&mut self) {
        self.bitmaps = self.bitmaps.take().filter(|_| self.fields.autoclear & layout::BITMAPS != 0);
        self.fields.autoclear &= layout::AUTOCLEAR;
    }

    /// Whether there is something that [`Self::clear_stale`] takes away.
    pub fn is_stale(&self) -> bool {
        self.fields.autoclear & !layout::AUTOCLEAR != 0 || self.has_stale_bitmaps()
    }

    /// Names a backing file, or none.
    pub fn set_backing(&mut self, new: Option<&BackingRef>) {
        self.backing_file = new.map(|new| new.name.clone());
        self.backing_format = new.and_then(|new| new.format.clone());
    }

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
        let head = fields.stored().len() + if v3 { self.extra.len() } else { 0 };
        // The name, or the end of the cluster, ends the extensions as well as a mark, for which there may be no room.
        let name = self.backing_file.as_ref().map_or(0, |name| name.len());
        let (bare, cluster) = ((head + tail.len() + name) as u64, 1 << fields.cluster_bits);
        let ends_itself = name > 0 || bare == cluster;
        if !ends_itself || bare + layout::EXT_HEAD as u64 <= cluster {
            tail.extend_from_slice(&[0; layout::EXT_HEAD]);
        }
        (fields.backing_file_offset, fields.backing_file_size) = match &self.backing_file {
            Some(name) => ((head + tail.len()) as u64, name.len() as u32),
            None => (0, 0),
        };
        let mut bytes = fields.stored();
        if v3 {
            bytes.extend_from_slice(&self.extra);
        }
        bytes.extend_from_slice(&tail);
        bytes.extend_from_slice(self.backing_file.as_deref().unwrap_or_default().as_bytes());
        if bytes.len() as u64 > cluster {
            return Err(Error::invalid("The header does not fit in the first cluster"));
        }
        Ok(bytes)
    }
}

/// The extensions in order, without the end marker, and whether all of them lie in the area: no other ends it.
fn extensions(area: &[u8]) -> (Vec<(u32, &[u8])>, Result<()>) {
    let (mut found, mut rest) = (Vec::new(), area);
    while !rest.is_empty() {
        let next = rest.split_at_checked(layout::EXT_HEAD).and_then(|(head, after)| {
            let len = layout::word32(head, 4)? as usize;
            // The end marker's data means nothing, but lies in the area as any other's.
            Some((layout::word32(head, 0)?, after.get(..len)?, after.get(len.next_multiple_of(8)..).unwrap_or(&[])))
        });
        match next {
            None => return (found, Err(Error::corrupt("Header extension too large"))),
            Some((layout::EXT_END, ..)) => break,
            Some((kind, data, behind)) => {
                found.push((kind, data));
                rest = behind;
            }
        }
    }
    (found, Ok(()))
}

/// Whether the start of the first cluster holds the extensions with their end mark, and the backing file's name.
fn holds_all(fields: &HeaderFields, head: &[u8]) -> bool {
    let (after, name) = (fields.header_length as usize, fields.backing_file_offset);
    if after > head.len() {
        return false;
    }
    if name != 0 {
        return name.saturating_add(u64::from(fields.backing_file_size)) <= head.len() as u64;
    }
    let mut rest = head.get(after..).unwrap_or(&[]);
    while let Some((start, data)) = rest.split_at_checked(layout::EXT_HEAD) {
        let (kind, len) = (layout::word32(start, 0).unwrap_or(0), layout::word32(start, 4).unwrap_or(0) as usize);
        if kind == layout::EXT_END {
            return len <= data.len();
        }
        rest = data.get(len.next_multiple_of(8)..).unwrap_or(&[]);
    }
    false
}

fn feature_names(data: &[u8]) -> Vec<(u8, u8, String)> {
    // The last one may be cut short.
    let names = data.chunks(layout::FEATURE_NAME).map(|entry| match entry {
        // One without a name says nothing.
        [kind, bit, name @ ..] => Some((*kind, *bit, c_string(name))).filter(|(_, _, name)| !name.is_empty()),
        _ => None,
    });
    names.flatten().collect()
}

/// The bytes up to the first NUL.
fn up_to_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or(bytes)
}

/// They are text.
pub(super) fn c_string(bytes: &[u8]) -> String {
    String::from_utf8_lossy(up_to_nul(bytes)).into_owned()
}

/// They are the name of a file.
fn c_name(bytes: &[u8]) -> OsString {
    OsStr::from_bytes(up_to_nul(bytes)).to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use crate::storage::memory::Memory;

    use super::*;

    /// What lies about the end of the first bytes that are read, and beyond them, is found as what lies before it.
    #[test]
    fn a_long_header_is_read_whole() {
        for len in [0usize, 3000, 3500, 3560, 3568, 3576, 3584, 3592, 3600, 3700, 4000, 4096, 9000] {
            for name in [None, Some("base.qcow2".into())] {
                for cluster_bits in [12, 13, 16] {
                    let fields = HeaderFields {
                        version: 3,
                        cluster_bits,
                        refcount_order: 4,
                        refcount_table_offset: 1 << cluster_bits,
                        refcount_table_clusters: 1,
                        ..HeaderFields::default()
                    };
                    let unknown = [(0x1234_5678, vec![7; len]), (0x1234_5679, vec![8; 5])];
                    let header = Qcow2Header {
                        fields,
                        backing_file: name.clone(),
                        unknown: unknown.to_vec(),
                        ..Qcow2Header::default()
                    };
                    let Ok(mut bytes) = header.to_bytes() else { continue };
                    bytes.resize(3 << cluster_bits, 0);
                    let storage = Arc::new(Memory::new(bytes));
                    let file = Child { role: "file".to_owned(), name: "a.qcow2".to_owned(), driver: "file", storage };
                    let read = Qcow2Header::read(&file).unwrap();
                    assert_eq!((&read.backing_file, &read.unknown[..]), (&name, &unknown[..]), "{len} {cluster_bits}");
                }
            }
        }
    }
}
