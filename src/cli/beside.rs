//! What is beside a file that is not there: the name that was probably meant.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::block::nearest::nearest;

/// Names that are looked at, of a folder that may have any number.
const MOST: usize = 10_000;

/// The path that has, in place of the first name on the way that is not there, the nearest one that is.
pub fn meant(path: &Path) -> Option<PathBuf> {
    let missing = path.ancestors().take_while(|path| *path != Path::new("") && !path.exists()).last()?;
    let folder = missing.parent()?;
    let looked = if folder == Path::new("") { Path::new(".") } else { folder };
    let there =
        std::fs::read_dir(looked).ok()?.take(MOST).flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut there: Vec<String> = there.collect();
    there.sort_unstable();
    let name = missing.file_name().and_then(OsStr::to_str)?;
    let near = folder.join(nearest(name, there.iter().map(String::as_str))?);
    let meant = match path.strip_prefix(missing) {
        Ok(rest) if rest != Path::new("") => near.join(rest),
        _ => near,
    };
    meant.exists().then_some(meant)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_first_name_that_is_not_there_is_the_one_in_question() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("images")).unwrap();
        for name in ["images/disk.qcow2", "images/data.raw"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let meant =
            |name: &str| meant(&dir.path().join(name)).map(|path| path.strip_prefix(dir.path()).unwrap().to_owned());
        for (typed, there) in [
            ("images/dsik.qcow2", Some("images/disk.qcow2")),
            ("image/disk.qcow2", Some("images/disk.qcow2")),
            ("image/other.qcow2", None),
            ("images/other.vmdk", None),
            ("images/disk.qcow2", None),
        ] {
            assert_eq!(meant(typed), there.map(PathBuf::from), "{typed}");
        }
    }
}
