//! A layer with what lies below it: the backing chain.
//!
//! The walk down the chain, and short backing files (past their end reads zero), are written once, here; the moving of
//! guest bytes is [`io`](super::io)'s. No lock is held.

use std::ffi::OsString;
use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::driver::Write;
use super::error::{Operation, Place, PlacePart};
use super::last_unit::LastUnit;
use super::{BlockDriver, Child, Error, ErrorKind, Extent, ExtentKind, FileEnd, GuestOffset, HostPlace, Result, name};
use crate::storage::Identity;

/// Where a node came from.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// The plain name that would open it again, if there is one.
    pub path: Option<OsString>,
    /// The file that it lies in, however deep: names found in the image are relative to it.
    pub base: Option<OsString>,
    /// The whole tree that would open it again.
    pub tree: Map<String, Value>,
    /// What the user calls it (`node-name`).
    pub node_name: Option<String>,
    /// A bare file, without a format.
    pub protocol: bool,
    /// A filter over one thing that lies below it.
    pub filter: bool,
    /// Images that it lies in, by role (a format in a format).
    pub inner: Vec<(String, Arc<Node>)>,
}

/// What the user says of how a layer is written, beside what the command does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteManner {
    /// The space of what reads as zeros is kept (`discard=ignore`).
    pub keep_space: bool,
    /// Data that is all zeros is made zeros instead; the value says whether its space may be given back.
    pub detect_zeroes: Option<bool>,
}

/// An opened layer, whatever lies below it: several nodes may share it.
#[derive(Debug)]
pub struct Layer {
    driver: Box<dyn BlockDriver>,
    last_unit: LastUnit,
    /// Of each file, where nothing is placed in it.
    ends: Box<[FileEnd]>,
    manner: WriteManner,
    /// It was taken for raw because nothing else fits.
    probed_raw: bool,
}

impl Layer {
    /// What that driver has opened.
    pub fn new(driver: Box<dyn BlockDriver>) -> Self {
        let layer = Self {
            driver,
            last_unit: LastUnit::default(),
            ends: Box::default(),
            manner: WriteManner::default(),
            probed_raw: false,
        };
        if layer.driver.writing().is_some() { layer } else { layer.only_read() }
    }

    /// It is written to when its disk has been read to the end, if at all: till then its files end where they do.
    pub fn only_read(self) -> Self {
        let ends = self.driver.files().iter().map(|_| FileEnd::default()).collect();
        Self { ends, ..self }
    }

    /// To be written in that manner.
    pub fn with_manner(self, manner: WriteManner) -> Self {
        Self { manner, ..self }
    }

    /// Taken for raw because nothing else fits, or not.
    pub(super) fn with_probed_raw(self, probed_raw: bool) -> Self {
        Self { probed_raw, ..self }
    }

    /// See [`Layer::with_probed_raw`].
    pub(super) fn is_probed_raw(&self) -> bool {
        self.probed_raw
    }

    /// What it can do.
    pub fn driver(&self) -> &dyn BlockDriver {
        &*self.driver
    }
}

/// A layer and its backing chain.
pub struct Node {
    layer: Arc<Layer>,
    backing: Option<Arc<Node>>,
    name: String,
    origin: Origin,
}

impl fmt::Debug for Node {
    /// Not the whole chain: it may be longer than the stack is deep.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("name", &self.name).field("format", &self.driver().format()).finish()
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

    /// What is left of the run without its first `n` bytes.
    pub fn after(mut self, n: u64) -> Self {
        self.start = self.start + n;
        self.len = self.len.saturating_sub(n);
        self.kind = self.kind.after(n);
        self
    }
}

impl Node {
    /// A layer of its own on top of `backing`.
    pub fn new(driver: Box<dyn BlockDriver>, backing: Option<Arc<Node>>, name: String) -> Self {
        Self::of(Arc::new(Layer::new(driver)), backing, name)
    }

    /// A layer, which other nodes may share, on top of `backing`.
    pub fn of(layer: Arc<Layer>, backing: Option<Arc<Node>>, name: String) -> Self {
        Self { layer, backing, name, origin: Origin::default() }
    }

    /// The same layer on top of something else: one driver, and its files and locks, under two chains. What both read
    /// is right as long as only one of them is written through.
    pub fn on(&self, backing: Option<Arc<Node>>) -> Self {
        let tree = backing.as_ref().map_or(Value::Null, |node| Value::Object(node.origin.tree.clone()));
        let mut node = self.over(backing);
        node.origin.tree.insert("backing".to_owned(), tree);
        node.origin.path = None;
        node
    }

    /// The same image, in the same files, as that driver has it.
    pub fn with_driver(&self, driver: Box<dyn BlockDriver>) -> Self {
        let mut node = self.over(self.backing.clone());
        node.layer = Arc::new(Layer::new(driver).with_manner(self.layer.manner));
        node
    }

    /// The same where it is the same image that lies below, opened anew.
    pub(super) fn over(&self, backing: Option<Arc<Node>>) -> Self {
        Self { layer: self.layer.clone(), backing, name: self.name.clone(), origin: self.origin.clone() }
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
            None => self.driver().files().first()?.storage.facts().identity?,
        };
        Some((identity, self.driver().format()))
    }

    /// The name that would open its backing file; nothing if it names none, or if where it is cannot be told.
    pub fn backing_path(&self) -> Option<OsString> {
        name::find_beside(self.origin.base.as_deref(), &self.driver().backing()?.name)
    }

    /// The same as far as the names alone tell it: the host is not asked what is there.
    pub fn backing_path_as_named(&self) -> Option<OsString> {
        name::beside(self.origin.base.as_deref(), &self.driver().backing()?.name)
    }

    /// The layer itself.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// What the layer can do.
    pub fn driver(&self) -> &dyn BlockDriver {
        self.layer.driver()
    }

    /// How the user has it written.
    pub fn manner(&self) -> WriteManner {
        self.layer.manner
    }

    /// What lies below it.
    pub fn backing(&self) -> Option<&Arc<Node>> {
        self.backing.as_ref()
    }

    /// What the filter stands over that it is.
    pub fn filtered(&self) -> Option<&Arc<Node>> {
        match &*self.origin.inner {
            [(_, inner)] if self.origin.filter => Some(inner),
            _ => None,
        }
    }

    /// The image that it is, or that filters stand over which it is. They have to live as long as that is used.
    pub fn beneath_filters(self: &Arc<Self>) -> Arc<Self> {
        let mut node = self;
        while let Some(inner) = node.filtered() {
            node = inner;
        }
        node.clone()
    }

    /// The image's name, as it is shown.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where on its disk something failed, for what is not known to lie in a file.
    pub fn place_of(&self, operation: Operation, guest: GuestOffset) -> Place {
        Place { operation, file: self.name.clone(), part: PlacePart::Guest(guest), host: None }
    }

    /// What its own layer says from `at` on. What is missing of its map is said with the file.
    pub(super) fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.driver().extent(at, max).map_err(|error| match error.kind {
            ErrorKind::Truncated if !error.tells_guest() => error.at(self.place_of(Operation::Status, at)),
            _ => error,
        })
    }

    /// The guest's disk size in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.driver().virtual_size()
    }

    /// Where the layer's file ends, if that is before `wanted`; nothing where that cannot be told, because it is
    /// written to: what was placed need not be there yet.
    pub(super) fn file_end(&self, place: HostPlace, wanted: u64) -> Result<Option<u64>> {
        let Some(end) = self.layer.ends.get(place.file) else { return Ok(None) };
        end.reach(&*self.child(place)?.storage, wanted).map(|end| Some(end).filter(|end| *end < wanted))
    }

    /// Whether its files end where they do: nothing is placed in them.
    pub fn is_only_read(&self) -> bool {
        !self.layer.ends.is_empty()
    }

    pub(super) fn last_unit(&self) -> &LastUnit {
        &self.layer.last_unit
    }

    /// The file that a place lies in.
    pub(super) fn child(&self, place: HostPlace) -> Result<&Child> {
        let files = self.driver().files();
        files.get(place.file).ok_or_else(|| Error::corrupt(format!("{}: no file {}", self.name, place.file)))
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
            let extent = node.extent(at, len.min(size - at.get()))?;
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

    /// The ability to write, or the error that says it is not there.
    pub fn writing(&self) -> Result<&dyn Write> {
        self.driver().writing().ok_or_else(|| Error::unsupported(format!("'{}' is read-only", self.name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::bare::Bare;
    use crate::storage::memory::Memory;

    #[test]
    fn a_chain_of_any_length_is_dropped_without_recursion() {
        let mut node: Option<Arc<Node>> = None;
        for n in 0..200_000 {
            let storage = Arc::new(Memory::default());
            let file = Child { role: "file".to_owned(), name: n.to_string(), driver: "file", storage };
            let driver = Bare::open("file", file, false);
            #[allow(clippy::unwrap_used)]
            let driver = driver.unwrap();
            node = Some(Arc::new(Node::new(Box::new(driver), node, n.to_string())));
        }
        let top = node.map(|node| format!("{node:?}"));
        assert_eq!(top.as_deref(), Some(r#"Node { name: "199999", format: "file" }"#));
    }
}
