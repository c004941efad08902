//! Where the block tables of an image are: in its property list, or in its resource fork.
//!
//! Sources: the property list's document type of Apple (`PropertyList-1.0.dtd`), and *Inside Macintosh: More Macintosh
//! Toolbox*, "Resource File Format".

use super::layout::Koly;
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::codec::base64;
use crate::storage::Storage;

/// The longest list or fork that is read: the tables of a few TiB.
const MOST: u64 = 64 << 20;
/// The most elements of a list.
const ELEMENTS: u32 = 1 << 20;
/// The type of the resources that hold block tables.
const BLOCKS: &[u8; 4] = b"blkx";

/// The bytes of every block table, in order.
pub fn read(file: &dyn Storage, koly: &Koly) -> Result<Vec<Vec<u8>>> {
    let (list, fork) =
        ((koly.list_offset.get(), koly.list_len.get()), (koly.resource_offset.get(), koly.resource_len.get()));
    if list.1 > 0 {
        let text = part(file, "the property list", list)?;
        of_list(&text)
            .ok_or_else(|| Error::corrupt(format!("the property list at offset {} has no block tables", list.0)))
    } else if fork.1 > 0 {
        let bytes = part(file, "the resource fork", fork)?;
        of_fork(&bytes)
            .ok_or_else(|| Error::corrupt(format!("the resource fork at offset {} has no block tables", fork.0)))
    } else {
        Err(Error::corrupt("the dmg trailer names neither a property list nor a resource fork"))
    }
}

fn part(file: &dyn Storage, what: &str, (at, len): (u64, u64)) -> Result<Vec<u8>> {
    let end = file.len().context("Could not get the size of the file")?;
    if at.checked_add(len).is_none_or(|last| last > end) {
        return Err(Error::truncated(what, at, end));
    }
    if len > MOST {
        return Err(Error::unsupported(format!("{what} has {len} bytes, more than the {MOST} that are read")));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_at(at, &mut bytes).with_context(|| format!("Could not read {what} at offset {at}"))?;
    Ok(bytes)
}

/// Of `resource-fork`, `blkx`: the `Data` of each.
fn of_list(text: &[u8]) -> Option<Vec<Vec<u8>>> {
    let text = str::from_utf8(text).ok()?.trim_end_matches('\0');
    let options = roxmltree::ParsingOptions { allow_dtd: true, nodes_limit: ELEMENTS, ..Default::default() };
    let list = roxmltree::Document::parse_with_options(text, options).ok()?;
    let top = list.root_element().first_element_child()?;
    let tables = value(value(top, "resource-fork")?, "blkx")?;
    let mut all = Vec::new();
    for table in tables.children().filter(|node| node.is_element()) {
        let letters: Vec<u8> =
            value(table, "Data")?.text()?.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        all.push(base64::decode(&letters)?);
    }
    Some(all)
}

/// What follows that key of a `dict`.
fn value<'a, 'b>(dict: roxmltree::Node<'a, 'b>, key: &str) -> Option<roxmltree::Node<'a, 'b>> {
    let found = dict.children().find(|node| node.has_tag_name("key") && node.text() == Some(key))?;
    found.next_sibling_element()
}

/// The resources of type `blkx`, in the order of the map.
fn of_fork(fork: &[u8]) -> Option<Vec<Vec<u8>>> {
    let word = |at: usize| usize::try_from(u32::from_be_bytes(*fork.get(at..)?.first_chunk()?)).ok();
    let short = |at: usize| Some(usize::from(u16::from_be_bytes(*fork.get(at..)?.first_chunk()?)));
    let (data, map) = (word(0)?, word(4)?);
    let types = map.checked_add(short(map.checked_add(24)?)?)?;
    // Counts are stored less one.
    let count = short(types)?.wrapping_add(1) & 0xffff;
    let entry = (0..count)
        .map(|n| types + 2 + n * 8)
        .find(|at| fork.get(*at..).is_some_and(|rest| rest.starts_with(BLOCKS)))?;
    let references = types.checked_add(short(entry + 6)?)?;
    let resource = |n: usize| {
        // The offset has three bytes, behind one of attributes.
        let at = data.checked_add(word(references + n * 12 + 4)? & 0xff_ffff)?;
        let len = word(at)?;
        Some(fork.get(at.checked_add(4)?..)?.get(..len)?.to_vec())
    };
    (0..=short(entry + 4)?).map(resource).collect()
}
