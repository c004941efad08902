//! `copy-on-read`: what is read from a backing file is stored in the image, so that it need not be read from there again.
//!
//! Lock order: `copying` before whatever the image's driver locks; it is held across data I/O, because what was read
//! must not be stored over what was written since.

use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::Map;

use crate::block::filter::{Below, Filter, FilterRequest, Filtered, Lower};
use crate::block::io::Scratch;
use crate::block::keys::take_text;
use crate::block::{self, Error, ErrorKind, GuestOffset, Layer, Node};
use crate::storage::lock::Access;
use crate::storage::{self, Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// How much is copied at a time, in bytes.
const PIECE: u64 = 1 << 20;

/// The filter.
#[derive(Debug)]
pub struct CopyOnRead;

impl Filter for CopyOnRead {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn children(&self) -> &'static [Lower] {
        &[Lower::Bytes("file")]
    }

    fn open(&self, request: FilterRequest<'_>) -> block::Result<Filtered> {
        let FilterRequest { options, below, .. } = request;
        let bottom = take_text(options, "bottom");
        let Below { child, image, write, .. } = below("file")?;
        if !write {
            return Err(Error::invalid("Block node is read-only"));
        }
        let image = image.map(|(image, _)| image);
        let from = layers_below(image.as_ref(), bottom.as_deref())?;
        let storage = Arc::new(Copied { inner: child.storage, image, from, copying: Mutex::default() });
        Ok(Filtered { storage, path: None, strong: Map::new(), access: Access::NONE })
    }
}

/// The layers that are copied from: those below the image's own, down to the node that is called `bottom`, if there is
/// to be one.
fn layers_below(image: Option<&Arc<Node>>, bottom: Option<&str>) -> block::Result<Vec<Arc<Layer>>> {
    let mut layers = Vec::new();
    let mut next = image;
    while let Some(node) = next {
        let inner = node.filtered();
        let is_bottom = bottom.is_some() && node.origin().node_name.as_deref() == bottom;
        match (bottom, inner) {
            (Some(bottom), Some(_)) if is_bottom => {
                return Err(Error::invalid(format!("Bottom node '{bottom}' is a filter")));
            }
            (_, Some(_)) => {}
            (_, None) => layers.push(node.layer().clone()),
        }
        if is_bottom {
            layers.remove(0);
            return Ok(layers);
        }
        next = inner.or(node.backing());
    }
    match bottom {
        Some(bottom) => Err(Error::new(ErrorKind::NotFound, format!("Bottom node '{bottom}' not found"))),
        None => Ok(layers.split_off(layers.len().min(1))),
    }
}

#[derive(Debug)]
struct Copied {
    inner: Arc<dyn Storage>,
    /// `None` for plain bytes, which have no backing file.
    image: Option<Arc<Node>>,
    /// The layers whose data is copied.
    from: Vec<Arc<Layer>>,
    copying: Mutex<()>,
}

impl Copied {
    fn alone(&self) -> MutexGuard<'_, ()> {
        self.copying.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Stores what of a range the image has from further down.
    fn copy(&self, image: &Node, at: u64, len: u64) -> block::Result<()> {
        let (mut at, end) = (at, at.saturating_add(len).min(image.virtual_size()));
        let mut scratch = Scratch::default();
        let mut bytes = Vec::new();
        while at < end {
            let mut mapping = image.map(GuestOffset(at), (end - at).min(PIECE), usize::MAX)?;
            while let (Some(inner), false) = (mapping.node.filtered(), mapping.is_zero()) {
                mapping = inner.map(GuestOffset(at), mapping.len, usize::MAX)?;
            }
            let stored = mapping.node.layer();
            if !mapping.is_zero() && self.from.iter().any(|layer| Arc::ptr_eq(layer, stored)) {
                let len = usize::try_from(mapping.len).map_err(|_| Error::invalid("a run is too long"))?;
                bytes.resize(len, 0);
                mapping.read(&mut bytes, &mut scratch)?;
                image.write(GuestOffset(at), &bytes, &mut scratch)?;
            }
            at += mapping.len;
        }
        Ok(())
    }
}

impl Storage for Copied {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        if let Some(image) = &self.image {
            let _alone = self.alone();
            self.copy(image, at, buf.len() as u64).map_err(storage::Error::from)?;
        }
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        let _alone = self.alone();
        self.inner.write_at(at, buf)
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        self.inner.extent(at, max)
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        let _alone = self.alone();
        self.inner.zero(at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        let _alone = self.alone();
        self.inner.discard(at, len)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        let _alone = self.alone();
        self.inner.set_len(len, fill)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.inner.allocated()
    }

    fn facts(&self) -> Facts {
        Facts { offload: false, ..self.inner.facts() }
    }

    fn host(&self) -> Option<&HostFile> {
        self.inner.host()
    }

    fn announce(&self, event: Event) {
        self.inner.announce(event);
    }
}
