//! Formats that the reference opens and vimg does not: known by their first or last bytes alone, so that no such image is
//! taken for raw and copied, or written over, as if its headers were guest data. The line of a format
//! goes when the table of drivers has it.

/// A format and how it is known.
struct Foreign {
    name: &'static str,
    /// (offset, bytes): all of them have to be there.
    marks: &'static [(usize, &'static [u8])],
}

/// Each from its published header: VHDX (MS-VHDX 2.2.1), Parallels, Bochs, cloop, and UDIF with its trailer in
/// front.
const FOREIGN: &[Foreign] = &[
    Foreign { name: "vhdx", marks: &[(0, b"vhdxfile")] },
    Foreign { name: "parallels", marks: &[(0, b"WithoutFreeSpace"), (16, &[2, 0, 0, 0])] },
    Foreign { name: "parallels", marks: &[(0, b"WithouFreSpacExt"), (16, &[2, 0, 0, 0])] },
    Foreign { name: "bochs", marks: &[(0, b"Bochs Virtual HD Image"), (32, b"Redolog")] },
    Foreign { name: "dmg", marks: &[(0, KOLY)] },
    Foreign { name: "cloop", marks: &[(0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop")] },
];

/// How many bytes at the end of a file are searched for a trailer.
pub const END: u64 = 64 << 10;
/// What a UDIF trailer starts with: its magic, version 4, 512 bytes long.
const KOLY: &[u8] = b"koly\0\0\0\x04\0\0\x02\0";
const KOLY_BYTES: usize = 512;
/// Where a UDIF trailer has the offset of its property list and, in the next 8 bytes, its length; big-endian.
const PROPERTIES: usize = 0xd8;
/// As in the reference, a trailer may start as far before the end of the last sector.
const LAST: u64 = 1024;

/// The format of an image that is known by its end, of which `end` is the part from byte `start` on. A file in whole
/// sectors has padding behind the trailer; where that is long, the property list has to end where the trailer begins,
/// so that an image within a disk is not taken for the disk.
pub fn of_end(end: &[u8], start: u64) -> Option<&'static str> {
    let word = |bytes: &[u8], at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes);
    let len = start.saturating_add(end.len() as u64).next_multiple_of(512);
    let trailer = |(at, bytes): (usize, &[u8])| {
        let place = start.saturating_add(at as u64);
        let list_end = || word(bytes, PROPERTIES)?.checked_add(word(bytes, PROPERTIES + 8)?);
        bytes.starts_with(KOLY) && (len - place <= LAST || list_end() == Some(place))
    };
    end.windows(KOLY_BYTES).enumerate().any(trailer).then_some("dmg")
}

/// Whether the name alone says that a file is a disk image of macOS. One without its trailer may be half a download.
pub fn is_dmg_name(name: &str) -> bool {
    name.ends_with(".dmg")
}

/// The format of such an image.
pub fn of(head: &[u8]) -> Option<&'static str> {
    let has = |(at, bytes): &(usize, &[u8])| head.get(*at..).is_some_and(|rest| rest.starts_with(bytes));
    FOREIGN.iter().find(|foreign| foreign.marks.iter().all(has)).map(|foreign| foreign.name)
}
