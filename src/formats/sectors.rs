//! Sectors of 512 bytes, in which some formats count what others count in bytes: a type of its own, so that the number of
//! a sector is never taken for an offset.

use std::fmt;
use std::ops::{Add, AddAssign, Mul};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// A length in sectors, or a place: so many sectors from the start of a file or of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Sectors(pub u64);

impl Sectors {
    /// As many as are needed for `bytes`.
    pub const fn holding(bytes: u64) -> Self {
        Self(bytes.div_ceil(SECTOR))
    }

    /// The whole ones in `bytes`.
    pub const fn within(bytes: u64) -> Self {
        Self(bytes / SECTOR)
    }

    /// In bytes. Saturates: what an image made overflow lies past every end.
    pub const fn bytes(self) -> u64 {
        self.0.saturating_mul(SECTOR)
    }

    /// In bytes, unless that overflows.
    pub fn checked_bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR)
    }

    /// The sector before this one.
    pub fn before(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }

    /// The first multiple of so many sectors that is not before this one.
    pub fn next_multiple_of(self, unit: Self) -> Self {
        Self(self.0.next_multiple_of(unit.0))
    }
}

impl From<u32> for Sectors {
    fn from(sectors: u32) -> Self {
        Self(sectors.into())
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Add for Sectors {
    type Output = Self;

    /// Saturates, as [`Sectors::bytes`] does.
    fn add(self, more: Self) -> Self {
        Self(self.0.saturating_add(more.0))
    }
}

impl AddAssign for Sectors {
    fn add_assign(&mut self, more: Self) {
        *self = *self + more;
    }
}

impl Mul<u64> for Sectors {
    type Output = Self;

    /// Saturates, as [`Sectors::bytes`] does.
    fn mul(self, n: u64) -> Self {
        Self(self.0.saturating_mul(n))
    }
}

#[cfg(test)]
mod tests {
    use super::Sectors;

    #[test]
    fn what_overflows_lies_past_every_end() {
        let far = Sectors(u64::MAX / 2);
        assert_eq!((far.bytes(), far.checked_bytes()), (u64::MAX, None));
        assert_eq!((far * 3 + Sectors(1), (Sectors(3) * 2).checked_bytes()), (Sectors(u64::MAX), Some(3072)));
        assert_eq!((Sectors::holding(513), Sectors::within(1023)), (Sectors(2), Sectors(1)));
    }
}
