//! Digests of a disk's content: bytes and runs of zeros in, in order, one value out.
//!
//! [`DigestKind::Sha256`] and [`DigestKind::Blake3`] are those of the bytes, which `sha256sum` and `b3sum` find for a raw
//! image. They look at every zero. [`DigestKind::Blake3Tree`] does not:
//!
//! * the disk is cut into blocks of 64 KiB, the last of which may be shorter; a block's value is its BLAKE3;
//! * two neighbours of one level make one of the next: BLAKE3 of the byte 1 and both values;
//! * what is left at the end without a neighbour of its level is joined from the right to the left, in the same way;
//! * the digest is BLAKE3 of the byte 2, the disk's length in bytes as eight bytes, lowest first, and the value that is
//!   left; for an empty disk there is none.
//!
//! So the value of a run of zeros, however long, is made of one for each level, and all of them are known.

use std::fmt;

use sha2::Digest as _;

/// How much is a block of the tree.
const BLOCK: usize = 64 << 10;

/// Levels of the tree: as many as the bits of a length.
const LEVELS: usize = u64::BITS as usize;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Which digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DigestKind {
    /// SHA-256, FIPS 180-4.
    Sha256,
    /// BLAKE3, "BLAKE3: one function, fast everywhere".
    Blake3,
    /// See the module.
    Blake3Tree,
}

impl DigestKind {
    /// Every one, with its name.
    pub const ALL: [(DigestKind, &'static str); 3] =
        [(Self::Sha256, "sha256"), (Self::Blake3, "blake3"), (Self::Blake3Tree, "blake3-tree")];

    /// Their names.
    pub const NAMES: [&'static str; 3] = [Self::ALL[0].1, Self::ALL[1].1, Self::ALL[2].1];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }

    /// The one with that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind)
    }
}

/// A value; shown as `KIND:HEX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    /// Of what kind.
    pub kind: DigestKind,
    /// The value.
    pub value: [u8; 32],
}

impl Digest {
    /// The value in hexadecimal digits.
    pub fn hex(&self) -> String {
        self.value.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What `KIND:HEX` says, in letters of any case.
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, hex) = text.split_once(':')?;
        let (kind, hex) = (DigestKind::parse(&kind.to_ascii_lowercase())?, hex.as_bytes());
        let mut value = [0; 32];
        if hex.len() != 2 * value.len() {
            return None;
        }
        for (byte, digits) in value.iter_mut().zip(hex.chunks(2)) {
            let digits = std::str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'))?;
            *byte = u8::from_str_radix(digits, 16).ok()?;
        }
        Some(Self { kind, value })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind.name(), self.hex())
    }
}

/// Makes a digest.
pub struct Hasher(Function);

enum Function {
    Sha256(sha2::Sha256),
    Blake3(Box<blake3::Hasher>),
    Tree(Tree),
}

impl Hasher {
    /// Of nothing so far.
    pub fn new(kind: DigestKind) -> Self {
        Self(match kind {
            DigestKind::Sha256 => Function::Sha256(sha2::Sha256::new()),
            DigestKind::Blake3 => Function::Blake3(Box::default()),
            DigestKind::Blake3Tree => Function::Tree(Tree::default()),
        })
    }

    /// These bytes come next.
    pub fn bytes(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Function::Sha256(state) => state.update(bytes),
            Function::Blake3(state) => {
                state.update(bytes);
            }
            Function::Tree(tree) => tree.bytes(bytes),
        }
    }

    /// So many zeros come next.
    pub fn zeros(&mut self, mut len: u64) {
        if let Function::Tree(tree) = &mut self.0 {
            return tree.zeros(len);
        }
        while len > 0 {
            let part = usize::try_from(len).unwrap_or(BLOCK).min(BLOCK);
            self.bytes(&ZEROS[..part]);
            len -= part as u64;
        }
    }

    /// The digest of all that came.
    pub fn finish(self) -> Digest {
        match self.0 {
            Function::Sha256(state) => Digest { kind: DigestKind::Sha256, value: state.finalize().into() },
            Function::Blake3(state) => Digest { kind: DigestKind::Blake3, value: state.finalize().into() },
            Function::Tree(tree) => Digest { kind: DigestKind::Blake3Tree, value: tree.finish() },
        }
    }
}

/// See the module.
struct Tree {
    /// What came of a block that is not complete.
    open: Vec<u8>,
    /// Complete blocks so far.
    blocks: u64,
    /// The values that wait for a neighbour, and their levels, the highest first.
    waiting: Vec<(usize, [u8; 32])>,
    /// What so many zeros come to, for each level.
    zeros: Vec<[u8; 32]>,
}

impl Default for Tree {
    fn default() -> Self {
        let block: [u8; 32] = blake3::hash(&ZEROS).into();
        let zeros = std::iter::successors(Some(block), |value| Some(pair(value, value))).take(LEVELS).collect();
        Self { open: Vec::new(), blocks: 0, waiting: Vec::new(), zeros }
    }
}

fn pair(left: &[u8; 32], right: &[u8; 32]) -> [u8; 32] {
    blake3::Hasher::new().update(&[1]).update(left).update(right).finalize().into()
}

impl Tree {
    fn bytes(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.open.is_empty() && bytes.len() >= BLOCK {
                let (block, rest) = bytes.split_at(BLOCK);
                self.add(0, blake3::hash(block).into());
                bytes = rest;
                continue;
            }
            let (part, rest) = bytes.split_at(bytes.len().min(BLOCK - self.open.len()));
            self.open.extend_from_slice(part);
            bytes = rest;
            if self.open.len() == BLOCK {
                let value = blake3::hash(&self.open).into();
                self.open.clear();
                self.add(0, value);
            }
        }
    }

    fn zeros(&mut self, mut len: u64) {
        if !self.open.is_empty() {
            let missing = BLOCK - self.open.len();
            let part = usize::try_from(len).unwrap_or(missing).min(missing);
            self.bytes(&ZEROS[..part]);
            len -= part as u64;
        }
        let mut blocks = len / BLOCK as u64;
        while blocks > 0 {
            // The most that a value of one level can stand for here.
            let level = (self.blocks.trailing_zeros()).min(blocks.ilog2()) as usize;
            self.add(level, self.zeros.get(level).copied().unwrap_or_default());
            blocks -= 1 << level;
        }
        let rest = usize::try_from(len % BLOCK as u64).unwrap_or_default();
        self.bytes(&ZEROS[..rest]);
    }

    /// A value of a level comes next.
    fn add(&mut self, level: usize, value: [u8; 32]) {
        self.blocks += 1 << level;
        let (mut level, mut value) = (level, value);
        while let Some((_, left)) = self.waiting.pop_if(|(waiting, _)| *waiting == level) {
            value = pair(&left, &value);
            level += 1;
        }
        self.waiting.push((level, value));
    }

    fn finish(mut self) -> [u8; 32] {
        let length = self.blocks * BLOCK as u64 + self.open.len() as u64;
        if !self.open.is_empty() {
            self.waiting.push((0, blake3::hash(&self.open).into()));
        }
        let mut root = blake3::Hasher::new();
        root.update(&[2]).update(&length.to_le_bytes());
        let joined = self.waiting.into_iter().map(|(_, value)| value).rev().reduce(|right, left| pair(&left, &right));
        if let Some(top) = joined {
            root.update(&top);
        }
        root.finalize().into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The tree as the module says it, with no regard to zeros or to pieces.
    fn model(bytes: &[u8]) -> [u8; 32] {
        let mut level: Vec<(usize, [u8; 32])> = Vec::new();
        for (n, block) in bytes.chunks(BLOCK).enumerate() {
            level.push((n, blake3::hash(block).into()));
        }
        fn top(values: &[[u8; 32]]) -> [u8; 32] {
            match values {
                [one] => *one,
                _ => {
                    let left = 1 << (values.len() - 1).ilog2();
                    pair(&top(&values[..left]), &top(&values[left..]))
                }
            }
        }
        let values: Vec<_> = level.into_iter().map(|(_, value)| value).collect();
        let mut all = vec![2];
        all.extend((bytes.len() as u64).to_le_bytes());
        if !values.is_empty() {
            all.extend(top(&values));
        }
        blake3::hash(&all).into()
    }

    #[test]
    fn a_digest_is_the_same_however_its_bytes_come() {
        let mut rng = fastrand::Rng::with_seed(5);
        for blocks in [0, 1, 2, 3, 5, 8, 13] {
            for extra in [0, 1, 700, BLOCK - 1] {
                let mut bytes = vec![0; blocks * BLOCK + extra];
                for _ in 0..blocks {
                    let at = rng.usize(..bytes.len());
                    let to = (at + rng.usize(..3 * BLOCK)).min(bytes.len());
                    rng.fill(&mut bytes[at..to]);
                }
                let whole = Digest { kind: DigestKind::Blake3Tree, value: model(&bytes) };
                let sha = Digest { kind: DigestKind::Sha256, value: sha2::Sha256::digest(&bytes).into() };
                let plain = Digest { kind: DigestKind::Blake3, value: blake3::hash(&bytes).into() };
                for expected in [whole, sha, plain] {
                    let mut hasher = Hasher::new(expected.kind);
                    let mut rest = &bytes[..];
                    while !rest.is_empty() {
                        let zeros = rest.iter().take_while(|byte| **byte == 0).count();
                        let n = if zeros > 0 { zeros } else { 1 + rng.usize(..rest.len().min(2 * BLOCK)) };
                        match zeros {
                            0 => hasher.bytes(&rest[..n]),
                            n => hasher.zeros(n as u64),
                        }
                        rest = &rest[n..];
                    }
                    assert_eq!(hasher.finish(), expected, "{blocks} blocks and {extra}");
                }
            }
        }
    }

    #[test]
    fn zeros_without_end_take_no_time() {
        let digest = |parts: &[u64]| {
            let mut hasher = Hasher::new(DigestKind::Blake3Tree);
            parts.iter().for_each(|len| hasher.zeros(*len));
            hasher.finish()
        };
        assert_eq!(digest(&[(1 << 62) + 77]), digest(&[3, 1 << 61, 70, (1 << 61) + 4]));
        assert_ne!(digest(&[1 << 62]), digest(&[1 << 61]));
    }

    #[test]
    fn digests_are_text() {
        // FIPS 180-4's own example, "abc".
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let mut hasher = Hasher::new(DigestKind::Sha256);
        hasher.bytes(b"abc");
        let digest = hasher.finish();
        assert_eq!((digest.to_string().as_str(), Digest::parse(text)), (text, Some(digest)));
        assert_eq!(Digest::parse(&text.to_uppercase().replace("SHA", "sha")), Some(digest));
        for bad in ["", "sha256", "sha256:", "md5:00", &text[..70], &format!("{text}0"), &text.replace("ba", "+a")] {
            assert_eq!(Digest::parse(bad), None, "{bad}");
        }
    }
}
