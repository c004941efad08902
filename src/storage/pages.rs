//! Memory in whole pages: it starts at one, as `O_DIRECT` wants, is zeros at first, and goes back to the host as soon as
//! it is dropped, which memory of the allocator may not.
//!
//! Invariant: the memory is its owner's alone until it is dropped.

use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use nix::libc;

use super::Result;

/// See the module. The default has none.
#[derive(Debug)]
pub struct Pages {
    first: NonNull<u8>,
    len: usize,
}

// SAFETY: bytes that nobody else has; who has the value may use them from any thread.
unsafe impl Send for Pages {}

impl Pages {
    /// `len` bytes, all zeros.
    pub fn new(len: usize) -> Result<Self> {
        if len == 0 {
            return Ok(Self::default());
        }
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory at an address that the kernel chooses.
        let first = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, -1, 0) };
        match NonNull::new(first.cast::<u8>()).filter(|_| first != libc::MAP_FAILED) {
            Some(first) => Ok(Self { first, len }),
            None => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// The first `len` bytes. If there are fewer it is new memory, and what the old one held is gone.
    pub fn room(&mut self, len: usize) -> Result<&mut [u8]> {
        if self.len < len {
            // Never both at once.
            *self = Self::default();
            *self = Self::new(len)?;
        }
        Ok(&mut self[..len])
    }

    /// The same, as they are; none where there are fewer.
    pub fn first(&self, len: usize) -> &[u8] {
        self.get(..len).unwrap_or_default()
    }
}

impl Default for Pages {
    fn default() -> Self {
        Self { first: NonNull::dangling(), len: 0 }
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes are mapped there until the value is dropped, or there are none.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping is this value's own, and no reference to its bytes can be left.
            unsafe { libc::munmap(self.first.as_ptr().cast(), self.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_start_at_a_page_and_are_zeros() {
        let mut pages = Pages::new(10_000).unwrap();
        assert_eq!((pages.len(), pages.as_ptr() as usize % 4096), (10_000, 0));
        assert!(pages.iter().all(|byte| *byte == 0));
        pages.fill(7);
        assert!(pages.iter().all(|byte| *byte == 7));
        assert_eq!(pages.room(9_000).unwrap(), [7; 9_000]);
        assert_eq!(pages.room(11_000).unwrap(), [0; 11_000]);
        assert!(Pages::default().is_empty() && Pages::new(0).unwrap().is_empty());
        assert_eq!(pages.room(usize::MAX / 4).unwrap_err().errno(), Some(nix::errno::Errno::ENOMEM));
        assert!(pages.is_empty() && pages.room(1).is_ok());
    }
}
