//! New Parallels images.

use super::Parallels;
use super::layout::{HEADER_BYTES, MOST_CLUSTER_SECTORS, MOST_ENTRIES, ParallelsHeader, SECTOR};
use crate::block::error::Context;
use crate::block::measure::Measure;
use crate::block::{Create, CreateOptions, CreateRequest, Error, OptionKind, OptionSpec, Result};
use crate::storage::{Preallocation, Zeroing};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new("cluster_size", OptionKind::Size, "Parallels image cluster size").or("1048576"),
];

/// Zeros of a new BAT up to this length are written, past it they are a hole.
const WRITTEN: u64 = 16 << 20;

/// The error for a disk that has too many clusters.
pub fn too_large() -> Error {
    Error::invalid("Image size is too large for this cluster size")
}

/// The header of a new image: every check that needs no file.
pub fn new_header(options: &CreateOptions, size: u64) -> Result<ParallelsHeader> {
    let cluster = options.number("cluster_size").unwrap_or(0).div_ceil(SECTOR);
    if cluster > MOST_CLUSTER_SECTORS {
        return Err(Error::invalid("Cluster size is too large"));
    }
    let size = size.div_ceil(SECTOR);
    if cluster == 0 || size.div_ceil(cluster) > MOST_ENTRIES {
        return Err(too_large());
    }
    Ok(ParallelsHeader::new(size, cluster))
}

impl Create for Parallels {
    fn grows(&self, options: &CreateOptions) -> bool {
        let _ = options;
        true
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn measuring(&self) -> Option<&dyn Measure> {
        Some(self)
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        let header = new_header(request.options, request.size)?;
        let end = header.data_offset() * SECTOR;
        let mut bytes = header.bytes().to_vec();
        let file = request.files.main()?;
        if end <= WRITTEN {
            bytes.resize(usize::try_from(end).unwrap_or(HEADER_BYTES).max(HEADER_BYTES), 0);
        }
        file.write_at(0, &bytes).context("Could not write the Parallels header")?;
        let written = bytes.len() as u64;
        if written < end {
            if !file.facts().new_reads_zero {
                file.zero(written, end - written, Zeroing::Punch).context("Could not clear the device")?;
            }
            file.set_len(end, Preallocation::Off).context("Could not resize file")?;
        }
        Ok(())
    }
}
