//! New VDI images.

use super::Vdi;
use super::layout::{
    BLOCK_SIZE, MAP_OFFSET, MAX_SIZE, SECTOR_START, SHARED_START, UNALLOCATED, VdiHeader, on_disk, too_large,
};
use crate::block::error::Context;
use crate::block::measure::Measure;
use crate::block::{Create, CreateOptions, CreateRequest, OptionKind, OptionSpec, Result};
use crate::storage::offload::can_share;
use crate::storage::{Preallocation, Zeroing};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new("static", OptionKind::Switch, "VDI static (pre-allocated) image").or("off"),
];

/// The size of a new disk in bytes, and its blocks.
pub fn new_blocks(size: u64) -> Result<(u64, u32)> {
    let size = size.checked_next_multiple_of(512).unwrap_or(u64::MAX);
    let blocks = u32::try_from(size.div_ceil(u64::from(BLOCK_SIZE)));
    Ok((size, blocks.ok().filter(|_| size <= MAX_SIZE).ok_or_else(|| too_large(size))?))
}

impl Create for Vdi {
    fn grows(&self, options: &CreateOptions) -> bool {
        !options.switch("static")
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn measuring(&self) -> Option<&dyn Measure> {
        Some(self)
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        let (size, blocks) = new_blocks(request.size)?;
        let fixed = request.options.switch("static");
        let fill = request.options.text("preallocation").and_then(Preallocation::parse).unwrap_or_default();
        let (image, snapshot) = (on_disk(request.ids.uuid("image")), on_disk(request.ids.uuid("snapshot")));
        let file = request.files.main()?;
        let sharing = !request.ids.are_fixed() && file.host().is_some_and(can_share);
        let start = if sharing { SHARED_START } else { SECTOR_START };
        let header = VdiHeader::new(size, fixed, blocks, start, image, snapshot);
        file.write_at(0, header.bytes()).context("Could not write the VDI header")?;
        write_map(&*file, blocks, fixed)?;
        if fixed {
            let start = u64::from(header.data_offset());
            let end = start + u64::from(blocks) * u64::from(BLOCK_SIZE);
            file.set_len(end, fill).context("Could not resize file")?;
            if !file.facts().new_reads_zero && end > start {
                file.zero(start, end - start, Zeroing::Punch).context("Could not clear the device")?;
            }
        }
        Ok(())
    }
}

fn write_map(file: &dyn crate::storage::Storage, blocks: u32, fixed: bool) -> Result<()> {
    const AT_ONCE: u32 = 1 << 16;
    let mut first = 0;
    while first < blocks {
        let last = blocks.min(first + AT_ONCE);
        let mut bytes: Vec<u8> =
            (first..last).flat_map(|n| if fixed { n } else { UNALLOCATED }.to_le_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let at = u64::from(MAP_OFFSET) + u64::from(first) * 4;
        file.write_at(at, &bytes).context("Could not write the VDI block map")?;
        first = last;
    }
    Ok(())
}
