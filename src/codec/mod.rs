//! Encodings: bytes in, bytes out; no files.
//!
//! Output is always bounded by the caller's buffer or limit, whatever the input says. State that is costly to set up
//! is kept for each thread and used again.

pub mod base64;
pub mod deflate;
pub mod sample;
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
    /// The encoder itself failed (no memory).
    #[error("the compressor failed")]
    Encoder,
}

/// Result of a codec.
pub type Result<T> = std::result::Result<T, Error>;
