//! Encodings: bytes in, bytes out; no files.
//!
//! Output is always bounded by the caller's buffer or limit, whatever the input says. State that is costly to set up
//! is kept for each thread and used again.

pub mod adc;
pub mod base64;
pub mod bzip2;
pub mod deflate;
pub mod lzfse;
mod narrow;
pub mod sample;
pub mod xz;
pub mod zstd;

/// What can be wrong with encoded bytes, or with the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not what the codec writes.
    #[error("invalid compressed data")]
    Invalid,
    /// It ends before all that is wanted came out.
    #[error("compressed data ends too early")]
    Short,
    /// The encoder itself failed.
    #[error("the compressor failed")]
    Encoder,
    /// There is no memory for what it needs.
    #[error("Cannot allocate memory")]
    Memory,
}

/// Result of a codec.
pub type Result<T> = std::result::Result<T, Error>;

/// Makes room for so many more.
fn reserve<T>(buf: &mut Vec<T>, more: usize) -> Result<()> {
    buf.try_reserve(more).map_err(|_| Error::Memory)
}

/// Makes a buffer that long.
fn resize(buf: &mut Vec<u8>, len: usize) -> Result<()> {
    reserve(buf, len.saturating_sub(buf.len()))?;
    buf.resize(len, 0);
    Ok(())
}

/// Reads until `out` is full; what else there is to read is left.
fn fill(mut from: impl std::io::Read, out: &mut [u8]) -> Result<()> {
    from.read_exact(out).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::Short,
        _ => Error::Invalid,
    })
}
