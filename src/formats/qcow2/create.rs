//! New images: options, refusals in the reference's order, and the layout of the first clusters.
//!
//! Header, refcount table, refcount block, L1 table; then what `preallocation=` lays out. Everything is planned first
//! and written in one pass.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use crate::block::error::Context;
use crate::block::measure::Measure;
use crate::block::{
    Create, CreateOptions, CreateRequest, Effort, Error, ErrorKind, HostOffset, OptionKind, OptionSpec, OptionTree,
    Result, SecretBytes,
};
use crate::crypto::luks::{LuksPlan, NewVolume};
use crate::crypto::spec::GENERATORS;
use crate::crypto::{CipherAlgorithm, CipherMode, HashAlgorithm};
use crate::formats::effort;
use crate::formats::encryption::{self, KEY_SECRET};
use crate::formats::luks_header::{luks_plan, new_volume};
use crate::storage::{Preallocation, Storage};

use super::Qcow2;
use super::crypt;
use super::entry::L1Entry;
use super::geometry::{ClusterIndex, Geometry};
use super::header::Qcow2Header;
use super::layout::{self, ENTRY, HeaderFields, MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFCOUNT_ORDER};
use super::plan::{ImagePlan, Planner};
use super::prealloc::{self, Layout};

/// The methods of compression.
const COMPRESSION_TYPES: [&str; 2] = ["zlib", "zstd"];

/// The words for a version.
pub(super) const LEVELS: [&str; 4] = ["0.10", "1.1", "v2", "v3"];

/// In the order of the `Formatting` line.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new(
        "encryption",
        OptionKind::Switch,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    OptionSpec::new("encrypt.format", OptionKind::Text, "Encrypt the image, format choices: 'aes', 'luks'")
        .among(&["aes", "luks"]),
    OptionSpec::new("encrypt.key-secret", OptionKind::Text, "ID of secret providing qcow AES key or LUKS passphrase"),
    OptionSpec::new("encrypt.cipher-alg", OptionKind::Text, "Name of encryption cipher algorithm")
        .among(&CipherAlgorithm::NAMES),
    OptionSpec::new("encrypt.cipher-mode", OptionKind::Text, "Name of encryption cipher mode")
        .among(&CipherMode::NAMES),
    OptionSpec::new("encrypt.ivgen-alg", OptionKind::Text, "Name of IV generator algorithm").among(&GENERATORS),
    OptionSpec::new("encrypt.ivgen-hash-alg", OptionKind::Text, "Name of IV generator hash algorithm")
        .among(&HashAlgorithm::NAMES),
    OptionSpec::new("encrypt.hash-alg", OptionKind::Text, "Name of encryption hash algorithm")
        .among(&HashAlgorithm::NAMES),
    OptionSpec::new("encrypt.iter-time", OptionKind::Number, "Time to spend in PBKDF in milliseconds"),
    OptionSpec::new("cluster_size", OptionKind::Size, "qcow2 cluster size").or("65536"),
    OptionSpec::new("extended_l2", OptionKind::Switch, "Extended L2 tables").or("off"),
    OptionSpec::new(
        "preallocation",
        OptionKind::Text,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    )
    .among(&Preallocation::NAMES),
    OptionSpec::new("compression_type", OptionKind::Text, "Compression method used for image cluster compression")
        .or("zlib")
        .among(&COMPRESSION_TYPES),
    effort::LEVEL,
    effort::WINDOW,
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new("compat", OptionKind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])").among(&LEVELS),
    OptionSpec::new("backing_file", OptionKind::Name, "File name of a base image"),
    OptionSpec::new("backing_fmt", OptionKind::Text, "Image format of the base image"),
    OptionSpec::new("data_file", OptionKind::Name, "File name of an external data file").makes_file(),
    OptionSpec::new("data_file_raw", OptionKind::Switch, "The external data file must stay valid as a raw image"),
    OptionSpec::new("lazy_refcounts", OptionKind::Switch, "Postpone refcount updates").or("off"),
    OptionSpec::new("refcount_bits", OptionKind::Number, "Width of a reference count entry in bits").or("16"),
];

/// What the options say, decided.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Decided {
    geometry: Geometry,
    size: u64,
    fill: Preallocation,
    zstd: bool,
    lazy: bool,
    data_file_raw: bool,
    backing: Option<(OsString, Option<String>)>,
    encrypted: Option<Encryption>,
    /// The passphrase for it.
    key: Option<SecretBytes>,
}

/// What an image shall be encrypted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encryption {
    Aes,
    Luks(LuksPlan),
}

impl Create for Qcow2 {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn compresses(&self) -> bool {
        true
    }

    fn effort(&self, options: &CreateOptions, compress: bool) -> Result<Effort> {
        super::codec::effort(options, compress)
    }

    fn encrypts(&self, options: &CreateOptions) -> bool {
        encryption::is_asked_for(options)
    }

    fn open_options(&self, options: &CreateOptions) -> OptionTree {
        encryption::open_options(options)
    }

    fn measuring(&self) -> Option<&dyn Measure> {
        Some(self)
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        let options = request.options;
        encryption::check_alias(options)?;
        let file = request.files.main()?;
        let data = match options.name("data_file") {
            Some(name) => Some(request.files.named(name)?),
            None => None,
        };
        let decided = decide(request)?;
        let (data, name) = data.unzip();
        let volume = match (decided.encrypted, &decided.key) {
            (Some(Encryption::Luks(plan)), Some(key)) => {
                Some(new_volume(&plan, request.ids.uuid("luks"), key, request.secrets)?)
            }
            _ => None,
        };
        write(&decided, name, &file, data.as_ref(), volume.as_ref())
    }
}

/// An enumeration's value, or the reference's refusal (which names the key as its own interface does).
fn choice<'a, T>(key: &str, value: &'a str, of: impl FnOnce(&'a str) -> Option<T>) -> Result<T> {
    of(value).ok_or_else(|| Error::invalid(format!("Parameter '{key}' does not accept value '{value}'")))
}

/// Every check, in the reference's order.
fn decide(request: &CreateRequest<'_>) -> Result<Decided> {
    let (options, size) = (request.options, request.size);
    let too_large =
        || Error::new(ErrorKind::TooLarge, "Could not resize image: Failed to grow the L1 table: File too large");
    let newer = |what: &str| {
        Err(Error::invalid(format!("{what} compatibility level 1.1 and above (use version=v3 or greater)")))
    };
    let size = size.checked_next_multiple_of(layout::SECTOR).ok_or_else(too_large)?;
    let version = choice("version", options.text("compat").unwrap_or("v3"), |value| match value {
        "0.10" | "v2" => Some(2),
        "1.1" | "v3" => Some(3),
        _ => None,
    })?;
    let encrypted = encryption(options)?;
    let fill = choice("preallocation", options.text("preallocation").unwrap_or("off"), Preallocation::parse)?;
    let zstd = choice("compression-type", options.text("compression_type").unwrap_or("zlib"), |value| {
        COMPRESSION_TYPES.contains(&value).then_some(value == "zstd")
    })?;
    let extended = options.switch("extended_l2");
    if extended && version < 3 {
        return newer("Extended L2 entries are only supported with");
    }
    let cluster = options.number("cluster_size").unwrap_or(0);
    let cluster_bits = cluster.trailing_zeros();
    if !cluster.is_power_of_two() || !(layout::MIN_CLUSTER_BITS..=layout::MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return Err(Error::invalid("Cluster size must be a power of two between 512 and 2048k"));
    }
    if extended && cluster < 16384 {
        return Err(Error::invalid(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ));
    }
    let backing_file = options.name("backing_file");
    if backing_file.is_some() && fill != Preallocation::Off && !extended {
        return Err(Error::invalid(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ));
    }
    let backing_format = options.text("backing_fmt");
    if backing_format.is_some() && backing_file.is_none() {
        return Err(Error::invalid("Backing format cannot be used without backing file"));
    }
    let lazy = options.switch("lazy_refcounts");
    if lazy && version < 3 {
        return newer("Lazy refcounts only supported with");
    }
    let bits = options.number("refcount_bits").unwrap_or(0);
    if !bits.is_power_of_two() || bits > 1 << MAX_REFCOUNT_ORDER {
        return Err(Error::invalid("Refcount width must be a power of two and may not exceed 64 bits"));
    }
    if version < 3 && bits != 16 {
        return Err(Error::invalid(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ));
    }
    let (data_file, data_file_raw) = (options.name("data_file").is_some(), options.switch("data_file_raw"));
    if data_file_raw && !data_file {
        return Err(Error::invalid("data-file-raw requires data-file"));
    }
    if data_file_raw && backing_file.is_some() {
        return Err(Error::invalid("Backing file and data-file-raw cannot be used at the same time"));
    }
    if data_file && version < 3 {
        return newer("External data files are only supported with");
    }
    if zstd && version < 3 {
        return newer("Non-zlib compression type is only supported with");
    }
    let geometry = Geometry { version, cluster_bits, refcount_order: bits.trailing_zeros(), extended };
    if i64::try_from(size).is_err() || geometry.l1_entries_for(size) > MAX_L1_BYTES / ENTRY {
        return Err(too_large());
    }
    if let Some(name) = backing_file
        && name.len() as u64 > u64::from(MAX_BACKING_NAME)
    {
        return Err(unassignable(name, backing_format, "Invalid argument"));
    }
    // Without LUKS nothing but data is encrypted with it, yet whoever makes an image knows that it is there.
    let key = encrypted.map(|_| encryption::new_key(request)).transpose()?;
    // A raw data file can be told from the image alone only if every cluster has its place.
    let fill = if data_file_raw && fill == Preallocation::Off { Preallocation::Metadata } else { fill };
    let backing = backing_file.map(|name| (name.to_owned(), backing_format.map(str::to_owned)));
    Ok(Decided { geometry, size, fill, zstd, lazy, data_file_raw, backing, encrypted, key })
}

pub(super) fn encryption(options: &CreateOptions) -> Result<Option<Encryption>> {
    let Some(format) = encryption::format(options)? else { return Ok(None) };
    if format == "aes" {
        encryption::only(options, &["encrypt.format", KEY_SECRET])?;
        return Ok(Some(Encryption::Aes));
    }
    choice("format", format, |value| (value == "luks").then_some(()))?;
    Ok(Some(Encryption::Luks(luks_plan(options, "encrypt.")?)))
}

fn unassignable(name: &OsStr, format: Option<&str>, why: &str) -> Error {
    let name = name.display();
    let format = format.map_or_else(String::new, |format| format!(" with format '{format}'"));
    Error::invalid(format!("Could not assign backing file '{name}'{format}: {why}"))
}

/// Plans the image and writes it.
fn write(
    decided: &Decided,
    data_file: Option<OsString>,
    file: &Arc<dyn Storage>,
    data: Option<&Arc<dyn Storage>>,
    volume: Option<&NewVolume>,
) -> Result<()> {
    let Decided { geometry, size, fill, .. } = *decided;
    let cluster = geometry.cluster_size();
    let l1_entries = geometry.l1_entries_for(size);
    let mut planner = Planner::new(ImagePlan::new(geometry, Arc::clone(file), ClusterIndex(3)));
    let l1 =
        if l1_entries > 0 { geometry.offset_of(planner.allocate((l1_entries * ENTRY).div_ceil(cluster))?) } else { 0 };
    if fill != Preallocation::Off {
        let layout = Layout { geometry, size, data_file: data.is_some(), fill };
        prealloc::preallocate(&mut planner, file, &layout)?;
    }
    if let Some(data) = data {
        fill_data_file(&**data, size, decided.geometry.subcluster_size(), fill)?;
    }
    let crypto = volume.map(|volume| crypt::place(&mut planner, geometry, volume)).transpose()?;
    planner.plan.write_refcounts()?;
    let mut table: Vec<u8> = Vec::new();
    for at in &planner.l1 {
        table.extend_from_slice(&L1Entry::own(HostOffset(geometry.offset_of(*at))).0.to_be_bytes());
    }
    table.resize(usize::try_from(l1_entries * ENTRY).map_err(|_| Error::invalid("L1 table is too large"))?, 0);
    planner.plan.out().put(l1, &table)?;
    let (refcount_table, refcount_table_clusters) = planner.plan.table();
    let mut header = Qcow2Header { crypto, ..header(decided, data_file) };
    header.fields.l1_size = u32::try_from(l1_entries).map_err(|_| Error::invalid("L1 table is too large"))?;
    header.fields.l1_table_offset = l1;
    header.fields.refcount_table_offset = geometry.offset_of(refcount_table);
    header.fields.refcount_table_clusters =
        u32::try_from(refcount_table_clusters).map_err(|_| Error::invalid("Refcount table is too large"))?;
    let mut bytes = header.to_bytes().map_err(|error| match &decided.backing {
        Some((name, format)) => unassignable(name, format.as_deref(), "No space left on device"),
        None => error,
    })?;
    bytes.resize(usize::try_from(cluster).unwrap_or(bytes.len()), 0);
    planner.plan.out().put(0, &bytes)?;
    planner.plan.out().finish()?;
    file.flush().context("Could not write qcow2 header")
}

fn header(decided: &Decided, data_file: Option<OsString>) -> Qcow2Header {
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    let (backing_file, backing_format) = match &decided.backing {
        Some((name, format)) => (Some(name.clone()), format.clone()),
        None => (None, None),
    };
    Qcow2Header {
        fields: HeaderFields {
            version: decided.geometry.version,
            cluster_bits: decided.geometry.cluster_bits,
            size: decided.size,
            crypt_method: match decided.encrypted {
                None => layout::CRYPT_NONE,
                Some(Encryption::Aes) => layout::CRYPT_AES,
                Some(Encryption::Luks(_)) => layout::CRYPT_LUKS,
            },
            incompatible: flag(data_file.is_some(), layout::DATA_FILE)
                | flag(decided.zstd, layout::COMPRESSION)
                | flag(decided.geometry.extended, layout::EXTENDED_L2),
            compatible: flag(decided.lazy, layout::LAZY_REFCOUNTS),
            autoclear: flag(decided.data_file_raw, layout::DATA_FILE_RAW),
            refcount_order: decided.geometry.refcount_order,
            compression_type: if decided.zstd { layout::ZSTD } else { layout::ZLIB },
            ..HeaderFields::default()
        },
        backing_file,
        backing_format,
        data_file,
        ..Qcow2Header::default()
    }
}

/// Gives the external data file its length: the disk's, or up to the end of its last subcluster (or cluster) if that has a place.
fn fill_data_file(data: &dyn Storage, size: u64, unit: u64, fill: Preallocation) -> Result<()> {
    let how = if fill == Preallocation::Metadata { Preallocation::Off } else { fill };
    data.set_len(size, how).context("Could not resize data file")?;
    let end = if fill == Preallocation::Off { size } else { size.next_multiple_of(unit) };
    let (at, len) = match how {
        _ if end > size => (size, end - size),
        // The reference allocates the first block of a sparse file, for the sake of probing alignment.
        Preallocation::Off if !data.facts().fixed_len => (0, size.min(if size < 4096 { layout::SECTOR } else { 4096 })),
        _ => (0, 0),
    };
    if len > 0 {
        let zeros = vec![0; usize::try_from(len).unwrap_or(0)];
        data.write_at(at, &zeros).context("Could not resize data file")?;
    }
    data.flush().context("Could not resize data file")
}
