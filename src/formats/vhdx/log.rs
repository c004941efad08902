//! The log: changes of tables that are to be in place before anything else is believed.
//!
//! Source: [MS-VHDX], sections 2.3.1 to 2.3.3. A valid entry has its checksum, the header's log GUID, and sectors that
//! all have its number. A sequence is entries one behind the other with growing numbers, and counts if the first entry
//! that the last one needs (its tail) is among them. Of those the one with the greatest number is active. A tail where
//! no entry can be (section 2.3.1.1 wants a multiple of 4096 bytes within the log) is none of them; but the entry that
//! has it is as valid as others, and says that there were changes.
//!
//! No two valid entries share a sector: only the first sector of one starts with `loge`. So the log is gone through once.

use std::collections::BTreeMap;

use zerocopy::FromBytes;

use super::headers::Headers;
use super::layout::{LOG_SECTOR, LogData, LogDescriptor, LogEntryHeader, MAX_SIZE, MIB, REGION_TABLES, checksum};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::formats::runs::{ByteRun, Runs};
use crate::storage::{self, Preallocation, Storage, Zeroing};

/// The largest log that is gone through: 64 times the usual one.
const MOST: u64 = 64 << 20;
/// Bytes of a sector of the log.
const SECTOR: u64 = LOG_SECTOR as u64;
/// No file is longer: that of the largest disk, in blocks, with its tables.
const LONGEST: u64 = MAX_SIZE + (1 << 40);

/// What the log makes of a file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Sectors, by their number in the file.
    sectors: BTreeMap<u64, Box<[u8; LOG_SECTOR]>>,
    /// Runs of zeros, where no sector says otherwise, in order.
    zeros: Vec<ByteRun>,
    /// The file is at least so long.
    pub end: u64,
}

/// A valid entry: where it is in the log, and what of it is needed.
struct Entry {
    at: u64,
    length: u64,
    tail: u64,
    sequence: u64,
    flushed_end: u64,
    last_end: u64,
}

/// The log's bytes, which go round.
struct Log {
    bytes: Vec<u8>,
}

impl Log {
    /// The sector that starts there, counted from the log's start, once round or more.
    fn sector(&self, at: u64) -> Option<&[u8; LOG_SECTOR]> {
        let at = usize::try_from(at % self.bytes.len() as u64).ok()?;
        self.bytes.get(at..)?.first_chunk()
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The entry that starts there, if one does and it is valid.
    fn entry(&self, at: u64, headers: &Headers) -> Option<Entry> {
        let sector = self.sector(at)?;
        if !sector.starts_with(b"loge") {
            return None;
        }
        let (header, _) = LogEntryHeader::read_from_prefix(sector).ok()?;
        let (length, tail) = (u64::from(header.length.get()), u64::from(header.tail.get()));
        let sound = length >= SECTOR && length.is_multiple_of(SECTOR) && length <= self.len();
        let sound = sound && header.sequence.get() > 0 && header.log_guid == headers.current.log_guid;
        if !sound {
            return None;
        }
        let entry = Entry {
            at,
            length,
            tail,
            sequence: header.sequence.get(),
            flushed_end: header.flushed_end.get(),
            last_end: header.last_end.get(),
        };
        let mut data = 0;
        let complete = self.each(&entry, |_, middle| {
            data += u64::from(middle.is_some());
            Some(())
        });
        let count = u64::from(header.descriptors.get());
        complete.filter(|()| length == descriptor_bytes(count) + data * SECTOR)?;
        let mut crc = checksum(sector);
        for n in 1..length / SECTOR {
            crc = crc32c::crc32c_append(crc, self.sector(at + n * SECTOR)?);
        }
        (crc == header.checksum.get()).then_some(entry)
    }

    /// Gives `see` each descriptor of an entry, with its sector's middle where it is data. `None` where one is wrong.
    fn each<'a>(
        &'a self,
        entry: &Entry,
        mut see: impl FnMut(LogDescriptor, Option<&'a [u8; 4084]>) -> Option<()>,
    ) -> Option<()> {
        let (header, _) = LogEntryHeader::read_from_prefix(self.sector(entry.at)?).ok()?;
        let count = u64::from(header.descriptors.get());
        let mut next = descriptor_bytes(count);
        if next > entry.length {
            return None;
        }
        for n in 0..count {
            let place = size_of::<LogEntryHeader>() as u64 + n * size_of::<LogDescriptor>() as u64;
            let within = usize::try_from(place % SECTOR).ok()?;
            let sector = self.sector(entry.at + place / SECTOR * SECTOR)?;
            let (descriptor, _) = LogDescriptor::read_from_prefix(sector.get(within..)?).ok()?;
            if descriptor.sequence.get() != entry.sequence {
                return None;
            }
            let middle = match &descriptor.signature {
                b"zero" => None,
                b"desc" if next < entry.length => {
                    let data = LogData::ref_from_bytes(self.sector(entry.at + next)?).ok()?;
                    let number = u64::from(data.sequence_high.get()) << 32 | u64::from(data.sequence_low.get());
                    if &data.signature != b"data" || number != entry.sequence {
                        return None;
                    }
                    next += SECTOR;
                    Some(&data.data)
                }
                _ => return None,
            };
            see(descriptor, middle)?;
        }
        Some(())
    }
}

/// Bytes of the sectors with an entry's header and descriptors.
fn descriptor_bytes(count: u64) -> u64 {
    (size_of::<LogEntryHeader>() as u64 + count * size_of::<LogDescriptor>() as u64).next_multiple_of(SECTOR)
}

/// The valid entries of the active sequence that are to be replayed, in order. Entries of which none is a sequence's last
/// have something to say that is lost.
fn active(log: &Log, headers: &Headers) -> Result<Vec<Entry>> {
    let mut entries: BTreeMap<u64, Entry> = BTreeMap::new();
    let mut at = 0;
    while at < log.len() {
        let entry = log.entry(at, headers);
        at += entry.as_ref().map_or(SECTOR, |entry| entry.length);
        entries.extend(entry.map(|entry| (entry.at, entry)));
    }
    let next_of = |entry: &Entry| {
        let at = (entry.at + entry.length) % log.len();
        entries.get(&at).filter(|next| Some(next.sequence) == entry.sequence.checked_add(1))
    };
    let followers: Vec<u64> = entries.values().filter_map(|entry| next_of(entry).map(|next| next.at)).collect();
    let followers: std::collections::BTreeSet<u64> = followers.into_iter().collect();
    let mut best: Vec<u64> = Vec::new();
    let mut greatest = 0;
    for first in entries.values().filter(|entry| !followers.contains(&entry.at)) {
        let mut run = vec![first.at];
        let mut last = first;
        while let Some(next) = next_of(last) {
            run.push(next.at);
            last = next;
        }
        if let Some(start) = run.iter().position(|at| *at == last.tail)
            && last.sequence > greatest
        {
            greatest = last.sequence;
            best = run.split_off(start);
        }
    }
    if best.is_empty() && !entries.is_empty() {
        return Err(Error::corrupt("the log has entries, but no whole sequence of them"));
    }
    Ok(best.iter().filter_map(|at| entries.remove(at)).collect())
}

impl Replay {
    /// What the log of a file asks for; nothing where it has no active sequence.
    pub fn read(storage: &dyn Storage, headers: &Headers) -> Result<Self> {
        let ((offset, length), mut replay) = (headers.log(), Self::default());
        let end = storage.len().context("Could not get the size of the file")?;
        if length > MOST {
            return Err(Error::unsupported(format!("a log of {length} bytes is too large to be replayed")));
        }
        if offset.saturating_add(length) > end {
            return Err(Error::truncated("the log", offset, end));
        }
        let mut log = Log { bytes: vec![0; usize::try_from(length).unwrap_or(0)] };
        storage.read_at(offset, &mut log.bytes).context("Could not read the VHDX log")?;
        let entries = active(&log, headers)?;
        if let Some(last) = entries.last() {
            if last.flushed_end > end {
                return Err(Error::corrupt(format!(
                    "the log was written when the file had {} bytes, of which {end} are left",
                    last.flushed_end
                )));
            }
            if last.last_end > LONGEST {
                return Err(Error::corrupt(format!("the log makes the file {} bytes long", last.last_end)));
            }
            replay.end = last.last_end;
        }
        let end = replay.end.max(end);
        let mut zeros = Runs::default();
        for entry in &entries {
            replay.add(&log, entry, &mut zeros, end, (offset, offset + length))?;
        }
        replay.zeros = zeros.merged();
        Ok(replay)
    }

    fn add(&mut self, log: &Log, entry: &Entry, zeros: &mut Runs, end: u64, own: ByteRun) -> Result<()> {
        let mut wrong = None;
        log.each(entry, |descriptor, middle| {
            let at = descriptor.offset.get();
            let len = if middle.is_some() { SECTOR } else { u64::from_le_bytes(descriptor.leading) };
            let stop = at.checked_add(len).filter(|stop| *stop <= end.next_multiple_of(SECTOR));
            let apart = |stop: u64| stop <= own.0 || at >= own.1;
            // Neither the headers nor the log itself change this way.
            let fits = at >= REGION_TABLES[0] && at.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
            let Some(stop) = stop.filter(|stop| fits && apart(*stop)) else {
                wrong = Some((at, len));
                return None;
            };
            match middle {
                Some(middle) => {
                    let mut bytes = Box::new([0; LOG_SECTOR]);
                    bytes[..8].copy_from_slice(&descriptor.leading);
                    bytes[8..4092].copy_from_slice(middle);
                    bytes[4092..].copy_from_slice(&descriptor.trailing);
                    self.sectors.insert(at / SECTOR, bytes);
                }
                None if len > 0 => {
                    let kept = self.sectors.split_off(&(stop / SECTOR));
                    self.sectors.split_off(&(at / SECTOR));
                    self.sectors.extend(kept);
                    zeros.add(at, len);
                }
                None => {}
            }
            Some(())
        });
        wrong.map_or(Ok(()), |(at, len)| {
            Err(Error::corrupt(format!("the log changes {len} bytes at {at}, which it must not")))
        })
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty() && self.zeros.is_empty()
    }

    /// Makes bytes that were read from `at` on what they are after the replay.
    pub fn patch(&self, at: u64, buf: &mut [u8]) {
        let end = at.saturating_add(buf.len() as u64);
        let within = |from: u64, to: u64| {
            let place = |n: u64| usize::try_from(n.clamp(at, end) - at).unwrap_or(usize::MAX);
            place(from)..place(to)
        };
        let first = self.zeros.partition_point(|(_, to)| *to <= at);
        for (from, to) in self.zeros[first..].iter().take_while(|(from, _)| *from < end) {
            buf[within(*from, *to)].fill(0);
        }
        for (number, sector) in self.sectors.range(at / SECTOR..end.div_ceil(SECTOR)) {
            let start = number * SECTOR;
            let range = within(start, start + SECTOR);
            let skip = usize::try_from(at.saturating_sub(start)).unwrap_or(0);
            let len = range.len();
            buf[range].copy_from_slice(&sector[skip..skip + len]);
        }
    }

    /// Puts everything in its place. Doing it twice does no harm.
    pub fn apply(&self, storage: &dyn Storage) -> storage::Result<()> {
        if !storage.facts().fixed_len && storage.len()? < self.end {
            storage.set_len(self.end, Preallocation::Off)?;
        }
        for (from, to) in &self.zeros {
            storage.zero(*from, to - from, Zeroing::Punch)?;
        }
        for (number, sector) in &self.sectors {
            storage.write_at(number * SECTOR, &sector[..])?;
        }
        storage.flush()
    }
}

const _: () = assert!(MOST.is_multiple_of(MIB));
