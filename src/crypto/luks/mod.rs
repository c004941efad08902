//! LUKS version 1: a header that keeps a volume's master key under passphrases, in eight slots.
//!
//! Source: "LUKS On-Disk Format Specification Version 1.2.3". The header's bytes are in `layout`, the anti-forensic
//! splitter in `split`, keys in and out of slots in `slots`, the cost of that in `cost`.
//!
//! Nothing here knows where the header lies: what is read and written is given and returned as bytes with their offset
//! from the header's start, so that it serves a volume of its own, a header detached from it, and one in the clusters of
//! another format.
//!
//! Invariants: a parsed header has sound slots, which overlap neither each other nor the header nor the payload, or lie
//! past all that a header can name; what unlocking costs is bounded whatever the header says.

mod cost;
mod layout;
mod slots;
mod split;

use zerocopy::{FromBytes, IntoBytes};

use self::layout::{ACTIVE, INACTIVE, LuksFields, SlotFields};
use super::{CipherAlgorithm, CipherMode, CipherSpec, CryptoError, HashAlgorithm, IvGenerator};
pub use cost::Iterations;
pub use layout::{HEADER, SLOTS};
pub use slots::NewVolume;

/// Bytes that the header's offsets are counted in, and that are encrypted on their own.
pub const SECTOR: u64 = 512;
/// What key material and payload are aligned to.
const ALIGNMENT: u64 = 4096;
const STRIPES: u32 = 4000;
/// Sectors before which no key material may lie.
const HEADER_SECTORS: u64 = ALIGNMENT / SECTOR;

/// What is wrong with a header, or with what is asked of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LuksError {
    /// The header makes no sense, in the reference's words.
    #[error("{0}")]
    Header(String),
    /// Another version of the format.
    #[error("LUKS version {0} is not supported")]
    Version(u16),
    /// No slot opens with the passphrase.
    #[error("Invalid password, cannot unlock any keyslot")]
    Passphrase,
    /// No slot can be tried, because of what it would cost.
    #[error(
        "{iterations} iterations of the key derivation are refused: to unlock an image may take {most} rounds of the hash, \
         which is about a minute"
    )]
    TooManyIterations {
        /// What a slot asks for.
        iterations: u32,
        /// Rounds of its hash that all slots may take together.
        most: u64,
    },
    /// More iterations than a header can say.
    #[error("PBKDF iterations {0} larger than 4294967295: Numerical result out of range")]
    TooLong(u128),
    /// The cipher, the mode and the generator of vectors do not go together.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// The system gives no random bytes.
    #[error("Unable to get random bytes: {0}")]
    Random(String),
}

/// A key slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LuksSlot {
    /// Whether it holds a key.
    pub active: bool,
    /// PBKDF2 iterations.
    pub iterations: u32,
    /// Where its key material is, in bytes from the header.
    pub material: u64,
    /// Anti-forensic stripes.
    pub stripes: u32,
}

/// A header that makes sense.
#[derive(Debug, Clone)]
pub struct LuksHeader {
    fields: LuksFields,
    spec: CipherSpec,
    hash: HashAlgorithm,
}

/// What a new volume shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LuksPlan {
    /// How it is encrypted.
    pub spec: CipherSpec,
    /// A hash to be named behind a generator that needs none, as the reference does.
    pub idle_hash: Option<HashAlgorithm>,
    /// The hash of the key derivation.
    pub hash: HashAlgorithm,
    /// Milliseconds that a derivation takes.
    pub time: u64,
    /// The payload lies elsewhere, from the start on.
    pub detached: bool,
}

impl LuksPlan {
    /// Milliseconds of a derivation where nobody says otherwise.
    pub const TIME: u64 = 2000;

    /// Sectors of a slot's key material.
    fn slot_sectors(&self) -> u64 {
        material_sectors(self.spec.key_bytes() as u64)
    }

    /// Bytes of the header with all its key material: where the payload starts that is not detached.
    pub fn header_bytes(&self) -> u64 {
        let slot = self.slot_sectors().next_multiple_of(ALIGNMENT / SECTOR);
        (HEADER_SECTORS + slot * SLOTS as u64) * SECTOR
    }

    /// A header without keys. `uuid` is a UUID as text.
    fn header(&self, uuid: &str) -> Result<LuksHeader, LuksError> {
        self.spec.check()?;
        let mut fields = LuksFields::blank();
        let generator = self.spec.iv.name();
        let mode = match self.spec.iv.hash().or(self.idle_hash) {
            Some(hash) => format!("{}-{generator}:{}", self.spec.mode.name(), hash.name()),
            None => format!("{}-{generator}", self.spec.mode.name()),
        };
        put(&mut fields.cipher, self.spec.cipher.family()?);
        put(&mut fields.mode, &mode);
        put(&mut fields.hash, self.hash.name());
        put(&mut fields.uuid, uuid);
        fields.key_bytes = u32::try_from(self.spec.key_bytes()).unwrap_or(0).into();
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
        fields.payload = if self.detached { 0 } else { sectors(self.header_bytes()) }.into();
        let step = self.slot_sectors().next_multiple_of(ALIGNMENT / SECTOR);
        for (n, slot) in (0u64..).zip(&mut fields.slots) {
            slot.active = INACTIVE.into();
            slot.stripes = STRIPES.into();
            slot.material = sectors((HEADER_SECTORS + step * n) * SECTOR).into();
        }
        Ok(LuksHeader { fields, spec: self.spec, hash: self.hash })
    }
}

/// Sectors of the stripes of a key.
fn material_sectors(key: u64) -> u64 {
    (key * u64::from(STRIPES)).div_ceil(SECTOR)
}

impl LuksHeader {
    /// Whether bytes start as a header of this version does.
    pub fn probe(head: &[u8]) -> bool {
        version(head) == Some(layout::VERSION)
    }

    /// Reads and checks a header. What is wrong is said in the reference's words. `detached`: the payload lies in another
    /// file.
    pub fn parse(bytes: &[u8; HEADER], detached: bool) -> Result<Self, LuksError> {
        let header = |text: String| LuksError::Header(text);
        match version(bytes) {
            None => return Err(header("Volume is not in LUKS format".to_owned())),
            Some(layout::VERSION) => {}
            Some(version) => return Err(LuksError::Version(version)),
        }
        let fields =
            LuksFields::read_from_bytes(bytes).map_err(|_| header("Volume is not in LUKS format".to_owned()))?;
        let name = field(&fields.cipher, "cipher name").map_err(header)?;
        let mode = field(&fields.mode, "cipher mode").map_err(header)?;
        let hash = field(&fields.hash, "hash spec").map_err(header)?;
        check_places(&fields, detached).map_err(header)?;
        let key = fields.key_bytes.get();
        let spec = spec(&name, &mode, key).map_err(header)?;
        let hash = known_hash(&hash).map_err(header)?;
        Ok(Self { fields, spec, hash })
    }

    /// The header's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.fields.as_bytes()
    }

    /// How the payload and the key material are encrypted.
    pub fn spec(&self) -> &CipherSpec {
        &self.spec
    }

    /// The hash of the key derivation.
    pub fn hash(&self) -> HashAlgorithm {
        self.hash
    }

    /// As it is stored.
    pub fn uuid(&self) -> String {
        text(&self.fields.uuid)
    }

    /// PBKDF2 iterations of the master key's digest.
    pub fn iterations(&self) -> u32 {
        self.fields.iterations.get()
    }

    /// Where the payload starts, in bytes from the header, or, where that is detached, in the payload's file.
    pub fn payload(&self) -> u64 {
        u64::from(self.fields.payload.get()) * SECTOR
    }

    /// The key slots.
    pub fn slots(&self) -> [LuksSlot; SLOTS] {
        self.fields.slots.map(|slot| LuksSlot {
            active: slot.active.get() == ACTIVE,
            iterations: slot.iterations.get(),
            material: u64::from(slot.material.get()) * SECTOR,
            stripes: slot.stripes.get(),
        })
    }

    /// Bytes of a master key.
    fn key_bytes(&self) -> usize {
        self.spec.key_bytes()
    }
}

/// The version that a header says, if it is one.
fn version(bytes: &[u8]) -> Option<u16> {
    let version = bytes.strip_prefix(&layout::MAGIC)?.first_chunk()?;
    Some(u16::from_be_bytes(*version))
}

fn check_places(fields: &LuksFields, detached: bool) -> Result<(), String> {
    let payload = u64::from(fields.payload.get());
    if payload < HEADER_SECTORS && !detached {
        return Err("LUKS payload is overlapping with the header".to_owned());
    }
    if fields.iterations.get() == 0 {
        return Err("LUKS key iteration count is zero".to_owned());
    }
    // What lies between two slots is the first one's.
    let material = material_sectors(u64::from(fields.key_bytes.get())).next_multiple_of(ALIGNMENT / SECTOR);
    // A slot that ends past the last sector whose number fits lies past everything, and holds nothing: the reference
    // takes it, and fails where it is read.
    let nowhere = |start: u64| material < 1 << 32 && start + material >= 1 << 32;
    for (n, slot) in fields.slots.iter().enumerate() {
        let start = u64::from(slot.material.get());
        check_slot(n, slot)?;
        if start + material > payload && !detached && !nowhere(start) {
            return Err(format!("Keyslot {n} is overlapping with the encrypted payload"));
        }
        for (m, other) in fields.slots.iter().enumerate().skip(n + 1) {
            let other = u64::from(other.material.get());
            if start < other + material && other < start + material && !nowhere(start) && !nowhere(other) {
                return Err(format!("Keyslots {n} and {m} are overlapping in the header"));
            }
        }
    }
    Ok(())
}

fn check_slot(n: usize, slot: &SlotFields) -> Result<(), String> {
    let stripes = slot.stripes.get();
    if stripes != STRIPES {
        // The reference shows them with a sign.
        return Err(format!("Keyslot {n} is corrupted (stripes {} != {STRIPES})", stripes.cast_signed()));
    }
    let state = slot.active.get();
    if state != ACTIVE && state != INACTIVE {
        return Err(format!("Keyslot {n} state (active/disable) is corrupted"));
    }
    if state == ACTIVE && slot.iterations.get() == 0 {
        return Err(format!("Keyslot {n} iteration count is zero"));
    }
    if u64::from(slot.material.get()) < HEADER_SECTORS {
        return Err(format!("Keyslot {n} is overlapping with the LUKS header"));
    }
    Ok(())
}

/// What the names of a header mean.
fn spec(name: &str, mode: &str, key: u32) -> Result<CipherSpec, String> {
    let (chaining, iv) =
        mode.split_once('-').ok_or_else(|| format!("Unexpected cipher mode string format '{mode}'"))?;
    let (iv, iv_hash) = match iv.split_once(':') {
        Some((iv, hash)) => (iv, Some(hash)),
        None => (iv, None),
    };
    let mode = CipherMode::parse(chaining).ok_or_else(|| format!("Cipher mode '{chaining}' not supported"))?;
    if iv == "essiv" && iv_hash.is_none() {
        return Err("Missing IV generator hash specification".to_owned());
    }
    let iv_hash = iv_hash.map(known_hash).transpose()?;
    let key = usize::try_from(if mode == CipherMode::Xts { key / 2 } else { key }).unwrap_or(usize::MAX);
    let cipher = CipherAlgorithm::of_family(name, key)
        .ok_or_else(|| format!("Algorithm '{name}' with key size {key} bytes not supported"))?;
    let iv = IvGenerator::parse(iv, iv_hash).ok_or_else(|| format!("IV generator '{iv}' not supported"))?;
    let spec = CipherSpec { cipher, mode, iv };
    // Whether the mode goes with the cipher is seen where there is a key.
    if iv.hash().is_some() {
        spec.essiv_cipher().map_err(|error| error.to_string())?;
    }
    Ok(spec)
}

fn known_hash(name: &str) -> Result<HashAlgorithm, String> {
    HashAlgorithm::parse(name).ok_or_else(|| format!("Hash algorithm '{name}' not supported"))
}

fn field(bytes: &[u8], what: &str) -> Result<String, String> {
    if !bytes.contains(&0) {
        return Err(format!("LUKS header {what} is not NUL terminated"));
    }
    Ok(text(bytes))
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Writes a name and, behind it, zeros; one that is too long (none of ours is) is cut.
fn put(field: &mut [u8], name: &str) {
    field.fill(0);
    field.iter_mut().zip(name.bytes()).for_each(|(to, byte)| *to = byte);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SLOTS_AT: usize = 208;
    const SLOT: usize = 48;

    fn sample() -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..6].copy_from_slice(&layout::MAGIC);
        bytes[7] = 1;
        bytes[8..11].copy_from_slice(b"aes");
        bytes[40..51].copy_from_slice(b"xts-plain64");
        bytes[72..78].copy_from_slice(b"sha256");
        bytes[104..108].copy_from_slice(&u32::to_be_bytes(4040));
        bytes[108..112].copy_from_slice(&u32::to_be_bytes(64));
        bytes[164..168].copy_from_slice(&u32::to_be_bytes(1000));
        bytes[168..172].copy_from_slice(b"uuid");
        for n in 0..SLOTS {
            let at = SLOTS_AT + n * SLOT;
            bytes[at..at + 4].copy_from_slice(&u32::to_be_bytes(if n == 0 { ACTIVE } else { INACTIVE }));
            bytes[at + 4..at + 8].copy_from_slice(&u32::to_be_bytes(7));
            bytes[at + 40..at + 44].copy_from_slice(&u32::to_be_bytes(8 + 504 * n as u32));
            bytes[at + 44..at + 48].copy_from_slice(&u32::to_be_bytes(STRIPES));
        }
        bytes
    }

    #[test]
    fn a_sound_header() {
        let header = LuksHeader::parse(&sample(), false).unwrap();
        assert_eq!((header.spec.cipher.name(), header.spec.mode), ("aes-256", CipherMode::Xts));
        assert_eq!((header.spec.iv, header.hash), (IvGenerator::Plain64, HashAlgorithm::Sha256));
        assert_eq!((header.uuid().as_str(), header.payload()), ("uuid", 4040 * 512));
        assert!(header.slots()[0].active && !header.slots()[1].active);
        assert_eq!(header.bytes(), sample());
    }

    #[test]
    fn refusals() {
        for (at, bytes, text) in [
            (0, &b"X"[..], "Volume is not in LUKS format"),
            (7, &[2], "LUKS version 2 is not supported"),
            (40, b"zzz\0", "Unexpected cipher mode string format 'zzz'"),
            (40, b"xts-zzz\0zzz", "IV generator 'zzz' not supported"),
            (40, b"xts-essiv\0z", "Missing IV generator hash specification"),
            (40, b"xts-essiv:sha1\0", "No AES cipher with key size 20 available"),
            (104, &[0, 0, 0x0f, 0xc7], "Keyslot 7 is overlapping with the encrypted payload"),
            (SLOTS_AT + 43, &[9], "Keyslots 0 and 1 are overlapping in the header"),
            (SLOTS_AT + SLOT + 42, &[1, 0xff], "Keyslots 0 and 1 are overlapping in the header"),
            (SLOTS_AT + SLOT + 42, &[2, 1], "Keyslots 1 and 2 are overlapping in the header"),
            (111, &[3], "Algorithm 'aes' with key size 1 bytes not supported"),
            (107, &[7, 0, 0, 0, 0], "Keyslot 0 is overlapping with the encrypted payload"),
            (SLOTS_AT + 43, &[5], "Keyslot 0 is overlapping with the LUKS header"),
            (SLOTS_AT + SLOT + 42, &[0, 8], "Keyslots 0 and 1 are overlapping in the header"),
            (SLOTS_AT + 3, &[5], "Keyslot 0 state (active/disable) is corrupted"),
            (SLOTS_AT + 44, &[0xff; 4], "Keyslot 0 is corrupted (stripes -1 != 4000)"),
            (
                SLOTS_AT + 7 * SLOT + 40,
                &[0x7f, 0xff, 0xff, 0xf0],
                "Keyslot 7 is overlapping with the encrypted payload",
            ),
        ] {
            let mut header = sample();
            header[at..at + bytes.len()].copy_from_slice(bytes);
            if at == 107 {
                header[108..112].copy_from_slice(&[0, 0, 0, 64]);
                header[106..108].copy_from_slice(&[0, 8]);
            }
            assert_eq!(LuksHeader::parse(&header, false).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn a_detached_header_has_no_payload_to_overlap() {
        let mut header = sample();
        header[104..108].fill(0);
        assert!(LuksHeader::parse(&header, false).is_err());
        assert_eq!(LuksHeader::parse(&header, true).unwrap().payload(), 0);
    }
}
