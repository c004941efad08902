//! VHDX on disk, little endian, as *[MS-VHDX]: Virtual Hard Disk v2 (VHDX) File Format* has it.
//!
//! The first mebibyte holds the file type identifier, two headers and two region tables (section 2.2). All else lies in
//! whole mebibytes anywhere behind it: the log (2.3), the regions (BAT, 2.5; metadata, 2.6), the blocks (2.4).

use std::fmt;
use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a file starts with.
pub const SIGNATURE: &[u8; 8] = b"vhdxfile";
/// All offsets and lengths of what lies behind the first one are multiples of it.
pub const MIB: u64 = 1 << 20;
/// Where the two headers are.
pub const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
/// Where the two region tables are.
pub const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a region table, and of the table of the metadata region.
pub const TABLE: usize = 64 << 10;
/// The most entries of either table.
pub const MOST_ENTRIES: usize = 2047;
/// Bytes of a sector of the log, and the unit in which it changes a file.
pub const LOG_SECTOR: usize = 4096;
/// The largest virtual disk.
pub const MAX_SIZE: u64 = 64 << 40;
/// Block sizes: powers of two from here.
pub const MIN_BLOCK: u64 = 1 << 20;
/// And up to here.
pub const MAX_BLOCK: u64 = 256 << 20;
/// Sectors that a sector bitmap block tells of: its bits.
pub const BITMAP_SECTORS: u64 = 1 << 23;
/// Bytes of an entry of the BAT.
pub const ENTRY: u64 = 8;

/// A GUID as it is stored: its first three fields are little-endian.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// None.
    pub const ZERO: Self = Self([0; 16]);

    /// From the number that its text spells.
    pub const fn new(number: u128) -> Self {
        let n = number.to_be_bytes();
        Self([n[3], n[2], n[1], n[0], n[5], n[4], n[7], n[6], n[8], n[9], n[10], n[11], n[12], n[13], n[14], n[15]])
    }

    /// The number that its text spells.
    pub fn number(self) -> u128 {
        u128::from_be_bytes(Self::new(u128::from_be_bytes(self.0)).0)
    }

    /// From its text, in braces or not.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches('{').trim_end_matches('}');
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        let whole = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        whole.then(|| u128::from_str_radix(&digits, 16).ok().map(Self::new)).flatten()
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.number();
        let part = |shift: u32, bits: u32| n >> shift & ((1 << bits) - 1);
        let parts = [part(96, 32), part(80, 16), part(64, 16), part(48, 16), part(0, 48)];
        write!(f, "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}", parts[0], parts[1], parts[2], parts[3], parts[4])
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The BAT region (section 2.2.3.2).
pub const BAT: Guid = Guid::new(0x2DC27766_F623_4200_9D64_115E9BFD4A08);
/// The metadata region.
pub const METADATA: Guid = Guid::new(0x8B7CA206_4790_4B9A_B8FE_575F050F886E);
/// Metadata: block size and flags (section 2.6.2).
pub const FILE_PARAMETERS: Guid = Guid::new(0xCAA16737_FA36_4D43_B3B6_33F0AA44E76B);
/// Metadata: size of the disk.
pub const VIRTUAL_DISK_SIZE: Guid = Guid::new(0x2FA54224_CD1B_4876_B211_5DBED83BF4B8);
/// Metadata: what the guest's SCSI page 83 says.
pub const VIRTUAL_DISK_ID: Guid = Guid::new(0xBECA12AB_B2E6_4523_93EF_C309E000C746);
/// Metadata: bytes of a sector that the guest sees.
pub const LOGICAL_SECTOR: Guid = Guid::new(0x8141BF1D_A96F_4709_BA47_F233A8FAAB5F);
/// Metadata: bytes of a sector of the disk below.
pub const PHYSICAL_SECTOR: Guid = Guid::new(0xCDA348C7_445D_4471_9CC9_E9885251C556);
/// Metadata: where the parent is.
pub const PARENT_LOCATOR: Guid = Guid::new(0xA8D35F2D_B30B_454D_ABF7_D3D84834AB0C);
/// The parent is a VHDX (section 2.6.2.6.3).
pub const LOCATOR_TYPE: Guid = Guid::new(0xB04AEFB7_D19E_4A81_B789_25B8E9445913);

/// What the first 64 KiB start with (section 2.2.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FileIdentifier {
    /// [`SIGNATURE`].
    pub signature: [u8; 8],
    /// UTF-16, for people.
    pub creator: [U16; 256],
}

/// A header (section 2.2.2).
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// `head`.
    pub signature: [u8; 4],
    /// CRC-32C of all of it, with this field zero.
    pub checksum: U32,
    /// The greater one counts.
    pub sequence: U64,
    /// Changes when the file is opened and changed.
    pub file_write: Guid,
    /// Changes when what the guest sees does.
    pub data_write: Guid,
    /// Entries of the log with another one are stale; zero where there are none.
    pub log_guid: Guid,
    /// 0.
    pub log_version: U16,
    /// 1.
    pub version: U16,
    /// Bytes of the log.
    pub log_length: U32,
    /// Where the log is.
    pub log_offset: U64,
    /// Zero.
    pub reserved: [u8; 4016],
}

/// The start of a region table (section 2.2.3.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegionTableHeader {
    /// `regi`.
    pub signature: [u8; 4],
    /// CRC-32C of all 64 KiB, with this field zero.
    pub checksum: U32,
    /// Entries that follow.
    pub count: U32,
    /// Zero.
    pub reserved: U32,
}

/// An entry of a region table (section 2.2.3.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegionEntry {
    /// What it is.
    pub guid: Guid,
    /// Where it is.
    pub offset: U64,
    /// Its bytes.
    pub length: U32,
    /// Bit 0: who does not know it must not open the file.
    pub required: U32,
}

/// The start of the metadata table (section 2.6.1.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MetadataTableHeader {
    /// `metadata`.
    pub signature: [u8; 8],
    /// Zero.
    pub reserved: U16,
    /// Entries that follow.
    pub count: U16,
    /// Zero.
    pub more_reserved: [u8; 20],
}

/// An entry of the metadata table (section 2.6.1.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MetadataEntry {
    /// What it is.
    pub item: Guid,
    /// Where it is, in the region.
    pub offset: U32,
    /// Its bytes.
    pub length: U32,
    /// Bit 0: a user's. Bit 1: of the disk, not of the file. Bit 2: who does not know it must not open the file.
    pub flags: U32,
    /// Zero.
    pub reserved: U32,
}

/// Flag: a user's item, whose GUID is in a name space of its own.
pub const IS_USER: u32 = 1;
/// Flag: an item of the virtual disk.
pub const IS_VIRTUAL_DISK: u32 = 2;
/// Flag: an item that has to be known.
pub const IS_REQUIRED: u32 = 4;
/// File parameters: a fixed disk, all of whose blocks stay in the file.
pub const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
/// File parameters: a differencing disk.
pub const HAS_PARENT: u32 = 2;

/// The start of an entry of the log (section 2.3.1.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LogEntryHeader {
    /// `loge`.
    pub signature: [u8; 4],
    /// CRC-32C of all of the entry, with this field zero.
    pub checksum: U32,
    /// Bytes, in whole sectors of the log.
    pub length: U32,
    /// Where in the log the first entry of the sequence is.
    pub tail: U32,
    /// One more than that of the entry before.
    pub sequence: U64,
    /// Descriptors that follow.
    pub descriptors: U32,
    /// Zero.
    pub reserved: U32,
    /// That of the header.
    pub log_guid: Guid,
    /// The file was at least so long when this was written.
    pub flushed_end: U64,
    /// The file has to be at least so long.
    pub last_end: U64,
}

/// A descriptor of a log entry, of either kind (sections 2.3.1.2 and 2.3.1.3).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LogDescriptor {
    /// `desc` (data) or `zero`.
    pub signature: [u8; 4],
    /// The last bytes of the sector; nothing for zeros.
    pub trailing: [u8; 4],
    /// The first bytes of the sector; for zeros how many bytes they are.
    pub leading: [u8; 8],
    /// Where in the file.
    pub offset: U64,
    /// That of the entry.
    pub sequence: U64,
}

/// The middle of a sector that a data descriptor tells of (section 2.3.1.4).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LogData {
    /// `data`.
    pub signature: [u8; 4],
    /// The upper half of the entry's sequence number.
    pub sequence_high: U32,
    /// The sector without its first 8 and its last 4 bytes.
    pub data: [u8; 4084],
    /// The lower half.
    pub sequence_low: U32,
}

/// The start of a parent locator (section 2.6.2.6.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LocatorHeader {
    /// [`LOCATOR_TYPE`].
    pub kind: Guid,
    /// Zero.
    pub reserved: U16,
    /// Entries that follow.
    pub count: U16,
}

/// A key and its value, UTF-16, both in the locator's item (section 2.6.2.6.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LocatorEntry {
    /// Where the key is.
    pub key_offset: U32,
    /// Where the value is.
    pub value_offset: U32,
    /// Bytes of the key.
    pub key_length: U16,
    /// Bytes of the value.
    pub value_length: U16,
}

const _: () = {
    assert!(size_of::<FileIdentifier>() == 520);
    assert!(size_of::<Header>() == 4096 && offset_of!(Header, log_offset) == 72);
    assert!(size_of::<RegionTableHeader>() == 16 && size_of::<RegionEntry>() == 32);
    assert!(size_of::<MetadataTableHeader>() == 32 && size_of::<MetadataEntry>() == 32);
    assert!(size_of::<LogEntryHeader>() == 64 && size_of::<LogDescriptor>() == 32);
    assert!(size_of::<LogData>() == LOG_SECTOR && offset_of!(LogData, sequence_low) == 4092);
    assert!(size_of::<LocatorHeader>() == 20 && size_of::<LocatorEntry>() == 12);
};

/// Where the checksum is in headers, region tables and log entries.
const CHECKSUM_AT: usize = 4;

/// The CRC-32C of a structure whose checksum is in the second of its words.
pub fn checksum(bytes: &[u8]) -> u32 {
    let (head, rest) = bytes.split_at(bytes.len().min(CHECKSUM_AT));
    let crc = crc32c::crc32c_append(crc32c::crc32c(head), &[0; 4]);
    crc32c::crc32c_append(crc, rest.get(4..).unwrap_or_default())
}

/// Whether the checksum that stands there is right.
pub fn is_sound(bytes: &[u8]) -> bool {
    let stored = bytes.get(CHECKSUM_AT..).and_then(|rest| rest.first_chunk()).copied();
    stored.map(u32::from_le_bytes) == Some(checksum(bytes))
}

/// Puts the checksum in its place.
pub fn seal(bytes: &mut [u8]) {
    let crc = checksum(bytes);
    if let Some(place) = bytes.get_mut(CHECKSUM_AT..CHECKSUM_AT + 4) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
}

impl Header {
    /// That of a new file, with this log.
    pub fn new(sequence: u64, file_write: Guid, data_write: Guid, log: (u64, u32)) -> Self {
        let mut header = Self::new_zeroed();
        header.signature = *b"head";
        (header.file_write, header.data_write) = (file_write, data_write);
        header.version = 1.into();
        (header.log_offset, header.log_length) = (log.0.into(), log.1.into());
        header.sequence = sequence.into();
        seal(header.as_mut_bytes());
        header
    }

    /// If it is one, whole.
    pub fn parse(bytes: [u8; size_of::<Self>()]) -> Option<Self> {
        (bytes.starts_with(b"head") && is_sound(&bytes)).then(|| zerocopy::transmute!(bytes))
    }
}

/// What the BAT says of a payload block (section 2.5.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// Reads as the parent, or without one as zeros.
    NotPresent,
    /// Zeros, or what nobody needs: it has no place, and the parent does not show.
    Zero,
    /// All of it is at that mebibyte.
    Full(u64),
    /// What the sector bitmap says is at that mebibyte; the parent has the rest.
    Partial(u64),
    /// A state that no block can have.
    Invalid(u64),
}

const ZERO: u64 = 2;
const FULL: u64 = 6;
const PARTIAL: u64 = 7;
/// The part of an entry that is an offset, in mebibytes.
const OFFSET_SHIFT: u32 = 20;

impl BlockState {
    /// What an entry says.
    pub fn of(entry: u64) -> Self {
        let at = entry >> OFFSET_SHIFT;
        match entry & 7 {
            0 => Self::NotPresent,
            // Undefined, zero, unmapped.
            1..=3 => Self::Zero,
            FULL => Self::Full(at),
            PARTIAL => Self::Partial(at),
            other => Self::Invalid(other),
        }
    }

    /// The entry that says so.
    pub fn entry(self) -> u64 {
        match self {
            Self::NotPresent => 0,
            Self::Zero => ZERO,
            Self::Full(at) => at << OFFSET_SHIFT | FULL,
            Self::Partial(at) => at << OFFSET_SHIFT | PARTIAL,
            Self::Invalid(state) => state,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn guids_are_stored_with_three_little_endian_fields() {
        assert_eq!(BAT.0[..8], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42]);
        assert_eq!(BAT.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
        assert_eq!(Guid::parse("{2DC27766-F623-4200-9D64-115E9BFD4A08}"), Some(BAT));
        assert_eq!(Guid::parse("2DC27766"), None);
    }

    #[test]
    fn checksums_leave_their_own_place_out() {
        let header = Header::new(7, Guid([1; 16]), Guid([2; 16]), (MIB, 1 << 20));
        let mut bytes = [0; 4096];
        bytes.copy_from_slice(header.as_bytes());
        assert_eq!(Header::parse(bytes), Some(header));
        bytes[4095] = 1;
        assert_eq!(Header::parse(bytes), None);
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(checksum(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn entries_say_what_they_were_made_of() {
        for state in [BlockState::NotPresent, BlockState::Zero, BlockState::Full(9), BlockState::Partial(1 << 40)] {
            assert_eq!(BlockState::of(state.entry()), state);
        }
    }
}
