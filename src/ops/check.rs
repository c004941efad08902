//! Checking an image, and mending it: in its place, or in a copy, which appears when it is mended.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Map, Value};

use crate::block::check::{CheckReport, Findings, Fix};
use crate::block::error::Context;
use crate::block::{Error, MadeFiles, Node, Notice, OpenHow, Opener, OptionTree, Purpose, Result, name};
use crate::storage::staging::{Durability, Staging};
use crate::storage::{CacheMode, Identity, Preallocation, Storage};

/// Checks the top layer of a node, opened for [`Check`](crate::block::Purpose::Check), or for
/// [`Repair`](crate::block::Purpose::Repair) if anything is to be mended. What has been mended is checked again: the
/// report then says what was mended, and what is there now; `repaired` is called between the two. `None` where the
/// format cannot do this.
pub fn check(
    node: &Node,
    fix: Fix,
    findings: &dyn Findings,
    repaired: &dyn Fn(&CheckReport),
) -> Result<Option<CheckReport>> {
    let Some(checking) = node.driver().checking() else { return Ok(None) };
    let first = checking.check(fix, findings)?;
    if !first.is_repaired() {
        return Ok(Some(first));
    }
    repaired(&first);
    let again = checking.check(Fix::Nothing, findings)?;
    let CheckReport { corruptions_fixed, leaks_fixed, .. } = first;
    Ok(Some(CheckReport { corruptions_fixed, leaks_fixed, ..again }))
}

/// Copies an image and mends the copy, which then gets the name `target`; the image itself is left alone. An image in
/// several files is refused: the copies of the others would bear names that nothing names.
pub fn repair_to(
    opener: &Opener<'_>,
    node: &Node,
    target: &Path,
    fix: Fix,
    findings: &dyn Findings,
    repaired: &dyn Fn(&CheckReport),
) -> Result<Option<CheckReport>> {
    let driver = node.driver();
    if driver.checking().is_none() {
        return Ok(None);
    }
    let [file] = driver.files() else {
        let text = format!("'{}' has several files, of which no mended copy can be made", node.name());
        return Err(Error::unsupported(text).hint("Copy all of them, and mend the copy with -r."));
    };
    let shown = target.display();
    let meta = std::fs::metadata(target).ok();
    let there = meta.map(|meta| Identity { device: meta.dev(), inode: meta.ino() });
    if there.is_some() && there == file.storage.facts().identity {
        return Err(Error::invalid(format!("'{shown}' is the image itself: the mended copy needs another name")));
    }
    if there.is_some_and(|there| stands_on(node, there)) {
        let text = format!("'{shown}' is what '{}' stands on: the mended copy needs another name", node.name());
        return Err(Error::invalid(text));
    }
    let staging = Staging::new(CacheMode::Writeback, Durability::Always);
    let copy = staging.create(target)?;
    if copy.facts().fixed_len {
        return Err(Error::unsupported(format!("'{shown}' is no regular file")));
    }
    copy_bytes(&*file.storage, &*copy).with_context(|| format!("Could not copy '{}' to '{shown}'", file.name))?;
    let made = MadeFiles {
        main: copy,
        protocol: opener.drivers().of_path(target.as_os_str())?.name(),
        path: target.as_os_str().to_owned(),
        beside: Vec::new(),
        options: own_options(node),
    };
    let format = Some(driver.format().to_owned());
    let how = OpenHow { format, purpose: Purpose::Repair, no_backing: true, ..OpenHow::default() };
    let report = check(&*opener.open_made(target.as_os_str(), made, &how)?, fix, findings, repaired)?;
    staging.commit()?;
    if let Some(named) = driver.backing().map(|backing| &backing.name)
        && name::find_beside(Some(target.as_os_str()), named).map(std::fs::canonicalize).and_then(std::io::Result::ok)
            != node.backing_path().map(std::fs::canonicalize).and_then(std::io::Result::ok)
    {
        let named = named.display();
        opener.notice(Notice::Warning(format!("From where '{shown}' is, its backing file '{named}' is not found")));
    }
    Ok(report)
}

/// Whether that file is one of the layers below. (Where they are not opened, the first one by its name.)
fn stands_on(node: &Node, file: Identity) -> bool {
    let below = std::iter::successors(node.backing(), |below| below.backing());
    let of_layer = |layer: &Node| layer.driver().files().iter().any(|one| one.storage.facts().identity == Some(file));
    let named = || node.backing_path().and_then(|path| std::fs::metadata(path).ok());
    below.into_iter().any(|layer| of_layer(layer))
        || named().is_some_and(|meta| file == Identity { device: meta.dev(), inode: meta.ino() })
}

/// The options that the format itself was given: keys, for one.
fn own_options(node: &Node) -> OptionTree {
    let others = ["driver", "file", "filename", "backing"];
    let tree = node.origin().tree.iter().filter(|(key, _)| !others.contains(&key.as_str()));
    tree.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Copies a file as sparse as it is to an empty one.
fn copy_bytes(from: &dyn Storage, to: &dyn Storage) -> crate::storage::Result<()> {
    const PIECE: usize = 1 << 20;
    let (len, mut at) = (from.len()?, 0);
    to.set_len(len, Preallocation::Off)?;
    let mut buf = vec![0; usize::try_from(len).unwrap_or(PIECE).min(PIECE)];
    while at < len {
        let extent = from.extent(at, len - at)?;
        let end = at.saturating_add(extent.len.max(1)).min(len);
        if extent.is_zero() {
            at = end;
            continue;
        }
        while at < end {
            let piece = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            let Some(buf) = buf.get_mut(..piece) else { break };
            from.read_at(at, buf)?;
            to.write_at(at, buf)?;
            at += piece as u64;
        }
    }
    Ok(())
}

/// The tree that `--output=json` shows: numbers only where there is something to count, but for `check-errors`.
pub fn to_json(report: &CheckReport, filename: &str, format: &str) -> Value {
    let mut object = Map::new();
    object.insert("filename".to_owned(), filename.into());
    object.insert("format".to_owned(), format.into());
    object.insert("check-errors".to_owned(), report.check_errors.into());
    let numbers = [
        ("image-end-offset", report.image_end),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    for (key, number) in numbers {
        if number > 0 {
            object.insert(key.to_owned(), number.into());
        }
    }
    Value::Object(object)
}
