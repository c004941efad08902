//! The LUKS version 1 partition header: what it says, and whether it makes sense.
//!
//! Source: "LUKS On-Disk Format Specification Version 1.2.3". All numbers are big endian. Header, 592 bytes: 0, 6
//! bytes magic; 6, 2 bytes version; 8, 32 bytes cipher name; 40, 32 bytes cipher mode; 72, 32 bytes hash; 104, 4 bytes
//! payload offset in sectors; 108, 4 bytes key length; 112, 20 bytes digest; 132, 32 bytes salt; 164, 4 bytes
//! iterations; 168, 40 bytes UUID; 208, 8 key slots of 48 bytes each. Slot: 0, 4 bytes state; 4, 4 bytes iterations; 8,
//! 32 bytes salt; 40, 4 bytes offset of the key material in sectors; 44, 4 bytes stripes.

/// Length of the header.
pub const HEADER: usize = 592;
const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const SECTOR: u64 = 512;
/// Key slots in a header.
pub const SLOTS: usize = 8;
const SLOT: usize = 48;
const SLOTS_AT: usize = 208;
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
const STRIPES: u32 = 4000;
/// Sectors before which no key material may lie.
const HEADER_SECTORS: u64 = 8;

const HASHES: [&str; 8] = ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"];
const MODES: [&str; 4] = ["ecb", "cbc", "xts", "ctr"];
const IV_GENERATORS: [&str; 3] = ["plain", "plain64", "essiv"];

/// A key slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Whether it holds a key.
    pub active: bool,
    /// PBKDF2 iterations.
    pub iterations: u32,
    /// Where its key material is, in sectors from the header.
    pub material: u32,
    /// Anti-forensic stripes.
    pub stripes: u32,
}

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LuksHeader {
    /// Cipher with its key size: `aes-256`.
    pub cipher: String,
    /// `xts`, `cbc`, ...
    pub mode: String,
    /// `plain64`, `essiv`, ...
    pub iv_generator: String,
    /// The hash of `essiv`.
    pub iv_hash: Option<String>,
    /// The hash of the key derivation.
    pub hash: String,
    /// As it is stored.
    pub uuid: String,
    /// PBKDF2 iterations of the master key's digest.
    pub iterations: u32,
    /// Where the payload starts, in sectors.
    pub payload: u32,
    /// The key slots.
    pub slots: [Slot; SLOTS],
}

impl LuksHeader {
    /// Reads and checks a header. What is wrong is said in the reference's words.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, String> {
        let u32_at = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u32::from_be_bytes(*word));
        if &bytes[..6] != MAGIC {
            return Err("Volume is not in LUKS format".to_owned());
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != 1 {
            return Err(format!("LUKS version {version} is not supported"));
        }
        let name = field(&bytes[8..40], "cipher name")?;
        let mode = field(&bytes[40..72], "cipher mode")?;
        let hash = field(&bytes[72..104], "hash spec")?;
        let (payload, key_bytes, iterations) = (u32_at(104), u32_at(108), u32_at(164));
        let slots: [Slot; SLOTS] = std::array::from_fn(|n| {
            let at = SLOTS_AT + n * SLOT;
            Slot {
                active: u32_at(at) == ACTIVE,
                iterations: u32_at(at + 4),
                material: u32_at(at + 40),
                stripes: u32_at(at + 44),
            }
        });
        if u64::from(payload) < HEADER_SECTORS {
            return Err("LUKS payload is overlapping with the header".to_owned());
        }
        if iterations == 0 {
            return Err("LUKS key iteration count is zero".to_owned());
        }
        let material = (u64::from(key_bytes) * u64::from(STRIPES)).div_ceil(SECTOR);
        for (n, slot) in slots.iter().enumerate() {
            let state = u32_at(SLOTS_AT + n * SLOT);
            check_slot(n, slot, state, material, payload)?;
            let start = u64::from(slot.material);
            for (m, other) in slots.iter().enumerate().skip(n + 1) {
                let other = u64::from(other.material);
                if start < other + material && other < start + material {
                    return Err(format!("Keyslots {n} and {m} are overlapping in the header"));
                }
            }
        }
        let unexpected = || format!("Unexpected cipher mode string format '{mode}'");
        let (mode, iv) = mode.split_once('-').ok_or_else(unexpected)?;
        let (iv, iv_hash) = match iv.split_once(':') {
            Some((iv, hash)) => (iv, Some(hash)),
            None => (iv, None),
        };
        known(&MODES, mode).ok_or_else(|| format!("Cipher mode '{mode}' not supported"))?;
        let iv_hash = match (iv, iv_hash) {
            ("essiv", None) => return Err("Missing IV generator hash specification".to_owned()),
            (_, Some(hash)) => {
                known(&HASHES, hash).ok_or_else(|| format!("Hash algorithm '{hash}' not supported"))?;
                (iv == "essiv").then(|| hash.to_owned())
            }
            _ => None,
        };
        let key = if mode == "xts" { key_bytes / 2 } else { key_bytes };
        let cipher = match (name.as_str(), key) {
            ("aes" | "serpent" | "twofish", 16 | 24 | 32) | ("cast5", 16) => format!("{name}-{}", key * 8),
            _ => return Err(format!("Algorithm '{name}' with key size {key} bytes not supported")),
        };
        known(&HASHES, &hash).ok_or_else(|| format!("Hash algorithm '{hash}' not supported"))?;
        known(&IV_GENERATORS, iv).ok_or_else(|| format!("IV generator '{iv}' not supported"))?;
        Ok(Self {
            cipher,
            mode: mode.to_owned(),
            iv_generator: iv.to_owned(),
            iv_hash,
            hash,
            uuid: text(&bytes[168..208]),
            iterations,
            payload,
            slots,
        })
    }
}

fn check_slot(n: usize, slot: &Slot, state: u32, material: u64, payload: u32) -> Result<(), String> {
    if slot.stripes != STRIPES {
        return Err(format!("Keyslot {n} is corrupted (stripes {} != {STRIPES})", slot.stripes));
    }
    if state != ACTIVE && state != INACTIVE {
        return Err(format!("Keyslot {n} state (active/disable) is corrupted"));
    }
    if slot.active && slot.iterations == 0 {
        return Err(format!("Keyslot {n} iteration count is zero"));
    }
    if u64::from(slot.material) < HEADER_SECTORS {
        return Err(format!("Keyslot {n} is overlapping with the LUKS header"));
    }
    if u64::from(slot.material) + material > u64::from(payload) {
        return Err(format!("Keyslot {n} is overlapping with the encrypted payload"));
    }
    Ok(())
}

fn known(list: &[&'static str], word: &str) -> Option<&'static str> {
    list.iter().copied().find(|known| *known == word)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..6].copy_from_slice(MAGIC);
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
        let header = LuksHeader::parse(&sample()).unwrap();
        assert_eq!((header.cipher.as_str(), header.mode.as_str()), ("aes-256", "xts"));
        assert_eq!((header.iv_generator.as_str(), header.hash.as_str()), ("plain64", "sha256"));
        assert_eq!(header.uuid, "uuid");
        assert!(header.slots[0].active && !header.slots[1].active);
    }

    #[test]
    fn refusals() {
        for (at, bytes, text) in [
            (0, &b"X"[..], "Volume is not in LUKS format"),
            (7, &[2], "LUKS version 2 is not supported"),
            (40, b"zzz\0", "Unexpected cipher mode string format 'zzz'"),
            (40, b"xts-zzz\0zzz", "IV generator 'zzz' not supported"),
            (40, b"xts-essiv\0z", "Missing IV generator hash specification"),
            (111, &[3], "Algorithm 'aes' with key size 1 bytes not supported"),
            (107, &[7, 0, 0, 0, 0], "Keyslot 0 is overlapping with the encrypted payload"),
            (SLOTS_AT + 43, &[5], "Keyslot 0 is overlapping with the LUKS header"),
            (SLOTS_AT + SLOT + 42, &[0, 8], "Keyslots 0 and 1 are overlapping in the header"),
            (SLOTS_AT + 3, &[5], "Keyslot 0 state (active/disable) is corrupted"),
        ] {
            let mut header = sample();
            header[at..at + bytes.len()].copy_from_slice(bytes);
            if at == 107 {
                header[108..112].copy_from_slice(&[0, 0, 0, 64]);
                header[106..108].copy_from_slice(&[0, 8]);
            }
            assert_eq!(LuksHeader::parse(&header).unwrap_err(), text);
        }
    }
}
