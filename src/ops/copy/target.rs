//! Where guest data goes: what of a chunk is written, and in which pieces.
//!
//! Invariants: pieces are in guest order and do not overlap; a piece starts and ends at a multiple of the
//! granule (or the end of the disk), so that no other piece shares one with it.

pub use super::piece::{Piece, PieceKind};
use super::plan::{Chunk, Zeros};
use super::segment::Content;
use super::zero::SparsePolicy;
use crate::block::io::Step;
use crate::block::{GuestOffset, Node, Result, Store};
use crate::storage::zeros::is_zero;

/// Decides what is done with each part of a chunk. Its bytes are in `buf`, unless no zeros are looked for in them.
pub fn decide(chunk: &Chunk<'_>, buf: &[u8], sparse: SparsePolicy, zeros: Zeros, pieces: &mut Vec<Piece>) {
    pieces.clear();
    let offset = |at: u64| usize::try_from(at - chunk.at).unwrap_or(usize::MAX).min(buf.len());
    let mut rest = chunk.segments.as_slice();
    while let Some((first, others)) = rest.split_first() {
        rest = others;
        let kind = match first.content {
            Content::Keep => PieceKind::Keep,
            Content::Zero if zeros == Zeros::Write => PieceKind::Data,
            Content::Zero => PieceKind::Zero,
            Content::Stored(_) => {
                // Runs do not end where it only lies in another place.
                let mut end = first.end();
                while let Some((next, others)) = rest.split_first()
                    && matches!(next.content, Content::Stored(_))
                {
                    end = next.end();
                    rest = others;
                }
                let from = end.min(chunk.search_from).max(first.at);
                if from > first.at {
                    pieces.push(Piece { at: first.at, len: from - first.at, kind: PieceKind::Data });
                }
                if from < end {
                    sparse.runs(from, &buf[offset(from)..offset(end)], |start, len, data| {
                        let kind = if data { PieceKind::Data } else { PieceKind::Zero };
                        pieces.push(Piece { at: from + start as u64, len: len as u64, kind });
                    });
                }
                continue;
            }
        };
        pieces.push(Piece { at: first.at, len: first.len, kind });
    }
}

/// Has pieces of data that are all zeros made zeros. `buf` starts at the guest's `at`.
pub fn detect_zeros(at: u64, buf: &[u8], pieces: &mut [Piece]) {
    for piece in pieces.iter_mut().filter(|piece| piece.kind == PieceKind::Data) {
        let range = usize::try_from(piece.at - at).ok().zip(usize::try_from(piece.at - at + piece.len).ok());
        if range.and_then(|(from, to)| buf.get(from..to)).is_some_and(is_zero) {
            piece.kind = PieceKind::Zero;
        }
    }
}

const DATA: u8 = 1;
const ZERO: u8 = 2;
const KEEP: u8 = 4;
/// A run of data starts here: what is placed in one call, and so where tables come to lie, follows the runs.
const START: u8 = 8;

/// Rounds the pieces of the chunk to granules. One that holds any data is data; so is one that is in part to be
/// zeroed and in part to be kept, but for what is kept from `blank` on, which is zeros anyway.
pub fn coarsen(at: u64, len: u64, granule: u64, blank: u64, flags: &mut Vec<u8>, pieces: &mut Vec<Piece>) {
    let index = |pos: u64| usize::try_from((pos - at) / granule).unwrap_or(usize::MAX);
    flags.clear();
    flags.resize(index(at + len.next_multiple_of(granule)), 0);
    for piece in pieces.drain(..) {
        let range = index(piece.at)..index(piece.at + piece.len.max(1) - 1) + 1;
        let Some(part) = flags.get_mut(range) else { continue };
        let bit = match piece.kind {
            PieceKind::Data => DATA,
            PieceKind::Zero => ZERO,
            PieceKind::Keep if piece.at < blank => KEEP,
            PieceKind::Keep => 0,
        };
        if bit == DATA
            && let Some(first) = part.iter_mut().find(|flag| **flag & DATA == 0)
        {
            *first |= START;
        }
        part.iter_mut().for_each(|flag| *flag |= bit);
    }
    let kind_of = |flag: u8| match flag & (DATA | ZERO | KEEP) {
        ZERO => PieceKind::Zero,
        KEEP | 0 => PieceKind::Keep,
        _ => PieceKind::Data,
    };
    for (i, flag) in flags.iter().enumerate() {
        let start = i as u64 * granule;
        let size = granule.min(len - start);
        let kind = kind_of(*flag);
        match pieces.last_mut() {
            Some(last) if last.kind == kind && *flag & START == 0 => last.len += size,
            _ => pieces.push(Piece { at: at + start, len: size, kind }),
        }
    }
}

/// Fills those parts of `buf` that are written although they are to be kept (they share a granule with data)
/// with what `read` finds there.
pub fn fill_kept(
    chunk: &Chunk<'_>,
    pieces: &[Piece],
    buf: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    for kept in chunk.segments.iter().filter(|segment| matches!(segment.content, Content::Keep)) {
        let first = pieces.partition_point(|piece| piece.at + piece.len <= kept.at);
        for piece in pieces.iter().skip(first).take_while(|piece| piece.at < kept.end()) {
            if piece.kind != PieceKind::Data {
                continue;
            }
            let from = piece.at.max(kept.at);
            let to = (piece.at + piece.len).min(kept.end());
            let range = usize::try_from(from - chunk.at).unwrap_or(usize::MAX)
                ..usize::try_from(to - chunk.at).unwrap_or(usize::MAX);
            if let Some(part) = buf.get_mut(range) {
                read(from, part)?;
            }
        }
    }
    Ok(())
}

/// Finds room for a piece of data, call by call as the target gives it.
pub fn place<'a>(target: &'a Node, piece: &Piece, from: usize, early: bool, steps: &mut Vec<Step<'a>>) -> Result<()> {
    let mut done = 0;
    while done < piece.len {
        let at = piece.at + done;
        let mut placement = target.place(GuestOffset(at), piece.len - done, Store::Data)?;
        if early {
            placement.publish_early()?;
        }
        let len = placement.len();
        let from = from + usize::try_from(done).unwrap_or(usize::MAX);
        done += len as u64;
        steps.push(Step { placement, from, len, encoded: false, done: 0 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_take_the_strongest_kind_and_keep_runs_apart() {
        let piece = |at, len, kind| Piece { at, len, kind };
        let mut pieces = vec![
            piece(0, 4096, PieceKind::Zero),
            piece(4096, 4096, PieceKind::Data),
            piece(8192, 8192, PieceKind::Zero),
            piece(16384, 8192, PieceKind::Data),
            piece(24576, 4096, PieceKind::Zero),
            piece(28672, 12288, PieceKind::Data),
            piece(40960, 8192, PieceKind::Zero),
            piece(49152, 8192, PieceKind::Keep),
            piece(57344, 100, PieceKind::Keep),
        ];
        coarsen(0, 57444, 16384, u64::MAX, &mut Vec::new(), &mut pieces);
        assert_eq!(
            pieces,
            [
                piece(0, 16384, PieceKind::Data),
                piece(16384, 16384, PieceKind::Data),
                // The second run of that granule is no new run there, but it is in the next.
                piece(32768, 16384, PieceKind::Data),
                piece(49152, 8292, PieceKind::Keep),
            ]
        );
        let ends = [piece(0, 512, PieceKind::Zero), piece(512, 8192, PieceKind::Keep)];
        for (blank, kind) in [(512, PieceKind::Zero), (513, PieceKind::Data)] {
            let mut pieces = ends.to_vec();
            coarsen(0, 8704, 4096, blank, &mut Vec::new(), &mut pieces);
            assert_eq!(pieces, [piece(0, 4096, kind), piece(4096, 4608, PieceKind::Keep)]);
        }
    }
}
