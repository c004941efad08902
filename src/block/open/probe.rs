//! What format an image has, by its first bytes or else its last, and the guard before a raw image that nobody called raw.

use std::sync::Arc;

use nix::errno::Errno;

use super::{Opener, no_disk};
use crate::block::error::Context;
use crate::block::{self, Child, Format, Notice, TRAILER_BYTES, Trailer};
use crate::storage::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// How many bytes are looked at to find out a format.
const HEAD: usize = 512;

impl Opener<'_> {
    /// Finds out the format. What only the end of the file tells is not believed by whoever is going to write.
    pub(super) fn probe(&self, storage: &dyn Storage, name: &str, write: bool) -> block::Result<&'static dyn Format> {
        let formats = self.drivers.formats;
        let raw = formats.last().copied().ok_or_else(|| block::Error::invalid("no formats"))?;
        let text = || format!("Could not determine image format of '{name}'");
        let len = storage.len().with_context(text)?;
        if len == 0 {
            return Ok(raw);
        }
        let mut head = [0; HEAD];
        storage.read_at(0, &mut head).context("Could not read image for determining its format")?;
        let mut best = (raw, raw.probe(&head, name));
        for format in formats.iter().copied() {
            let score = format.probe(&head, name);
            if score > best.1 {
                best = (format, score);
            }
        }
        if best.0.name() != raw.name() {
            return Ok(best.0);
        }
        let mut end = vec![0; usize::try_from(len.min(TRAILER_BYTES)).unwrap_or(HEAD)];
        let start = len.saturating_sub(TRAILER_BYTES);
        storage.read_at(start, &mut end).context("Could not read image for determining its format")?;
        let there = usize::try_from(len).unwrap_or(HEAD).min(HEAD);
        if let Some(found) = no_disk::of(head.get(..there).unwrap_or_default(), name) {
            return Err(block::Error::unsupported(found.text()));
        }
        let end = Trailer { bytes: &end, len };
        match formats.iter().copied().find(|format| format.probe_end(&end)) {
            Some(format) if write => Err(block::Error::invalid(format!(
                "The end of '{name}' says that it is a {} image, which its guest can have written: say the format, or \
                 raw for the bytes as they are",
                format.name()
            ))),
            Some(format) => Ok(format),
            None => Ok(raw),
        }
    }

    /// Says that raw was guessed.
    pub(super) fn warn_of_probed_raw(&self, child: &Child) {
        for line in [
            format!("WARNING: Image format was not specified for '{}' and probing guessed raw.", child.name),
            "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.".to_owned(),
            "         Specify the 'raw' format explicitly to remove the restrictions.".to_owned(),
        ] {
            self.notice(Notice::Line(line));
        }
    }

    /// Guards a file that was taken for raw against what that allows.
    pub(super) fn guard_probed_raw(&self, child: &mut Child) {
        let formats = self.drivers.formats.iter().copied().filter(|format| format.name() != "raw").collect();
        let storage = child.storage.clone();
        child.storage = Arc::new(ProbedRaw { storage, formats, name: child.name.clone() });
    }
}

/// A file that was taken for raw because nothing else fits. Its first block must not become the header of
/// another format, or whoever opens it next would follow what its guest wrote there.
#[derive(Debug)]
pub struct ProbedRaw {
    /// The file.
    pub storage: Arc<dyn Storage>,
    /// The formats that would be recognised.
    pub formats: Vec<&'static dyn Format>,
    /// Its name.
    pub name: String,
}

impl Storage for ProbedRaw {
    fn len(&self) -> Result<u64> {
        self.storage.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.storage.read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        if at < HEAD as u64 {
            let mut head = vec![0; HEAD];
            self.storage.read_at(0, &mut head)?;
            let skip = usize::try_from(at).unwrap_or(HEAD);
            for (old, new) in head.iter_mut().skip(skip).zip(buf) {
                *old = *new;
            }
            let known = |format: &&dyn Format| format.probe(&head, &self.name) > 1;
            if self.formats.iter().any(known) {
                return Err(Errno::EPERM.into());
            }
        }
        self.storage.write_at(at, buf)
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        self.storage.extent(at, max)
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        self.storage.zero(at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.storage.discard(at, len)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        self.storage.set_len(len, fill)
    }

    fn flush(&self) -> Result<()> {
        self.storage.flush()
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.storage.allocated()
    }

    fn facts(&self) -> Facts {
        Facts { offload: false, ..self.storage.facts() }
    }

    fn host(&self) -> Option<&HostFile> {
        self.storage.host()
    }

    fn announce(&self, event: Event) {
        self.storage.announce(event);
    }
}
