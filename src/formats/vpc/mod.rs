//! vpc: Microsoft's virtual hard disk (VHD), dynamic, fixed and differencing.
//!
//! Invariants: a bit of a block's bitmap that is not set means that the sector reads as zeros (as the parent, in a
//! differencing disk), whatever stands there; a sector's bit is set only after its data is written. The table names a block only after its bitmap
//! and a footer behind it are written. The footer's copy at the start of a dynamic disk is always whole, so a
//! stop while blocks are added over the last footer loses nothing.
//!
//! One lock, `dynamic::Dynamic`'s; it is held for tables, headers and bitmaps, never while guest data moves.

mod check;
mod create;
mod dynamic;
mod fixed;
mod geometry;
mod layout;
mod measure;
mod parent;
mod resize;
mod table;

use serde_json::Value;

use self::geometry::SizeRule;
use self::layout::{
    CHECKSUM_AT, DIFFERENCING, DynamicHeader, FIXED, FOOTER, FOOTER_BYTES, Footer, HEADER, HEADER_BYTES, MAX_OFFSET,
    MAX_SIZE, SECTOR,
};
use self::parent::VpcParent;
use crate::block::error::Context;
use crate::block::{BlockDriver, Child, Create, Error, Format, OpenRequest, OptionTree, Result, Trailer};

/// The format.
#[derive(Debug)]
pub struct Vpc;

impl Format for Vpc {
    fn name(&self) -> &'static str {
        "vpc"
    }

    fn also_called(&self) -> &'static [&'static str] {
        &["vhd", "avhd"]
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        if head.starts_with(b"conectix") { 100 } else { 0 }
    }

    /// A fixed disk has nothing but its footer, behind the data.
    fn probe_end(&self, end: &Trailer<'_>) -> bool {
        let footer = end.bytes.last_chunk::<FOOTER_BYTES>().copied().and_then(Footer::parse);
        footer.is_some_and(|footer| {
            let needed = footer.current_size().saturating_add(FOOTER_BYTES as u64);
            let whole = needed == end.len || (footer.is_unfinished() && needed < end.len);
            footer.is_sound() && footer.kind() == FIXED && whole
        })
    }

    fn strong_options(&self) -> &'static [&'static str] {
        &["force_size_calc"]
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let OpenRequest { file, options, purpose, .. } = request;
        let write = purpose.writes();
        let rule = size_rule(options)?;
        let length = file.storage.len().with_context(|| format!("Could not get size of '{}'", file.name))?;
        let (footer, fixed_end) = find_footer(&file, length)?;
        if !footer.is_sound() {
            let at = fixed_end.unwrap_or(0) + CHECKSUM_AT;
            return Err(Error::corrupt("Incorrect header checksum").in_file_at(at));
        }
        let rule = rule.unwrap_or_else(|| SizeRule::of(footer.creator()));
        let size = footer.size(rule);
        if size > MAX_SIZE {
            return Err(Error::unsupported(format!("Could not open '{}': File too large", file.name)));
        }
        if let Some(end) = fixed_end {
            let fixed = fixed::Fixed::new(file, footer, size, end, write);
            // With nothing before it, a footer is none of a disk's, though it says so.
            return if end < SECTOR && size > 0 { Err(fixed.too_short()) } else { Ok(Box::new(fixed)) };
        }
        let header = read_header(&file, &footer)?;
        let differencing = footer.kind() == DIFFERENCING;
        let parent = differencing.then(|| VpcParent::read(&file, &header)).transpose()?;
        Ok(Box::new(dynamic::Dynamic::open(file, footer, header, parent, size, purpose)?))
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }

    fn layered(&self) -> bool {
        true
    }
}

/// The user's word on what tells the size.
fn size_rule(options: &mut OptionTree) -> Result<Option<SizeRule>> {
    match options.remove("force_size_calc") {
        None => Ok(None),
        Some(Value::String(word)) if word == "current_size" => Ok(Some(SizeRule::CurrentSize)),
        Some(Value::String(word)) if word == "chs" => Ok(Some(SizeRule::ChsGeometry)),
        Some(Value::String(word)) => Err(Error::invalid(format!("Invalid size calculation mode: '{word}'"))),
        Some(other) => Err(Error::invalid(format!("Invalid size calculation mode: '{other}'"))),
    }
}

fn read_footer(file: &Child, at: u64) -> Result<Option<Footer>> {
    let mut raw = [0; FOOTER_BYTES];
    file.read_metadata(FOOTER, at, &mut raw)?;
    Ok(Footer::parse(raw))
}

/// The footer that counts, and for a fixed disk where its data ends.
///
/// A dynamic disk has a copy at the start ("Dynamic Hard Disk Image"); the one at the end is asked only where
/// that one is damaged.
fn find_footer(file: &Child, length: u64) -> Result<(Footer, Option<u64>)> {
    let invalid = || match length {
        0 => Error::corrupt("File too small for a VHD header"),
        _ => Error::corrupt("invalid VPC image").in_field(0),
    };
    let front = read_footer(file, 0)?;
    if let Some(front) = &front
        && front.is_sound()
        && !(front.kind() == FIXED && front.data_offset() == u64::MAX)
    {
        return Ok((front.clone(), None));
    }
    let mut found = None;
    if let Some(at) = length.checked_sub(FOOTER_BYTES as u64) {
        found = read_footer(file, at)?.map(|footer| (footer, at));
    }
    // Virtual PC before 2004 wrote one byte less.
    if let (None, Some(at)) = (&found, length.checked_sub(FOOTER_BYTES as u64 - 1)) {
        found = read_footer(file, at)?.map(|footer| (footer, at));
    }
    match (found, front) {
        (Some((footer, at)), None) if footer.kind() == FIXED => Ok((footer, Some(at))),
        (Some((footer, at)), _) if footer.kind() == FIXED && footer.is_sound() => Ok((footer, Some(at))),
        (Some((footer, _)), _) if footer.kind() != FIXED && footer.data_offset() != u64::MAX && footer.is_sound() => {
            Ok((footer, None))
        }
        (_, Some(front)) => Ok((front, None)),
        _ => Err(invalid()),
    }
}

fn read_header(file: &Child, footer: &Footer) -> Result<DynamicHeader> {
    let at = footer.data_offset();
    let mut raw = [0; HEADER_BYTES];
    if at > MAX_OFFSET - HEADER_BYTES as u64 {
        return Err(Error::corrupt("Error reading dynamic VHD header").in_file_at(at));
    }
    file.read_metadata(HEADER, at, &mut raw)?;
    DynamicHeader::parse(raw).ok_or_else(|| Error::corrupt("Invalid header magic").in_file_at(at))
}
