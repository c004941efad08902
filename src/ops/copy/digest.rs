//! The digest of what sources hold, made while they are copied, or of themselves alone ([`digest_of`]).
//!
//! Workers have it in turn, in guest order, each with the bytes that it has read anyway; what no worker reads, because
//! it need not be copied, is filled in by the maps. So hashing goes on beside reading, encoding and writing, and
//! memory is what the workers have.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::plan::{CHUNK, Chunk, CopyPlan, PlanShape, Zeros};
use super::source::{self, Content, Joined};
use super::turn::Turn;
use super::zero::SECTOR;
use super::{MOST_THREADS, Observer};
use crate::block::io::Scratch;
use crate::block::{Error, Result};
use crate::crypto::{Digest, DigestKind, Hasher};
use crate::storage::pages::Pages;

/// Most bytes that are read at once to be hashed.
const PIECE: u64 = 1 << 20;

/// See the module.
pub struct GuestDigest {
    whole: Joined,
    /// What cannot be read is zeros.
    salvage: bool,
    state: Mutex<DigestState>,
}

struct DigestState {
    /// Where the next byte is.
    at: u64,
    hasher: Hasher,
    buf: Vec<u8>,
    scratch: Scratch,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl GuestDigest {
    /// Of all that `whole` holds; nothing has been seen yet.
    pub fn new(whole: Joined, kind: DigestKind, salvage: bool) -> Self {
        let state = DigestState { at: 0, hasher: Hasher::new(kind), buf: Vec::new(), scratch: Scratch::default() };
        Self { whole, salvage, state: Mutex::new(state) }
    }

    /// These bytes are at `at`; what lies before them and has not come is what the sources say.
    pub fn bytes(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut state = lock(&self.state);
        self.fill_to(&mut state, at)?;
        state.hasher.bytes(bytes);
        state.at = at + bytes.len() as u64;
        Ok(())
    }

    /// What lies before `to` and has not come is what the sources say.
    pub fn up_to(&self, to: u64) -> Result<()> {
        self.fill_to(&mut lock(&self.state), to)
    }

    /// The digest.
    pub fn finish(self) -> Result<Digest> {
        self.up_to(self.whole.total())?;
        Ok(self.state.into_inner().unwrap_or_else(PoisonError::into_inner).hasher.finish())
    }

    fn fill_to(&self, state: &mut DigestState, to: u64) -> Result<()> {
        while state.at < to {
            let left = to - state.at;
            let segment = match self.whole.map(state.at, left) {
                Ok(segment) => segment,
                Err(_) if self.salvage => {
                    let lost = SECTOR.min(left);
                    state.hasher.zeros(lost);
                    state.at += lost;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let Content::Stored(_) = segment.content else {
                state.hasher.zeros(segment.len);
                state.at += segment.len;
                continue;
            };
            let segment = if segment.len > PIECE { segment.split(PIECE).0 } else { segment };
            let n = usize::try_from(segment.len).map_err(|_| Error::invalid("a run is too long"))?;
            state.buf.resize(n, 0);
            match source::read_told(&segment, &mut state.buf, &mut state.scratch) {
                Err(_) if self.salvage => state.buf.fill(0),
                done => done?,
            }
            state.hasher.bytes(&state.buf);
            state.at += segment.len;
        }
        Ok(())
    }
}

/// The digest of all that `source` holds. Holes are not read.
pub fn digest_of(source: &Joined, digest: GuestDigest, observer: &dyn Observer) -> Result<Digest> {
    let lengths = source.lengths()?;
    let readers = Readers {
        plan: Mutex::new(CopyPlan::new(source, PlanShape { unit: 1, zeros: Zeros::Skip, chunk: CHUNK }, None)),
        digest: &digest,
        turn: Turn::default(),
        stop: AtomicBool::new(false),
        failure: Mutex::default(),
        done: AtomicU64::new(0),
        total: if observer.wants_progress() { source.work(false) } else { 0 },
        observer,
    };
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS);
    std::thread::scope(|scope| {
        for _ in 1..cores {
            if std::thread::Builder::new().spawn_scoped(scope, || readers.work()).is_err() {
                break;
            }
        }
        readers.work();
    });
    let failure = lock(&readers.failure).take();
    lengths.check()?;
    if let Some((_, error)) = failure {
        return Err(error);
    }
    drop(readers);
    digest.finish()
}

/// Reads ahead of the hashing.
struct Readers<'a> {
    plan: Mutex<CopyPlan<'a>>,
    digest: &'a GuestDigest,
    turn: Turn,
    stop: AtomicBool,
    /// What comes first on the disk of what went wrong.
    failure: Mutex<Option<(u64, Error)>>,
    done: AtomicU64,
    total: u64,
    observer: &'a dyn Observer,
}

impl Readers<'_> {
    fn work(&self) {
        let (mut chunk, mut plain, mut scratch) = (Chunk::default(), Pages::default(), Scratch::default());
        while !self.stop.load(Ordering::Relaxed) {
            let more = lock(&self.plan).next(&mut chunk);
            let result = match more {
                Ok(false) => return,
                Ok(true) => self.hash(&chunk, &mut plain, &mut scratch),
                Err(error) => {
                    chunk.number = u64::MAX;
                    Err(error)
                }
            };
            if let Err(error) = result {
                let mut failure = lock(&self.failure);
                if failure.as_ref().is_none_or(|(earlier, _)| chunk.number < *earlier) {
                    *failure = Some((chunk.number, error));
                }
                drop(failure);
                self.stop.store(true, Ordering::Relaxed);
                self.turn.wake();
                return;
            }
        }
    }

    fn hash(&self, chunk: &Chunk<'_>, plain: &mut Pages, scratch: &mut Scratch) -> Result<()> {
        let len = usize::try_from(chunk.len).map_err(|_| Error::invalid("a chunk is too long"))?;
        let whole = plain.room(len)?;
        for segment in &chunk.segments {
            let from = usize::try_from(segment.at - chunk.at).unwrap_or(usize::MAX);
            let to = from.saturating_add(usize::try_from(segment.len).unwrap_or(usize::MAX));
            let part = whole.get_mut(from..to).ok_or_else(|| Error::invalid("a segment is too long"))?;
            source::read_told(segment, part, scratch)?;
        }
        self.turn.take(chunk.number, true, &self.stop, || self.digest.bytes(chunk.at, plain.first(len)))?;
        let done = self.done.fetch_add(chunk.len, Ordering::Relaxed) + chunk.len;
        self.observer.progress(done.min(self.total), self.total);
        Ok(())
    }
}
