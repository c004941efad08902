//! The bytes of a regular file as they lie in the page cache, without a copy: mapped, into a [`Window`].
//!
//! Somebody may cut the file short while it is looked at, or a page may turn out unreadable. The kernel then raises
//! `SIGBUS`, which would end the program. So every window is written down in a table; a handler of that signal looks
//! the address up there, puts zeros where the page should be, and marks the window: [`Window::is_whole`] tells whoever
//! looked that it saw something else than the file, and has to read instead. What the kernel itself takes from a window
//! (`pwrite`) fails with `EFAULT`. A fault at any other address is passed on to whatever handled it before.
//!
//! Invariants: a window's addresses stay its own, and mapped, until it is dropped, and are in the table all that time;
//! what is seen of one file only changes if the file does. No lock is taken: the handler reads atomic numbers alone,
//! and calls nothing but `mmap`, `sigaction` and `raise`.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::libc::{self, c_int, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::{FileKind, HostFile, Storage};

/// What mappings start and end at. Where the machine's pages have another size there are no windows.
const PAGE: usize = 4096;

/// Where file and memory agree to this, the kernel can map the pages of a large folio by one entry.
const HUGE: usize = 2 << 20;

/// What is shorter, in bytes, is copied faster than it is mapped.
pub const LEAST: u64 = 64 << 10;

/// As many windows can be there at once; who asks for more has to read.
const WINDOWS: usize = 64;

/// A window as the handler of `SIGBUS` finds it.
struct Guard {
    taken: AtomicBool,
    /// Its first address, and the first behind it; both 0 where there is none.
    start: AtomicUsize,
    end: AtomicUsize,
    /// Some of what was seen in it was not the file.
    faulted: AtomicBool,
}

static GUARDS: [Guard; WINDOWS] = [const {
    Guard {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        faulted: AtomicBool::new(false),
    }
}; WINDOWS];

/// What was done at a `SIGBUS` before.
static BEFORE: OnceLock<SigAction> = OnceLock::new();

/// Whether the handler is there.
static HANDLED: OnceLock<bool> = OnceLock::new();

fn install_handler() -> bool {
    *HANDLED.get_or_init(|| {
        // SAFETY: it only asks.
        if unsafe { libc::sysconf(libc::_SC_PAGESIZE) } != PAGE as libc::c_long {
            return false;
        }
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_NODEFER;
        let action = SigAction::new(SigHandler::SigAction(on_bus_error), flags, SigSet::empty());
        // SAFETY: the handler does nothing that a handler may not do (see the module), and passes on what is not its own.
        match unsafe { sigaction(Signal::SIGBUS, &action) } {
            Ok(before) => BEFORE.set(before).is_ok(),
            Err(_) => false,
        }
    })
}

/// Puts zeros where a window has no page, and passes on what is in no window.
extern "C" fn on_bus_error(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a record that is there until it returns. Codes above 0 are
    // the kernel's own, with an address.
    let address = unsafe { if (*info).si_code > 0 { (*info).si_addr() as usize } else { 0 } };
    for guard in &GUARDS {
        let (start, end) = (guard.start.load(Ordering::Acquire), guard.end.load(Ordering::Acquire));
        if !(start..end).contains(&address) {
            continue;
        }
        let page = address / PAGE * PAGE;
        guard.faulted.store(true, Ordering::Relaxed);
        if map(page, end - page, None) {
            return;
        }
    }
    match BEFORE.get().map(SigAction::handler) {
        Some(SigHandler::SigAction(before)) => before(signal, info, context),
        Some(SigHandler::Handler(before)) => before(signal),
        _ => {
            let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
            // SAFETY: the default action is no code of ours; raising it ends the program, as it would have without us.
            unsafe {
                let _ = sigaction(Signal::SIGBUS, &default);
                libc::raise(signal);
            }
        }
    }
}

/// Maps a file from some offset on over `len` bytes of a window, or zeros. Address, length (but at a file's end) and
/// offset are multiples of the page.
fn map(address: usize, len: usize, file: Option<(c_int, i64)>) -> bool {
    let (flags, fd, offset) = match file {
        Some((fd, offset)) => (libc::MAP_SHARED, fd, offset),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0),
    };
    // SAFETY: only called for addresses within a window, which holds nothing but such mappings; nobody holds a reference
    // to bytes of a window while its owner replaces them (that takes `&mut`), and the handler replaces what cannot be read.
    let at = unsafe {
        libc::mmap(ptr::without_provenance_mut(address), len, libc::PROT_READ, flags | libc::MAP_FIXED, fd, offset)
    };
    at != libc::MAP_FAILED
}

/// Room in memory in which parts of files can be seen, one after the other, as one run of bytes.
///
/// It belongs to one thread.
#[derive(Debug)]
pub struct Window {
    base: NonNull<u8>,
    /// All of it, in bytes.
    room: usize,
    /// The most that it shows.
    longest: usize,
    /// Where what is seen starts.
    origin: usize,
    /// How much is seen.
    len: usize,
    /// Where in the room there are pages of files.
    used: Range<usize>,
    /// They are those of what was seen before.
    stale: bool,
    guard: &'static Guard,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("faulted", &self.faulted).finish_non_exhaustive()
    }
}

impl Window {
    /// A window in which up to `longest` bytes are seen; none where it cannot be had.
    pub fn new(longest: usize) -> Option<Self> {
        if !install_handler() {
            return None;
        }
        let room = longest.checked_add(3 * HUGE)? / HUGE * HUGE;
        let guard = GUARDS.iter().find(|guard| !guard.taken.swap(true, Ordering::AcqRel))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: new memory at an address that the kernel chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), room, libc::PROT_READ, flags, -1, 0) };
        let Some(base) = NonNull::new(base.cast::<u8>()).filter(|_| base != libc::MAP_FAILED) else {
            guard.taken.store(false, Ordering::Release);
            return None;
        };
        guard.faulted.store(false, Ordering::Relaxed);
        guard.start.store(base.as_ptr() as usize, Ordering::Release);
        guard.end.store(base.as_ptr() as usize + room, Ordering::Release);
        Some(Self { base, room, longest, origin: 0, len: 0, used: 0..0, stale: false, guard })
    }

    /// Nothing is seen any more.
    pub fn clear(&mut self) {
        self.len = 0;
        self.stale = !self.used.is_empty();
        self.guard.faulted.store(false, Ordering::Relaxed);
    }

    /// The same, and no page of a file stays mapped.
    pub fn let_go(&mut self) {
        self.clear();
        self.renew(&(0..0));
    }

    /// The next `len` bytes to be seen are those of `file` from `at` on. False where they have to be read: they are not
    /// all in memory or in the file, or the host does not show them.
    pub fn add(&mut self, file: &dyn Storage, at: u64, len: usize) -> bool {
        let Some(host) = file.host().filter(|host| host.kind() == FileKind::Regular && file.facts().offload) else {
            return false;
        };
        let (Ok(offset), Some(end)) = (usize::try_from(at), at.checked_add(len as u64)) else { return false };
        if !file.len().is_ok_and(|there| there >= end) {
            return false;
        }
        let cached = is_cached(host, at, len);
        if cached == Some(false) {
            return false;
        }
        let skew = offset % PAGE;
        if self.len == 0 {
            let base = self.base.as_ptr() as usize;
            self.origin = (offset % HUGE + HUGE - base % HUGE) % HUGE;
        }
        let Some(from) = self.room_for(len).filter(|from| from % PAGE == skew) else { return false };
        let pages = from - skew..(from + len).next_multiple_of(PAGE);
        let Ok(start) = i64::try_from(offset - skew) else { return false };
        if pages.end > self.room || !self.renew(&pages) {
            return false;
        }
        let first = self.base.as_ptr() as usize + pages.start;
        if !can_be_mapped(host, start) {
            return false;
        }
        if !map(first, pages.len(), Some((host.file().as_raw_fd(), start))) {
            // The kernel may have taken away what was there.
            self.shut(first, pages.len());
            return false;
        }
        let whole = pages.len();
        self.used = if self.used.is_empty() { pages } else { self.used.start..pages.end };
        let there = cached.is_some() || is_resident(first, whole);
        self.len += if there { len } else { 0 };
        there
    }

    /// Puts nothing but zeros there, and shows nothing any more.
    fn shut(&mut self, first: usize, len: usize) {
        self.longest = 0;
        if !map(first, len, None) {
            // Neither is there any memory: it is left as it is, and never looked at.
            self.len = 0;
        }
    }

    /// Takes away what was seen before the last [`Window::clear`], unless it is all replaced by those `pages`.
    fn renew(&mut self, pages: &Range<usize>) -> bool {
        if !std::mem::take(&mut self.stale) {
            return true;
        }
        let used = std::mem::take(&mut self.used);
        if pages.start <= used.start && used.end <= pages.end {
            return true;
        }
        let gone = map(self.base.as_ptr() as usize + used.start, used.len(), None);
        if !gone {
            // Old pages would show between new ones: there is no room for anything any more.
            self.longest = 0;
        }
        gone
    }

    /// The next `len` bytes are zeros. False where there is no room for them.
    pub fn add_zeros(&mut self, len: usize) -> bool {
        let there = self.room_for(len).is_some() && self.renew(&(0..0));
        if there {
            self.len += len;
        }
        there
    }

    /// Where the next bytes are seen: at the start of a page, so that nothing of their neighbours shows.
    fn room_for(&self, len: usize) -> Option<usize> {
        let from = self.origin + self.len;
        let fits = self.longest.checked_sub(self.len).is_some_and(|left| len <= left);
        (fits && (self.len == 0 || from.is_multiple_of(PAGE))).then_some(from)
    }

    /// What is seen.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `origin + len` lies in the room, all of which is mapped for reading as long as the window is there.
        // Others may change a file that is seen, as they may while it is read; whatever the bytes are, they are bytes.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(self.origin), self.len) }
    }

    /// Whether all that was looked at so far could be.
    pub fn is_whole(&self) -> bool {
        !self.guard.faulted.load(Ordering::Relaxed)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.guard.end.store(0, Ordering::Release);
        self.guard.start.store(0, Ordering::Release);
        // SAFETY: the room is the window's own, and nobody can look at it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.room) };
        self.guard.taken.store(false, Ordering::Release);
    }
}

/// Whether a file has pages to show: some (of a FUSE file system, in `/sys`) do not. Asked at an address of the kernel's
/// choice, because a mapping at a given one that fails leaves a gap there.
fn can_be_mapped(file: &HostFile, at: i64) -> bool {
    let fd = file.file().as_raw_fd();
    // SAFETY: new memory at an address that the kernel chooses, which nobody looks at and which is given back at once.
    unsafe {
        let page = libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ, libc::MAP_SHARED, fd, at);
        page != libc::MAP_FAILED && libc::munmap(page, PAGE) == 0
    }
}

/// Whether a range seems to be in memory already: its first and last bytes, and one in the middle, can be read without
/// waiting. Nothing where the file system cannot tell.
fn is_cached(file: &HostFile, at: u64, len: usize) -> Option<bool> {
    let last = len.saturating_sub(1);
    for n in [0, last / 2, last] {
        match is_byte_cached(file, at + n as u64) {
            Ok(true) => {}
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return None,
            _ => return Some(false),
        }
    }
    Some(true)
}

/// Whether mapped pages are in memory.
fn is_resident(address: usize, len: usize) -> bool {
    let mut pages = vec![0u8; len / PAGE];
    // SAFETY: the range is mapped, and the kernel writes one byte for each of its pages.
    let asked = unsafe { libc::mincore(ptr::without_provenance_mut(address), len, pages.as_mut_ptr()) };
    asked == 0 && pages.iter().all(|page| page & 1 != 0)
}

fn is_byte_cached(file: &HostFile, at: u64) -> io::Result<bool> {
    let mut byte = 0u8;
    let buffer = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let offset = i64::try_from(at).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and one byte is written to where `byte` lies.
    match unsafe { libc::preadv2(file.file().as_raw_fd(), &buffer, 1, offset, libc::RWF_NOWAIT) } {
        n if n < 0 => Err(io::Error::last_os_error()),
        n => Ok(n == 1),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::storage::CacheMode;
    use crate::storage::memory::Memory;

    fn file(len: usize) -> (HostFile, Vec<u8>) {
        file_in(env!("CARGO_MANIFEST_DIR"), len)
    }

    fn file_in(folder: &str, len: usize) -> (HostFile, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|n| (n / 7 % 251 + 1) as u8).collect();
        let file = tempfile::tempfile_in(folder).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        (HostFile::from_file(file, CacheMode::Writeback, "a").unwrap(), bytes)
    }

    #[test]
    fn parts_of_files_and_zeros_are_seen_as_one_run() {
        let (file, bytes) = file(5 << 20);
        let mut window = Window::new(3 << 20).unwrap();
        for round in 0..3 {
            window.clear();
            assert!(window.add(&file, 8192, 1 << 20), "round {round}");
            assert!(window.add_zeros(65536) && window.add(&file, 0, 70_000));
            assert!(!window.add(&file, 4096, 1 << 20) && !window.add_zeros(1), "not at a page");
            let want = [&bytes[8192..8192 + (1 << 20)], &[0; 65536], &bytes[..70_000]].concat();
            assert!(window.bytes() == want, "round {round}");
            // At any offset, if it is alone; what was there before does not show.
            window.clear();
            assert!(
                window.add(&file, 512 + round, 100_000) && window.bytes() == &bytes[512 + round as usize..][..100_000]
            );
            window.clear();
            assert!(window.add_zeros(2 << 20) && window.bytes().iter().all(|byte| *byte == 0));
            assert!(window.is_whole());
        }
    }

    /// There nobody can tell without mapping what is in memory.
    #[test]
    fn files_in_memory_are_seen() {
        let (file, bytes) = file_in("/dev/shm", 1 << 20);
        let mut window = Window::new(1 << 20).unwrap();
        window.clear();
        assert!(window.add(&file, 4096, 1 << 19) && window.bytes() == &bytes[4096..4096 + (1 << 19)]);
    }

    /// Files of `/sys` can be read, but not mapped.
    #[test]
    fn a_file_without_pages_is_refused_and_the_window_stays_its_own() {
        let notes = std::fs::File::open("/sys/kernel/notes").unwrap();
        let notes = HostFile::from_file(notes, CacheMode::Writeback, "notes").unwrap();
        assert!(notes.len().unwrap() >= 32);
        let mut window = Window::new(1 << 20).unwrap();
        window.clear();
        assert!(window.add_zeros(65536) && !window.add(&notes, 0, 32));
        assert!(window.bytes() == [0; 65536]);
        let (file, bytes) = file(1 << 20);
        window.clear();
        assert!(window.add(&file, 0, 1 << 19) && window.bytes() == &bytes[..1 << 19]);
    }

    #[test]
    fn what_cannot_be_seen_is_refused() {
        let (file, bytes) = file(2 << 20);
        let mut window = Window::new(1 << 20).unwrap();
        window.clear();
        assert!(!window.add(&file, 0, 2 << 20), "too long");
        assert!(!window.add(&file, (2 << 20) - 65536, 65537), "past the end");
        assert!(!window.add(&Memory::new(bytes.clone()), 0, 1 << 20), "no file");
        assert!(window.add(&file, (2 << 20) - 70_000, 70_000) && window.bytes() == &bytes[(2 << 20) - 70_000..]);
    }

    /// The signal comes to the thread that looks, and only its window is marked.
    #[test]
    fn a_file_that_is_cut_while_it_is_seen_is_zeros_and_told() {
        let (other, bytes) = file(1 << 20);
        let mut second = Window::new(1 << 20).unwrap();
        second.clear();
        assert!(second.add(&other, 0, 1 << 20));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut window = Window::new(1 << 20).unwrap();
                    for _ in 0..20 {
                        let (file, bytes) = file(1 << 20);
                        window.clear();
                        assert!(window.add(&file, 0, 1 << 20));
                        file.file().set_len(300_000).unwrap();
                        let target = tempfile::tempfile().unwrap();
                        let written = target.write_all_at(&window.bytes()[303_104..], 0).unwrap_err();
                        assert_eq!(written.raw_os_error(), Some(libc::EFAULT));
                        assert!(window.is_whole(), "nobody has looked");
                        let seen = window.bytes().to_vec();
                        assert!(seen[..300_000] == bytes[..300_000] && seen[300_000..].iter().all(|byte| *byte == 0));
                        assert!(!window.is_whole());
                    }
                });
            }
        });
        assert!(second.is_whole() && second.bytes() == bytes);
    }
}
