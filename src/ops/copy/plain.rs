//! The plain bytes of a worker's chunk: read into a buffer, or seen where they lie (see [`Window`]).
//!
//! Invariants: what is seen is never written to; whatever has to be changed is read. A worker does not hold a large
//! chunk twice.

use crate::block::Result;
use crate::storage::pages::Pages;
use crate::storage::view::{LEAST, Window};

use super::plan::Chunk;
use super::segment::Content;

/// A buffer of more bytes is not kept for another time, as a mapping of the next chunk may take its place.
const LARGE: usize = 8 << 20;

/// See the module.
#[derive(Debug, Default)]
pub struct Plain {
    buffer: Pages,
    window: Option<Window>,
    /// It is the window that has the bytes.
    seen: bool,
    /// There is no window to be had.
    blind: bool,
}

/// Whether mapping a chunk costs less than reading it: each of its parts is long enough. A large one would need as much
/// new memory to be read, so there the parts are, in the mean.
fn is_worth_it(chunk: &Chunk<'_>) -> bool {
    let stored = chunk.segments.iter().filter(|segment| matches!(segment.content, Content::Stored(_)));
    let lengths = stored.map(|segment| segment.len);
    if chunk.len > LARGE as u64 {
        let (bytes, parts) = lengths.fold((0, 0), |(bytes, parts), len| (bytes + len, parts + 1));
        return bytes >= LEAST * parts;
    }
    lengths.min().is_none_or(|shortest| shortest >= LEAST)
}

impl Plain {
    /// Room to read `len` bytes into.
    pub fn room(&mut self, len: usize) -> Result<&mut [u8]> {
        self.seen = false;
        if let Some(window) = self.window.as_mut().filter(|_| len > LARGE) {
            window.let_go();
        }
        Ok(self.buffer.room(len)?)
    }

    /// The chunk's bytes; none where it has neither been read nor seen.
    pub fn bytes(&self, len: usize) -> &[u8] {
        let all = match &self.window {
            Some(window) if self.seen => window.bytes(),
            _ => &self.buffer,
        };
        all.get(..len).unwrap_or_default()
    }

    /// Tries to see a chunk, of at most `longest` bytes, as it lies in its files. False where it has to be read.
    pub fn see(&mut self, chunk: &Chunk<'_>, longest: u64) -> Result<bool> {
        self.seen = false;
        if self.blind || chunk.keeps() || !is_worth_it(chunk) {
            return Ok(false);
        }
        if self.window.is_none() {
            self.window = usize::try_from(longest).ok().and_then(Window::new);
            self.blind = self.window.is_none();
        }
        let Some(window) = &mut self.window else { return Ok(false) };
        window.clear();
        if self.buffer.len() > LARGE {
            self.buffer = Pages::default();
        }
        for segment in &chunk.segments {
            let Ok(len) = usize::try_from(segment.len) else { return Ok(false) };
            let shown = match &segment.content {
                Content::Stored(mapping) => mapping.show(len, window)?,
                _ => window.add_zeros(len),
            };
            if !shown {
                return Ok(false);
            }
        }
        self.seen = true;
        Ok(true)
    }

    /// Whether the bytes are seen where they lie.
    pub fn is_seen(&self) -> bool {
        self.seen
    }

    /// Whether what was seen is what the files hold.
    pub fn is_whole(&self) -> bool {
        !self.seen || self.window.as_ref().is_some_and(Window::is_whole)
    }
}
