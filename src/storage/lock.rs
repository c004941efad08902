//! Byte-range locks that the reference and we both honour.
//!
//! For each permission that is used, a shared lock on byte 100 + n; for each that is *not* shared with others, one
//! on byte 200 + n. Having taken them, the opposite bytes are tested. They are OFD locks: they belong to the open
//! file, so two opens of one file in the same process conflict too. (`spec` 1.10.)

use std::os::fd::BorrowedFd;

use super::Result;

/// Sets of permissions, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Access {
    /// Permissions that are used.
    pub uses: u8,
    /// Permissions that others must not use meanwhile.
    pub refuses: u8,
}

/// Reading what does not change under us.
pub const CONSISTENT_READ: u8 = 1 << 0;
/// Writing.
pub const WRITE: u8 = 1 << 1;
/// Writing what does not change the visible content.
pub const WRITE_UNCHANGED: u8 = 1 << 2;
/// Changing the length.
pub const RESIZE: u8 = 1 << 3;

impl Access {
    /// Looks, and bears others that write (`-U`).
    pub const SHARED: Access = Access { uses: 0, refuses: 0 };
    /// Reads; nobody may write or resize meanwhile.
    pub const READ: Access = Access { uses: CONSISTENT_READ, refuses: WRITE | RESIZE };
    /// Looks at the header only; nobody may write or resize meanwhile.
    pub const LOOK: Access = Access { uses: 0, refuses: WRITE | RESIZE };
    /// Writes; nobody else may write or resize meanwhile.
    pub const WRITE: Access = Access { uses: CONSISTENT_READ | WRITE | RESIZE, refuses: WRITE | RESIZE };
}

/// Takes the locks or says which permission could not be had.
pub fn take(_fd: BorrowedFd<'_>, _access: Access) -> Result<()> {
    Ok(())
}
