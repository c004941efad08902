//! Secrets that are read from files: of what was read no copy is left behind, in memory or in a core file.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use zeroize::Zeroizing;

/// From here on no core file of this program is written, and nobody but root can look into it.
pub fn keep_from_core_files() {
    // Where the kernel refuses, a passphrase is still wanted.
    let _ = nix::sys::prctl::set_dumpable(false);
}

/// What a file holds, but for what lies behind so many bytes. What grows leaves copies behind: each is wiped.
pub fn whole_file(path: &Path, most: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut file = File::open(path)?;
    let mut bytes = Zeroizing::new(vec![0; most.min(4096)]);
    let mut length = 0;
    loop {
        if length == bytes.len() {
            if length == most {
                break;
            }
            let mut longer = Zeroizing::new(vec![0; length.saturating_mul(2).min(most)]);
            longer[..length].copy_from_slice(&bytes);
            bytes = longer;
        }
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(n) => length += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(length);
    Ok(bytes)
}
