//! Space-efficient sparse extents (`SESPARSE`), the snapshots of vSphere 6.5 and later: read only.
//!
//! The layout is not published; field places and entry bits here were found by building extents and watching how
//! the reference maps them. All numbers are little-endian 64-bit, offsets and sizes in sectors.
//!
//! | place | meaning |
//! |---|---|
//! | header 0 | magic `0xcafebabe` |
//! | header 1 | version 2.1 |
//! | header 2 | capacity |
//! | header 3 | grain size: 8 |
//! | header 4 | grain table size: 64, so 4096 entries |
//! | header 10 | volatile header: offset |
//! | header 16, 17 | grain directory: offset, size |
//! | header 18, 19 | grain tables: offset, size |
//! | header 24, 25 | grains: offset, size |
//! | volatile header 0 | magic `0xcafecafe` |
//! | volatile header 3 | journal must be replayed |
//! | directory entry | top nibble 1: allocated, low 32 bits: number of the table |
//! | table entry | top nibble 0 or 1: nothing or unmapped, 2: zeros, 3: allocated; bits 48-59 are the low 12 bits of the grain's number, bits 0-47 the high ones |
//!
//! Lock order: the cache of tables alone; only metadata is read under it.

use std::sync::{Arc, Mutex};

use byteorder::{ByteOrder, LittleEndian as LE};

use crate::block::error::Context;
use crate::block::{Error, FileEnd, Result};
use crate::formats::table::TableCache;
use crate::storage::Storage;

use super::layout::{MAX_TABLES, SECTOR};
use super::sparse::Grain;

const MAGIC: u64 = 0xcafe_babe;
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
const VERSION: u64 = 0x0000_0002_0000_0001;
const GRAIN: u64 = 8 * SECTOR;
const GTES: u64 = 4096;
const READING: &str = "Could not read the metadata of a seSparse extent";
/// Bytes of directory and tables that are kept.
const CACHED: usize = 1 << 20;

/// One extent.
#[derive(Debug)]
pub struct SeSparse {
    storage: Arc<dyn Storage>,
    gd_at: u64,
    /// Entries of the directory: as many as it has, and the extent's length needs.
    gd_entries: u64,
    tables_at: u64,
    tables: u64,
    grains_at: u64,
    cache: Mutex<TableCache>,
    end: FileEnd,
}

fn corrupt(what: &str) -> Error {
    Error::corrupt(format!("seSparse extent: {what}"))
}

fn words<const N: usize>(storage: &dyn Storage, sector: u64) -> Result<[u64; N]> {
    let at = sector.checked_mul(SECTOR).ok_or_else(|| corrupt("offset past every end"))?;
    let mut bytes = vec![0; N * 8];
    storage.read_at(at, &mut bytes).context(READING)?;
    let mut words = [0; N];
    LE::read_u64_into(&bytes, &mut words);
    Ok(words)
}

impl SeSparse {
    /// Bytes in a grain.
    pub const GRAIN: u64 = GRAIN;

    /// Reads both headers and the directory.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let header: [u64; 64] = words(&*storage, 0)?;
        if header[0] != MAGIC {
            return Err(corrupt("no magic number at its start"));
        }
        if header[1] != VERSION {
            return Err(Error::unsupported(format!("seSparse extent: unsupported version {:#x}", header[1])));
        }
        if header[3] != GRAIN / SECTOR || header[4] != GTES * 8 / SECTOR {
            return Err(Error::unsupported("seSparse extent: grains of 8 and tables of 64 sectors are expected"));
        }
        let volatile: [u64; 8] = words(&*storage, header[10])?;
        if volatile[0] != VOLATILE_MAGIC {
            return Err(corrupt("no magic number in the volatile header"));
        }
        if volatile[3] != 0 {
            return Err(Error::unsupported("seSparse extent: its journal must be replayed first"));
        }
        let needed = header[2].div_ceil(8 * GTES);
        if needed > MAX_TABLES * 8 {
            return Err(corrupt("too many grain tables"));
        }
        let gd_at = header[16].checked_mul(SECTOR).ok_or_else(|| corrupt("offset past every end"))?;
        let gd_entries = header[17].saturating_mul(SECTOR / 8).min(needed);
        let cache = Mutex::new(TableCache::new(CACHED));
        Ok(Self {
            gd_at,
            gd_entries,
            tables_at: header[18],
            tables: header[19] / 64,
            grains_at: header[24],
            storage,
            cache,
            end: FileEnd::default(),
        })
    }

    fn word(&self, cache: &mut TableCache, at: u64) -> Result<u64> {
        self.end.require(&*self.storage, "an entry of a table", at, 8)?;
        let mut word = [0; 8];
        cache.read(&*self.storage, at, &mut word).context(READING)?;
        Ok(u64::from_le_bytes(word))
    }

    /// The directory's entry for that table; 0 past its end.
    fn directory(&self, cache: &mut TableCache, index: u64) -> Result<u64> {
        if index >= self.gd_entries { Ok(0) } else { self.word(cache, self.gd_at.saturating_add(index * 8)) }
    }

    fn entry(&self, cache: &mut TableCache, grain: u64) -> Result<Grain> {
        let table = match self.directory(cache, grain / GTES)? {
            0 => return Ok(Grain::Unallocated),
            entry if entry >> 32 == 0x1000_0000 => entry & 0xffff_ffff,
            entry => return Err(corrupt(&format!("invalid directory entry {entry:#x}"))),
        };
        if table >= self.tables {
            return Err(corrupt(&format!("there is no grain table {table}")));
        }
        let at = self.tables_at.checked_add(table * 64).and_then(|sector| sector.checked_mul(SECTOR));
        let at = at.ok_or_else(|| corrupt("offset past every end"))?;
        let entry = self.word(cache, at.saturating_add(grain % GTES * 8))?;
        match entry >> 60 {
            0 if entry == 0 => Ok(Grain::Unallocated),
            1 => Ok(Grain::Unallocated),
            2 => Ok(Grain::Zeroed),
            3 => {
                let number = ((entry >> 48) & 0xfff) | ((entry & 0xffff_ffff_ffff) << 12);
                let sector = number.checked_mul(8).and_then(|n| n.checked_add(self.grains_at));
                sector.filter(|n| *n < u64::MAX / SECTOR).map(Grain::At).ok_or_else(|| corrupt("grain past every end"))
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
                (Grain::At(a), Grain::At(b)) => a + (end / GRAIN - grain) * 8 == b,
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
