//! Files that people mistake for disks: packed files, archives, evidence files, web pages saved under an image's name,
//! and parts of images. Each is known by its first bytes or its name, and refused with what it is and what to do; the
//! format raw, said by the user, takes any file as it is.
//!
//! A file system without a partition table, an ISO image among them, is a disk.
//!
//! Sources: RFC 1952 (gzip), RFC 8878 (zstd), the .xz, bzip2, lz4 and lzip file format documents, PKWARE's APPNOTE 4.3
//! (zip), 7z's `7zFormat.txt`, Microsoft's *Cabinet File Format*, POSIX.1 `ustar` and cpio, tar's manual (the older header),
//! RFC 9580 (OpenPGP's armor), the EWF documents of libewf, Git LFS's pointer specification.

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
const DECRYPT: &str = "decrypt it first";

/// (first bytes, what it is, what to do).
const MAGICS: &[(&[u8], &str, &str)] = &[
    (b"\x1f\x8b\x08", "a file compressed by gzip", UNPACK),
    (b"\xfd7zXZ\0", "a file compressed by xz", UNPACK),
    (ZSTD, "a file compressed by zstd", UNPACK),
    (LZ4, "a file compressed by lz4", UNPACK),
    (b"LZIP\x01", "a file compressed by lzip", UNPACK),
    (b"\x89LZO\0\r\n\x1a\n", "a file compressed by lzop", UNPACK),
    (b"PK\x03\x04", "a zip archive", EXTRACT),
    (b"PK\x05\x06", "a zip archive", EXTRACT),
    (b"PK\x07\x08", "a zip archive", EXTRACT),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", EXTRACT),
    (b"Rar!\x1a\x07", "a rar archive", EXTRACT),
    (b"MSCF\0\0\0\0", "a cabinet archive (cab)", EXTRACT),
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
    (b"Salted__", "a file encrypted by OpenSSL", DECRYPT),
    (b"-----BEGIN PGP MESSAGE-----", "a PGP message", DECRYPT),
    (b"-----BEGIN PGP SIGNATURE-----", "a PGP signature", "name the file that is signed"),
    (b"age-encryption.org/v1\n", "a file encrypted by age", DECRYPT),
    (PARALLELS[0], OTHER_PARALLELS, AGAIN),
    (PARALLELS[1], OTHER_PARALLELS, AGAIN),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer to a file in Git LFS",
        "fetch the file, with git lfs pull",
    ),
];

/// What a Parallels image starts with; that of version 2 is read.
const PARALLELS: [&[u8]; 2] = [b"WithoutFreeSpace", b"WithouFreSpacExt"];
const OTHER_PARALLELS: &str =
    "a Parallels image whose header is not of version 2, damaged or of a kind that is not read";

/// The frames of zstd and lz4 that are skipped over: sixteen magics, by the first byte, then the length of what follows.
const SKIPPED: (std::ops::RangeInclusive<u8>, &[u8]) = (0x50..=0x5f, b"\x2a\x4d\x18");
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
const LZ4: &[u8] = b"\x04\x22\x4d\x18";

/// Where a `ustar` header has its magic, and any its checksum: octal digits, of all bytes with these eight as blanks.
const USTAR: (usize, &[u8]) = (257, b"ustar");
/// POSIX's magic with its version, and GNU tar's.
const USTAR_WHOLE: [&[u8]; 2] = [b"ustar\x0000", b"ustar  \0"];
/// Mode, owner, group, size and time: octal digits.
const TAR_NUMBERS: [std::ops::Range<usize>; 5] = [100..108, 108..116, 116..124, 124..136, 136..148];
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
    let by_content = [bzip2, compress, skipped, tar, text];
    magic().or_else(|| by_content.iter().find_map(|of| of(head))).or_else(|| extent(name))
}

/// `BZh`, a level, and the magic of a block or of the end.
fn bzip2(head: &[u8]) -> Option<NoDisk> {
    let rest = head.strip_prefix(b"BZh")?;
    let block = rest.get(1..7)?;
    let known = matches!(rest.first(), Some(b'1'..=b'9'))
        && (block == b"\x31\x41\x59\x26\x53\x59" || block == b"\x17\x72\x45\x38\x50\x90");
    known.then_some(NoDisk { what: "a file compressed by bzip2", remedy: UNPACK })
}

/// `compress` of Unix: its magic, then the longest code and whether codes begin anew.
fn compress(head: &[u8]) -> Option<NoDisk> {
    let how = *head.strip_prefix(b"\x1f\x9d")?.first()?;
    let known = how & 0x60 == 0 && (9..=16).contains(&(how & 0x1f));
    known.then_some(NoDisk { what: "a file compressed by compress (Z)", remedy: UNPACK })
}

/// Frames that are skipped over, and then one that is not, if that can be seen.
fn skipped(head: &[u8]) -> Option<NoDisk> {
    let mut rest = head;
    while let Some((_, after)) = rest.split_first().filter(|(first, _)| SKIPPED.0.contains(first)) {
        let after = after.strip_prefix(SKIPPED.1)?;
        let length = usize::try_from(u32::from_le_bytes(*after.first_chunk()?)).ok()?;
        rest = after.get(4..)?.get(length..).unwrap_or_default();
        if rest.is_empty() {
            return Some(NoDisk { what: "a file compressed by zstd or lz4", remedy: UNPACK });
        }
    }
    let known = rest.len() < head.len() && (rest.starts_with(ZSTD) || rest.starts_with(LZ4));
    known.then_some(NoDisk { what: "a file compressed by zstd or lz4", remedy: UNPACK })
}

/// An archive by the checksum of its first header, or, where that is wrong or left out, by its magic and all its numbers.
fn tar(head: &[u8]) -> Option<NoDisk> {
    let header = head.get(..TAR_HEADER)?;
    let octal = |field: &[u8]| {
        let mut parts = field.split(|byte| matches!(byte, b' ' | 0)).filter(|part| !part.is_empty());
        let digits = parts.next().is_some_and(|digits| digits.iter().all(|byte| matches!(byte, b'0'..=b'7')));
        // A large number is binary.
        digits && parts.next().is_none() || matches!(field.first(), Some(0x80 | 0xff))
    };
    let numbers = TAR_NUMBERS.iter().all(|field| header.get(field.clone()).is_some_and(octal));
    let name = header.get(..TAR_NAME)?.split(|byte| *byte == 0).next()?;
    let magic = |magic: &[u8]| header.get(USTAR.0..).is_some_and(|rest| rest.starts_with(magic));
    let summed = is_summed(header)?;
    let known = match () {
        () if magic(USTAR.1) => summed || numbers && USTAR_WHOLE.iter().any(|whole| magic(whole)),
        // The older header has no magic.
        () => summed && numbers && !name.is_empty(),
    };
    let appliance = name.to_ascii_lowercase().ends_with(b".ovf");
    known.then_some(match appliance {
        true => NoDisk { what: "a virtual appliance (OVA)", remedy: "extract its disk first, with tar -xf" },
        false => NoDisk { what: "a tar archive", remedy: "extract the disk from it first, with tar -xf" },
    })
}

/// Whether the checksum of a header of tar is right: of bytes, which some old programs took for signed ones.
fn is_summed(header: &[u8]) -> Option<bool> {
    let digits =
        header.get(TAR_CHECKSUM)?.iter().skip_while(|byte| **byte == b' ').take_while(|byte| byte.is_ascii_digit());
    if digits.clone().next().is_none() {
        return Some(false);
    }
    let told = digits.fold(0i64, |sum, digit| sum.wrapping_mul(8).wrapping_add(i64::from(digit & 7)));
    let all = header.iter().enumerate().map(|(at, byte)| if TAR_CHECKSUM.contains(&at) { b' ' } else { *byte });
    let sum: i64 = all.clone().map(i64::from).sum();
    let signed: i64 = all.map(|byte| i64::from(byte.cast_signed())).sum();
    Some(told == sum || told == signed)
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
        Some('[') => {
            let first = after.as_str().trim_start();
            let words = ["true", "false", "null"].iter().any(|word| first.strip_prefix(word).is_some_and(ends_value));
            let digits = first.strip_prefix('-').unwrap_or(first);
            let number = digits.trim_start_matches(|c: char| c.is_ascii_digit() || ".e+-".contains(c));
            let numbers = digits.starts_with(|c: char| c.is_ascii_digit()) && ends_value(number);
            words || numbers || first.starts_with(['{', '[', '"', ']'])
        }
        _ => false,
    };
    json.then_some(NoDisk { what: "JSON text", remedy: AGAIN })
}

/// Whether a value of JSON's may end before that.
fn ends_value(rest: &str) -> bool {
    rest.trim_start().starts_with([',', ']'])
}

/// The data of a VMDK, known by the names that VMware gives: `disk-flat.vmdk`, `disk-f001.vmdk`, `disk-s001.vmdk`. A sparse
/// one has a header, so this one's is gone.
fn extent(name: &str) -> Option<NoDisk> {
    let stem = name.to_ascii_lowercase();
    let stem = stem.strip_suffix(".vmdk")?;
    let (_, part) = stem.rsplit_once('-')?;
    let numbered = |kind: char| {
        part.strip_prefix(kind).is_some_and(|n| n.len() == 3 && n.bytes().all(|byte| byte.is_ascii_digit()))
    };
    (part == "flat" || numbered('f') || numbered('s')).then_some(NoDisk {
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
    fn lists_of_json_are_told_from_sections() {
        for text in ["[1, 2]", "[ -1.5e+3 ]", "[true,", "[null]\n", "[[0]]", "[]"] {
            assert_eq!(what(text.as_bytes(), "a"), Some("JSON text"), "{text}");
        }
        for text in ["[section]\nkey=1\n", "[1st]\n", "[trust]", "[-]x"] {
            assert_eq!(what(text.as_bytes(), "a"), None, "{text}");
        }
    }

    #[test]
    fn frames_that_are_skipped_are_followed_by_others() {
        let frame =
            |length: u32| [&[0x55, 0x2a, 0x4d, 0x18][..], &length.to_le_bytes(), &vec![7; length as usize]].concat();
        let zstd = Some("a file compressed by zstd or lz4");
        assert_eq!(what(&[frame(4), frame(0), ZSTD.to_vec()].concat(), "a"), zstd);
        assert_eq!(what(&frame(9000)[..512], "a"), zstd);
        assert_eq!(what(&[frame(4), vec![0; 500]].concat(), "a"), None);
        assert_eq!(what(&[0x55, 0x2a, 0x4d, 0x18], "a"), None);
    }

    #[test]
    fn other_beginnings() {
        for (head, is) in [
            (&b"\x1f\x9d\x90\0"[..], Some("a file compressed by compress (Z)")),
            (b"\x1f\x9d\xff\0", None),
            (b"MSCF\0\0\0\0\x2c", Some("a cabinet archive (cab)")),
            (b"MSCFx", None),
            (b"Salted__12345678", Some("a file encrypted by OpenSSL")),
            (b"-----BEGIN PGP MESSAGE-----\n", Some("a PGP message")),
            (b"MSWIM\0\0\0", Some("a Windows image (wim)")),
        ] {
            assert_eq!(what(head, "a"), is, "{head:x?}");
        }
    }

    #[test]
    fn names_alone_tell_extents() {
        for name in ["a-flat.vmdk", "x/a-F012.VMDK", "a-s001.vmdk"] {
            assert!(what(&[0; 512], name).is_some(), "{name}");
        }
        for name in ["a.vmdk", "flat.vmdk", "a-f01.vmdk", "a-s0001.vmdk", "a-flat.raw"] {
            assert_eq!(what(&[0; 512], name), None, "{name}");
        }
    }

    #[test]
    fn a_word_of_tar_is_not_enough() {
        let mut head = [0; 512];
        head[257..262].copy_from_slice(b"ustar");
        assert_eq!(what(&head, "a"), None);
        // All of its numbers are, whatever its checksum.
        head[257..265].copy_from_slice(b"ustar\x0000");
        assert_eq!(what(&head, "a"), None);
        for field in TAR_NUMBERS {
            head[field.start..field.start + 4].copy_from_slice(b"0644");
        }
        assert_eq!(what(&head, "a"), Some("a tar archive"));
        // Without its magic the checksum is, which some count in signed bytes.
        head[257..265].fill(0);
        head[..3].copy_from_slice(b"x\xe9.");
        assert_eq!(what(&head, "a"), None);
        let sum: i64 = head.iter().map(|byte| i64::from(byte.cast_signed())).sum::<i64>() + 8 * 32;
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert_eq!(what(&head, "a"), Some("a tar archive"));
        head[148..154].copy_from_slice(format!("{:06o}", sum + 256).as_bytes());
        assert_eq!(what(&head, "a"), Some("a tar archive"));
        head[148..154].copy_from_slice(format!("{:06o}", sum + 1).as_bytes());
        assert_eq!(what(&head, "a"), None);
        // A sum of none that is not told is no checksum.
        let mut head = [0xff; 512];
        head[148..156].fill(0);
        assert_eq!(what(&head, "a"), None);
    }
}
