//! How large a qcow2 image becomes: the reference's numbers.
//!
//! Every cluster of the disk has its tables, refcounts and L1 and L2 entries, whether or not it is data yet; the
//! clusters that are not are what `required` lacks.

use super::Qcow2;
use super::create::{self, Encryption};
use super::geometry::Geometry;
use super::layout::{self, BITMAP_ENTRY, ENTRY, MAX_L1_BYTES};
use crate::block::driver::BitmapInfo;
use crate::block::measure::{Measure, MeasureRequest, Measured};
use crate::block::{CreateOptions, Error, Result};
use crate::formats::encryption::KEY_SECRET;
use crate::storage::Preallocation;

fn too_large() -> Error {
    Error::invalid("The image size is too large (try using a larger cluster size)")
}

/// What the options say of an image that is only measured: the reference does not check all that it checks when it
/// makes one.
fn geometry(options: &CreateOptions) -> Result<Geometry> {
    let version = match options.text("compat").unwrap_or("1.1") {
        "0.10" => 2,
        "1.1" => 3,
        other => return Err(Error::invalid(format!("Invalid compatibility level: '{other}'"))),
    };
    let cluster = options.number("cluster_size").unwrap_or(0);
    let cluster_bits = cluster.trailing_zeros();
    if !cluster.is_power_of_two() || !(layout::MIN_CLUSTER_BITS..=layout::MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return Err(Error::invalid("Cluster size must be a power of two between 512 and 2048k"));
    }
    let extended = options.switch("extended_l2");
    if extended && cluster < 16384 {
        return Err(Error::invalid(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ));
    }
    let bits = options.number("refcount_bits").unwrap_or(0);
    if !bits.is_power_of_two() || bits > 1 << layout::MAX_REFCOUNT_ORDER {
        return Err(Error::invalid("Refcount width must be a power of two and may not exceed 64 bits"));
    }
    if version < 3 && bits != 16 {
        return Err(Error::invalid(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
        ));
    }
    Ok(Geometry { version, cluster_bits, refcount_order: bits.trailing_zeros(), extended })
}

/// Clusters that refcounts for themselves and `used` other clusters take.
fn refcount_clusters(geometry: &Geometry, used: u64) -> u64 {
    let (mut blocks, mut table) = (0u64, 0u64);
    loop {
        let need = (used + blocks + table).div_ceil(geometry.refcounts_per_block());
        let entries = (need * ENTRY).div_ceil(geometry.cluster_size());
        if (need, entries) == (blocks, table) {
            return blocks + table;
        }
        (blocks, table) = (need, entries);
    }
}

/// Bytes of the header of an encryption. What encrypts data alone has none, and its key is not asked for.
fn encryption_bytes(request: &MeasureRequest<'_>) -> Result<u64> {
    let Some(Encryption::Luks(plan)) = create::encryption(request.options)? else { return Ok(0) };
    // Nothing is encrypted: a secret that is named must be there, and none is asked for.
    request.options.text(KEY_SECRET).map_or(Ok(()), |id| request.secrets.passphrase(id).map(drop))?;
    Ok(plan.header_bytes())
}

impl Measure for Qcow2 {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let options = request.options;
        let fill = options.text("preallocation").unwrap_or("off");
        let parsed = Preallocation::parse(fill);
        let fill = parsed.ok_or_else(|| Error::invalid(format!("invalid parameter value: {fill}")))?;
        let geometry = geometry(options)?;
        let cluster = geometry.cluster_size();
        let encryption = encryption_bytes(request)?.div_ceil(cluster);
        let size = request.size.checked_next_multiple_of(layout::SECTOR).ok_or_else(too_large)?;
        let l1 = geometry.l1_entries_for(size);
        if l1 > MAX_L1_BYTES / ENTRY {
            return Err(too_large());
        }
        let data = size.div_ceil(cluster);
        let used = 1 + data + l1 + (l1 * ENTRY).div_ceil(cluster);
        let all = used + refcount_clusters(&geometry, used) + encryption;
        let bytes = |clusters: u64| clusters.checked_mul(cluster).ok_or_else(too_large);
        let written = match fill {
            Preallocation::Falloc | Preallocation::Full => data,
            _ => (request.stored)(cluster)?.min(data),
        };
        let bitmaps = request.bitmaps.filter(|_| geometry.version >= 3);
        Ok(Measured {
            required: bytes(all - data + written)?,
            fully_allocated: bytes(all)?,
            bitmaps: bitmaps.map(|bitmaps| bitmap_bytes(cluster, size, bitmaps)),
        })
    }
}

/// What the directory, tables and bits of such bitmaps take.
fn bitmap_bytes(cluster: u64, size: u64, bitmaps: &[BitmapInfo]) -> u64 {
    if bitmaps.is_empty() {
        return 0;
    }
    let (mut directory, mut clusters) = (0, 0);
    for info in bitmaps {
        let bits = size.div_ceil(1 << info.granularity_bits.min(63));
        let data = bits.div_ceil(8).div_ceil(cluster);
        clusters += data + (data * ENTRY).div_ceil(cluster);
        directory += (BITMAP_ENTRY as u64 + info.name.len() as u64).next_multiple_of(8);
    }
    (clusters + directory.div_ceil(cluster)) * cluster
}
