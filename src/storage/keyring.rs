//! Keys that the kernel keeps (keyrings(7)).

use std::io;

use nix::errno::Errno;
use nix::libc;

/// `KEYCTL_READ` of keyctl(2).
const READ: libc::c_long = 11;

/// What the key with that number holds.
pub fn read(serial: i32) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        // SAFETY: the kernel writes no more than as many bytes as the vector has, and tells how many the key has.
        let len = unsafe {
            libc::syscall(libc::SYS_keyctl, READ, libc::c_long::from(serial), bytes.as_mut_ptr(), bytes.len())
        };
        let len = usize::try_from(Errno::result(len)?).unwrap_or_default();
        if len <= bytes.len() {
            bytes.truncate(len);
            return Ok(bytes);
        }
        // Nothing of it is there yet, or, where the key has just become longer, what is there is wiped.
        zeroize::Zeroize::zeroize(&mut bytes);
        bytes = vec![0; len];
    }
}
