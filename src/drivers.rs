//! The table of drivers: what vimg can open and make stands here and nowhere else.

use crate::block::Drivers;
use crate::filters::FILTERS;
use crate::formats::FORMATS;
use crate::protocols::PROTOCOLS;

/// Every driver there is.
pub const DRIVERS: &Drivers = &Drivers { formats: FORMATS, protocols: PROTOCOLS, filters: FILTERS };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_what_takes_anything_is_last() {
        let mut names: Vec<_> = DRIVERS.formats.iter().map(|format| format.name()).collect();
        names.extend(DRIVERS.protocols.iter().map(|protocol| protocol.name()));
        names.extend(DRIVERS.filters.iter().map(|filter| filter.name()));
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert_eq!(DRIVERS.formats.last().map(|format| format.name()), Some("raw"));
        assert_eq!(DRIVERS.protocols.last().map(|protocol| protocol.name()), Some("file"));
    }
}
