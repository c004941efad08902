//! Bytes in memory: what tests write to, and where small images inside other images live.

use std::sync::RwLock;

use super::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// A growable buffer.
#[derive(Debug, Default)]
pub struct Memory {
    bytes: RwLock<Vec<u8>>,
}

impl Memory {
    /// A buffer with that content.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes) }
    }

    /// A copy of the content.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Storage for Memory {
    fn len(&self) -> Result<u64> {
        Ok(self.bytes.read().unwrap_or_else(|e| e.into_inner()).len() as u64)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(|e| e.into_inner());
        let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        let n = buf.len().min(bytes.len() - at);
        buf[..n].copy_from_slice(&bytes[at..at + n]);
        buf[n..].fill(0);
        Ok(())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(|e| e.into_inner());
        let at = usize::try_from(at).map_err(|_| nix::errno::Errno::EFBIG)?;
        let end = at.checked_add(buf.len()).ok_or(nix::errno::Errno::EFBIG)?;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[at..end].copy_from_slice(buf);
        Ok(())
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        let len = self.len()?;
        Ok(if at < len { HostExtent::data(max.min(len - at)) } else { HostExtent::hole(max) })
    }

    fn zero(&self, at: u64, len: u64, _how: Zeroing) -> Result<()> {
        self.write_at(at, &vec![0; usize::try_from(len).map_err(|_| nix::errno::Errno::EFBIG)?])
    }

    fn discard(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64, _fill: Preallocation) -> Result<()> {
        let len = usize::try_from(len).map_err(|_| nix::errno::Errno::EFBIG)?;
        self.bytes.write().unwrap_or_else(|e| e.into_inner()).resize(len, 0);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn facts(&self) -> Facts {
        Facts::PLAIN
    }

    fn host(&self) -> Option<&HostFile> {
        None
    }

    fn announce(&self, _event: Event) {}
}
