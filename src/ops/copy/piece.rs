//! A run of a chunk, and what is done with it.

/// What is done with a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceKind {
    /// It is written.
    Data,
    /// It is made to read as zeros.
    Zero,
    /// It is left as it is.
    Keep,
}

/// A run of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it starts on the target.
    pub at: u64,
    /// Its length.
    pub len: u64,
    /// What is done with it.
    pub kind: PieceKind,
}
