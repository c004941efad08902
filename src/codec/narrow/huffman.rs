//! Prefix codes of limited length (RFC 1951, section 3.2.2).

/// As many symbols as an alphabet has at most.
const MOST: usize = 288;

/// The lengths of a code for symbols that occur so often, none longer than `limit`; 0 for those that do not occur.
///
/// Huffman's, and where that is longer than allowed, the lengths are cut and others made longer until they are a code.
pub fn lengths(counts: &[u32], limit: usize, out: &mut [u8]) {
    out.fill(0);
    // By count, then by symbol, so that the same counts always give the same code.
    let mut leaves = [0u64; MOST];
    let mut used = 0;
    for (symbol, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        leaves[used] = u64::from(*count) << 16 | symbol as u64;
        used += 1;
    }
    let leaves = &mut leaves[..used];
    leaves.sort_unstable();
    let symbol = |leaf: u64| (leaf & 0xffff) as usize;
    if let [only] = leaves {
        out[symbol(*only)] = 1;
    }
    if used < 2 {
        return;
    }
    let mut of_length = cut(&depths(leaves), limit);
    let mut rest = leaves.iter();
    for len in (1..=limit).rev() {
        for leaf in rest.by_ref().take(std::mem::take(&mut of_length[len])) {
            out[symbol(*leaf)] = len as u8;
        }
    }
}

/// How many leaves Huffman's tree has at each depth; those that are deeper than 63 are counted there.
fn depths(leaves: &[u64]) -> [usize; 64] {
    let used = leaves.len();
    // Two queues that both ascend: the leaves, and the inner nodes in the order in which they are made.
    let mut weight = [0u64; MOST];
    let (mut leaf_parent, mut node_parent) = ([0usize; MOST], [0usize; MOST]);
    let (mut leaf, mut node) = (0, 0);
    for made in 0..used - 1 {
        for _ in 0..2 {
            if leaf < used && (node >= made || leaves[leaf] >> 16 <= weight[node]) {
                weight[made] += leaves[leaf] >> 16;
                leaf_parent[leaf] = made;
                leaf += 1;
            } else {
                weight[made] += weight[node];
                node_parent[node] = made;
                node += 1;
            }
        }
    }
    let mut depth = [0usize; MOST];
    for node in (0..used - 2).rev() {
        depth[node] = depth[node_parent[node]] + 1;
    }
    let mut of_depth = [0; 64];
    for parent in &leaf_parent[..used] {
        of_depth[(depth[*parent] + 1).min(63)] += 1;
    }
    of_depth
}

/// The same number of leaves, none deeper than `limit`, and still a whole code.
fn cut(of_depth: &[usize; 64], limit: usize) -> [usize; 16] {
    let mut of_length = [0; 16];
    for (depth, leaves) in of_depth.iter().enumerate() {
        of_length[depth.min(limit)] += leaves;
    }
    // How much of all codes is taken, in units of the longest.
    let whole = 1usize << limit;
    let mut taken: usize = (1..=limit).map(|len| of_length[len] << (limit - len)).sum();
    while taken > whole {
        // The longest of the shorter ones gets longer.
        let len = (1..limit).rev().find(|len| of_length[*len] > 0).unwrap_or(1);
        of_length[len] -= 1;
        of_length[len + 1] += 1;
        taken -= 1 << (limit - len - 1);
    }
    while taken < whole {
        // The longest whose other half is free gets shorter.
        let free = whole - taken;
        let Some(len) = (2..=limit).rev().find(|len| of_length[*len] > 0 && 1 << (limit - len) <= free) else { break };
        of_length[len] -= 1;
        of_length[len - 1] += 1;
        taken += 1 << (limit - len);
    }
    of_length
}

/// The codes that have those lengths, their first bit lowest.
pub fn codes(lengths: &[u8], out: &mut [u16]) {
    let mut of_length = [0u16; 16];
    for len in lengths.iter().filter(|len| **len > 0) {
        of_length[usize::from(*len)] += 1;
    }
    let mut next = [0u16; 16];
    for len in 1..16 {
        next[len] = (next[len - 1] + of_length[len - 1]) << 1;
    }
    for (len, code) in lengths.iter().zip(out).filter(|(len, _)| **len > 0) {
        let next = &mut next[usize::from(*len)];
        *code = next.reverse_bits() >> (16 - *len);
        *next = next.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(counts: &[u32], limit: usize) -> Vec<u8> {
        let mut out = vec![9; counts.len()];
        lengths(counts, limit, &mut out);
        out
    }

    #[test]
    fn frequent_symbols_have_short_codes() {
        assert_eq!(made(&[0, 5, 0], 15), [0, 1, 0]);
        assert_eq!(made(&[0; 3], 15), [0; 3]);
        assert_eq!(made(&[1, 1, 2, 4], 15), [3, 3, 2, 1]);
        assert_eq!(made(&[3, 3, 3, 3], 15), [2; 4]);
    }

    #[test]
    fn no_code_is_longer_than_the_limit_and_all_of_them_are_whole() {
        let mut rng = fastrand::Rng::with_seed(7);
        for limit in [7, 15] {
            for n in 2..=if limit == 7 { 19 } else { 286 } {
                // Ever more uneven, up to what makes the deepest tree there is.
                let mut counts = vec![1u32; n];
                for i in 2..n.min(40) {
                    counts[i] = if n % 2 == 0 { counts[i - 1] + counts[i - 2] } else { rng.u32(0..1 << (n % 30)) };
                }
                let lens = made(&counts, limit);
                let taken: usize =
                    lens.iter().filter(|len| **len > 0).map(|len| 1 << (limit - usize::from(*len))).sum();
                assert_eq!(taken, 1 << limit, "{counts:?} {lens:?}");
                assert!(counts.iter().zip(&lens).all(|(count, len)| (*count > 0) == (*len > 0)));
            }
        }
    }

    /// The example of RFC 1951, section 3.2.2.
    #[test]
    fn codes_are_those_of_the_standard() {
        let mut out = [0; 8];
        codes(&[3, 3, 3, 3, 3, 2, 4, 4], &mut out);
        let want = ["010", "011", "100", "101", "110", "00", "1110", "1111"];
        for (code, want) in out.iter().zip(want) {
            let text: String = (0..want.len()).map(|bit| if code >> bit & 1 == 1 { '1' } else { '0' }).collect();
            assert_eq!(text, want);
        }
    }
}
