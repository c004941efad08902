//! A disk of a cluster (a VDI), as bytes.
//!
//! It is in objects of one size, of which a table says to which disk each belongs: to this one, which may write to it;
//! to a snapshot that this one began with, and then the first write makes an object of our own from it; or to none, and
//! zeros are read. The object is there before the table says so.
//!
//! Lock order: one of the turns, then the sizes, then the table; the turns and the sizes are held while requests are
//! under way, the table never. Invariants: the table has an entry for each object that the server's size has room for;
//! the server's size is never less than ours.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromZeros, IntoBytes};

use super::cluster::{Cluster, NewObject, NoDisk};
use super::layout::{DISK_BITS, Inode, MOST_OBJECTS, NAME, OBJECT_BITS, SIZE_AT, TABLE_AT, data, inode};
use super::names::{VdiName, VdiState};
use crate::storage::staging::Made;
use crate::storage::{Error, Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// Data that goes with one request, at most.
const LONGEST: u64 = 4 << 20;
/// Requests that are worth being under way at once.
const PARALLEL: u32 = 8;
/// Bytes that suit a request.
const BEST: u32 = 1 << 20;
/// Writers of different objects seldom wait for each other.
const TURNS: usize = 16;
/// What a new disk is at first, where nothing is said of its size: the cluster's own tools make none of no size.
const LEAST: u64 = 512;

/// See the module.
#[derive(Debug)]
pub struct Vdi {
    cluster: Cluster,
    name: String,
    disk: u32,
    /// Of an object, in bytes.
    unit: u64,
    /// Of new objects, as [`NewObject::copies`].
    copies: (u8, u8),
    writable: bool,
    /// It is ours to write until that is given back.
    locked: AtomicBool,
    sizes: Mutex<Sizes>,
    table: Mutex<Vec<u32>>,
    /// Those who make an object take turns, by its index.
    turns: [Mutex<()>; TURNS],
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Ours.
    len: u64,
    /// What the server says.
    served: u64,
    /// The server need not know ours before [`Made::keep`].
    late: bool,
}

fn wrong(text: &str) -> Error {
    Error::Remote { text: text.to_owned(), errno: Errno::EIO }
}

fn taken<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Text that zeros fill up.
fn text(field: &[u8; NAME]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

impl Vdi {
    /// Opens one that is there.
    pub fn open(target: &VdiName, write: bool) -> Result<Self> {
        let cluster = Cluster::open(target.address.clone())?;
        if write && target.state != VdiState::Current {
            return Err(Error::Remote { text: "a snapshot cannot be written to".to_owned(), errno: Errno::EROFS });
        }
        let disk = cluster.find(&target.vdi, &target.state, write)?;
        Self::with(cluster, target, disk, write)
    }

    /// Makes one, of no bytes yet. `size` is what it will probably have.
    pub fn create(target: &VdiName, size: Option<u64>) -> Result<Self> {
        let cluster = Cluster::open(target.address.clone())?;
        let size = size.unwrap_or(0).max(LEAST);
        let was_there = match cluster.find(&target.vdi, &VdiState::Current, false) {
            Ok(_) => true,
            Err(error) if error.errno() == Some(Errno::ENOENT) => false,
            Err(error) => return Err(error),
        };
        let disk = match cluster.create(&target.vdi, size) {
            Ok(disk) => disk,
            Err(NoDisk::Unanswered(error)) if !was_there => {
                // Who hears of the failure hears of this one.
                let _ = Self::remove_blank(target, size);
                return Err(error);
            }
            Err(NoDisk::Refused(error) | NoDisk::Unanswered(error)) => return Err(error),
        };
        let made = cluster.find(&target.vdi, &VdiState::Current, true).and_then(|found| match found == disk {
            true => Self::with(cluster, target, disk, true),
            false => Err(wrong("the server made another VDI than it finds")),
        });
        match made {
            Ok(made) => {
                let mut sizes = taken(&made.sizes);
                (sizes.len, sizes.late) = (0, true);
                drop(sizes);
                Ok(made)
            }
            Err(error) => {
                // It is of no use to anybody. Who hears of the failure hears of this one.
                let _ = Cluster::open(target.address.clone()).and_then(|cluster| cluster.delete(&target.vdi));
                Err(error)
            }
        }
    }

    /// Removes a disk that was not there before it was asked for, if it is there now: one of that size, without
    /// objects, which nobody writes to.
    fn remove_blank(target: &VdiName, size: u64) -> Result<()> {
        let vdi = Self::open(target, true)?;
        if taken(&vdi.sizes).served == size && taken(&vdi.table).iter().all(|owner| *owner == 0) {
            vdi.retract();
        }
        Ok(())
    }

    fn with(cluster: Cluster, target: &VdiName, disk: u32, write: bool) -> Result<Self> {
        if disk == 0 || disk >> DISK_BITS != 0 {
            return Err(wrong("the server names a VDI by an id that none can have"));
        }
        let mut vdi = Self {
            cluster,
            name: target.vdi.clone(),
            disk,
            unit: 0,
            copies: (0, 0),
            writable: write,
            // From here on it is given back when this is dropped.
            locked: AtomicBool::new(write),
            sizes: Mutex::new(Sizes { len: 0, served: 0, late: false }),
            table: Mutex::default(),
            turns: Default::default(),
        };
        let mut head = Inode::new_zeroed();
        vdi.cluster.read(inode(disk), 0, head.as_mut_bytes())?;
        if head.disk.get() != disk || text(&head.name) != target.vdi.as_bytes() {
            return Err(wrong("the server describes another VDI than the one that was asked for"));
        }
        let is_it = match &target.state {
            VdiState::Current => head.became_snapshot.get() == 0,
            VdiState::Number(number) => head.became_snapshot.get() != 0 && head.snapshot.get() == *number,
            VdiState::Tag(tag) => head.became_snapshot.get() != 0 && text(&head.tag) == tag.as_bytes(),
        };
        if !is_it {
            return Err(wrong("the server describes another state of the VDI than the one that was asked for"));
        }
        if head.store_policy != 0 {
            let text = "a VDI whose objects are listed in a tree (a hyper volume) is not supported";
            return Err(Error::Remote { text: text.to_owned(), errno: Errno::ENOTSUP });
        }
        if !OBJECT_BITS.contains(&head.object_bits) {
            return Err(wrong(&format!("the VDI's objects have a size of 2^{} bytes", head.object_bits)));
        }
        vdi.unit = 1 << head.object_bits;
        vdi.copies = (head.copies, head.copy_policy);
        let size = head.size.get();
        vdi.load(0, vdi.objects(size)?)?;
        *taken(&vdi.sizes) = Sizes { len: size, served: size, late: false };
        Ok(vdi)
    }

    /// Objects of a disk of that size.
    fn objects(&self, size: u64) -> Result<u64> {
        let count = size.div_ceil(self.unit);
        if count > MOST_OBJECTS {
            let text = format!("a VDI of {size} bytes would have more objects than its table has room for");
            return Err(Error::Remote { text, errno: Errno::EFBIG });
        }
        Ok(count)
    }

    /// Reads what the table says of objects from `first` on, where ours ends.
    fn load(&self, first: u64, end: u64) -> Result<()> {
        let mut entries = vec![U32::ZERO; usize::try_from(end.saturating_sub(first)).unwrap_or(0)];
        let mut at = TABLE_AT + first * size_of::<U32>() as u64;
        for part in entries.chunks_mut(LONGEST as usize / size_of::<U32>()) {
            self.cluster.read(inode(self.disk), at, part.as_mut_bytes())?;
            at += size_of_val(part) as u64;
        }
        if entries.iter().any(|entry| entry.get() >> DISK_BITS != 0) {
            return Err(wrong("the VDI's table names the object of a VDI that none can be"));
        }
        taken(&self.table).extend(entries.iter().map(|entry| entry.get()));
        Ok(())
    }

    /// To whom an object belongs; 0 if there is none.
    fn owner(&self, index: u32) -> u32 {
        taken(&self.table).get(index as usize).copied().unwrap_or(0)
    }

    /// Has the server know of at least so many bytes.
    fn serve(&self, sizes: &mut Sizes, size: u64) -> Result<()> {
        if size <= sizes.served {
            return Ok(());
        }
        let count = self.objects(size)?;
        let known = taken(&self.table).len() as u64;
        if count > known {
            self.load(known, count)?;
        }
        self.say_size(sizes, size)
    }

    fn say_size(&self, sizes: &mut Sizes, size: u64) -> Result<()> {
        self.cluster.write(inode(self.disk), SIZE_AT, &size.to_le_bytes())?;
        sizes.served = size;
        Ok(())
    }

    /// Makes it at least that long.
    fn grow(&self, end: u64) -> Result<()> {
        let mut sizes = taken(&self.sizes);
        if end > sizes.len {
            // What is not seen yet grows in few steps.
            let most = MOST_OBJECTS.saturating_mul(self.unit);
            let size = if sizes.late { end.max(sizes.served.saturating_mul(2).min(most)) } else { end };
            if end > sizes.served {
                self.serve(&mut sizes, size)?;
            }
            sizes.len = end;
        }
        Ok(())
    }

    /// Makes it shorter, where no object is left behind: it might come to light again.
    fn shrink(&self, old: u64, len: u64) -> Result<()> {
        let kept = usize::try_from(self.objects(len)?).unwrap_or(usize::MAX);
        if taken(&self.table).iter().skip(kept).any(|owner| *owner != 0) {
            return Err(Error::Other("A VDI that has data past its new end cannot shrink".to_owned()));
        }
        let rest = len.next_multiple_of(self.unit).min(old).saturating_sub(len);
        self.zero(len, rest, Zeroing::Punch)?;
        let mut sizes = taken(&self.sizes);
        if !sizes.late {
            self.say_size(&mut sizes, len)?;
        }
        sizes.len = len;
        Ok(())
    }

    /// A range, object by object: the index, the offset in it, the length.
    fn pieces(&self, at: u64, len: u64) -> impl Iterator<Item = Result<(u32, u64, usize)>> {
        let (unit, end) = (self.unit, at.saturating_add(len));
        let mut at = at;
        std::iter::from_fn(move || {
            let offset = at % unit;
            let part = (end - at).min(unit - offset).min(LONGEST);
            if part == 0 {
                return None;
            }
            let index = u32::try_from(at / unit).map_err(|_| Error::from(Errno::EFBIG));
            at += part;
            Some(index.map(|index| (index, offset, part as usize)))
        })
    }

    fn write_piece(&self, index: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        if self.owner(index) == self.disk {
            return self.cluster.write(data(self.disk, index), offset, bytes);
        }
        let turn = self.turns.get(index as usize % TURNS).map(taken);
        let owner = self.owner(index);
        if owner == self.disk {
            drop(turn);
            return self.cluster.write(data(self.disk, index), offset, bytes);
        }
        let covered = bytes.len() as u64 == self.unit;
        let from = Some(data(owner, index)).filter(|_| owner != 0 && !covered);
        let new = NewObject { object: data(self.disk, index), from, copies: self.copies };
        self.cluster.write_new(new, offset, bytes)?;
        let entry = TABLE_AT + u64::from(index) * size_of::<U32>() as u64;
        self.cluster.write(inode(self.disk), entry, &self.disk.to_le_bytes())?;
        if let Some(entry) = taken(&self.table).get_mut(index as usize) {
            *entry = self.disk;
        }
        Ok(())
    }

    fn must_be_writable(&self) -> Result<()> {
        if self.writable { Ok(()) } else { Err(Errno::EBADF.into()) }
    }

    fn release(&self) -> Result<()> {
        if self.locked.swap(false, Ordering::Relaxed) { self.cluster.release(self.disk) } else { Ok(()) }
    }
}

impl Drop for Vdi {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = self.release();
    }
}

impl Made for Vdi {
    fn keep(&self) -> Result<()> {
        let mut sizes = taken(&self.sizes);
        sizes.late = false;
        if sizes.served != sizes.len {
            let len = sizes.len;
            self.say_size(&mut sizes, len)?;
        }
        Ok(())
    }

    fn retract(&self) {
        // There is nobody left to tell.
        let _ = self.release();
        let _ = self.cluster.delete(&self.name);
    }
}

impl Storage for Vdi {
    fn len(&self) -> Result<u64> {
        Ok(taken(&self.sizes).len)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let left = self.len()?.saturating_sub(at);
        let there = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let (mut rest, past) = buf.split_at_mut(there);
        past.fill(0);
        for piece in self.pieces(at, there as u64) {
            let (index, offset, len) = piece?;
            let (part, after) = rest.split_at_mut_checked(len).ok_or(Errno::EIO)?;
            rest = after;
            match self.owner(index) {
                0 => part.fill(0),
                owner => self.cluster.read(data(owner, index), offset, part)?,
            }
        }
        Ok(())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        self.must_be_writable()?;
        self.grow(at.checked_add(buf.len() as u64).ok_or(Errno::EFBIG)?)?;
        let mut rest = buf;
        for piece in self.pieces(at, buf.len() as u64) {
            let (index, offset, len) = piece?;
            let (part, after) = rest.split_at_checked(len).ok_or(Errno::EIO)?;
            rest = after;
            self.write_piece(index, offset, part)?;
        }
        Ok(())
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        let left = self.len()?.saturating_sub(at).min(max);
        if left == 0 {
            return Ok(HostExtent::hole(max));
        }
        let table = taken(&self.table);
        let first = at / self.unit;
        let is_hole = |index: u64| {
            let entry = usize::try_from(index).ok().and_then(|index| table.get(index));
            entry.is_none_or(|owner| *owner == 0)
        };
        let hole = is_hole(first);
        let last = (at + left - 1) / self.unit;
        let next = (first..=last).find(|index| is_hole(*index) != hole);
        let len = next.map_or(left, |next| next * self.unit - at);
        Ok(if hole { HostExtent::hole(len) } else { HostExtent::data(len) })
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        self.must_be_writable()?;
        self.grow(at.checked_add(len).ok_or(Errno::EFBIG)?)?;
        let mut zeros = Vec::new();
        for piece in self.pieces(at, len) {
            let (index, offset, len) = piece?;
            if self.owner(index) == 0 && how == Zeroing::Punch {
                continue;
            }
            zeros.resize(len.max(zeros.len()), 0);
            self.write_piece(index, offset, zeros.get(..len).ok_or(Errno::EIO)?)?;
        }
        Ok(())
    }

    fn discard(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        self.must_be_writable()?;
        let old = self.len()?;
        match fill {
            _ if len < old => self.shrink(old, len),
            Preallocation::Off => self.grow(len),
            Preallocation::Full => self.zero(old, len - old, Zeroing::Write),
            fill => Err(Error::UnsupportedPreallocation(fill)),
        }
    }

    /// Whatever is answered is on stable storage, as no request asks for anything else.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        let own = taken(&self.table).iter().filter(|owner| **owner == self.disk).count();
        Ok(Some((own as u64).saturating_mul(self.unit)))
    }

    fn facts(&self) -> Facts {
        Facts { best_request: Some(BEST), parallel: Some(PARALLEL), ..Facts::PLAIN }
    }

    fn host(&self) -> Option<&HostFile> {
        None
    }

    fn announce(&self, _event: Event) {}
}
