//! `throttle`: lets through what the limits of a throttle group allow.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::block::filter::{Below, Filter, FilterRequest, Filtered, Lower};
use crate::block::keys::take_text;
use crate::block::throttle::{ThrottleGroup, Way};
use crate::block::{Error, Node, Result, Secrets};
use crate::storage::lock::Access;
use crate::storage::{self, Event, Facts, HostExtent, HostFile, Preallocation, Storage, Zeroing};

/// The filter.
#[derive(Debug)]
pub struct Throttle;

/// The option that names the group.
const GROUP: &str = "throttle-group";

impl Filter for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn children(&self) -> &'static [Lower] {
        &[Lower::Bytes("file")]
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Filtered> {
        let FilterRequest { options, below, objects, .. } = request;
        let unknown = |name: &str| Error::invalid(format!("Throttle group '{name}' does not exist"));
        let Below { child, .. } = below("file")?;
        let name = take_text(options, GROUP).ok_or_else(|| Error::invalid("Please specify a throttle group"))?;
        let group = objects.throttle_group(&name).ok_or_else(|| unknown(&name))?.clone();
        let strong = Map::from_iter([(GROUP.to_owned(), Value::from(name))]);
        let storage = Arc::new(Throttled { inner: child.storage, group });
        Ok(Filtered { storage, path: None, strong, access: Access::NONE })
    }
}

/// The group of a filter of this kind, as it was opened.
pub fn group_of(node: &Node, objects: &Secrets) -> Option<Arc<ThrottleGroup>> {
    objects.throttle_group(node.origin().tree.get(GROUP)?.as_str()?).cloned()
}

#[derive(Debug)]
struct Throttled {
    inner: Arc<dyn Storage>,
    group: Arc<ThrottleGroup>,
}

impl Storage for Throttled {
    fn len(&self) -> storage::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> storage::Result<()> {
        self.group.pass(Way::Read, buf.len() as u64);
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> storage::Result<()> {
        self.group.pass(Way::Write, buf.len() as u64);
        self.inner.write_at(at, buf)
    }

    fn extent(&self, at: u64, max: u64) -> storage::Result<HostExtent> {
        self.inner.extent(at, max)
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> storage::Result<()> {
        self.group.pass(Way::Write, len);
        self.inner.zero(at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> storage::Result<()> {
        self.group.pass(Way::Write, len);
        self.inner.discard(at, len)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> storage::Result<()> {
        self.inner.set_len(len, fill)
    }

    fn flush(&self) -> storage::Result<()> {
        self.inner.flush()
    }

    fn allocated(&self) -> storage::Result<Option<u64>> {
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
