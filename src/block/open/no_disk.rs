//! Files that people mistake for disks: packed files, archives, evidence files, web pages saved under an image's name,
//! and parts of images. Each is known by its first bytes or its name, and refused with what it is and what to do; the
//! format raw, said by the user, takes any file as it is.
//!
//! A file system without a partition table, an ISO image among them, is a disk.
//!
//! Sources: RFC 1952 (gzip), RFC 8878 (zstd), the .xz, bzip2, lz4 and lzip file format documents, PKWARE's APPNOTE 4.3
//! (zip), 7z's `7zFormat.txt`, POSIX.1 `ustar` and cpio, the EWF documents of libewf, Git LFS's pointer specification.

/// What a file is, and what makes a disk of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoDisk {
    /// What it is, with its article.
    pub what: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

impl NoDisk {
    /// As an error says it.
    pub fn text(&self) -> String {
        format!("This is {}, not a disk: {} (-f raw takes its bytes as they are)", self.what, self.remedy)
    }
}

const UNPACK: &str = "unpack it first";
const EXTRACT: &str = "extract the disk from it first";
const AGAIN: &str = "fetch the image again";

/// (first bytes, what it is, what to do).
const MAGICS: &[(&[u8], &str, &str)] = &[
    (b"\x1f\x8b\x08", "a file compressed by gzip", UNPACK),
    (b"\xfd7zXZ\0", "a file compressed by xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd", UNPACK),
    (b"\x04\x22\x4d\x18", "a file compressed by lz4", UNPACK),
    (b"LZIP\x01", "a file compressed by lzip", UNPACK),
    (b"\x89LZO\0\r\n\x1a\n", "a file compressed by lzop", UNPACK),
    (b"PK\x03\x04", "a zip archive", EXTRACT),
    (b"PK\x05\x06", "a zip archive", EXTRACT),
    (b"PK\x07\x08", "a zip archive", EXTRACT),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", EXTRACT),
    (b"Rar!\x1a\x07", "a rar archive", EXTRACT),
    (b"070701", "a cpio archive", EXTRACT),
    (b"MSWIM\0\0\0", "a Windows image (wim)", "apply it to a disk first"),
    (b"EVF\x09\x0d\x0a\xff\0", "an evidence file (EWF, E01)", "export the disk from it, with ewfexport or ewfmount"),
    (b"EVF2\x0d\x0a\x81\0", "an evidence file (EWF, Ex01)", "export the disk from it, with ewfexport or ewfmount"),
    (b"LVF\x09\x0d\x0a\xff\0", "an evidence file (EWF, L01)", "it holds files and no disk"),
    (b"AFF10\r\n\0", "an evidence file (AFF)", "export the disk from it, with affconvert"),
    (b"shdw", "a sparse disk image of macOS (ASIF)", "convert it on macOS, with diskutil image"),
    (b"sprs", "a sparse disk image of macOS (UDSP)", "convert it on macOS, with hdiutil convert -format UDRW"),
    (b"LUKS\xba\xbe\0\x02", "a LUKS2 volume", "convert its header to LUKS1, with cryptsetup convert --type luks1"),
    (b"partclone-image", "a file system saved by partclone", "restore it first, with partclone.restore"),
    (b"\0ntfsclone-image", "a file system saved by ntfsclone", "restore it first, with ntfsclone -r"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer to a file in Git LFS",
        "fetch the file, with git lfs pull",
    ),
];

/// Where a `ustar` header has its magic, and its checksum: octal digits, of all bytes with these eight as blanks.
const USTAR: (usize, &[u8]) = (257, b"ustar");
const TAR_CHECKSUM: std::ops::Range<usize> = 148..156;
const TAR_HEADER: usize = 512;
/// Where it has the first member's name.
const TAR_NAME: usize = 100;

/// What the file is whose first bytes (512 of them, or all there are) and name are these.
pub fn of(head: &[u8], name: &str) -> Option<NoDisk> {
    let magic = || {
        let (_, what, remedy) = *MAGICS.iter().find(|(magic, ..)| head.starts_with(magic))?;
        Some(NoDisk { what, remedy })
    };
    magic().or_else(|| bzip2(head)).or_else(|| tar(head)).or_else(|| text(head)).or_else(|| extent(name))
}

/// `BZh`, a level, and the magic of a block or of the end.
fn bzip2(head: &[u8]) -> Option<NoDisk> {
    let rest = head.strip_prefix(b"BZh")?;
    let block = rest.get(1..7)?;
    let known = matches!(rest.first(), Some(b'1'..=b'9'))
        && (block == b"\x31\x41\x59\x26\x53\x59" || block == b"\x17\x72\x45\x38\x50\x90");
    known.then_some(NoDisk { what: "a file compressed by bzip2", remedy: UNPACK })
}

fn tar(head: &[u8]) -> Option<NoDisk> {
    let header = head.get(..TAR_HEADER)?;
    if !header.get(USTAR.0..)?.starts_with(USTAR.1) {
        return None;
    }
    let digits =
        header.get(TAR_CHECKSUM)?.iter().skip_while(|byte| **byte == b' ').take_while(|byte| byte.is_ascii_digit());
    let told = digits.fold(0u32, |sum, digit| sum.wrapping_mul(8).wrapping_add(u32::from(digit & 7)));
    let all = header.iter().enumerate().map(|(at, byte)| if TAR_CHECKSUM.contains(&at) { b' ' } else { *byte });
    if told != all.map(u32::from).sum::<u32>() {
        return None;
    }
    let name = header.get(..TAR_NAME)?.split(|byte| *byte == 0).next()?;
    let appliance = name.to_ascii_lowercase().ends_with(b".ovf");
    Some(match appliance {
        true => NoDisk { what: "a virtual appliance (OVA)", remedy: "extract its disk first, with tar -xf" },
        false => NoDisk { what: "a tar archive", remedy: "extract the disk from it first, with tar -xf" },
    })
}

/// A page or an answer that a server gave in place of the image, or a description of a machine.
fn text(head: &[u8]) -> Option<NoDisk> {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    // A character may be cut off at the end.
    let text = match str::from_utf8(head) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => str::from_utf8(head.get(..error.valid_up_to())?).ok()?,
        Err(_) => return None,
    };
    if text.contains(|c: char| c.is_control() && !c.is_ascii_whitespace()) {
        return None;
    }
    let lower = text.to_ascii_lowercase();
    let starts = |words: &[&str]| words.iter().any(|word| lower.starts_with(word));
    if starts(&["<!doctype html", "<html", "<head"]) {
        return Some(NoDisk { what: "an HTML page", remedy: AGAIN });
    }
    if lower.starts_with("<?xml") {
        let envelope = lower.contains("<envelope") || lower.contains(":envelope");
        let machine = NoDisk { what: "a description of a machine (OVF)", remedy: "name the disk that it names" };
        return Some(if envelope { machine } else { NoDisk { what: "XML text", remedy: AGAIN } });
    }
    let mut after = lower.chars();
    let json = match after.next() {
        Some('{') => after.as_str().trim_start().starts_with(['"', '}']),
        Some('[') => after.as_str().trim_start().starts_with(['{', '[', '"', ']']),
        _ => false,
    };
    json.then_some(NoDisk { what: "JSON text", remedy: AGAIN })
}

/// The data of a flat VMDK, known by the names that VMware gives: `disk-flat.vmdk`, `disk-f001.vmdk`.
fn extent(name: &str) -> Option<NoDisk> {
    let stem = name.to_ascii_lowercase();
    let stem = stem.strip_suffix(".vmdk")?;
    let (_, part) = stem.rsplit_once('-')?;
    let numbered =
        || part.strip_prefix('f').is_some_and(|n| n.len() == 3 && n.bytes().all(|byte| byte.is_ascii_digit()));
    (part == "flat" || numbered()).then_some(NoDisk {
        what: "by its name the data of a VMDK whose descriptor is another file",
        remedy: "name the descriptor",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn what(head: &[u8], name: &str) -> Option<&'static str> {
        of(head, name).map(|found| found.what)
    }

    #[test]
    fn text_is_known_only_where_it_is_text() {
        assert_eq!(what(b"\xef\xbb\xbf\n <!DOCTYPE html><p>", "a"), Some("an HTML page"));
        assert_eq!(what(b"{ \"error\": \"not found\" }\n", "a"), Some("JSON text"));
        assert_eq!(what("{\"a\": \"\u{e9}".as_bytes().split_last().unwrap().1, "a"), Some("JSON text"));
        assert_eq!(what(b"{\"\0\x01\x02", "a"), None);
        assert_eq!(what(b"{x}", "a"), None);
        assert_eq!(what(b"hello\n", "a"), None);
        assert_eq!(what(b"", "a"), None);
    }

    #[test]
    fn names_alone_tell_extents() {
        for name in ["a-flat.vmdk", "x/a-F012.VMDK"] {
            assert!(what(&[0; 512], name).is_some(), "{name}");
        }
        for name in ["a.vmdk", "flat.vmdk", "a-f01.vmdk", "a-flat.raw"] {
            assert_eq!(what(&[0; 512], name), None, "{name}");
        }
    }

    #[test]
    fn a_word_of_tar_is_not_enough() {
        let mut head = [0; 512];
        head[257..262].copy_from_slice(b"ustar");
        assert_eq!(what(&head, "a"), None);
    }
}
