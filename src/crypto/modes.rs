//! The modes, each generic over the cipher: what goes on for each sector.
//!
//! Slices are whole sectors; [`sectors`](super::sectors) has seen to it. Vectors and tweaks of a batch of sectors are made
//! at once and live on the stack. The cipher is given a
//! whole batch at a time, which fits the CPU's nearest cache with what goes before and after.

use cipher::array::{Array, ArraySize};
use cipher::consts::U16;
use cipher::typenum::Unsigned;
use cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use zeroize::ZeroizeOnDrop;

use super::{CryptoError, Result};

/// Bytes that are encrypted on their own, under a vector of their own.
pub const SECTOR: usize = 512;

/// What a cipher's crate offers.
pub trait BlockCipher:
    BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + ZeroizeOnDrop + Send + Sync + 'static
{
}

impl<C> BlockCipher for C where
    C: BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + ZeroizeOnDrop + Send + Sync + 'static
{
}

/// A cipher in a mode with its key, behind one call for a run of sectors.
pub trait SectorMode: Send + Sync {
    /// Encrypts sectors from that number on.
    fn encrypt(&self, first: u64, sectors: &mut [u8]);
    /// Decrypts sectors from that number on.
    fn decrypt(&self, first: u64, sectors: &mut [u8]);
}

/// Sectors that are worked on at once.
const BATCH: usize = 16;

/// Encrypts initialization vectors.
pub trait Encipher: Send + Sync {
    /// At most [`BATCH`] of them, each on its own: the first block of each.
    fn encipher(&self, vectors: &mut [Array<u8, U16>]);
}

impl<C: BlockCipher> Encipher for C {
    fn encipher(&self, vectors: &mut [Array<u8, U16>]) {
        let mut firsts: [Block<C>; BATCH] = std::array::from_fn(|_| Array::default());
        let len = C::block_size().min(U16::USIZE);
        let used = vectors.len().min(BATCH);
        for (first, vector) in firsts.iter_mut().zip(&*vectors) {
            first[..len].copy_from_slice(&vector[..len]);
        }
        self.encrypt_blocks(&mut firsts[..used]);
        for (first, vector) in firsts.iter().zip(vectors) {
            vector[..len].copy_from_slice(&first[..len]);
        }
    }
}

/// Makes the initialization vectors of sectors.
pub enum Ivs {
    /// 32 bits of the number.
    Plain,
    /// 64 bits of it.
    Plain64,
    /// The same, encrypted.
    Essiv(Box<dyn Encipher>),
}

impl Ivs {
    /// Those of the sectors from `first` on, at most [`BATCH`] of them. Where blocks are short, so are they.
    fn fill<N: ArraySize>(&self, first: u64, ivs: &mut [Array<u8, N>]) {
        let mut wide = [Array::<u8, U16>::default(); BATCH];
        let used = ivs.len().min(BATCH);
        for (n, iv) in wide[..used].iter_mut().enumerate() {
            let sector = first.wrapping_add(n as u64);
            let sector = if matches!(self, Self::Plain) { sector & u64::from(u32::MAX) } else { sector };
            iv[..8].copy_from_slice(&sector.to_le_bytes());
        }
        if let Self::Essiv(cipher) = self {
            cipher.encipher(&mut wide[..used]);
        }
        for (iv, wide) in ivs.iter_mut().zip(&wide) {
            let len = iv.len().min(wide.len());
            iv[..len].copy_from_slice(&wide[..len]);
        }
    }
}

fn blocks<N: ArraySize>(bytes: &mut [u8]) -> &mut [Array<u8, N>] {
    Array::slice_as_chunks_mut(bytes).0
}

#[inline(always)]
fn xor<N: ArraySize>(into: &mut Array<u8, N>, with: &Array<u8, N>) {
    into.iter_mut().zip(with).for_each(|(a, b)| *a ^= b);
}

/// The same for many blocks.
fn mask(bytes: &mut [u8], with: &[u8]) {
    bytes.iter_mut().zip(with).for_each(|(a, b)| *a ^= b);
}

/// Calls `act` with each batch of sectors, the number of its first and its vectors.
fn batches<N: ArraySize>(
    ivs: &Ivs,
    first: u64,
    sectors: &mut [u8],
    mut act: impl FnMut(&mut [u8], &mut [Array<u8, N>]),
) {
    let mut first = first;
    for batch in sectors.chunks_mut(BATCH * SECTOR) {
        let count = batch.len() / SECTOR;
        let mut vectors: [Array<u8, N>; BATCH] = std::array::from_fn(|_| Array::default());
        ivs.fill(first, &mut vectors[..count]);
        act(batch, &mut vectors[..count]);
        first = first.wrapping_add(count as u64);
    }
}

/// [`CipherMode::Ecb`](super::CipherMode::Ecb).
struct Ecb<C> {
    data: C,
}

impl<C: BlockCipher> SectorMode for Ecb<C> {
    fn encrypt(&self, _first: u64, sectors: &mut [u8]) {
        self.data.encrypt_blocks(blocks(sectors));
    }

    fn decrypt(&self, _first: u64, sectors: &mut [u8]) {
        self.data.decrypt_blocks(blocks(sectors));
    }
}

/// [`CipherMode::Cbc`](super::CipherMode::Cbc).
struct Cbc<C> {
    data: C,
    ivs: Ivs,
}

impl<C: BlockCipher> SectorMode for Cbc<C> {
    fn encrypt(&self, first: u64, sectors: &mut [u8]) {
        let step = SECTOR / C::block_size();
        batches::<C::BlockSize>(&self.ivs, first, sectors, |batch, chains| {
            // A chain goes on one block after the other: the blocks in the same place of all sectors go together.
            let batch = blocks::<C::BlockSize>(batch);
            for at in 0..step {
                for (chain, sector) in chains.iter_mut().zip(batch.chunks(step)) {
                    xor(chain, &sector[at]);
                }
                self.data.encrypt_blocks(chains);
                for (chain, sector) in chains.iter().zip(batch.chunks_mut(step)) {
                    sector[at] = chain.clone();
                }
            }
        });
    }

    fn decrypt(&self, first: u64, sectors: &mut [u8]) {
        let mut before = [0; BATCH * SECTOR];
        batches::<C::BlockSize>(&self.ivs, first, sectors, |batch, vectors| {
            let block = C::block_size();
            for ((before, sector), iv) in before.chunks_mut(SECTOR).zip(batch.chunks(SECTOR)).zip(vectors) {
                before[..block].copy_from_slice(iv);
                before[block..].copy_from_slice(&sector[..SECTOR - block]);
            }
            self.data.decrypt_blocks(blocks(batch));
            mask(batch, &before);
        });
    }
}

/// A cipher with its key in a mode.
type Keyed = Option<Box<dyn SectorMode>>;
/// The same with two keys.
type KeyedTwice = fn(&[u8], &[u8], Ivs) -> Keyed;
/// What is done to one chain of whole blocks, with a key and a vector.
type Chain = fn(&[u8], &[u8], &mut [u8]) -> Result<()>;

/// What computes a cipher in each mode. `None` for a key of a length that it cannot have.
pub struct CipherFunctions {
    /// [`CipherMode::Ecb`](super::CipherMode::Ecb).
    pub ecb: fn(&[u8]) -> Keyed,
    /// [`CipherMode::Cbc`](super::CipherMode::Cbc).
    pub cbc: fn(&[u8], Ivs) -> Keyed,
    /// [`CipherMode::Ctr`](super::CipherMode::Ctr).
    pub ctr: fn(&[u8], Ivs) -> Keyed,
    /// [`CipherMode::Xts`](super::CipherMode::Xts), with a key for data and one for the tweak; none where blocks are
    /// shorter than 16 bytes.
    pub xts: Option<KeyedTwice>,
    /// For initialization vectors.
    pub encipher: fn(&[u8]) -> Option<Box<dyn Encipher>>,
    /// Encrypts one chain of whole blocks.
    pub cbc_encrypt: Chain,
    /// Decrypts one chain of whole blocks.
    pub cbc_decrypt: Chain,
}

fn keyed<C: BlockCipher>(key: &[u8]) -> Option<C> {
    C::new_from_slice(key).ok()
}

impl CipherFunctions {
    /// Those of a cipher with blocks of any length.
    pub const fn narrow<C: BlockCipher>() -> Self {
        Self {
            ecb: |key| Some(Box::new(Ecb::<C> { data: keyed(key)? })),
            cbc: |key, ivs| Some(Box::new(Cbc::<C> { data: keyed(key)?, ivs })),
            ctr: |key, ivs| Some(Box::new(Ctr::<C> { data: keyed(key)?, ivs })),
            xts: None,
            encipher: |key| Some(Box::new(keyed::<C>(key)?)),
            cbc_encrypt: cbc_encrypt::<C>,
            cbc_decrypt: cbc_decrypt::<C>,
        }
    }

    /// Those of a cipher with blocks of 16 bytes.
    pub const fn wide<C: BlockCipher<BlockSize = U16>>() -> Self {
        Self {
            xts: Some(|data, tweak, ivs| Some(Box::new(Xts::<C> { data: keyed(data)?, tweak: keyed(tweak)?, ivs }))),
            ..Self::narrow::<C>()
        }
    }
}

fn set<C: BlockCipher>(key: &[u8], iv: &[u8]) -> Result<(C, Block<C>)> {
    let cipher = C::new_from_slice(key).map_err(|_| CryptoError::Length(key.len()))?;
    let iv = Array::try_from(iv).map_err(|_| CryptoError::Length(iv.len()))?;
    Ok((cipher, iv))
}

/// One chain of whole blocks.
fn cbc_encrypt<C: BlockCipher>(key: &[u8], iv: &[u8], bytes: &mut [u8]) -> Result<()> {
    let (cipher, mut chain) = set::<C>(key, iv)?;
    for block in blocks::<C::BlockSize>(bytes) {
        xor(block, &chain);
        cipher.encrypt_block(block);
        chain = block.clone();
    }
    Ok(())
}

/// One chain of whole blocks.
fn cbc_decrypt<C: BlockCipher>(key: &[u8], iv: &[u8], bytes: &mut [u8]) -> Result<()> {
    let (cipher, mut chain) = set::<C>(key, iv)?;
    for block in blocks::<C::BlockSize>(bytes) {
        let next = block.clone();
        cipher.decrypt_block(block);
        xor(block, &chain);
        chain = next;
    }
    Ok(())
}

/// [`CipherMode::Ctr`](super::CipherMode::Ctr).
struct Ctr<C> {
    data: C,
    ivs: Ivs,
}

impl<C: BlockCipher> Ctr<C> {
    fn apply(&self, first: u64, sectors: &mut [u8]) {
        let mut stream = [0; BATCH * SECTOR];
        batches::<C::BlockSize>(&self.ivs, first, sectors, |batch, counters| {
            let stream = &mut stream[..batch.len()];
            for (counter, sector) in counters.iter().zip(stream.chunks_mut(SECTOR)) {
                let unused = 128 - 8 * C::block_size();
                let mut counter = counter.iter().fold(0, |counter: u128, byte| counter << 8 | u128::from(*byte));
                for block in sector.chunks_exact_mut(C::block_size()) {
                    block.copy_from_slice(&(counter << unused).to_be_bytes()[..C::block_size()]);
                    counter = counter.wrapping_add(1);
                }
            }
            self.data.encrypt_blocks(blocks(stream));
            mask(batch, stream);
        });
    }
}

impl<C: BlockCipher> SectorMode for Ctr<C> {
    fn encrypt(&self, first: u64, sectors: &mut [u8]) {
        self.apply(first, sectors);
    }

    fn decrypt(&self, first: u64, sectors: &mut [u8]) {
        self.apply(first, sectors);
    }
}

/// [`CipherMode::Xts`](super::CipherMode::Xts).
struct Xts<C> {
    data: C,
    tweak: C,
    ivs: Ivs,
}

/// Blocks of a sector in [`Xts`].
const WIDE: usize = SECTOR / 16;

impl<C: BlockCipher<BlockSize = U16>> Xts<C> {
    fn apply(&self, first: u64, sectors: &mut [u8], act: impl Fn(&C, &mut [Array<u8, U16>])) {
        let mut masks = [[0; 16]; BATCH * WIDE];
        batches::<U16>(&self.ivs, first, sectors, |batch, vectors| {
            self.tweak.encrypt_blocks(vectors);
            tweaks(vectors, &mut masks);
            mask(batch, masks.as_flattened());
            act(&self.data, blocks(batch));
            mask(batch, masks.as_flattened());
        });
    }
}

/// The tweak of each block of a batch: that of the one before, times x in GF(2^128) (IEEE 1619-2007, 5.2), from the first
/// of each sector. Some sectors go side by side, since a chain alone would wait for itself.
fn tweaks(first: &[Array<u8, U16>], tweaks: &mut [[u8; 16]; BATCH * WIDE]) {
    const LANES: usize = 4;
    for (first, tweaks) in first.chunks(LANES).zip(tweaks.chunks_exact_mut(LANES * WIDE)) {
        let (mut low, mut high) = ([0u64; LANES], [0u64; LANES]);
        for (n, first) in first.iter().enumerate() {
            let first = u128::from_le_bytes(first.0);
            (low[n], high[n]) = (first as u64, (first >> 64) as u64);
        }
        for at in 0..WIDE {
            for n in 0..LANES {
                let tweak = u128::from(low[n]) | u128::from(high[n]) << 64;
                tweaks[n * WIDE + at] = tweak.to_le_bytes();
            }
            let over = high.map(|high| (high >> 63).wrapping_neg() & 0x87);
            for n in 0..LANES {
                high[n] = high[n] << 1 | low[n] >> 63;
                low[n] = low[n] << 1 ^ over[n];
            }
        }
    }
}

impl<C: BlockCipher<BlockSize = U16>> SectorMode for Xts<C> {
    fn encrypt(&self, first: u64, sectors: &mut [u8]) {
        self.apply(first, sectors, |cipher, blocks| cipher.encrypt_blocks(blocks));
    }

    fn decrypt(&self, first: u64, sectors: &mut [u8]) {
        self.apply(first, sectors, |cipher, blocks| cipher.decrypt_blocks(blocks));
    }
}
