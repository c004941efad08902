//! A layer with what lies below it: the backing chain, and the one place where guest data is read and written.
//!
//! The walk down the chain, short backing files (past their end reads zero) and the fill of a partly written
//! unit are each written once, here. No lock is held: drivers are asked, then data moves.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::driver::{Action, Placed, Store, Write};
use super::error::Context;
use super::{BlockDriver, Child, CompressedUnit, Error, ExtentKind, GuestOffset, HostPlace, Result, name};
use crate::storage::{Identity, Storage, Zeroing};

/// Where a node came from.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// The plain name that would open it again, if there is one.
    pub path: Option<OsString>,
    /// The file that it lies in, however deep: names found in the image are relative to it.
    pub base: Option<OsString>,
    /// The whole tree that would open it again.
    pub tree: Map<String, Value>,
    /// A bare file, without a format.
    pub protocol: bool,
    /// Images that it lies in, by role (a format in a format).
    pub inner: Vec<(String, Arc<Node>)>,
}

/// A layer and its backing chain.
pub struct Node {
    driver: Box<dyn BlockDriver>,
    backing: Option<Arc<Node>>,
    name: String,
    origin: Origin,
}

impl fmt::Debug for Node {
    /// Not the whole chain: it may be longer than the stack is deep.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("name", &self.name).field("format", &self.driver.format().name()).finish()
    }
}

impl Drop for Node {
    /// Link by link: a chain may be longer than the stack is deep.
    fn drop(&mut self) {
        let mut next = self.backing.take();
        while let Some(mut node) = next.and_then(Arc::into_inner) {
            next = node.backing.take();
        }
    }
}

/// Where a run of guest bytes is found in a chain.
#[derive(Debug, Clone, Copy)]
pub struct Mapping<'a> {
    /// Where it starts.
    pub start: GuestOffset,
    /// Its length in bytes, at least 1.
    pub len: u64,
    /// What and where: `Unallocated` only if no layer says anything.
    pub kind: ExtentKind,
    /// How many steps down the chain the layer that answered is.
    pub depth: usize,
    /// That layer.
    pub node: &'a Node,
}

impl Mapping<'_> {
    /// Reads as zeros, by the word of a layer or for want of one.
    pub fn is_zero(&self) -> bool {
        matches!(self.kind, ExtentKind::Zero(_) | ExtentKind::Unallocated(_))
    }

    /// The file and offset of plain data.
    pub fn data(&self) -> Option<(&dyn Storage, u64)> {
        match self.kind {
            ExtentKind::Data(place) => self.node.storage(place).ok().map(|storage| (storage, place.at.get())),
            _ => None,
        }
    }
}

/// Buffers that are used again from read to read.
#[derive(Debug, Default)]
pub struct Scratch {
    encoded: Vec<u8>,
    decoded: Vec<u8>,
}

impl Node {
    /// A layer on top of `backing`.
    pub fn new(driver: Box<dyn BlockDriver>, backing: Option<Arc<Node>>, name: String) -> Self {
        Self { driver, backing, name, origin: Origin::default() }
    }

    /// The same, with the knowledge of where it came from.
    pub fn with_origin(mut self, origin: Origin) -> Self {
        self.origin = origin;
        self
    }

    /// Where it came from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Which file its header is in, and its format: the same for two openings of one image.
    pub fn identity(&self) -> Option<(Identity, &'static str)> {
        let identity = match self.origin.inner.first() {
            Some((_, node)) => node.identity()?.0,
            None => self.driver.files().first()?.storage.facts().identity?,
        };
        Some((identity, self.driver.format().name()))
    }

    /// The name that would open its backing file; nothing if it names none, or if where it is cannot be told.
    pub fn backing_path(&self) -> Option<OsString> {
        let name = OsStr::new(&self.driver.backing()?.name);
        name::beside(self.origin.base.as_deref(), name)
    }

    /// The layer itself.
    pub fn driver(&self) -> &dyn BlockDriver {
        &*self.driver
    }

    /// What lies below it.
    pub fn backing(&self) -> Option<&Arc<Node>> {
        self.backing.as_ref()
    }

    /// The image's name, as it is shown.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The guest's disk size in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.driver.virtual_size()
    }

    fn child(&self, place: HostPlace) -> Result<&Child> {
        let files = self.driver.files();
        files.get(place.file).ok_or_else(|| Error::corrupt(format!("{}: no file {}", self.name, place.file)))
    }

    fn storage(&self, place: HostPlace) -> Result<&dyn Storage> {
        self.child(place).map(|child| &*child.storage)
    }

    /// The run at `at`, looking down at most `layers` layers (1: this one alone). Past the virtual size: zeros.
    pub fn map(&self, at: GuestOffset, max: u64, layers: usize) -> Result<Mapping<'_>> {
        let (mut node, mut depth, mut len) = (self, 0, max);
        loop {
            let size = node.virtual_size();
            if at.get() >= size {
                // A backing file that is too short answers "zero" itself.
                return Ok(Mapping { start: at, len, kind: ExtentKind::Zero(None), depth, node });
            }
            let extent = node.driver.extent(at, len.min(size - at.get()))?;
            if extent.len == 0 || extent.len > len {
                return Err(Error::corrupt(format!("{}: the map makes no progress at {at}", node.name)));
            }
            len = extent.len;
            let last = depth + 1 >= layers;
            match (extent.kind, &node.backing) {
                (ExtentKind::Unallocated(_), Some(below)) if !last => {
                    node = below;
                    depth += 1;
                }
                (kind, _) => return Ok(Mapping { start: at, len, kind, depth, node }),
            }
        }
    }

    /// Fills `buf` with guest data from `at`, through the whole chain; past the virtual size with zeros.
    pub fn read(&self, at: GuestOffset, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        self.read_layers(at, buf, usize::MAX, scratch)
    }

    /// The same, through at most `layers` layers.
    pub fn read_layers(&self, at: GuestOffset, buf: &mut [u8], layers: usize, scratch: &mut Scratch) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let mapping = self.map(at + done as u64, (buf.len() - done) as u64, layers)?;
            let n = usize::try_from(mapping.len).unwrap_or(usize::MAX).min(buf.len() - done);
            mapping.read(&mut buf[done..done + n], scratch)?;
            done += n;
        }
        Ok(())
    }

    /// The ability to write, or the error that says it is not there.
    pub fn writing(&self) -> Result<&dyn Write> {
        self.driver.writing().ok_or_else(|| Error::unsupported(format!("'{}' is read-only", self.name)))
    }

    /// Room for the start of a range; given back when dropped without [`Placement::publish`].
    pub fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placement<'_>> {
        let placed = self.writing()?.place(at, len, store)?;
        Ok(Placement { node: self, placed, open: true })
    }

    /// Writes guest data. Concurrent writes must not share a unit.
    pub fn write(&self, at: GuestOffset, buf: &[u8], scratch: &mut Scratch) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let placement = self.place(at + done as u64, (buf.len() - done) as u64, Store::Data)?;
            let n = placement.len();
            placement.write(&buf[done..done + n], scratch)?;
            placement.publish()?;
            done += n;
        }
        Ok(())
    }

    /// Makes a range read as zeros; `unmap` allows its space to be given back. Writes zeros where the format
    /// has no other way.
    pub fn write_zeroes(&self, at: GuestOffset, len: u64, unmap: bool, scratch: &mut Scratch) -> Result<()> {
        let unit = self.writing()?.fill_unit().max(1);
        let end = at.get().saturating_add(len);
        let mut pos = at.get();
        while pos < end {
            let whole = pos.is_multiple_of(unit) && (end - pos >= unit || end >= self.virtual_size());
            let n = if whole { self.whole_units(pos, end, unit) } else { (end - pos).min(unit - pos % unit) };
            if whole {
                let placement = self.place(GuestOffset(pos), n, Store::Zero { unmap })?;
                pos += placement.len() as u64;
                placement.zero()?;
                placement.publish()?;
            } else {
                let mapping = self.map(GuestOffset(pos), n, usize::MAX)?;
                if !mapping.is_zero() {
                    let zeros = vec![0; usize::try_from(mapping.len).unwrap_or(usize::MAX)];
                    self.write(GuestOffset(pos), &zeros, scratch)?;
                } else {
                    self.writing()?.wrote_the_same(GuestOffset(pos), mapping.len)?;
                }
                pos += mapping.len;
            }
        }
        Ok(())
    }

    fn whole_units(&self, pos: u64, end: u64, unit: u64) -> u64 {
        if end >= self.virtual_size() { end - pos } else { (end - pos) / unit * unit }
    }
}

impl Mapping<'_> {
    /// Reads the start of the run (`buf` is at most as long as the run).
    pub fn read(&self, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        match self.kind {
            ExtentKind::Zero(_) | ExtentKind::Unallocated(_) => buf.fill(0),
            ExtentKind::Data(place) => {
                let child = self.node.child(place)?;
                child.storage.read_at(place.at.get(), buf).with_context(|| reading(child, place.at.get()))?;
            }
            ExtentKind::Compressed(unit) => self.read_compressed(&unit, buf, scratch)?,
        }
        Ok(())
    }

    fn read_compressed(&self, unit: &CompressedUnit, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let too_long = || Error::corrupt(format!("{}: compressed unit at {} is too long", self.node.name, unit.start));
        let child = self.node.child(unit.place)?;
        let encoded = usize::try_from(unit.host_len).map_err(|_| too_long())?;
        let decoded = usize::try_from(unit.len).map_err(|_| too_long())?;
        let skip = usize::try_from(self.start.get().saturating_sub(unit.start.get())).map_err(|_| too_long())?;
        scratch.encoded.resize(encoded, 0);
        let at = unit.place.at.get();
        child.storage.read_at(at, &mut scratch.encoded).with_context(|| reading(child, at))?;
        if skip == 0 && buf.len() == decoded {
            return self.node.driver.decode(unit, &scratch.encoded, buf);
        }
        scratch.decoded.resize(decoded, 0);
        self.node.driver.decode(unit, &scratch.encoded, &mut scratch.decoded)?;
        let end = skip.checked_add(buf.len()).filter(|end| *end <= decoded).ok_or_else(too_long)?;
        buf.copy_from_slice(&scratch.decoded[skip..end]);
        Ok(())
    }
}

fn reading(child: &Child, at: u64) -> String {
    format!("{}: error while reading at byte {at}", child.name)
}

fn writing(child: &Child, at: u64) -> String {
    format!("{}: error while writing at byte {at}", child.name)
}

/// Room in an image that is not visible yet: fill it, then publish it; dropped, it is given back.
#[derive(Debug)]
pub struct Placement<'a> {
    node: &'a Node,
    placed: Placed,
    open: bool,
}

impl Placement<'_> {
    /// How many guest bytes of the range asked for it covers.
    pub fn len(&self) -> usize {
        usize::try_from(self.placed.len).unwrap_or(usize::MAX)
    }

    /// Never: a placement covers at least a byte.
    pub fn is_empty(&self) -> bool {
        self.placed.len == 0
    }

    /// What the driver said.
    pub fn placed(&self) -> &Placed {
        &self.placed
    }

    /// Writes guest data (exactly the range's length) and fills the rest of a new unit from the chain.
    pub fn write(&self, data: &[u8], scratch: &mut Scratch) -> Result<()> {
        let Action::Write { place, before, after } = self.placed.action else { return Ok(()) };
        let child = self.node.child(place)?;
        let put = |at: u64, bytes: &[u8]| child.storage.write_at(at, bytes).with_context(|| writing(child, at));
        if before == 0 && after == 0 {
            return put(place.at.get(), data);
        }
        let short = |n: u64| usize::try_from(n).map_err(|_| Error::corrupt("fill of a unit is too long"));
        let (head, tail) = (short(before)?, short(after)?);
        let mut whole = vec![0; head + data.len() + tail];
        let start = self.placed.start.get().saturating_sub(before);
        self.node.read(GuestOffset(start), &mut whole[..head], scratch)?;
        whole[head..head + data.len()].copy_from_slice(data);
        let end = self.placed.start + self.placed.len;
        self.node.read(end, &mut whole[head + data.len()..], scratch)?;
        put(place.at.get().saturating_sub(before), &whole)
    }

    /// Writes the encoded bytes of a [`Store::Compressed`] placement.
    pub fn write_encoded(&self, encoded: &[u8]) -> Result<()> {
        let Action::Write { place, .. } = self.placed.action else { return Ok(()) };
        let child = self.node.child(place)?;
        child.storage.write_at(place.at.get(), encoded).with_context(|| writing(child, place.at.get()))
    }

    /// Does what a [`Store::Zero`] placement asks of the files.
    pub fn zero(&self) -> Result<()> {
        let how = match self.placed.store {
            Store::Zero { unmap: true } => Zeroing::Punch,
            _ => Zeroing::Allocate,
        };
        match self.placed.action {
            Action::Nothing => Ok(()),
            Action::Zero { place } => {
                let child = self.node.child(place)?;
                let at = place.at.get();
                child.storage.zero(at, self.placed.len, how).with_context(|| writing(child, at))
            }
            Action::Write { place, before, after } => {
                let child = self.node.child(place)?;
                let (at, len) = (place.at.get(), self.placed.len);
                let fill = |to: u64, from: u64, bytes: u64| -> Result<()> {
                    let bytes = usize::try_from(bytes).map_err(|_| Error::corrupt("fill of a unit is too long"))?;
                    let mut around = vec![0; bytes];
                    self.node.read(GuestOffset(from), &mut around, &mut Scratch::default())?;
                    child.storage.write_at(to, &around).with_context(|| writing(child, to))
                };
                let start = self.placed.start.get();
                if before > 0 {
                    fill(at.saturating_sub(before), start.saturating_sub(before), before)?;
                }
                child.storage.zero(at, len, Zeroing::Write).with_context(|| writing(child, at))?;
                if after > 0 {
                    fill(at.saturating_add(len), start.saturating_add(len), after)?;
                }
                Ok(())
            }
        }
    }

    /// Where the range's bytes go, if they can be written there as they are: nothing around them to fill.
    pub fn spot(&self) -> Result<Option<Spot<'_>>> {
        let Action::Write { place, before: 0, after: 0 } = self.placed.action else { return Ok(None) };
        let child = self.node.child(place)?;
        Ok(Some(Spot { storage: &*child.storage, name: &child.name, at: place.at.get() }))
    }

    /// Makes it visible before its bytes are there: only for images that nobody else can see yet. The tables are
    /// then the same whatever the order in which the writes end.
    pub fn publish_early(&mut self) -> Result<()> {
        self.open = false;
        self.node.writing()?.publish(&self.placed)
    }

    /// Makes it visible, unless it is.
    pub fn publish(mut self) -> Result<()> {
        if self.open { self.publish_early() } else { Ok(()) }
    }
}

/// A place in a file that can be written to directly.
#[derive(Debug, Clone, Copy)]
pub struct Spot<'a> {
    /// The file's bytes.
    pub storage: &'a dyn Storage,
    /// Its name, for messages.
    pub name: &'a str,
    /// Where in it.
    pub at: u64,
}

impl Drop for Placement<'_> {
    fn drop(&mut self) {
        if self.open
            && let Some(writing) = self.node.driver.writing()
        {
            writing.withdraw(&self.placed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::protocol::Protocol;
    use crate::block::{Format, OpenRequest, OptionTree, Related};
    use crate::storage::memory::Memory;

    #[derive(Debug)]
    struct Nothing;

    impl Related for Nothing {
        fn open(&self, _role: &str, name: &str) -> Result<Child> {
            Err(Error::unsupported(name.to_owned()))
        }
    }

    #[test]
    fn a_chain_of_any_length_is_dropped_without_recursion() {
        let mut node: Option<Arc<Node>> = None;
        for n in 0..200_000 {
            let storage = Arc::new(Memory::default());
            let file = Child { role: "file".to_owned(), name: n.to_string(), storage };
            let mut options = OptionTree::new();
            let request =
                OpenRequest { file, options: &mut options, write: false, look_only: false, related: &Nothing };
            let driver = Protocol::File.open(request);
            #[allow(clippy::unwrap_used)]
            let driver = driver.unwrap();
            node = Some(Arc::new(Node::new(driver, node, n.to_string())));
        }
        let top = node.map(|node| format!("{node:?}"));
        assert_eq!(top.as_deref(), Some(r#"Node { name: "199999", format: "file" }"#));
    }
}
