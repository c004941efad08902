//! Another parent in the descriptor. Its name and its content id change together, in one write.

use std::sync::atomic::Ordering;

use super::descriptor::{self, NO_PARENT};
use super::{Body, VmdkDriver};
use crate::block::{BackingChange, BackingRef, BlockDriver, Error, Result};

impl BackingChange for VmdkDriver {
    fn check(&self, new: Option<&BackingRef>, below: Option<&dyn BlockDriver>) -> Result<()> {
        let Some(new) = new else { return Ok(()) };
        if self.parts.iter().any(|part| !matches!(part.body, Body::Sparse { .. })) {
            return Err(Error::unsupported("Flat image can't have backing file"));
        }
        if new.format.as_deref().is_some_and(|format| format != "vmdk") {
            return Err(Error::invalid("backing_file must be a vmdk image"));
        }
        if new.name.to_str().is_none() || !descriptor::can_hold(&new.name) {
            return Err(Error::invalid(format!("A descriptor cannot hold the name '{}'", new.name.display())));
        }
        let cid = parent_cid(below)?;
        self.changed(|text| with_parent(text, new.name.to_str(), cid)).map(drop)
    }

    fn begin(&self) {
        self.keeps_zeros.store(true, Ordering::Relaxed);
        self.keep_content_id();
    }

    fn change(&self, new: Option<&BackingRef>, below: Option<&dyn BlockDriver>) -> Result<()> {
        self.write_out()?;
        let cid = if new.is_some() { parent_cid(below)? } else { NO_PARENT };
        self.rewrite_text(|text| with_parent(text, new.and_then(|new| new.name.to_str()), cid))?;
        self.write_out()
    }

    fn follow(&self, below: &dyn BlockDriver) -> Result<()> {
        let cid = parent_cid(Some(below))?;
        self.rewrite_text(|text| descriptor::with_value(text, "parentCID", &format!("{cid:x}")))?;
        self.write_out()
    }
}

fn parent_cid(below: Option<&dyn BlockDriver>) -> Result<u32> {
    let cid = below.and_then(BlockDriver::content_id).and_then(|id| u32::try_from(id).ok());
    cid.ok_or_else(|| Error::invalid("backing_file must be a vmdk image that can be opened"))
}

/// The text with another parent, or none. The hint is where it was, or behind the type as writers put it.
fn with_parent(text: &str, parent: Option<&str>, cid: u32) -> String {
    const HINT: &str = "parentFileNameHint";
    let text = descriptor::with_value(text, "parentCID", &format!("{cid:x}"));
    let had = descriptor::value_of(&text, HINT).is_some();
    match parent {
        Some(name) if had => descriptor::with_value(&text, HINT, name),
        Some(name) => {
            let mut out = String::with_capacity(text.len() + name.len());
            for line in text.split_inclusive('\n') {
                out.push_str(line);
                if descriptor::value_of(line, "createType").is_some() {
                    let end = if line.ends_with("\r\n") { "\r\n" } else { "\n" };
                    out.push_str(&format!("{HINT}=\"{name}\"{end}"));
                }
            }
            out
        }
        None => {
            let keep = |line: &&str| descriptor::value_of(line, HINT).is_none();
            text.split_inclusive('\n').filter(keep).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_comes_changes_and_goes() {
        let none = "version=1\r\nCID=1\r\nparentCID=ffffffff\r\ncreateType=\"x\"\r\n\r\nRW 8 SPARSE \"a\"\r\n";
        let one = with_parent(none, Some("b c"), 0xabc);
        assert!(one.contains("parentCID=abc\r\n"), "{one}");
        assert!(one.contains("createType=\"x\"\r\nparentFileNameHint=\"b c\"\r\n\r\nRW"), "{one}");
        let other = with_parent(&one, Some("d"), 7);
        assert_eq!(other, one.replace("abc", "7").replace("b c", "d"));
        assert_eq!(with_parent(&other, None, NO_PARENT), none);
    }
}
