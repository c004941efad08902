//! Byte-range locks that the reference and we both honour.
//!
//! For each permission that is used, a shared lock on byte 100 + n; for each that is *not* shared with others, one
//! on byte 200 + n. Having taken them, the opposite bytes are tested: 200 + n for what is used, 100 + n for what is
//! refused. They are OFD locks: they belong to the open file, so two opens of one file in the same process conflict
//! too, and closing some other descriptor of the file does not drop them. (`spec` 1.10.)
//!
//! Invariant: a change that fails leaves the locks as they were. A file system that has no such locks is no error.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::holder::LockPlace;
use super::{Error, Result};

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

const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
const USED: i64 = 100;
const REFUSED: i64 = 200;

/// What each use takes, as seen in the reference (10.0.2). The refusals of `LOOK`, `READ` and `WRITE` are those of
/// every format but raw: raw adds none of its own, see [`Access::of_raw`].
impl Access {
    /// Takes nothing: until the format is known, and for looking at an image that others may write (`info -U`).
    pub const NONE: Access = Access { uses: 0, refuses: 0 };
    /// Reads, and allows other writers (`-U`).
    pub const SHARED: Access = Access { uses: CONSISTENT_READ, refuses: 0 };
    /// Reads; nobody may write or resize meanwhile.
    pub const READ: Access = Access { uses: CONSISTENT_READ, refuses: WRITE | RESIZE };
    /// Looks at the header only (`info`); nobody may write or resize meanwhile.
    pub const LOOK: Access = Access { uses: 0, refuses: WRITE | RESIZE };
    /// Writes; nobody else may write or resize meanwhile.
    pub const WRITE: Access = Access { uses: CONSISTENT_READ | WRITE | RESIZE, refuses: WRITE | RESIZE };
    /// Makes a new file where one is; nobody else may resize it meanwhile, nor refuse that it be written.
    pub const CREATE: Access = Access { uses: WRITE | RESIZE, refuses: RESIZE };

    /// The same use of a raw image, which allows other writers: `info` takes nothing, `map` and `compare` read with
    /// [`Access::SHARED`], a writer refuses nobody. (Sources of `convert` are an exception: they take
    /// [`Access::READ`] whatever their format.)
    pub const fn of_raw(self) -> Access {
        Access { uses: self.uses, refuses: 0 }
    }

    /// The same use of an external data file, whose content may change but whose length may not.
    pub const fn of_data_file(self) -> Access {
        Access { uses: self.uses, refuses: self.refuses & RESIZE }
    }

    /// Both.
    pub const fn and(self, other: Access) -> Access {
        Access { uses: self.uses | other.uses, refuses: self.refuses | other.refuses }
    }

    /// The bytes that are locked, in the reference's order.
    fn bytes(self) -> impl Iterator<Item = i64> {
        bits(self.uses).map(|n| USED + n).chain(bits(self.refuses).map(|n| REFUSED + n))
    }
}

fn bits(set: u8) -> impl Iterator<Item = i64> {
    (0..NAMES.len()).filter(move |n| set & (1 << n) != 0).map(|n| n as i64)
}

/// Takes the locks or says which permission could not be had; `name` is for the hint.
pub fn take(fd: BorrowedFd<'_>, access: Access, name: &str) -> Result<()> {
    change(fd, Access::NONE, access, name)
}

/// Goes from the locks held to others: takes what is missing, tests what is used and refused, then drops what is no
/// longer needed.
pub fn change(fd: BorrowedFd<'_>, from: Access, to: Access, name: &str) -> Result<()> {
    let missing = Access { uses: to.uses & !from.uses, refuses: to.refuses & !from.refuses };
    let surplus = Access { uses: from.uses & !to.uses, refuses: from.refuses & !to.refuses };
    let taken = match lock_all(fd, missing) {
        // Who claims nothing new is in nobody's way.
        Ok(_) if missing == Access::NONE => Ok(()),
        Ok(true) => test(fd, to, name),
        Ok(false) => return Ok(()),
        Err(error) => Err(error),
    };
    let drop = if taken.is_ok() { surplus } else { missing };
    for byte in drop.bytes() {
        // A lock that cannot be given back goes when the file is closed.
        let _ = fcntl(fd, FcntlArg::F_OFD_SETLK(&flock(libc::F_UNLCK, byte)));
    }
    taken
}

/// Takes the locks for another descriptor of a file whose locks by the first one are the same: whoever could be in the
/// way was in its way.
pub fn take_with(fd: BorrowedFd<'_>, access: Access) -> Result<()> {
    lock_all(fd, access).map(|_| ())
}

/// False if the file system has no such locks.
fn lock_all(fd: BorrowedFd<'_>, access: Access) -> Result<bool> {
    for byte in access.bytes() {
        match fcntl(fd, FcntlArg::F_OFD_SETLK(&flock(libc::F_RDLCK, byte))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(Error::LockByte(byte)),
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::ENOLCK | Errno::EOPNOTSUPP) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(true)
}

fn test(fd: BorrowedFd<'_>, access: Access, name: &str) -> Result<()> {
    let opposite = bits(access.uses).map(|n| (REFUSED, n, false)).chain(bits(access.refuses).map(|n| (USED, n, true)));
    for (base, n, shared) in opposite {
        let mut probe = flock(libc::F_WRLCK, base + n);
        // Where testing is not possible nobody can be in the way.
        if fcntl(fd, FcntlArg::F_OFD_GETLK(&mut probe)).is_ok() && i32::from(probe.l_type) != libc::F_UNLCK {
            let permission = NAMES.get(n as usize).copied().unwrap_or_default();
            let lock = LockPlace::of(fd, base + n);
            return Err(Error::Locked { permission, shared, name: name.to_owned(), lock });
        }
    }
    Ok(())
}

/// Where claims on names are: far behind any permission's byte.
const CLAIMS: i64 = 1 << 61;

/// Claims a name in a folder, for as long as `folder` is open; `shown` is for the hint. It is a lock on a byte of the
/// folder that follows from the name: what has no name yet has no file that could be locked. A folder that has no such
/// locks is no error.
///
/// It is tested first and taken then, for a folder is open for reading, and such a lock excludes nobody: of two that
/// come at the same instant both go on, and the first that gives the name has it. The other way round each would see
/// the other's lock, and neither would go on.
pub fn claim(folder: &File, name: &OsStr, shown: &str) -> Result<()> {
    if is_claimed(folder, name) {
        let lock = LockPlace::of(folder.as_fd(), claim_byte(name));
        return Err(Error::Locked { permission: "write", shared: false, name: shown.to_owned(), lock });
    }
    take_claim(folder, name);
    Ok(())
}

/// The byte of a folder that a name's claim is on.
fn claim_byte(name: &OsStr) -> i64 {
    // FNV-1a: every version must come to the same byte.
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = name.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, mix);
    CLAIMS + i64::try_from(hash >> 4).unwrap_or_default()
}

fn is_claimed(folder: &File, name: &OsStr) -> bool {
    let mut probe = flock(libc::F_WRLCK, claim_byte(name));
    fcntl(folder.as_fd(), FcntlArg::F_OFD_GETLK(&mut probe)).is_ok() && i32::from(probe.l_type) != libc::F_UNLCK
}

fn take_claim(folder: &File, name: &OsStr) {
    // Where it cannot be had, the name itself is looked at when it is given.
    let _ = fcntl(folder.as_fd(), FcntlArg::F_OFD_SETLK(&flock(libc::F_RDLCK, claim_byte(name))));
}

fn flock(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> (std::fs::File, std::fs::File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        (file.reopen().unwrap(), file.reopen().unwrap())
    }

    fn text(result: Result<()>) -> String {
        result.map_or_else(|e| e.to_string(), |()| "ok".to_owned())
    }

    #[test]
    fn who_conflicts_with_whom() {
        let w = "Failed to get \"write\" lock";
        let s = "Failed to get shared \"write\" lock";
        let table = [
            (Access::READ, Access::READ, "ok"),
            (Access::LOOK, Access::READ, "ok"),
            (Access::READ, Access::WRITE, w),
            (Access::LOOK, Access::WRITE, w),
            (Access::WRITE, Access::READ, s),
            (Access::WRITE, Access::LOOK, s),
            (Access::WRITE, Access::WRITE, w),
            (Access::WRITE, Access::SHARED, "ok"),
            (Access::SHARED, Access::WRITE, "ok"),
            (Access::WRITE, Access::NONE, "ok"),
            (Access::READ, Access::CREATE, w),
            (Access::WRITE.of_raw(), Access::WRITE.of_raw(), "ok"),
            (Access::WRITE.of_raw(), Access::LOOK.of_raw(), "ok"),
            (Access::WRITE.of_raw(), Access::READ, s),
            (Access::CREATE, Access::CREATE, "Failed to get \"resize\" lock"),
        ];
        for (first, second, expected) in table {
            let (a, b) = two();
            take(a.as_fd(), first, "x").unwrap();
            assert_eq!(text(take(b.as_fd(), second, "x")), expected, "{first:?} then {second:?}");
            drop(a);
            assert_eq!(text(take(b.as_fd(), second, "x")), "ok", "released with the file");
        }
    }

    #[test]
    fn a_name_is_claimed_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = || File::open(dir.path()).unwrap();
        let claimed = |folder: &File, name: &str| text(claim(folder, name.as_ref(), name));
        let (a, b) = (folder(), folder());
        assert_eq!(claimed(&a, "x"), "ok");
        assert_eq!(claimed(&b, "x"), "Failed to get \"write\" lock");
        assert_eq!(claimed(&b, "y"), "ok");
        drop((a, b));
        assert_eq!(claimed(&folder(), "x"), "ok");
    }

    #[test]
    fn locks_pass_to_another_descriptor_with_nobody_between() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let [a, b, other] = [0; 3].map(|_| file.reopen().unwrap());
        take(a.as_fd(), Access::READ, "x").unwrap();
        change(a.as_fd(), Access::READ, Access::WRITE, "x").unwrap();
        take_with(b.as_fd(), Access::WRITE).unwrap();
        change(a.as_fd(), Access::WRITE, Access::READ, "x").unwrap();
        drop(a);
        assert_eq!(text(take(other.as_fd(), Access::READ, "x")), "Failed to get shared \"write\" lock");
        drop(b);
        assert_eq!(text(take(other.as_fd(), Access::READ, "x")), "ok");
    }

    #[test]
    fn a_failed_change_leaves_what_was() {
        let (a, b) = two();
        take(a.as_fd(), Access::READ, "x").unwrap();
        take(b.as_fd(), Access::READ, "x").unwrap();
        assert!(change(b.as_fd(), Access::READ, Access::WRITE, "x").is_err());
        // Neither the used nor the refused bytes of the attempt are left behind.
        change(a.as_fd(), Access::READ, Access::SHARED, "x").unwrap();
        take(a.as_fd(), Access::READ, "x").unwrap();
        drop(a);
        change(b.as_fd(), Access::READ, Access::WRITE, "x").unwrap();
        change(b.as_fd(), Access::WRITE, Access::NONE, "x").unwrap();
    }

    /// Whichever of the calls of two that come at once is the later one: not both are refused, and a third one is.
    #[test]
    fn of_two_claims_at_once_one_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (name, other) = (OsStr::new("a"), OsStr::new("b"));
        let open = || File::open(dir.path()).unwrap();
        let (first, second, third) = (open(), open(), open());
        assert!(!is_claimed(&first, name) && !is_claimed(&second, name));
        take_claim(&first, name);
        take_claim(&second, name);
        assert!(text(claim(&third, name, "a")).contains("\"write\" lock"));
        assert_eq!(text(claim(&third, other, "b")), "ok");
        drop(first);
        assert!(is_claimed(&third, name));
        drop(second);
        assert_eq!(text(claim(&third, name, "a")), "ok");
    }
}
