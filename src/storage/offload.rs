//! Copying from file to file without passing the bytes through this program: `copy_file_range(2)`, which shares
//! extents where the file system can.

use std::io;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;

use super::{Result, Storage};

/// Copies `len` bytes. False, with the target perhaps partly written, where the host has no way to do it: both
/// must be files of the host, and the file systems must agree.
pub fn copy(from: &dyn Storage, from_at: u64, to: &dyn Storage, to_at: u64, len: u64) -> Result<bool> {
    if !(from.facts().offload && to.facts().offload) {
        return Ok(false);
    }
    let (Some(source), Some(target)) = (from.host(), to.host()) else { return Ok(false) };
    let mut done = 0;
    while done < len {
        let offset = |at: u64| i64::try_from(at + done).map_err(|_| io::Error::from(Errno::EFBIG));
        let (mut source_at, mut target_at) = (offset(from_at)?, offset(to_at)?);
        let wanted = usize::try_from(len - done).unwrap_or(usize::MAX).min(1 << 30);
        match copy_file_range(source.file(), Some(&mut source_at), target.file(), Some(&mut target_at), wanted) {
            // The source ends here: what lies past it reads as zeros, which is for the caller to write.
            Ok(0) => return Ok(false),
            Ok(n) => done += n as u64,
            Err(Errno::EINTR) => {}
            Err(Errno::ENOSPC | Errno::EDQUOT | Errno::EIO | Errno::EFBIG) if done > 0 => return Ok(false),
            Err(errno @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EIO | Errno::EFBIG)) => return Err(errno.into()),
            // EXDEV, EINVAL, EOPNOTSUPP, ENOSYS, EPERM, ETXTBSY, ...: another way must be taken.
            Err(_) => return Ok(false),
        }
    }
    Ok(true)
}
