//! The parent of a differencing image, which is known by its UUID alone: VirtualBox keeps the names elsewhere.
//!
//! It is the file beside the image that has that UUID. Where there is none, the name that VirtualBox would give it is
//! looked for.

use super::layout::VdiHeader;
use crate::block::{BackingRef, Related};

/// See the module.
#[derive(Debug)]
pub struct VdiParent {
    /// Where it is.
    pub backing: BackingRef,
    /// Its UUID.
    pub id: u128,
}

impl VdiParent {
    /// The one with that UUID.
    pub fn find(id: u128, related: &dyn Related) -> Self {
        let is_parent = |head: &[u8]| {
            let header = head.first_chunk().and_then(|head| VdiHeader::parse(*head).ok());
            header.is_some_and(|header| header.image() == id)
        };
        let found = related.sibling(".vdi", &is_parent);
        let name = found.unwrap_or_else(|| format!("{{{}}}.vdi", text_of(id)).into());
        Self { backing: BackingRef { name, format: Some("vdi".to_owned()), elsewhere: Vec::new() }, id }
    }
}

/// A UUID as text.
pub fn text_of(id: u128) -> String {
    crate::formats::luks_header::uuid_text(id.to_be_bytes())
}
