//! Opening: the identifier, the headers, the log, the region table, the metadata, each after what it depends on.

use std::sync::{Arc, Mutex};

use super::VhdxDriver;
use super::headers::Headers;
use super::layout::{ENTRY, SIGNATURE};
use super::log::Replay;
use super::parent::Parent;
use super::regions::{Metadata, RegionTable};
use super::replayed::Replayed;
use super::state::VhdxState;
use crate::block::error::Context;
use crate::block::{BlockDriver, Error, OpenRequest, Result};
use crate::formats::one_file::OneFile;

/// Opens an image.
pub fn open(request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
    let OpenRequest { mut file, purpose, .. } = request;
    let mut signature = [0; 8];
    file.storage.read_at(0, &mut signature).context("Could not read the VHDX header")?;
    if &signature != SIGNATURE {
        return Err(Error::corrupt("Image not in VHDX format").in_field(0));
    }
    let mut headers = Headers::read(&*file.storage)?;
    let mut replayed = None;
    if headers.has_log() {
        let replay = Replay::read(&*file.storage, &headers)?;
        if purpose.mends() {
            replay.apply(&*file.storage).context("Could not replay the log")?;
            headers.clear_log(&*file.storage)?;
        } else if !replay.is_empty() {
            let overlay = Arc::new(Replayed::new(file.storage.clone(), replay));
            file.storage = overlay.clone();
            replayed = Some(overlay);
        }
    }
    let storage = &*file.storage;
    let (bat, region) = RegionTable::find(storage)?.regions(&headers)?;
    let metadata = Metadata::read(storage, region)?;
    let shape = metadata.shape;
    if shape.entries() * ENTRY > bat.length {
        let (blocks, length) = (shape.blocks(), bat.length);
        let error = Error::corrupt(format!("a BAT of {length} bytes is too small for {blocks} blocks"));
        return Err(error.in_file_at(metadata.size.at));
    }
    let length = storage.len().context("Could not get the size of the file")?;
    if bat.offset.saturating_add(shape.entries() * ENTRY) > length {
        return Err(Error::truncated("the block allocation table", bat.offset, length));
    }
    let parent = metadata.locator.map(|item| Parent::parse(&item.bytes(storage)?)).transpose()?;
    let state = VhdxState::new(headers, metadata, bat, &file.name);
    Ok(Box::new(VhdxDriver {
        block: shape.block,
        sector: shape.sector,
        fixed: shape.fixed,
        parent,
        relinked: Mutex::default(),
        replayed,
        image: OneFile::new(file, shape.size, state, purpose.writes()),
    }))
}
