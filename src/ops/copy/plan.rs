//! The plan: the walk over the sources' maps in guest order, cut into chunks for the workers.
//!
//! Invariants: a chunk starts and ends at a unit of the target (or at the end of the disk), so that no two
//! workers ever share one; a compressed unit of a source lies in one chunk, so that it is decoded once; what
//! needs no writing is in no chunk. The cuts depend on the maps alone, never on timing. Where a map cannot be
//! read and the copy goes on (`--salvage`), there are zeros, as short as a sector.

use super::Observer;
use super::host_copy::HostCopy;
use super::segment::{Content, Segment};
use super::source::Joined;
use super::zero::SECTOR;
use crate::block::{Error, ErrorKind, ExtentKind, Result};

/// Guest data in most chunks, before rounding to units.
pub const CHUNK: u64 = 2 << 20;

/// The longest run of zeros that is one piece of work.
const ZERO_CHUNK: u64 = 1 << 30;

/// What the cuts depend on.
#[derive(Debug, Clone, Copy)]
pub struct PlanShape {
    /// What is allocated as a whole in the target; 1 where nothing is.
    pub unit: u64,
    /// What zeros need.
    pub zeros: Zeros,
    /// Guest data in one chunk, before rounding to units.
    pub chunk: u64,
}

/// What zeros in the sources need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeros {
    /// Nothing: the target reads as zeros already.
    Skip,
    /// To be made, in the cheapest way.
    Make,
    /// To be written like data.
    Write,
}

impl PlanShape {
    /// The most bytes that a chunk spans.
    fn longest(&self) -> u64 {
        // Rounded out to units, and then to the end of a compressed unit of a source.
        self.chunk + 2 * self.unit.max(1 << 20)
    }

    fn up(&self, at: u64) -> u64 {
        at.checked_next_multiple_of(self.unit).unwrap_or(u64::MAX)
    }
}

/// A piece of work.
#[derive(Debug, Default)]
pub struct Chunk<'a> {
    /// Its place in the order, from 0.
    pub number: u64,
    /// Where it starts on the target.
    pub at: u64,
    /// Its length.
    pub len: u64,
    /// Nothing but zeros are to be made: there are no segments.
    pub zero: bool,
    /// What it is to hold, in order, without a gap.
    pub segments: Vec<Segment<'a>>,
    /// From there on zeros are looked for in what is stored.
    pub search_from: u64,
}

impl<'a> Chunk<'a> {
    /// Where it ends.
    pub fn end(&self) -> u64 {
        self.at + self.len
    }

    /// Makes `part` that part of it.
    pub fn part(&self, at: u64, len: u64, part: &mut Chunk<'a>) {
        part.segments.clear();
        (part.number, part.at, part.len, part.zero) = (self.number, at, len, false);
        part.search_from = self.search_from;
        let (first, end) = (self.segments.partition_point(|segment| segment.end() <= at), part.end());
        for segment in self.segments.iter().skip(first).take_while(|segment| segment.at < end) {
            let mut inside = *segment;
            if inside.at < at {
                inside = inside.split(at - inside.at).1;
            }
            if inside.end() > end {
                inside = inside.split(end - inside.at).0;
            }
            part.segments.push(inside);
        }
    }

    /// The segment at that place.
    pub fn segment(&self, at: u64) -> Option<&Segment<'a>> {
        self.segments.get(self.segments.partition_point(|segment| segment.end() <= at))
    }

    /// Whether some of it is to be what the target has already.
    pub fn keeps(&self) -> bool {
        self.segments.iter().any(|segment| matches!(segment.content, Content::Keep))
    }

    /// Whether it is known without reading it what is to be written.
    pub fn is_unsearched(&self) -> bool {
        self.end() <= self.search_from && !self.keeps()
    }
}

/// The walk.
pub struct CopyPlan<'a> {
    source: &'a Joined,
    shape: PlanShape,
    at: u64,
    number: u64,
    pending: Option<Segment<'a>>,
    /// Where the run of data that we are in is to be cut next, and whether it is a run of zeros.
    cut: Option<(u64, bool)>,
    /// Is told of maps that cannot be read, where the copy goes on without them.
    salvage: Option<&'a dyn Observer>,
    /// As long as the host can copy all that was met.
    host: Option<HostCopy<'a>>,
    search_from: u64,
    noted: bool,
    /// Where what was last found missing ends: what goes on there is told no more.
    missing_to: u64,
}

impl<'a> CopyPlan<'a> {
    /// A walk over all of it.
    pub fn new(source: &'a Joined, shape: PlanShape, salvage: Option<&'a dyn Observer>) -> Self {
        Self {
            source,
            shape,
            at: 0,
            number: 0,
            pending: None,
            cut: None,
            salvage,
            host: None,
            search_from: 0,
            noted: false,
            missing_to: u64::MAX,
        }
    }

    /// Guest data in most chunks.
    pub fn chunk_len(&self) -> u64 {
        self.shape.chunk.max(1)
    }

    /// The same, where the host is asked to copy what it can.
    pub fn copied_by_host(mut self, host: Option<HostCopy<'a>>) -> Self {
        self.search_from = if host.is_some() { u64::MAX } else { 0 };
        self.host = host;
        self
    }

    fn segment(&mut self) -> Result<Option<Segment<'a>>> {
        if let Some(segment) = self.pending.take() {
            return Ok(Some(segment));
        }
        let left = self.source.total() - self.at;
        if left == 0 {
            return Ok(None);
        }
        let mut segment = match (self.source.map(self.at, left), self.salvage) {
            (Err(error), Some(observer)) => self.lost(error, observer),
            (Ok(segment), Some(observer)) => self.without_missing(segment, observer)?,
            (mapped, _) => mapped?,
        };
        if let (Some(host), Content::Stored(mapping)) = (&mut self.host, &segment.content)
            && let taken = host.takes(mapping, segment.len)?
            && taken < segment.len
        {
            self.host = None;
            self.search_from = segment.at + taken;
            if taken > 0 {
                segment = segment.split(taken).0;
            }
        }
        Ok(Some(segment))
    }

    /// Zeros in place of data that lies past the end of its file.
    fn without_missing(&mut self, segment: Segment<'a>, observer: &dyn Observer) -> Result<Segment<'a>> {
        let Content::Stored(mapping) = segment.content else { return Ok(segment) };
        match mapping.there()? {
            0 => {
                self.tell_missing(segment.at, segment.end(), &mapping.missing(), observer);
                Ok(Segment { content: Content::Zero, ..segment })
            }
            there if there < segment.len => Ok(segment.split(there).0),
            _ => Ok(segment),
        }
    }

    /// Once for a range, however many pieces it comes in.
    fn tell_missing(&mut self, at: u64, to: u64, error: &Error, observer: &dyn Observer) {
        if at != self.missing_to {
            observer.warn(&format!("{}; it is read as zeros", error.message()));
        }
        self.missing_to = to;
    }

    /// Zeros from where we stand to where the map can be read again. How far that is has to be tried.
    fn lost(&mut self, error: Error, observer: &dyn Observer) -> Segment<'a> {
        let (start, end) = (self.at, self.source.total());
        let (mut at, mut error) = (start, error);
        loop {
            if !std::mem::replace(&mut self.noted, true) {
                error.all_notes().iter().for_each(|line| observer.note(line));
            }
            let next = at.saturating_add(SECTOR).min(end);
            match error.kind {
                ErrorKind::Truncated => self.tell_missing(at, next, &error, observer),
                _ => observer.warn(&format!("error while reading block status at offset {at}: {}", error.cause())),
            }
            at = next;
            if at >= end || at - start >= CHUNK {
                break;
            }
            match self.source.map(at, end - at) {
                Ok(_) => break,
                Err(next) => error = next,
            }
        }
        Segment { at: start, len: at - start, content: Content::Zero }
    }

    /// How much of the start of a run that is not stored is whole units (the walk stands at a unit).
    fn whole(&self, segment: &Segment<'_>) -> u64 {
        if self.is_data(segment) {
            0
        } else if segment.end() >= self.source.total() {
            segment.len
        } else {
            segment.len / self.shape.unit * self.shape.unit
        }
    }

    fn put_back(&mut self, segment: Segment<'a>) {
        self.at = segment.at;
        self.pending = Some(segment);
    }

    /// The next piece of work, into `chunk`; false when there is none left.
    pub fn next(&mut self, chunk: &mut Chunk<'a>) -> Result<bool> {
        chunk.segments.clear();
        chunk.zero = false;
        chunk.len = 0;
        // Whole units that hold nothing.
        let first = loop {
            let Some(segment) = self.segment()? else { return Ok(false) };
            let whole = self.whole(&segment);
            if whole == 0 {
                break segment;
            }
            self.cut = None;
            let make = matches!(segment.content, Content::Zero) && self.shape.zeros == Zeros::Make;
            let limit = ZERO_CHUNK.max(self.shape.unit) / self.shape.unit * self.shape.unit;
            let whole = if make { whole.min(limit) } else { whole };
            self.at = segment.at + whole;
            if whole < segment.len {
                self.pending = Some(segment.split(whole).1);
            }
            if make {
                self.number(chunk, segment.at, whole);
                chunk.zero = true;
                return Ok(true);
            }
        };
        let start = first.at;
        let end = self.source.total();
        // Several runs that are close together share a chunk until it is full.
        let more = if self.shape.unit < self.shape.chunk { self.shape.unit } else { 0 };
        let full = self.shape.up(start.saturating_add(self.shape.chunk)).saturating_add(more).min(end);
        let mut next = Some(first);
        while let Some(segment) = next {
            let aligned = segment.at == self.shape.up(segment.at);
            if segment.at > start && aligned && (segment.at >= full || self.whole(&segment) > 0) {
                self.put_back(segment);
                break;
            }
            let stop = if self.is_data(&segment) {
                self.data_stop(&segment, start, full)
            } else {
                self.cut = None;
                self.shape.up(segment.at + 1)
            };
            let stop = stop.min(end);
            let (taken, rest) = match stop.checked_sub(segment.at) {
                Some(len) if len > 0 && len < segment.len => {
                    let (head, tail) = segment.split(len);
                    (head, Some(tail))
                }
                _ => (segment, None),
            };
            self.at = taken.end();
            self.pending = rest;
            if chunk.segments.last_mut().is_none_or(|last| !last.join(&taken)) {
                chunk.segments.push(taken);
            }
            if self.is_data(&taken) && taken.end() >= stop {
                break;
            }
            next = self.segment()?;
        }
        self.number(chunk, start, self.at - start);
        Ok(true)
    }

    fn is_data(&self, segment: &Segment<'_>) -> bool {
        match segment.content {
            Content::Stored(_) => true,
            Content::Zero => self.shape.zeros == Zeros::Write,
            Content::Keep => false,
        }
    }

    /// Where the chunk that started at `start` ends, seen from the data that comes next: always past its start.
    fn data_stop(&mut self, segment: &Segment<'_>, start: u64, full: u64) -> u64 {
        let zero = matches!(segment.content, Content::Zero);
        let mut cut = match self.cut {
            Some((cut, of_zeros)) if of_zeros == zero => cut,
            _ => segment.at.saturating_add(self.shape.chunk),
        };
        if segment.at == start && cut <= start {
            cut = cut.saturating_add(self.shape.chunk).max(start.saturating_add(1));
        }
        self.cut = Some((cut, zero));
        let stop = self.shape.up(cut).min(full).max(self.shape.up(segment.at + 1));
        let Content::Stored(mapping) = segment.content else { return stop };
        let ExtentKind::Compressed(unit) = mapping.kind else { return stop };
        // Rather a longer chunk than a unit decoded twice.
        let left = unit.start.get().saturating_add(unit.len).saturating_sub(mapping.start.get());
        let unit_end = segment.at.saturating_add(left.min(segment.len));
        let longest = start.saturating_add(self.shape.longest());
        if stop < unit_end && unit_end <= longest { self.shape.up(unit_end) } else { stop }
    }

    fn number(&mut self, chunk: &mut Chunk<'a>, at: u64, len: u64) {
        chunk.at = at;
        chunk.len = len;
        chunk.number = self.number;
        chunk.search_from = self.search_from;
        self.number += 1;
    }
}
