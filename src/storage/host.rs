//! What has to be asked of the kernel by hand: the `ioctl`s of devices and file systems.
//!
//! All of the crate's ioctls are here, each a function that is safe to call on any open file: the kernel answers
//! `ENOTTY` for a file of another kind.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{self, c_int, c_long};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::{Mode, umask as umask_set};
use nix::sys::statfs::FsType;
use nix::{ioctl_read_bad, ioctl_write_ptr_bad, request_code_none, request_code_read, request_code_write};

use super::{FileKind, Identity, Result};

/// `FS_IOC_FSGETXATTR`'s structure, `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct FsXattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

const _: () = assert!(size_of::<FsXattr>() == 28);

/// `FICLONERANGE`'s structure, `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CloneRange {
    source: i64,
    source_at: u64,
    len: u64,
    target_at: u64,
}

const _: () = assert!(size_of::<CloneRange>() == 32);

const XFLAG_EXTSIZE: u32 = 0x0800;
const NOCOW: c_int = 0x0080_0000;

use requests::*;

/// What `statfs(2)` calls XFS: "XFSB". Not every C library has a name for it.
pub const XFS: FsType = FsType(0x5846_5342);

/// The requests themselves, as the macros make them: unsafe, on bare pointers.
#[allow(missing_docs)]
mod requests {
    use super::*;

    ioctl_read_bad!(blk_ro_get, request_code_none!(0x12, 94), c_int);
    ioctl_read_bad!(blk_ssz_get, request_code_none!(0x12, 104), c_int);
    ioctl_read_bad!(blk_get_size64, request_code_read!(0x12, 114, size_of::<usize>()), u64);
    ioctl_write_ptr_bad!(blk_discard, request_code_none!(0x12, 119), [u64; 2]);
    ioctl_write_ptr_bad!(blk_zero_out, request_code_none!(0x12, 127), [u64; 2]);
    ioctl_read_bad!(terminal_size, libc::TIOCGWINSZ, libc::winsize);
    ioctl_read_bad!(fs_get_xattr, request_code_read!(b'X', 31, size_of::<FsXattr>()), FsXattr);
    ioctl_write_ptr_bad!(fs_set_xattr, request_code_write!(b'X', 32, size_of::<FsXattr>()), FsXattr);
    ioctl_read_bad!(fs_get_flags, request_code_read!(b'f', 1, size_of::<c_long>()), c_int);
    ioctl_write_ptr_bad!(clone_range, request_code_write!(0x94, 13, size_of::<CloneRange>()), CloneRange);
    ioctl_read_bad!(loop_status, 0x4c05, [u64; 29]);
    ioctl_write_ptr_bad!(fs_set_flags, request_code_write!(b'f', 2, size_of::<c_long>()), c_int);
}

/// A descriptor that we were started with, as a file of our own. What we opened ourselves is closed by `exec`, so it is
/// none of those.
pub fn descriptor(number: RawFd) -> io::Result<File> {
    // SAFETY: `fcntl` with F_GETFD takes any number.
    match unsafe { libc::fcntl(number, libc::F_GETFD) } {
        -1 => return Err(io::Error::last_os_error()),
        flags if flags & libc::FD_CLOEXEC != 0 => return Err(Errno::EBADF.into()),
        _ => {}
    }
    // SAFETY: it is open, as was just seen, and nothing here closes descriptors that it did not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    Ok(File::from(borrowed.try_clone_to_owned()?))
}

/// How many columns a terminal has, where it says so.
pub fn columns(terminal: BorrowedFd<'_>) -> Option<usize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is open, and TIOCGWINSZ writes a `winsize` to where `size` lies.
    unsafe { terminal_size(terminal.as_raw_fd(), &mut size) }.ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// The size of a block device, in bytes.
pub fn device_size(file: &File) -> Result<u64> {
    let mut size = 0u64;
    // SAFETY: the descriptor is open, and BLKGETSIZE64 writes eight bytes to where `size` lies.
    unsafe { blk_get_size64(file.as_raw_fd(), &mut size) }?;
    Ok(size)
}

/// Whether a block device takes no writes.
pub fn is_read_only(file: &File) -> bool {
    let mut answer: c_int = 0;
    // SAFETY: the descriptor is open, and BLKROGET writes one int to where `answer` lies.
    unsafe { blk_ro_get(file.as_raw_fd(), &mut answer) }.is_ok() && answer != 0
}

/// The sector of a block device, in bytes.
pub fn sector(file: &File) -> u64 {
    let mut answer: c_int = 0;
    // SAFETY: the descriptor is open, and BLKSSZGET writes one int to where `answer` lies.
    let asked = unsafe { blk_ssz_get(file.as_raw_fd(), &mut answer) };
    match (asked, u64::try_from(answer)) {
        (Ok(_), Ok(size)) if size.is_power_of_two() => size,
        _ => 512,
    }
}

/// What is behind a loop device.
pub enum BehindLoop {
    /// A file.
    File(Identity),
    /// A block device of that number.
    Device(u64),
}

/// What is behind a loop device, or behind that of a partition, and where in it the loop device begins.
pub fn behind_loop(file: &File) -> Option<(BehindLoop, u64)> {
    let mut status = [0u64; 29];
    // SAFETY: the descriptor is open, and LOOP_GET_STATUS64 writes 232 bytes (`struct loop_info64`, `linux/loop.h`) to
    // where the array lies.
    unsafe { loop_status(file.as_raw_fd(), &mut status) }.ok()?;
    // It begins with the file's device, its inode, the device that it is if it is one, and the offset.
    let [device, inode, number, offset, ..] = status;
    let behind = if number == 0 { BehindLoop::File(Identity { device, inode }) } else { BehindLoop::Device(number) };
    Some((behind, offset))
}

/// The device need not keep what is in the range (`at` and `len` in whole sectors).
pub fn discard_device(file: &File, at: u64, len: u64) -> Result<()> {
    // SAFETY: the descriptor is open, and BLKDISCARD reads two 64-bit numbers from where the array lies.
    unsafe { blk_discard(file.as_raw_fd(), &[at, len]) }?;
    Ok(())
}

/// The device makes the range read as zeros (`at` and `len` in whole sectors).
pub fn zero_device(file: &File, at: u64, len: u64) -> Result<()> {
    // SAFETY: the descriptor is open, and BLKZEROOUT reads two 64-bit numbers from where the array lies.
    unsafe { blk_zero_out(file.as_raw_fd(), &[at, len]) }?;
    Ok(())
}

/// Has a file share bytes of another one: both keep them, on the disk they are there once. All numbers are multiples of
/// the file system's block.
pub fn share_range(source: &File, source_at: u64, len: u64, target: &File, target_at: u64) -> Result<()> {
    let range = CloneRange { source: source.as_raw_fd().into(), source_at, len, target_at };
    // SAFETY: both descriptors are open, and FICLONERANGE reads one such structure from where it lies.
    unsafe { clone_range(target.as_raw_fd(), &range) }?;
    Ok(())
}

fn attributes(file: &File) -> std::result::Result<FsXattr, Errno> {
    let mut attributes = FsXattr::default();
    // SAFETY: the descriptor is open, and FS_IOC_FSGETXATTR writes one such structure to where it lies.
    unsafe { fs_get_xattr(file.as_raw_fd(), &mut attributes) }?;
    Ok(attributes)
}

/// The extent size hint of a file that has one (XFS).
pub fn extent_size_hint(file: &File) -> Option<u64> {
    let attributes = attributes(file).ok()?;
    (attributes.extsize != 0).then_some(u64::from(attributes.extsize))
}

/// Sets the extent size hint of an empty file; not every file system has such hints.
pub fn set_extent_size_hint(file: &File, hint: u32) -> Result<()> {
    let mut attributes = attributes(file)?;
    attributes.extsize = hint;
    match hint {
        0 => attributes.xflags &= !XFLAG_EXTSIZE,
        _ => attributes.xflags |= XFLAG_EXTSIZE,
    }
    // SAFETY: the descriptor is open, and FS_IOC_FSSETXATTR reads one such structure from where it lies.
    unsafe { fs_set_xattr(file.as_raw_fd(), &attributes) }?;
    Ok(())
}

/// Asks that an empty file's blocks be overwritten in place (btrfs). Where that cannot be asked, nothing is done.
pub fn set_nocow(file: &File) {
    let mut flags: c_int = 0;
    // SAFETY: the descriptor is open; despite their encoded size both requests move one int.
    unsafe {
        if fs_get_flags(file.as_raw_fd(), &mut flags).is_ok() {
            flags |= NOCOW;
            let _ = fs_set_flags(file.as_raw_fd(), &flags);
        }
    }
}

/// Flags of a file that its owner may set and that say how it is stored or kept, `linux/fs.h`: all that
/// `FS_FL_USER_MODIFIABLE` has but immutable and append-only, which a file that was written to has not.
const FLAGS: c_int = 0x0000_0001 // secure deletion
    | 0x0000_0002 // undelete
    | 0x0000_0004 // compress
    | 0x0000_0008 // synchronous
    | 0x0000_0040 // no dump
    | 0x0000_0080 // no access time
    | 0x0000_0400 // do not compress
    | 0x0000_4000 // journal data
    | 0x0000_8000 // no tail merging
    | NOCOW
    | 0x0200_0000; // direct access

/// The same of `FS_IOC_FSGETXATTR`: real-time, synchronous, no access time, no dump, no defragmentation, file stream,
/// direct access, copy-on-write extent size.
const XFLAGS: u32 = 0x0001 | 0x0020 | 0x0040 | 0x0080 | 0x2000 | 0x4000 | 0x8000 | 0x0001_0000;

/// Gives an empty file the flags and the project of another one, as far as that can be done. (Not the extent size hint,
/// which is chosen anew.)
pub fn copy_flags(from: &File, to: &File) {
    let (mut wanted, mut has): (c_int, c_int) = (0, 0);
    // SAFETY: the descriptors are open; despite their encoded size these requests move one int.
    unsafe {
        if fs_get_flags(from.as_raw_fd(), &mut wanted).is_ok() && fs_get_flags(to.as_raw_fd(), &mut has).is_ok() {
            let all = (has & !FLAGS) | (wanted & FLAGS);
            if all != has && fs_set_flags(to.as_raw_fd(), &all).is_err() {
                // Not all of them go together, or may be set by anybody.
                for bit in (0..31).map(|n| 1 << n).filter(|bit| wanted & FLAGS & bit != 0) {
                    if fs_set_flags(to.as_raw_fd(), &(has | bit)).is_ok() {
                        has |= bit;
                    }
                }
            }
        }
    }
    let (Ok(wanted), Ok(mut has)) = (attributes(from), attributes(to)) else { return };
    let same = |a: &FsXattr, b: &FsXattr| {
        (a.xflags & XFLAGS, a.projid, a.cowextsize) == (b.xflags & XFLAGS, b.projid, b.cowextsize)
    };
    if !same(&wanted, &has) {
        has.xflags = (has.xflags & !XFLAGS) | (wanted.xflags & XFLAGS);
        (has.projid, has.cowextsize) = (wanted.projid, wanted.cowextsize);
        // SAFETY: the descriptor is open, and FS_IOC_FSSETXATTR reads one such structure from where it lies.
        let _ = unsafe { fs_set_xattr(to.as_raw_fd(), &has) };
    }
}

/// What `O_DIRECT` asks offsets and lengths to be multiples of.
pub fn direct_unit(file: &File, kind: FileKind) -> usize {
    match kind {
        FileKind::BlockDevice => usize::try_from(sector(file)).unwrap_or(4096),
        _ => 4096,
    }
}

/// Writing past the limit on file sizes becomes an error that can be told, instead of the end of the process.
pub fn ignore_file_size_signal() {
    // SAFETY: to ignore a signal runs no code of ours; nothing else here sets this one.
    let _ = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
}

/// As many files at once as the system lets us: an image may have thousands.
pub fn raise_open_files_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Where it is refused, what does not fit is told when it is opened.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// From here on no file is written past that length: what would be is an error (`EFBIG`).
pub fn limit_file_size(bytes: u64) -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
    setrlimit(Resource::RLIMIT_FSIZE, bytes.min(hard), bytes.min(hard))
}

/// The size of a page of the cache.
pub fn page_size() -> usize {
    // SAFETY: sysconf touches no memory of ours.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Whether every write to the file waits for stable storage.
pub fn is_synchronous(file: &File) -> bool {
    fcntl(file, FcntlArg::F_GETFL).is_ok_and(|flags| OFlag::from_bits_retain(flags).contains(OFlag::O_DSYNC))
}

/// Whether a file is where something is mounted, so that no other file can take its name.
pub fn is_mount_point(file: &File) -> bool {
    // SAFETY: all-zero bytes are a valid statx structure; the path is an empty C string, and with AT_EMPTY_PATH the
    // kernel writes one statx structure about the open descriptor to where it lies.
    unsafe {
        let mut answer: libc::statx = std::mem::zeroed();
        let asked = libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, 0, &mut answer);
        let bit = libc::STATX_ATTR_MOUNT_ROOT as u64;
        asked == 0 && answer.stx_attributes_mask & answer.stx_attributes & bit != 0
    }
}

/// Has the kernel begin to write back that part of a file.
pub fn start_writeback(file: &File, at: u64, len: u64) -> io::Result<()> {
    sync_range(file, at, len, libc::SYNC_FILE_RANGE_WRITE)
}

/// Waits until what is being written back of that part has reached the device.
pub fn wait_for_writeback(file: &File, at: u64, len: u64) -> io::Result<()> {
    sync_range(file, at, len, libc::SYNC_FILE_RANGE_WAIT_BEFORE)
}

fn sync_range(file: &File, at: u64, len: u64, flags: libc::c_uint) -> io::Result<()> {
    let signed = |value| i64::try_from(value).map_err(|_| io::Error::from(Errno::EFBIG));
    // SAFETY: the descriptor is open; the call moves no memory of ours.
    Errno::result(unsafe { libc::sync_file_range(file.as_raw_fd(), signed(at)?, signed(len)?, flags) })?;
    Ok(())
}

/// Sets a file's permissions.
pub fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(mode))
}

/// The permissions that new files do not get. There is no way to look at them without setting them: for that moment
/// they are the strictest.
pub fn umask() -> u32 {
    let mask = umask_set(Mode::from_bits_truncate(0o777));
    umask_set(mask);
    mask.bits()
}

/// Whether a file is a disk that the kernel uses meanwhile: behind a loop device, or mounted as it is.
pub fn is_in_use_as_device(identity: Identity) -> bool {
    let is_it = |path: &OsStr| {
        fs::metadata(path).is_ok_and(|meta| Identity { device: meta.dev(), inode: meta.ino() } == identity)
    };
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let loops = devices.filter(|entry| entry.file_name().as_bytes().starts_with(b"loop"));
    let backing = loops.filter_map(|entry| fs::read(entry.path().join("loop/backing_file")).ok());
    let mut backing =
        backing.map(|name| OsString::from_vec(name.strip_suffix(b"\n").map(<[u8]>::to_vec).unwrap_or(name)));
    backing.any(|name| is_it(&name)) || mounted_files().iter().any(|name| is_it(name))
}

/// Regular files that are mounted as they are, `proc_pid_mountinfo(5)`: after a lone `-` the type and the source.
fn mounted_files() -> Vec<OsString> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let source = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ').skip_while(|field| *field != b"-");
        let source = fields.nth(2)?;
        (source.starts_with(b"/") && !source.starts_with(b"/dev/")).then(|| OsString::from_vec(unescaped(source)))
    };
    table.split(|byte| *byte == b'\n').filter_map(source).collect()
}

/// Spaces, tabs, line ends and backslashes are three octal digits behind a backslash there.
fn unescaped(mut text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some((first, rest)) = text.split_first() {
        let octal = rest.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| *first == b'\\') {
            Some(byte) => {
                out.push(byte);
                text = rest.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                text = rest;
            }
        }
    }
    out
}

/// Copies the extended attributes (access lists and labels among them) that may be copied.
pub fn copy_attributes(from: &File, to: &File) {
    for name in attribute_names(from).unwrap_or_default().split_inclusive(|byte| *byte == 0) {
        let mut value = vec![0u8; 65536];
        if !name.ends_with(&[0]) {
            continue;
        }
        // SAFETY: both descriptors are open, `name` ends in a zero byte, and the kernel writes at most as many
        // bytes as it is told and reads as many as it wrote.
        unsafe {
            let name = name.as_ptr().cast();
            let len = libc::fgetxattr(from.as_raw_fd(), name, value.as_mut_ptr().cast(), value.len());
            if let Ok(len) = usize::try_from(len) {
                libc::fsetxattr(to.as_raw_fd(), name, value.as_ptr().cast(), len.min(value.len()), 0);
            }
        }
    }
}

fn attribute_names(file: &File) -> io::Result<Vec<u8>> {
    let mut names = vec![0u8; 65536];
    // SAFETY: the descriptor is open, and the kernel writes at most as many bytes as it is told.
    let len = unsafe { libc::flistxattr(file.as_raw_fd(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(len).map_err(|_| io::Error::last_os_error())?);
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_copied() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (from, to) = (File::create(dir.path().join("a")).unwrap(), File::create(dir.path().join("b")).unwrap());
        let name = c"user.vimg";
        // SAFETY: the name is a C string, the value four readable bytes.
        let set = unsafe { libc::fsetxattr(from.as_raw_fd(), name.as_ptr(), c"text".as_ptr().cast(), 4, 0) };
        assert_eq!(set, 0, "a file system with extended attributes: {}", io::Error::last_os_error());
        copy_attributes(&from, &to);
        let mut value = [0u8; 9];
        // SAFETY: the name is a C string, the value nine writable bytes.
        let len = unsafe { libc::fgetxattr(to.as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), 9) };
        assert_eq!((len, &value[..4]), (4, &b"text"[..]));
    }

    #[test]
    fn only_devices_answer_for_devices() {
        let file = tempfile::tempfile().unwrap();
        assert!(device_size(&file).is_err());
        assert!(!is_read_only(&file) && !is_mount_point(&file) && !is_synchronous(&file));
        assert_eq!(sector(&file), 512);
        assert!(page_size().is_power_of_two());
    }
}
