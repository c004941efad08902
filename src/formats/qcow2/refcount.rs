//! Refcounts in the bytes of a refcount block (section "Refcount blocks"): widths of 1 to 64 bits.
//!
//! Widths below a byte are packed from the least significant bit on; wider ones are big endian. Nothing here panics:
//! an index outside the block reads as 0 and is not written.

/// The refcount with that index.
pub fn get(order: u32, block: &[u8], index: usize) -> u64 {
    if order < 3 {
        let (byte, shift, mask) = packed(order, index);
        return block.get(byte).map_or(0, |byte| u64::from((byte >> shift) & mask));
    }
    let width = 1usize << (order - 3);
    let start = index.saturating_mul(width);
    match block.get(start..start.saturating_add(width)) {
        Some(bytes) => bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)),
        None => 0,
    }
}

/// Sets the refcount with that index; bits that do not fit are dropped.
pub fn set(order: u32, block: &mut [u8], index: usize, value: u64) {
    if order < 3 {
        let (byte, shift, mask) = packed(order, index);
        if let Some(byte) = block.get_mut(byte) {
            *byte = (*byte & !(mask << shift)) | ((value as u8 & mask) << shift);
        }
        return;
    }
    let width = 1usize << (order - 3);
    let start = index.saturating_mul(width);
    if let Some(bytes) = block.get_mut(start..start.saturating_add(width)) {
        bytes.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

/// Byte, shift and mask of a refcount narrower than a byte.
fn packed(order: u32, index: usize) -> (usize, u32, u8) {
    let per_byte = 8usize >> order;
    let bits = 1u32 << order;
    (index / per_byte, (index % per_byte) as u32 * bits, ((1u16 << bits) - 1) as u8)
}

/// Makes all refcounts of a block 1.
pub fn fill_with_ones(order: u32, block: &mut [u8]) {
    match order {
        0 => block.fill(0xff),
        1 => block.fill(0x55),
        2 => block.fill(0x11),
        _ => {
            let width = 1usize << (order - 3);
            block.iter_mut().zip(1..).for_each(|(byte, n)| *byte = u8::from(n % width == 0));
        }
    }
}

/// The first index from `from` on, below `end`, whose refcount is zero (or is not, if `zero` is false).
pub fn find(order: u32, block: &[u8], from: usize, end: usize, zero: bool) -> Option<usize> {
    (from..end).find(|index| (get(order, block, *index) == 0) == zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let count = (64 * 8) >> order;
            let most = u64::MAX >> (64 - (1 << order));
            let mut block = vec![0; 64];
            for index in 0..count {
                set(order, &mut block, index, (index as u64 * 7 + 1) & most);
            }
            for index in 0..count {
                assert_eq!(get(order, &block, index), (index as u64 * 7 + 1) & most, "{order} {index}");
            }
            assert_eq!(get(order, &block, count), 0);
            set(order, &mut block, count, 1);
            let mut ones = block;
            fill_with_ones(order, &mut ones);
            assert!((0..count).all(|index| get(order, &ones, index) == 1));
            assert_eq!(find(order, &ones, 0, count, true), None);
        }
    }

    #[test]
    fn narrow_counts_start_at_the_low_bit() {
        let mut block = vec![0; 8];
        set(0, &mut block, 0, 1);
        set(0, &mut block, 9, 1);
        set(2, &mut block, 5, 3);
        assert_eq!(&block[..4], &[1, 2, 0x30, 0]);
    }
}
