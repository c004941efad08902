//! Which mebibytes of a file are in use.
//!
//! Invariant: nothing is given out below the first block that the image has, or before the end of one that has none:
//! what lies there belongs to whoever made it.

use super::layout::MIB;

/// The most mebibytes of a file that are kept track of: 256 TiB, in 32 MiB of bits.
const MOST: u64 = 1 << 28;

/// See the module.
#[derive(Debug)]
pub struct VhdxSpace {
    used: Vec<u64>,
    /// Nothing is given out below this.
    floor: u64,
    /// No hole for a block starts below this.
    hint: u64,
    /// One more than the last one in use, at least the floor.
    pub top: u64,
    /// Bytes of the file from here on were never given out and read as zeros.
    fresh: u64,
}

/// What was given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// The first mebibyte.
    pub first: u64,
    /// How many pieces of what was asked for.
    pub count: u64,
    /// The bytes of it that may not read as zeros: start and end.
    pub stale: Option<(u64, u64)>,
}

impl VhdxSpace {
    /// Nothing in use; from byte `fresh` on all reads as zeros.
    pub fn new(fresh: u64) -> Self {
        Self { used: Vec::new(), floor: 0, hint: 0, top: 0, fresh }
    }

    /// Whether one is in use.
    pub fn is_used(&self, mib: u64) -> bool {
        let word = usize::try_from(mib / 64).ok().and_then(|word| self.used.get(word));
        word.is_some_and(|word| word >> (mib % 64) & 1 == 1)
    }

    /// The part of a run that lies in one word: which word, the bits, and how many they are.
    fn part(mib: u64, left: u64) -> (usize, u64, u64) {
        let n = (64 - mib % 64).min(left);
        (usize::try_from(mib / 64).unwrap_or(usize::MAX), (u64::MAX >> (64 - n)) << (mib % 64), n)
    }

    /// Takes a run. `None` where it lies too far behind, false where some of it was taken.
    pub fn mark(&mut self, first: u64, count: u64) -> Option<bool> {
        let end = first.checked_add(count).filter(|end| *end <= MOST)?;
        let (mut mib, mut free) = (first, true);
        let words = usize::try_from(end.div_ceil(64)).ok()?;
        if self.used.len() < words {
            self.used.resize(words, 0);
        }
        while mib < end {
            let (word, mask, n) = Self::part(mib, end - mib);
            free &= self.used[word] & mask == 0;
            self.used[word] |= mask;
            mib += n;
        }
        self.top = self.top.max(end);
        Some(free)
    }

    /// Gives a run back.
    pub fn clear(&mut self, first: u64, count: u64) {
        let (mut mib, end) = (first, first.saturating_add(count));
        while mib < end {
            let (word, mask, n) = Self::part(mib, end - mib);
            if let Some(word) = self.used.get_mut(word) {
                *word &= !mask;
            }
            mib += n;
        }
        self.hint = self.hint.min(first);
        while self.top > self.floor && !self.is_used(self.top - 1) {
            self.top -= 1;
        }
    }

    /// Nothing is given out below `floor` any more.
    pub fn start_at(&mut self, floor: u64) {
        (self.floor, self.hint, self.top) = (floor, floor, self.top.max(floor));
    }

    /// A hole of that many mebibytes below the top.
    fn hole(&mut self, unit: u64) -> Option<u64> {
        let mut mib = self.hint.max(self.floor);
        let mut start = mib;
        while mib < self.top {
            let word = usize::try_from(mib / 64).ok().and_then(|word| self.used.get(word));
            if mib.is_multiple_of(64) && word == Some(&u64::MAX) {
                mib += 64;
                start = mib;
                continue;
            }
            mib += 1;
            if self.is_used(mib - 1) {
                start = mib;
            } else if mib - start >= unit {
                self.hint = mib;
                return Some(start);
            }
        }
        self.hint = self.top;
        None
    }

    /// Room for at most `count` pieces of `unit` mebibytes: a hole for one, or several at the end.
    pub fn take(&mut self, unit: u64, count: u64) -> Option<Room> {
        match self.hole(unit) {
            Some(first) => self.give(first, unit, 1),
            None => self.append(unit, count),
        }
    }

    /// Room at the end.
    pub fn append(&mut self, unit: u64, count: u64) -> Option<Room> {
        self.give(self.top, unit, count)
    }

    fn give(&mut self, first: u64, unit: u64, count: u64) -> Option<Room> {
        self.mark(first, unit.checked_mul(count)?)?;
        let (start, end) = (first * MIB, (first + unit * count) * MIB);
        let stale = (start < self.fresh).then(|| (start, end.min(self.fresh)));
        self.fresh = self.fresh.max(end);
        Some(Room { first, count, stale })
    }

    /// The file ends at the top now.
    pub fn was_cut(&mut self) {
        self.fresh = self.fresh.min(self.top * MIB);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn holes_come_first_and_nothing_lies_below_the_floor() {
        let mut space = VhdxSpace::new(200 * MIB);
        assert_eq!(space.mark(0, 4), Some(true));
        assert_eq!(space.mark(8, 100), Some(true));
        assert_eq!(space.mark(100, 1), Some(false));
        space.start_at(8);
        let room = space.take(8, 3).unwrap();
        assert_eq!((room.first, room.count, room.stale), (108, 3, Some((108 * MIB, 132 * MIB))));
        space.clear(70, 8);
        space.clear(20, 7);
        assert_eq!(space.take(8, 3).unwrap().first, 70);
        assert_eq!(space.take(8, 1).unwrap().first, 132);
        space.clear(108, 32);
        assert_eq!(space.top, 108);
        space.was_cut();
        assert_eq!(space.take(8, 1), Some(Room { first: 108, count: 1, stale: None }));
        assert_eq!(space.mark(MOST, 1), None);
    }
}
