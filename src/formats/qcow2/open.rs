//! Opening: the header, the user's options, the data file, and what a writer has to put right first.

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

use serde_json::Value;

use crate::block::Notice;
use crate::block::check::{Check, Fix};
use crate::block::format::Related;
use crate::block::keys::{take_number, take_size, take_switch, take_text};
use crate::block::{BackingRef, Error, OpenRequest, OptionTree, Purpose, Result};

use super::ahead::Ahead;
use super::alloc::Allocator;
use super::crypt::{self, Unlocked};
use super::header::Qcow2Header;
use super::layout;
use super::tables::{Tables, default_bytes};
use super::{Qcow2Driver, bitmap, check, snapshot_table};

/// Opens a layer.
pub fn open(request: OpenRequest<'_>) -> Result<Qcow2Driver> {
    let OpenRequest { file, options, purpose, secrets, related, .. } = request;
    let checks = matches!(purpose, Purpose::Check | Purpose::Repair);
    let mut header = if checks { Qcow2Header::read_damaged(&file) } else { Qcow2Header::read(&file) }?;
    let geometry = header.geometry();
    if !purpose.takes_damaged() && header.fields.incompatible & layout::CORRUPT != 0 {
        return Err(Error::corrupt("qcow2: Image is corrupt; cannot be opened read/write"));
    }
    let cache_bytes = cache_bytes(options, &header)?;
    check_tuning(options, &header)?;
    check_lazy(options, &header)?;
    let Unlocked { luks, key, cipher } = crypt::unlock(options, &header, &file, purpose, secrets)?;
    let external = header.fields.incompatible & layout::DATA_FILE != 0;
    let mut files = vec![file];
    if !purpose.only_looks() {
        match (&header.data_file, external) {
            (Some(name), true) => files.push(related.open("data-file", name)?),
            (None, true) => return Err(Error::invalid("'data-file' is required for this image")),
            (_, false) if header.fields.autoclear & layout::DATA_FILE_RAW != 0 => {
                return Err(Error::corrupt("data-file-raw requires a data file"));
            }
            (_, false) => {}
        }
    }
    let storage = &files[0].storage;
    let snapshots = match checks {
        true => check::readable_snapshots(&files[0], &header),
        false => snapshot_table::read_table(&files[0], &header)?,
    };
    if header.has_stale_bitmaps() {
        let text = match header.fields.version {
            2 => {
                "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent \
                 bitmap support; so now they must all be considered inconsistent"
            }
            _ => "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent",
        };
        related.notice(Notice::Warning(text.to_owned()));
        let text = "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.";
        related.notice(Notice::Line(text.to_owned()));
    }
    let bitmaps = bitmap::read_directory(&files[0], &header, checks)?;
    // The guest's disk has whole sectors; what a header says beyond them is not there.
    header.fields.size -= header.fields.size % layout::SECTOR;
    let backing = header.backing_file.as_ref().map(|name| BackingRef {
        name: name.clone(),
        format: header.backing_format.clone(),
        elsewhere: Vec::new(),
    });
    let driver = Qcow2Driver {
        tables: Tables::new(storage.clone(), &files[0].name, cache_bytes),
        files,
        geometry,
        external,
        encrypted: header.fields.crypt_method != layout::CRYPT_NONE,
        cipher,
        compression: header.fields.compression_type,
        header: RwLock::new(header),
        alloc: Mutex::new(Allocator::default()),
        places: Mutex::default(),
        snapshots: RwLock::new(snapshots),
        bitmaps: RwLock::new(bitmaps),
        luks,
        key,
        backing,
        keeps_zeros: AtomicBool::new(false),
        write: purpose.writes(),
        host_holes: OnceLock::new(),
        told_corrupt: AtomicBool::new(false),
        ahead: Ahead::default(),
    };
    if purpose.mends() {
        driver.make_ready(related)?;
    }
    Ok(driver)
}

impl Qcow2Driver {
    /// What must be put right before anything is written.
    fn make_ready(&self, related: &dyn Related) -> Result<()> {
        let (incompatible, stale) = {
            let header = self.header();
            (header.fields.incompatible, header.is_stale())
        };
        if incompatible & layout::DIRTY != 0 {
            self.repair(related)?;
            self.update_header(|header| header.fields.incompatible &= !layout::DIRTY)?;
        }
        if stale {
            self.update_header(Qcow2Header::clear_stale)?;
        }
        Ok(())
    }

    /// What an unclean end left behind is found, told and mended as by a check; what a check leaves wrong has its
    /// refcounts made right all the same.
    fn repair(&self, related: &dyn Related) -> Result<()> {
        super::repair::refuse_what_cannot_be_repaired(self)?;
        let lines = Mutex::new(Vec::new());
        let checked = self.check(Fix::All, &|line: &str| {
            lines.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
        });
        let lines = lines.into_inner().unwrap_or_else(PoisonError::into_inner);
        lines.into_iter().for_each(|line| related.notice(Notice::Line(line)));
        let report = checked?;
        if report.corruptions > 0 || report.check_errors > 0 {
            super::repair::rebuild(self)?;
        }
        Ok(())
    }

    /// Another layer of the same files, read-only.
    pub(super) fn view(&self, header: Qcow2Header) -> Self {
        Self {
            tables: Tables::new(self.file().storage.clone(), &self.file().name, default_bytes(&self.geometry)),
            files: self.files.clone(),
            geometry: self.geometry,
            external: self.external,
            encrypted: self.encrypted,
            cipher: self.cipher.clone(),
            compression: self.compression,
            header: RwLock::new(header),
            alloc: Mutex::new(Allocator::default()),
            places: Mutex::default(),
            snapshots: RwLock::default(),
            bitmaps: RwLock::new(self.bitmap_list()),
            luks: self.luks.clone(),
            key: self.key.clone(),
            backing: self.backing.clone(),
            keeps_zeros: AtomicBool::new(false),
            write: false,
            host_holes: OnceLock::new(),
            told_corrupt: AtomicBool::new(false),
            ahead: Ahead::default(),
        }
    }
}

fn cache_bytes(options: &mut OptionTree, header: &Qcow2Header) -> Result<u64> {
    let total = take_size(options, "cache-size")?;
    let l2 = take_size(options, "l2-cache-size")?;
    let refcounts = take_size(options, "refcount-cache-size")?;
    match (total, l2, refcounts) {
        (Some(_), Some(_), Some(_)) => {
            let text = "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time";
            return Err(Error::invalid(text));
        }
        (Some(total), Some(l2), _) if l2 > total => {
            return Err(Error::invalid("l2-cache-size may not exceed cache-size"));
        }
        (Some(total), _, Some(refcounts)) if refcounts > total => {
            return Err(Error::invalid("refcount-cache-size may not exceed cache-size"));
        }
        _ => {}
    }
    let asked = total.or_else(|| Some(l2?.saturating_add(refcounts.unwrap_or(0))));
    // A bound, not a wish: more than the tables of the largest image is never needed.
    Ok(asked.unwrap_or(default_bytes(&header.geometry())).min(1 << 30))
}

/// Lazy refcounts allow updates to be late. Ours never are, so there is nothing to do but to refuse what the
/// reference refuses.
fn check_lazy(options: &mut OptionTree, header: &Qcow2Header) -> Result<()> {
    let on = take_switch(options, "lazy-refcounts")?;
    let on = on.unwrap_or(header.fields.compatible & layout::LAZY_REFCOUNTS != 0);
    if on && header.fields.version < 3 {
        let text = "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level";
        return Err(Error::invalid(text));
    }
    Ok(())
}

/// Options that say how a virtual machine's long use of the image is served: they change nothing in one command.
/// Their values are checked all the same.
fn check_tuning(options: &mut OptionTree, header: &Qcow2Header) -> Result<()> {
    if let Some(bytes) = take_size(options, "l2-cache-entry-size")? {
        let cluster = header.geometry().cluster_size();
        if !bytes.is_power_of_two() || !(512..=cluster).contains(&bytes) {
            return Err(Error::invalid(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
            )));
        }
    }
    if take_number(options, "cache-clean-interval")?.is_some_and(|seconds| u32::try_from(seconds).is_err()) {
        return Err(Error::invalid("Cache clean interval too big"));
    }
    let overall = take_text(options, "overlap-check");
    let template = take_inner(options, "overlap-check", "template");
    if let (Some(overall), Some(template)) = (&overall, &template)
        && overall != template
    {
        return Err(Error::invalid(format!(
            "Conflicting values for qcow2 options 'overlap-check' ('{overall}') and 'overlap-check.template' \
             ('{template}')"
        )));
    }
    if let Some(value) = overall.or(template)
        && !["none", "constant", "cached", "all"].contains(&value.as_str())
    {
        return Err(Error::invalid(format!(
            "Unsupported value '{value}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, \
             constant, cached, all"
        )));
    }
    for table in OVERLAP_CHECKS {
        take_switch(options, &format!("overlap-check.{table}"))?;
    }
    for key in ["pass-discard-request", "pass-discard-snapshot", "pass-discard-other"] {
        take_switch(options, key)?;
    }
    if take_switch(options, "discard-no-unref")? == Some(true) && header.fields.version < 3 {
        return Err(Error::invalid("discard-no-unref is only supported since qcow2 version 3"));
    }
    Ok(())
}

/// Tables that a write is checked against. All of them are, whatever is asked for.
const OVERLAP_CHECKS: [&str; 9] = [
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
];

/// Takes an option of a group, be its key dotted or nested.
fn take_inner(options: &mut OptionTree, group: &str, key: &str) -> Option<String> {
    if let Some(text) = take_text(options, &format!("{group}.{key}")) {
        return Some(text);
    }
    let Some(Value::Object(inner)) = options.get_mut(group) else { return None };
    let text = take_text(inner, key);
    if inner.is_empty() {
        options.shift_remove(group);
    }
    text
}
