//! New QED images.

use std::ffi::OsStr;

use super::Qed;
use super::layout::{
    CLUSTERS, MOST_NAME, MOST_TABLE_CLUSTERS, QedHeader, is_cluster_size, is_table_size, largest_disk,
};
use crate::block::error::Context;
use crate::block::measure::Measure;
use crate::block::{Create, CreateOptions, CreateRequest, Error, OptionKind, OptionSpec, Result};
use crate::storage::{Preallocation, Zeroing};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new("backing_file", OptionKind::Name, "File name of a base image"),
    OptionSpec::new("backing_fmt", OptionKind::Text, "Image format of the base image"),
    OptionSpec::new("cluster_size", OptionKind::Size, "Cluster size (in bytes)").or("65536"),
    OptionSpec::new("table_size", OptionKind::Size, "L1/L2 table size (in clusters)"),
];

/// Zeros of a new L1 table up to this length are written, past it they are a hole.
const WRITTEN: u64 = 16 << 20;

/// Clusters of a table where the options say nothing.
const TABLE_CLUSTERS: u64 = 4;

/// A new image, decided.
pub struct NewQed<'a> {
    /// Its header.
    pub header: QedHeader,
    backing: &'a OsStr,
}

impl<'a> NewQed<'a> {
    /// Every check that needs no file.
    pub fn decide(options: &'a CreateOptions, size: u64) -> Result<Self> {
        let cluster = options.number("cluster_size").unwrap_or(0);
        if !is_cluster_size(cluster) {
            let (least, most) = CLUSTERS;
            let text = format!("QED cluster size must be within range [{least}, {most}] and power of 2");
            return Err(Error::invalid(text));
        }
        let table = options.number("table_size").unwrap_or(TABLE_CLUSTERS);
        if !is_table_size(table) {
            let text = format!("QED table size must be within range [1, {MOST_TABLE_CLUSTERS}] and power of 2");
            return Err(Error::invalid(text));
        }
        let largest = largest_disk(cluster, table);
        let size = size.checked_next_multiple_of(512).filter(|size| *size <= largest).ok_or_else(|| {
            let rule = "QED image size must be a non-zero multiple of cluster size and less than";
            Error::invalid(format!("{rule} {largest} bytes"))
        })?;
        let backing = options.name("backing_file").unwrap_or_default();
        if backing.len() > MOST_NAME {
            return Err(Error::invalid("Backing file name too long"));
        }
        let length = u32::try_from(backing.len()).unwrap_or(u32::MAX);
        let named = (length > 0).then(|| (length, options.text("backing_fmt") == Some("raw")));
        Ok(Self { header: QedHeader::new(size, cluster, table, named), backing })
    }
}

impl Create for Qed {
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
        let NewQed { header, backing } = NewQed::decide(request.options, request.size)?;
        let (l1, end) = (header.l1_offset(), header.l1_offset() + header.table_bytes());
        let mut bytes = header.bytes().to_vec();
        bytes.extend(backing.as_encoded_bytes());
        let file = request.files.main()?;
        file.write_at(0, &bytes).context("Could not write the QED header")?;
        if end - l1 <= WRITTEN {
            let zeros = vec![0; usize::try_from(end - l1).unwrap_or(0)];
            return file.write_at(l1, &zeros).context("Could not write the QED L1 table");
        }
        if !file.facts().new_reads_zero {
            file.zero(l1, end - l1, Zeroing::Punch).context("Could not clear the device")?;
        }
        file.set_len(end, Preallocation::Off).context("Could not resize file")
    }
}
