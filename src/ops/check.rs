//! Checking an image, and mending it.

use serde_json::{Map, Value};

use crate::block::check::{CheckReport, Findings, Fix};
use crate::block::{Node, Result};

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
