//! The plain bytes of a worker's chunk: read into a buffer, or seen where they lie (see [`Window`]).
//!
//! Invariant: what is seen is never written to; whatever has to be changed is read.

use crate::block::Result;
use crate::storage::view::Window;

use super::plan::Chunk;
use super::source::Content;

/// What buffers are aligned to: the page, which is also what `O_DIRECT` wants.
const PAGE: usize = 4096;

/// A buffer that starts at a page and is used again and again.
#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    skip: usize,
}

impl Buffer {
    fn get(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < len + self.skip {
            self.bytes = Vec::new();
            self.bytes = vec![0; len + PAGE];
            self.skip = self.bytes.as_ptr().align_offset(PAGE).min(PAGE);
        }
        &mut self.bytes[self.skip..self.skip + len]
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Plain {
    buffer: Buffer,
    window: Option<Window>,
    /// It is the window that has the bytes.
    seen: bool,
    /// There is no window to be had.
    blind: bool,
}

impl Plain {
    /// Room to read `len` bytes into.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        self.seen = false;
        self.buffer.get(len)
    }

    /// The chunk's bytes.
    pub fn bytes(&mut self, len: usize) -> &[u8] {
        match &self.window {
            Some(window) if self.seen => &window.bytes()[..len],
            _ => self.buffer.get(len),
        }
    }

    /// Tries to see a chunk, of at most `longest` bytes, as it lies in its files. False where it has to be read.
    pub fn see(&mut self, chunk: &Chunk<'_>, longest: u64) -> Result<bool> {
        self.seen = false;
        if self.blind || chunk.segments.iter().any(|segment| matches!(segment.content, Content::Keep)) {
            return Ok(false);
        }
        if self.window.is_none() {
            self.window = usize::try_from(longest).ok().and_then(Window::new);
            self.blind = self.window.is_none();
        }
        let Some(window) = &mut self.window else { return Ok(false) };
        window.clear();
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
