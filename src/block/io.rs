//! The one place where guest bytes move: every read of a mapping, every write of a placement, every zeroing in place.
//!
//! Here the cipher of a layer is applied: what passes `Node::get` and `Node::put` is plain on the caller's side
//! and encrypted on the file's. A layer with a cipher is read and written in whole sectors of the cipher; zeros of
//! the host mean nothing in it, so zeros are encrypted and written, nothing is punched, and the host copies nothing.
//! Compressed units pass as they are: what their bytes mean is the driver's to decode.
//!
//! Invariants: the whole of a buffer is filled or it is an error; what was decoded last is used again only as long as
//! no unit was stored since it was read. No lock is held. Buffers for `O_DIRECT` are [`crate::storage::direct`]'s.

mod placement;
mod stored;

use nix::errno::Errno;
use zerocopy::FromZeros;

pub use placement::{Placement, Step, write_steps};
pub use stored::{clear_stored, move_stored, punch, punch_at, read_stored, read_unit, write_stored};

use super::driver::Store;
use super::error::{Context, Operation};
use super::{CompressedUnit, Error, ExtentKind, GuestOffset, HostOffset, HostPlace, Mapping, Node, Result};
use crate::storage::{self, Event, zeros};

/// Bytes that are moved, or zeros that are encrypted, in one go.
const ZEROS: u64 = 1 << 20;

/// Buffers that are used again from read to read.
#[derive(Debug, Default)]
pub struct Scratch {
    encoded: Vec<u8>,
    decoded: Vec<u8>,
    sealed: Vec<u8>,
}

/// The most bytes that are encrypted in one go: whole sectors of any cipher, and little enough for a cache.
const SEALED: usize = 512 << 10;

/// Makes room for so many more. Lengths are an image's: that there is no memory is an error.
pub fn reserve(buf: &mut Vec<u8>, more: usize) -> Result<()> {
    buf.try_reserve(more).map_err(|_| Error::from(storage::Error::from(Errno::ENOMEM)))
}

/// Makes a buffer that long.
pub fn resize(buf: &mut Vec<u8>, len: usize) -> Result<()> {
    reserve(buf, len.saturating_sub(buf.len()))?;
    buf.resize(len, 0);
    Ok(())
}

/// So many zeros, as fresh pages of the kernel's where it can be: those are touched when they are used.
pub fn zeroed(len: u64) -> Result<Vec<u8>> {
    u8::new_vec_zeroed(length(len)?).map_err(|_| Error::from(storage::Error::from(Errno::ENOMEM)))
}

fn length(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| Error::corrupt("a run of the image is longer than memory can be"))
}

impl Node {
    /// Room for the start of a range; given back when dropped without [`Placement::publish`].
    pub fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placement<'_>> {
        let store = match store {
            Store::Zero { unmap } => Store::Zero { unmap: unmap && !self.manner().keep_space },
            other => other,
        };
        let placed = self.writing()?.place(at, len, store)?;
        Ok(Placement { node: self, placed, open: true })
    }

    /// Fills `buf` with guest data from `at`, through the whole chain; past the virtual size with zeros.
    pub fn read(&self, at: GuestOffset, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        self.read_layers(at, buf, usize::MAX, scratch)
    }

    /// The same, through at most `layers` layers.
    pub fn read_layers(&self, at: GuestOffset, buf: &mut [u8], layers: usize, scratch: &mut Scratch) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let mapping = self.map(at + done as u64, (buf.len() - done) as u64, layers)?;
            if mapping.depth > 0 && !mapping.is_zero() {
                self.announce(Event::READ_BACKING_AIO);
            }
            let n = usize::try_from(mapping.len).unwrap_or(usize::MAX).min(buf.len() - done);
            mapping.read(&mut buf[done..done + n], scratch)?;
            done += n;
        }
        Ok(())
    }

    /// Writes guest data. Concurrent writes must not share a unit.
    pub fn write(&self, at: GuestOffset, buf: &[u8], scratch: &mut Scratch) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let placement = self.place(at + done as u64, (buf.len() - done) as u64, Store::Data)?;
            let n = placement.len().min(buf.len() - done);
            placement.write(&buf[done..done + n], scratch)?;
            placement.publish()?;
            done += n;
        }
        Ok(())
    }

    /// Makes a range read as zeros; `unmap` allows its space to be given back. Writes zeros where the format
    /// has no other way.
    pub fn write_zeroes(&self, at: GuestOffset, len: u64, unmap: bool, scratch: &mut Scratch) -> Result<()> {
        let unit = self.writing()?.fill_unit().max(1);
        let end = at.get().saturating_add(len);
        let mut pos = at.get();
        while pos < end {
            let whole = pos.is_multiple_of(unit) && (end - pos >= unit || end >= self.virtual_size());
            let n = if whole { self.whole_units(pos, end, unit) } else { (end - pos).min(unit - pos % unit) };
            if whole {
                let placement = self.place(GuestOffset(pos), n, Store::Zero { unmap })?;
                pos += placement.len() as u64;
                placement.zero()?;
                placement.publish()?;
            } else {
                let mapping = self.map(GuestOffset(pos), n.min(ZEROS), usize::MAX)?;
                if !mapping.is_zero() {
                    self.write(GuestOffset(pos), &zeroed(mapping.len)?, scratch)?;
                } else {
                    self.writing()?.wrote_the_same(GuestOffset(pos), mapping.len)?;
                }
                pos += mapping.len;
            }
        }
        Ok(())
    }

    fn whole_units(&self, pos: u64, end: u64, unit: u64) -> u64 {
        if end >= self.virtual_size() { end - pos } else { (end - pos) / unit * unit }
    }

    /// Reads what is stored as it is, from that place on.
    fn get(&self, place: HostPlace, guest: GuestOffset, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let Some(cipher) = self.driver().cipher() else { return self.get_bytes(place, guest, buf) };
        let sector = u64::from(cipher.sector().get());
        let before = guest.get() % sector;
        let len = length((before + buf.len() as u64).next_multiple_of(sector))?;
        let from = back(place, before)?;
        let start = GuestOffset(guest.get() - before);
        if len == buf.len() {
            self.get_bytes(from, start, buf)?;
            return cipher.decrypt(start, from.at, buf);
        }
        resize(&mut scratch.sealed, len)?;
        self.get_bytes(from, start, &mut scratch.sealed)?;
        cipher.decrypt(start, from.at, &mut scratch.sealed)?;
        let skip = length(before)?;
        buf.copy_from_slice(&scratch.sealed[skip..skip + buf.len()]);
        Ok(())
    }

    /// Tells the layer's own file, where its tables are, what is about to be done with guest data.
    fn announce(&self, event: Event) {
        if let Some(file) = self.driver().files().first() {
            file.storage.announce(event);
        }
    }

    /// Reads the file's own bytes.
    fn get_bytes(&self, place: HostPlace, guest: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let child = self.child(place)?;
        child.storage.read_at(place.at.get(), buf).at(|| child.doing(Operation::Read, guest, place.at))
    }

    /// Writes plain bytes to a place; with a cipher, in whole sectors.
    fn put(&self, place: HostPlace, guest: GuestOffset, bytes: &[u8], scratch: &mut Scratch) -> Result<()> {
        self.announce(Event::WRITE_AIO);
        let Some(cipher) = self.driver().cipher() else { return self.put_bytes(place, guest, bytes) };
        let mut done = 0;
        for part in bytes.chunks(SEALED) {
            scratch.sealed.clear();
            reserve(&mut scratch.sealed, part.len())?;
            scratch.sealed.extend_from_slice(part);
            let (place, guest) = (forth(place, done), guest + done);
            cipher.encrypt(guest, place.at, &mut scratch.sealed)?;
            self.put_bytes(place, guest, &scratch.sealed)?;
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Writes plain bytes, but for runs of at least `hole` zeros that lie in a hole of the file.
    fn put_around(
        &self,
        place: HostPlace,
        guest: GuestOffset,
        bytes: &[u8],
        hole: usize,
        scratch: &mut Scratch,
    ) -> Result<()> {
        if bytes.len() < hole || self.driver().cipher().is_some() {
            return self.put(place, guest, bytes, scratch);
        }
        self.announce(Event::WRITE_AIO);
        let child = self.child(place)?;
        let done = zeros::write_around(&*child.storage, place.at.get(), bytes, hole);
        done.at(|| child.doing(Operation::Write, guest, place.at))
    }

    /// Writes encoded units. What was read before they were all there is not kept.
    fn put_encoded(&self, place: HostPlace, guest: GuestOffset, bytes: &[u8]) -> Result<()> {
        self.announce(Event::WRITE_COMPRESSED);
        let done = self.put_bytes(place, guest, bytes);
        self.last_unit().forget();
        done
    }

    /// Writes the file's own bytes.
    fn put_bytes(&self, place: HostPlace, guest: GuestOffset, bytes: &[u8]) -> Result<()> {
        let child = self.child(place)?;
        child.storage.write_at(place.at.get(), bytes).at(|| child.doing(Operation::Write, guest, place.at))
    }
}

/// So many bytes before a place.
fn back(place: HostPlace, n: u64) -> Result<HostPlace> {
    let at = place.at.get().checked_sub(n).ok_or_else(|| Error::corrupt("data of the disk starts before its file"))?;
    Ok(HostPlace { at: HostOffset(at), ..place })
}

/// The bytes that lie so far behind a place.
fn forth(place: HostPlace, n: u64) -> HostPlace {
    HostPlace { at: place.at + n, ..place }
}

impl Mapping<'_> {
    /// Reads the start of the run (`buf` is at most as long as the run).
    pub fn read(&self, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        match self.kind {
            ExtentKind::Zero(_) | ExtentKind::Unallocated(_) => buf.fill(0),
            ExtentKind::Data(place) => {
                let there = self.there()?;
                if there < buf.len() as u64 {
                    return Err(self.after(there).missing());
                }
                self.node.announce(Event::READ_AIO);
                self.node.get(place, self.start, buf, scratch)?;
            }
            ExtentKind::Compressed(unit) => self.read_compressed(&unit, buf, scratch)?,
        }
        Ok(())
    }

    fn read_compressed(&self, unit: &CompressedUnit, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let too_long =
            || Error::corrupt(format!("{}: compressed unit at {} is too long", self.node.name(), unit.start));
        let decoded = usize::try_from(unit.len).map_err(|_| too_long())?;
        let skip = usize::try_from(self.start.get().saturating_sub(unit.start.get())).map_err(|_| too_long())?;
        let end = skip.checked_add(buf.len()).filter(|end| *end <= decoded).ok_or_else(too_long)?;
        let stored = match self.node.last_unit().find(unit) {
            Ok(bytes) => {
                buf.copy_from_slice(&bytes[skip..end]);
                return Ok(());
            }
            Err(stored) => stored,
        };
        let there = self.encoded_there(unit)?;
        if there == 0 {
            return Err(self.missing());
        }
        resize(&mut scratch.encoded, usize::try_from(there).map_err(|_| too_long())?)?;
        self.node.announce(Event::READ_COMPRESSED);
        self.node.get_bytes(unit.place, self.start, &mut scratch.encoded)?;
        if buf.len() == decoded {
            return self.decode(unit, &scratch.encoded, buf);
        }
        resize(&mut scratch.decoded, decoded)?;
        self.decode(unit, &scratch.encoded, &mut scratch.decoded)?;
        buf.copy_from_slice(&scratch.decoded[skip..end]);
        self.node.last_unit().keep(*unit, &scratch.decoded, stored);
        Ok(())
    }

    /// How many bytes of the run's start are in the file, or may be left out there (see
    /// [`BlockDriver::short_unit`](super::BlockDriver::short_unit)). All of them where nobody can tell. Of what is
    /// encrypted nothing is left out: a sector of which a part is missing would read as anything. None of them at a place
    /// where none can be (see [`BlockDriver::may_be_at`](super::BlockDriver::may_be_at)).
    pub fn there(&self) -> Result<u64> {
        let place = match self.kind {
            ExtentKind::Data(place) => place,
            ExtentKind::Compressed(unit) => {
                return Ok(if self.encoded_there(&unit)? == 0 { 0 } else { self.len });
            }
            ExtentKind::Zero(_) | ExtentKind::Unallocated(_) => return Ok(self.len),
        };
        if !self.node.driver().may_be_at(self.start, place) {
            return Ok(0);
        }
        let from = place.at.get();
        let Some(short) = self.node.driver().short_unit() else { return Ok(self.len) };
        let sealed = self.node.driver().cipher().map(|cipher| u64::from(cipher.sector().get()));
        let unit = sealed.unwrap_or(short).max(1);
        let Some(end) = self.node.file_end(place, from.saturating_add(self.len))? else { return Ok(self.len) };
        // The run starts somewhere in a unit, on the disk as in the file.
        let base = from.saturating_sub(self.start.get() % unit);
        let part = end.saturating_sub(base);
        let last = match sealed {
            Some(_) => part - part % unit,
            None => part.checked_next_multiple_of(unit).unwrap_or(u64::MAX),
        };
        let whole = if end > base { base.saturating_add(last) } else { end };
        Ok(whole.saturating_sub(from).min(self.len))
    }

    /// How many of a unit's encoded bytes are in the file. The last ones may be padding that is not.
    fn encoded_there(&self, unit: &CompressedUnit) -> Result<u64> {
        let at = unit.place.at.get();
        let end = self.node.file_end(unit.place, at.saturating_add(unit.host_len))?;
        Ok(end.map_or(unit.host_len, |end| end.saturating_sub(at).min(unit.host_len)))
    }

    /// The error for a run that is past the end of its file, or where no data can be.
    pub fn missing(&self) -> Error {
        let place = match self.kind {
            ExtentKind::Data(place) => place,
            ExtentKind::Compressed(unit) => unit.place,
            ExtentKind::Zero(_) | ExtentKind::Unallocated(_) => {
                return Error::corrupt("what is stored nowhere cannot be missing");
            }
        };
        let found = self.node.file_end(place, u64::MAX).and_then(|end| Ok((end, self.node.child(place)?)));
        match found {
            Ok((end, child)) => {
                let error = match self.kind {
                    ExtentKind::Data(place) if !self.node.driver().may_be_at(self.start, place) => {
                        Error::corrupt(format!("no data can be at offset {}", place.at.get()))
                    }
                    _ => Error::truncated("data", place.at.get(), end.unwrap_or_default()),
                };
                error.at(child.doing(Operation::Read, self.start, place.at))
            }
            Err(error) => error,
        }
    }

    fn decode(&self, unit: &CompressedUnit, encoded: &[u8], out: &mut [u8]) -> Result<()> {
        self.node.driver().decode(unit, encoded, out).or_else(|error| {
            if (encoded.len() as u64) < unit.host_len {
                return Err(self.missing());
            }
            let child = self.node.child(unit.place)?;
            Err(error.at(child.doing(Operation::Read, self.start, unit.place.at)))
        })
    }
}

#[cfg(test)]
mod tests;
