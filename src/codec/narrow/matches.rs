//! Finding what was there before, at most 4 KiB back.
//!
//! For each hash of four bytes the latest place, and for each place the one before it of the same hash: all of it fits in
//! the processor's nearest cache. Places are kept to 16 bits; one that means another position is found out by comparing
//! bytes. Those of three bytes are the latest alone.

/// How far back a reference goes at most.
pub const WINDOW: usize = 4096;
/// The shortest reference (RFC 1951, section 3.2.5).
pub const SHORTEST: usize = 3;
/// The longest.
pub const LONGEST: usize = 258;
/// Bytes that have to be there behind the last one that is looked at.
pub const PADDING: usize = 16;

/// Bits of a hash of four bytes, and of three.
const BITS4: u32 = 14;
const BITS3: u32 = 11;
/// Positions are kept as if there were so many bytes before the first: in the first 60 KiB of what is encoded, a place that
/// was never set is too far away. Further on it may seem to be near, and comparing bytes finds out.
const BEFORE: usize = WINDOW + 1;

/// A reference: `len` bytes as they lie `dist` back. None if `dist` is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Match {
    pub len: usize,
    pub dist: usize,
}

/// How hard to look.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// References have to be longer than this.
    pub than: usize,
    /// Places that are looked at.
    pub depth: usize,
    /// One of this length ends the search.
    pub nice: usize,
    /// Three bytes pay if they are no further back.
    pub near: usize,
}

/// Where bytes were last.
#[derive(Debug)]
pub struct Matcher {
    places4: Box<[u16; 1 << BITS4]>,
    places3: Box<[u16; 1 << BITS3]>,
    /// The place before each one, of the same hash of four bytes.
    before: Box<[u16; WINDOW]>,
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |four| u32::from_le_bytes(*four))
}

#[inline(always)]
fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |eight| u64::from_le_bytes(*eight))
}

/// By the golden ratio, which spreads what differs little.
#[inline(always)]
fn hash(word: u32, bits: u32) -> usize {
    (word.wrapping_mul(0x9e37_79b1) >> (32 - bits)) as usize
}

/// How many bytes from both positions on are the same, `most` at most.
#[inline(always)]
fn same(bytes: &[u8], a: usize, b: usize, most: usize) -> usize {
    let mut len = 0;
    while len < most {
        let differ = long(bytes, a + len) ^ long(bytes, b + len);
        if differ != 0 {
            return (len + differ.trailing_zeros() as usize / 8).min(most);
        }
        len += 8;
    }
    most
}

impl Matcher {
    /// Knows nothing yet.
    pub fn new() -> Self {
        Self { places4: Box::new([0; 1 << BITS4]), places3: Box::new([0; 1 << BITS3]), before: Box::new([0; WINDOW]) }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.places4.fill(0);
        self.places3.fill(0);
    }

    /// Writes a position down.
    #[inline(always)]
    pub fn pass(&mut self, bytes: &[u8], at: usize) {
        let place = &mut self.places4[hash(word(bytes, at), BITS4)];
        self.before[(at + BEFORE) % WINDOW] = *place;
        *place = (at + BEFORE) as u16;
    }

    /// The longest reference that is found for what is at `at`, up to `end`; writes the position down.
    #[inline(always)]
    pub fn find(&mut self, bytes: &[u8], end: usize, at: usize, look: Look) -> Match {
        let here = word(bytes, at);
        let now = (at + BEFORE) as u16;
        let place3 = std::mem::replace(&mut self.places3[hash(here << 8, BITS3)], now);
        let mut place = std::mem::replace(&mut self.places4[hash(here, BITS4)], now);
        self.before[usize::from(now) % WINDOW] = place;
        let mut best = Match { len: look.than, dist: 0 };
        let most = LONGEST.min(end - at);
        if most < SHORTEST {
            return best;
        }
        let furthest = WINDOW.min(at);
        if look.than < SHORTEST {
            let dist = usize::from(now.wrapping_sub(place3));
            if dist > 0 && dist <= look.near.min(furthest) && (word(bytes, at - dist) ^ here) << 8 == 0 {
                best = Match { len: SHORTEST, dist };
            }
        }
        if most <= best.len.max(SHORTEST) {
            return best;
        }
        let nice = look.nice.min(most);
        // What is longer has the same last four bytes too.
        let tail = |at: usize, len: usize| word(bytes, at + len.max(SHORTEST) - SHORTEST);
        let mut want = tail(at, best.len);
        let mut last = 0;
        for _ in 0..look.depth {
            let dist = usize::from(now.wrapping_sub(place));
            if dist <= last || dist > furthest {
                break;
            }
            let there = at - dist;
            if tail(there, best.len) == want && word(bytes, there) == here {
                let len = 4 + same(bytes, there + 4, at + 4, most - 4);
                if len > best.len {
                    best = Match { len, dist };
                    if len >= nice {
                        break;
                    }
                    want = tail(at, len);
                }
            }
            last = dist;
            place = self.before[usize::from(place) % WINDOW];
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HARD: Look = Look { than: 2, depth: 4, nice: LONGEST, near: WINDOW };

    fn padded(bytes: &[u8]) -> Vec<u8> {
        [bytes, &[0; PADDING]].concat()
    }

    #[test]
    fn the_longest_of_the_latest_places_is_found() {
        let text = b"abcdefgh-abcdX-abcdefg-abcY-abcdefgh";
        let bytes = padded(text);
        let mut matcher = Matcher::new();
        for at in 0..28 {
            matcher.find(&bytes, text.len(), at, HARD);
        }
        assert_eq!(matcher.find(&bytes, text.len(), 28, HARD), Match { len: 8, dist: 28 });
        assert_eq!(matcher.find(&bytes, text.len(), 35, HARD).dist, 0, "too short");
        matcher.clear();
        assert_eq!(matcher.find(&bytes, text.len(), 28, HARD).dist, 0);
    }

    #[test]
    fn three_bytes_are_found_where_they_are_near() {
        let text = b"abc1abc2";
        let mut matcher = Matcher::new();
        for (near, dist) in [(4, 4), (3, 0)] {
            matcher.clear();
            for at in 0..4 {
                matcher.find(&padded(text), text.len(), at, HARD);
            }
            assert_eq!(matcher.find(&padded(text), text.len(), 4, Look { near, ..HARD }).dist, dist);
        }
    }

    #[test]
    fn nothing_further_back_than_the_window_is_found() {
        for (distance, found) in [(WINDOW, true), (WINDOW + 1, false), (1 << 16, false), ((1 << 16) + 100, false)] {
            let mut text = vec![0; distance + 8];
            fastrand::Rng::with_seed(3).fill(&mut text);
            text.copy_within(0..8, distance);
            let (bytes, end) = (padded(&text), text.len());
            let mut matcher = Matcher::new();
            for at in 0..distance {
                matcher.find(&bytes, end, at, HARD);
            }
            assert_eq!(matcher.find(&bytes, end, distance, HARD).dist > 0, found, "{distance}");
        }
    }
}
