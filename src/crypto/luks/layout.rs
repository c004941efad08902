//! The LUKS header on disk: LUKS On-Disk Format Specification 1.2.3, figures 2 and 3. All numbers are big-endian.

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header.
pub const HEADER: usize = 592;
/// Key slots in it.
pub const SLOTS: usize = 8;
/// `magic`.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// `version` of what this layout is.
pub const VERSION: u16 = 1;
/// `active` of a slot that holds a key.
pub const ACTIVE: u32 = 0x00ac_71f3;
/// `active` of one that does not.
pub const INACTIVE: u32 = 0x0000_dead;
/// Bytes of [`LuksFields::digest`].
pub const DIGEST: usize = 20;
/// Bytes of a salt.
pub const SALT: usize = 32;

/// `phdr`.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct LuksFields {
    pub magic: [u8; 6],
    pub version: U16,
    /// The cipher without its key size.
    pub cipher: [u8; 32],
    /// The mode and, behind a dash, the generator of initialization vectors.
    pub mode: [u8; 32],
    /// The hash of the keys' derivation and of the anti-forensic splitter.
    pub hash: [u8; 32],
    /// Where the payload starts, in sectors.
    pub payload: U32,
    /// Bytes of the master key.
    pub key_bytes: U32,
    /// The master key's digest, by PBKDF2.
    pub digest: [u8; DIGEST],
    /// Its salt.
    pub salt: [u8; SALT],
    /// Its iterations.
    pub iterations: U32,
    pub uuid: [u8; 40],
    pub slots: [SlotFields; SLOTS],
}

/// A key slot.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SlotFields {
    /// [`ACTIVE`] or [`INACTIVE`].
    pub active: U32,
    /// PBKDF2 iterations of the slot's own key.
    pub iterations: U32,
    /// Their salt.
    pub salt: [u8; SALT],
    /// Where the key material starts, in sectors.
    pub material: U32,
    /// Into how many stripes the master key is split.
    pub stripes: U32,
}

const _: () = assert!(size_of::<LuksFields>() == HEADER);
const _: () = assert!(std::mem::offset_of!(LuksFields, payload) == 104);
const _: () = assert!(std::mem::offset_of!(LuksFields, uuid) == 168);
const _: () = assert!(std::mem::offset_of!(LuksFields, slots) == 208);
const _: () = assert!(size_of::<SlotFields>() == 48);

impl LuksFields {
    /// One of zeros but for what no header is without.
    pub fn blank() -> Self {
        Self { magic: MAGIC, version: VERSION.into(), ..Self::new_zeroed() }
    }
}
