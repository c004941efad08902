//! The workers: read → detect zeros → compress → wait for the turn → place → pass the turn on → write → publish.
//!
//! What a worker does with a chunk is here up to its turn; placing and writing are in `store`, and chunks that no worker
//! holds as a whole in `large`.
//!
//! Invariants: the order of placements is the order of the plan, whatever the number of threads, so the target's
//! bytes are the same; memory is one set of buffers a worker, each of `MOST` bytes or little more; the first failure
//! stops everybody.
//!
//! Lock order: `hashing` alone; `turn`, then `writer`, before whatever the target's driver locks; `plan`, `failure` and `rate` are
//! leaves and never held together.

mod large;
mod store;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::ahead::{Ahead, Taken};
use super::digest::GuestDigest;
use super::host_copy::HostCopy;
use super::plan::{CHUNK, Chunk, CopyPlan, PlanShape, Zeros};
use super::rate::Rate;
use super::source::{self, Content, Joined, Segment};
use super::target::{self, Piece, PieceKind};
use super::turn::Turn;
use super::zero::{SECTOR, SparsePolicy};
use super::{CopyOptions, Observer, Sharing, Taking, TargetFacts};
use crate::block::error::Context;
use crate::block::io::{Scratch, Step, reserve};
use crate::block::{Compress, Encoded, Error, ErrorKind, GuestOffset, Node, Result};
use crate::storage::offload::Offload;
use crate::storage::pages::Pages;
use crate::storage::zeros::is_zero;

/// Where chunks are cut that need not be whole units.
const CUT: u64 = 64 << 10;

/// Guest data in one chunk, where it is held a second time, encoded.
const ENCODED_CHUNK: u64 = 1 << 20;

/// To ask whether the file has a hole costs about as much as to write so many bytes.
const HOLE: usize = 64 << 10;

/// The most bytes of a chunk that a worker holds as a whole, where it need not be held: as much as units of 2 MiB take.
const MOST: u64 = CHUNK + (4 << 20);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One copy, as all workers see it.
pub struct Engine<'a> {
    target: &'a Node,
    options: &'a CopyOptions,
    facts: TargetFacts,
    observer: &'a dyn Observer,
    plan: Mutex<CopyPlan<'a>>,
    taken: Taken,
    turn: Turn,
    /// What is copied, hashed in the order of the chunks.
    digest: Option<&'a GuestDigest>,
    hashing: Turn,
    /// Who writes, where one at a time can.
    writer: Option<Mutex<()>>,
    stop: AtomicBool,
    /// The failure of the first chunk that has one, and that chunk.
    failure: Mutex<Option<(u64, Error)>>,
    rate: Option<Rate>,
    done: AtomicU64,
    source: &'a Joined,
    /// Counted when it is first asked for: the bytes that are stored.
    total: OnceLock<u64>,
    /// What the host may do in place of reading and writing, and that it turned out that it cannot.
    offload: Option<Offload>,
    cannot_offload: AtomicBool,
    unit: u64,
    granule: u64,
    /// Whether pieces are finished one by one: those that share a unit of a file that others can see, or all, where the
    /// target or what it lies in takes them in order.
    one_by_one: bool,
    zeros: Zeros,
    sparse: SparsePolicy,
    /// The shortest run of zeros that is left out of a large unit that is written.
    hole: usize,
    /// Whether data that is all zeros is made zeros, and then whether its space may be given back: where no zeros are
    /// left out, and the user has the target written so.
    detect: Option<bool>,
    compress: Option<&'a dyn Compress>,
}

/// What one worker has.
#[derive(Default)]
struct Worker<'a> {
    chunk: Chunk<'a>,
    ahead: Ahead<'a>,
    plain: Pages,
    /// The chunk has not been read, and need not be if the host does all of it.
    unread: bool,
    encoded: Vec<u8>,
    unit: Vec<u8>,
    units: Vec<Unit>,
    scratch: Scratch,
    pieces: Vec<Piece>,
    flags: Vec<u8>,
    steps: Vec<Step<'a>>,
    /// Runs of the chunk of which it was told that they cannot be read, in order and apart.
    told: Vec<Range<u64>>,
}

/// A unit that is to be stored compressed.
struct Unit {
    at: u64,
    len: u64,
    from: usize,
    bytes: usize,
    encoded: bool,
}

impl<'a> Engine<'a> {
    /// Ready to run. With a digest what is copied is hashed on the way: it has to be read then, and need not be copied once
    /// more.
    pub fn new(
        source: &'a Joined,
        target: &'a Node,
        options: &'a CopyOptions,
        facts: TargetFacts,
        observer: &'a dyn Observer,
        digest: Option<&'a GuestDigest>,
    ) -> Result<Self> {
        let writing = target.writing()?;
        // Asked for, or the only way in (stream-optimized).
        let able = writing.compressing();
        let compress = if options.compress {
            Some(able.ok_or_else(|| Error::unsupported("Compression not supported for this file format"))?)
        } else {
            able.filter(|compress| compress.always())
        };
        if let Some(compress) = compress {
            compress.begin();
        }
        let unit = writing.unit().max(1);
        // Where every unit is encoded there is no other way to hide a backing file.
        let written = compress.is_some_and(Compress::always) && target.backing().is_some();
        let least = if written { 0 } else { options.sparse };
        let zeros = match (least, facts.reads_zero) {
            (0, _) => Zeros::Write,
            (_, true) => Zeros::Skip,
            (_, false) => Zeros::Make,
        };
        let rate = options.rate.map(Rate::new);
        let granule = match zeros {
            // A compressed unit is written as a whole.
            _ if compress.is_some() => unit,
            Zeros::Skip => writing.granule().max(1),
            _ => writing.fill_unit().max(1),
        };
        let in_order = facts.taking == Taking::InOrder;
        let alone = granule < unit && granule > 1 || writing.only_appends();
        let one_by_one = in_order || (!facts.unnamed && alone);
        // Where parts of a unit are placed alone, a chunk need not be all of it: its place is known to those that come
        // after it, as it is published at once or each is finished in its turn. Zeros are made unit by unit.
        let apart = unit > CUT && CUT.is_multiple_of(granule) && zeros != Zeros::Make && compress.is_none();
        // What is an image of its own gives places below as the writes come.
        let ordered = target.driver().files().iter().any(|file| file.storage.facts().ordered);
        // Runs of zeros that are left out are shorter than a chunk, whatever is taken.
        let free = unit == 1 && !one_by_one && !ordered && digest.is_none() && least <= CUT;
        let taken = Taken::from(source, free);
        let chunk = if compress.is_some() { ENCODED_CHUNK } else { taken.chunk() };
        let shape = PlanShape { unit: if apart { CUT } else { unit }, zeros, chunk };
        // What cannot be read is to be zeros in the target, not shared.
        let read = compress.is_some() || options.salvage;
        let host = (options.offload && !read).then(|| HostCopy::to(target, unit == 1)).flatten();
        let offload = match (facts.sharing, host.is_some()) {
            _ if read || one_by_one => None,
            (Sharing::Always | Sharing::IfAsked, true) => Some(Offload::ShareOrCopy),
            (Sharing::Always, false) => Some(Offload::Share),
            (Sharing::IfAsked, false) | (Sharing::Never, _) => None,
        };
        let one_by_one = one_by_one || (offload.is_none() && ordered);
        // What is hashed has been read.
        let offload = offload.map(|how| if digest.is_some() { Offload::Share } else { how });
        let plan = CopyPlan::new(source, shape, options.salvage.then_some(observer)).copied_by_host(host);
        Ok(Self {
            target,
            options,
            facts,
            observer,
            plan: Mutex::new(plan),
            taken,
            turn: Turn::default(),
            digest,
            hashing: Turn::default(),
            writer: store::one_writer(source, target).then(Mutex::default),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
            rate,
            done: AtomicU64::new(0),
            source,
            total: OnceLock::new(),
            offload,
            cannot_offload: AtomicBool::new(false),
            unit,
            granule,
            one_by_one,
            zeros,
            sparse: SparsePolicy::new(least),
            hole: if least == 0 || unit <= HOLE as u64 { usize::MAX } else { short_len(least).max(HOLE) },
            detect: target.manner().detect_zeroes.filter(|_| least == 0 && compress.is_none()),
            compress,
        })
    }

    /// Guest data in one piece of work.
    pub fn chunk_len(&self) -> u64 {
        lock(&self.plan).chunk_len()
    }

    /// Does all of it, by this thread and as many others as can be had, in all as many as `threads` says before each chunk
    /// of this one: none ends before there is no more to do. By this one alone where there is nothing to copy.
    pub fn run(&self, threads: impl Fn() -> usize) -> Result<()> {
        let lengths = self.source.lengths()?;
        let mut worker = Worker::default();
        let first = self.next(&mut worker);
        std::thread::scope(|scope| {
            let mut there = 1;
            let hire = || {
                while there < threads() {
                    let other = || {
                        let mut worker = Worker::default();
                        if self.next(&mut worker) {
                            self.work(worker, || {});
                        }
                    };
                    let hired = std::thread::Builder::new().spawn_scoped(scope, other);
                    there = if hired.is_ok() { there + 1 } else { usize::MAX };
                }
            };
            if first {
                self.work(worker, hire);
            }
        });
        let uncut = lengths.check();
        match (lock(&self.failure).take(), uncut) {
            (_, Err(error)) if !self.options.salvage => Err(error),
            (Some((_, error)), _) => Err(error),
            (None, uncut) => {
                if let Err(error) = uncut {
                    self.observer.warn(&error.message());
                }
                if self.observer.wants_progress() {
                    let total = self.total();
                    self.observer.progress(total, total);
                }
                Ok(())
            }
        }
    }

    fn total(&self) -> u64 {
        // A map that cannot be read is an error of the workers, not of the count.
        *self.total.get_or_init(|| self.source.work(self.zeros == Zeros::Write))
    }

    /// Does a worker's chunk, and all that it gets after it. `before_each`: what is done before each.
    fn work(&self, mut worker: Worker<'a>, mut before_each: impl FnMut()) {
        loop {
            before_each();
            let result = self.process(&mut worker);
            worker.steps.clear();
            if let Err(error) = result {
                return self.fail(worker.chunk.number, error);
            }
            if !self.next(&mut worker) {
                return;
            }
        }
    }

    /// Gives a worker the next chunk. False where there is none, or where all is to end.
    fn next(&self, worker: &mut Worker<'a>) -> bool {
        if self.stop.load(Ordering::Relaxed) {
            return false;
        }
        if self.observer.is_cancelled() {
            self.fail(u64::MAX, Error::new(ErrorKind::Cancelled, "Interrupted"));
            return false;
        }
        let more = worker.ahead.next(self.taken, &self.plan, &mut worker.chunk);
        more.unwrap_or_else(|error| {
            // What comes after all chunks that are known is the last to be blamed.
            self.fail(u64::MAX, error);
            false
        })
    }

    fn fail(&self, number: u64, error: Error) {
        let mut failure = lock(&self.failure);
        if failure.as_ref().is_none_or(|(earlier, _)| number < *earlier) {
            *failure = Some((number, error));
        }
        drop(failure);
        self.stop.store(true, Ordering::Relaxed);
        self.turn.wake();
        self.hashing.wake();
    }

    /// Whether the target takes the bytes of the disk from front to back.
    fn in_order(&self) -> bool {
        self.facts.taking == Taking::InOrder
    }

    /// Whether the order of placements can be seen in the target.
    fn ordered(&self) -> bool {
        self.unit > 1 || self.one_by_one
    }

    fn process(&self, worker: &mut Worker<'a>) -> Result<()> {
        worker.told.clear();
        let chunk = &worker.chunk;
        if chunk.zero {
            let (at, len) = (chunk.at, chunk.len);
            self.hash(chunk, None)?;
            return self.in_turn(chunk.number, || self.make_zero(at, len));
        }
        self.count(chunk);
        if self.is_large(chunk) {
            return self.process_large(worker);
        }
        let short = |n: u64| usize::try_from(n).map_err(|_| Error::invalid("a chunk is too long"));
        let len = short(chunk.len)?;
        let padded = match self.compress {
            Some(_) => short(chunk.len.next_multiple_of(self.unit))?,
            None => len,
        };
        worker.unread = self.is_unread(chunk);
        if !worker.unread {
            self.fill(worker, len, padded)?;
            self.hash(&worker.chunk, Some(worker.plain.first(len)))?;
        }
        self.decide(worker, len)?;
        if self.compress.is_some() {
            self.encode(worker, padded)?;
        }
        self.store(worker, len)
    }

    /// Hashes a chunk, where what is copied is hashed, when its turn comes. What the target has already is not in
    /// `bytes`.
    fn hash(&self, chunk: &Chunk<'_>, bytes: Option<&[u8]>) -> Result<()> {
        let Some(digest) = self.digest else { return Ok(()) };
        let bytes = bytes.filter(|_| !chunk.keeps());
        self.hashing.take(chunk.number, true, &self.stop, || match bytes {
            Some(bytes) => digest.bytes(chunk.at, bytes),
            None => digest.up_to(chunk.end()),
        })
    }

    /// Reads the chunk, into a buffer that the processor's cache holds from chunk to chunk. What cannot be read is told,
    /// unless it was told before.
    ///
    /// A mapping of the source spares this copy, and costs more: an entry of the page table for every 4 KiB, made and
    /// given up again. (950 MiB within the page cache, kernel 6.18, EPYC, wall and CPU seconds, best of twelve: read
    /// 0.12 and 0.21, mapped 0.16 and 0.30; one thread in C, chunks of 2 MiB: read 0.19, mapped 0.29, mapped and populated
    /// at once 0.26. Where the host shares the data, so that zeros are all that is looked for: 0.10 and 0.14 of CPU.)
    fn fill(&self, worker: &mut Worker<'a>, len: usize, padded: usize) -> Result<()> {
        let Worker { chunk, plain, scratch, told, .. } = worker;
        let whole = plain.room(padded)?;
        whole[len..].fill(0);
        if padded > len && !self.facts.unnamed {
            // An image that is there and is longer keeps what lies behind the sources.
            self.target.read(GuestOffset(chunk.at + chunk.len), &mut whole[len..], scratch)?;
        }
        for segment in &chunk.segments {
            let from = short_len(segment.at - chunk.at);
            self.read(segment, &mut whole[from..from + short_len(segment.len)], scratch, told)?;
        }
        Ok(())
    }

    /// Decides what is done with each part of the chunk.
    fn decide(&self, worker: &mut Worker<'a>, len: usize) -> Result<()> {
        let Worker { chunk, plain, scratch, pieces, flags, unit, told, .. } = worker;
        target::decide(chunk, plain.first(len), self.sparse, self.zeros, pieces);
        if self.granule > 1 {
            target::coarsen(chunk.at, chunk.len, self.granule, self.source.blank_from(), flags, pieces);
            if chunk.keeps() {
                target::fill_kept(chunk, pieces, plain.room(len)?, |at, part| match self.compress {
                    // What is encoded as a whole is copied as a whole, as the reference does.
                    Some(_) => self.read_through(at, part, scratch, told),
                    None => self.target.read(GuestOffset(at), part, scratch),
                })?;
            }
        }
        if let Some(onto) = self.source.new_backing() {
            onto.keep_same(chunk.at, self.granule, plain.first(len), pieces, unit, scratch)?;
        }
        if self.detect.is_some() {
            target::detect_zeros(chunk.at, plain.first(len), pieces);
        }
        if self.zeros == Zeros::Skip {
            pieces.retain(|piece| piece.kind == PieceKind::Data);
        }
        pieces.retain(|piece| piece.kind != PieceKind::Keep);
        Ok(())
    }

    fn count(&self, chunk: &Chunk<'_>) {
        let work = |segment: &&Segment<'_>| match segment.content {
            Content::Stored(_) => true,
            Content::Zero => self.zeros == Zeros::Write,
            Content::Keep => false,
        };
        let bytes: u64 = chunk.segments.iter().filter(work).map(|segment| segment.len).sum();
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if self.observer.wants_progress() {
            self.observer.progress(done, self.total());
        }
    }

    /// Reads what the sources show there, whichever of their layers holds it.
    fn read_through(&self, at: u64, buf: &mut [u8], scratch: &mut Scratch, told: &mut Vec<Range<u64>>) -> Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let segment = self.source.map_through(at + done as u64, rest.len() as u64)?;
            let len = short_len(segment.len).min(rest.len());
            self.read(&segment, &mut rest[..len], scratch, told)?;
            done += len;
        }
        Ok(())
    }

    fn read(
        &self,
        segment: &Segment<'_>,
        buf: &mut [u8],
        scratch: &mut Scratch,
        told: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let mut warn = |run: Range<u64>, text: &str| {
            if is_news(told, run) {
                self.observer.warn(text);
            }
        };
        if !self.options.salvage {
            return source::read_told(segment, buf, scratch);
        }
        let Err(error) = source::read(segment, buf, scratch) else { return Ok(()) };
        if let (crate::block::ErrorKind::Truncated, Content::Stored(_)) = (error.kind, &segment.content) {
            // A compressed unit that is cut off: the plan has seen all else.
            buf.fill(0);
            warn(segment.at..segment.end(), &format!("{}; it is read as zeros", error.message()));
            return Ok(());
        }
        // Sector by sector: whatever cannot be read is zeros.
        let mut rest = *segment;
        for sector in buf.chunks_mut(SECTOR as usize) {
            if let Err(error) = source::read(&Segment { len: sector.len() as u64, ..rest }, sector, scratch) {
                sector.fill(0);
                let run = rest.at..rest.at + sector.len() as u64;
                warn(run, &format!("error while reading offset {}: {}", rest.at, error.cause()));
            }
            if rest.len > sector.len() as u64 {
                rest = rest.split(sector.len() as u64).1;
            }
        }
        Ok(())
    }

    /// Encodes the units of the data pieces, and makes `units` of them.
    fn encode(&self, worker: &mut Worker<'a>, padded: usize) -> Result<()> {
        let Some(compress) = self.compress else { return Ok(()) };
        let Worker { chunk, plain, encoded, unit, units, pieces, .. } = worker;
        encoded.clear();
        units.clear();
        let whole = plain.first(padded);
        let size = usize::try_from(self.unit).map_err(|_| Error::invalid("a unit is too long"))?;
        let end = chunk.at + chunk.len;
        for piece in pieces.iter().filter(|piece| piece.kind == PieceKind::Data) {
            let mut at = piece.at;
            while at < piece.at + piece.len {
                let from = usize::try_from(at - chunk.at).map_err(|_| Error::invalid("a chunk is too long"))?;
                let bytes = &whole[from..(from + size).min(padded)];
                let len = self.unit.min(end - at);
                if self.zeros == Zeros::Skip && is_zero(bytes) {
                    at += self.unit;
                    continue;
                }
                let next = match compress.encode(GuestOffset(at), bytes, self.options.effort, unit)? {
                    Encoded::Incompressible if !compress.always() => {
                        Unit { at, len, from, bytes: short_len(len), encoded: false }
                    }
                    _ => {
                        let from = encoded.len();
                        reserve(encoded, unit.len())
                            .with_context(|| format!("could not keep the compressed unit at {at}"))?;
                        encoded.extend_from_slice(unit);
                        Unit { at, len, from, bytes: unit.len(), encoded: true }
                    }
                };
                units.push(next);
                at += self.unit;
            }
        }
        pieces.retain(|piece| piece.kind != PieceKind::Data);
        Ok(())
    }

    /// Waits until so many bytes more may be written.
    fn wait(&self, bytes: u64) {
        if let Some(rate) = &self.rate {
            rate.wait(bytes, &self.stop);
        }
    }

    /// Runs `place` when all chunks before this one have been placed. (What nothing but encoded units can be stored in goes
    /// on from where it ends: there the user's leave to write in another order is none.)
    fn in_turn(&self, number: u64, place: impl FnOnce() -> Result<()>) -> Result<()> {
        if !self.ordered() {
            return place();
        }
        let stream = self.compress.is_some_and(Compress::always);
        self.turn.take(number, !self.options.reorder || self.in_order() || stream, &self.stop, place)
    }
}

/// Whether a run was not told of yet; it is now.
fn is_news(told: &mut Vec<Range<u64>>, run: Range<u64>) -> bool {
    let next = told.partition_point(|known| known.start <= run.start);
    match next.checked_sub(1).and_then(|last| told.get_mut(last)) {
        Some(last) if run.start < last.end => return false,
        Some(last) if run.start == last.end => last.end = run.end,
        _ => told.insert(next, run),
    }
    true
}

fn short_len(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
