//! deflate (RFC 1951) with references of at most 4 KiB: what strict readers of qcow and qcow2 set up.
//!
//! Libraries for that window are made for streams. Whole units at a time, with all places of a hash in the nearest cache,
//! parsing that looks a byte ahead, references of three bytes where they cost less than the bytes, and blocks cut where the
//! symbols change, come out no larger than stock zlib's level 6: at level 6 where it is a system's disk that is encoded
//! (394.5 MB of 950 MiB, zlib 394.9, at 104 MB/s a core), at level 8 with any of these (bytes, in units of 64 KiB; on one
//! core):
//!
//! | | plain | level 8 | zlib | MB/s |
//! |---|---|---|---|---|
//! | programs | 25165824 | 10928243 | 10933750 | 83 |
//! | all files of a system in turn | 25165824 | 9705913 | 9706913 | 89 |
//! | Rust | 16777216 | 3609699 | 3615345 | 121 |
//! | words of no language | 8388608 | 3200672 | 3301011 | 79 |
//! | two letters in no order | 8388608 | 1332734 | 1341677 | 45 |
//!
//! What bounds the speed is the search: a reference that starts a byte later is looked for at every short one.
//!
//! Invariant: the same bytes at the same level always give the same stream, whatever was encoded before.

mod block;
mod huffman;
mod matches;

use super::{Result, reserve};
use block::{Bits, Counts, Logs, Prices, Token};
use matches::{Look, Match, Matcher, PADDING, SHORTEST, WINDOW};

/// The highest level.
pub const LEVELS: u8 = 9;

/// Where blocks may be cut, in tokens.
const SEGMENT: usize = 1536;

/// What a level does.
#[derive(Debug, Clone, Copy)]
struct Effort {
    /// Places that are looked at for a reference, and for one that starts a byte later.
    depth: usize,
    later: usize,
    /// References that are as long are not looked for any further.
    nice: usize,
    /// How far back three bytes are looked for.
    near: usize,
    /// References that are as long are taken without a look at what the next byte would give.
    lazy: usize,
    /// Whether the byte after the next is tried too.
    second: bool,
}

/// For what would have to be as long as such a reference, little is looked at.
const LONG: usize = 16;

impl Effort {
    fn of(level: u8) -> Self {
        let effort = |depth, later, nice, near, lazy| Self { depth, later, nice, near, lazy, second: false };
        match level {
            0 | 1 => effort(1, 0, 16, 0, 0),
            2 => effort(2, 0, 16, 256, 0),
            3 => effort(4, 0, 32, 512, 0),
            4 => effort(4, 2, 32, 512, 5),
            5 => effort(4, 2, 24, 1024, 6),
            6 => effort(6, 2, 24, WINDOW, 6),
            7 => effort(24, 6, 32, WINDOW, 8),
            8 => effort(64, 12, 32, WINDOW, 8),
            _ => Self { second: true, ..effort(WINDOW, WINDOW, 258, WINDOW, 258) },
        }
    }

    fn first(self) -> Look {
        Look { than: 2, depth: self.depth, nice: self.nice, near: self.near }
    }

    /// For what would have to be as long as a reference that is there already.
    fn later(self, found: Match) -> Look {
        let depth = if found.len >= LONG { self.later / 4 } else { self.later };
        Look { than: found.len - 1, depth, nice: self.nice, near: 0 }
    }
}

/// Some tokens in a row.
#[derive(Debug, Clone)]
struct Segment {
    counts: Counts,
    tokens: usize,
    /// Bytes that they stand for.
    bytes: usize,
}

impl Segment {
    const EMPTY: Segment = Segment { counts: Counts::NONE, tokens: 0, bytes: 0 };
}

/// An encoder, with its buffers.
#[derive(Debug)]
pub struct Encoder {
    matcher: Matcher,
    logs: Logs,
    /// What is encoded, with some bytes behind it.
    padded: Vec<u8>,
    tokens: Vec<Token>,
    segments: Vec<Segment>,
}

/// Whether the second reference is that much better: bytes count most, then how near it is.
#[inline(always)]
fn is_better(second: Match, first: Match, by: i32) -> bool {
    let log = |dist: usize| dist.max(1).ilog2() as i32;
    let gain = 4 * (second.len as i32 - first.len as i32) + log(first.dist) - log(second.dist);
    second.dist > 0 && second.len >= first.len && gain > by
}

impl Encoder {
    /// Ready.
    pub fn new() -> Self {
        let (padded, tokens, segments) = (Vec::new(), Vec::new(), Vec::new());
        Self { matcher: Matcher::new(), logs: Logs::new(), padded, tokens, segments }
    }

    /// Encodes `plain` to `out` if that takes at most `limit` bytes; else false, and `out` means nothing.
    pub fn encode(&mut self, level: u8, plain: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<bool> {
        self.tokens.clear();
        reserve(&mut self.tokens, plain.len())?;
        self.segments.clear();
        reserve(&mut self.segments, plain.len() / SEGMENT + 1)?;
        out.clear();
        reserve(out, limit)?;
        self.padded.clear();
        reserve(&mut self.padded, plain.len() + PADDING)?;
        self.padded.extend_from_slice(plain);
        self.padded.extend_from_slice(&[0; PADDING]);
        self.parse(plain.len(), Effort::of(level));
        Ok(self.write(plain, out, limit))
    }

    /// Literals and references for all of it.
    #[inline(never)]
    fn parse(&mut self, end: usize, effort: Effort) {
        let Self { matcher, padded, tokens, segments, .. } = self;
        let mut prices = Prices::UNKNOWN;
        let bytes = &padded[..];
        matcher.clear();
        let mut segment = Segment::EMPTY;
        let mut say = |segment: &mut Segment, prices: &mut Prices, token: Token, bytes: usize| {
            tokens.push(token);
            segment.tokens += 1;
            segment.bytes += bytes;
            if segment.tokens == SEGMENT {
                prices.learn(&segment.counts);
                segments.push(std::mem::replace(segment, Segment::EMPTY));
            }
        };
        let mut at = 0;
        while at < end {
            let mut found = matcher.find(bytes, end, at, effort.first());
            let is_short = found.len == SHORTEST;
            if found.dist == 0 || is_short && !prices.pays(&bytes[at..at + SHORTEST], found.dist) {
                let token = segment.counts.literal(bytes[at]);
                say(&mut segment, &mut prices, token, 1);
                at += 1;
                continue;
            }
            // Would it be better to start a byte or two later?
            let mut known = at + 1;
            while found.len < effort.lazy && found.len < end - at {
                let next = matcher.find(bytes, end, at + 1, effort.later(found));
                known = at + 2;
                let mut later = is_better(next, found, 2).then_some((next, 1));
                if later.is_none() && effort.second && at + 2 < end {
                    let third = matcher.find(bytes, end, at + 2, effort.later(found));
                    known = at + 3;
                    later = is_better(third, found, 6).then_some((third, 2));
                }
                let Some((better, skipped)) = later else { break };
                for byte in &bytes[at..at + skipped] {
                    let token = segment.counts.literal(*byte);
                    say(&mut segment, &mut prices, token, 1);
                }
                (found, at) = (better, at + skipped);
                known = at + 1;
            }
            let token = segment.counts.reference(found.len, found.dist);
            say(&mut segment, &mut prices, token, found.len);
            at += found.len;
            (known..at).for_each(|passed| matcher.pass(bytes, passed));
        }
        if segment.tokens > 0 || segments.is_empty() {
            segments.push(segment);
        }
    }

    /// Joins segments as long as one block for both takes less than one for each, and writes them.
    #[inline(never)]
    fn write(&self, plain: &[u8], out: &mut Vec<u8>, limit: usize) -> bool {
        let mut bits = Bits::new(out);
        let (mut tokens, mut plain) = (&self.tokens[..], plain);
        let mut rest = &self.segments[..];
        while let [first, others @ ..] = rest {
            let mut block = first.clone();
            let mut cost = block.counts.bits(&self.logs);
            rest = others;
            while let [next, others @ ..] = rest {
                let mut both = block.counts.clone();
                both.add(&next.counts);
                let joined = both.bits(&self.logs);
                if joined > cost + next.counts.bits(&self.logs) {
                    break;
                }
                cost = joined;
                block = Segment { counts: both, tokens: block.tokens + next.tokens, bytes: block.bytes + next.bytes };
                rest = others;
            }
            let (these, later) = tokens.split_at(block.tokens);
            let (bytes, left) = plain.split_at(block.bytes);
            (tokens, plain) = (later, left);
            block::write(&mut bits, block.counts, these, bytes, rest.is_empty());
            if bits.len() > limit {
                return false;
            }
        }
        bits.align();
        out.len() <= limit
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Decompress, FlushDecompress, Status};

    use super::*;

    fn text(len: usize) -> Vec<u8> {
        let mut rng = fastrand::Rng::with_seed(len as u64);
        let words: Vec<Vec<u8>> =
            (0..300).map(|_| (0..rng.usize(1..12)).map(|_| rng.u8(b'a'..=b'z')).collect()).collect();
        let mut out = Vec::new();
        while out.len() < len {
            out.extend_from_slice(&words[rng.usize(..300) * rng.usize(..300) / 300]);
            out.push(b' ');
        }
        out.truncate(len);
        out
    }

    fn samples() -> Vec<Vec<u8>> {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut noise = vec![0; 70_000];
        rng.fill(&mut noise);
        let few: Vec<u8> = (0..66_000).map(|_| rng.u8(..3)).collect();
        let mixed = [&text(40_000)[..], &noise[..40_000], &[0; 30_000], &text(5_000)].concat();
        let far: Vec<u8> = noise[..4096].iter().copied().cycle().take(20_000).collect();
        let mut all = vec![vec![], vec![7], vec![0; 65_536], vec![0; 2 << 20], noise, few, mixed, far, text(65_536)];
        all.extend((1..40).map(|len| vec![3; len]));
        all.extend((1..40).map(text));
        all
    }

    /// Everything comes back, the stream ends where it ends, and no reference goes back further than a reader's 4 KiB. (That
    /// reader keeps more than it was told to: stock zlib is asked in `tests/compression.rs`.)
    #[test]
    fn a_strict_reader_reads_it() {
        let mut encoder = Encoder::new();
        for level in [1, 2, 3, 4, 5, 6, 7, 8, 9] {
            for plain in samples() {
                let mut out = Vec::new();
                assert!(encoder.encode(level, &plain, &mut out, plain.len() + 200).unwrap(), "{level} {}", plain.len());
                let mut back = vec![1; plain.len() + 1];
                let mut reader = Decompress::new_with_window_bits(false, 12);
                let status = reader.decompress(&out, &mut back, FlushDecompress::Finish).unwrap();
                assert_eq!(
                    (status, reader.total_in()),
                    (Status::StreamEnd, out.len() as u64),
                    "{level} {}",
                    plain.len()
                );
                assert!(back[..plain.len()] == plain && reader.total_out() == plain.len() as u64);
                assert!(encoder.tokens.iter().all(|token| token.dist() <= WINDOW));
            }
        }
    }

    #[test]
    fn it_is_small() {
        let mut encoder = Encoder::new();
        let mut len = |level, plain: &[u8]| {
            let mut out = Vec::new();
            encoder.encode(level, plain, &mut out, plain.len() * 2).unwrap().then_some(out.len()).unwrap()
        };
        assert!(len(6, &vec![0; 65_536]) < 120);
        // What repeats after the whole window, and noise in the middle of it, cost what they have to.
        let mut noise = vec![0; 4096];
        fastrand::Rng::with_seed(9).fill(&mut noise);
        let far: Vec<u8> = noise.iter().copied().cycle().take(65_536).collect();
        assert!(len(6, &far) < 4096 + 900, "{}", len(6, &far));
        let text = text(65_536);
        assert!(len(9, &text) <= len(6, &text) && len(6, &text) < len(1, &text));
        // Of two symbols in no order each is worth a bit.
        let mut rng = fastrand::Rng::with_seed(2);
        let two: Vec<u8> = (0..65_536).map(|_| rng.u8(b'a'..=b'b')).collect();
        assert!(len(8, &two) < 65_536 / 6 && len(6, &two) < 65_536 * 2 / 11, "{} {}", len(8, &two), len(6, &two));
    }

    #[test]
    fn a_limit_is_kept() {
        let mut encoder = Encoder::new();
        let (mut out, plain) = (Vec::new(), text(65_536));
        let mut encode = |limit| encoder.encode(6, &plain, &mut out, limit).unwrap().then(|| out.clone());
        let whole = encode(plain.len()).unwrap();
        assert!(encode(whole.len()).unwrap() == whole);
        assert!(encode(whole.len() - 1).is_none() && encode(0).is_none());
    }
}
