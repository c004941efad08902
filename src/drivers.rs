//! The table of drivers: what vimg can open and make stands here and nowhere else.

use crate::block::Drivers;
use crate::block::bytes::Bytes;
use crate::filters::FILTERS;
use crate::formats::FORMATS;
use crate::protocols::PROTOCOLS;

/// Every driver there is.
pub const DRIVERS: &Drivers = &Drivers { formats: FORMATS, protocols: PROTOCOLS, bytes: BYTES, filters: FILTERS };

const BYTES: &[Bytes] = &Bytes::all::<{ PROTOCOLS.len() }>(PROTOCOLS);

#[cfg(test)]
mod tests {
    use super::*;

    /// The names at the start of the lines of a table of the README: between backticks, in the first column.
    fn tabled(heading: &str) -> Vec<&'static str> {
        let lines = README.lines().skip_while(|line| !line.starts_with(heading)).skip(2);
        let rows = lines.take_while(|line| line.starts_with('|'));
        rows.filter_map(|line| line.split('|').nth(1)).flat_map(quoted).collect()
    }

    /// What stands between backticks.
    fn quoted(text: &str) -> impl Iterator<Item = &str> {
        text.split('`').skip(1).step_by(2)
    }

    const README: &str = include_str!("../README.md");

    fn sorted<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
        let mut names: Vec<_> = names.into_iter().collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_readme_lists_every_driver() {
        let formats = sorted(tabled("| format | read |"));
        assert_eq!(formats, sorted(DRIVERS.formats.iter().map(|format| format.name())));
        let protocols = sorted(tabled("| protocol | read |"));
        let remote = DRIVERS.protocols.iter().filter(|protocol| protocol.is_remote());
        assert_eq!(protocols, sorted(remote.map(|protocol| protocol.name())));
        // Those of this host are in the text.
        let words = README.split(|c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c)).collect::<Vec<_>>();
        let local = DRIVERS.protocols.iter().filter(|protocol| !protocol.is_remote());
        let filters = DRIVERS.filters.iter().map(|filter| filter.name());
        for name in local.map(|protocol| protocol.name()).chain(filters) {
            assert!(words.contains(&name), "{name}");
        }
    }

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
