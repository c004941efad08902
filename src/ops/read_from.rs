//! Which files of the host images are read from, and whether a new one would take the place of one of them.

use std::sync::Arc;

use crate::block::Node;
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
