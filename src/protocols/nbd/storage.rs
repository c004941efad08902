//! An export as bytes: requests are cut to what the server takes, spread over connections, and sent again where a
//! lost connection may be made anew.
//!
//! Lock order: a lane's connection, then nothing; it is held while a lost connection is made again, which all who have
//! requests on that lane wait for, and else for a look.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::connection::{Connection, Failure};
use super::extents::{self, KnownExtents};
use super::handshake::{self, Export, Refusal};
use super::layout::{command, command_flag, flag};
use super::names::Target;
use super::requests::{Ask, Lost, Sink, StatusRun};
use super::tls::Tls;
use crate::storage::{Error, Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// Connections to a server that takes several.
const MOST_LANES: usize = 4;
/// Requests that are worth being under way at once.
const PARALLEL: u32 = 8;
/// A request to a server on this host is slow that takes longer, and that much more for each MiB of data.
const SLOW: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(8));
/// So many slow ones in a row, and the server waits for something else than a processor.
const SLOW_ONES: u32 = 8;
/// Data in one request to a server that answers at once: it stores one while the next one comes.
const SHORT_WRITE: usize = 1 << 20;
/// How long one more connection may take to come about.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest that anybody waits: a day.
const MOST_SECONDS: u64 = 86400;
/// Between two tries to connect.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest range that is made zeros, or given back, by one request.
const LONGEST_RANGE: u64 = 1 << 30;
/// Zeros that are written where the server does not make them.
const ZEROS: u64 = 1 << 20;

/// See the module.
#[derive(Debug)]
pub struct Remote {
    target: Target,
    tls: Option<Tls>,
    export: Export,
    lanes: [Lane; MOST_LANES],
    /// How many of them are used where nothing is slow.
    few_lanes: usize,
    /// How many of them have been used.
    opened: AtomicUsize,
    /// One more could not be had, or the server takes no more.
    enough: AtomicBool,
    /// Slow requests in a row, or [`SLOW_ONES`] from then on; those where the server is elsewhere are.
    slow: AtomicU32,
    /// Every write is on stable storage before it is answered.
    write_through: bool,
    extents: KnownExtents,
    /// Writers of parts of the least block take turns.
    part_writers: Mutex<()>,
}

/// A way to the server.
#[derive(Debug, Default)]
struct Lane {
    connection: Mutex<Option<Arc<Connection>>>,
    under_way: AtomicUsize,
}

impl Lane {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Connection>>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Remote {
    /// Connects; tries again for as long as the target says.
    pub fn open(target: Target, tls: Option<Tls>, write_through: bool) -> std::result::Result<Self, Refusal> {
        let deadline = Instant::now() + Duration::from_secs(target.patience.min(MOST_SECONDS));
        let ready = try_until(deadline, || handshake::open(&target, tls.as_ref(), None))?;
        let (export, local) = (ready.export, target.is_local());
        let lanes: [Lane; MOST_LANES] = Default::default();
        let [first, ..] = &lanes;
        *first.lock() = Some(Arc::new(Connection::new(ready)));
        Ok(Self {
            target,
            tls,
            export,
            lanes,
            few_lanes: available_parallelism().map_or(1, NonZero::get).clamp(2, MOST_LANES),
            opened: AtomicUsize::new(1),
            enough: AtomicBool::new(!export.has(flag::CAN_MULTI_CONN)),
            slow: AtomicU32::new(if local { 0 } else { SLOW_ONES }),
            write_through,
            extents: KnownExtents::default(),
            part_writers: Mutex::new(()),
        })
    }

    /// What is there.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Whether requests take longer than processors need for them. A server on this host that answers at once has nothing
    /// from more of them than there are processors: they push each other's data out of the caches, and wait for the same
    /// locks. (0.9 GiB in requests of 2 MiB from and to `qemu-nbd` and `nbdkit` on two cores: with two in flight over two
    /// connections 10 to 30 % faster than with eight over four.)
    fn is_slow(&self) -> bool {
        self.slow.load(Ordering::Relaxed) >= SLOW_ONES
    }

    /// Takes note of how long a request with so much data took.
    fn took(&self, time: Duration, bytes: u64) {
        if !self.is_slow() {
            let mib = u32::try_from(bytes >> 20).unwrap_or(u32::MAX);
            let slow = time > SLOW.1.saturating_mul(mib).saturating_add(SLOW.0);
            self.slow.store(if slow { self.slow.load(Ordering::Relaxed) + 1 } else { 0 }, Ordering::Relaxed);
        }
    }

    /// The least busy of the connections, or one more, if all are busy and the server takes more.
    fn lane(&self) -> &Lane {
        let most = if self.is_slow() { MOST_LANES } else { self.few_lanes };
        let opened = self.opened.load(Ordering::Acquire).clamp(1, MOST_LANES);
        let (used, unused) = self.lanes.split_at(opened);
        let [first, ..] = &self.lanes;
        let least = used.iter().min_by_key(|lane| lane.under_way.load(Ordering::Relaxed)).unwrap_or(first);
        let more = opened < most && !self.enough.load(Ordering::Relaxed) && least.under_way.load(Ordering::Relaxed) > 0;
        match unused.first().filter(|_| more) {
            Some(next) if self.open_lane(next) => next,
            _ => least,
        }
    }

    /// Opens one more; what cannot be had is done without.
    fn open_lane(&self, lane: &Lane) -> bool {
        let Ok(mut connection) = lane.connection.try_lock() else { return false };
        if connection.is_some() {
            return true;
        }
        match handshake::open(&self.target, self.tls.as_ref(), Some(PATIENCE)) {
            Ok(ready) if ready.export == self.export => {
                *connection = Some(Arc::new(Connection::new(ready)));
                self.opened.fetch_add(1, Ordering::Release);
                true
            }
            _ => {
                self.enough.store(true, Ordering::Relaxed);
                false
            }
        }
    }

    /// Does one thing, again on a new connection where one is lost and may come back.
    fn request(&self, ask: &Ask<'_>, mut sink: Sink<'_>) -> Result<()> {
        let lane = self.lane();
        let _busy = Busy::on(lane);
        let mut deadline = None;
        loop {
            let Some(connection) = lane.lock().clone() else { return Err(Errno::ENOTCONN.into()) };
            let start = Instant::now();
            match connection.request(ask, sink.again()) {
                Ok(()) => {
                    if [command::READ, command::WRITE].contains(&ask.command) {
                        self.took(start.elapsed(), ask.len);
                    }
                    return Ok(());
                }
                Err(Failure::Refused(errno)) => return Err(errno.into()),
                Err(Failure::Lost(lost)) if lost.passing && self.target.reconnect > 0 => {
                    let wait = Duration::from_secs(self.target.reconnect.min(MOST_SECONDS));
                    let deadline = *deadline.get_or_insert_with(|| Instant::now() + wait);
                    self.connect_again(lane, &connection, deadline).map_err(|refusal| {
                        remote(format!("{}, and could not be reached again: {}", lost.text, refusal.text))
                    })?;
                }
                Err(Failure::Lost(Lost { text, .. })) => return Err(remote(text)),
            }
        }
    }

    /// Makes a connection again, unless somebody else has.
    fn connect_again(&self, lane: &Lane, old: &Arc<Connection>, deadline: Instant) -> std::result::Result<(), Refusal> {
        let mut connection = lane.lock();
        if connection.as_ref().is_some_and(|now| !Arc::ptr_eq(now, old)) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err("it went away again and again".into());
        }
        let timeout = Some(left.max(PAUSE));
        let ready = try_until(deadline, || handshake::open(&self.target, self.tls.as_ref(), timeout))?;
        if ready.export != self.export {
            return Err("the export is not the same any more".into());
        }
        *connection = Some(Arc::new(Connection::new(ready)));
        Ok(())
    }

    /// Bytes of a range that the export has.
    fn room(&self, at: u64, len: u64) -> u64 {
        self.export.size.saturating_sub(at).min(len)
    }

    fn must_have(&self, at: u64, len: u64) -> Result<()> {
        if self.room(at, len) < len { Err(Errno::ENOSPC.into()) } else { Ok(()) }
    }

    /// The least range of whole blocks that holds a range.
    fn around(&self, at: u64, len: u64) -> (u64, u64) {
        let unit = u64::from(self.export.minimum);
        let start = at / unit * unit;
        let end = at.saturating_add(len);
        // The last block may be shorter.
        let end = end.checked_next_multiple_of(unit).unwrap_or(end).min(self.export.size).max(end);
        (start, end - start)
    }

    /// The longest range of whole blocks in a range, which may be none.
    fn inside(&self, at: u64, len: u64) -> (u64, u64) {
        let unit = u64::from(self.export.minimum);
        let end = at.saturating_add(len);
        let start = at.checked_next_multiple_of(unit).unwrap_or(end).min(end);
        let end = if end == self.export.size { end } else { (end / unit * unit).max(start) };
        (start, end - start)
    }

    fn read_piece(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let (start, len) = self.around(at, buf.len() as u64);
        if len == buf.len() as u64 {
            return self.request(&Ask::new(command::READ, at, len), Sink::Data(buf));
        }
        let mut whole = vec![0; usize::try_from(len).map_err(|_| Errno::ENOMEM)?];
        self.request(&Ask::new(command::READ, start, len), Sink::Data(&mut whole))?;
        let skip = usize::try_from(at - start).unwrap_or(usize::MAX);
        let part = whole.get(skip..).and_then(|rest| rest.get(..buf.len())).ok_or(Errno::EIO)?;
        buf.copy_from_slice(part);
        Ok(())
    }

    fn write_piece(&self, at: u64, buf: &[u8]) -> Result<()> {
        let (start, len) = self.around(at, buf.len() as u64);
        if len == buf.len() as u64 {
            return self.change(&Ask::write(at, buf));
        }
        let _turn = self.part_writers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut whole = vec![0; usize::try_from(len).map_err(|_| Errno::ENOMEM)?];
        self.request(&Ask::new(command::READ, start, len), Sink::Data(&mut whole))?;
        let skip = usize::try_from(at - start).unwrap_or(usize::MAX);
        let part = whole.get_mut(skip..).and_then(|rest| rest.get_mut(..buf.len())).ok_or(Errno::EIO)?;
        part.copy_from_slice(buf);
        self.change(&Ask::write(start, &whole))
    }

    /// Something that changes the export.
    fn change(&self, ask: &Ask<'_>) -> Result<()> {
        let fua = if self.write_through && self.export.has(flag::SEND_FUA) { command_flag::FUA } else { 0 };
        let done = self.request(&Ask { flags: ask.flags | fua, ..*ask }, Sink::Nothing);
        self.extents.forget();
        done?;
        if self.write_through && fua == 0 { self.flush() } else { Ok(()) }
    }

    /// The same for each part of a range of whole blocks.
    fn change_range(&self, command: u16, flags: u16, at: u64, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(LONGEST_RANGE);
            self.change(&Ask { flags, ..Ask::new(command, at + done, part) })?;
            done += part;
        }
        Ok(())
    }

    fn write_zeros(&self, at: u64, len: u64) -> Result<()> {
        let zeros = vec![0; usize::try_from(len.min(ZEROS)).unwrap_or(0)];
        let mut done = 0;
        while done < len {
            let part = usize::try_from((len - done).min(ZEROS)).unwrap_or(0);
            self.write_at(at + done, zeros.get(..part).unwrap_or_default())?;
            done += part as u64;
        }
        Ok(())
    }

    /// Payloads that the server takes.
    fn longest(&self) -> usize {
        usize::try_from(self.export.maximum).unwrap_or(usize::MAX).max(1)
    }
}

/// A request under way, until it is dropped.
struct Busy<'a>(&'a Lane);

impl<'a> Busy<'a> {
    fn on(lane: &'a Lane) -> Self {
        lane.under_way.fetch_add(1, Ordering::Relaxed);
        Self(lane)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

fn remote(text: String) -> Error {
    Error::Remote { text, errno: Errno::EIO }
}

/// Tries until it works, it is too late, or it is clear that it never will.
fn try_until<T>(
    deadline: Instant,
    mut act: impl FnMut() -> std::result::Result<T, Refusal>,
) -> std::result::Result<T, Refusal> {
    loop {
        match act() {
            Err(refusal) if refusal.passing && Instant::now() + PAUSE < deadline => sleep(PAUSE),
            done => return done,
        }
    }
}

impl Storage for Remote {
    fn len(&self) -> Result<u64> {
        Ok(self.export.size)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let there = usize::try_from(self.room(at, buf.len() as u64)).unwrap_or(buf.len());
        let (there, past) = buf.split_at_mut(there);
        past.fill(0);
        let mut at = at;
        for piece in there.chunks_mut(self.longest()) {
            self.read_piece(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        self.must_have(at, buf.len() as u64)?;
        let mut at = at;
        let longest = if self.is_slow() { self.longest() } else { self.longest().min(SHORT_WRITE) };
        for piece in buf.chunks(longest) {
            self.write_piece(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        let left = self.room(at, max);
        if left == 0 || self.export.context.is_none() {
            return Ok(if left == 0 { HostExtent::hole(max) } else { HostExtent::data(left) });
        }
        if let Some(known) = self.extents.find(at, left) {
            return Ok(known);
        }
        let (wanted, plan) = self.extents.plan(self.export.extended);
        let (start, len) = self.around(at, self.room(at, wanted));
        let mut runs: Vec<StatusRun> = Vec::new();
        self.request(&Ask::new(command::BLOCK_STATUS, start, len), Sink::Status(&mut runs))?;
        let meaning = extents::meaning(&self.target.context);
        self.extents.learn(start, len, self.export.size, &runs, plan, meaning);
        let mut end = start;
        for (len, flags) in runs {
            end = end.saturating_add(len);
            if end > at {
                return Ok(HostExtent { len: (end - at).min(left), kind: meaning(flags) });
            }
        }
        Err(remote("the server sent block status of less than a block".to_owned()))
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        self.must_have(at, len)?;
        if how == Zeroing::Write || !self.export.has(flag::SEND_WRITE_ZEROES) {
            return self.write_zeros(at, len);
        }
        let (start, whole) = self.inside(at, len);
        self.write_zeros(at, start - at)?;
        let flags = if how == Zeroing::Allocate { command_flag::NO_HOLE } else { 0 };
        self.change_range(command::WRITE_ZEROES, flags, start, whole)?;
        self.write_zeros(start + whole, at + len - start - whole)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        if !self.export.has(flag::SEND_TRIM) {
            return Ok(());
        }
        let (start, whole) = self.inside(at, self.room(at, len));
        self.change_range(command::TRIM, 0, start, whole)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        match fill {
            _ if len > self.export.size => Err(Error::Other("Cannot grow NBD nodes".to_owned())),
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            fill => Err(Error::Other(format!("Unsupported preallocation mode '{}'", fill.name()))),
        }
    }

    fn flush(&self) -> Result<()> {
        match self.export.has(flag::SEND_FLUSH) {
            true => self.request(&Ask::new(command::FLUSH, 0, 0), Sink::Nothing),
            false => Ok(()),
        }
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn facts(&self) -> Facts {
        Facts {
            fixed_len: true,
            resize_refusal: Some("Cannot resize NBD nodes"),
            new_reads_zero: false,
            alignment: self.export.minimum,
            best_request: self.export.preferred,
            parallel: self.is_slow().then_some(PARALLEL),
            ..Facts::PLAIN
        }
    }

    fn host(&self) -> Option<&HostFile> {
        None
    }

    fn announce(&self, _event: Event) {}
}
