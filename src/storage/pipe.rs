//! Pipes: bytes that come from front to back, once, or go so. They have no positions, so they are no
//! [`Storage`](super::Storage).

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::{Error, Result};

/// Whether there is a pipe under that name (`/dev/stdin`, `/dev/stdout`, a named one).
pub fn is_pipe(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo())
}

/// Opens one to read from it; waits for somebody who writes.
pub fn open_source(path: &Path) -> Result<File> {
    open(path, OpenOptions::new().read(true))
}

/// Opens one to write to it; waits for somebody who reads.
pub fn open_sink(path: &Path) -> Result<File> {
    open(path, OpenOptions::new().write(true))
}

fn open(path: &Path, how: &OpenOptions) -> Result<File> {
    let name = path.to_string_lossy().into_owned();
    how.open(path).map_err(|cause| Error::File { doing: "open", name, cause })
}
