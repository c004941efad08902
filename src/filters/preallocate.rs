//! `preallocate`: reserves space ahead of what is written past the end of a file, so that the file grows in few, large
//! steps. What is left over is cut off when nobody has it open any more, and before its length is set.
//!
//! Lock order: the lock of `ends` is held while the file changes its length, and for nothing else.

use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::Map;

use crate::block::error::Context;
use crate::block::filter::{Below, Filter, FilterRequest, Filtered, Lower};
use crate::block::keys::take_size;
use crate::block::{Error, Result};
use crate::storage::lock::Access;
use crate::storage::{self, Event, Facts, HostExtent, HostFile, Preallocation, Storage, Zeroing};

/// The filter.
#[derive(Debug)]
pub struct Preallocate;

/// What the reserved space ends at a multiple of, and how much is reserved, where it is not said.
const ALIGN: u64 = 1 << 20;
const SIZE: u64 = 128 << 20;

impl Filter for Preallocate {
    fn name(&self) -> &'static str {
        "preallocate"
    }

    fn children(&self) -> &'static [Lower] {
        &[Lower::Bytes("file")]
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Filtered> {
        let FilterRequest { options, below, .. } = request;
        let align = take_size(options, "prealloc-align")?.unwrap_or(ALIGN);
        let size = take_size(options, "prealloc-size")?.unwrap_or(SIZE);
        if align % 512 != 0 {
            return Err(Error::invalid("prealloc-align parameter of preallocate filter is not aligned to 512"));
        }
        let Below { child, write, .. } = below("file")?;
        let len = child.storage.len().with_context(|| format!("Could not get size of '{}'", child.name))?;
        let fixed = child.storage.facts().fixed_len;
        let ends = Ends { data: len, reserved: if write && !fixed { Some(len) } else { None } };
        let storage =
            Arc::new(Preallocated { inner: child.storage, align: align.max(1), size, ends: Mutex::new(ends) });
        // How space is reserved does not change what the guest sees.
        Ok(Filtered { storage, path: None, strong: Map::new(), access: Access::NONE })
    }
}

#[derive(Debug)]
struct Ends {
    /// Where the file ends for who uses it.
    data: u64,
    /// Where it ends on the host; `None` where nothing is reserved.
    reserved: Option<u64>,
}

#[derive(Debug)]
struct Preallocated {
    inner: Arc<dyn Storage>,
    align: u64,
    size: u64,
    ends: Mutex<Ends>,
}

impl Preallocated {
    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes room up to `end`, and more.
    fn reserve(&self, end: u64) {
        let mut ends = self.ends();
        if ends.reserved.is_some_and(|reserved| reserved < end) {
            let wanted = end.saturating_add(self.size).checked_next_multiple_of(self.align);
            let done = wanted.map(|wanted| (wanted, self.inner.set_len(wanted, Preallocation::Falloc)));
            // Where no space can be reserved the file grows as it does without.
            ends.reserved = done.filter(|(_, done)| done.is_ok()).map(|(wanted, _)| wanted);
        }
        ends.data = ends.data.max(end);
    }

    /// Cuts off what is left over.
    fn cut(&self) -> storage::Result<()> {
        let mut ends = self.ends();
        if ends.reserved.is_some_and(|reserved| reserved > ends.data) {
            self.inner.set_len(ends.data, Preallocation::Off)?;
            ends.reserved = Some(ends.data);
        }
        Ok(())
    }
}

impl Drop for Preallocated {
    fn drop(&mut self) {
        // Too long a file is no wrong one.
        let _ = self.cut();
    }
}

impl Storage for Preallocated {
    fn len(&self) -> storage::Result<u64> {
        let ends = self.ends();
        if ends.reserved.is_some() { Ok(ends.data) } else { self.inner.len() }
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> storage::Result<()> {
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> storage::Result<()> {
        self.reserve(at.saturating_add(buf.len() as u64));
        self.inner.write_at(at, buf)
    }

    fn extent(&self, at: u64, max: u64) -> storage::Result<HostExtent> {
        let end = self.len()?;
        match end.saturating_sub(at) {
            0 => Ok(HostExtent::hole(max)),
            left => self.inner.extent(at, max.min(left)),
        }
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> storage::Result<()> {
        self.reserve(at.saturating_add(len));
        self.inner.zero(at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> storage::Result<()> {
        self.inner.discard(at, len)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> storage::Result<()> {
        let mut ends = self.ends();
        // What was reserved is not what was asked for.
        if ends.reserved.is_some_and(|reserved| reserved > ends.data) {
            self.inner.set_len(ends.data, Preallocation::Off)?;
        }
        self.inner.set_len(len, fill)?;
        ends.reserved = ends.reserved.map(|_| len);
        ends.data = len;
        Ok(())
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::storage::memory::Memory;

    /// As the reference does: a flush is no end.
    #[test]
    fn what_is_left_over_is_cut_off_at_the_end_alone() {
        let inner: Arc<dyn Storage> = Arc::new(Memory::new(vec![1; 512]));
        let ends = Mutex::new(Ends { data: 512, reserved: Some(512) });
        let file = Preallocated { inner: Arc::clone(&inner), align: 4096, size: 10_000, ends };
        file.write_at(512, &[2; 100]).unwrap();
        for _ in 0..2 {
            file.flush().unwrap();
            assert_eq!((file.len().unwrap(), inner.len().unwrap()), (612, 12_288));
        }
        drop(file);
        assert_eq!(inner.len().unwrap(), 612);
    }
}
