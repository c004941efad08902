//! What a layer needs of its own before it stands on another backing file: where it stores nothing, what it shows now
//! and would not show then.
//!
//! Invariant: what is not copied reads the same on both.

use std::sync::Arc;

use super::piece::{Piece, PieceKind};
use super::segment::{Content, Segment, status};
use crate::block::io::{Scratch, resize};
use crate::block::{ExtentKind, GuestOffset, Mapping, Node, Result};
use crate::storage::zeros::is_zero;

/// The new backing file, or none.
#[derive(Debug)]
pub struct Onto(pub Option<Arc<Node>>);

impl Onto {
    /// The run at `at` of the layer that `top` has on its old backing file.
    pub fn map<'a>(&self, top: &'a Node, at: u64, max: u64) -> Result<Segment<'a>> {
        let own = status(top, GuestOffset(at), max, 1)?;
        if !matches!(own.kind, ExtentKind::Unallocated(_)) {
            return Ok(Segment { at, len: own.len, content: Content::Keep });
        }
        let old = status(top, GuestOffset(at), own.len, usize::MAX)?;
        let new = self.0.as_ref().map(|new| status(new, GuestOffset(at), old.len, usize::MAX)).transpose()?;
        let len = new.map_or(old.len, |new| new.len);
        let content = match (old.is_zero(), new.is_none_or(|new| new.is_zero())) {
            (true, true) => Content::Keep,
            (true, false) => Content::Zero,
            (false, _) if new.is_some_and(|new| same_place(&old, &new)) => Content::Keep,
            (false, _) => Content::Stored(old),
        };
        Ok(Segment { at, len, content })
    }

    /// Leaves out what reads the same on the new backing file, granule by granule. `buf` starts at the guest's `at`,
    /// and so do the pieces.
    pub fn keep_same(
        &self,
        at: u64,
        granule: u64,
        buf: &[u8],
        pieces: &mut Vec<Piece>,
        other: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let granule = usize::try_from(granule.max(1)).unwrap_or(usize::MAX);
        let mut kept = Vec::with_capacity(pieces.len());
        for piece in pieces.drain(..) {
            let from = usize::try_from(piece.at.saturating_sub(at)).unwrap_or(usize::MAX);
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
            let Some(ours) = buf.get(from..from.saturating_add(len)).filter(|_| piece.kind != PieceKind::Keep) else {
                kept.push(piece);
                continue;
            };
            other.clear();
            if let Some(new) = &self.0 {
                resize(other, len)?;
                new.read(GuestOffset(piece.at), other, scratch)?;
            }
            let mut done = 0;
            while done < len {
                let end = done.saturating_add(granule).min(len);
                let ours = &ours[done..end];
                let same = other.get(done..end).map_or_else(|| is_zero(ours), |theirs| theirs == ours);
                let kind = if same { PieceKind::Keep } else { piece.kind };
                let next = Piece { at: piece.at + done as u64, len: (end - done) as u64, kind };
                match kept.last_mut() {
                    Some(last) if done > 0 && last.kind == kind => last.len += next.len,
                    _ => kept.push(next),
                }
                done = end;
            }
        }
        *pieces = kept;
        Ok(())
    }
}

/// Whether the two are the same bytes of the same layer.
fn same_place(a: &Mapping<'_>, b: &Mapping<'_>) -> bool {
    Arc::ptr_eq(a.node.layer(), b.node.layer()) && a.start == b.start && a.kind == b.kind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_that_are_zeros_stay_out_of_a_layer_on_nothing() {
        let mut buf = vec![0; 8192];
        buf[5000] = 1;
        let piece = |at, len, kind| Piece { at, len, kind };
        let mut pieces = vec![piece(100, 4096, PieceKind::Data), piece(4196, 4096, PieceKind::Data)];
        let none = Onto(None);
        let (mut other, mut scratch) = (Vec::new(), Scratch::default());
        none.keep_same(100, 1024, &buf, &mut pieces, &mut other, &mut scratch).unwrap_or_default();
        assert_eq!(
            pieces,
            [piece(100, 4096, PieceKind::Keep), piece(4196, 1024, PieceKind::Data), piece(5220, 3072, PieceKind::Keep),]
        );
    }
}
