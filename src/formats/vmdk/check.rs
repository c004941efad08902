//! Checks the extents of a vmdk: that each is there as long as the disk needs it, and its grain tables (`inspect.rs`).

use std::collections::HashSet;

use super::inspect::{InspectedExtent, mend};
use super::layout::*;
use super::sesparse::SeSparse;
use super::tables::Grain;
use super::{Body, VmdkDriver, VmdkPart};
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{Check, CheckReport, Error, ErrorKind, Findings, Fix, Result};
use crate::formats::claims::Claims;
use crate::storage::Storage;

impl Check for VmdkDriver {
    fn check(&self, fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let mut tally = Tally::new(findings);
        let lines = self.descriptor.extents.iter().map(Some).chain(std::iter::repeat(None));
        for (part, line) in self.parts.iter().zip(lines) {
            match &part.body {
                Body::Flat { file, offset } => {
                    let file = &self.files[*file];
                    let length = file.storage.len().with_context(|| format!("{}: no length", file.name))?;
                    let end = (*offset + part.len()).get();
                    if length.checked_next_multiple_of(SECTOR).is_some_and(|length| length < end) {
                        tally.wrong(format!("{} ends at {length}, and its extent at {end}", file.name));
                    }
                }
                Body::Sparse { file, sparse } => {
                    let text = match (*file, self.text_at) {
                        (0, (at, Some(len))) => Some((at, len)),
                        _ => None,
                    };
                    let capacity = sparse.state().capacity;
                    if let Some(line) = line.filter(|line| line.sectors != capacity) {
                        let (name, said) = (&sparse.name, line.sectors);
                        tally.wrong(format!("{name} has {capacity} sectors, and {said} by its line in the descriptor"));
                    }
                    let extent = InspectedExtent::read(sparse, Sectors::within(part.start.get()), text)?;
                    let verdict = extent.look(&mut tally)?;
                    if fix.corruptions() {
                        mend(sparse, &extent, &verdict, &mut tally)?;
                    }
                }
                Body::SeSparse { file, sparse } => {
                    let file = &self.files[*file];
                    look_at_sesparse(sparse, part, &*file.storage, &file.name, &mut tally)?;
                }
                Body::Closed { .. } | Body::Zero | Body::Forbidden => {}
            }
        }
        Ok(tally.report)
    }
}

/// Damage is a finding.
fn finding<T>(error: Error) -> Result<std::result::Result<T, String>> {
    match error.kind {
        ErrorKind::Corrupt | ErrorKind::Truncated => Ok(Err(error.message())),
        _ => Err(error),
    }
}

/// Walks the tables of a space-efficient extent as its readers do.
fn look_at_sesparse(
    sparse: &SeSparse,
    part: &VmdkPart,
    storage: &dyn Storage,
    name: &str,
    tally: &mut Tally<'_>,
) -> Result<()> {
    let length = storage.len().with_context(|| format!("{name}: no length"))?;
    for (window, mut claims) in Claims::windows(length).enumerate() {
        // A table is walked once.
        let mut seen = HashSet::new();
        let mut tell = |text: String, found_here: bool| {
            if window == 0 || found_here {
                tally.wrong(text);
            }
        };
        for index in 0..part.len().div_ceil(SeSparse::SPAN) {
            match sparse.table(index).map(Ok).or_else(finding)? {
                Ok(None) => continue,
                Ok(Some(table)) if seen.insert(table) => {}
                Ok(Some(table)) => {
                    tell(
                        format!("{name}: directory entry {index} names grain table {table}, as another one does"),
                        false,
                    );
                    continue;
                }
                Err(text) => {
                    tell(format!("{name}: directory entry {index}: {text}"), false);
                    continue;
                }
            }
            let mut at = index * SeSparse::SPAN;
            let end = (at + SeSparse::SPAN).min(part.len());
            while at < end {
                let Sectors(sector) = Sectors::within((part.start + at).get());
                let (grain, len) = match sparse.map(at, end - at).map(Ok).or_else(finding)? {
                    Ok(found) => found,
                    Err(text) => {
                        tell(format!("{name}: sector {sector}: {text}"), false);
                        (Grain::Unallocated, SeSparse::GRAIN)
                    }
                };
                if let Grain::At(host) = grain {
                    let host = host.bytes();
                    if host.saturating_add(len) > length.next_multiple_of(SECTOR) {
                        tell(format!("cluster offset for sector {sector} points after EOF"), false);
                    } else if !claims.claim(host, len) {
                        tell(format!("{name}: cluster for sector {sector} overlaps what else is there"), true);
                    }
                }
                at += len;
            }
        }
    }
    Ok(())
}
