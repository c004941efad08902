//! Key slots of a LUKS header that are filled and emptied, whichever format the header lies in.
//!
//! Invariants: a slot's key material is in the file before the header says that the slot holds a key. Where a slot is
//! filled anew that has one, another slot has the new key meanwhile, if one is free: whatever stops us, the key that was
//! there or the new one opens the image. A slot is emptied by writing over its key material first, so that no header says
//! that a key is gone which is still there.
//!
//! Source: LUKS On-Disk Format Specification 1.2.3, sections 4.3 to 4.5.

use crate::block::driver::AmendRequest;
use crate::block::error::Context;
use crate::block::{CreateOptions, Error, FileEnd, KeyUse, OptionKind, OptionSpec, OptionValue, Result, SecretBytes};
use crate::crypto::luks::{HEADER, LuksHeader, LuksPlan, SLOTS};
use crate::storage::Storage;

/// The options, by their names behind a prefix.
const NAMES: [&str; 5] = ["state", "keyslot", "old-secret", "new-secret", "iter-time"];

const NEW_REQUIRED: &str = "'new-secret' is required to activate a keyslot";

const NEW_SECRET: &str = "New secret to set in the matching keyslots. Empty string to erase";
const OLD_SECRET: &str = "Select all keyslots that match this password";
const STATE: &str = "Select new state of affected keyslots (active/inactive)";
const STATES: [&str; 2] = ["active", "inactive"];
const KEYSLOT: &str = "Select a single keyslot to modify explicitly";
const ITER_TIME: &str = "Time to spend in PBKDF in milliseconds";

/// The options of an image that is a LUKS volume.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("state", OptionKind::Text, STATE).among(&STATES),
    OptionSpec::new("keyslot", OptionKind::Number, KEYSLOT),
    OptionSpec::new("old-secret", OptionKind::Text, OLD_SECRET),
    OptionSpec::new("new-secret", OptionKind::Text, NEW_SECRET),
    OptionSpec::new("iter-time", OptionKind::Number, ITER_TIME),
];

/// The same of one that has a LUKS header among others.
pub const ENCRYPT_OPTIONS: [OptionSpec; 5] = [
    OptionSpec::new("encrypt.state", OptionKind::Text, STATE).among(&STATES),
    OptionSpec::new("encrypt.keyslot", OptionKind::Number, KEYSLOT),
    OptionSpec::new("encrypt.old-secret", OptionKind::Text, OLD_SECRET),
    OptionSpec::new("encrypt.new-secret", OptionKind::Text, NEW_SECRET),
    OptionSpec::new("encrypt.iter-time", OptionKind::Number, ITER_TIME),
];

/// Where a header lies, with its key material: so many bytes of a file from there on.
#[derive(Debug, Clone, Copy)]
pub struct HeaderPlace<'a> {
    /// The file.
    pub storage: &'a dyn Storage,
    /// Where it starts.
    pub at: u64,
    /// How many bytes there are.
    pub len: u64,
}

/// What is to be done, decided.
pub enum SlotChange {
    /// A slot gets the master key under a passphrase.
    Fill {
        /// Which.
        slot: usize,
        /// It has one already.
        active: bool,
        /// The passphrase.
        passphrase: SecretBytes,
        /// Iterations of the key derivation.
        iterations: u32,
    },
    /// Slots are emptied.
    Erase(Vec<usize>),
}

/// Whether any of the options is given.
pub fn given(options: &CreateOptions, prefix: &str) -> bool {
    NAMES.iter().any(|name| options.given(&format!("{prefix}{name}")).is_some())
}

impl SlotChange {
    /// What is asked for by options whose names begin with `prefix`. A passphrase that they do not name is asked for, for
    /// the image of that name. The texts of the refusals are the reference's.
    pub fn decide(request: &AmendRequest<'_>, prefix: &str, image: &str, place: &HeaderPlace<'_>) -> Result<Self> {
        let AmendRequest { options, secrets, force, .. } = *request;
        let invalid = |text: &str| Err(Error::invalid(text));
        let text = |name: &str| options.text(&format!("{prefix}{name}"));
        let number = |name: &str| match options.given(&format!("{prefix}{name}")) {
            Some(OptionValue::Number(number)) => Some(*number),
            _ => None,
        };
        let header = place.header()?;
        let slots = header.slots();
        match text("state") {
            None => invalid("Parameter 'state' is missing"),
            Some("active") => {
                let new = text("new-secret");
                if new.is_none() && !secrets.can_ask() {
                    return invalid(NEW_REQUIRED);
                }
                if text("old-secret").is_some() {
                    return invalid("'old-secret' must not be given when activating keyslots");
                }
                let slot = match number("keyslot").map(slot_number).transpose()? {
                    Some(slot) if slots[slot].active && !force => {
                        let text = format!("Refusing to overwrite active keyslot {slot} - please erase it first");
                        return Err(Error::invalid(text));
                    }
                    Some(slot) => slot,
                    None => match slots.iter().position(|slot| !slot.active) {
                        Some(slot) => slot,
                        None => return invalid("Can't add a keyslot - all keyslots are in use"),
                    },
                };
                let passphrase = match new {
                    Some(new) => secrets.passphrase(new)?.as_bytes().to_vec().into(),
                    None => {
                        let asked = secrets.asked(image, KeyUse::Added)?;
                        asked.ok_or_else(|| Error::invalid(NEW_REQUIRED))?
                    }
                };
                let iterations = header.slot_iterations(number("iter-time").unwrap_or(LuksPlan::TIME))?;
                Ok(Self::Fill { slot, active: slots[slot].active, passphrase, iterations })
            }
            Some("inactive") => {
                if text("new-secret").is_some() {
                    return invalid("'new-secret' must not be given when erasing keyslots");
                }
                if number("iter-time").is_some() {
                    return invalid("'iter-time' must not be given when erasing keyslots");
                }
                let old = text("old-secret").map(|id| secrets.passphrase(id)).transpose()?;
                let active = slots.iter().filter(|slot| slot.active).count();
                let opened = |old: &str| header.opened_by(old.as_bytes(), |at, buf: &mut [u8]| place.read(at, buf));
                if let Some(slot) = number("keyslot") {
                    let slot = slot_number(slot)?;
                    if let Some(old) = old
                        && !opened(old)?.contains(&slot)
                    {
                        return Err(Error::invalid(format!(
                            "Given keyslot {slot} doesn't contain the given old password for erase operation"
                        )));
                    }
                    if !slots[slot].active && !force {
                        return Err(Error::invalid(format!("Given keyslot {slot} is already erased (inactive) ")));
                    }
                    if active == 1 && !force {
                        return Err(Error::invalid(format!(
                            "Attempt to erase the only active keyslot {slot} which will erase all the data in the \
                             image irreversibly - refusing operation"
                        )));
                    }
                    return Ok(Self::Erase(vec![slot]));
                }
                let Some(old) = old else {
                    return invalid(
                        "To erase keyslot(s), either explicit keyslot index or the password currently contained in \
                         them must be given",
                    );
                };
                let found = opened(old)?;
                if found.is_empty() {
                    return invalid("No keyslots match given (old) password for erase operation");
                }
                if found.len() == active && !force {
                    return invalid(
                        "All the active keyslots match the (old) password that was given and erasing them will erase \
                         all the data in the image irreversibly - refusing operation",
                    );
                }
                Ok(Self::Erase(found))
            }
            Some(other) => Err(Error::invalid(format!("Parameter 'state' does not accept value '{other}'"))),
        }
    }

    /// Does it, with the master key.
    pub fn apply(&self, place: &HeaderPlace<'_>, key: &[u8]) -> Result<()> {
        let mut header = place.header()?;
        match self {
            Self::Fill { slot, active, passphrase, iterations } => {
                let spare = header.slots().iter().position(|slot| !slot.active).filter(|_| *active);
                if let Some(spare) = spare {
                    place.fill(&mut header, spare, key, passphrase.get(), *iterations)?;
                }
                place.fill(&mut header, *slot, key, passphrase.get(), *iterations)?;
                spare.map_or(Ok(()), |spare| place.erase(&mut header, spare))
            }
            Self::Erase(slots) => slots.iter().try_for_each(|slot| place.erase(&mut header, *slot)),
        }
    }
}

fn slot_number(number: u64) -> Result<usize> {
    let slot = usize::try_from(number).ok().filter(|slot| *slot < SLOTS);
    // The reference has it in 32 bits, and takes what is left of larger numbers.
    let shown = if i64::try_from(number).is_ok() { number } else { number & u64::from(u32::MAX) };
    slot.ok_or_else(|| {
        Error::invalid(format!("Invalid keyslot {shown} specified, must be between 0 and {}", SLOTS - 1))
    })
}

impl HeaderPlace<'_> {
    fn header(&self) -> Result<LuksHeader> {
        let mut bytes = [0; HEADER];
        self.read(0, &mut bytes)?;
        // Where the payload is has been checked when the image was opened.
        Ok(LuksHeader::parse(&bytes, true)?)
    }

    fn within(&self, at: u64, len: u64) -> Result<u64> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.at.saturating_add(at)),
            _ => Err(Error::corrupt("Key material lies outside of the LUKS header")),
        }
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let (place, len) = (self.within(at, buf.len() as u64)?, buf.len() as u64);
        FileEnd::default().require(self.storage, "the key material", place, len)?;
        self.storage.read_at(place, buf).context("Failed to read key material")
    }

    fn write(&self, at: u64, bytes: &[u8], what: &str) -> Result<()> {
        let place = self.within(at, bytes.len() as u64)?;
        self.storage.write_at(place, bytes).and_then(|()| self.storage.flush()).context(what)
    }

    fn fill(&self, header: &mut LuksHeader, slot: usize, key: &[u8], passphrase: &[u8], iterations: u32) -> Result<()> {
        let material = header.fill_slot(slot, key, passphrase, iterations)?;
        self.write(header.material(slot).start, &material, "Unable to write key material")?;
        self.write(0, header.bytes(), "Unable to write LUKS header")
    }

    fn erase(&self, header: &mut LuksHeader, slot: usize) -> Result<()> {
        self.write(header.material(slot).start, &header.noise(slot)?, "Unable to write over key material")?;
        header.erase_slot(slot);
        self.write(0, header.bytes(), "Unable to write LUKS header")
    }
}
