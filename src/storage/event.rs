//! What is about to be done with a file: for whoever makes errors at such moments, and for servers, which are asked for
//! much at once where it is known that much will be read.
//!
//! The names are those of the reference's published interface (QAPI, `BlkdebugEvent`).

/// What is about to be done. It is announced to the file in which it happens, or starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A moment in the life of an image.
    Moment(Moment),
    /// Whoever says so is going to read these bytes, each of them once and from the first to the last.
    Reads {
        /// Where they start.
        at: u64,
        /// How many there are.
        len: u64,
    },
}

/// A moment that has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment(usize);

/// Every name there is.
const NAMES: [&str; 48] = [
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
    "none",
];

/// The event with that name: a name that is in no list does not compile.
const fn named(name: &str) -> Event {
    let mut n = 0;
    while n < NAMES.len() {
        if same(NAMES[n].as_bytes(), name.as_bytes()) {
            return Event::Moment(Moment(n));
        }
        n += 1;
    }
    panic!("no such event")
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut n = 0;
    while n < a.len() && n < b.len() && a[n] == b[n] {
        n += 1;
    }
    n == a.len() && n == b.len()
}

/// Those that have their moment here; the others never come.
impl Event {
    /// A filter is made.
    pub const NONE: Event = const { named("none") };
    /// Guest data is read as it is stored.
    pub const READ_AIO: Event = const { named("read_aio") };
    /// Guest data is read from the backing file.
    pub const READ_BACKING_AIO: Event = const { named("read_backing_aio") };
    /// A compressed unit is read.
    pub const READ_COMPRESSED: Event = const { named("read_compressed") };
    /// Guest data is written.
    pub const WRITE_AIO: Event = const { named("write_aio") };
    /// Compressed units are written.
    pub const WRITE_COMPRESSED: Event = const { named("write_compressed") };
    /// What lies around a write in a new unit is read.
    pub const COW_READ: Event = const { named("cow_read") };
    /// What lies around a write in a new unit is written.
    pub const COW_WRITE: Event = const { named("cow_write") };
    /// An L2 table, or a part of one, is read.
    pub const L2_LOAD: Event = const { named("l2_load") };
    /// L2 entries are written.
    pub const L2_UPDATE: Event = const { named("l2_update") };
    /// L1 entries are written.
    pub const L1_UPDATE: Event = const { named("l1_update") };
    /// The refcount table is read.
    pub const REFTABLE_LOAD: Event = const { named("reftable_load") };
    /// Entries of the refcount table are written.
    pub const REFTABLE_UPDATE: Event = const { named("reftable_update") };
    /// A refcount block, or a part of one, is read.
    pub const REFBLOCK_LOAD: Event = const { named("refblock_load") };
    /// A part of a refcount block is written.
    pub const REFBLOCK_UPDATE_PART: Event = const { named("refblock_update_part") };
    /// Clusters are looked for.
    pub const CLUSTER_ALLOC: Event = const { named("cluster_alloc") };
    /// Room for a compressed unit is looked for.
    pub const CLUSTER_ALLOC_BYTES: Event = const { named("cluster_alloc_bytes") };
    /// Clusters are given back.
    pub const CLUSTER_FREE: Event = const { named("cluster_free") };
    /// What a driver keeps in memory is written out.
    pub const FLUSH_TO_OS: Event = const { named("flush_to_os") };
    /// A file is brought to stable storage.
    pub const FLUSH_TO_DISK: Event = const { named("flush_to_disk") };
    /// A filter gets data to write.
    pub const PWRITEV: Event = const { named("pwritev") };
    /// A filter gets zeros to write.
    pub const PWRITEV_ZERO: Event = const { named("pwritev_zero") };
    /// A filter has written.
    pub const PWRITEV_DONE: Event = const { named("pwritev_done") };
    /// A filter gets a write that starts within a block.
    pub const PWRITEV_RMW_HEAD: Event = const { named("pwritev_rmw_head") };
    /// It has looked at that block.
    pub const PWRITEV_RMW_AFTER_HEAD: Event = const { named("pwritev_rmw_after_head") };
    /// A filter gets a write that ends within a block.
    pub const PWRITEV_RMW_TAIL: Event = const { named("pwritev_rmw_tail") };
    /// It has looked at that block.
    pub const PWRITEV_RMW_AFTER_TAIL: Event = const { named("pwritev_rmw_after_tail") };

    /// The event with that name, if there is one.
    pub fn parse(name: &str) -> Option<Self> {
        NAMES.iter().position(|known| *known == name).map(|n| Event::Moment(Moment(n)))
    }
}
