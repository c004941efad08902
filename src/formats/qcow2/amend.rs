//! Options of an image that is there: its version, the width of its refcounts, lazy refcounts, the name of its data file,
//! its key slots.
//!
//! All that is asked for is decided, and refused where it cannot be, before anything is written. Then it is done step by
//! step: what a step needs new is written to free clusters, and flushed; one write of the header changes over. An image
//! that stops at any write has done some of the steps, each of them wholly or not at all.
//!
//! Source: specification, sections "Header", "Additional fields", "Snapshots". The texts of the refusals are the
//! reference's, as far as it refuses the same.

use std::ffi::OsString;
use std::sync::RwLock;

use crate::block::driver::{Amend, AmendRequest};
use crate::block::error::Context;
use crate::block::{BlockDriver, CreateOptions, Error, OptionKind, OptionSpec, OptionValue, Resize, Result};
use crate::formats::luks_slots::{self, ENCRYPT_OPTIONS, HeaderPlace, SlotChange};
use crate::storage::Preallocation;

use super::Qcow2Driver;
use super::create::LEVELS;
use super::header::Qcow2Header;
use super::layout::{self, CRYPT_LUKS, CRYPT_NONE, MAX_REFCOUNT_ORDER, SNAPSHOT_EXTRA, V2_REFCOUNT_ORDER};
use super::snapshot_table::{SNAPSHOT_TABLE, Snapshot, table_bytes};

/// In the order in which they are looked at.
pub const OPTIONS: &[OptionSpec] = &[
    ENCRYPT_OPTIONS[0],
    ENCRYPT_OPTIONS[1],
    ENCRYPT_OPTIONS[2],
    ENCRYPT_OPTIONS[3],
    ENCRYPT_OPTIONS[4],
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new("compat", OptionKind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])").among(&LEVELS),
    OptionSpec::new("backing_file", OptionKind::Name, "File name of a base image"),
    OptionSpec::new("backing_fmt", OptionKind::Text, "Image format of the base image"),
    OptionSpec::new("data_file", OptionKind::Name, "File name of an external data file"),
    OptionSpec::new("data_file_raw", OptionKind::Switch, "The external data file must stay valid as a raw image"),
    OptionSpec::new("lazy_refcounts", OptionKind::Switch, "Postpone refcount updates"),
    OptionSpec::new("refcount_bits", OptionKind::Number, "Width of a reference count entry in bits"),
];

/// The prefix of the options about encryption.
const ENCRYPT: &str = "encrypt.";

/// What is asked for, decided.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Amendment {
    /// The version that it has in the end.
    version: u32,
    /// log2 of the refcount width.
    order: u32,
    lazy: Option<bool>,
    /// The data file's name; nothing inside takes it away.
    data_file: Option<Option<OsString>>,
    data_file_raw: Option<bool>,
    size: Option<u64>,
}

fn invalid<T>(text: &str) -> Result<T> {
    Err(Error::invalid(text))
}

fn switch(options: &CreateOptions, name: &str) -> Option<bool> {
    options.given(name).map(|_| options.switch(name))
}

impl Qcow2Driver {
    /// Reads the options, in their order.
    fn amendment(&self, options: &CreateOptions) -> Result<Amendment> {
        let fields = self.header().fields;
        if luks_slots::given(options, ENCRYPT) && fields.crypt_method != CRYPT_LUKS {
            return match fields.crypt_method {
                CRYPT_NONE => invalid("Can't amend encryption options - encryption not present"),
                _ => invalid("Only LUKS encryption options can be amended"),
            };
        }
        let version = match options.text("compat") {
            None => fields.version,
            Some("0.10" | "v2") => 2,
            Some("1.1" | "v3") => 3,
            Some(other) => return Err(Error::invalid(format!("Unknown compatibility level {other}"))),
        };
        let data_file = options.name("data_file").map(|name| (!name.is_empty()).then(|| name.to_owned()));
        if data_file.is_some() && !self.external {
            return invalid("data-file can only be set for images that use an external data file");
        }
        let data_file_raw = switch(options, "data_file_raw");
        if data_file_raw == Some(true) && fields.autoclear & layout::DATA_FILE_RAW == 0 {
            return invalid("data-file-raw cannot be set on existing images");
        }
        let order = match options.number("refcount_bits") {
            None => self.geometry.refcount_order,
            Some(bits) if bits.is_power_of_two() && bits <= 1 << MAX_REFCOUNT_ORDER => bits.trailing_zeros(),
            Some(_) => return invalid("Refcount width must be a power of two and may not exceed 64 bits"),
        };
        let size = match options.given("size") {
            // 0 stands for the size that it has.
            Some(OptionValue::Size(size)) if *size > 0 => Some(*size),
            _ => None,
        };
        Ok(Amendment { version, order, lazy: switch(options, "lazy_refcounts"), data_file, data_file_raw, size })
    }

    /// Refuses what cannot be.
    fn check_amendment(&self, wanted: &Amendment, options: &CreateOptions) -> Result<()> {
        if !self.write {
            return Err(Error::unsupported("Block node is read-only"));
        }
        let version = wanted.version.max(self.geometry.version);
        let other = ![self.geometry.refcount_order, V2_REFCOUNT_ORDER].contains(&wanted.order);
        if other && wanted.version < 3 {
            return invalid(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
            );
        }
        self.check_backing(options)?;
        if wanted.lazy == Some(true) && wanted.version < 3 {
            return invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
            );
        }
        let header = self.begun_header(wanted);
        header.to_bytes()?;
        let begun = self.again(header);
        if let Some(size) = wanted.size {
            if i64::try_from(size).is_err() {
                return invalid("Image size cannot be negative");
            }
            Resize::check(&begun, size, Preallocation::Off)?;
        }
        if wanted.version < version {
            begun.check_downgrade(wanted)?;
        }
        match wanted.order < self.geometry.refcount_order {
            true => self.check_width(wanted.order),
            false => Ok(()),
        }
    }

    /// A backing file is told only to say that it is the one that is there.
    fn check_backing(&self, options: &CreateOptions) -> Result<()> {
        let (file, format) = (options.name("backing_file"), options.text("backing_fmt"));
        let header = self.header();
        let same = file == header.backing_file.as_deref() && format == header.backing_format.as_deref();
        if same || (file.is_none() && format.is_none()) {
            return Ok(());
        }
        Err(Error::invalid("Cannot amend the backing file").hint("You can use 'qemu-img rebase' instead."))
    }

    fn check_downgrade(&self, wanted: &Amendment) -> Result<()> {
        let fields = self.header().fields;
        let size = wanted.size.unwrap_or(fields.size);
        if wanted.order != V2_REFCOUNT_ORDER {
            return invalid("compat=0.10 requires refcount_bits=16");
        }
        if self.external {
            return invalid("Cannot downgrade an image with a data file");
        }
        // A version 2 entry need not say more than the disk's size at all times, and a state of 32 bits.
        let apart = |one: &Snapshot| {
            one.disk_size().is_some_and(|disk| disk != size) || u32::try_from(one.vm_state_size()).is_err()
        };
        if self.snapshot_list().iter().any(apart) {
            return invalid("Internal snapshots prevent downgrade of image");
        }
        let features = fields.incompatible & !layout::COMPRESSION;
        if features != 0 {
            return Err(Error::invalid(format!(
                "Cannot downgrade an image with incompatible features {features:#x} set"
            )));
        }
        if !self.bitmap_list().is_empty() {
            let hint = "Version 2 has none: remove them first, with the subcommand bitmap.";
            return Err(Error::invalid("Persistent bitmaps prevent downgrade of image").hint(hint));
        }
        if fields.compression_type != layout::ZLIB && self.has_compressed()? {
            return invalid("Cannot downgrade an image with zstd compression type and existing compressed clusters");
        }
        self.finished_header(self.header().clone(), wanted).to_bytes().map(|_| ())
    }

    /// The header after the first part.
    fn begun_header(&self, wanted: &Amendment) -> Qcow2Header {
        let mut header = self.header().clone();
        let fields = &mut header.fields;
        if wanted.version > fields.version {
            fields.version = wanted.version;
            (fields.incompatible, fields.compatible, fields.autoclear) = (0, 0, 0);
            fields.refcount_order = V2_REFCOUNT_ORDER;
            // What version 2 says of bitmaps nobody has kept.
            header.bitmaps = None;
        }
        let put = |bits: &mut u64, bit: u64, on: Option<bool>| match on {
            Some(true) => *bits |= bit,
            Some(false) => *bits &= !bit,
            None => {}
        };
        put(&mut fields.compatible, layout::LAZY_REFCOUNTS, wanted.lazy);
        put(&mut fields.autoclear, layout::DATA_FILE_RAW, wanted.data_file_raw);
        if let Some(name) = &wanted.data_file {
            header.data_file.clone_from(name);
        }
        header
    }

    /// The header in the end, but for where refcounts are.
    fn finished_header(&self, mut header: Qcow2Header, wanted: &Amendment) -> Qcow2Header {
        header.fields.refcount_order = wanted.order;
        if wanted.version < header.fields.version {
            header.fields.version = wanted.version;
            (header.fields.incompatible, header.fields.compatible, header.fields.autoclear) = (0, 0, 0);
            header.fields.compression_type = layout::ZLIB;
            header.extra.clear();
            header.bitmaps = None;
        }
        header
    }

    /// The layer with that header, which the file has by now, or is going to have.
    fn again(&self, header: Qcow2Header) -> Self {
        let geometry = header.geometry();
        Self {
            write: self.write,
            geometry,
            compression: header.fields.compression_type,
            snapshots: RwLock::new(self.snapshot_list()),
            ..self.view(header)
        }
    }

    /// The first header write: everything that needs no table but that of the snapshots.
    fn begin_header(&self, wanted: &Amendment) -> Result<()> {
        let mut header = self.begun_header(wanted);
        if header == *self.header() {
            return Ok(());
        }
        let mut alloc = self.lock_alloc();
        let old = header.fields;
        let list = self.snapshot_list();
        // Version 3 asks for what entries of version 2 may lack.
        let lacking = old.version > self.geometry.version && list.iter().any(|one| one.extra.len() < SNAPSHOT_EXTRA);
        if lacking {
            self.before_resize(&mut alloc)?;
            let bytes = table_bytes(&list, old.size)?;
            header.fields.snapshots_offset = self.put_bytes(&mut alloc, SNAPSHOT_TABLE, &bytes)?;
            self.settle(&mut alloc)?;
            self.set_snapshot_list(list.iter().map(|one| one.completed(old.size)).collect::<Result<_>>()?);
        }
        self.file().storage.flush().context("Could not flush")?;
        self.update_header(|now| {
            // A table of refcounts may have become longer for the snapshots'.
            let (at, clusters) = (now.fields.refcount_table_offset, now.fields.refcount_table_clusters);
            (header.fields.refcount_table_offset, header.fields.refcount_table_clusters) = (at, clusters);
            *now = header;
        })?;
        self.file().storage.flush().context("Could not write qcow2 header")?;
        if lacking {
            let len: u64 = list.iter().map(Snapshot::bytes).sum();
            self.free_bytes(&mut alloc, old.snapshots_offset, len);
        }
        self.settle(&mut alloc)
    }
}

impl Amend for Qcow2Driver {
    fn begin(&self, request: &AmendRequest<'_>) -> Result<Option<Box<dyn BlockDriver>>> {
        let wanted = self.amendment(request.options)?;
        let crypto = self.header().crypto.map(|(at, len)| HeaderPlace { storage: &*self.file().storage, at, len });
        let keys = match crypto.filter(|_| luks_slots::given(request.options, ENCRYPT)) {
            Some(place) => {
                let change = SlotChange::decide(request, ENCRYPT, &self.file().name, &place)?;
                let key = self.key.as_ref().ok_or_else(|| Error::unsupported("Block node is read-only"))?;
                Some((change, place, key))
            }
            None => None,
        };
        self.check_amendment(&wanted, request.options)?;
        self.begin_header(&wanted)?;
        if let Some((change, place, key)) = keys {
            change.apply(&place, key.get())?;
        }
        let header = self.header().clone();
        Ok((header.geometry() != self.geometry).then(|| Box::new(self.again(header)) as _))
    }

    fn finish(&self, request: &AmendRequest<'_>) -> Result<()> {
        let wanted = self.amendment(request.options)?;
        let mut alloc = self.lock_alloc();
        let older = wanted.version < self.geometry.version;
        if older {
            self.expand_zeros(&mut alloc, request.progress)?;
        }
        if wanted.order != self.geometry.refcount_order {
            return self.change_width(&mut alloc, wanted.order, request.progress, |header| {
                *header = self.finished_header(header.clone(), &wanted);
            });
        }
        if !older {
            return Ok(());
        }
        self.settle(&mut alloc)?;
        self.file().storage.flush().context("Could not flush")?;
        self.update_header(|header| *header = self.finished_header(header.clone(), &wanted))?;
        self.file().storage.flush().context("Could not write qcow2 header")
    }
}
