//! Changing options of an image that is there.

use super::{resize, written};
use crate::block::driver::{Amend, AmendRequest};
use crate::block::{Error, Node, OptionValue, Result};
use crate::storage::Preallocation;

/// The ability, or the refusal.
pub fn amending(node: &Node) -> Result<&dyn Amend> {
    let format = node.driver().format();
    node.driver()
        .amending()
        .ok_or_else(|| Error::unsupported(format!("Format driver '{format}' does not support option amendment")))
}

/// Does it, and closes the image. What is known to be impossible is refused before anything is changed.
pub fn amend(node: &Node, request: &AmendRequest<'_>) -> Result<()> {
    amend_unnamed(node, request).map_err(|error| resize::naming_file(node, error))
}

fn amend_unnamed(node: &Node, request: &AmendRequest<'_>) -> Result<()> {
    let changed = amending(node)?
        .begin(request)
        .map_err(|error| request.options.advising(error))?
        .map(|driver| node.with_driver(driver));
    let node = changed.as_ref().unwrap_or(node);
    if let Some(OptionValue::Size(size)) = request.options.given("size")
        && ![0, node.virtual_size()].contains(size)
    {
        resize::resize(node, *size, Preallocation::Off)?;
    }
    written::close(node, amending(node)?.finish(request))
}
