//! Whether files got shorter while guest data was read from them: what is gone from one reads as zeros that were never
//! stored.

use crate::block::{Child, Error, ErrorKind, Node, Result};
use crate::ops::copy::zero::SECTOR;
use crate::storage::FileKind;

/// An image, and what lies below it.
pub fn layers(node: &Node) -> impl Iterator<Item = &Node> {
    std::iter::successors(Some(node), |node| node.backing().map(|below| &**below))
}

/// How long files were before they were read, in bytes.
pub struct FileLengths<'a>(Vec<(&'a Child, u64)>);

impl<'a> FileLengths<'a> {
    /// How long the files of these layers are, or were when those were opened.
    pub fn of(layers: impl Iterator<Item = &'a Node>) -> Result<Self> {
        let mut lengths = Vec::new();
        // Those of a layer that is written to are that writer's to change.
        for node in layers.filter(|node| node.is_only_read()) {
            // Where the disk ends with its file, it has the length that the file had.
            let disk = if node.driver().short_unit().is_none() { node.virtual_size() } else { 0 };
            let mut least = disk.saturating_sub(SECTOR - 1);
            for file in node.driver().files() {
                if file.storage.host().is_some_and(|host| host.kind() == FileKind::Regular) {
                    lengths.push((file, file.len()?.max(least)));
                }
                least = 0;
            }
        }
        Ok(Self(lengths))
    }

    /// An error for the first file that has been cut short since.
    pub fn check(&self) -> Result<()> {
        for (file, before) in &self.0 {
            let now = file.len()?;
            if now < *before {
                let name = &file.name;
                let text = format!("{name}: the file was cut short at offset {now} while it was read");
                return Err(Error::new(ErrorKind::Truncated, text));
            }
        }
        Ok(())
    }
}
