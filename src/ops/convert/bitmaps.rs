//! Copying persistent bitmaps to a target.
//!
//! Memory is one piece of a bitmap. An image whose bitmaps say more than its file can hold is refused, so that a
//! small file does not become a large one.

use crate::block::driver::{BitmapInfo, Bitmaps};
use crate::block::{Error, Node, Result};

/// Bytes of a bitmap that are copied at a time: a whole number of clusters of any image.
const PIECE: u64 = 2 << 20;

fn of(target: &Node) -> Result<&dyn Bitmaps> {
    let format = target.driver().format();
    let lacks = || Error::unsupported(format!("Format driver '{format}' does not support bitmaps"));
    target.driver().bitmaps().ok_or_else(lacks)
}

/// Those that are copied, with their places in the source's list.
fn sound(source: &dyn Bitmaps) -> Vec<(usize, BitmapInfo)> {
    source.list().into_iter().enumerate().filter(|(_, bitmap)| bitmap.consistent).collect()
}

/// Refuses what cannot be copied, before anything is changed.
pub fn check(source: &Node, target: &Node) -> Result<()> {
    let there = of(target)?.list();
    let Some(bitmaps) = source.driver().bitmaps() else { return Ok(()) };
    // The reference goes through them from the last one on.
    for (_, bitmap) in sound(bitmaps).into_iter().rev() {
        let name = &bitmap.name;
        if there.iter().any(|other| other.name == *name) {
            return Err(Error::invalid(format!("Failed to create bitmap {name}: Bitmap already exists: {name}")));
        }
        let (from, to) = (bitmap.disk, target.virtual_size());
        if from != to {
            let sizes = format!("(destination size is {to}, source size is {from})");
            let text = format!("Bitmaps are of different sizes {sizes} and can't be merged");
            return Err(Error::invalid(format!("Failed to populate bitmap {name}: {text}")));
        }
    }
    Ok(())
}

/// Copies the consistent bitmaps of the source.
pub fn copy(source: &Node, target: &Node) -> Result<()> {
    let to = of(target)?;
    let Some(from) = source.driver().bitmaps() else { return Ok(()) };
    let (places, infos): (Vec<_>, Vec<_>) = sound(from).into_iter().unzip();
    if infos.is_empty() {
        return Ok(());
    }
    let files = source.driver().files().iter();
    let mut budget = files.map(|file| file.storage.len()).next().transpose().map_err(Error::from)?.unwrap_or(0);
    let mut charge = |bytes: u64| -> Result<()> {
        budget = budget.checked_sub(bytes).ok_or_else(|| Error::corrupt("Bitmaps share their place in the file"))?;
        Ok(())
    };
    charge(infos.iter().fold(0, |sum, bitmap| sum.saturating_add(bitmap.stored)))?;
    let first = to.add(&infos)?;
    let mut piece = Vec::new();
    for (n, (place, info)) in places.iter().zip(&infos).enumerate() {
        let bits = info.disk.div_ceil(1 << info.granularity_bits);
        let bytes = bits.div_ceil(8);
        let mut at = 0;
        while at < bytes {
            let len = PIECE.min(bytes - at);
            piece.resize(usize::try_from(len).unwrap_or(0), 0);
            charge(from.read(*place, at, &mut piece)?)?;
            at += len;
            if at == bytes
                && bits % 8 != 0
                && let Some(last) = piece.last_mut()
            {
                // What lies past the end of the disk is nothing.
                *last &= 0xff >> (8 - bits % 8);
            }
            to.set(first + n, at - len, &piece)?;
        }
    }
    Ok(())
}
