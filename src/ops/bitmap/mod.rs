//! Persistent bitmaps: added, removed, cleared, enabled, disabled, merged.
//!
//! What the actions come to is worked out in memory, in their order, and then done at once. Where one of them cannot be,
//! those before it are done, as the reference does them.
//!
mod merge;

use crate::block::driver::{BitmapInfo, WantedBitmap, WantedBits};
use crate::block::error::Context;
use crate::block::{Error, ErrorKind, Node, Result};

use super::resize::naming_file;
use merge::MergedBits;

/// What is done to a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapAction {
    /// It is made; one bit stands for so many bytes, or for a cluster, within bounds.
    Add(Option<u64>),
    /// It is removed.
    Remove,
    /// Its bits are cleared.
    Clear,
    /// It follows what is written from now on.
    Enable,
    /// It does so no more.
    Disable,
    /// It gets the bits too that are set in the one of that name.
    Merge(String),
}

impl BitmapAction {
    /// What it is called.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Add(_) => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// Granularities, as powers of two, that a bitmap can have.
const GRANULARITIES: std::ops::RangeInclusive<u32> = 9..=31;
/// The bytes that a bit stands for where nobody says it are a cluster within these bounds.
const USUAL: (u64, u64) = (4096, 65536);

/// Does them in order to the bitmap with that name, and closes the image. What is merged comes from another image, if
/// one is given.
pub fn change(node: &Node, name: &str, actions: &[BitmapAction], source: Option<&Node>) -> Result<()> {
    let mut draft = Draft::of(node, source);
    let mut refused = None;
    for action in actions {
        if let Err(error) = draft.act(name, action) {
            let text = format!("Operation {} on bitmap {name} failed", action.name());
            refused = Some(error.context(text));
            break;
        }
    }
    draft.put().and_then(|()| node.driver().close()).map_err(|error| naming_file(node, error))?;
    refused.map_or(Ok(()), Err)
}

/// The bitmaps of an image as they will be.
struct Draft<'a> {
    node: &'a Node,
    list: Vec<DraftBitmap<'a>>,
    /// Where those come from that are merged.
    source: &'a Node,
    changed: bool,
}

struct DraftBitmap<'a> {
    info: BitmapInfo,
    bits: DraftBits<'a>,
}

enum DraftBits<'a> {
    /// Those of the one at that place of the image's list.
    Kept(usize),
    /// Those that are set in any of some.
    Merged(MergedBits<'a>),
}

impl<'a> Draft<'a> {
    fn of(node: &'a Node, source: Option<&'a Node>) -> Self {
        let infos = node.driver().bitmaps().map_or(Vec::new(), |bitmaps| bitmaps.list());
        let keep = |(index, info)| DraftBitmap { info, bits: DraftBits::Kept(index) };
        let list = infos.into_iter().enumerate().map(keep).collect();
        Self { node, list, source: source.unwrap_or(node), changed: false }
    }

    fn act(&mut self, name: &str, action: &BitmapAction) -> Result<()> {
        match action {
            BitmapAction::Add(granularity) => self.add(name, *granularity)?,
            BitmapAction::Remove => {
                let index = self.find(name)?;
                self.list.remove(index);
            }
            BitmapAction::Clear => {
                let one = self.sound(name)?;
                one.bits = DraftBits::Merged(MergedBits::none(&one.info));
            }
            BitmapAction::Enable => self.sound(name)?.info.enabled = true,
            BitmapAction::Disable => self.sound(name)?.info.enabled = false,
            BitmapAction::Merge(from) => return self.merge(name, from),
        }
        self.changed = true;
        Ok(())
    }

    fn find(&self, name: &str) -> Result<usize> {
        let place = self.list.iter().position(|one| one.info.name == name);
        place.ok_or_else(|| not_found(name))
    }

    fn sound(&mut self, name: &str) -> Result<&mut DraftBitmap<'a>> {
        let index = self.find(name)?;
        check_sound(&self.list[index].info)?;
        Ok(&mut self.list[index])
    }

    fn add(&mut self, name: &str, granularity: Option<u64>) -> Result<()> {
        if name.is_empty() {
            return Err(Error::invalid("Bitmap name cannot be empty"));
        }
        let driver = self.node.driver();
        let granularity = match granularity {
            Some(bytes) => bytes,
            None => driver.info()?.cluster_size.unwrap_or(USUAL.1).clamp(USUAL.0, USUAL.1),
        };
        let bits = granularity.trailing_zeros();
        if !granularity.is_power_of_two() || !GRANULARITIES.contains(&bits) {
            return Err(Error::invalid("Granularity must be power of 2 and at least 512"));
        }
        let granularity_bits = u8::try_from(bits).unwrap_or(u8::MAX);
        if self.find(name).is_ok() {
            return Err(Error::invalid(format!("Bitmap already exists: {name}")));
        }
        // The reference names the node, by a number that it draws.
        let node = self.node.name();
        let persistent = || format!("Can't make bitmap '{name}' persistent in '{node}'");
        match (driver.bitmaps(), driver.no_bitmaps()) {
            (Some(bitmaps), _) => {
                bitmaps.check_new(name, granularity_bits, self.list.len()).with_context(persistent)?;
            }
            (None, Some(text)) => return Err(Error::unsupported(text)).with_context(persistent),
            (None, None) => {
                let text = format!("Can't store persistent bitmaps to {node}");
                return Err(Error::unsupported("Operation not supported").context(text));
            }
        }
        let info = BitmapInfo {
            name: name.to_owned(),
            granularity_bits,
            enabled: true,
            consistent: true,
            disk: self.node.virtual_size(),
            stored: 0,
        };
        let bits = DraftBits::Merged(MergedBits::none(&info));
        self.list.push(DraftBitmap { info, bits });
        Ok(())
    }

    fn merge(&mut self, name: &str, from: &str) -> Result<()> {
        let (node, source) = (self.node, self.source);
        let same = std::ptr::eq(node, source);
        check_sound(&self.list[self.find(name)?].info)?;
        if same && from == name {
            return Ok(());
        }
        let Some(bitmaps) = source.driver().bitmaps() else { return Err(not_found(from)) };
        let list = bitmaps.list();
        let place = list.iter().position(|one| one.name == from).ok_or_else(|| not_found(from))?;
        let found = &list[place];
        check_sound(found)?;
        let one = self.sound(name)?;
        if found.disk != one.info.disk {
            let sizes = format!("(destination size is {}, source size is {})", one.info.disk, found.disk);
            return Err(Error::invalid(format!("Bitmaps are of different sizes {sizes} and can't be merged")));
        }
        let mut merged = match std::mem::replace(&mut one.bits, DraftBits::Kept(0)) {
            DraftBits::Merged(merged) => merged,
            DraftBits::Kept(index) => {
                let mut merged = MergedBits::none(&one.info);
                merged.add(node, index, &one.info)?;
                merged
            }
        };
        merged.add(source, place, found)?;
        one.bits = DraftBits::Merged(merged);
        self.changed = true;
        Ok(())
    }

    /// Does it.
    fn put(&self) -> Result<()> {
        let Some(bitmaps) = self.node.driver().bitmaps().filter(|_| self.changed) else { return Ok(()) };
        let wanted = self.list.iter().map(|one| WantedBitmap {
            name: one.info.name.clone(),
            granularity_bits: one.info.granularity_bits,
            enabled: one.info.enabled,
            bits: match &one.bits {
                DraftBits::Kept(index) => WantedBits::Kept(*index),
                DraftBits::Merged(merged) => WantedBits::Made(merged),
            },
        });
        bitmaps.arrange(&wanted.collect::<Vec<_>>())
    }
}

fn not_found(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found"))
}

fn check_sound(info: &BitmapInfo) -> Result<()> {
    if info.consistent {
        return Ok(());
    }
    let text = format!("Bitmap '{}' is inconsistent and cannot be used", info.name);
    Err(Error::unsupported(text).hint("Try block-dirty-bitmap-remove to delete this bitmap from disk"))
}
