//! Writes to a layer: room that the driver gives, filled and then published; and steps of which those that are adjacent
//! go out in one write.

use crate::block::driver::{Action, Placed, Store};
use crate::block::error::{Context, Operation};
use crate::block::{ExtentKind, GuestOffset, HostPlace, Mapping, Node, Result};
use crate::storage::offload::{Offload, offload};
use crate::storage::{Event, Zeroing, zeros};

use super::{Scratch, ZEROS, back, forth, length, resize, zeroed};

/// Room in an image that is not visible yet: fill it, then publish it; dropped, it is given back.
#[derive(Debug)]
pub struct Placement<'a> {
    pub(super) node: &'a Node,
    pub(super) placed: Placed,
    pub(super) open: bool,
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
        if before.saturating_add(after) > ZEROS && self.node.driver().cipher().is_none() {
            return self.write_between(place, before, after, data, scratch);
        }
        let head = length(before)?;
        let mut whole = zeroed(before.saturating_add(after).saturating_add(data.len() as u64))?;
        let start = GuestOffset(self.start().get().saturating_sub(before));
        self.node.announce(Event::COW_READ);
        self.node.read(start, &mut whole[..head], scratch)?;
        whole[head..head + data.len()].copy_from_slice(data);
        self.node.read(self.end(), &mut whole[head + data.len()..], scratch)?;
        self.node.announce(Event::COW_WRITE);
        self.node.put(back(place, before)?, start, &whole, scratch)
    }

    /// The same where so much lies around it that it is written apart.
    fn write_between(
        &self,
        place: HostPlace,
        before: u64,
        after: u64,
        data: &[u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let start = GuestOffset(self.start().get().saturating_sub(before));
        self.node.announce(Event::COW_READ);
        self.fill(back(place, before)?, start, before, scratch)?;
        self.node.put(place, self.start(), data, scratch)?;
        self.node.announce(Event::COW_WRITE);
        self.fill(forth(place, data.len() as u64), self.end(), after, scratch)
    }

    /// Writes so many bytes that lie beside the range as they read now.
    fn fill(&self, mut place: HostPlace, mut guest: GuestOffset, bytes: u64, scratch: &mut Scratch) -> Result<()> {
        let (mut left, mut around) = (bytes, Vec::new());
        while left > 0 {
            let len = left.min(ZEROS);
            resize(&mut around, length(len)?)?;
            self.node.read(guest, &mut around, scratch)?;
            self.node.put(place, guest, &around, scratch)?;
            (place, guest, left) = (forth(place, len), guest + len, left - len);
        }
        Ok(())
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
                let start = GuestOffset(self.start().get().saturating_sub(before));
                self.fill(back(place, before)?, start, before, scratch)?;
                self.zero_bytes(place, Zeroing::Write)?;
                self.fill(forth(place, self.placed.len), self.end(), after, scratch)
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
            let mut bytes = zeroed(len)?;
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

    /// Writes the next bytes of the step, and with the first and the last ones what lies around it in a new unit. Not for
    /// a layer with a cipher, whose sectors may be larger than that. `hole` as in [`write_steps`].
    pub fn write_next(&mut self, bytes: &[u8], hole: usize, scratch: &mut Scratch) -> Result<()> {
        let done = self.done as u64;
        self.done += bytes.len();
        let Some((place, before, after)) = self.placement.target() else { return Ok(()) };
        let start = self.placement.start();
        if done == 0 {
            self.placement.fill(back(place, before)?, GuestOffset(start.get() - before), before, scratch)?;
        }
        self.placement.node.put_around(forth(place, done), start + done, bytes, hole, scratch)?;
        match self.done == self.len {
            true => self.placement.fill(forth(place, self.len as u64), self.placement.end(), after, scratch),
            false => Ok(()),
        }
    }

    /// Counts those of the next `len` bytes as done, all of them zeros, that are there in the file already, and says
    /// whether there are any. Not the last ones of the step (see [`zeros`]).
    pub fn skip_zeros(&mut self, len: u64) -> Result<bool> {
        let node = self.placement.node;
        let left = ((self.len - self.done) as u64).saturating_sub(zeros::END);
        let place = self.placement.spot().filter(|_| !self.encoded && node.driver().cipher().is_none());
        let Some(place) = place.map(|place| forth(place, self.done as u64)) else { return Ok(false) };
        let child = node.child(place)?;
        let there = zeros::are_there(&*child.storage, place.at.get(), len.min(left))
            .at(|| child.doing(Operation::Write, self.placement.start(), place.at))?;
        self.done += length(there)?;
        Ok(there > 0)
    }

    /// Makes the file as long as it were with all of the step, which it has none of.
    pub fn reserve(&self) -> Result<()> {
        let Some((place, before, after)) = self.placement.target() else { return Ok(()) };
        let (from, child) = (back(place, before)?.at, self.placement.node.child(place)?);
        let len = before.saturating_add(self.len as u64).saturating_add(after);
        let doing = || child.doing(Operation::Write, self.placement.start(), place.at);
        child.storage.zero(from.get(), len, Zeroing::Punch).at(doing)
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
    fn write(&self, plain: &[u8], encoded: &[u8], hole: usize, scratch: &mut Scratch) -> Result<()> {
        let bytes = bytes_of(plain, encoded, self.encoded, self.from, self.len);
        if self.encoded {
            return self.node.put_encoded(self.place, self.guest, bytes);
        }
        self.node.put_around(self.place, self.guest, bytes, hole, scratch)
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

/// Writes all steps; what is adjacent in the file and in the buffer goes out in one write, but for runs of at least `hole`
/// plain zeros that lie in a hole of the file.
pub fn write_steps(steps: &[Step<'_>], plain: &[u8], encoded: &[u8], hole: usize, scratch: &mut Scratch) -> Result<()> {
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
                run.write(plain, encoded, hole, scratch)?;
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
            run.write(plain, encoded, hole, scratch)?;
        }
    }
    run.map_or(Ok(()), |run| run.write(plain, encoded, hole, scratch))
}
