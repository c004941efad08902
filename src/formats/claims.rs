//! Which sectors of a file are taken, to find what overlaps: by the bit, so that memory does not depend on how
//! scattered the file is.
//!
//! A large file is looked at window by window, by as many walks of the tables.

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Sectors of a window: 256 GiB, in 64 MiB of bits.
const WINDOW: u64 = 1 << 29;

/// The sectors of one window.
#[derive(Debug)]
pub struct Claims {
    first: u64,
    sectors: u64,
    bits: Vec<u64>,
}

impl Claims {
    /// The windows that a file with that many bytes in use takes, one after the other.
    pub fn windows(end: u64) -> impl Iterator<Item = Self> {
        let sectors = end.div_ceil(SECTOR);
        (0..sectors.div_ceil(WINDOW)).map(move |n| Self::new(n * WINDOW, (sectors - n * WINDOW).min(WINDOW)))
    }

    fn new(first: u64, sectors: u64) -> Self {
        Self { first, sectors, bits: vec![0; usize::try_from(sectors.div_ceil(64)).unwrap_or(0)] }
    }

    /// Takes the sectors of a run of bytes, as far as they lie in the window. False if one of them was taken.
    pub fn claim(&mut self, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len).div_ceil(SECTOR).saturating_sub(self.first).min(self.sectors);
        let mut sector = (at / SECTOR).saturating_sub(self.first);
        let mut free = true;
        while sector < end {
            let (bit, n) = (sector % 64, (64 - sector % 64).min(end - sector));
            let mask = (u64::MAX >> (64 - n)) << bit;
            let Some(word) = usize::try_from(sector / 64).ok().and_then(|word| self.bits.get_mut(word)) else { break };
            free &= *word & mask == 0;
            *word |= mask;
            sector += n;
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_are_taken_once() {
        let mut claims = Claims::new(0, 1000);
        assert!(claims.claim(0, 1) && claims.claim(512, 512 * 200) && claims.claim(201 * 512, 512 * 63));
        assert!(!claims.claim(100, 1) && !claims.claim(150 * 512, 512) && !claims.claim(263 * 512, 512 * 10));
        assert!(claims.claim(512 * 273, 1) && claims.claim(999 * 512, u64::MAX));
        assert!(!claims.claim(999 * 512, 1) && claims.claim(2000 * 512, 1), "what lies outside is not looked at");
    }

    #[test]
    fn windows_cover_the_file() {
        let lengths: Vec<(u64, u64)> = Claims::windows(WINDOW * SECTOR + 513).map(|c| (c.first, c.sectors)).collect();
        assert_eq!(lengths, [(0, WINDOW), (WINDOW, 2)]);
        assert_eq!(Claims::windows(0).count(), 0);
        let mut second = Claims::new(WINDOW, 2);
        assert!(second.claim(WINDOW * SECTOR - 512, 1024) && !second.claim(WINDOW * SECTOR, 1));
        assert!(second.claim(WINDOW * SECTOR - 512, 512));
    }
}
