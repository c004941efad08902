//! qcow2 images to damage, where their tables are, and how they are damaged.

use std::fs;

use fastrand::Rng;

use crate::common::Scratch;

/// An image to damage.
pub struct Base {
    /// Its file.
    pub name: &'static str,
    options: &'static str,
    snapshots: u32,
    bitmaps: u32,
    compressed: bool,
    /// An external data file is beside it.
    beside: bool,
}

const fn base(name: &'static str, options: &'static str) -> Base {
    Base { name, options, snapshots: 0, bitmaps: 0, compressed: false, beside: false }
}

/// All of them. (None has snapshots and bitmaps: a repair by qemu-img forgets the snapshots then.)
pub const BASES: &[Base] = &[
    base("p512", "cluster_size=512"),
    base("p4096", "cluster_size=4k"),
    base("p64k", "cluster_size=64k"),
    base("v512", "cluster_size=512,compat=v2"),
    base("v64k", "cluster_size=64k,compat=v2"),
    Base { compressed: true, ..base("c512", "cluster_size=512") },
    Base { compressed: true, ..base("c64k", "cluster_size=64k") },
    Base { snapshots: 2, ..base("s512", "cluster_size=512") },
    Base { snapshots: 2, ..base("s4096", "cluster_size=4k") },
    Base { snapshots: 2, ..base("s64k", "cluster_size=64k,compat=v2") },
    base("r1", "cluster_size=1k,refcount_bits=1"),
    base("r2", "cluster_size=1k,refcount_bits=2"),
    Base { snapshots: 2, ..base("r8", "cluster_size=1k,refcount_bits=8") },
    base("r32", "cluster_size=1k,refcount_bits=32"),
    base("r64", "cluster_size=1k,refcount_bits=64"),
    base("x16k", "cluster_size=16k,extended_l2=on"),
    Base { compressed: true, snapshots: 1, ..base("x64k", "cluster_size=64k,extended_l2=on") },
    Base { bitmaps: 2, ..base("b4096", "cluster_size=4k") },
    Base { bitmaps: 2, ..base("b64k", "cluster_size=64k") },
    Base { beside: true, ..base("d4096", "cluster_size=4k,data_file=data") },
    Base { snapshots: 1, ..base("lazy", "cluster_size=4k,lazy_refcounts=on") },
    base("m2", "cluster_size=2M"),
];

/// Makes them all.
pub fn make_bases(scratch: &Scratch) {
    for base in BASES {
        let name = base.name;
        scratch.judge(&["create", "-q", "-f", "qcow2", "-o", base.options, name, "4M"]);
        let mut commands = vec!["write 4k 12k", "write 2M 8k", "write -z 64k 16k", "write 1M 100k"];
        if base.compressed {
            commands.extend(["write -c 512k 128k", "write -c 3M 64k", "write 3328k 64k"]);
        }
        scratch.qemu_io("qcow2", name, &commands);
        for n in 0..base.snapshots {
            scratch.judge(&["snapshot", "-c", &format!("s{n}"), name]);
            scratch.qemu_io("qcow2", name, &[&format!("write -P {n} {}k 8k", n * 8)]);
        }
        for n in 0..base.bitmaps {
            let granularity = (512u32 << (7 * n)).to_string();
            scratch.judge(&["bitmap", "--add", "-g", &granularity, name, &format!("b{n}")]);
            scratch.qemu_io("qcow2", name, &[&format!("write {}k 64k", n * 16)]);
        }
    }
}

/// The number at an offset; what is past the end is zeros.
pub fn get(bytes: &[u8], at: u64, width: usize) -> u64 {
    (0..width).fold(0, |word, n| word << 8 | u64::from(bytes.get(at as usize + n).copied().unwrap_or(0)))
}

/// Writes a number over what is there; the image grows if it must.
pub fn put(bytes: &mut Vec<u8>, at: u64, width: usize, value: u64) {
    let at = at as usize;
    bytes.resize(bytes.len().max(at + width), 0);
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// What a field is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Header,
    L1,
    SnapshotL1,
    L2,
    Subclusters,
    RefcountTable,
    Refcount,
    Snapshot,
    Bitmaps,
    Bitmap,
    BitmapTable,
}

#[derive(Debug, Clone, Copy)]
struct Field {
    kind: Kind,
    at: u64,
    width: usize,
}

/// Where the tables of a sound image are.
pub struct Tables {
    cluster_bits: u32,
    order: u32,
    refcount_blocks: Vec<u64>,
    snapshots: Vec<u64>,
    /// The active L1 table.
    pub l1: u64,
    /// L2 tables, the active ones first.
    pub l2s: Vec<u64>,
    fields: Vec<Field>,
}

impl Tables {
    /// Of an image.
    pub fn of(bytes: &[u8]) -> Self {
        let cluster_bits = get(bytes, 20, 4) as u32;
        let cluster = 1u64 << cluster_bits;
        let v3 = get(bytes, 4, 4) >= 3;
        let (extended, order) = if v3 { (get(bytes, 72, 8) & 16 != 0, get(bytes, 96, 4) as u32) } else { (false, 4) };
        let l1 = get(bytes, 40, 8);
        let mut tables = Self {
            cluster_bits,
            order,
            refcount_blocks: Vec::new(),
            snapshots: Vec::new(),
            l1,
            l2s: Vec::new(),
            fields: Vec::new(),
        };
        for (at, width) in [(36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8)] {
            // Snapshots that there are not lie in the header, and are forgotten where qemu-img writes that anew.
            if at != 60 || get(bytes, 60, 4) > 0 {
                tables.field(Kind::Header, at, width);
            }
        }
        if v3 {
            for at in [72, 80, 88] {
                tables.field(Kind::Header, at, 8);
            }
        }
        tables.l1(bytes, l1, get(bytes, 36, 4), Kind::L1);
        let mut at = get(bytes, 64, 8);
        for _ in 0..get(bytes, 60, 4) {
            tables.snapshots.push(at);
            for (offset, width) in [(0, 8), (8, 4), (12, 2), (36, 4)] {
                tables.field(Kind::Snapshot, at + offset, width);
            }
            tables.l1(bytes, get(bytes, at, 8), get(bytes, at + 8, 4), Kind::SnapshotL1);
            let len = 40 + get(bytes, at + 36, 4) + get(bytes, at + 12, 2) + get(bytes, at + 14, 2);
            at = (at + len).next_multiple_of(8);
        }
        let entry = if extended { 16 } else { 8 };
        let entries = cluster / entry;
        for l2 in tables.l2s.clone() {
            for index in 0..entries {
                // Those in use, and some that are not.
                if get(bytes, l2 + entry * index, 8) != 0 || index % (entries / 16) == 0 {
                    tables.field(Kind::L2, l2 + entry * index, 8);
                    if extended {
                        tables.field(Kind::Subclusters, l2 + entry * index + 8, 8);
                    }
                }
            }
        }
        tables.refcounts(bytes);
        tables.bitmaps(bytes);
        tables
    }

    fn field(&mut self, kind: Kind, at: u64, width: usize) {
        self.fields.push(Field { kind, at, width });
    }

    fn l1(&mut self, bytes: &[u8], at: u64, entries: u64, kind: Kind) {
        for index in 0..entries {
            self.field(kind, at + 8 * index, 8);
            let l2 = get(bytes, at + 8 * index, 8) & OFFSET;
            if l2 != 0 && !self.l2s.contains(&l2) {
                self.l2s.push(l2);
            }
        }
    }

    fn refcounts(&mut self, bytes: &[u8]) {
        let (table, cluster) = (get(bytes, 48, 8), 1u64 << self.cluster_bits);
        let per_block = (cluster * 8) >> self.order;
        for index in 0..get(bytes, 56, 4) * cluster / 8 {
            let block = get(bytes, table + 8 * index, 8);
            if block != 0 || index < 3 {
                self.field(Kind::RefcountTable, table + 8 * index, 8);
            }
            if block == 0 {
                continue;
            }
            self.refcount_blocks.push(block);
            for n in (0..per_block).filter(|n| index * per_block + n < bytes.len() as u64 / cluster + 4) {
                let (at, width) = if self.order < 3 {
                    (n >> (3 - self.order), 1)
                } else {
                    (n << (self.order - 3), 1 << (self.order - 3))
                };
                self.field(Kind::Refcount, block + at, width);
            }
        }
    }

    fn bitmaps(&mut self, bytes: &[u8]) {
        let head = &bytes[..1 << self.cluster_bits];
        let extension = [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24];
        let Some(found) = head.windows(8).position(|window| window == extension) else { return };
        let at = found as u64 + 8;
        for (offset, width) in [(0, 4), (8, 8), (16, 8)] {
            self.field(Kind::Bitmaps, at + offset, width);
        }
        let (mut entry, len) = (get(bytes, at + 16, 8), get(bytes, at + 8, 8));
        let end = entry + len;
        while entry < end {
            for (offset, width) in [(0, 8), (8, 4), (12, 4)] {
                self.field(Kind::Bitmap, entry + offset, width);
            }
            for index in 0..get(bytes, entry + 8, 4) {
                self.field(Kind::BitmapTable, get(bytes, entry, 8) + 8 * index, 8);
            }
            entry = (entry + 24 + get(bytes, entry + 18, 2)).next_multiple_of(8);
        }
    }

    /// Where a cluster's refcount is, if it has at least 8 bits and lies in the first block.
    pub fn refcount(&self, cluster: u64) -> u64 {
        self.refcount_blocks[0] + (cluster << (self.order - 3))
    }
}

/// An image with something wrong.
pub struct Damaged {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What was changed.
    pub what: String,
    /// A file beside it belongs to it.
    pub beside: bool,
    /// It has bitmaps.
    pub bitmaps: bool,
}

impl Damaged {
    /// A base with one to three fields written over, or cut short.
    pub fn random(scratch: &Scratch, seed: u64) -> Self {
        let base = &BASES[(seed % BASES.len() as u64) as usize];
        let mut bytes = fs::read(scratch.file(base.name)).unwrap();
        let tables = Tables::of(&bytes);
        let mut kinds: Vec<Kind> = tables.fields.iter().map(|field| field.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let mut rng = Rng::with_seed(seed);
        let mut what = format!("{}, options {}", base.name, base.options);
        for _ in 0..[1, 1, 1, 1, 2, 2, 3][rng.usize(..7)] {
            let kind = kinds[rng.usize(..kinds.len())];
            let fields: Vec<&Field> = tables.fields.iter().filter(|field| field.kind == kind).collect();
            let field = *fields[rng.usize(..fields.len())];
            let value = value(&mut rng, &tables, &bytes, field);
            put(&mut bytes, field.at, field.width, value);
            what += &format!("; {field:?} = {value:#x}");
        }
        if rng.u32(..20) == 0 {
            let len = rng.usize(bytes.len() / 2..bytes.len());
            bytes.truncate(len);
            what += &format!("; cut at {len}");
        }
        Self { bytes, what, beside: base.beside, bitmaps: base.bitmaps > 0 }
    }
}

/// What a field is written over with.
fn value(rng: &mut Rng, tables: &Tables, bytes: &[u8], field: Field) -> u64 {
    let (len, cluster) = (bytes.len() as u64, 1u64 << tables.cluster_bits);
    let place = rng.u64(..(len / cluster).max(1)) * cluster;
    let old = get(bytes, field.at, field.width);
    let most = u64::MAX >> (64 - 8 * field.width);
    let bit = 1 << rng.u32(..64);
    let sectors = 62 - (tables.cluster_bits - 8);
    let mut of = |list: &[u64]| list[rng.usize(..list.len())] & most;
    let random = of(&[0x9e37_79b9_7f4a_7c15, 0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210, 0x00ff_00ff_0000_0001]);
    let entry = [
        place,
        place | COPIED,
        old ^ COPIED,
        old ^ bit,
        old | 512,
        (len - len % cluster) | COPIED,
        (len + 5 * cluster) | COPIED,
        0,
        1 << 40 | COPIED,
        old ^ 1,
        old ^ 513,
        old.wrapping_add(cluster),
    ];
    match (field.kind, field.at, field.width) {
        (Kind::Refcount, ..) => of(&[0, 1, 2, 3, old.wrapping_add(1), old.saturating_sub(1), most, random]),
        (Kind::Header, 36 | 56 | 60, _) => of(&[0, 1, 2, old + 1, old.saturating_sub(1), 17, 40]),
        (Kind::Header, 72, _) => of(&[old ^ 1, old ^ 2, old ^ 3]),
        (Kind::Header, 80, _) => old ^ 1,
        // A bit that it does not know makes qemu-img write the header anew: without snapshots, when it repairs.
        (Kind::Header, 88, _) if tables.snapshots.is_empty() => of(&[old ^ 1, old ^ 4]),
        (Kind::Header, 88, _) => old ^ 1,
        (Kind::Header, ..) => of(&[place, place, 0, len / cluster * cluster, 1 << 30, place + 512]),
        (Kind::Snapshot, _, 8) => of(&[place, place | 512, 0, 1 << 30]),
        (Kind::Snapshot, ..) => of(&[0, 1, 8, 16, 24, 25, 100, 1025, old + 8, 1 << 31]),
        (Kind::Bitmaps | Kind::Bitmap, _, 4) => of(&[0, 1, 2, 3, old ^ 1, old + 1]),
        (Kind::Subclusters, ..) => of(&[0, 0xffff_ffff, 0xffff_ffff << 32, random, u64::MAX, 1, 1 << 32, old ^ bit]),
        (Kind::RefcountTable, ..) => {
            let more = [place | 1, old | 1, old | 256];
            of(&[&entry[..], &more].concat())
        }
        (Kind::L2, ..) => {
            let more = [
                COMPRESSED | place | 5 << sectors,
                COMPRESSED | COPIED | place,
                1,
                1 | place | 512,
                place | 512 | COPIED,
                COMPRESSED | (len - 512) | 3 << sectors,
                random,
                COPIED,
                2,
            ];
            of(&[&entry[..], &more].concat())
        }
        _ => of(&entry),
    }
}

/// Numbers to write over others: offset, width, value.
type Pokes = Vec<(u64, usize, u64)>;

/// Damages of an image that are mended wholly, each of another kind.
pub fn mendable(honest: &[u8], tables: &Tables) -> Vec<(&'static str, Vec<u8>)> {
    let bits = tables.cluster_bits;
    let l2 = tables.l2s[0];
    let entry = (0..).find(|n| get(honest, l2 + 8 * n, 8) & OFFSET != 0).unwrap();
    let data = get(honest, l2 + 8 * entry, 8);
    let free = (0..).find(|n| get(honest, l2 + 8 * n, 8) == 0).unwrap();
    let table = get(honest, 48, 8);
    let mut all: Vec<(&str, Pokes)> = vec![
        ("leaks", vec![(tables.refcount((data & OFFSET) >> bits), 2, 9), (tables.refcount(tables.l1 >> bits), 2, 2)]),
        ("two entries for one cluster", vec![(l2 + 8 * free, 8, data)]),
        ("a cluster in use without a refcount", vec![(tables.refcount((data & OFFSET) >> bits), 2, 0)]),
        ("an L2 table without a refcount, dirty", vec![(tables.refcount(l2 >> bits), 2, 0), (79, 1, 1)]),
        ("no refcount block", vec![(table, 8, 0)]),
        ("no refcount table", vec![(56, 4, 0)]),
        ("a refcount block with reserved bits, and marked as corrupt", vec![(table + 7, 1, 1), (79, 1, 2)]),
        ("a misaligned refcount block", vec![(table, 8, get(honest, table, 8) | 1 << (bits - 1))]),
        ("marks", vec![(l2 + 8 * entry, 8, data ^ COPIED), (tables.l1, 8, get(honest, tables.l1, 8) ^ COPIED)]),
    ];
    if bits > 9 {
        all.push(("a misaligned zeroed cluster", vec![(l2 + 8 * free, 8, (data & OFFSET) | 512 | 1)]));
        all.retain(|(what, _)| !what.starts_with("a misaligned refcount"));
        all.push(("a misaligned refcount block", vec![(table, 8, get(honest, table, 8) | 512)]));
    } else {
        all.retain(|(what, _)| !what.starts_with("a misaligned refcount"));
    }
    if !tables.snapshots.is_empty() {
        let count = get(honest, 60, 4);
        all.push(("more snapshots than there are entries", vec![(60, 4, count + 2)]));
    }
    if bits > 9 {
        // There it is one entry that says little.
        all.push(("a snapshot table in the refcount table", vec![(60, 4, 1), (64, 8, table)]));
        all.push(("the same, and leaks", vec![(60, 4, 1), (64, 8, table), (tables.refcount(tables.l1 >> bits), 2, 2)]));
    }
    let pokes = |list: Pokes| {
        let mut bytes = honest.to_vec();
        for (at, width, value) in list {
            put(&mut bytes, at, width, value);
        }
        bytes
    };
    all.into_iter().map(|(what, list)| (what, pokes(list))).collect()
}
