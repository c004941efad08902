//! Tells data that deflate has no hope with, such as what is compressed already, in a fraction of the time that it
//! would take to find that out by trying.
//!
//! Two looks, so that nothing worth having is lost. The first counts a thousand bytes: where some are much more
//! frequent than others, deflate gets its chance. The second asks zstd's level 1, which also sees repetitions, and
//! runs through noise at the speed of memory.

use super::zstd;

/// Bytes that the first look counts.
const SAMPLES: usize = 1024;
/// A sum of the squares of the counts. Of noise 5116 is expected, give or take 90; 6000 is what bytes have that Huffman
/// codes shrink by 2 %.
const NOISE: u32 = 6000;

/// Whether it is not worth trying. `scratch` is overwritten.
pub fn hopeless(plain: &[u8], scratch: &mut Vec<u8>) -> bool {
    looks_like_noise(plain) && matches!(zstd::encode(1, plain, scratch, plain.len() - plain.len() / 128), Ok(false))
}

fn looks_like_noise(plain: &[u8]) -> bool {
    // An odd step meets every place of a structure.
    let step = (plain.len() / SAMPLES) | 1;
    let mut counts = [0u32; 256];
    let mut samples = 0;
    for byte in plain.iter().step_by(step).take(SAMPLES) {
        if let Some(count) = counts.get_mut(usize::from(*byte)) {
            *count += 1;
            samples += 1;
        }
    }
    samples > SAMPLES / 2 && counts.iter().map(|count| count * count).sum::<u32>() < NOISE
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut rng = fastrand::Rng::with_seed(1);
        (0..len).map(|_| rng.u8(..)).collect()
    }

    #[test]
    fn noise_is_hopeless() {
        for len in [1024, 4096, 65536, 2 << 20] {
            assert!(hopeless(&noise(len), &mut Vec::new()), "{len}");
        }
    }

    #[test]
    fn everything_else_gets_its_chance() {
        let text = "what is compressed already has every byte about as often as any other ".repeat(1000);
        let half: Vec<u8> = noise(65536).into_iter().map(|byte| byte & 0x7f).collect();
        let repeated: Vec<u8> = noise(2000).into_iter().cycle().take(65536).collect();
        let tail: Vec<u8> = noise(60000).into_iter().chain(vec![0; 5536]).collect();
        for plain in [text.as_bytes(), &half, &repeated, &tail, &[0; 65536], &[], &[1], &noise(512)] {
            assert!(!hopeless(plain, &mut Vec::new()), "{} bytes", plain.len());
        }
    }
}
