//! Which files of the host images are read from, and whether a new one would take the place of one of them, or what is
//! written lies in one.

use std::sync::Arc;

use crate::block::{Node, Result};
use crate::storage::Identity;
use crate::storage::host_part::HostPart;
use crate::storage::staging::Source;

/// All files of the host that images and what they stand on are read from.
pub(super) fn files_of(images: &[Arc<Node>]) -> Vec<Source> {
    let mut files = Vec::new();
    for image in images {
        let mut layer = Some(image);
        while let Some(node) = layer {
            let of_layer = node.driver().files().iter().filter_map(|child| {
                let lies_in = match child.storage.host() {
                    Some(host) => host.lies_in(),
                    None => vec![HostPart::whole(child.storage.facts().identity?)],
                };
                Some(Source { name: child.name.clone(), lies_in })
            });
            files.extend(of_layer);
            for (_, inner) in &node.origin().inner {
                files.extend(files_of(std::slice::from_ref(inner)));
            }
            layer = node.backing();
        }
    }
    files
}

/// Whether a new image would take the place of a file that it stands on. `places`: what is there under the names of its
/// files.
pub(super) fn is_among(places: &[Identity], below: &[Source]) -> bool {
    below.iter().flat_map(|file| &file.lies_in).any(|part| places.contains(&part.of))
}

/// Refuses to write where what is still to be read lies under another name: a disk and its partition, a loop device and
/// its file. (One file under one name is the locks' to refuse.)
pub(super) fn spare(sources: &[Arc<Node>], target: &Node) -> Result<()> {
    let hosts = target.driver().files().iter().filter_map(|child| Some((&child.name, child.storage.host()?)));
    let mut hosts = hosts.peekable();
    let read = if hosts.peek().is_some() { files_of(sources) } else { return Ok(()) };
    for (name, host) in hosts {
        let (own, parts) = (HostPart::whole(host.identity()), host.lies_in());
        let elsewhere = read.iter().filter(|source| !source.lies_in.contains(&own));
        Source::spare(elsewhere, &parts, name)?;
    }
    Ok(())
}
