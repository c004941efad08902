//! What `info` can show of one layer.

use serde_json::{Map, Value};

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotInfo {
    /// Unique id, in practice a decimal number.
    pub id: String,
    /// Name given by the user.
    pub name: String,
    /// Size of the saved machine state, in bytes.
    pub vm_state_size: u64,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// The guest's clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instruction count, if recorded.
    pub icount: Option<u64>,
}

/// What `info` shows of a layer beyond name, format and size.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ImageInfo {
    /// The allocation unit, where the format shows one.
    pub cluster_size: Option<u64>,
    /// Whether the data is encrypted.
    pub encrypted: bool,
    /// Whether the image was not closed cleanly; `None` where the format does not know.
    pub dirty: Option<bool>,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// Other files that the image names, beside its backing file: which part each plays, and its name.
    pub references: Vec<(&'static str, String)>,
    /// The format's own facts: the name of the kind, and its members (in any order: printing orders them).
    pub specific: Option<(&'static str, Map<String, Value>)>,
}

impl ImageInfo {
    /// That of a format which has no more to tell than its allocation unit, and no mark of not being closed.
    pub fn plain(cluster_size: Option<u64>) -> Self {
        Self { cluster_size, dirty: Some(false), ..Self::default() }
    }
}
