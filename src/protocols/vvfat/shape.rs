//! What kind of disk it is, and where everything lies on it.

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use super::layout::{
    Boot, Boot32, BootEnd, Chs, ENTRY_BYTES, FreeSpace, Partition, PartitionTable, SECTOR, SERIAL, SIGNATURE,
};

/// Bits of an entry of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fat {
    /// 12.
    Fat12,
    /// 16.
    Fat16,
    /// 32, of which 28 count.
    Fat32,
}

/// Where everything lies. A file system of a kind has so many clusters that every reader takes it for that kind.
#[derive(Debug, Clone)]
pub struct Shape {
    /// The kind.
    pub fat: Fat,
    cylinders: u64,
    heads: u64,
    track_sectors: u64,
    /// Sectors before the file system: the partition table.
    pub hidden: u64,
    cluster_sectors: u64,
    reserved: u64,
    fat_sectors: u64,
    root_sectors: u64,
}

/// The first cluster that there is.
pub const FIRST_CLUSTER: u64 = 2;

impl Shape {
    /// A hard disk of 504 MiB, or of 31.5 MiB in FAT12.
    pub fn disk(fat: Fat) -> Self {
        let (cylinders, cluster_sectors) = match fat {
            Fat::Fat12 => (64, 16),
            Fat::Fat16 => (1024, 16),
            // Clusters of 8 KiB would be too few for it.
            Fat::Fat32 => (1024, 8),
        };
        Self::new(fat, (cylinders, 16, 63), 63, cluster_sectors)
    }

    /// A floppy disk of 2880 KiB, or of 1440 KiB. FAT16 needs more clusters than FAT12 has on either.
    pub fn floppy(fat: Fat, large: bool) -> Self {
        let cluster_sectors = if fat == Fat::Fat12 { 16 } else { 1 };
        Self::new(fat, (80, 2, if large { 36 } else { 18 }), 0, cluster_sectors)
    }

    fn new(fat: Fat, (cylinders, heads, track_sectors): (u64, u64, u64), hidden: u64, cluster_sectors: u64) -> Self {
        let sectors = cylinders * heads * track_sectors - hidden;
        let clusters = sectors / cluster_sectors + FIRST_CLUSTER;
        let table_bytes = match fat {
            Fat::Fat12 => (clusters * 3).div_ceil(2),
            Fat::Fat16 => clusters * 2,
            Fat::Fat32 => clusters * 4,
        };
        let (reserved, root_sectors) = if fat == Fat::Fat32 { (32, 0) } else { (1, 32) };
        let fat_sectors = table_bytes.div_ceil(SECTOR);
        Self { fat, cylinders, heads, track_sectors, hidden, cluster_sectors, reserved, fat_sectors, root_sectors }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.cylinders * self.heads * self.track_sectors * SECTOR
    }

    /// Sectors of the file system.
    pub fn sectors(&self) -> u64 {
        self.size() / SECTOR - self.hidden
    }

    /// Where the first table starts, in bytes of the disk.
    pub fn table(&self) -> u64 {
        (self.hidden + self.reserved) * SECTOR
    }

    /// Bytes of a table, of which there are two.
    pub fn table_bytes(&self) -> u64 {
        self.fat_sectors * SECTOR
    }

    /// Where the root folder starts that has a place of its own.
    pub fn root(&self) -> u64 {
        self.table() + 2 * self.table_bytes()
    }

    /// How many entries that one has; none where the root folder is like any other.
    pub fn root_entries(&self) -> usize {
        usize::try_from(self.root_sectors * SECTOR).unwrap_or(0) / ENTRY_BYTES
    }

    /// Where the first cluster starts.
    pub fn clusters_at(&self) -> u64 {
        self.root() + self.root_sectors * SECTOR
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        self.cluster_sectors * SECTOR
    }

    /// The cluster behind the last.
    pub fn cluster_end(&self) -> u64 {
        (self.size() - self.clusters_at()) / self.cluster() + FIRST_CLUSTER
    }

    /// The name of the kind.
    pub fn name(&self) -> &'static str {
        match self.fat {
            Fat::Fat12 => "FAT12",
            Fat::Fat16 => "FAT16",
            Fat::Fat32 => "FAT32",
        }
    }

    /// What lies before the tables. `root` is the root folder's first cluster, `free` how many are free, and `next` the
    /// first of them.
    pub fn boot(&self, label: &[u8; 11], root: u64, free: u64, next: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.table()).unwrap_or(0)];
        let mut put = |sector: u64, what: &[u8]| {
            let at = usize::try_from(sector * SECTOR).unwrap_or(usize::MAX);
            if let Some(place) = bytes.get_mut(at..at.saturating_add(what.len())) {
                place.copy_from_slice(what);
            }
        };
        if self.hidden > 0 {
            put(0, self.partition_table().as_bytes());
        }
        let mut sector = self.boot_sector(label, root);
        sector.resize(SECTOR as usize - SIGNATURE.len(), 0);
        sector.extend(SIGNATURE);
        put(self.hidden, &sector);
        if self.fat == Fat::Fat32 {
            let space = FreeSpace {
                mark: *b"RRaA",
                zeros: [0; 480],
                second_mark: *b"rrAa",
                free: U32::new(low(free)),
                next: U32::new(low(next)),
                more_zeros: [0; 12],
                signature: [0, 0, SIGNATURE[0], SIGNATURE[1]],
            };
            for at in [0, u64::from(COPY)] {
                put(self.hidden + at, &sector);
                put(self.hidden + at + 1, space.as_bytes());
            }
        }
        bytes
    }

    fn partition_table(&self) -> PartitionTable {
        PartitionTable {
            code: [0; 440],
            serial: U32::new(0xbe1a_fdfa),
            zero: [0; 2],
            partition: Partition {
                active: 0x80,
                first: self.chs(self.hidden),
                kind: match self.fat {
                    Fat::Fat12 => 1,
                    Fat::Fat16 => 6,
                    Fat::Fat32 => 0xb,
                },
                last: self.chs(self.size() / SECTOR - 1),
                start: U32::new(low(self.hidden)),
                sectors: U32::new(low(self.sectors())),
            },
            others: [0; 48],
            signature: SIGNATURE,
        }
    }

    fn chs(&self, sector: u64) -> Chs {
        let (track, sector) = (sector / self.track_sectors, sector % self.track_sectors + 1);
        let (cylinder, head) = (track / self.heads, track % self.heads);
        [low(head) as u8, (low(sector) | low(cylinder) >> 8 << 6) as u8, low(cylinder) as u8]
    }

    fn boot_sector(&self, label: &[u8; 11], root: u64) -> Vec<u8> {
        let half = |value: u64| U16::new(u16::try_from(value).unwrap_or(0));
        let (fat32, sectors) = (self.fat == Fat::Fat32, self.sectors());
        let few = sectors <= u64::from(u16::MAX);
        let boot = Boot {
            jump: [0xeb, if fat32 { 0x58 } else { 0x3e }, 0x90],
            system: *b"MSWIN4.1",
            sector_bytes: half(SECTOR),
            cluster_sectors: low(self.cluster_sectors) as u8,
            reserved: half(self.reserved),
            fats: 2,
            root_entries: half(self.root_sectors * SECTOR / ENTRY_BYTES as u64),
            few_sectors: half(if few { sectors } else { 0 }),
            media: self.media(),
            fat_sectors: half(if fat32 { 0 } else { self.fat_sectors }),
            track_sectors: half(self.track_sectors),
            heads: half(self.heads),
            hidden: U32::new(low(self.hidden)),
            sectors: U32::new(if few { 0 } else { low(sectors) }),
        };
        let boot32 = Boot32 {
            fat_sectors: U32::new(low(self.fat_sectors)),
            flags: U16::ZERO,
            version: U16::ZERO,
            root: U32::new(low(root)),
            free_space: U16::new(1),
            copy: U16::new(COPY),
            zeros: [0; 12],
        };
        let mut kind = *b"FAT     ";
        for (byte, letter) in kind.iter_mut().zip(self.name().bytes()) {
            *byte = letter;
        }
        let end = BootEnd {
            drive: if self.hidden > 0 { 0x80 } else { 0 },
            zero: 0,
            mark: 0x29,
            serial: U32::new(SERIAL),
            label: *label,
            kind,
        };
        let between = if fat32 { boot32.as_bytes() } else { &[] };
        [boot.as_bytes(), between, end.as_bytes()].concat()
    }

    /// What kind of medium it is; the first entry of the table says so too.
    pub fn media(&self) -> u8 {
        if self.hidden > 0 { 0xf8 } else { 0xf0 }
    }
}

/// Where FAT32 has a copy of its first sectors.
const COPY: u16 = 6;

/// The lower 32 bits, which are all of what lies on such a disk.
fn low(value: u64) -> u32 {
    (value & u64::from(u32::MAX)) as u32
}
