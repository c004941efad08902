//! The one place where guest bytes move: every read of a mapping, every write of a placement, every zeroing in place.
//!
//! Here the cipher of a layer is applied: what passes [`Node::get`] and [`Node::put`] is plain on the caller's side
//! and encrypted on the file's. A layer with a cipher is read and written in whole sectors of the cipher; zeros of
//! the host mean nothing in it, so zeros are encrypted and written, nothing is punched, and the host copies nothing.
//! Compressed units pass as they are: what their bytes mean is the driver's to decode.
//!
//! Invariants: the whole of a buffer is filled or it is an error; what was decoded last is used again only as long as
//! no unit was stored since it was read. No lock is held. Buffers for `O_DIRECT` are [`storage::direct`](crate::storage::direct)'s.

mod stored;

use std::sync::Arc;

pub use stored::{clear_stored, move_stored, punch, punch_at, read_stored, read_unit, write_stored};

use super::driver::{Action, Placed, Store};
use super::error::{Context, Operation};
use super::{CompressedUnit, Error, ExtentKind, GuestOffset, HostOffset, HostPlace, Mapping, Node, Result};
use crate::storage::offload::{Offload, offload};
use crate::storage::view::Window;
use crate::storage::{Event, Zeroing};

/// Bytes that are moved, or zeros that are encrypted, in one go.
const ZEROS: u64 = 1 << 20;

/// Buffers that are used again from read to read.
#[derive(Debug, Default)]
pub struct Scratch {
    encoded: Vec<u8>,
    decoded: Vec<u8>,
    sealed: Vec<u8>,
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
                let mapping = self.map(GuestOffset(pos), n, usize::MAX)?;
                if !mapping.is_zero() {
                    let zeros = vec![0; usize::try_from(mapping.len).unwrap_or(usize::MAX)];
                    self.write(GuestOffset(pos), &zeros, scratch)?;
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
        scratch.sealed.resize(len, 0);
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
        scratch.sealed.clear();
        scratch.sealed.extend_from_slice(bytes);
        cipher.encrypt(guest, place.at, &mut scratch.sealed)?;
        self.put_bytes(place, guest, &scratch.sealed)
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

    /// Shows the run's first `len` bytes as the next ones of a window, without a copy. False where they have to be read:
    /// they are not stored as they are, or there is no looking at them (see [`Window::add`]).
    pub fn show(&self, len: usize, window: &mut Window) -> Result<bool> {
        let ExtentKind::Data(place) = self.kind else { return Ok(false) };
        if self.node.driver().cipher().is_some() || self.there()? < len as u64 {
            return Ok(false);
        }
        self.node.announce(Event::READ_AIO);
        Ok(window.add(&*self.node.child(place)?.storage, place.at.get(), len))
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
        scratch.encoded.resize(usize::try_from(there).map_err(|_| too_long())?, 0);
        self.node.announce(Event::READ_COMPRESSED);
        self.node.get_bytes(unit.place, self.start, &mut scratch.encoded)?;
        if buf.len() == decoded {
            return self.decode(unit, &scratch.encoded, buf);
        }
        scratch.decoded.resize(decoded, 0);
        self.decode(unit, &scratch.encoded, &mut scratch.decoded)?;
        buf.copy_from_slice(&scratch.decoded[skip..end]);
        self.node.last_unit().keep(*unit, Arc::from(scratch.decoded.as_slice()), stored);
        Ok(())
    }

    /// How many bytes of the run's start are in the file, or may be left out there (see
    /// [`BlockDriver::short_unit`](super::BlockDriver::short_unit)). All of them where nobody can tell. Of what is
    /// encrypted nothing is left out: a sector of which a part is missing would read as anything.
    pub fn there(&self) -> Result<u64> {
        let place = match self.kind {
            ExtentKind::Data(place) => place,
            ExtentKind::Compressed(unit) => {
                return Ok(if self.encoded_there(&unit)? == 0 { 0 } else { self.len });
            }
            ExtentKind::Zero(_) | ExtentKind::Unallocated(_) => return Ok(self.len),
        };
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

    /// The error for a run that is past the end of its file.
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
            Ok((end, child)) => Error::truncated("data", place.at.get(), end.unwrap_or_default()).at(child.doing(
                Operation::Read,
                self.start,
                place.at,
            )),
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

/// Room in an image that is not visible yet: fill it, then publish it; dropped, it is given back.
#[derive(Debug)]
pub struct Placement<'a> {
    node: &'a Node,
    placed: Placed,
    open: bool,
}

impl Placement<'_> {
    /// How many guest bytes of the range asked for it covers.
    pub fn len(&self) -> usize {
        usize::try_from(self.placed.len).unwrap_or(usize::MAX)
    }

    /// Never: a placement covers at least a byte.
    pub fn is_empty(&self) -> bool {
        self.placed.len == 0
    }

    /// What the driver said.
    pub fn placed(&self) -> &Placed {
        &self.placed
    }

    fn start(&self) -> GuestOffset {
        self.placed.start
    }

    fn end(&self) -> GuestOffset {
        self.placed.start + self.placed.len
    }

    /// Where the range goes and how many bytes around it have to be filled: what the driver says, and what a cipher
    /// cannot write alone.
    fn target(&self) -> Option<(HostPlace, u64, u64)> {
        let Action::Write { place, before, after } = self.placed.action else { return None };
        let Some((head, tail)) = self.partial_sectors(before, after) else { return Some((place, before, after)) };
        Some((place, before.saturating_add(head), after.saturating_add(tail)))
    }

    /// How much more has to be written before and after, so that it is whole sectors of the cipher.
    fn partial_sectors(&self, before: u64, after: u64) -> Option<(u64, u64)> {
        let sector = u64::from(self.node.driver().cipher()?.sector().get());
        let head = self.start().get().saturating_sub(before) % sector;
        let end = (self.end() + after).get();
        Some((head, end.checked_next_multiple_of(sector).map_or(0, |whole| whole - end)))
    }

    /// Writes guest data (exactly the range's length) and fills the rest of a new unit from the chain.
    pub fn write(&self, data: &[u8], scratch: &mut Scratch) -> Result<()> {
        let Some((place, before, after)) = self.target() else { return Ok(()) };
        if before == 0 && after == 0 {
            return self.node.put(place, self.start(), data, scratch);
        }
        let (head, tail) = (length(before)?, length(after)?);
        let mut whole = vec![0; head + data.len() + tail];
        let start = GuestOffset(self.start().get().saturating_sub(before));
        self.node.announce(Event::COW_READ);
        self.node.read(start, &mut whole[..head], scratch)?;
        whole[head..head + data.len()].copy_from_slice(data);
        self.node.read(self.end(), &mut whole[head + data.len()..], scratch)?;
        self.node.announce(Event::COW_WRITE);
        self.node.put(back(place, before)?, start, &whole, scratch)
    }

    /// Writes the encoded bytes of a [`Store::Compressed`] placement.
    pub fn write_encoded(&self, encoded: &[u8]) -> Result<()> {
        let Action::Write { place, .. } = self.placed.action else { return Ok(()) };
        self.node.put_encoded(place, self.start(), encoded)
    }

    /// Does what a [`Store::Zero`] placement asks of the files.
    pub fn zero(&self) -> Result<()> {
        let scratch = &mut Scratch::default();
        let sealed = self.node.driver().cipher().is_some();
        match self.placed.action {
            Action::Nothing => Ok(()),
            Action::Zero { place } if sealed => {
                let (before, after) = self.partial_sectors(0, 0).unwrap_or_default();
                self.write_zeros(place, before, after, scratch)
            }
            Action::Zero { place } => {
                let how = match self.placed.store {
                    Store::Zero { unmap: true } => Zeroing::Punch,
                    _ => Zeroing::Allocate,
                };
                self.zero_bytes(place, how)
            }
            Action::Write { place, before, after } if sealed => {
                let (head, tail) = self.partial_sectors(before, after).unwrap_or_default();
                self.write_zeros(place, before.saturating_add(head), after.saturating_add(tail), scratch)
            }
            Action::Write { place, before, after } => {
                let fill = |place: HostPlace, guest: GuestOffset, bytes: u64, scratch: &mut Scratch| -> Result<()> {
                    let mut around = vec![0; length(bytes)?];
                    self.node.read(guest, &mut around, scratch)?;
                    self.node.put(place, guest, &around, scratch)
                };
                if before > 0 {
                    let start = GuestOffset(self.start().get().saturating_sub(before));
                    fill(back(place, before)?, start, before, scratch)?;
                }
                self.zero_bytes(place, Zeroing::Write)?;
                if after > 0 {
                    fill(forth(place, self.placed.len), self.end(), after, scratch)?;
                }
                Ok(())
            }
        }
    }

    fn zero_bytes(&self, place: HostPlace, how: Zeroing) -> Result<()> {
        let child = self.node.child(place)?;
        let done = child.storage.zero(place.at.get(), self.placed.len, how);
        done.at(|| child.doing(Operation::Write, self.start(), place.at))
    }

    /// Writes zeros through the cipher, and what lies around them as it reads now.
    fn write_zeros(&self, place: HostPlace, before: u64, after: u64, scratch: &mut Scratch) -> Result<()> {
        let (from, to) = (self.start().get().saturating_sub(before), (self.end() + after).get());
        let mut place = back(place, before)?;
        let mut at = from;
        while at < to {
            let len = (to - at).min(ZEROS);
            let mut bytes = vec![0; length(len)?];
            let head = self.start().get().saturating_sub(at).min(len);
            let tail = (at + len).saturating_sub(self.end().get()).min(len);
            self.node.read(GuestOffset(at), &mut bytes[..length(head)?], scratch)?;
            self.node.read(GuestOffset(at + len - tail), &mut bytes[length(len - tail)?..], scratch)?;
            self.node.put(place, GuestOffset(at), &bytes, scratch)?;
            (at, place) = (at + len, forth(place, len));
        }
        Ok(())
    }

    /// Where the range's bytes go, if they can be written there with nothing around them to fill.
    fn spot(&self) -> Option<HostPlace> {
        self.target().filter(|(_, before, after)| (*before, *after) == (0, 0)).map(|(place, ..)| place)
    }

    /// Makes it visible before its bytes are there: only for images that nobody else can see yet. The tables are
    /// then the same whatever the order in which the writes end.
    pub fn publish_early(&mut self) -> Result<()> {
        self.open = false;
        self.node.writing()?.publish(&self.placed)
    }

    /// Makes it visible, unless it is.
    pub fn publish(mut self) -> Result<()> {
        if self.open { self.publish_early() } else { Ok(()) }
    }
}

impl Drop for Placement<'_> {
    fn drop(&mut self) {
        if self.open
            && let Some(writing) = self.node.driver().writing()
        {
            writing.withdraw(&self.placed);
        }
    }
}

/// A placement, and where its bytes are in the caller's buffer.
#[derive(Debug)]
pub struct Step<'a> {
    /// Where it goes.
    pub placement: Placement<'a>,
    /// Where its bytes start in the buffer.
    pub from: usize,
    /// How many there are.
    pub len: usize,
    /// Whether they are in the buffer of encoded bytes.
    pub encoded: bool,
    /// How many of the first ones are in their place already.
    pub done: usize,
}

impl Step<'_> {
    /// Lets the host give the next bytes of the step those of the start of that run, up to `len`, without their passing
    /// through this program. False where it has no way to, or where the bytes are not the same in both files. What was
    /// not done then, or lies differently in the blocks of the two files, is left to be written.
    pub fn offload(&mut self, source: &Mapping<'_>, len: u64, how: Offload) -> Result<bool> {
        let (Some(to), ExtentKind::Data(from)) = (self.placement.spot(), source.kind) else { return Ok(true) };
        let node = self.placement.node;
        if node.driver().cipher().is_some() || source.node.driver().cipher().is_some() {
            return Ok(false);
        }
        // Reading tells what is missing.
        if self.encoded || source.there()? < len {
            return Ok(true);
        }
        let (there, here, to) = (source.node.child(from)?, node.child(to)?, forth(to, self.done as u64));
        let moved = offload(&*there.storage, from.at.get(), &*here.storage, to.at.get(), len, how)
            .at(|| here.doing(Operation::Write, self.placement.start(), to.at))?;
        self.done += length(moved.unwrap_or(0))?;
        Ok(moved.is_some())
    }

    fn bytes<'b>(&self, plain: &'b [u8], encoded: &'b [u8]) -> &'b [u8] {
        bytes_of(plain, encoded, self.encoded, self.from, self.len)
    }
}

fn bytes_of<'b>(plain: &'b [u8], encoded: &'b [u8], is_encoded: bool, from: usize, len: usize) -> &'b [u8] {
    let bytes = if is_encoded { encoded } else { plain };
    from.checked_add(len).and_then(|end| bytes.get(from..end)).unwrap_or_default()
}

/// A write that may still grow.
struct WriteRun<'a> {
    node: &'a Node,
    place: HostPlace,
    guest: GuestOffset,
    from: usize,
    len: usize,
    encoded: bool,
}

impl WriteRun<'_> {
    fn write(&self, plain: &[u8], encoded: &[u8], scratch: &mut Scratch) -> Result<()> {
        let bytes = bytes_of(plain, encoded, self.encoded, self.from, self.len);
        if self.encoded {
            return self.node.put_encoded(self.place, self.guest, bytes);
        }
        self.node.put(self.place, self.guest, bytes, scratch)
    }

    /// Whether that step's bytes follow, in the file and in the buffer.
    fn reaches(&self, step: &Step<'_>, place: HostPlace, from: usize) -> bool {
        self.encoded == step.encoded
            && std::ptr::eq(self.node, step.placement.node)
            && self.place.file == place.file
            && self.place.at.checked_add(self.len as u64) == Some(place.at)
            && self.from + self.len == from
    }
}

/// Writes all steps; what is adjacent in the file and in the buffer goes out in one write.
pub fn write_steps(steps: &[Step<'_>], plain: &[u8], encoded: &[u8], scratch: &mut Scratch) -> Result<()> {
    let mut run: Option<WriteRun<'_>> = None;
    for step in steps.iter().filter(|step| step.done < step.len) {
        let place = match (&step.placement.placed.action, step.encoded) {
            // Encoded bytes are whole units.
            (Action::Write { place, .. }, true) => Some(*place),
            _ => step.placement.spot(),
        };
        let Some(place) = place else {
            // It shares a new unit with what lies beside it: nothing of it is done.
            if let Some(run) = run.take() {
                run.write(plain, encoded, scratch)?;
            }
            step.placement.write(step.bytes(plain, encoded), scratch)?;
            continue;
        };
        let (place, from, len) = (forth(place, step.done as u64), step.from + step.done, step.len - step.done);
        if let Some(run) = &mut run
            && run.reaches(step, place, from)
        {
            run.len += len;
            continue;
        }
        let (node, guest) = (step.placement.node, step.placement.start() + step.done as u64);
        let next = WriteRun { node, place, guest, from, len, encoded: step.encoded };
        if let Some(run) = run.replace(next) {
            run.write(plain, encoded, scratch)?;
        }
    }
    run.map_or(Ok(()), |run| run.write(plain, encoded, scratch))
}

#[cfg(test)]
mod tests;
