//! Blocks of a deflate stream (RFC 1951, section 3.2): what is said and how often, what that costs, and the bits.

use super::huffman;

/// Literals, the end of a block, and lengths.
const LITLEN: usize = 286;
/// Distances.
const DISTS: usize = 30;
/// The symbol that ends a block.
const END: usize = 256;
/// What tells a reference from a literal in a [`Token`].
const REFERENCE: u32 = 1 << 31;
/// In what order the lengths of the code for lengths are written.
const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
/// The most bytes in a stored block.
const STORED: usize = 65_535;

/// The shortest length that each length code stands for.
const LEN_BASE: [u16; 29] =
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
/// How many bits follow it.
const LEN_EXTRA: [u8; 29] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];

/// The code of each length, from 3 on.
static LEN_CODE: [u8; 256] = {
    let mut table = [0u8; 256];
    let (mut len, mut code) = (3, 0);
    while len <= 258 {
        while code < 28 && LEN_BASE[code + 1] as usize <= len {
            code += 1;
        }
        table[len - 3] = code as u8;
        len += 1;
    }
    table
};

/// Codes 0 to 3 are distances of 1 to 4; then two codes have each number of bits.
#[inline(always)]
fn dist_code(dist: usize) -> usize {
    let below = (dist - 1) as u32;
    if below < 4 {
        return below as usize;
    }
    let top = 31 - below.leading_zeros();
    (2 * top + (below >> (top - 1) & 1)) as usize
}

fn dist_extra(code: usize) -> u32 {
    (code as u32 / 2).saturating_sub(1)
}

fn dist_base(code: usize) -> usize {
    if code < 4 { code + 1 } else { ((2 + code % 2) << (code / 2 - 1)) + 1 }
}

/// A literal, or a reference: what a block says, in order.
#[derive(Debug, Clone, Copy)]
pub struct Token(u32);

#[cfg(test)]
impl Token {
    /// How far back a reference goes; 0 for a literal.
    pub fn dist(self) -> usize {
        if self.0 & REFERENCE == 0 { 0 } else { usize::from(self.0 as u16) }
    }
}

/// How often each symbol is said.
#[derive(Debug, Clone)]
pub struct Counts {
    litlen: [u32; LITLEN],
    dist: [u32; DISTS],
}

impl Counts {
    /// Nothing has been said.
    pub const NONE: Counts = Counts { litlen: [0; LITLEN], dist: [0; DISTS] };

    /// Counts a literal.
    #[inline(always)]
    pub fn literal(&mut self, byte: u8) -> Token {
        self.litlen[usize::from(byte)] += 1;
        Token(u32::from(byte))
    }

    /// Counts a reference, of 3 to 258 bytes up to 32 KiB back.
    #[inline(always)]
    pub fn reference(&mut self, len: usize, dist: usize) -> Token {
        self.litlen[END + 1 + usize::from(LEN_CODE[(len - 3) & 0xff])] += 1;
        self.dist[dist_code(dist)] += 1;
        Token(REFERENCE | (len as u32) << 16 | dist as u32)
    }

    /// Both.
    pub fn add(&mut self, other: &Counts) {
        self.litlen.iter_mut().zip(&other.litlen).for_each(|(sum, more)| *sum += more);
        self.dist.iter_mut().zip(&other.dist).for_each(|(sum, more)| *sum += more);
    }

    /// About how many bits a block of its own takes for them: the entropy, and what its codes cost to describe.
    pub fn bits(&self, logs: &Logs) -> f32 {
        let of = |counts: &[u32]| {
            let (mut all, mut sum, mut used) = (0, 0.0, 0);
            for count in counts {
                all += count;
                used += u32::from(*count > 0);
                sum += logs.times(*count);
            }
            logs.times(all) - sum + 3.0 * used as f32
        };
        of(&self.litlen) + of(&self.dist) + 50.0
    }
}

/// About what bytes and references cost, in sixteenths of a bit, where each is said as often as it was before.
#[derive(Debug)]
pub struct Prices {
    literal: [u16; 256],
    /// The shortest length.
    short: u16,
    dist: [u16; DISTS],
}

impl Prices {
    /// Before anything was said.
    pub const UNKNOWN: Prices = Prices { literal: [7 * 16; 256], short: 5 * 16, dist: [15 * 16; DISTS] };

    /// After that was said.
    #[cold]
    #[inline(never)]
    pub fn learn(&mut self, counts: &Counts) {
        let all = |counts: &[u32]| counts.iter().sum::<u32>() as f32 + 64.0;
        let price = |all: f32, count: u32| (16.0 * (all / (count as f32 + 1.0)).log2().max(1.0)) as u16;
        let (litlens, dists) = (all(&counts.litlen), all(&counts.dist));
        for (price_of, count) in self.literal.iter_mut().zip(counts.litlen) {
            *price_of = price(litlens, count);
        }
        self.short = price(litlens, counts.litlen[END + 1]);
        for ((price_of, count), code) in self.dist.iter_mut().zip(counts.dist).zip(0..) {
            *price_of = price(dists, count) + 16 * dist_extra(code) as u16;
        }
    }

    /// Whether a reference of the shortest length costs less than the bytes that it stands for.
    #[inline(always)]
    pub fn pays(&self, bytes: &[u8], dist: usize) -> bool {
        bytes.iter().map(|byte| self.literal[usize::from(*byte)]).sum::<u16>() > self.short + self.dist[dist_code(dist)]
    }
}

/// `n * log2(n)` of small numbers.
#[derive(Debug)]
pub struct Logs(Vec<f32>);

impl Logs {
    /// The table.
    pub fn new() -> Self {
        Self((0..4096u16).map(|n| Self::times_of(n.into())).collect())
    }

    fn times_of(n: u32) -> f32 {
        let n = n as f32;
        if n > 0.0 { n * n.log2() } else { 0.0 }
    }

    fn times(&self, n: u32) -> f32 {
        self.0.get(n as usize).copied().unwrap_or_else(|| Self::times_of(n))
    }
}

/// Bits of a stream, the first ones lowest.
#[derive(Debug)]
pub struct Bits<'a> {
    out: &'a mut Vec<u8>,
    held: u64,
    count: u32,
}

impl<'a> Bits<'a> {
    /// Behind what is there.
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, held: 0, count: 0 }
    }

    /// Whole bytes that have been written.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Up to 32 bits more.
    #[inline(always)]
    fn put(&mut self, value: u64, bits: u32) {
        self.held |= value << self.count;
        self.count += bits;
        if self.count >= 32 {
            self.out.extend_from_slice(&(self.held as u32).to_le_bytes());
            self.held >>= 32;
            self.count -= 32;
        }
    }

    /// Zeros up to the next byte.
    pub fn align(&mut self) {
        while self.count > 0 {
            self.out.push(self.held as u8);
            self.held >>= 8;
            self.count = self.count.saturating_sub(8);
        }
        self.held = 0;
    }
}

/// The codes of a block, or those that are fixed by the standard.
struct Codes {
    litlen: [u8; LITLEN + 2],
    dist: [u8; DISTS],
}

/// A block's own codes as they are written: lengths in runs, by a code of their own.
struct Described {
    litlens: usize,
    dists: usize,
    runs: Vec<(u8, u8)>,
    lengths: [u8; 19],
    orders: usize,
}

fn used(lengths: &[u8]) -> usize {
    lengths.len() - lengths.iter().rev().take_while(|len| **len == 0).count()
}

/// Bits that follow a symbol of the code for lengths.
fn run_extra(symbol: u8) -> u32 {
    match symbol {
        16 => 2,
        17 => 3,
        18 => 7,
        _ => 0,
    }
}

impl Described {
    fn new(codes: &Codes) -> Self {
        let litlens = used(&codes.litlen[..LITLEN]).max(END + 1);
        let dists = used(&codes.dist).max(1);
        let all = [&codes.litlen[..litlens], &codes.dist[..dists]].concat();
        let mut runs = Vec::with_capacity(all.len());
        for same in all.chunk_by(|a, b| a == b) {
            let (value, mut left) = (same[0], same.len());
            if value != 0 {
                runs.push((value, 0));
                left -= 1;
            }
            while left >= 3 {
                let (symbol, least, most) = match (value, left) {
                    (0, 11..) => (18, 11, 138),
                    (0, _) => (17, 3, 10),
                    _ => (16, 3, 6),
                };
                let taken = left.min(most);
                runs.push((symbol, (taken - least) as u8));
                left -= taken;
            }
            runs.extend(std::iter::repeat_n((value, 0), left));
        }
        let mut counts = [0; 19];
        runs.iter().for_each(|(symbol, _)| counts[usize::from(*symbol)] += 1);
        let mut lengths = [0; 19];
        huffman::lengths(&counts, 7, &mut lengths);
        let orders = used(&ORDER.map(|symbol| lengths[symbol])).max(4);
        Self { litlens, dists, runs, lengths, orders }
    }

    fn bits(&self) -> u64 {
        let run = |(symbol, _): &(u8, u8)| u32::from(self.lengths[usize::from(*symbol)]) + run_extra(*symbol);
        14 + 3 * self.orders as u64 + self.runs.iter().map(|each| u64::from(run(each))).sum::<u64>()
    }

    fn write(&self, bits: &mut Bits<'_>) {
        bits.put((self.litlens - END - 1) as u64, 5);
        bits.put((self.dists - 1) as u64, 5);
        bits.put((self.orders - 4) as u64, 4);
        for symbol in &ORDER[..self.orders] {
            bits.put(self.lengths[*symbol].into(), 3);
        }
        let mut codes = [0; 19];
        huffman::codes(&self.lengths, &mut codes);
        for (symbol, extra) in &self.runs {
            let n = usize::from(*symbol);
            bits.put(codes[n].into(), self.lengths[n].into());
            bits.put((*extra).into(), run_extra(*symbol));
        }
    }
}

impl Codes {
    fn of(counts: &Counts) -> Self {
        let mut codes = Self { litlen: [0; LITLEN + 2], dist: [0; DISTS] };
        huffman::lengths(&counts.litlen, 15, &mut codes.litlen[..LITLEN]);
        huffman::lengths(&counts.dist, 15, &mut codes.dist);
        codes
    }

    /// RFC 1951, section 3.2.6.
    fn fixed() -> Self {
        let mut litlen = [8; LITLEN + 2];
        litlen[144..END].fill(9);
        litlen[END..280].fill(7);
        Self { litlen, dist: [5; DISTS] }
    }

    /// Bits of all symbols, without those that follow some of them.
    fn bits(&self, counts: &Counts) -> u64 {
        let of = |counts: &[u32], lengths: &[u8]| -> u64 {
            counts.iter().zip(lengths).map(|(count, len)| u64::from(*count) * u64::from(*len)).sum()
        };
        of(&counts.litlen, &self.litlen) + of(&counts.dist, &self.dist)
    }

    fn write(&self, bits: &mut Bits<'_>, tokens: &[Token]) {
        let (mut litlen, mut dists) = ([0; LITLEN + 2], [0; DISTS]);
        huffman::codes(&self.litlen, &mut litlen);
        huffman::codes(&self.dist, &mut dists);
        let symbol = |n: usize| (u64::from(litlen[n]), u32::from(self.litlen[n]));
        let literals: [(u64, u32); 256] = std::array::from_fn(symbol);
        // With the bits that follow.
        let lens: [(u64, u32); 256] = std::array::from_fn(|n| {
            let code = usize::from(LEN_CODE[n]);
            let (value, len) = symbol(END + 1 + code);
            let extra = (n + 3 - usize::from(LEN_BASE[code])) as u64;
            (value | extra << len, len + u32::from(LEN_EXTRA[code]))
        });
        let dists: [(u64, u32, usize); 32] = std::array::from_fn(|n| match dists.get(n) {
            Some(code) => (u64::from(*code), u32::from(self.dist[n]), dist_base(n)),
            None => (0, 0, 1),
        });
        for Token(token) in tokens {
            if token & REFERENCE == 0 {
                let (value, len) = literals[(token & 0xff) as usize];
                bits.put(value, len);
                continue;
            }
            let (value, len) = lens[((token >> 16 & 0x7fff).wrapping_sub(3) & 0xff) as usize];
            bits.put(value, len);
            let dist = (token & 0xffff) as usize;
            let code = dist_code(dist) & 31;
            let (value, len, base) = dists[code];
            bits.put(value | ((dist - base) as u64) << len, len + dist_extra(code));
        }
        let (value, len) = symbol(END);
        bits.put(value, len);
    }
}

/// Writes the `tokens` that stand for `plain` as one block, in the way that takes least.
pub fn write(bits: &mut Bits<'_>, mut counts: Counts, tokens: &[Token], plain: &[u8], last: bool) {
    counts.litlen[END] += 1;
    let (own, fixed) = (Codes::of(&counts), Codes::fixed());
    let described = Described::new(&own);
    let lens: u64 =
        counts.litlen[END + 1..].iter().zip(LEN_EXTRA).map(|(n, extra)| u64::from(*n) * u64::from(extra)).sum();
    let dists: u64 = counts.dist.iter().zip(0..).map(|(n, code)| u64::from(*n) * u64::from(dist_extra(code))).sum();
    let (by_own, by_fixed) = (described.bits() + own.bits(&counts), fixed.bits(&counts));
    let stored = 8 * plain.len() as u64 + 40 * plain.len().div_ceil(STORED) as u64;
    if !plain.is_empty() && stored < by_own.min(by_fixed) + lens + dists {
        return store(bits, plain, last);
    }
    bits.put(last.into(), 1);
    if by_fixed <= by_own {
        bits.put(1, 2);
        fixed.write(bits, tokens);
    } else {
        bits.put(2, 2);
        described.write(bits);
        own.write(bits, tokens);
    }
}

/// As they are.
fn store(bits: &mut Bits<'_>, plain: &[u8], last: bool) {
    let mut parts = plain.chunks(STORED).peekable();
    while let Some(part) = parts.next() {
        bits.put((last && parts.peek().is_none()).into(), 3);
        bits.align();
        let len = part.len() as u16;
        bits.out.extend_from_slice(&len.to_le_bytes());
        bits.out.extend_from_slice(&(!len).to_le_bytes());
        bits.out.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_lengths_and_distances_are_those_of_the_standard() {
        for (len, code) in [(3, 0), (10, 7), (11, 8), (12, 8), (257, 27), (258, 28), (227, 27), (130, 23)] {
            assert_eq!(usize::from(LEN_CODE[len - 3]), code, "{len}");
        }
        for (dist, code) in [(1, 0), (4, 3), (5, 4), (6, 4), (7, 5), (9, 6), (4096, 23), (32_768, 29), (24_577, 29)] {
            assert_eq!(dist_code(dist), code, "{dist}");
            assert!((dist_base(code)..dist_base(code) + (1 << dist_extra(code))).contains(&dist), "{dist}");
        }
    }
}
