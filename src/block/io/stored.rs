//! Guest bytes that a driver moves or clears while it changes its own tables: when an image is resized, and where a
//! format has no other way to discard. They pass through the layer's cipher like all others.
//!
//! Offsets and lengths are whole sectors of the cipher, as sizes and units are. What is called here asks the driver
//! for its files and its cipher alone, so that it may be called with the driver's tables locked.

use crate::block::error::{Context, Operation};
use crate::block::{BlockDriver, Child, CompressedUnit, Error, ExtentKind, GuestOffset, HostPlace, Result};
use crate::storage::Zeroing;

use super::{ZEROS, forth, zeroed};

fn file_of(driver: &dyn BlockDriver, place: HostPlace) -> Result<&Child> {
    let found = driver.files().get(place.file);
    found.ok_or_else(|| Error::corrupt(format!("{}: no file {}", driver.format(), place.file)))
}

/// Reads guest bytes from their place.
pub fn read_stored(driver: &dyn BlockDriver, place: HostPlace, guest: GuestOffset, buf: &mut [u8]) -> Result<()> {
    let file = file_of(driver, place)?;
    file.storage.read_at(place.at.get(), buf).at(|| file.doing(Operation::Read, guest, place.at))?;
    driver.cipher().map_or(Ok(()), |cipher| cipher.decrypt(guest, place.at, buf))
}

/// Reads a unit and decodes it.
pub fn read_unit(driver: &dyn BlockDriver, unit: &CompressedUnit) -> Result<Vec<u8>> {
    let file = file_of(driver, unit.place)?;
    let (mut encoded, mut plain) = (zeroed(unit.host_len)?, zeroed(unit.len)?);
    let doing = || file.doing(Operation::Read, unit.start, unit.place.at);
    file.storage.read_at(unit.place.at.get(), &mut encoded).at(doing)?;
    driver.decode(unit, &encoded, &mut plain).at(doing)?;
    Ok(plain)
}

/// Writes guest bytes to their place; afterwards `buf` holds what the file does.
pub fn write_stored(driver: &dyn BlockDriver, place: HostPlace, guest: GuestOffset, buf: &mut [u8]) -> Result<()> {
    let file = file_of(driver, place)?;
    if let Some(cipher) = driver.cipher() {
        cipher.encrypt(guest, place.at, buf)?;
    }
    file.storage.write_at(place.at.get(), buf).at(|| file.doing(Operation::Write, guest, place.at))
}

/// Makes guest bytes read as zeros at their place.
pub fn clear_stored(
    driver: &dyn BlockDriver,
    place: HostPlace,
    guest: GuestOffset,
    len: u64,
    how: Zeroing,
) -> Result<()> {
    if driver.cipher().is_none() {
        let file = file_of(driver, place)?;
        return file.storage.zero(place.at.get(), len, how).at(|| file.doing(Operation::Write, guest, place.at));
    }
    in_pieces(len, |done, n| write_stored(driver, forth(place, done), guest + done, &mut zeroed(n)?))
}

/// Copies guest bytes from one place to another that does not overlap it.
pub fn move_stored(
    driver: &dyn BlockDriver,
    from: HostPlace,
    to: HostPlace,
    guest: GuestOffset,
    len: u64,
) -> Result<()> {
    in_pieces(len, |done, n| {
        let mut buf = zeroed(n)?;
        read_stored(driver, forth(from, done), guest + done, &mut buf)?;
        write_stored(driver, forth(to, done), guest + done, &mut buf)
    })
}

fn in_pieces(len: u64, mut act: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
    let mut done = 0;
    while done < len {
        let n = (len - done).min(ZEROS);
        act(done, n)?;
        done += n;
    }
    Ok(())
}

/// Gives the space of a range's data back to the host, where a format has no other way to discard: the tables
/// stay as they are, and the range reads as zeros. Nothing happens where zeros of the host mean nothing.
pub fn punch(driver: &dyn BlockDriver, at: GuestOffset, len: u64) -> Result<()> {
    let (mut at, end) = (at, at.get().saturating_add(len).min(driver.virtual_size()));
    while at.get() < end {
        let extent = driver.extent(at, end - at.get())?;
        if let ExtentKind::Data(place) = extent.kind {
            punch_at(driver, place, extent.len)?;
        }
        at = at + extent.len.max(1);
    }
    Ok(())
}

/// The same for a range that lies at that place.
pub fn punch_at(driver: &dyn BlockDriver, place: HostPlace, len: u64) -> Result<()> {
    match driver.files().get(place.file) {
        Some(file) if driver.cipher().is_none() => {
            file.storage.zero(place.at.get(), len, Zeroing::Punch).with_context(|| format!("{}: discard", file.name))
        }
        _ => Ok(()),
    }
}
