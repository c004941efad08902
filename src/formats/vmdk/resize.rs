//! Growing and shrinking a vmdk, which the reference cannot do.
//!
//! One write, or one rename, gives the image its new size; what is before it changes nothing that anybody reads, and
//! what is after it can be missing. Stopped anywhere, the image opens with its old or its new size and all its
//! content:
//!
//! * sparse, growing: new tables, then the header that uses them (with the old size first, where what a longer backing
//!   file holds has to be covered by zeros), then the text, whose numbers are copies;
//! * flat, growing: the file, then the text;
//! * growing past the last extent of a split image: new files, then the text that names them. A sparse last extent
//!   stays as short as it is then, because its size is in its own header: two files cannot change at once. If it
//!   ends within a grain it is brought to the grain's end before (a stop just then leaves the disk longer by that
//!   much): no grain may lie in two extents;
//! * shrinking, sparse: the header, then what lies beyond is cleared, then the text; flat: the text, then the file is
//!   cut. What a stop left beyond the end is cleared before the next growth shows it.
//!
//! Whether all that lies where nothing else does is known before the first write (`intact.rs`).

use std::cmp::Ordering::{Equal, Greater, Less};
use std::sync::atomic::Ordering;

use crate::block::error::Context;
use crate::block::{BlockDriver, Error, HostOffset, NoFiles, Resize, ResizeFiles, Result};
use crate::storage::{Preallocation, Storage, Zeroing};

use super::create::{SPLIT, SUBFORMATS, SparseLayout, Subformat, extent_name};
use super::descriptor::{self, ExtentAccess};
use super::layout::*;
use super::{Body, VmdkDriver, VmdkPart, intact, whole};

impl Resize for VmdkDriver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.plan(size, fill).map(drop)
    }

    fn check_over(&self, size: u64, fill: Preallocation, covered: u64) -> Result<()> {
        self.plan_over(size, fill, covered).map(drop)
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.resize_with(size, fill, &NoFiles)
    }

    fn resize_with(&self, size: u64, fill: Preallocation, files: &dyn ResizeFiles) -> Result<()> {
        let covered = if self.backing.is_some() { files.covered().min(size) } else { 0 };
        let plan = self.plan_over(size, fill, covered)?;
        self.write_out()?;
        for extent in &plan.more {
            let storage = files.beside(&self.descriptor.name(&extent.name))?;
            let failed = || format!("Could not create '{}'", extent.name);
            match plan.flat {
                true => storage.set_len(extent.size, fill).with_context(failed)?,
                false => SparseLayout::new(extent.size, plan.zeroed)?.write(&*storage).with_context(failed)?,
            }
        }
        let VmdkResizePlan { last, len, .. } = plan;
        match &last.body {
            Body::Flat { file, offset } => {
                let storage = &self.files[*file].storage;
                if len >= last.len() {
                    grow_flat(&**storage, *offset + last.len(), *offset + len, fill)?;
                    self.tell(&plan, files)?;
                } else {
                    self.tell(&plan, files)?;
                    cut_flat(&**storage, *offset + last.len(), *offset + len)?;
                }
            }
            Body::Sparse { sparse, .. } => {
                match len.cmp(&last.len()) {
                    Less => sparse.shrink(len)?,
                    Equal => {}
                    Greater => sparse.grow(len, covered.saturating_sub(last.start.get()))?,
                }
                self.tell(&plan, files)?;
            }
            _ => self.tell(&plan, files)?,
        }
        last.len.store(len, Ordering::Relaxed);
        self.size.store(size, Ordering::Relaxed);
        self.write_out()
    }
}

/// What a resize will do.
struct VmdkResizePlan<'a> {
    /// The last extent.
    last: &'a VmdkPart,
    /// Its new length.
    len: u64,
    /// The disk's new length.
    size: u64,
    /// What comes behind the last extent.
    more: Vec<NewExtent>,
    /// Whether those are flat.
    flat: bool,
    /// Whether those have zeroed grains.
    zeroed: bool,
}

impl VmdkResizePlan<'_> {
    /// The descriptor's text with the new sizes.
    fn text(&self, text: &str) -> String {
        let last = text.lines().enumerate().filter(|(_, line)| is_extent_line(line)).map(|(index, _)| index).last();
        let mut out = String::with_capacity(text.len() + 8);
        for (index, line) in text.split_inclusive('\n').enumerate() {
            match index {
                index if Some(index) == last => {
                    out.push_str(&with_sectors(line, self.len / SECTOR));
                    let end = if line.ends_with("\r\n") { "\r\n" } else { "\n" };
                    if !self.more.is_empty() && !line.ends_with('\n') {
                        out.push_str(end);
                    }
                    for extent in &self.more {
                        let sectors = extent.size / SECTOR;
                        match self.flat {
                            true => out.push_str(&format!("RW {sectors} FLAT \"{}\" 0{end}", extent.name)),
                            false => out.push_str(&format!("RW {sectors} SPARSE \"{}\"{end}", extent.name)),
                        }
                    }
                }
                _ => out.push_str(line),
            }
        }
        let heads = if out.contains("ddb.geometry.heads = \"255\"") { 255 } else { 16 };
        let cylinders = self.size / (63 * heads * SECTOR);
        descriptor::with_value(&out, "ddb.geometry.cylinders", &cylinders.to_string())
    }
}

/// An extent that a split image gets when it grows.
struct NewExtent {
    name: String,
    size: u64,
}

impl VmdkDriver {
    /// Decides, and refuses what cannot be done. Changes nothing.
    fn plan(&self, size: u64, fill: Preallocation) -> Result<VmdkResizePlan<'_>> {
        let old = self.virtual_size();
        let Some(last) = self.parts.last() else {
            return Err(Error::unsupported("An image without extents cannot be resized"));
        };
        if last.end() != old {
            return Err(Error::unsupported("The image has new extents: it has to be opened again"));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        let flat = matches!(last.body, Body::Flat { .. });
        if fill != Preallocation::Off && (!flat || fill == Preallocation::Metadata) {
            return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name())));
        }
        let start = last.start.get();
        if size < old && size <= start {
            return Err(Error::unsupported(format!(
                "An image of several extents can only shrink within its last one, down to {} bytes",
                start + SECTOR
            )));
        }
        let mut plan = VmdkResizePlan { last, len: size - start, size, more: Vec::new(), flat, zeroed: false };
        if let Body::Sparse { sparse, .. } = &last.body {
            plan.zeroed = sparse.shape.zeroed;
        }
        let kind = self.descriptor.create_type.to_ascii_lowercase();
        let subformat =
            SUBFORMATS.iter().find(|subformat| subformat.split && subformat.name.to_ascii_lowercase() == kind);
        if let Some(subformat) = subformat.filter(|_| plan.len > SPLIT.max(last.len())) {
            plan.len = match &last.body {
                Body::Sparse { sparse, .. } => last.len().next_multiple_of(sparse.shape.grain).min(plan.len),
                _ => SPLIT.max(last.len()),
            };
            plan.more = self.more_extents(subformat, size - start - plan.len);
            if self.backing.is_some() {
                return Err(Error::unsupported(
                    "A split image with a backing file can only grow to the end of its last extent, of 2 GiB",
                ));
            }
            if self.parts.len() + plan.more.len() > MAX_EXTENTS {
                return Err(Error::unsupported("The image size is too large for file format 'vmdk'"));
            }
        }
        match (&last.body, last.access) {
            (Body::Flat { file, offset }, ExtentAccess::ReadWrite) => {
                self.alone(*file)?;
                let storage = &self.files[*file].storage;
                if storage.len().context("Failed to resize underlying file")? < (*offset + last.len()).get() {
                    let name = &self.files[*file].name;
                    return Err(Error::corrupt(format!("'{name}' is cut short: a part of the disk is missing")));
                }
            }
            (Body::Zero, ExtentAccess::ReadWrite) => {}
            (Body::Sparse { file, sparse }, ExtentAccess::ReadWrite) if sparse.hosted => {
                if plan.len.div_ceil(sparse.shape.span()) > MAX_TABLES {
                    return Err(Error::unsupported("The image size is too large for file format 'vmdk'"));
                }
                if plan.len < last.len() && sparse.shape.compressed {
                    return Err(Error::unsupported("a stream-optimized image cannot shrink; convert it"));
                }
                self.alone(*file)?;
                let (at, room) = self.text_at;
                whole::check(sparse)?;
                intact::check(sparse, room.map(|room| (at, room)))?;
            }
            _ => return Err(Error::unsupported("An extent of this kind cannot be resized")),
        }
        Ok(plan)
    }

    /// The same over a backing file that covers the first `covered` bytes.
    fn plan_over(&self, size: u64, fill: Preallocation, covered: u64) -> Result<VmdkResizePlan<'_>> {
        let plan = self.plan(size, fill)?;
        if let Body::Sparse { sparse, .. } = &plan.last.body
            && sparse.shape.compressed
            && covered > plan.last.end()
        {
            // Grains of zeros would have to come before the end of the stream.
            return Err(Error::unsupported("a stream-optimized image cannot grow over a longer backing file"));
        }
        // What has no room in the end is refused now.
        self.changed(|text| plan.text(text))?;
        Ok(plan)
    }

    /// Refuses a file that two extents share, or that the descriptor is in: there is no telling what lies behind the
    /// last of them.
    fn alone(&self, file: usize) -> Result<()> {
        let is = |index: usize| self.files.get(index).map(|child| (&child.name, child.storage.facts().identity));
        let same = |other: usize| match (is(other), is(file)) {
            (Some((_, Some(a))), Some((_, Some(b)))) => a == b,
            (Some((a, _)), Some((b, _))) => a == b,
            _ => false,
        };
        match (0..self.files.len()).filter(|other| *other != file).any(same) {
            true => Err(Error::unsupported("An extent that shares its file with another one cannot be resized")),
            false => Ok(()),
        }
    }

    /// Files of 2 GiB, the last one shorter, that hold `rest` bytes behind the last extent of a split image.
    fn more_extents(&self, subformat: &Subformat, rest: u64) -> Vec<NewExtent> {
        let main = self.files.first().map_or("", |file| &file.name);
        let last = self.descriptor.extents.last().map_or("", |line| &line.file);
        let (mut rest, mut more) = (rest, Vec::new());
        while rest > 0 && more.len() <= MAX_EXTENTS {
            let number = self.parts.len() + more.len();
            let name = numbered(last, number + 1)
                .unwrap_or_else(|| extent_name(main.as_ref(), subformat, number).to_string_lossy().into_owned());
            let size = rest.min(SPLIT);
            more.push(NewExtent { name, size });
            rest -= size;
        }
        more
    }

    /// Puts the new sizes in the descriptor: the last extent's sectors, new extents behind it, and the cylinders.
    fn tell(&self, plan: &VmdkResizePlan<'_>, files: &dyn ResizeFiles) -> Result<()> {
        self.replace_text(|text| plan.text(text), files)
    }
}

/// An extent's line with another number of sectors.
fn with_sectors(line: &str, new: u64) -> String {
    let head = line.len() - line.trim_start().len();
    let word = |at: usize| line.get(at..).map_or(0, |rest| rest.find(char::is_whitespace).unwrap_or(rest.len()));
    let gap = |at: usize| line.get(at..).map_or(0, |rest| rest.len() - rest.trim_start().len());
    let start = head + word(head);
    let start = start + gap(start);
    let end = start + word(start);
    match (line.get(..start), line.get(end..)) {
        (Some(before), Some(after)) => format!("{before}{new}{after}"),
        _ => line.to_owned(),
    }
}

/// Makes the file of a flat extent long enough; what lies there already behind the extent becomes zero.
fn grow_flat(storage: &dyn Storage, old: HostOffset, new: HostOffset, fill: Preallocation) -> Result<()> {
    let (HostOffset(old), HostOffset(new)) = (old, new);
    let failed = "Failed to resize underlying file";
    let len = storage.len().context(failed)?;
    let how = match fill {
        Preallocation::Off | Preallocation::Metadata => Zeroing::Punch,
        Preallocation::Falloc => Zeroing::Allocate,
        Preallocation::Full => Zeroing::Write,
    };
    if len.min(new) > old {
        storage.zero(old, len.min(new) - old, how).context(failed)?;
    }
    if len < new { storage.set_len(new, fill).context(failed) } else { Ok(()) }
}

/// Cuts the file of a flat extent, unless there is more behind it: then its end becomes zero.
fn cut_flat(storage: &dyn Storage, old: HostOffset, new: HostOffset) -> Result<()> {
    let (HostOffset(old), HostOffset(new)) = (old, new);
    let failed = "Failed to resize underlying file";
    let len = storage.len().context(failed)?;
    match len {
        len if len > old || storage.facts().fixed_len => storage.zero(new, old - new, Zeroing::Punch).context(failed),
        len if len > new => storage.set_len(new, Preallocation::Off).context(failed),
        _ => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::{numbered, with_sectors};

    #[test]
    fn sectors_are_replaced_in_their_place() {
        assert_eq!(with_sectors("  RW \t 55 FLAT \"a55\" 55\r\n", 7), "  RW \t 7 FLAT \"a55\" 55\r\n");
        assert_eq!(with_sectors("RW 1 ZERO", 1234), "RW 1234 ZERO");
        assert_eq!(with_sectors("RW", 7), "RW7");
    }

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
