//! `blkverify`: reads an image and a raw copy of it, and fails where they differ; writes go to both.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use serde_json::Map;

use crate::block::filter::{Filter, FilterRequest, Filtered, Lower, Wrapped};
use crate::block::{Error, OptionTree, Result};
use crate::storage::lock::Access;
use crate::storage::{self, Event, Facts, HostExtent, HostFile, Preallocation, Storage, Zeroing};

/// The filter.
#[derive(Debug)]
pub struct Blkverify;

impl Filter for Blkverify {
    fn name(&self) -> &'static str {
        "blkverify"
    }

    fn children(&self) -> &'static [Lower] {
        &[Lower::Bytes("raw"), Lower::Image("test")]
    }

    fn has_prefix(&self) -> bool {
        true
    }

    /// `blkverify:RAW:IMAGE`.
    fn spelt(&self, rest: &OsStr) -> Result<Wrapped> {
        let bytes = rest.as_bytes();
        let both = || Error::invalid("blkverify requires raw copy and original image path");
        let colon = bytes.iter().position(|byte| *byte == b':').ok_or_else(both)?;
        let (raw, image) = bytes.split_at(colon);
        let image = image.get(1..).filter(|image| !image.is_empty() && !raw.is_empty()).ok_or_else(both)?;
        let name = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        Ok(Wrapped { below: vec![("raw", name(raw)), ("test", name(image))], options: OptionTree::new() })
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Filtered> {
        let raw = (request.below)("raw")?;
        let test = (request.below)("test")?;
        let path = raw.path.zip(test.path).map(|(raw, test)| {
            let mut name = b"blkverify:".to_vec();
            name.extend_from_slice(raw.as_bytes());
            name.push(b':');
            name.extend_from_slice(test.as_bytes());
            OsString::from_vec(name)
        });
        let storage = Arc::new(Verified { raw: raw.child.storage, test: test.child.storage });
        Ok(Filtered { storage, path, strong: Map::new(), access: Access::NONE })
    }
}

#[derive(Debug)]
struct Verified {
    raw: Arc<dyn Storage>,
    test: Arc<dyn Storage>,
}

impl Storage for Verified {
    fn len(&self) -> storage::Result<u64> {
        self.test.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> storage::Result<()> {
        let mut copy = vec![0; buf.len()];
        self.raw.read_at(at, &mut copy)?;
        self.test.read_at(at, buf)?;
        match copy.iter().zip(buf.iter()).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(index) => {
                let (len, first) = (buf.len(), at.saturating_add(index as u64));
                let text = format!("blkverify: read offset={at} bytes={len} contents mismatch at offset {first}");
                Err(storage::Error::Other(text))
            }
        }
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> storage::Result<()> {
        self.test.write_at(at, buf)?;
        self.raw.write_at(at, buf)
    }

    fn extent(&self, at: u64, max: u64) -> storage::Result<HostExtent> {
        // What one of them stores is compared.
        let raw = self.raw.extent(at, max)?;
        let test = self.test.extent(at, raw.len)?;
        Ok(if raw.is_zero() && !test.is_zero() { test } else { HostExtent { len: test.len, ..raw } })
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> storage::Result<()> {
        self.test.zero(at, len, how)?;
        self.raw.zero(at, len, how)
    }

    fn discard(&self, _at: u64, _len: u64) -> storage::Result<()> {
        // What it then reads as may differ.
        Ok(())
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> storage::Result<()> {
        self.test.set_len(len, fill)?;
        self.raw.set_len(len, fill)
    }

    fn flush(&self) -> storage::Result<()> {
        self.test.flush()?;
        self.raw.flush()
    }

    /// Not told, as in the reference.
    fn allocated(&self) -> storage::Result<Option<u64>> {
        Ok(None)
    }

    fn facts(&self) -> Facts {
        let (raw, test) = (self.raw.facts(), self.test.facts());
        let both = |of: fn(&Facts) -> bool| of(&raw) && of(&test);
        Facts {
            fixed_len: raw.fixed_len || test.fixed_len,
            new_reads_zero: both(|facts| facts.new_reads_zero),
            alignment: raw.alignment.max(test.alignment),
            ordered: raw.ordered || test.ordered,
            by_run: raw.by_run || test.by_run,
            ..Facts::PLAIN
        }
    }

    fn host(&self) -> Option<&HostFile> {
        self.raw.host()
    }

    fn announce(&self, event: Event) {
        self.raw.announce(event);
        self.test.announce(event);
    }
}
