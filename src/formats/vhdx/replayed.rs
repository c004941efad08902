//! A file as it is once its log is replayed, without changing it: for who only reads, and for a check, which tells what
//! it mends. Nothing is written through it before [`Replayed::settle`].

use std::sync::{Arc, RwLock};

use nix::errno::Errno;

use super::log::Replay;
use crate::storage::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// See the module.
#[derive(Debug)]
pub struct Replayed {
    file: Arc<dyn Storage>,
    pending: RwLock<Option<Replay>>,
}

impl Replayed {
    /// That file after that replay.
    pub fn new(file: Arc<dyn Storage>, replay: Replay) -> Self {
        Self { file, pending: RwLock::new(Some(replay)) }
    }

    fn with<T>(&self, see: impl FnOnce(Option<&Replay>) -> T) -> T {
        see(self.pending.read().unwrap_or_else(|e| e.into_inner()).as_ref())
    }

    /// Whether the file itself is as it was.
    pub fn is_pending(&self) -> bool {
        self.with(|replay| replay.is_some())
    }

    /// Replays in the file; from now on it is what is seen.
    pub fn settle(&self) -> Result<()> {
        let mut pending = self.pending.write().unwrap_or_else(|e| e.into_inner());
        if let Some(replay) = pending.as_ref() {
            replay.apply(&*self.file)?;
        }
        *pending = None;
        Ok(())
    }

    /// The file, to be changed.
    fn settled(&self) -> Result<&dyn Storage> {
        match self.is_pending() {
            true => Err(Errno::EROFS.into()),
            false => Ok(&*self.file),
        }
    }
}

impl Storage for Replayed {
    fn len(&self) -> Result<u64> {
        let len = self.file.len()?;
        Ok(self.with(|replay| replay.map_or(len, |replay| len.max(replay.end))))
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_at(at, buf)?;
        self.with(|replay| replay.map_or((), |replay| replay.patch(at, buf)));
        Ok(())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        self.settled()?.write_at(at, buf)
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        if !self.is_pending() {
            return self.file.extent(at, max);
        }
        // What is a hole in the file may be filled by the replay.
        let len = self.len()?;
        Ok(if at < len { HostExtent::data(max.min(len - at)) } else { HostExtent::hole(max) })
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        self.settled()?.zero(at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.settled()?.discard(at, len)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        self.settled()?.set_len(len, fill)
    }

    fn flush(&self) -> Result<()> {
        self.file.flush()
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.file.allocated()
    }

    fn facts(&self) -> Facts {
        Facts { offload: false, ..self.file.facts() }
    }

    fn host(&self) -> Option<&HostFile> {
        self.file.host()
    }

    fn announce(&self, event: Event) {
        self.file.announce(event);
    }
}
