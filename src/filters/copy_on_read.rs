//! `copy-on-read`: what is read from a backing file is stored in the image, so that it need not be read from there again.
//!
//! Lock order: `copying` before whatever the image's driver locks; it is held across data I/O, because what was read
//! must not be stored over what was written since.

use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::Map;

use crate::block::filter::{Below, Filter, FilterRequest, Filtered, Lower};
use crate::block::io::Scratch;
use crate::block::keys::take_text;
use crate::block::{self, Error, GuestOffset, Node};
use crate::storage::lock::Access;
use crate::storage::{self, Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

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
        if let Some(bottom) = bottom {
            return Err(Error::unsupported(format!("The backing file '{bottom}' cannot be the bottom: all are read")));
        }
        let image = image.map(|(image, _)| image);
        let storage = Arc::new(Copied { inner: child.storage, image, copying: Mutex::default() });
        Ok(Filtered { storage, path: None, strong: Map::new(), access: Access::NONE })
    }
}

#[derive(Debug)]
struct Copied {
    inner: Arc<dyn Storage>,
    /// `None` for plain bytes, which have no backing file.
    image: Option<Arc<Node>>,
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
        while at < end {
            let mapping = image.map(GuestOffset(at), end - at, usize::MAX)?;
            let len = usize::try_from(mapping.len).map_err(|_| Error::invalid("a run is too long"))?;
            if mapping.depth > 0 && !mapping.is_zero() {
                let mut bytes = vec![0; len];
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
