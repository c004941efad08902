//! The end of a change in place.

use crate::block::{ErrorKind, Node, Result};

/// Closes an image that was written to, whatever became of that; the first error is the one to tell. What could not be
/// done leaves an image that opens, and without the marks that say that all went well.
pub fn close(node: &Node, done: Result<()>) -> Result<()> {
    let closed = match &done {
        Err(error) if error.kind != ErrorKind::Cancelled => node.driver().flush(),
        _ => node.driver().close(),
    };
    done.and(closed)
}
