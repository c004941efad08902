//! Base64 (RFC 4648, section 4). Secrets are given in it: in groups of four letters, between which there may be
//! line ends. A last group that is not complete holds nothing. Padding takes one byte away each, wherever it stands in
//! the second half of a group: the third letter the second byte, the fourth letter the third.

/// The bytes; nothing where there is anything that is no letter of it.
pub fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let letters = || text.iter().copied().filter(|letter| *letter != b'\n');
    if !letters().all(|letter| letter == b'=' || value(letter).is_some()) {
        return None;
    }
    // It may be a key: no copy of it is left behind.
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 3);
    let (mut bits, mut count, mut kept) = (0u32, 0, [true; 3]);
    for letter in letters() {
        bits = bits << 6 | value(letter).unwrap_or(0);
        count += 1;
        if count > 2 {
            kept[count - 2] = letter != b'=';
        }
        if count == 4 {
            out.extend(
                bits.to_be_bytes().into_iter().skip(1).zip(kept).filter_map(|(byte, kept)| kept.then_some(byte)),
            );
            (bits, count, kept) = (0, 0, [true; 3]);
        }
    }
    Some(out)
}

/// The letters.
pub fn encode(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().chain(&[0, 0]).take(3).fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
        for n in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * n) & 63) as usize];
            out.push(if n > group.len() { '=' } else { char::from(letter) });
        }
    }
    out
}

fn value(letter: u8) -> Option<u32> {
    let (first, base) = match letter {
        b'A'..=b'Z' => (b'A', 0),
        b'a'..=b'z' => (b'a', 26),
        b'0'..=b'9' => (b'0', 52),
        b'+' => return Some(62),
        b'/' => return Some(63),
        _ => return None,
    };
    Some(u32::from(letter - first) + base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_rfc() {
        for (text, plain) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYg==", "foob"),
            ("Zm9vYmE=", "fooba"),
            ("Zm9vYmFy\n", "foobar"),
            ("Zm9vYm\nFy", "foobar"),
            ("Zm9vYg", "foo"),
            ("YQ=b", "a\u{1b}"),
            ("Y=Q=", "`\u{4}"),
            ("YQ==YQ==", "aa"),
        ] {
            assert_eq!(decode(text.as_bytes()).as_deref(), Some(plain.as_bytes()), "{text}");
        }
        for (text, plain) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmE=", "fooba")] {
            assert_eq!(encode(plain.as_bytes()), text);
        }
        assert_eq!(encode(&[0xfb, 0xff, 0xbf]), "+/+/");
        assert_eq!(decode(b"+/+/"), Some(vec![0xfb, 0xff, 0xbf]));
        assert_eq!(decode(b"Zm9v!"), None);
    }
}
