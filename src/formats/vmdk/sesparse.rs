//! Space-efficient sparse extents (`SESPARSE`), the snapshots of vSphere 6.5 and later: read only.
//!
//! Lock order: the cache of tables alone; only metadata is read under it.

use std::sync::{Arc, Mutex};

use crate::block::{Error, FileEnd, Result};
use crate::formats::table::TableCache;
use crate::storage::Storage;

use super::layout::*;
use super::tables::Grain;

const GRAIN: u64 = SESPARSE_GRAIN_SECTORS.bytes();
const GTES: u64 = SESPARSE_GTES;
const TABLE: Sectors = Sectors::holding(GTES * 8);
/// Bytes of directory and tables that are kept.
const CACHED: usize = 1 << 20;

/// One extent.
#[derive(Debug)]
pub struct SeSparse {
    storage: Arc<dyn Storage>,
    gd_at: u64,
    /// Entries of the directory: as many as it has, and the extent's length needs.
    gd_entries: u64,
    tables_at: Sectors,
    tables: u64,
    grains_at: Sectors,
    cache: Mutex<TableCache>,
    end: FileEnd,
}

fn corrupt(what: &str) -> Error {
    Error::corrupt(format!("seSparse extent: {what}"))
}

impl SeSparse {
    /// Bytes in a grain.
    pub const GRAIN: u64 = GRAIN;
    /// Bytes of the disk behind one table.
    pub const SPAN: u64 = GRAIN * GTES;

    /// Reads both headers and the directory.
    pub fn open(name: &str, storage: Arc<dyn Storage>) -> Result<Self> {
        let header: SeSparseHeader = read(&*storage, name, "the header", 0)?;
        if header.magic.get() != SESPARSE_MAGIC {
            return Err(corrupt("no magic number at its start"));
        }
        let version = header.version.get();
        if version != SESPARSE_VERSION {
            return Err(Error::unsupported(format!("seSparse extent: unsupported version {version:#x}")));
        }
        if header.grain_sectors.get() != SESPARSE_GRAIN_SECTORS || header.table_sectors.get() != TABLE {
            return Err(Error::unsupported("seSparse extent: grains of 8 and tables of 64 sectors are expected"));
        }
        let past = || corrupt("offset past every end");
        let volatile_at = header.volatile_at.get().checked_bytes().ok_or_else(past)?;
        let volatile: SeSparseVolatile = read(&*storage, name, "the volatile header", volatile_at)?;
        if volatile.magic.get() != SESPARSE_VOLATILE_MAGIC {
            return Err(corrupt("no magic number in the volatile header"));
        }
        if volatile.replay.get() != 0 {
            return Err(Error::unsupported("seSparse extent: its journal must be replayed first"));
        }
        let needed = header.capacity.get().0.div_ceil((SESPARSE_GRAIN_SECTORS * GTES).0);
        if needed > MAX_TABLES * 8 {
            return Err(corrupt("too many grain tables"));
        }
        let gd_at = header.gd_at.get().checked_bytes().ok_or_else(past)?;
        let gd_entries = (header.gd_sectors.get().bytes() / 8).min(needed);
        let cache = Mutex::new(TableCache::new(CACHED, name, "the tables"));
        Ok(Self {
            gd_at,
            gd_entries,
            tables_at: header.tables_at.get(),
            tables: header.tables_sectors.get().0 / TABLE.0,
            grains_at: header.grains_at.get(),
            storage,
            cache,
            end: FileEnd::default(),
        })
    }

    fn word(&self, cache: &mut TableCache, at: u64) -> Result<u64> {
        self.end.require(&*self.storage, "an entry of a table", at, 8)?;
        let mut word = [0; 8];
        cache.read(&*self.storage, at, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// The directory's entry for that table; 0 past its end.
    fn directory(&self, cache: &mut TableCache, index: u64) -> Result<u64> {
        if index >= self.gd_entries { Ok(0) } else { self.word(cache, self.gd_at.saturating_add(index * 8)) }
    }

    /// The number of a directory entry's grain table, and its place in bytes; `None` where there is none.
    fn table_of(&self, cache: &mut TableCache, index: u64) -> Result<Option<(u64, u64)>> {
        let table = match self.directory(cache, index)? {
            0 => return Ok(None),
            entry if entry >> 32 == 0x1000_0000 => entry & 0xffff_ffff,
            entry => return Err(corrupt(&format!("invalid directory entry {entry:#x}"))),
        };
        if table >= self.tables {
            return Err(corrupt(&format!("there is no grain table {table}")));
        }
        let at = (self.tables_at + TABLE * table).checked_bytes();
        Ok(Some((table, at.ok_or_else(|| corrupt("offset past every end"))?)))
    }

    /// The number of a directory entry's grain table, all of which lies in the file; `None` where there is none.
    pub fn table(&self, index: u64) -> Result<Option<u64>> {
        let mut cache = self.cache.lock().unwrap_or_else(|e| e.into_inner());
        let Some((table, at)) = self.table_of(&mut cache, index)? else { return Ok(None) };
        self.end.require(&*self.storage, "a grain table", at, GTES * 8)?;
        Ok(Some(table))
    }

    fn entry(&self, cache: &mut TableCache, grain: u64) -> Result<Grain> {
        let Some((_, at)) = self.table_of(cache, grain / GTES)? else { return Ok(Grain::Unallocated) };
        let entry = self.word(cache, at.saturating_add(grain % GTES * 8))?;
        match entry >> 60 {
            0 if entry == 0 => Ok(Grain::Unallocated),
            1 => Ok(Grain::Unallocated),
            2 => Ok(Grain::Zeroed),
            3 => {
                let number = ((entry >> 48) & 0xfff) | ((entry & 0xffff_ffff_ffff) << 12);
                let sector = SESPARSE_GRAIN_SECTORS * number + self.grains_at;
                let known = sector.checked_bytes().map(|_| Grain::At(sector));
                known.ok_or_else(|| corrupt("grain past every end"))
            }
            _ => Err(corrupt(&format!("invalid table entry {entry:#x}"))),
        }
    }

    /// As [`Sparse::map`](super::sparse::Sparse::map).
    pub fn map(&self, at: u64, max: u64) -> Result<(Grain, u64)> {
        let mut cache = self.cache.lock().unwrap_or_else(|e| e.into_inner());
        let grain = at / GRAIN;
        let first = self.entry(&mut cache, grain)?;
        let mut end = (grain + 1) * GRAIN;
        while end - at < max {
            if first == Grain::Unallocated && end.is_multiple_of(GRAIN * GTES) {
                let table = end / GRAIN / GTES;
                if table >= self.gd_entries {
                    end = at.saturating_add(max);
                    break;
                }
                if matches!(self.directory(&mut cache, table), Ok(0)) {
                    end += GRAIN * GTES;
                    continue;
                }
            }
            // An error is for those who ask for what comes next.
            let Ok(next) = self.entry(&mut cache, end / GRAIN) else { break };
            let goes_on = match (first, next) {
                (Grain::At(a), Grain::At(b)) => a + SESPARSE_GRAIN_SECTORS * (end / GRAIN - grain) == b,
                (a, b) => a == b,
            };
            if !goes_on {
                break;
            }
            end += GRAIN;
        }
        Ok((first, (end - at).min(max)))
    }
}
