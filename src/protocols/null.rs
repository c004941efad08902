//! `null-co` and `null-aio`: a disk without a medium, for measurements and tests. What is written is forgotten.
//!
//! Reads give zeros. Only with `read-zeroes=on` does it promise so; otherwise what is read means nothing, and its
//! extents are data.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use serde_json::Map;

use crate::block::keys::{take_number, take_size, take_switch};
use crate::block::protocol::{CreateFile, FileRequest, OpenedFile, Protocol, Spelt};
use crate::block::{Error, OptionTree, Result};
use crate::storage::{self, Event, Facts, HostExtent, HostFile, HostKind, Preallocation, Storage, Zeroing};

/// The protocol, under one of its names: with the reference they differ in how a request waits.
#[derive(Debug)]
pub struct Null {
    name: &'static str,
    /// The only name that it goes by.
    url: &'static str,
}

/// Waits as a coroutine there.
pub const CO: Null = Null { name: "null-co", url: "null-co://" };
/// Waits as a callback there.
pub const AIO: Null = Null { name: "null-aio", url: "null-aio://" };

/// The size of the disk, if none is given.
const DEFAULT_SIZE: u64 = 1 << 30;

impl Null {
    fn only(&self) -> Error {
        Error::invalid(format!("The only allowed filename for this driver is '{}'", self.url))
    }
}

impl Protocol for Null {
    fn name(&self) -> &'static str {
        self.name
    }

    fn takes(&self, _path: &Path) -> bool {
        false
    }

    fn spelt(&self, rest: &OsStr) -> Result<Spelt> {
        if rest == "//" { Ok(Spelt::default()) } else { Err(self.only()) }
    }

    fn plain(&self, _name: &OsStr) -> Result<Spelt> {
        Err(self.only())
    }

    fn take_name(&self, path: Option<OsString>, _options: &mut OptionTree) -> Result<Option<OsString>> {
        Ok(path)
    }

    fn open(&self, request: FileRequest<'_>) -> Result<OpenedFile> {
        let options: &mut OptionTree = request.options;
        let mut strong = Map::new();
        for key in ["size", "read-zeroes"] {
            if let Some(value) = options.get(key) {
                strong.insert(key.to_owned(), value.clone());
            }
        }
        let size = take_size(options, "size")?.unwrap_or(DEFAULT_SIZE);
        let latency = take_number(options, "latency-ns")?.unwrap_or(0);
        let zeroes = take_switch(options, "read-zeroes")?.unwrap_or(false);
        if i64::try_from(latency).is_err() {
            return Err(Error::invalid("latency-ns is invalid"));
        }
        let path = strong.is_empty().then(|| self.url.into());
        let storage = Arc::new(Nothing { size, latency: Duration::from_nanos(latency), zeroes });
        Ok(OpenedFile { storage, path, based: false, strong, locking: false })
    }

    fn creating(&self) -> Option<&'static dyn CreateFile> {
        None
    }
}

#[derive(Debug)]
struct Nothing {
    size: u64,
    latency: Duration,
    zeroes: bool,
}

impl Nothing {
    fn wait(&self) {
        if !self.latency.is_zero() {
            sleep(self.latency);
        }
    }
}

impl Storage for Nothing {
    fn len(&self) -> storage::Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, _at: u64, buf: &mut [u8]) -> storage::Result<()> {
        self.wait();
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _at: u64, _buf: &[u8]) -> storage::Result<()> {
        self.wait();
        Ok(())
    }

    fn extent(&self, at: u64, max: u64) -> storage::Result<HostExtent> {
        Ok(match self.size.checked_sub(at) {
            None | Some(0) => HostExtent::hole(max),
            Some(left) if self.zeroes => HostExtent { len: max.min(left), kind: HostKind::Zero },
            Some(left) => HostExtent::data(max.min(left)),
        })
    }

    fn zero(&self, _at: u64, _len: u64, _how: Zeroing) -> storage::Result<()> {
        self.wait();
        Ok(())
    }

    fn discard(&self, _at: u64, _len: u64) -> storage::Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64, _fill: Preallocation) -> storage::Result<()> {
        if len <= self.size { Ok(()) } else { Err(nix::errno::Errno::ENOTSUP.into()) }
    }

    fn flush(&self) -> storage::Result<()> {
        self.wait();
        Ok(())
    }

    fn allocated(&self) -> storage::Result<Option<u64>> {
        Ok(Some(0))
    }

    fn facts(&self) -> Facts {
        Facts { fixed_len: true, new_reads_zero: self.zeroes, ..Facts::PLAIN }
    }

    fn host(&self) -> Option<&HostFile> {
        None
    }

    fn announce(&self, _event: Event) {}
}
