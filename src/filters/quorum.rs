//! `quorum`: several copies of a disk, of which the majority is believed; writes go to all of them.
//!
//! A read or a write is good if so many copies agree as `vote-threshold` says; with `read-pattern=fifo` the first copy
//! that can be read is.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::block::error::Context;
use crate::block::filter::{Filter, FilterRequest, Filtered, Lower};
use crate::block::keys::{take_number, take_switch, take_text};
use crate::block::{Error, Result};
use crate::storage::lock::Access;
use crate::storage::{self, Event, Facts, HostExtent, HostFile, HostKind, Preallocation, Storage, Zeroing};

/// The filter.
#[derive(Debug)]
pub struct Quorum;

/// Its options.
const OPTIONS: [&str; 4] = ["vote-threshold", "blkverify", "rewrite-corrupted", "read-pattern"];
/// The most copies.
const MOST: usize = 32;

impl Filter for Quorum {
    fn name(&self) -> &'static str {
        "quorum"
    }

    fn children(&self) -> &'static [Lower] {
        &[Lower::Images("children")]
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Filtered> {
        let FilterRequest { options, below, listed, .. } = request;
        let given = OPTIONS.iter().filter_map(|key| Some(((*key).to_owned(), options.get(*key)?.clone())));
        let strong: Map<String, Value> = given.collect();
        if listed.is_empty() {
            return Err(Error::invalid("Number of provided children must be 1 or more"));
        }
        if listed.len() > MOST {
            return Err(Error::unsupported(format!("A quorum of more than {MOST} children is not supported")));
        }
        let few = || Error::invalid("Parameter 'vote-threshold' expects a value >= 1");
        let threshold = match take_text(options, "vote-threshold") {
            Some(text) if text.starts_with('-') && text[1..].parse::<u64>().is_ok() => return Err(few()),
            Some(text) => {
                options.insert("vote-threshold".to_owned(), text.into());
                take_number(options, "vote-threshold")?.unwrap_or(0)
            }
            None => 0,
        };
        let threshold = usize::try_from(threshold).unwrap_or(usize::MAX);
        if threshold == 0 {
            return Err(few());
        }
        if threshold > listed.len() {
            return Err(Error::invalid("threshold may not exceed children count"));
        }
        let first = match take_text(options, "read-pattern").as_deref() {
            None | Some("quorum") => false,
            Some("fifo") => true,
            Some(_) => return Err(Error::invalid("Please set read-pattern as fifo or quorum")),
        };
        let verify = take_switch(options, "blkverify")?.unwrap_or(false);
        let rewrite = take_switch(options, "rewrite-corrupted")?.unwrap_or(false);
        if verify && !first && (listed.len() != 2 || threshold != 2) {
            return Err(Error::invalid(
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
            ));
        }
        if verify && rewrite && !first {
            return Err(Error::invalid("rewrite-corrupted=on cannot be used with blkverify=on"));
        }
        let mut copies = Vec::new();
        let mut writes = false;
        for role in &listed {
            let opened = below(role)?;
            writes = opened.write;
            copies.push(opened.child.storage);
        }
        if rewrite && !first && !writes {
            return Err(Error::invalid("Block node is read-only"));
        }
        let mut lengths = copies.iter().map(|copy| copy.len());
        let length = lengths.next().unwrap_or(Ok(0)).context("Could not refresh total sector count")?;
        for other in lengths {
            if other.context("Could not refresh total sector count")? != length {
                return Err(Error::invalid("Could not refresh total sector count: Input/output error"));
            }
        }
        let storage =
            Arc::new(Voted { copies, threshold, first, verify: verify && !first, rewrite: rewrite && !first });
        Ok(Filtered { storage, path: None, strong, access: Access::NONE })
    }
}

#[derive(Debug)]
struct Voted {
    copies: Vec<Arc<dyn Storage>>,
    threshold: usize,
    first: bool,
    verify: bool,
    rewrite: bool,
}

impl Voted {
    /// Does it to every copy. Good if enough of them are.
    fn each(&self, act: impl Fn(&dyn Storage) -> storage::Result<()>) -> storage::Result<()> {
        let (mut good, mut failed) = (0, None);
        for copy in &self.copies {
            match act(&**copy) {
                Ok(()) => good += 1,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            Some(error) if good < self.threshold => Err(error),
            _ => Ok(()),
        }
    }

    fn read_first(&self, at: u64, buf: &mut [u8]) -> storage::Result<()> {
        let mut failed = None;
        for copy in &self.copies {
            match copy.read_at(at, buf) {
                Ok(()) => return Ok(()),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn vote(&self, at: u64, buf: &mut [u8]) -> storage::Result<()> {
        let (mut read, mut failed) = (Vec::new(), None);
        for copy in &self.copies {
            let mut bytes = vec![0; buf.len()];
            match copy.read_at(at, &mut bytes) {
                Ok(()) => read.push((copy, bytes)),
                Err(error) => failed = Some(error),
            }
        }
        if read.len() < self.threshold {
            return failed.map_or(Ok(()), Err);
        }
        if self.verify
            && let [(_, a), (_, b)] = read.as_slice()
            && let Some(index) = a.iter().zip(b).position(|(a, b)| a != b)
        {
            let (len, first) = (buf.len(), at.saturating_add(index as u64));
            let text = format!("quorum: offset={at} bytes={len} contents mismatch at offset {first}");
            return Err(storage::Error::Other(text));
        }
        // Versions in the order in which they come; of those with as many votes the last one counts.
        let mut versions: Vec<(usize, usize)> = Vec::new();
        for (index, (_, bytes)) in read.iter().enumerate() {
            match versions.iter_mut().find(|(first, _)| read.get(*first).is_some_and(|(_, other)| other == bytes)) {
                Some((_, votes)) => *votes += 1,
                None => versions.push((index, 1)),
            }
        }
        let winner = versions.iter().max_by_key(|(_, votes)| *votes).filter(|(_, votes)| *votes >= self.threshold);
        let Some((_, won)) = winner.and_then(|(index, _)| read.get(*index)) else {
            let text = format!("quorum: no {} copies agree on {} bytes at offset {at}", self.threshold, buf.len());
            return Err(storage::Error::Other(text));
        };
        buf.copy_from_slice(won);
        if self.rewrite {
            for (copy, _) in read.iter().filter(|(_, bytes)| bytes != won) {
                // A copy that cannot be mended is outvoted again.
                let _ = copy.write_at(at, won);
            }
        }
        Ok(())
    }
}

impl Storage for Voted {
    fn len(&self) -> storage::Result<u64> {
        self.copies.first().map_or(Ok(0), |copy| copy.len())
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> storage::Result<()> {
        if self.first { self.read_first(at, buf) } else { self.vote(at, buf) }
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> storage::Result<()> {
        self.each(|copy| copy.write_at(at, buf))
    }

    /// Zeros where every copy says so.
    fn extent(&self, at: u64, max: u64) -> storage::Result<HostExtent> {
        let mut whole = HostExtent { len: max, kind: HostKind::Zero };
        for copy in &self.copies {
            // Who cannot tell has a vote all the same.
            let one = copy.extent(at, whole.len).unwrap_or(HostExtent::data(whole.len));
            whole.len = one.len;
            if !one.is_zero() {
                whole.kind = HostKind::Data;
            }
        }
        Ok(whole)
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> storage::Result<()> {
        self.each(|copy| copy.zero(at, len, how))
    }

    fn discard(&self, _at: u64, _len: u64) -> storage::Result<()> {
        // What the copies then read as may differ.
        Ok(())
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> storage::Result<()> {
        self.copies.iter().try_for_each(|copy| copy.set_len(len, fill))
    }

    fn flush(&self) -> storage::Result<()> {
        self.each(|copy| copy.flush())
    }

    fn allocated(&self) -> storage::Result<Option<u64>> {
        let mut sum = Some(0);
        for copy in &self.copies {
            sum = sum.zip(copy.allocated()?).and_then(|(a, b): (u64, u64)| a.checked_add(b));
        }
        Ok(sum)
    }

    fn facts(&self) -> Facts {
        let all = || self.copies.iter().map(|copy| copy.facts());
        Facts {
            fixed_len: all().any(|facts| facts.fixed_len),
            new_reads_zero: all().all(|facts| facts.new_reads_zero),
            alignment: all().map(|facts| facts.alignment).max().unwrap_or(1),
            addressed: false,
            ordered: all().any(|facts| facts.ordered),
            by_run: all().any(|facts| facts.by_run),
            ..Facts::PLAIN
        }
    }

    fn host(&self) -> Option<&HostFile> {
        None
    }

    fn announce(&self, event: Event) {
        self.copies.iter().for_each(|copy| copy.announce(event));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::storage::memory::Memory;

    #[test]
    fn outvoted_copies_are_mended_where_that_is_asked_for() {
        for rewrite in [false, true] {
            let copies =
                [b"same", b"same", b"sXme"].map(|bytes| Arc::new(Memory::new(bytes.to_vec())) as Arc<dyn Storage>);
            let voted = Voted { copies: copies.to_vec(), threshold: 2, first: false, verify: false, rewrite };
            let mut read = [0; 3];
            voted.read_at(0, &mut read).unwrap();
            assert_eq!(&read, b"sam");
            let mut third = [0; 4];
            copies[2].read_at(0, &mut third).unwrap();
            assert_eq!(&third, if rewrite { b"same" } else { b"sXme" });
        }
    }
}
