//! The names of a folder's entries: a short one, made as Microsoft's *FAT32 File System Specification* 1.03 says
//! ("The Basis-Name Generation Algorithm", "The Numeric-Tail Generation Algorithm"), and the long one before it.

use std::collections::{HashMap, HashSet};

use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

use super::layout::{LAST_PART, LONG, LongEntry};

/// Characters of a short name's parts.
const BASE: usize = 8;
const END: usize = 3;
/// Units of a long name in one entry.
const PART: usize = 13;

/// A short name, as it is stored.
pub type Short = [u8; BASE + END];

/// The short names of one folder: no two are the same.
#[derive(Debug, Default)]
pub struct ShortNames {
    taken: HashSet<Short>,
    /// The last number that a basis got: where the next one goes on.
    last: HashMap<Short, u32>,
}

impl ShortNames {
    /// A new one for that name, of which every character that is no plain letter, digit or one of a few signs is left out.
    pub fn add(&mut self, name: &str) -> Short {
        let trimmed = name.trim_start_matches('.');
        let base = trimmed.split('.').next().unwrap_or_default();
        let (stem, end) = trimmed.rsplit_once('.').unwrap_or((trimmed, ""));
        let (base, whole) = plain::<BASE>(base);
        let (end, whole_end) = plain::<END>(end);
        let exact = whole && whole_end && trimmed.len() == name.len() && !stem.contains('.');
        let mut basis = [b' '; BASE + END];
        let places = basis.split_at_mut(BASE);
        fill(places.0, &base);
        fill(places.1, &end);
        if exact && !base.is_empty() && self.taken.insert(basis) {
            return basis;
        }
        let last = self.last.entry(basis).or_default();
        loop {
            *last += 1;
            let tail = format!("~{last}");
            let mut short = basis;
            let keep = base.len().min(BASE.saturating_sub(tail.len()));
            let (front, _) = short.split_at_mut(BASE);
            front.fill(b' ');
            fill(front, &[base.get(..keep).unwrap_or_default(), tail.as_bytes()].concat());
            if self.taken.insert(short) {
                return short;
            }
        }
    }
}

fn fill(place: &mut [u8], bytes: &[u8]) {
    for (to, from) in place.iter_mut().zip(bytes) {
        *to = *from;
    }
}

/// The characters that a short name can have, `N` at most, and whether these are all.
fn plain<const N: usize>(text: &str) -> (Vec<u8>, bool) {
    let can = |c: &char| c.is_ascii_alphanumeric() || "$%'-_@~`!(){}^#&".contains(*c);
    let all: Vec<u8> = text.chars().filter(can).map(|c| (c as u8).to_ascii_uppercase()).collect();
    let whole = all.len() <= N && all.len() == text.chars().count();
    (all.into_iter().take(N).collect(), whole)
}

/// The entries that hold a long name, in the order in which they stand before the short one's.
pub fn long_entries(name: &str, short: &Short) -> Vec<u8> {
    let checksum = short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let units: Vec<u16> = name.encode_utf16().collect();
    let mut bytes = Vec::new();
    for (index, part) in units.chunks(PART).enumerate().rev() {
        let mut all = [0xffff; PART];
        for (place, unit) in all.iter_mut().zip(part.iter().copied().chain([0])) {
            *place = unit;
        }
        let unit = |at: usize| U16::new(all.get(at).copied().unwrap_or(0));
        let last = if (index + 1) * PART >= units.len() { LAST_PART } else { 0 };
        let entry = LongEntry {
            part: u8::try_from(index + 1).unwrap_or(0) | last,
            first: std::array::from_fn(unit),
            kind: LONG,
            zero: 0,
            checksum,
            second: std::array::from_fn(|at| unit(5 + at)),
            no_cluster: U16::ZERO,
            third: std::array::from_fn(|at| unit(11 + at)),
        };
        bytes.extend(entry.as_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the reference makes of them, in that order.
    #[test]
    fn short_names_are_the_references() {
        let mut names = ShortNames::default();
        for (name, short) in [
            (".hidden", "HIDDEN~1   "),
            ("ümlaut €.txt", "MLAUT~1 TXT"),
            ("Long File Name.texu", "LONGFI~1TEX"),
            ("Long File Name.text", "LONGFI~2TEX"),
            ("Mixed.Txt", "MIXED   TXT"),
            ("a+b,c;=[x].t", "ABCX~1  T  "),
            ("two.dots.here.tar.gz", "TWO~1   GZ "),
            ("trail. .", "TRAIL~1    "),
            ("€", "~1         "),
            ("twentysixcharactersnameabc", "TWENTY~1   "),
            ("$%_@~`!(){}^#&-", "$%_@~`~1   "),
            (" space", "SPACE~1    "),
            ("exactly8.abc", "EXACTLY8ABC"),
            ("exactly9x.abc", "EXACTL~1ABC"),
            ("..x", "X~1        "),
            ("~", "~          "),
            ("ext.a b", "EXT~1   AB "),
            ("a.abcd", "A~1     ABC"),
            ("x.", "X          "),
            ("Abc", "ABC        "),
            ("abc", "ABC~1      "),
            ("ABC", "ABC~2      "),
        ] {
            assert_eq!(String::from_utf8_lossy(&names.add(name)), short, "{name}");
        }
        for n in 1..12 {
            let short = if n < 10 { format!("COLLIS~{n}TEX") } else { format!("COLLI~{n}TEX") };
            assert_eq!(String::from_utf8_lossy(&names.add(&format!("collision name {n}.text"))), short);
        }
    }
}
