//! `compress`: stores what is written compressed, in an image whose format can.
//!
//! Lock order: `writing` before whatever the image's driver locks; it is held across data I/O, because a unit is
//! written as a whole, and by one at a time.

use std::sync::{Arc, Mutex, MutexGuard, Once};

use serde_json::Map;

use super::copy_on_read::CopyOnRead;
use super::throttle::{self, Throttle};
use crate::block::filter::{Below, Filter, FilterRequest, Filtered, Lower};
use crate::block::io::{Scratch, zeroed};
use crate::block::throttle::{ThrottleGroup, Way};
use crate::block::{self, Effort, Encoded, Error, GuestOffset, Node, Store};
use crate::storage::lock::Access;
use crate::storage::{self, Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// The filter.
#[derive(Debug)]
pub struct Compress;

impl Filter for Compress {
    fn name(&self) -> &'static str {
        "compress"
    }

    fn children(&self) -> &'static [Lower] {
        &[Lower::Bytes("file")]
    }

    fn open(&self, request: FilterRequest<'_>) -> block::Result<Filtered> {
        let FilterRequest { below, objects, .. } = request;
        let Below { child, image, write, .. } = below("file")?;
        let driver = child.driver;
        let cannot = || Error::unsupported(format!("Compression is not supported for underlying format: {driver}"));
        let (mut image, _) = image.filter(|(_, compresses)| *compresses).ok_or_else(cannot)?;
        // Two filters let compressed units through to what they stand over.
        let (mut groups, mut copies) = (Vec::new(), false);
        while let Some(inner) = image.filtered() {
            match image.driver().format() {
                name if name == Throttle.name() => groups.extend(throttle::group_of(&image, objects)),
                name if name == CopyOnRead.name() => copies = true,
                _ => return Err(cannot()),
            }
            image = inner.clone();
        }
        if write {
            image.writing()?.compressing().ok_or_else(cannot)?;
        }
        let storage = Arc::new(Compressed {
            inner: child.storage,
            image,
            groups,
            copies,
            begun: Once::new(),
            writing: Mutex::default(),
        });
        Ok(Filtered { storage, path: None, strong: Map::new(), access: Access::NONE })
    }
}

#[derive(Debug)]
struct Compressed {
    inner: Arc<dyn Storage>,
    /// Whose units are compressed: what the bytes are the disk of, or what stands below the filters over that.
    image: Arc<Node>,
    /// What those let through.
    groups: Vec<Arc<ThrottleGroup>>,
    /// One of them stores what is read.
    copies: bool,
    /// Not before something is written: what is refused leaves the image as it is.
    begun: Once,
    writing: Mutex<()>,
}

impl Compressed {
    fn alone(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes a range zeros. Units of which it covers a part are written, unless they read as zeros there already.
    fn write_zeros(&self, at: u64, len: u64) -> block::Result<()> {
        let unit = self.image.writing()?.unit().max(1);
        let end = at.saturating_add(len);
        let mut scratch = Scratch::default();
        let mut at = at;
        while at < end {
            let whole = if at.is_multiple_of(unit) { (end - at) / unit * unit } else { 0 };
            if whole > 0 {
                self.inner.zero(at, whole, Zeroing::Punch)?;
                at += whole;
                continue;
            }
            let part = (unit - at % unit).min(end - at);
            let mut bytes = zeroed(part)?;
            self.image.read(GuestOffset(at), &mut bytes, &mut scratch)?;
            if bytes.iter().any(|byte| *byte != 0) {
                bytes.fill(0);
                self.write_unit(at, unit, &bytes, &mut scratch)?;
            }
            at += part;
        }
        Ok(())
    }

    /// Writes within one unit: what it does not cover is as it was.
    fn write_unit(&self, at: u64, unit: u64, data: &[u8], scratch: &mut Scratch) -> block::Result<()> {
        self.groups.iter().for_each(|group| group.pass(Way::Write, data.len() as u64));
        let writing = self.image.writing()?;
        let none = || Error::unsupported("this image stores nothing compressed");
        let compressing = writing.compressing().ok_or_else(none)?;
        self.begun.call_once(|| compressing.begin());
        let start = at - at % unit;
        let len = unit.min(self.image.virtual_size().saturating_sub(start));
        let too_long = |_| Error::invalid("a unit is longer than memory can be");
        let skip = usize::try_from(at % unit).map_err(too_long)?;
        let mut whole = zeroed(unit)?;
        let covered = data.len() as u64 == len;
        if !covered {
            let there = whole.get_mut(..usize::try_from(len).map_err(too_long)?).unwrap_or_default();
            self.image.read(GuestOffset(start), there, scratch)?;
        }
        if let Some(place) = whole.get_mut(skip..skip.saturating_add(data.len())) {
            place.copy_from_slice(data);
        }
        let mut encoded = Vec::new();
        match compressing.encode(GuestOffset(start), &whole, Effort::default(), &mut encoded)? {
            Encoded::Smaller => {
                let store = Store::Compressed { bytes: encoded.len() as u64 };
                let placement = self.image.place(GuestOffset(start), len, store)?;
                placement.write_encoded(&encoded)?;
                placement.publish()
            }
            Encoded::Incompressible => self.image.write(GuestOffset(at), data, scratch),
        }
    }
}

impl Storage for Compressed {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let _alone = self.copies.then(|| self.alone());
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        let _alone = self.alone();
        let end = at.saturating_add(buf.len() as u64);
        if end > self.image.virtual_size() {
            self.inner.set_len(end.checked_next_multiple_of(512).unwrap_or(end), Preallocation::Off)?;
        }
        let unit = self.image.writing().map_err(storage::Error::from)?.unit().max(1);
        let (mut at, mut rest, mut scratch) = (at, buf, Scratch::default());
        while !rest.is_empty() {
            let len = usize::try_from(unit - at % unit).unwrap_or(rest.len()).min(rest.len());
            let (now, later) = rest.split_at(len);
            self.write_unit(at, unit, now, &mut scratch).map_err(storage::Error::from)?;
            (at, rest) = (at + len as u64, later);
        }
        Ok(())
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        self.inner.extent(at, max)
    }

    fn zero(&self, at: u64, len: u64, _how: Zeroing) -> Result<()> {
        let _alone = self.alone();
        self.write_zeros(at, len).map_err(storage::Error::from)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        let _alone = self.alone();
        self.inner.discard(at, len)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        self.inner.set_len(len, fill)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.inner.allocated()
    }

    fn facts(&self) -> Facts {
        Facts { offload: false, ordered: true, ..self.inner.facts() }
    }

    fn host(&self) -> Option<&HostFile> {
        self.inner.host()
    }

    fn announce(&self, event: Event) {
        self.inner.announce(event);
    }
}
