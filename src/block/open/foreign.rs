//! Formats that the reference opens and vimg does not: known by their first bytes alone, so that no such image is
//! taken for raw and copied, or written over, as if its headers were guest data. The line of a format
//! goes when the table of drivers has it.

/// A format and how it is known.
struct Foreign {
    name: &'static str,
    /// (offset, bytes): all of them have to be there.
    marks: &'static [(usize, &'static [u8])],
}

/// Each from its published header: Bochs, cloop.
const FOREIGN: &[Foreign] = &[
    Foreign { name: "bochs", marks: &[(0, b"Bochs Virtual HD Image"), (32, b"Redolog")] },
    Foreign { name: "cloop", marks: &[(0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop")] },
];

/// The format of such an image.
pub fn of(head: &[u8]) -> Option<&'static str> {
    let has = |(at, bytes): &(usize, &[u8])| head.get(*at..).is_some_and(|rest| rest.starts_with(bytes));
    FOREIGN.iter().find(|foreign| foreign.marks.iter().all(has)).map(|foreign| foreign.name)
}
