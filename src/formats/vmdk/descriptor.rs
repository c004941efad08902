//! The text that says what a VMDK is made of: read with tolerance, written as the reference writes it.
//!
//! Source: *Virtual Disk Format 5.0*, "The Descriptor File". Lines may end in LF or CR LF, be indented, and carry
//! blanks around `=`; keys are compared without regard to case; bytes outside UTF-8 are taken as Latin-1 would.

use crate::block::{Error, Result};

use super::layout::MAX_EXTENTS;

/// What the guest may do with an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Read only.
    ReadOnly,
    /// Nothing.
    None,
}

/// How an extent is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentType {
    /// A plain file, from an offset on (`FLAT`, `VMFS`, `VMFSRDM`, `VMFSRAW`).
    Flat,
    /// Grains behind a directory (`SPARSE`).
    Sparse,
    /// ESXi host sparse, `COWD` (`VMFSSPARSE`).
    VmfsSparse,
    /// Space-efficient sparse (`SESPARSE`).
    SeSparse,
    /// Nothing but zeros.
    Zero,
}

/// A line of the extent description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// What the guest may do.
    pub access: Access,
    /// Length in sectors.
    pub sectors: u64,
    /// How it is stored.
    pub kind: ExtentType,
    /// The word for that, as written.
    pub word: String,
    /// The file's name; empty for `ZERO`.
    pub file: String,
    /// Where in the file it starts, in sectors.
    pub offset: u64,
}

/// The descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Descriptor {
    /// Content id.
    pub cid: u32,
    /// The parent's content id when this one was made; all ones for no parent.
    pub parent_cid: u32,
    /// `createType`.
    pub create_type: String,
    /// `parentFileNameHint`.
    pub parent: Option<String>,
    /// The extents in guest order.
    pub extents: Vec<ExtentLine>,
}

/// No parent.
pub const NO_PARENT: u32 = u32::MAX;

/// Whether a file's first bytes can be a descriptor: comments and blank lines before `version=`.
pub fn looks_like(head: &[u8]) -> bool {
    let text = head.split(|b| *b == 0).next().unwrap_or_default();
    for line in text.split(|b| *b == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let line: Vec<u8> = line.iter().filter(|b| **b != b' ').map(u8::to_ascii_lowercase).collect();
        return matches!(line.as_slice(), b"version=1" | b"version=2" | b"version=3");
    }
    false
}

/// The text of a descriptor's bytes, up to the first NUL.
pub fn text(bytes: &[u8]) -> String {
    let bytes = bytes.split(|b| *b == 0).next().unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().map(|b| char::from(*b)).collect(),
    }
}

/// A changed text in the encoding of the bytes that [`text`] made it of.
pub fn encoded(text: &str, old: &[u8]) -> Vec<u8> {
    let old = old.split(|b| *b == 0).next().unwrap_or_default();
    let bytes = || text.chars().map(|c| u8::try_from(c).ok()).collect::<Option<Vec<u8>>>();
    std::str::from_utf8(old).is_err().then(bytes).flatten().unwrap_or_else(|| text.as_bytes().to_vec())
}

/// The value of `key=value` or `key="value"`, if the line has that key.
fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (name, value) = line.split_once('=')?;
    let value = value.trim();
    name.trim().eq_ignore_ascii_case(key).then(|| value.strip_prefix('"').map_or(value, |v| v.trim_end_matches('"')))
}

fn hex(text: &str) -> Result<u32> {
    u32::from_str_radix(text.trim_start_matches("0x"), 16)
        .map_err(|_| Error::corrupt(format!("Invalid CID '{text}' in the descriptor")))
}

impl Descriptor {
    /// Reads the text.
    pub fn parse(text: &str) -> Result<Self> {
        let mut this = Self { parent_cid: NO_PARENT, ..Self::default() };
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(cid) = value(line, "CID") {
                this.cid = hex(cid)?;
            } else if let Some(cid) = value(line, "parentCID") {
                this.parent_cid = hex(cid)?;
            } else if let Some(kind) = value(line, "createType") {
                this.create_type = kind.to_owned();
            } else if let Some(parent) = value(line, "parentFileNameHint") {
                this.parent = Some(parent.to_owned());
            } else if let Some(extent) = ExtentLine::parse(line)? {
                if this.extents.len() >= MAX_EXTENTS {
                    return Err(Error::corrupt(format!("More than {MAX_EXTENTS} extents in the descriptor")));
                }
                this.extents.push(extent);
            }
        }
        Ok(this)
    }

    /// The parent's name, if it has one. Named, it is meant, even where the parent's id says that there is none:
    /// then it is not the one that it was.
    pub fn parent_name(&self) -> Option<&str> {
        self.parent.as_deref().filter(|name| !name.is_empty())
    }
}

impl ExtentLine {
    /// Reads `RW 4192256 SPARSE "disk-s001.vmdk" [0]`; `None` if the line is something else.
    fn parse(line: &str) -> Result<Option<Self>> {
        let invalid = || Error::corrupt(format!("Invalid extent line: {line}"));
        let (access, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let access = match access.to_ascii_uppercase().as_str() {
            "RW" => Access::ReadWrite,
            "RDONLY" => Access::ReadOnly,
            "NOACCESS" => Access::None,
            _ => return Ok(None),
        };
        let (sectors, rest) = rest.trim_start().split_once(char::is_whitespace).ok_or_else(invalid)?;
        let sectors = sectors.parse().map_err(|_| invalid())?;
        let rest = rest.trim_start();
        let (word, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let kind = match word.to_ascii_uppercase().as_str() {
            "FLAT" | "VMFS" | "VMFSRDM" | "VMFSRAW" => ExtentType::Flat,
            "SPARSE" => ExtentType::Sparse,
            "VMFSSPARSE" => ExtentType::VmfsSparse,
            "SESPARSE" => ExtentType::SeSparse,
            "ZERO" => ExtentType::Zero,
            _ => return Err(Error::unsupported(format!("Unsupported extent type '{word}'"))),
        };
        let rest = rest.trim();
        let (file, offset) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').ok_or_else(invalid)?,
            None => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
        };
        if file.is_empty() && kind != ExtentType::Zero {
            return Err(invalid());
        }
        // A device identifier may follow the offset (VMFSRDM).
        let offset = match offset.split_whitespace().next() {
            Some(offset) => offset.parse().map_err(|_| invalid())?,
            None => 0,
        };
        Ok(Some(Self { access, sectors, kind, word: word.to_owned(), file: file.to_owned(), offset }))
    }
}

/// What a new descriptor says.
#[derive(Debug, Clone)]
pub struct NewDescriptor<'a> {
    /// Content id.
    pub cid: u32,
    /// The parent's, or [`NO_PARENT`].
    pub parent_cid: u32,
    /// `createType`.
    pub create_type: &'a str,
    /// The parent's name.
    pub parent: Option<&'a str>,
    /// The extent lines, each ending in a newline.
    pub extents: &'a str,
    /// `ddb.virtualHWVersion`.
    pub hardware: &'a str,
    /// Size of the disk in bytes.
    pub size: u64,
    /// `ddb.adapterType`.
    pub adapter: &'a str,
    /// `ddb.toolsVersion`.
    pub tools: &'a str,
}

impl NewDescriptor<'_> {
    /// The text, as the reference writes it: the CID without leading zeros, cylinders without a cap.
    pub fn text(&self) -> String {
        let heads: u64 = if self.adapter == "ide" { 16 } else { 255 };
        let cylinders = self.size / (63 * heads * 512);
        let parent = match self.parent {
            Some(name) => format!("parentFileNameHint=\"{name}\"\n"),
            None => "\n".to_owned(),
        };
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={:x}\nparentCID={:x}\ncreateType=\"{}\"\n{parent}\
             # Extent description\n{}\n# The Disk Data Base\n#DDB\n\n\
             ddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n\
             ddb.toolsVersion = \"{}\"\n",
            self.cid, self.parent_cid, self.create_type, self.extents, self.hardware, self.adapter, self.tools,
        )
    }
}

/// The value of `key`, as it is written.
pub fn value_of<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().filter(|line| !line.trim_start().starts_with('#')).find_map(|line| value(line, key))
}

/// The text with the value of `key` replaced; the line's place and everything else stay.
pub fn with_value(text: &str, key: &str, new: &str) -> String {
    let mut out = String::with_capacity(text.len() + new.len());
    for line in text.split_inclusive('\n') {
        let body = line.trim_end_matches(['\n', '\r']);
        match value(body, key) {
            Some(_) if !body.trim_start().starts_with('#') => {
                let head = body.split_once('=').map_or(body, |(head, _)| head);
                let blank = if body.contains("= ") { " " } else { "" };
                let quote = if body.contains('"') { "\"" } else { "" };
                out.push_str(&format!("{head}={blank}{quote}{new}{quote}"));
                out.push_str(&line[body.len()..]);
            }
            _ => out.push_str(line),
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn odd_descriptors_are_read() {
        let text = "# Disk DescriptorFile\r\nversion = 1\r\nencoding=\"windows-1252\"\r\nCID = 0badCAFE\r\nparentCID=ffffffff\r\n\
                    createType = \"custom\"\r\n  RW  100  FLAT  \"a b.vmdk\"  7\r\nRDONLY 5 ZERO\r\nNOACCESS 9 SPARSE x.vmdk\r\n";
        assert!(looks_like(text.as_bytes()));
        let d = Descriptor::parse(text).unwrap();
        assert_eq!((d.cid, d.parent_cid, d.create_type.as_str()), (0x0bad_cafe, NO_PARENT, "custom"));
        assert_eq!(d.extents.len(), 3);
        assert_eq!((d.extents[0].file.as_str(), d.extents[0].offset, d.extents[0].sectors), ("a b.vmdk", 7, 100));
        assert_eq!((d.extents[1].kind, d.extents[1].access), (ExtentType::Zero, Access::ReadOnly));
        assert_eq!((d.extents[2].file.as_str(), d.extents[2].access), ("x.vmdk", Access::None));
        assert!(Descriptor::parse("RW x FLAT \"a\" 0").is_err());
    }

    #[test]
    fn a_value_is_replaced_in_its_place() {
        let text = "CID=1\nparentCID=1\nddb.geometry.cylinders = \"5\"\n# CID=1\n";
        assert_eq!(with_value(text, "CID", "ab"), "CID=ab\nparentCID=1\nddb.geometry.cylinders = \"5\"\n# CID=1\n");
        assert!(with_value(text, "ddb.geometry.cylinders", "77").contains("cylinders = \"77\"\n"));
    }
}
