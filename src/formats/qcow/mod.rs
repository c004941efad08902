//! qcow: the first version of QEMU's copy-on-write image.
//!
//! Invariants: space is only ever taken from the end of the file; a cluster's data is written before the L2
//! entry that names it, an L2 table before its L1 entry. A stop in between leaves space that nothing names. An image
//! in which tables and clusters overlap is not written to.
//!
//! One lock, over the tables (`one_file.rs`); it is never held while guest data moves.

mod check;
mod create;
mod layering;
mod layout;
mod measure;
mod resize;
mod tables;

use std::ffi::OsString;
use std::ops::Deref;
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicBool, Ordering};

use self::layout::{HEADER_BYTES, MAX_OFFSET, QcowEntry, QcowHeader};
use self::tables::QcowState;
use crate::block::error::Context;
use crate::block::info::ImageInfo;
use crate::block::{
    Action, BackingChange, BackingRef, BlockDriver, Check, Child, Cipher, Compress, CompressedUnit, Create, Effort,
    Emptying, Encoded, Error, Extent, ExtentKind, Format, GuestOffset, HostPlace, OpenRequest, Placed, Resize, Result,
    Store, Ticket, Write,
};
use crate::codec::deflate::{self, How, Wrap};
use crate::formats::encryption::{self, KEY_SECRET};
use crate::formats::one_file::{OneFile, Tables};
use crate::formats::sector_cipher::ImageCipher;

/// The format.
#[derive(Debug)]
pub struct Qcow;

/// The most bytes that one placement covers.
const RUN: u64 = 2 << 20;

impl Format for Qcow {
    fn name(&self) -> &'static str {
        "qcow"
    }

    fn probe(&self, head: &[u8], _name: &str) -> u32 {
        if head.starts_with(b"QFI\xfb\0\0\0\x01") { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>> {
        let OpenRequest { file, options, purpose, secrets, .. } = request;
        let (write, look_only) = (purpose.writes(), purpose.only_looks());
        let storage = &*file.storage;
        let mut raw = [0; HEADER_BYTES];
        storage.read_at(0, &mut raw).context("Could not read the qcow header")?;
        let header = QcowHeader::parse(raw)?;
        let encrypted = header.crypt() != 0;
        let id = encryption::take_key(options, encrypted.then_some("aes"))?;
        let cipher = match encrypted && !look_only {
            true => {
                Some(ImageCipher::legacy_aes(&secrets.key(KEY_SECRET, id.as_deref(), &file.name, purpose.into())?)?)
            }
            false => None,
        };
        let size = header.size() / 512 * 512;
        let backing = read_backing(&file, &header, look_only)?;
        let bits = header.cluster_bits();
        let state = QcowState::new(header, &file.name);
        Ok(Box::new(QcowDriver {
            cluster: 1 << bits,
            bits,
            backing,
            keeps_zeros: AtomicBool::new(false),
            encrypted,
            cipher,
            image: OneFile::new(file, size, state, write),
        }))
    }

    fn strong_options(&self) -> &'static [&'static str] {
        &[KEY_SECRET]
    }

    fn creating(&self) -> Option<&dyn Create> {
        Some(self)
    }
}

fn read_backing(file: &Child, header: &QcowHeader, look_only: bool) -> Result<Option<BackingRef>> {
    let Some((at, length)) = header.backing() else { return Ok(None) };
    let storage = &*file.storage;
    let there = storage.len().with_context(|| format!("Could not get size of '{}'", file.name))?;
    let end = at.saturating_add(u64::from(length));
    if end > MAX_OFFSET || end > there && !look_only {
        let name = &file.name;
        return Err(Error::truncated("the backing file's name", at, there).context(name));
    }
    let mut name = vec![0; usize::try_from(length).unwrap_or(0)];
    storage.read_at(at, &mut name).context("Could not read the backing file's name")?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    name.truncate(end);
    let name = OsString::from_vec(name);
    Ok((!name.is_empty()).then_some(BackingRef { name, format: None, elsewhere: Vec::new() }))
}

#[derive(Debug)]
struct QcowDriver {
    image: OneFile<QcowState>,
    cluster: u64,
    /// log2 of it.
    bits: u32,
    backing: Option<BackingRef>,
    /// Whether zeros are kept as such though nothing lies below.
    keeps_zeros: AtomicBool,
    encrypted: bool,
    /// What clusters that are not compressed are encrypted with. Nothing where they are not, or the header alone is
    /// looked at.
    cipher: Option<ImageCipher>,
}

impl Deref for QcowDriver {
    type Target = OneFile<QcowState>;

    fn deref(&self) -> &OneFile<QcowState> {
        &self.image
    }
}

impl BlockDriver for QcowDriver {
    fn format(&self) -> &'static str {
        Qcow.name()
    }

    fn virtual_size(&self) -> u64 {
        self.image.virtual_size()
    }

    /// Blocks are written as a whole.
    fn short_unit(&self) -> Option<u64> {
        Some(1)
    }

    fn extent(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let max = max.min(self.virtual_size().saturating_sub(at.get()));
        let (index, within) = (at.get() / self.cluster, at.get() % self.cluster);
        let run = self.state().run(self.storage(), index, within.saturating_add(max).div_ceil(self.cluster));
        let (entry, run) = run.map_err(|error| error.naming(&self.files[0].name))?;
        let len = max.min(run.saturating_mul(self.cluster).saturating_sub(within));
        let kind = match entry {
            QcowEntry::Unallocated => ExtentKind::Unallocated(None),
            QcowEntry::Plain(host) => ExtentKind::Data(HostPlace::main(host.saturating_add(within))),
            QcowEntry::Compressed(host, bytes) => ExtentKind::Compressed(CompressedUnit {
                start: GuestOffset(index * self.cluster),
                len: self.cluster,
                place: HostPlace::main(host),
                host_len: bytes,
            }),
        };
        Ok(Extent { start: at, len, kind })
    }

    /// Clusters begin with a sector of the file: the reference reads no others, nor writes to them (10.0.2).
    fn may_be_at(&self, at: GuestOffset, place: HostPlace) -> bool {
        place.at.get() % 512 == at.get() % 512
    }

    fn decode(&self, unit: &CompressedUnit, input: &[u8], out: &mut [u8]) -> Result<()> {
        let (at, host) = (unit.start, unit.place.at.get());
        deflate::decode(Wrap::Raw, input, out)
            .map_err(|e| Error::corrupt(format!("compressed cluster at {at}: {e}")).in_file_at(host))
    }

    fn files(&self) -> &[Child] {
        &self.files
    }

    fn backing(&self) -> Option<&BackingRef> {
        self.backing.as_ref()
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo { encrypted: self.encrypted, ..ImageInfo::plain(Some(self.cluster)) })
    }

    fn flush(&self) -> Result<()> {
        self.image.flush()
    }

    fn writing(&self) -> Option<&dyn Write> {
        self.write.then_some(self)
    }

    fn resizing(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn backing_change(&self) -> Option<&dyn BackingChange> {
        self.write.then_some(self)
    }

    fn emptying(&self) -> Option<&dyn Emptying> {
        self.write.then_some(self)
    }

    fn cipher(&self) -> Option<&dyn Cipher> {
        self.cipher.as_ref().map(|cipher| cipher as &dyn Cipher)
    }

    fn checking(&self) -> Option<&dyn Check> {
        Some(self)
    }
}

impl QcowDriver {
    /// Room for clusters that are not there, or have to move. `wanted` of them are alike.
    fn place_new(&self, state: &mut QcowState, at: GuestOffset, len: u64, store: Store, wanted: u64) -> Result<Placed> {
        let (index, within) = (at.get() / self.cluster, at.get() % self.cluster);
        let fresh_is_zero = self.backing.is_none() && self.cipher.is_none();
        let was = state.run(self.storage(), index, 1)?.0;
        let table_left = state.left_in_table(index);
        let count = (within + len).div_ceil(self.cluster).min(wanted).min(table_left).min((RUN / self.cluster).max(1));
        let len = len.min(count * self.cluster - within);
        let (host, fresh) = state.take(self.storage(), index, count * self.cluster, self.cluster)?;
        // Past the end of the file all is zero as it is, and so is what such a cluster read as.
        let (before, after) = if fresh && fresh_is_zero && was == QcowEntry::Unallocated {
            (0, 0)
        } else {
            (within, count * self.cluster - within - len)
        };
        let action = Action::Write { place: HostPlace::main(host + within), before, after };
        Ok(Placed { start: at, len, store, action, ticket: Ticket::New { unit: index, count, entry: host } })
    }
}

impl Write for QcowDriver {
    fn unit(&self) -> u64 {
        self.cluster
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let (index, within) = (at.get() / self.cluster, at.get() % self.cluster);
        let mut state = self.state();
        state.prepare(self.storage())?;
        let done = |len, action, ticket| Ok(Placed { start: at, len, store, action, ticket });
        if let Store::Compressed { bytes } = store {
            if within != 0 {
                return Err(Error::invalid("a compressed cluster is written whole"));
            }
            let (host, _) = state.take(self.storage(), index, bytes, 512)?;
            let entry = QcowEntry::Compressed(host, bytes).encode(self.bits);
            let entry = entry.ok_or_else(|| Error::unsupported("a compressed cluster does not fit the image"))?;
            let action = Action::Write { place: HostPlace::main(host), before: 0, after: 0 };
            return done(len.min(self.cluster), action, Ticket::Packed { unit: index, entry });
        }
        let (entry, run) = state.run(self.storage(), index, within.saturating_add(len).div_ceil(self.cluster))?;
        let zero = matches!(store, Store::Zero { .. });
        match entry {
            QcowEntry::Plain(host) if !host.is_multiple_of(512) => {
                let error = Error::corrupt(format!("no data can be at offset {host}")).in_file_at(host);
                Err(error.naming(&self.files[0].name))
            }
            QcowEntry::Plain(host) => {
                let len = len.min(run.saturating_mul(self.cluster).saturating_sub(within));
                Placed::over(at, len, store, HostPlace::main(host.saturating_add(within)))
            }
            QcowEntry::Unallocated if zero && self.backing.is_none() && !self.keeps_zeros.load(Ordering::Relaxed) => {
                let len = len.min(run.saturating_mul(self.cluster).saturating_sub(within));
                done(len, Action::Nothing, Ticket::Nothing)
            }
            QcowEntry::Unallocated => self.place_new(&mut state, at, len, store, run),
            QcowEntry::Compressed(..) => self.place_new(&mut state, at, len, store, 1),
        }
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        let (index, count, first) = match placed.ticket {
            Ticket::New { unit, count, entry } => (unit, count, entry),
            Ticket::Packed { unit, entry } => (unit, 1, entry),
            _ => return Ok(()),
        };
        let storage = self.storage();
        let mut state = self.state();
        for n in 0..count {
            state.set(storage, index + n, first + n * self.cluster)?;
        }
        if state.wants_writing() { state.write_tables(storage) } else { Ok(()) }
    }

    fn withdraw(&self, placed: &Placed) {
        let (at, bytes) = match placed.ticket {
            Ticket::New { count, entry, .. } => (entry, count * self.cluster),
            Ticket::Packed { entry, .. } => match QcowEntry::decode(entry, self.bits) {
                QcowEntry::Compressed(at, bytes) => (at, bytes),
                _ => return,
            },
            _ => return,
        };
        self.state().give_back(at, bytes);
    }

    /// Not where data is encrypted: compressed clusters are not.
    fn compressing(&self) -> Option<&dyn Compress> {
        if self.cipher.is_some() { None } else { Some(self) }
    }
}

impl Compress for QcowDriver {
    fn encode(&self, at: GuestOffset, plain: &[u8], _effort: Effort, out: &mut Vec<u8>) -> Result<Encoded> {
        // The length has to fit its field, which is as wide as an offset in the cluster.
        let limit = plain.len().saturating_sub(1);
        match deflate::encode(How::QCOW, plain, out, limit) {
            Ok(true) => Ok(Encoded::Smaller),
            Ok(false) => Ok(Encoded::Incompressible),
            Err(e) => Err(Error::unsupported(format!("cluster at {at}: {e}"))),
        }
    }
}
