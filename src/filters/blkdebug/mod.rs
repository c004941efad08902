//! `blkdebug`: fails requests on purpose, and keeps them to limits, to test what stands above it.
//!
//! Its options are those of the reference's published interface (QAPI, `BlockdevOptionsBlkdebug`). A request is judged
//! by the rules, then passed on as it is. With `align` the rules see whole blocks, though the image below gets what was
//! asked for: it takes any.

mod config;
mod rules;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};

use crate::block::filter::{Below, Filter, FilterRequest, Filtered, Lower, Wrapped};
use crate::block::keys::{as_text, take_size, take_text};
use crate::block::name::{first_key, take_below};
use crate::block::{Error, OptionTree, Result};
use crate::storage::lock::{self, Access};
use crate::storage::{self, Event, Facts, HostExtent, HostFile, Preallocation, Storage, Zeroing};
use rules::{Request, RuleOptions, Rules, Section};

/// The filter.
#[derive(Debug)]
pub struct Blkdebug;

impl Filter for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn children(&self) -> &'static [Lower] {
        &[Lower::Bytes("image")]
    }

    fn has_prefix(&self) -> bool {
        true
    }

    /// `blkdebug:CONFIG:IMAGE`; CONFIG may be empty.
    fn spelt(&self, rest: &OsStr) -> Result<Wrapped> {
        let bytes = rest.as_bytes();
        let both = || Error::invalid("blkdebug requires both config file and image path");
        let colon = bytes.iter().position(|byte| *byte == b':').ok_or_else(both)?;
        let (config, image) = bytes.split_at(colon);
        let mut options = OptionTree::new();
        if !config.is_empty() {
            options.insert("config".to_owned(), String::from_utf8_lossy(config).into());
        }
        let image = OsStr::from_bytes(image.get(1..).unwrap_or_default()).to_owned();
        Ok(Wrapped { below: vec![("image", image)], options })
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Filtered> {
        let FilterRequest { options, below, .. } = request;
        let mut strong: Map<String, Value> = options.clone();
        let sizes = Sizes::take(options)?;
        let config = take_text(options, "config");
        let mut rules = match &config {
            Some(path) => config::read(OsStr::new(path))?,
            None => Vec::new(),
        };
        for section in Section::ALL {
            rules.extend(take_rules(section, options)?);
        }
        let mut rules = Rules::new(rules)?;
        let access = Access { uses: take_access("take", options)?, refuses: take_access("unshare", options)? };
        strong.retain(|key, _| !key.starts_with("take-child-perms.") && !key.starts_with("unshare-child-perms."));
        let Below { child, path, write, cache, .. } = below("image")?;
        if !write && access.uses & (lock::WRITE | lock::WRITE_UNCHANGED) != 0 {
            return Err(Error::invalid("Block node is read-only"));
        }
        let limits = sizes.limits()?;
        rules.announce(Event::NONE);
        let named = strong.keys().all(|key| key == "config");
        let path = path.filter(|_| named).map(|path| {
            let mut name = format!("blkdebug:{}:", config.unwrap_or_default()).into_bytes();
            name.extend_from_slice(path.as_bytes());
            OsString::from_vec(name)
        });
        let storage =
            Arc::new(Debugged { inner: child.storage, rules: Mutex::new(rules), limits, flushes: cache.flushes() });
        Ok(Filtered { storage, path, strong, access })
    }
}

/// The rules that stand in options: `inject-error.0.event` and so on, or one as `inject-error.event`.
fn take_rules(section: Section, options: &mut OptionTree) -> Result<Vec<RuleOptions>> {
    let name = section.name();
    let mut below = take_below(options, name);
    if section.options().iter().any(|key| below.contains_key(*key)) {
        let unknown = |key: &str| Error::invalid(format!("Unknown option '{key}' for [{name}]"));
        return Ok(vec![RuleOptions::take(section, below, unknown)?]);
    }
    let mut rules = Vec::new();
    for index in 0.. {
        let rule = take_below(&mut below, &index.to_string());
        if rule.is_empty() {
            break;
        }
        let unknown = |key: &str| Error::invalid(format!("[{name}] section doesn't support the option '{key}'"));
        rules.push(RuleOptions::take(section, rule, unknown)?);
    }
    match first_key(&below) {
        Some(key) => Err(Error::invalid(format!("Unused option '{key}' for [{name}]"))),
        None => Ok(rules),
    }
}

/// Permissions by name.
const PERMISSIONS: [(&str, u8); 4] = [
    ("consistent-read", lock::CONSISTENT_READ),
    ("write", lock::WRITE),
    ("write-unchanged", lock::WRITE_UNCHANGED),
    ("resize", lock::RESIZE),
];

/// The permissions of a list `take-child-perms.0` or `unshare-child-perms.0` and so on.
fn take_access(what: &str, options: &mut OptionTree) -> Result<u8> {
    let list = take_below(options, &format!("{what}-child-perms"));
    let mut set = 0;
    let mut indexes = BTreeMap::new();
    for (key, value) in &list {
        let index = key.parse::<u64>().map_err(|_| Error::invalid("Parameter 'null' expects a list"))?;
        indexes.insert(index, as_text(value).unwrap_or_default());
    }
    let (count, largest) = (indexes.len(), indexes.last_key_value().map_or(0, |(index, _)| *index));
    if count > 0 && largest != count as u64 - 1 {
        return Err(Error::invalid(format!(
            "List indices are not contiguous, saw {count} elements but {largest} largest index"
        )));
    }
    for name in indexes.into_values() {
        let known = PERMISSIONS.iter().find(|(known, _)| *known == name);
        let refused = || Error::invalid(format!("Parameter 'null' does not accept value '{name}'"));
        set |= known.ok_or_else(refused)?.1;
    }
    Ok(set)
}

/// Sizes as they were given; 0 where they were not.
#[derive(Debug)]
struct Sizes {
    align: u64,
    max_transfer: u64,
    opt_write_zero: u64,
    max_write_zero: u64,
    opt_discard: u64,
    max_discard: u64,
}

impl Sizes {
    fn take(options: &mut OptionTree) -> Result<Self> {
        let mut size = |key: &str| -> Result<u64> { Ok(take_size(options, key)?.unwrap_or(0)) };
        Ok(Self {
            align: size("align")?,
            max_transfer: size("max-transfer")?,
            opt_write_zero: size("opt-write-zero")?,
            max_write_zero: size("max-write-zero")?,
            opt_discard: size("opt-discard")?,
            max_discard: size("max-discard")?,
        })
    }

    /// The limits, if they go together.
    fn limits(self) -> Result<Limits> {
        const MOST: u64 = i32::MAX as u64;
        let check = |name: &str, value: u64, good: bool| match good && value < MOST {
            true => Ok(value),
            false => Err(Error::invalid(format!("Cannot meet constraints with {name} {value}"))),
        };
        let align = check("align", self.align, self.align == 0 || self.align.is_power_of_two())?.max(1);
        let multiple = |name: &str, value: u64, of: u64| check(name, value, value.is_multiple_of(of));
        multiple("max-transfer", self.max_transfer, align)?;
        let opt_write_zero = multiple("opt-write-zero", self.opt_write_zero, align)?.max(align);
        multiple("max-write-zero", self.max_write_zero, opt_write_zero)?;
        let opt_discard = multiple("opt-discard", self.opt_discard, align)?.max(align);
        multiple("max-discard", self.max_discard, opt_discard)?;
        let most = |value: u64| if value == 0 { u64::MAX } else { value };
        Ok(Limits {
            align,
            transfer: most(self.max_transfer),
            zeros: RequestRun { unit: opt_write_zero, most: most(self.max_write_zero) },
            discard: RequestRun { unit: opt_discard, most: most(self.max_discard) },
        })
    }
}

#[derive(Debug)]
struct Limits {
    align: u64,
    /// Most bytes of a read or a write.
    transfer: u64,
    zeros: RequestRun,
    discard: RequestRun,
}

/// How a range is cut: whole units apart from what lies before and behind them, and not too much at a time.
#[derive(Debug, Clone, Copy)]
struct RequestRun {
    unit: u64,
    most: u64,
}

/// A part of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RequestPart {
    at: u64,
    len: u64,
    /// Whether it is whole units.
    whole: bool,
}

impl RequestRun {
    fn parts(self, at: u64, len: u64) -> impl Iterator<Item = RequestPart> {
        let end = at.saturating_add(len);
        let mut next = at;
        std::iter::from_fn(move || {
            let left = end.checked_sub(next).filter(|left| *left > 0)?;
            let within = next % self.unit;
            let (len, whole) = match (within, left / self.unit * self.unit) {
                (0, 0) => (left, false),
                (0, units) => (units.min(self.most), true),
                _ => (left.min(self.unit - within), false),
            };
            let part = RequestPart { at: next, len, whole };
            next += len;
            Some(part)
        })
    }
}

/// The bytes below, seen through the rules.
///
/// The lock of `rules` is a leaf, and held for no I/O.
#[derive(Debug)]
struct Debugged {
    inner: Arc<dyn Storage>,
    rules: Mutex<Rules>,
    limits: Limits,
    /// Whether flushes are passed on, as the cache mode says.
    flushes: bool,
}

impl Debugged {
    fn judge(&self, request: Request, at: u64, len: u64) -> storage::Result<()> {
        let align = self.limits.align;
        let start = at - at % align;
        let end = at.saturating_add(len);
        let end = end.checked_next_multiple_of(align).unwrap_or(end);
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).judge(request, start, end - start)
    }

    /// Reads and writes are cut at the limit alone.
    fn transfers(&self, at: u64, len: u64) -> impl Iterator<Item = RequestPart> {
        RequestRun { unit: 1, most: self.limits.transfer }.parts(at, len)
    }

    /// A write is about to come, of whole blocks or of parts of them.
    fn before_write(&self, event: Event, at: u64, len: u64) -> storage::Result<()> {
        let align = self.limits.align;
        let end = at.saturating_add(len);
        let (first, last) = (at - at % align, end - end % align);
        if first != at {
            self.announce(Event::PWRITEV_RMW_HEAD);
            self.judge(Request::Read, first, align)?;
            self.announce(Event::PWRITEV_RMW_AFTER_HEAD);
        }
        if last != end && (first == at || last != first) {
            self.announce(Event::PWRITEV_RMW_TAIL);
            self.judge(Request::Read, last, align)?;
            self.announce(Event::PWRITEV_RMW_AFTER_TAIL);
        }
        self.announce(event);
        Ok(())
    }

    fn zero_part(&self, part: RequestPart, how: Zeroing) -> storage::Result<()> {
        if part.whole {
            self.judge(Request::WriteZeroes, part.at, part.len)?;
            return self.inner.zero(part.at, part.len, how);
        }
        // Too little for zeros that are not written.
        for RequestPart { at, len, .. } in self.transfers(part.at, part.len) {
            self.judge(Request::Write, at, len)?;
            self.inner.zero(at, len, Zeroing::Write)?;
        }
        Ok(())
    }
}

/// The bytes of a buffer that starts at `from`.
fn span(from: u64, part: RequestPart, len: usize) -> std::ops::Range<usize> {
    let start = usize::try_from(part.at - from).unwrap_or(len).min(len);
    let end = usize::try_from(part.len).unwrap_or(len).saturating_add(start).min(len);
    start..end
}

impl Storage for Debugged {
    fn len(&self) -> storage::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> storage::Result<()> {
        let len = buf.len();
        for part in self.transfers(at, len as u64) {
            self.judge(Request::Read, part.at, part.len)?;
            self.inner.read_at(part.at, &mut buf[span(at, part, len)])?;
        }
        Ok(())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> storage::Result<()> {
        self.before_write(Event::PWRITEV, at, buf.len() as u64)?;
        for part in self.transfers(at, buf.len() as u64) {
            self.judge(Request::Write, part.at, part.len)?;
            self.inner.write_at(part.at, &buf[span(at, part, buf.len())])?;
        }
        self.announce(Event::PWRITEV_DONE);
        Ok(())
    }

    fn extent(&self, at: u64, max: u64) -> storage::Result<HostExtent> {
        self.judge(Request::BlockStatus, at, max)?;
        self.inner.extent(at, max)
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> storage::Result<()> {
        self.before_write(Event::PWRITEV_ZERO, at, len)?;
        for part in self.limits.zeros.parts(at, len) {
            self.zero_part(part, how)?;
        }
        self.announce(Event::PWRITEV_DONE);
        Ok(())
    }

    fn discard(&self, at: u64, len: u64) -> storage::Result<()> {
        for part in self.limits.discard.parts(at, len) {
            self.judge(Request::Discard, part.at, part.len)?;
            self.inner.discard(part.at, part.len)?;
        }
        Ok(())
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> storage::Result<()> {
        self.inner.set_len(len, fill)
    }

    fn flush(&self) -> storage::Result<()> {
        if !self.flushes {
            return Ok(());
        }
        self.judge(Request::Flush, 0, 0)?;
        self.inner.flush()
    }

    /// Not told, as in the reference.
    fn allocated(&self) -> storage::Result<Option<u64>> {
        Ok(None)
    }

    fn facts(&self) -> Facts {
        let inner = self.inner.facts();
        let align = u32::try_from(self.limits.align).unwrap_or(u32::MAX);
        Facts { alignment: inner.alignment.max(align), offload: false, ..inner }
    }

    fn host(&self) -> Option<&HostFile> {
        self.inner.host()
    }

    fn announce(&self, event: Event) {
        if event == Event::FLUSH_TO_DISK && !self.flushes {
            return;
        }
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).announce(event);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_units_and_at_the_most() {
        let cut = |unit, most, at, len| {
            let parts = RequestRun { unit, most }.parts(at, len);
            parts.map(|part| (part.at, part.len, part.whole)).collect::<Vec<_>>()
        };
        assert_eq!(cut(1, u64::MAX, 3, 10), [(3, 10, true)]);
        assert_eq!(cut(1, 4, 3, 10), [(3, 4, true), (7, 4, true), (11, 2, true)]);
        assert_eq!(cut(8, 8, 3, 24), [(3, 5, false), (8, 8, true), (16, 8, true), (24, 3, false)]);
        assert_eq!(cut(8, 16, 1, 2), [(1, 2, false)]);
        assert_eq!(cut(1, 4, 3, 0), []);
    }

    #[test]
    fn limits_are_checked_as_the_reference_does() {
        let bad = |pairs: &[(&str, &str)]| {
            let mut options: OptionTree = pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
            Sizes::take(&mut options).unwrap().limits().err().map(|error| error.message())
        };
        for good in [&[("align", "1G")][..], &[("max-transfer", "1000")], &[("align", "0"), ("opt-discard", "7")]] {
            assert_eq!(bad(good), None);
        }
        let refused = |what: &str| Some(format!("Cannot meet constraints with {what}"));
        assert_eq!(bad(&[("align", "1000")]), refused("align 1000"));
        assert_eq!(bad(&[("align", "2G")]), refused("align 2147483648"));
        assert_eq!(bad(&[("max-transfer", "2147483647")]), refused("max-transfer 2147483647"));
        assert_eq!(bad(&[("align", "4096"), ("max-transfer", "512")]), refused("max-transfer 512"));
        assert_eq!(bad(&[("opt-discard", "1000"), ("max-discard", "1500")]), refused("max-discard 1500"));
    }
}
