//! The parent of a differencing disk: where it is, and which one it is ([MS-VHDX], section 2.6.2.6).

use zerocopy::FromBytes;

use super::layout::{Guid, LOCATOR_TYPE, LocatorEntry, LocatorHeader};
use crate::block::{BackingRef, Error, Result};
use crate::formats::windows_path::backing_of;

/// The most entries that a locator has: the usual ones are five.
const MOST_ENTRIES: usize = 64;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// Where it is.
    pub backing: BackingRef,
    /// What its data write GUID is, or was: one of them has to be.
    pub linkage: Vec<Guid>,
}

impl Parent {
    /// What a locator says.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (mut linkage, mut paths) = (Vec::new(), [const { None }; 3]);
        each(bytes, |_, key, value| {
            match key {
                "parent_linkage" | "parent_linkage2" => {
                    linkage.push(Guid::parse(&value).ok_or_else(|| wrong(&format!("'{value}' is no GUID")))?);
                }
                "relative_path" => paths[0] = Some(value),
                "absolute_win32_path" => paths[1] = Some(value),
                "volume_path" => paths[2] = Some(value),
                _ => {}
            }
            Ok(())
        })?;
        if linkage.is_empty() {
            return Err(wrong("it does not say which parent"));
        }
        let backing = backing_of(paths.iter().flatten().map(String::as_str), "vhdx");
        Ok(Self { backing: backing.ok_or_else(|| wrong("it names no file"))?, linkage })
    }

    /// What has to be written where in a locator, so that it names that parent: its GUID, in as many characters.
    pub fn relinked(bytes: &[u8], guid: Guid) -> Result<Option<(u64, Vec<u8>)>> {
        let mut found = None;
        each(bytes, |entry, key, value| {
            if key == "parent_linkage" {
                let text = if value.starts_with('{') { format!("{{{guid}}}") } else { guid.to_string() };
                let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                if bytes.len() == usize::from(entry.value_length.get()) {
                    found = Some((entry.value_offset.get().into(), bytes));
                }
            }
            Ok(())
        })?;
        Ok(found)
    }
}

fn wrong(what: &str) -> Error {
    Error::corrupt(format!("parent locator: {what}"))
}

/// Gives `see` every entry of a locator, with its key and its value.
fn each(bytes: &[u8], mut see: impl FnMut(&LocatorEntry, &str, String) -> Result<()>) -> Result<()> {
    let (header, rest) = LocatorHeader::read_from_prefix(bytes).map_err(|_| wrong("too short"))?;
    if header.kind != LOCATOR_TYPE {
        return Err(Error::unsupported(format!("a parent of the unknown kind {}", header.kind)));
    }
    let entries = <[LocatorEntry]>::ref_from_bytes(&rest[..rest.len() / 12 * 12]).unwrap_or_default();
    let entries = entries.get(..usize::from(header.count.get())).filter(|entries| entries.len() <= MOST_ENTRIES);
    for entry in entries.ok_or_else(|| wrong("too many entries"))? {
        let text = |at: u32, len: u16| {
            let start = usize::try_from(at).ok()?;
            let bytes = bytes.get(start..start.checked_add(usize::from(len))?)?;
            let units: Vec<u16> = bytes.as_chunks().0.iter().copied().map(u16::from_le_bytes).collect();
            String::from_utf16(&units).ok()
        };
        let key = text(entry.key_offset.get(), entry.key_length.get()).ok_or_else(|| wrong("a key is no text"))?;
        let value = text(entry.value_offset.get(), entry.value_length.get());
        let value = value.ok_or_else(|| wrong(&format!("the value of '{key}' is no text")))?;
        see(entry, &key, value)?;
    }
    Ok(())
}
