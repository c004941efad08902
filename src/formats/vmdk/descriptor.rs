//! The text that says what a VMDK is made of: read with tolerance, written as the reference writes it.
//!
//! Source: *Virtual Disk Format 5.0*, "The Descriptor File". A byte order mark may come first. Lines may end in LF or
//! CR LF, be indented, and carry blanks around `=`; keys are compared without regard to case. A line that is neither
//! blank, a comment, `key=value` nor an extent is an error: it may have been an extent.
//!
//! Bytes that are not UTF-8 are shown as Latin-1 would; what they mean as a file's name is in [`Descriptor::names`].

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use encoding_rs::Encoding;

use crate::block::{Error, Result};

use super::layout::{MAX_EXTENTS, Sectors};

/// What the guest may do with an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentAccess {
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
    pub access: ExtentAccess,
    /// Its length.
    pub sectors: Sectors,
    /// How it is stored.
    pub kind: ExtentType,
    /// The word for that, as written.
    pub word: String,
    /// The file's name; empty for `ZERO`.
    pub file: String,
    /// Where in the file it starts.
    pub offset: Sectors,
}

/// The descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Descriptor {
    /// Content id.
    pub cid: u32,
    /// The parent's content id, or [`NO_PARENT`].
    pub parent_cid: u32,
    /// `createType`.
    pub create_type: String,
    /// `parentFileNameHint`.
    pub parent: Option<String>,
    /// The extents in guest order.
    pub extents: Vec<ExtentLine>,
    /// The first line, behind those extents, that makes no sense. What comes after it was not read as extents.
    pub malformed: Option<String>,
    /// `ddb.geometry.cylinders`.
    pub cylinders: Option<String>,
    /// `encoding`.
    encoding: Option<String>,
    /// Whether a comment announces the extents, as writers put it,
    announced: bool,
    /// and whether anything of the disk data base, which follows on them, is there.
    database: bool,
    /// Whether the bytes were not UTF-8.
    other_encoding: bool,
    /// Whether a line says what the parent's content id is, or that there is none.
    tells_of_parent: bool,
}

/// No parent.
pub const NO_PARENT: u32 = u32::MAX;

/// The byte order mark in UTF-8.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// The bytes of the text: up to the first NUL, without a byte order mark.
fn text_bytes(bytes: &[u8]) -> &[u8] {
    let bytes = bytes.strip_prefix(MARK).unwrap_or(bytes);
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

/// Whether a file's first bytes can be a descriptor: comments and blank lines before `version=`, or the title that all
/// writers give it and no version that is too new.
pub fn looks_like(head: &[u8]) -> bool {
    let mut titled = false;
    for line in text_bytes(head).split(|b| *b == b'\n') {
        let line: Vec<u8> = line.iter().filter(|b| !matches!(b, b' ' | b'\r')).map(u8::to_ascii_lowercase).collect();
        if line.trim_ascii().is_empty() || line.starts_with(b"#") {
            titled |= line.starts_with(b"#diskdescriptorfile");
            continue;
        }
        return match line.strip_prefix(b"version=") {
            Some(b"1" | b"2" | b"3") => true,
            Some([b'0'..=b'9', ..]) => false,
            _ => titled,
        };
    }
    titled
}

/// Whether the bytes are a descriptor, of whatever version: the type of the image is in it.
pub fn is_one(bytes: &[u8]) -> bool {
    value_of(&text(bytes), "createType").is_some()
}

/// The text of a descriptor's bytes, up to the first NUL. It begins with the byte order mark, if they do.
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
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let bytes = text_bytes(bytes);
        let mut this =
            Self { parent_cid: NO_PARENT, other_encoding: std::str::from_utf8(bytes).is_err(), ..Self::default() };
        for line in text(bytes).lines().map(str::trim) {
            let lower = line.to_ascii_lowercase();
            this.announced |= lower.starts_with("# extent description");
            this.database |= lower.starts_with("#ddb") || lower.starts_with("ddb.");
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(cid) = value(line, "CID") {
                this.cid = hex(cid)?;
            } else if let Some(cid) = value(line, "parentCID") {
                (this.parent_cid, this.tells_of_parent) = (hex(cid)?, true);
            } else if let Some(kind) = value(line, "createType") {
                this.create_type = kind.to_owned();
            } else if let Some(parent) = value(line, "parentFileNameHint") {
                this.parent = Some(parent.to_owned());
            } else if let Some(encoding) = value(line, "encoding") {
                this.encoding = Some(encoding.to_owned());
            } else if let Some(cylinders) = value(line, "ddb.geometry.cylinders") {
                this.cylinders = Some(cylinders.to_owned());
            } else if this.malformed.is_none() && !is_assignment(line) {
                match ExtentLine::parse(line) {
                    Some(_) if this.extents.len() >= MAX_EXTENTS => {
                        return Err(Error::corrupt(format!("More than {MAX_EXTENTS} extents in the descriptor")));
                    }
                    Some(extent) => this.extents.push(extent),
                    None => this.malformed = Some(line.to_owned()),
                }
            }
        }
        Ok(this)
    }

    /// Reads the text of a disk. Whether that has a parent must stand in it: one that has lost its line would show the
    /// difference to its parent as the whole disk.
    pub fn of_disk(bytes: &[u8]) -> Result<Self> {
        let this = Self::parse(bytes)?;
        match this.tells_of_parent {
            true => Ok(this),
            false => Err(Error::corrupt("The descriptor is damaged: it has no line 'parentCID='")),
        }
    }

    /// Whether the text ends where extents may be missing: behind those of a split disk, without the data base that
    /// every writer of the heading before them writes after them.
    pub fn is_cut(&self) -> bool {
        self.create_type.to_ascii_lowercase().contains("gbmaxextent") && self.announced && !self.database
    }

    /// The parent's name, if it has one. Named, it is meant, even where the parent's id says that there is none:
    /// then it is not the one that it was.
    pub fn parent_name(&self) -> Option<&str> {
        self.parent.as_deref().filter(|name| !name.is_empty())
    }

    /// The name of a file in the bytes that the text has for it.
    pub fn name(&self, written: &str) -> OsString {
        let latin = || written.chars().map(|c| u8::try_from(c).ok()).collect::<Option<Vec<u8>>>();
        let bytes = if self.other_encoding { latin() } else { None };
        OsString::from_vec(bytes.unwrap_or_else(|| written.as_bytes().to_vec()))
    }

    /// What a file that the text names may be called here, the likeliest first: the bytes of the name as they are,
    /// those of the name in UTF-8, and, of a path of Windows, the last component.
    pub fn names(&self, written: &str) -> Vec<OsString> {
        let name = self.name(written);
        let decoded = self.encoding.as_deref().and_then(encoding_of).and_then(|encoding| {
            let text = encoding.decode_without_bom_handling_and_without_replacement(name.as_bytes());
            text.map(|text| text.into_owned())
        });
        let mut names = vec![name];
        let text = decoded.as_deref().unwrap_or(written);
        let last = last_of_windows_path(text);
        for name in [decoded.as_deref(), last].into_iter().flatten() {
            if names.iter().all(|known| known.as_os_str() != name) {
                names.push(name.into());
            }
        }
        names
    }
}

/// The encoding with that name: those of the WHATWG, and code pages of Windows by their numbers.
fn encoding_of(name: &str) -> Option<&'static Encoding> {
    let name = name.trim().to_ascii_lowercase();
    let page = name.strip_prefix("windows-").or_else(|| name.strip_prefix("cp")).unwrap_or_default();
    match page {
        "932" => Some(encoding_rs::SHIFT_JIS),
        "936" => Some(encoding_rs::GBK),
        "949" => Some(encoding_rs::EUC_KR),
        "950" => Some(encoding_rs::BIG5),
        _ => Encoding::for_label(name.as_bytes()),
    }
}

/// The last component of a name that can be a path of Windows: one with a `\`, or that begins with a drive's letter.
fn last_of_windows_path(name: &str) -> Option<&str> {
    let drive = matches!(name.as_bytes(), [letter, b':', b'/' | b'\\', ..] if letter.is_ascii_alphabetic());
    let last = name.rsplit(['\\', '/']).next().unwrap_or_default();
    (drive || name.contains('\\')).then_some(last).filter(|last| !matches!(*last, "" | "." | ".."))
}

/// Whether a line is `key=value`: a key is one word.
fn is_assignment(line: &str) -> bool {
    line.split_once('=').is_some_and(|(key, _)| {
        let key = key.trim_end();
        !key.is_empty() && !key.contains(|c: char| c.is_whitespace() || c == '"')
    })
}

impl ExtentLine {
    /// Reads `RW 4192256 SPARSE "disk-s001.vmdk"`; `None` if the line is something else.
    ///
    /// The offset has to be there where it tells something, for `FLAT`. Behind other files it may be left out, and
    /// be followed, or replaced, by words that are none (`partitionUUID`, a device identifier).
    fn parse(line: &str) -> Option<Self> {
        let (access, rest) = line.split_once(char::is_whitespace)?;
        let access = match access.to_ascii_uppercase().as_str() {
            "RW" => ExtentAccess::ReadWrite,
            "RDONLY" => ExtentAccess::ReadOnly,
            "NOACCESS" => ExtentAccess::None,
            _ => return None,
        };
        let (sectors, rest) = rest.trim_start().split_once(char::is_whitespace)?;
        let sectors = sectors.parse().ok().map(Sectors).filter(|sectors| *sectors > Sectors(0))?;
        let rest = rest.trim_start();
        let (word, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let upper = word.to_ascii_uppercase();
        let kind = match upper.as_str() {
            "FLAT" | "VMFS" | "VMFSRDM" | "VMFSRAW" => ExtentType::Flat,
            "SPARSE" => ExtentType::Sparse,
            "VMFSSPARSE" => ExtentType::VmfsSparse,
            "SESPARSE" => ExtentType::SeSparse,
            "ZERO" => ExtentType::Zero,
            _ => return None,
        };
        let rest = rest.trim();
        let (file, rest) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
        };
        if file.is_empty() && kind != ExtentType::Zero {
            return None;
        }
        let next = rest.split_whitespace().next();
        let offset = match next.map(str::parse) {
            Some(Ok(offset)) => Sectors(offset),
            _ if upper == "FLAT" => return None,
            // A number that is none.
            Some(Err(_)) if next.is_some_and(|word| word.starts_with(|c: char| c == '-' || c.is_ascii_digit())) => {
                return None;
            }
            _ => Sectors(0),
        };
        Some(Self { access, sectors, kind, word: word.to_owned(), file: file.to_owned(), offset })
    }
}

/// Whether a name can be written to a descriptor and read again.
pub fn can_hold(name: &OsStr) -> bool {
    !name.as_bytes().iter().any(|byte| matches!(byte, b'"' | b'\n' | b'\r' | 0))
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
    pub parent: Option<&'a OsStr>,
    /// The extent lines, each ending in a newline.
    pub extents: &'a [u8],
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
    pub fn text(&self) -> Vec<u8> {
        let heads: u64 = if self.adapter == "ide" { 16 } else { 255 };
        let cylinders = self.size / (63 * heads * 512);
        let parent: &[&[u8]] = match self.parent {
            Some(name) => &[b"parentFileNameHint=\"", name.as_bytes(), b"\"\n"],
            None => &[b"\n"],
        };
        let head = format!(
            "# Disk DescriptorFile\nversion=1\nCID={:x}\nparentCID={:x}\ncreateType=\"{}\"\n",
            self.cid, self.parent_cid, self.create_type
        );
        let tail = format!(
            "\n# The Disk Data Base\n#DDB\n\n\
             ddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n\
             ddb.toolsVersion = \"{}\"\n",
            self.hardware, self.adapter, self.tools,
        );
        [head.as_bytes(), &parent.concat(), b"# Extent description\n", self.extents, tail.as_bytes()].concat()
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
        let text = "\u{feff}# Disk DescriptorFile\r\nversion = 1\r\nencoding=\"windows-1252\"\r\nCID = 0badCAFE\r\nparentCID=ffffffff\r\n\
                    createType = \"custom\"\r\n  RW  100  FLAT  \"a b.vmdk\"  7\r\nRDONLY 5 ZERO\r\nNOACCESS 9 SPARSE x.vmdk\r\n";
        assert!(looks_like(text.as_bytes()) && is_one(text.as_bytes()));
        let d = Descriptor::parse(text.as_bytes()).unwrap();
        assert_eq!((d.cid, d.parent_cid, d.create_type.as_str()), (0x0bad_cafe, NO_PARENT, "custom"));
        assert_eq!((d.extents.len(), &d.malformed), (3, &None));
        let first = &d.extents[0];
        assert_eq!((first.file.as_str(), first.offset, first.sectors), ("a b.vmdk", Sectors(7), Sectors(100)));
        assert_eq!((d.extents[1].kind, d.extents[1].access), (ExtentType::Zero, ExtentAccess::ReadOnly));
        assert_eq!((d.extents[2].file.as_str(), d.extents[2].access), ("x.vmdk", ExtentAccess::None));
    }

    #[test]
    fn a_disk_tells_of_its_parent() {
        for (text, told) in [("CID=1\n", false), ("# parentCID=ffffffff\n", false), ("parentCID = ffffffff\n", true)] {
            assert_eq!(Descriptor::of_disk(text.as_bytes()).is_ok(), told, "{text}");
        }
    }

    #[test]
    fn extent_lines_are_whole_or_malformed() {
        for (line, offset) in [
            ("RW 8 FLAT \"f\" 5", 5),
            ("RW 8 VMFS \"f\"", 0),
            ("RW 8 VMFS \"f\" partitionUUID 5b2d8b35", 0),
            ("RW 8 VMFSRDM \"f\" 3 vml.02", 3),
            ("RW 8 SPARSE \"f\" x", 0),
            ("RW 8 ZERO", 0),
        ] {
            assert_eq!(ExtentLine::parse(line).map(|line| line.offset.0), Some(offset), "{line}");
        }
        for line in [
            "RW",
            "RW 8",
            "RWX 8 FLAT \"f\" 0",
            "RW x FLAT \"f\" 0",
            "RW 0 FLAT \"f\" 0",
            "RW 8 FLATT \"f\" 0",
            "RW 8 FLAT \"f\"",
            "RW 8 FLAT \"f\" x",
            "RW 8 FLAT \"f\" -1",
            "RW 8 FLAT \"\" 0",
            "RW 8 FLAT \"f",
            "RW 8 VMFS \"f\" -1",
            "RW 8 SPARSE",
        ] {
            assert_eq!(ExtentLine::parse(line), None, "{line}");
            let text = format!("RW 8 ZERO\n{line}\nRW 8 ZERO\nCID=7\n");
            let d = Descriptor::parse(text.as_bytes()).unwrap();
            assert_eq!((d.extents.len(), d.malformed.as_deref(), d.cid), (1, Some(line), 7));
        }
    }

    #[test]
    fn names_are_looked_for_in_three_forms() {
        let names = |text: &[u8], written: &str| {
            let names = Descriptor::parse(text).unwrap().names(written);
            names.into_iter().map(|name| name.into_vec()).collect::<Vec<_>>()
        };
        assert_eq!(names(b"encoding=\"UTF-8\"\n", "a:b.vmdk"), [b"a:b.vmdk".to_vec()]);
        let gbk = b"encoding=\"GBK\"\nparentFileNameHint=\"\xb4\xc5.vmdk\"\n";
        let written = Descriptor::parse(gbk).unwrap().parent.unwrap();
        assert_eq!(names(gbk, &written), [b"\xb4\xc5.vmdk".to_vec(), "\u{78c1}.vmdk".as_bytes().to_vec()]);
        assert_eq!(names(b"", "C:\\vm\\d.vmdk"), [b"C:\\vm\\d.vmdk".to_vec(), b"d.vmdk".to_vec()]);
        assert_eq!(names(b"", "C:/vm/d.vmdk")[1], b"d.vmdk");
        assert_eq!(names(b"", "/vm/d.vmdk").len(), 1);
        // The second byte of a character may be a backslash.
        let sjis = b"encoding=\"windows-932\"\nparentFileNameHint=\"C:\\\x95\x5c.vmdk\"\n";
        let written = Descriptor::parse(sjis).unwrap().parent.unwrap();
        assert_eq!(names(sjis, &written)[2], "\u{8868}.vmdk".as_bytes());
    }

    #[test]
    fn a_value_is_replaced_in_its_place() {
        let text = "CID=1\nparentCID=1\nddb.geometry.cylinders = \"5\"\n# CID=1\n";
        assert_eq!(with_value(text, "CID", "ab"), "CID=ab\nparentCID=1\nddb.geometry.cylinders = \"5\"\n# CID=1\n");
        assert!(with_value(text, "ddb.geometry.cylinders", "77").contains("cylinders = \"77\"\n"));
    }
}
