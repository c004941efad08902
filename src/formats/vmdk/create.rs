//! Making a new vmdk: the subformat decides which files there are and how each is laid out.
//!
//! Decided first (a [`VmdkCreatePlan`]), written later. The bytes are the reference's, but for the content id and for
//! stream-optimized images, which get the layout that VMware's importers insist on: header version 3 with the
//! grain directory at the end, a footer and an end-of-stream marker.
//!
//! Source: *Virtual Disk Format 5.0*; behaviour of the reference for sizes, names and texts.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use zerocopy::IntoBytes;

use crate::block::error::Context;
use crate::block::measure::Measure;
use crate::block::{Create, CreateOptions, CreateRequest, Effort, Error, FileOrder, OptionKind, OptionSpec, Result};
use crate::codec::deflate;
use crate::formats::effort;
use crate::storage::{Preallocation, Storage, Zeroing};

use super::Vmdk;
use super::descriptor::{self, Descriptor, NO_PARENT, NewDescriptor};
use super::layout::*;
use super::open::{embedded, read_text};
use super::sparse::Sparse;
use super::stream::tail;

/// The kinds of adapter; the first is the default.
const ADAPTERS: [&str; 4] = ["ide", "buslogic", "lsilogic", "legacyESX"];

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::new("size", OptionKind::Size, "Virtual disk size"),
    OptionSpec::new(
        "adapter_type",
        OptionKind::Text,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    )
    .among(&ADAPTERS),
    OptionSpec::new("backing_file", OptionKind::Name, "File name of a base image"),
    OptionSpec::new("backing_fmt", OptionKind::Text, "Must be 'vmdk' if present").among(&["vmdk"]),
    OptionSpec::new("compat6", OptionKind::Switch, "VMDK version 6 image").or("off"),
    OptionSpec::new("hwversion", OptionKind::Text, "VMDK hardware version").or("undefined"),
    OptionSpec::new("toolsversion", OptionKind::Text, "VMware guest tools version"),
    OptionSpec::new(
        "subformat",
        OptionKind::Text,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    )
    .among(&SUBFORMAT_NAMES),
    OptionSpec::new(
        "zeroed_grain",
        OptionKind::Switch,
        "Enable efficient zero writes using the zeroed-grain GTE feature",
    ),
    effort::LEVEL,
];

/// Bytes of an extent of a split image.
pub const SPLIT: u64 = 1 << 31;

/// What a subformat is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subformat {
    /// Its `createType`.
    pub name: &'static str,
    /// Split into files of 2 GiB.
    pub split: bool,
    /// Plain files.
    pub flat: bool,
    /// Stream-optimized.
    pub compressed: bool,
}

/// Every subformat that can be created; the first is the default.
pub const SUBFORMATS: &[Subformat] = &[
    Subformat { name: "monolithicSparse", split: false, flat: false, compressed: false },
    Subformat { name: "monolithicFlat", split: false, flat: true, compressed: false },
    Subformat { name: "twoGbMaxExtentSparse", split: true, flat: false, compressed: false },
    Subformat { name: "twoGbMaxExtentFlat", split: true, flat: true, compressed: false },
    Subformat { name: "streamOptimized", split: false, flat: false, compressed: true },
];

const SUBFORMAT_NAMES: [&str; SUBFORMATS.len()] = {
    let (mut names, mut n) = ([""; SUBFORMATS.len()], 0);
    while n < names.len() {
        names[n] = SUBFORMATS[n].name;
        n += 1;
    }
    names
};

/// The one that the options name.
pub fn subformat(options: &CreateOptions) -> Result<Subformat> {
    let name = options.text("subformat").unwrap_or(SUBFORMATS[0].name);
    let known = SUBFORMATS.iter().find(|subformat| subformat.name == name);
    known.copied().ok_or_else(|| Error::invalid(format!("invalid parameter value: {name}")))
}

/// What the options put into the descriptor.
pub struct Words<'a> {
    /// `ddb.adapterType`.
    pub adapter: &'a str,
    /// `ddb.virtualHWVersion`.
    pub hardware: &'a str,
    /// `ddb.toolsVersion`.
    pub tools: &'a str,
}

impl<'a> Words<'a> {
    /// Refuses those that make no sense.
    pub fn of(options: &'a CreateOptions) -> Result<Self> {
        let adapter = options.text("adapter_type").unwrap_or("ide");
        let compat6 = options.switch("compat6");
        let hardware = match options.text("hwversion").unwrap_or("undefined") {
            "undefined" if compat6 => "6",
            "undefined" => "4",
            _ if compat6 => return Err(Error::invalid("compat6 cannot be enabled with hwversion set")),
            version => version,
        };
        if !ADAPTERS.contains(&adapter) {
            return Err(Error::invalid(format!("invalid parameter value: {adapter}")));
        }
        let tools = options.text("toolsversion").unwrap_or("2147483647");
        Ok(Self { adapter, hardware, tools })
    }
}

/// Everything decided.
struct VmdkCreatePlan<'a> {
    subformat: Subformat,
    size: u64,
    zeroed: bool,
    adapter: &'a str,
    hardware: &'a str,
    tools: &'a str,
    parent: Option<(&'a OsStr, u32)>,
}

impl<'a> VmdkCreatePlan<'a> {
    fn new(request: &CreateRequest<'a>) -> Result<Self> {
        let options = request.options;
        let Words { adapter, hardware, tools } = Words::of(options)?;
        let subformat = subformat(options)?;
        let zeroed = options.switch("zeroed_grain");
        let backing = options.name("backing_file").filter(|name| !name.is_empty());
        if subformat.flat && backing.is_some() {
            return Err(Error::invalid("Flat image can't have backing file"));
        }
        if subformat.flat && zeroed {
            return Err(Error::invalid("Flat image can't enable zeroed grain"));
        }
        if options.text("backing_fmt").is_some_and(|format| format != "vmdk") {
            return Err(Error::invalid("backing_file must be a vmdk image"));
        }
        let size = decide_size(&subformat, request.size)?;
        // What could not be read again is not written.
        let extents = match subformat.split || subformat.flat {
            true => Some(extent_name(request.files.name(), &subformat, 0)),
            false => None,
        };
        let written = [extents.as_deref(), backing];
        if let Some(name) = written.into_iter().flatten().find(|name| !descriptor::can_hold(name)) {
            return Err(Error::invalid(format!(
                "A vmdk descriptor cannot hold the file name '{}'",
                name.to_string_lossy().escape_default()
            )));
        }
        let parent = match backing {
            Some(name) => Some((name, parent_cid(request, name)?)),
            None => None,
        };
        Ok(Self { subformat, size, zeroed, adapter, hardware, tools, parent })
    }

    /// The sizes of the extents.
    fn extents(&self) -> Vec<u64> {
        if !self.subformat.split {
            return if self.size == 0 && self.subformat.flat { Vec::new() } else { vec![self.size] };
        }
        let full = usize::try_from(self.size / SPLIT).unwrap_or(0);
        let mut sizes = vec![SPLIT; full];
        if !self.size.is_multiple_of(SPLIT) {
            sizes.push(self.size % SPLIT);
        }
        sizes
    }
}

/// The content id of the parent, read from its descriptor.
fn parent_cid(request: &CreateRequest<'_>, name: &OsStr) -> Result<u32> {
    let not_vmdk = || Error::invalid("backing_file must be a vmdk image");
    let child = request.related.open("backing", name)?;
    let mut head = vec![0; 512];
    child.read_metadata("the header", 0, &mut head)?;
    let text = if head.starts_with(MAGIC) {
        let sparse = Sparse::open(&child.name, child.storage.clone(), &head).map_err(|_| not_vmdk())?;
        embedded(&sparse, &head)?.map(|(_, _, text)| text)
    } else {
        Some(read_text(&*child.storage, &child.name, 0, MAX_DESCRIPTOR)?).filter(|text| descriptor::is_one(text))
    };
    Ok(Descriptor::parse(&text.ok_or_else(not_vmdk)?).map_err(|_| not_vmdk())?.cid)
}

/// The size of a new disk in bytes.
pub fn decide_size(subformat: &Subformat, size: u64) -> Result<u64> {
    let size = size
        .checked_next_multiple_of(SECTOR)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| Error::invalid("The image size is too large"))?;
    let too_many = match (subformat.split, subformat.flat) {
        (true, _) => size.div_ceil(SPLIT) > MAX_EXTENTS as u64,
        (false, flat) => !flat && tables(size) > MAX_TABLES,
    };
    match too_many {
        true => Err(Error::invalid("The image size is too large for file format 'vmdk'")),
        false => Ok(size),
    }
}

/// Grain tables of an extent of that many bytes.
pub fn tables(size: u64) -> u64 {
    size.div_ceil(GRAIN_SECTORS.bytes() * u64::from(HOSTED_GTES))
}

/// The last component of a path, as bytes.
fn base(path: &OsStr) -> &[u8] {
    path.as_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default()
}

/// The name of extent `index` (from 0) beside the descriptor: `STEM-s001.EXT`, in the bytes of the descriptor's name.
pub fn extent_name(main: &OsStr, subformat: &Subformat, index: usize) -> OsString {
    let base = base(main);
    let dot = base.iter().rposition(|byte| *byte == b'.').unwrap_or(base.len());
    let (stem, extension) = base.split_at(dot);
    let number = match (subformat.split, subformat.flat) {
        (false, _) => "-flat".to_owned(),
        (true, true) => format!("-f{:03}", index + 1),
        (true, false) => format!("-s{:03}", index + 1),
    };
    OsString::from_vec([stem, number.as_bytes(), extension].concat())
}

/// The line of an extent of so many bytes: what comes before its name, and behind it.
pub fn extent_line(subformat: &Subformat, size: u64) -> (String, &'static str) {
    let (kind, end) = if subformat.flat { ("FLAT", "\" 0\n") } else { ("SPARSE", "\"\n") };
    (format!("RW {} {kind} \"", size / SECTOR), end)
}

/// Where the tables of a sparse extent lie.
pub struct SparseLayout {
    header: SparseHeader,
    rgd: Vec<u32>,
    gd: Vec<u32>,
}

impl SparseLayout {
    /// The layout of the reference: descriptor, redundant directory, its tables, directory, its tables, grains.
    pub fn new(size: u64, zeroed: bool) -> Result<Self> {
        let tables = tables(size);
        let too_large = || Error::invalid("The image size is too large for file format 'vmdk'");
        let gd_sectors = Sectors::holding(4 * tables);
        let rgd_at = Sectors(1) + DESCRIPTOR_SECTORS;
        let gd_at = rgd_at + gd_sectors + GT_SECTORS * tables;
        let directory = |at: Sectors| -> Result<Vec<u32>> {
            (0..tables).map(|table| sector32(at + gd_sectors + GT_SECTORS * table).map_err(|_| too_large())).collect()
        };
        let overhead = Self::overhead(size);
        let (version, flags) = if zeroed { (2, FLAG_ZERO_GRAIN) } else { (1, 0) };
        let header = SparseHeader {
            descriptor_at: Sectors(1).into(),
            descriptor_sectors: DESCRIPTOR_SECTORS.into(),
            rgd_at: rgd_at.into(),
            gd_at: gd_at.into(),
            overhead: overhead.into(),
            ..SparseHeader::new(version, FLAG_REDUNDANT | flags, Sectors::within(size))
        };
        Ok(Self { header, rgd: directory(rgd_at)?, gd: directory(gd_at)? })
    }

    /// How many sectors lie before the grains.
    pub fn overhead(size: u64) -> Sectors {
        let tables = tables(size);
        let directory = Sectors::holding(4 * tables) + GT_SECTORS * tables;
        (Sectors(1) + DESCRIPTOR_SECTORS + directory * 2).next_multiple_of(GRAIN_SECTORS)
    }

    /// Writes header and directories; the tables are holes, or zeros where there was something before.
    pub fn write(&self, storage: &dyn Storage) -> Result<()> {
        let header = &self.header;
        let overhead = header.overhead.get().bytes();
        storage.set_len(overhead, Preallocation::Off).context("Could not resize file")?;
        if !storage.facts().new_reads_zero {
            storage.zero(0, overhead, Zeroing::Write).context("Could not clear the tables")?;
        }
        let put = |at: Sectors, bytes: &[u8]| storage.write_at(at.bytes(), bytes).context("Could not write the header");
        put(Sectors(0), header.as_bytes())?;
        let padded = |directory: &[u32]| {
            let mut bytes = entry_bytes(directory);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            bytes
        };
        put(header.rgd_at.get(), &padded(&self.rgd))?;
        put(header.gd_at.get(), &padded(&self.gd))
    }
}

/// A stream-optimized extent without a grain: header, room for the descriptor, directory, footer, end.
fn write_stream(storage: &dyn Storage, size: u64) -> Result<()> {
    let overhead = GRAIN_SECTORS;
    let header = SparseHeader {
        descriptor_at: Sectors(1).into(),
        descriptor_sectors: DESCRIPTOR_SECTORS.into(),
        gd_at: GD_AT_END.into(),
        overhead: overhead.into(),
        compression: COMPRESSION_DEFLATE.into(),
        ..SparseHeader::new(3, FLAG_COMPRESSED | FLAG_MARKERS, Sectors::within(size))
    };
    storage.write_at(0, header.as_bytes()).context("Could not write the header")?;
    if !storage.facts().new_reads_zero {
        let room = overhead.bytes() - SECTOR;
        storage.zero(SECTOR, room, Zeroing::Write).context("Could not clear the descriptor")?;
    }
    let directory = vec![0; usize::try_from(tables(size)).unwrap_or(0)];
    let tail = tail(&header, overhead, &directory);
    storage.write_at(overhead.bytes(), &tail).context("Could not write the footer")
}

impl Create for Vmdk {
    fn grows(&self, options: &CreateOptions) -> bool {
        subformat(options).is_ok_and(|subformat| !subformat.flat)
    }

    fn file_order(&self, options: &CreateOptions) -> FileOrder {
        if self.always_compresses(options) { FileOrder::Appended } else { FileOrder::Planned }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn compresses(&self) -> bool {
        true
    }

    fn always_compresses(&self, options: &CreateOptions) -> bool {
        subformat(options).is_ok_and(|subformat| subformat.compressed)
    }

    fn effort(&self, options: &CreateOptions, _compress: bool) -> Result<Effort> {
        // Streams are always compressed, others never.
        if !self.always_compresses(options) {
            effort::refuse(options, "unless the subformat is streamOptimized")?;
        }
        Ok(Effort { level: effort::level(options, deflate::Stream::Zlib.levels())?, wide: true })
    }

    fn measuring(&self) -> Option<&dyn Measure> {
        Some(self)
    }

    fn create(&self, request: &CreateRequest<'_>) -> Result<()> {
        let plan = VmdkCreatePlan::new(request)?;
        let subformat = plan.subformat;
        let fill = request.options.text("preallocation").and_then(Preallocation::parse).unwrap_or_default();
        let main = request.files.main()?;
        let embedded = !subformat.split && !subformat.flat;
        let mut lines = Vec::new();
        for (index, size) in plan.extents().into_iter().enumerate() {
            let (storage, name) = if embedded {
                (main.clone(), OsStr::from_bytes(base(request.files.name())).to_owned())
            } else {
                let name = extent_name(request.files.name(), &subformat, index);
                (request.files.beside(&name)?, name)
            };
            let (start, end) = extent_line(&subformat, size);
            lines.extend([start.as_bytes(), name.as_bytes(), end.as_bytes()].concat());
            if subformat.flat {
                let failed = || format!("Could not create '{}'", name.display());
                storage.set_len(size, fill).with_context(failed)?;
                // Like every plain file of the reference: its first block is allocated.
                let first = if size < 4096 { 512 } else { 4096 };
                storage.write_at(0, &vec![0; first]).with_context(failed)?;
                continue;
            }
            if subformat.compressed {
                write_stream(&*storage, size)?;
            } else {
                SparseLayout::new(size, plan.zeroed)?.write(&*storage)?;
            }
        }
        let text = NewDescriptor {
            cid: request.ids.word("cid"),
            parent_cid: plan.parent.map_or(NO_PARENT, |(_, cid)| cid),
            create_type: subformat.name,
            parent: plan.parent.map(|(name, _)| name),
            extents: &lines,
            hardware: plan.hardware,
            size: plan.size,
            adapter: plan.adapter,
            tools: plan.tools,
        }
        .text();
        let at = if embedded { SECTOR } else { 0 };
        if embedded && text.len() as u64 > DESCRIPTOR_SECTORS.bytes() {
            return Err(Error::invalid("The descriptor does not fit: the names in it are too long"));
        }
        main.write_at(at, &text).context("Could not write the descriptor")
    }
}
