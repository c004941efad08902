//! Growing and shrinking a vmdk, which the reference cannot do.
//!
//! A split image that grows past 2 GiB in its last extent gets further ones: their files are made first.
//!
//! Order of a grow: the new space and the new tables first, then the header that uses them, then the text that
//! tells of it. Stopped anywhere, the image opens with its old or its new size and all its content.

use std::sync::atomic::Ordering;

use crate::block::error::Context;
use crate::block::{BlockDriver, CreateFiles, Error, Resize, Result};
use crate::storage::{Preallocation, Zeroing};

use super::create::{SPLIT, SUBFORMATS, SparseLayout, extent_name};
use super::descriptor::{self, Access};
use super::layout::*;
use super::sparse::{Sparse, entry_bytes, sector32};
use super::{Body, VmdkDriver};

impl Resize for VmdkDriver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        let old = self.virtual_size();
        let Some(last) = self.parts.last() else {
            return Err(Error::unsupported("An image without extents cannot be resized"));
        };
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        let flat = matches!(last.body, Body::Flat { .. });
        if fill != Preallocation::Off && (!flat || fill == Preallocation::Metadata) {
            return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name())));
        }
        if size < old && size <= last.start {
            return Err(Error::unsupported(format!(
                "An image of several extents can only shrink within its last one, down to {} bytes",
                last.start + SECTOR
            )));
        }
        let more = self.more_extents(size);
        if !more.is_empty() && self.backing.is_some() {
            return Err(Error::unsupported(
                "A split image with a backing file can only grow to the end of its last extent, of 2 GiB",
            ));
        }
        if self.parts.len() + more.len() > MAX_EXTENTS {
            return Err(Error::unsupported("The image size is too large for file format 'vmdk'"));
        }
        let size = if more.is_empty() { size } else { last.start + SPLIT };
        match (&last.body, last.access) {
            (Body::Flat { .. } | Body::Zero, Access::ReadWrite) => Ok(()),
            (Body::Sparse { sparse, .. }, _) if sparse.header.is_some() => {
                let tables = (size - last.start).div_ceil(sparse.shape.span());
                if tables > MAX_TABLES {
                    return Err(Error::unsupported("The image size is too large for file format 'vmdk'"));
                }
                Ok(())
            }
            _ => Err(Error::unsupported("An extent of this kind cannot be resized")),
        }
    }

    fn make_files(&self, size: u64, fill: Preallocation, files: &dyn CreateFiles) -> Result<()> {
        for extent in self.more_extents(size) {
            let storage = files.beside(&extent.name)?;
            let zeroed = match self.parts.last().map(|last| &last.body) {
                Some(Body::Sparse { sparse, .. }) => sparse.shape.zeroed,
                _ => {
                    storage
                        .set_len(extent.size, fill)
                        .with_context(|| format!("Could not create '{}'", extent.name))?;
                    continue;
                }
            };
            SparseLayout::new(extent.size, zeroed)?.write(&*storage)?;
        }
        Ok(())
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.check(size, fill)?;
        let old = self.virtual_size();
        self.write_out()?;
        let Some(last) = self.parts.last() else { return Ok(()) };
        let more = self.more_extents(size);
        let len = if more.is_empty() { size - last.start } else { SPLIT };
        let whole = size;
        match &last.body {
            Body::Flat { file, offset } => {
                let storage = &self.files[*file].storage;
                let grow = || storage.set_len(offset + len, fill).context("Failed to resize underlying file");
                if size >= old {
                    grow()?;
                    self.tell(len, whole, &more)?;
                } else {
                    self.tell(len, whole, &more)?;
                    grow()?;
                }
            }
            Body::Sparse { sparse, .. } if size >= old => {
                grow(sparse, len)?;
                self.tell(len, whole, &more)?;
            }
            Body::Sparse { sparse, .. } => {
                // What lies beyond goes first, so that growing again shows zeros, not the old content.
                clear_beyond(sparse, len)?;
                self.tell(len, whole, &more)?;
                set_capacity(sparse, len / SECTOR, None)?;
            }
            _ => self.tell(len, whole, &more)?,
        }
        self.size.store(size, Ordering::Relaxed);
        self.files.iter().try_for_each(|file| file.storage.flush()).context("could not flush")
    }
}

/// An extent that a split image gets when it grows.
struct NewExtent {
    name: String,
    size: u64,
}

impl VmdkDriver {
    /// What comes behind the last extent of a split image of that size: files of 2 GiB, the last one shorter.
    fn more_extents(&self, size: u64) -> Vec<NewExtent> {
        let kind = self.descriptor.create_type.to_ascii_lowercase();
        let subformat =
            SUBFORMATS.iter().find(|subformat| subformat.split && subformat.name.to_ascii_lowercase() == kind);
        let (Some(subformat), Some(last), Some(main)) = (subformat, self.parts.last(), self.files.first()) else {
            return Vec::new();
        };
        let mut rest = size.saturating_sub(last.start).saturating_sub(SPLIT);
        let mut more = Vec::new();
        while rest > 0 && more.len() <= MAX_EXTENTS {
            let number = self.parts.len() + more.len();
            let last = self.descriptor.extents.last().map_or("", |line| &line.file);
            let name = numbered(last, number + 1).unwrap_or_else(|| extent_name(&main.name, subformat, number));
            let size = rest.min(SPLIT);
            more.push(NewExtent { name, size });
            rest -= size;
        }
        more
    }

    /// Puts the new sizes in the descriptor: the last extent's sectors, new extents behind it, and the cylinders.
    fn tell(&self, extent_len: u64, size: u64, more: &[NewExtent]) -> Result<()> {
        let flat = matches!(self.parts.last().map(|last| &last.body), Some(Body::Flat { .. }));
        let old_sectors = self.descriptor.extents.last().map(|line| line.sectors);
        self.rewrite_text(|text| {
            let last = text.lines().enumerate().filter(|(_, line)| is_extent_line(line)).map(|(index, _)| index).last();
            let mut out = String::with_capacity(text.len() + 8);
            for (index, line) in text.split_inclusive('\n').enumerate() {
                match old_sectors {
                    Some(old) if Some(index) == last => {
                        out.push_str(&line.replacen(&old.to_string(), &(extent_len / SECTOR).to_string(), 1));
                        for extent in more {
                            let end = if line.ends_with("\r\n") { "\r\n" } else { "\n" };
                            let sectors = extent.size / SECTOR;
                            match flat {
                                true => out.push_str(&format!("RW {sectors} FLAT \"{}\" 0{end}", extent.name)),
                                false => out.push_str(&format!("RW {sectors} SPARSE \"{}\"{end}", extent.name)),
                            }
                        }
                    }
                    _ => out.push_str(line),
                }
            }
            let heads = if out.contains("ddb.geometry.heads = \"255\"") { 255 } else { 16 };
            let cylinders = size / (63 * heads * SECTOR);
            descriptor::with_value(&out, "ddb.geometry.cylinders", &cylinders.to_string())
        })
    }
}

/// The name of an extent, such as `disk-s003.vmdk`, with another number.
fn numbered(name: &str, number: usize) -> Option<String> {
    let (stem, extension) = name.split_at(name.rfind('.').unwrap_or(name.len()));
    let head = stem.trim_end_matches(|c: char| c.is_ascii_digit());
    let known = stem.len() - head.len() >= 3 && (head.ends_with("-s") || head.ends_with("-f"));
    known.then(|| format!("{head}{number:03}{extension}"))
}

fn is_extent_line(line: &str) -> bool {
    let first = line.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
    matches!(first.as_str(), "RW" | "RDONLY" | "NOACCESS")
}

/// Writes the header's sector with the new capacity, and the directories' new places if they moved.
fn set_capacity(sparse: &Sparse, sectors: u64, moved: Option<(u64, u64)>) -> Result<()> {
    let mut head = [0; SparseHeader::SIZE];
    sparse.storage.read_at(0, &mut head).context("Could not read the header")?;
    let header = SparseHeader::parse(&head).ok_or_else(|| Error::corrupt("Truncated VMDK header"))?;
    let mut header = SparseHeader { capacity: sectors, ..header };
    if let Some((rgd_at, gd_at)) = moved {
        (header.rgd_at, header.gd_at) = (rgd_at, gd_at);
    }
    sparse.storage.write_at(0, &header.to_bytes()).context("Could not write the header")
}

fn grow(sparse: &Sparse, len: u64) -> Result<()> {
    let Some(header) = sparse.header else { return Err(Error::unsupported("not a hosted sparse extent")) };
    let storage = &sparse.storage;
    let mut state = sparse.state();
    let tables = usize::try_from(len.div_ceil(sparse.shape.span())).unwrap_or(usize::MAX);
    if state.stream.is_some() {
        // A second tail behind the first, then the header, then the tail in its place: at every moment the last
        // two sectors of the file are a footer and an end that hold.
        state.gd.resize(tables, 0);
        let new = SparseHeader { capacity: len / SECTOR, ..header };
        let first = state.next;
        let end = storage.len().context("Could not get the length")?.div_ceil(SECTOR);
        let size = super::stream::tail(&new, 0, &state.gd)?.len() as u64;
        let behind = end.max(first + size.div_ceil(SECTOR));
        let put = |at: u64| -> Result<u64> {
            let tail = super::stream::tail(&new, at, &state.gd)?;
            storage.write_at(at * SECTOR, &tail).context("Could not write the footer")?;
            storage.flush().context("Could not flush")?;
            Ok(at * SECTOR + tail.len() as u64)
        };
        put(behind)?;
        set_capacity(sparse, len / SECTOR, None)?;
        let end = put(first)?;
        return storage.set_len(end, Preallocation::Off).context("Could not set the length");
    }
    let old = state.gd.len();
    if tables <= old {
        return set_capacity(sparse, len / SECTOR, None);
    }
    // New tables at the end of the file, and both directories behind them: the old ones stay what they are until
    // the header points at the new.
    let table_sectors = sparse.shape.table_sectors();
    let gd_sectors = (tables as u64 * 4).div_ceil(SECTOR);
    let redundant = state.rgd.is_some();
    let copies = if redundant { 2 } else { 1 };
    let start = state.next;
    let added = (tables - old) as u64;
    let directory = |old: &[u32], at: u64| -> Result<Vec<u32>> {
        let mut new = old.to_vec();
        for table in 0..added {
            new.push(sector32(at + table * table_sectors)?);
        }
        Ok(new)
    };
    let gd = directory(&state.gd, start)?;
    let rgd = match &state.rgd {
        Some(rgd) => Some(directory(rgd, start + added * table_sectors)?),
        None => None,
    };
    let gd_at = start + copies * added * table_sectors;
    let rgd_at = if redundant { gd_at + gd_sectors } else { header.rgd_at };
    let end = (gd_at + copies * gd_sectors).next_multiple_of(header.grain_sectors);
    sector32(end)?;
    storage
        .zero(start * SECTOR, (end - start) * SECTOR, Zeroing::Punch)
        .and_then(|()| storage.set_len(end * SECTOR, Preallocation::Off))
        .context("Failed to resize underlying file")?;
    storage.write_at(gd_at * SECTOR, &entry_bytes(&gd)).context("Could not write the grain directory")?;
    if let Some(rgd) = &rgd {
        storage.write_at(rgd_at * SECTOR, &entry_bytes(rgd)).context("Could not write the grain directory")?;
    }
    storage.flush().context("Could not flush")?;
    set_capacity(sparse, len / SECTOR, Some((rgd_at, gd_at)))?;
    (state.gd, state.rgd, state.next) = (gd, rgd, end);
    Ok(())
}

/// Makes all grains from `len` on unallocated, and the rest of the grain that `len` cuts zero.
fn clear_beyond(sparse: &Sparse, len: u64) -> Result<()> {
    let shape = sparse.shape;
    let mut state = sparse.state();
    if state.stream.is_some() {
        return Err(Error::unsupported("a stream-optimized image cannot shrink; convert it"));
    }
    if !len.is_multiple_of(shape.grain)
        && let super::Grain::At(sector) = state.grain(sparse, len / shape.grain)?
    {
        if shape.compressed {
            return Err(Error::unsupported("a stream-optimized image can only shrink to a multiple of its grain size"));
        }
        let skip = len % shape.grain;
        let at = sector * SECTOR + skip;
        sparse.storage.zero(at, shape.grain - skip, Zeroing::Punch).context("Could not clear the end")?;
    }
    let first = len.div_ceil(shape.grain);
    let last = state.gd.len() as u64 * shape.gtes;
    let mut grain = first;
    while grain < last {
        if grain.is_multiple_of(shape.gtes) {
            let empty = state.empty_tables(sparse, grain / shape.gtes, u64::MAX)?;
            if empty > 0 {
                grain += empty * shape.gtes;
                continue;
            }
        }
        if state.grain(sparse, grain)? != super::Grain::Unallocated {
            if let super::Grain::At(sector) = state.grain(sparse, grain)?
                && !shape.compressed
            {
                sparse.storage.discard(sector * SECTOR, shape.grain).context("Could not give back a grain")?;
            }
            state.change(sparse, grain, 0)?;
        }
        grain += 1;
    }
    state.write_tables(sparse)
}

#[cfg(test)]
mod tests {
    use super::numbered;

    #[test]
    fn extents_are_numbered_on() {
        assert_eq!(numbered("disk-s003.vmdk", 4).as_deref(), Some("disk-s004.vmdk"));
        assert_eq!(numbered("a/b.c-f999.d", 1000).as_deref(), Some("a/b.c-f1000.d"));
        assert_eq!(numbered("disk-f1000", 1001).as_deref(), Some("disk-f1001"));
        assert_eq!(numbered("disk.vmdk", 2), None);
        assert_eq!(numbered("x", 2), None);
        assert_eq!(numbered("\u{fc}\u{fc}.vmdk", 2), None);
    }
}
