//! The parent of a differencing VHD: where it is, and which one it is.
//!
//! Source: *Virtual Hard Disk Image Format Specification* 1.0, "Dynamic Disk Header Format", "Parent Locator". Windows' own
//! locators are followed first, the relative one before the absolute one; then a URL of macOS; then the name alone. The
//! parent's time of change is not looked at: copying a file changes it.

use std::ops::Range;

use super::layout::{DynamicHeader, Locator, SECTOR};
use crate::block::{BackingRef, Child, Error, Result};
use crate::formats::windows_path::backing_of;

/// The longest path that is taken.
const LONGEST: u32 = 64 << 10;

/// See the module.
#[derive(Debug, Clone)]
pub struct VpcParent {
    /// Where it is.
    pub backing: BackingRef,
    /// Its footer's UUID.
    pub uuid: u128,
    /// The parts of the file that hold the locators.
    pub locators: Vec<Range<u64>>,
}

impl VpcParent {
    /// What the header and its locators say.
    pub fn read(file: &Child, header: &DynamicHeader) -> Result<Self> {
        let (mut paths, mut locators): ([Option<String>; 4], _) = (Default::default(), Vec::new());
        for locator in header.locators() {
            let Some(text) = text_of(&locator.code) else { continue };
            let Locator { offset, space, length, .. } = locator;
            if length > LONGEST || offset > i64::MAX.unsigned_abs() {
                return Err(Error::corrupt(format!("a parent locator of {length} bytes at {offset}")));
            }
            // Some count bytes there, not sectors.
            let space = u64::from(space).min(u64::from(LONGEST) / SECTOR) * SECTOR;
            locators.push(offset..offset + space.max(u64::from(length)));
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
            file.read_metadata("a parent locator", offset, &mut bytes)?;
            if let (which, Some(path)) = (text.place, (text.decode)(&bytes)) {
                paths[which].get_or_insert(path);
            }
        }
        paths[3] = header.parent_name().filter(|name| !name.is_empty());
        let backing = backing_of(paths.iter().flatten().map(String::as_str), "vpc");
        let backing =
            backing.ok_or_else(|| Error::corrupt("the differencing disk does not say where its parent is"))?;
        Ok(Self { backing, uuid: header.parent_uuid(), locators })
    }
}

/// What makes text of a locator's bytes.
type Decode = fn(&[u8]) -> Option<String>;

/// How a locator's bytes are text, and in which place they are asked.
struct LocatorText {
    place: usize,
    decode: Decode,
}

fn text_of(code: &[u8; 4]) -> Option<LocatorText> {
    let (place, decode): (usize, Decode) = match code {
        b"W2ru" => (0, utf16),
        b"W2ku" => (1, utf16),
        b"MacX" => (2, url),
        _ => return None,
    };
    Some(LocatorText { place, decode })
}

fn utf16(bytes: &[u8]) -> Option<String> {
    let units = bytes.as_chunks().0.iter().copied().map(u16::from_le_bytes);
    String::from_utf16(&units.take_while(|unit| *unit != 0).collect::<Vec<_>>()).ok()
}

/// The path of a `file:` URL, whose other bytes are written as `%` and two digits.
fn url(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0').strip_prefix("file://")?;
    let path = text.strip_prefix("localhost").unwrap_or(text).as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while let Some(byte) = path.get(at) {
        let digits = path.get(at + 1..at + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.filter(|_| *byte == b'%').and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(decoded) => {
                out.push(decoded);
                at += 3;
            }
            None => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::url;

    #[test]
    fn urls_are_paths() {
        assert_eq!(url(b"file:///vms/a%20b.vhd\0").as_deref(), Some("/vms/a b.vhd"));
        assert_eq!(url(b"file://localhost/%zz").as_deref(), Some("/%zz"));
        assert_eq!(url(b"http://x/y"), None);
    }
}
