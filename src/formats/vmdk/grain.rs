//! One compressed grain in the file: a marker with its length, and a zlib stream.
//!
//! Source: *Virtual Disk Format 5.0*, "Stream-Optimized Compressed Sparse Extents".

use zerocopy::IntoBytes;

use crate::block::error::Context;
use crate::block::{Error, Result, metadata};
use crate::codec;
use crate::codec::deflate::{self, How, Wrap};

use super::layout::*;
use super::tables::{ExtentFile, Grain, VmdkState};

/// The most bytes that a grain's data may take: the worst that deflate does to it, with room for a sloppy encoder.
pub fn longest(grain: u64) -> u64 {
    grain + grain / 512 + 1024
}

/// Decodes a zlib stream; what it leaves of a last, short grain is zero. Gives the bytes that it had; one that has more
/// than a grain is refused.
pub fn decode(input: &[u8], out: &mut [u8]) -> Result<usize> {
    let (done, longer) = deflate::decode_and_look_on(Wrap::Zlib, input, out).map_err(|error| match error {
        codec::Error::Short => Error::corrupt("Compressed grain is cut off"),
        error => Error::corrupt(format!("Compressed grain is damaged: {error}")),
    })?;
    if longer {
        return Err(Error::corrupt(format!("Compressed grain has more than {} bytes", out.len())));
    }
    if let Some(rest) = out.get_mut(done..) {
        rest.fill(0);
    }
    Ok(done)
}

/// Encodes a grain that starts at sector `at` of its extent: marker, data, and zeros up to a whole sector.
pub fn encode(at: Sectors, plain: &[u8], how: How, out: &mut Vec<u8>) -> Result<()> {
    // Room for what does not get smaller: deflate adds 5 bytes a block and a frame.
    let room = plain.len() + plain.len() / 512 + 128;
    match deflate::encode(how, plain, out, room) {
        Ok(true) => {}
        Ok(false) => return Err(Error::unsupported("could not compress: the output buffer is too small")),
        Err(e) => return Err(Error::unsupported(format!("could not compress: {e}"))),
    }
    let bytes = u32::try_from(out.len()).map_err(|_| Error::unsupported("could not compress: a grain is too long"))?;
    let marker = GrainMarker { sector: at.into(), bytes: bytes.into() };
    out.splice(0..0, marker.as_bytes().iter().copied());
    out.resize(out.len().next_multiple_of(512), 0);
    Ok(())
}

/// Reads the grain at a sector of the file, and how many bytes of it are stored: fewer than a whole grain where an
/// encoder stored what the disk has of its last one alone.
pub fn read_whole(file: &ExtentFile, sector: Sectors) -> Result<(Vec<u8>, u64)> {
    let failed = || format!("{}: could not read a grain", file.name);
    let marker: GrainMarker = read(&*file.storage, &file.name, "a grain marker", sector.bytes())?;
    let size = u64::from(marker.bytes.get());
    if size > longest(file.shape.grain) {
        let text = format!("{}: a grain has a compressed size of {size} bytes", file.name);
        return Err(Error::corrupt(text).in_file_at(sector.bytes()));
    }
    let (mut input, mut plain) = (buffer(size)?, buffer(file.shape.grain)?);
    let at = sector.bytes() + size_of::<GrainMarker>() as u64;
    metadata::read(&*file.storage, &file.name, "a compressed grain", at, &mut input)?;
    let done = decode(&input, &mut plain).with_context(failed)?;
    Ok((plain, done as u64))
}

/// The grain that the end of an extent of `len` bytes cuts, where it is not stored as a longer disk needs it: whole,
/// with zeros behind the end.
pub fn short_last(file: &ExtentFile, state: &mut VmdkState, len: u64) -> Result<Option<Vec<u8>>> {
    let (grain, skip) = (file.shape.grain, len % file.shape.grain);
    let Grain::At(sector) = (if skip == 0 { Grain::Unallocated } else { state.grain(file, len / grain)? }) else {
        return Ok(None);
    };
    let (mut plain, done) = read_whole(file, sector)?;
    let rest = usize::try_from(skip).ok().and_then(|skip| plain.get_mut(skip..)).unwrap_or_default();
    if done == grain && rest.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    rest.fill(0);
    Ok(Some(plain))
}

fn buffer(len: u64) -> Result<Vec<u8>> {
    Ok(vec![0; usize::try_from(len).map_err(|_| Error::corrupt("grain too long"))?])
}
