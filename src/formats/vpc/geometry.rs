//! CHS geometry of a VHD, and when it is the size.

/// The most sectors that cylinders, heads and sectors per track can count.
const MAX_SECTORS: u64 = 65535 * 16 * 255;

/// Cylinders, heads, sectors per track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChsGeometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors: u8,
}

impl ChsGeometry {
    /// The largest there is. It says that the geometry does not tell the size.
    pub const MAX: Self = Self { cylinders: 65535, heads: 16, sectors: 255 };

    /// Sectors in all.
    pub fn count(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// The geometry of a disk of that many sectors, rounded down: the specification's appendix "CHS Calculation".
    pub fn of(sectors: u64) -> Self {
        let total = sectors.min(MAX_SECTORS);
        let (mut track, mut heads, mut rows);
        if total >= 65535 * 16 * 63 {
            (track, heads) = (255, 16);
            rows = total / track;
        } else {
            track = 17;
            rows = total / track;
            heads = rows.div_ceil(1024).max(4);
            if rows >= heads * 1024 || heads > 16 {
                (track, heads) = (31, 16);
                rows = total / track;
            }
            if rows >= heads * 1024 {
                (track, heads) = (63, 16);
                rows = total / track;
            }
        }
        Self {
            cylinders: u16::try_from(rows / heads).unwrap_or(u16::MAX),
            heads: u8::try_from(heads).unwrap_or(u8::MAX),
            sectors: u8::try_from(track).unwrap_or(u8::MAX),
        }
    }

    /// The smallest geometry that has room for that many sectors, or the largest there is.
    pub fn at_least(sectors: u64) -> Self {
        if sectors == 0 {
            return Self { cylinders: 0, heads: 0, sectors: 0 };
        }
        let wanted = sectors.min(MAX_SECTORS);
        let mut asked = wanted;
        loop {
            let geometry = Self::of(asked);
            if geometry.count() >= wanted {
                return geometry;
            }
            asked += 1;
        }
    }
}

/// What says how large the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeRule {
    /// The footer's current size.
    CurrentSize,
    /// The geometry, unless it is the largest there is.
    ChsGeometry,
}

impl SizeRule {
    /// That of the program that made the image: Virtual PC shows its guests the geometry, and QEMU goes by it
    /// unless told otherwise.
    pub fn of(creator: [u8; 4]) -> Self {
        match &creator {
            b"vpc " | b"qemu" => Self::ChsGeometry,
            _ => Self::CurrentSize,
        }
    }

    /// The sectors of a disk whose footer has that geometry, and that many sectors as its current size.
    pub fn sectors(self, geometry: ChsGeometry, current: u64) -> u64 {
        match self {
            Self::ChsGeometry if geometry != ChsGeometry::MAX => geometry.count(),
            _ => current,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_round_up_to_whole_cylinders() {
        for (sectors, count) in [(1, 68), (20480, 20536), (2 << 20, 1_073_995_776 / 512), (0, 0)] {
            assert_eq!(ChsGeometry::at_least(sectors).count(), count);
        }
        assert_eq!(ChsGeometry::at_least(20480), ChsGeometry { cylinders: 302, heads: 4, sectors: 17 });
        assert_eq!(ChsGeometry::at_least(u64::MAX), ChsGeometry::MAX);
    }

    #[test]
    fn a_geometry_always_has_room() {
        for shift in 0..40 {
            for near in [-1i64, 0, 1, 12345] {
                let sectors = u64::try_from((1i64 << shift) + near).unwrap_or(0);
                assert!(ChsGeometry::at_least(sectors).count() >= sectors.min(MAX_SECTORS));
            }
        }
    }
}
