//! What each preallocation mode and each way of zeroing does to a range of a file: the sparse layer.
//!
//! One table of ways with their fallbacks: `fallocate(2)` first, by hand where the file system cannot.
//! `EOPNOTSUPP` is a way to take, not an error to show; `ENOSPC` is an error to show, at once.

use std::fs::File;

use nix::fcntl::{FallocateFlags, fallocate};

use super::{Error, Kind, Preallocation, Result, Storage, Zeroing};

/// The alignment that `O_DIRECT` asks for on this file.
pub fn direct_alignment(_file: &File, _kind: Kind) -> u32 {
    4096
}

/// The size of a block device, in bytes.
pub fn device_size(file: &File) -> Result<u64> {
    use std::io::{Seek, SeekFrom};
    Ok((&mut &*file).seek(SeekFrom::End(0))?)
}

fn off(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|_| nix::errno::Errno::EFBIG.into())
}

/// See [`Storage::zero`].
pub fn zero(storage: &dyn Storage, file: &File, at: u64, len: u64, how: Zeroing) -> Result<()> {
    let flags = match how {
        Zeroing::Punch => FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        Zeroing::Allocate => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        Zeroing::Write => return write_zeros(storage, at, len),
    };
    match fallocate(file, flags, off(at)?, off(len)?).map_err(Error::from) {
        Err(e) if e.is_unsupported() => write_zeros(storage, at, len),
        other => other,
    }
}

fn write_zeros(storage: &dyn Storage, at: u64, len: u64) -> Result<()> {
    let zeros = vec![0u8; len.min(1 << 20) as usize];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(zeros.len() as u64);
        storage.write_at(at + done, &zeros[..n as usize])?;
        done += n;
    }
    Ok(())
}

/// See [`Storage::discard`].
pub fn discard(file: &File, _kind: Kind, at: u64, len: u64) -> Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, flags, off(at)?, off(len)?).map_err(Error::from) {
        Err(e) if e.is_unsupported() => Ok(()),
        other => other,
    }
}

/// See [`Storage::set_len`].
pub fn set_len(storage: &dyn Storage, file: &File, len: u64, fill: Preallocation) -> Result<()> {
    let old = storage.len()?;
    if storage.kind().is_device() {
        return if fill != Preallocation::Off {
            Err(Error::DevicePreallocation(fill))
        } else if len > old {
            Err(Error::GrowDevice)
        } else {
            Ok(())
        };
    }
    match fill {
        Preallocation::Off => Ok(file.set_len(len)?),
        Preallocation::Metadata => Err(Error::UnsupportedPreallocation(fill)),
        Preallocation::Falloc if len > old => {
            match fallocate(file, FallocateFlags::empty(), off(old)?, off(len - old)?).map_err(Error::from) {
                Err(e) if e.is_unsupported() => write_zeros(storage, old, len - old),
                other => other,
            }
        }
        Preallocation::Full if len > old => {
            write_zeros(storage, old, len - old)?;
            storage.flush()
        }
        _ => Ok(file.set_len(len)?),
    }
}
