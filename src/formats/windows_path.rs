//! Paths of Windows in images, as names that are looked for here.
//!
//! A relative path is followed from the image's folder; of what begins with a drive, a share or a volume only the last part
//! means anything here: a file of that name beside the image.

use std::ffi::OsString;

use crate::block::BackingRef;

/// The backing file that the first of these paths names; the others say where else it may be. `None` where none names a
/// file.
pub fn backing_of<'a>(paths: impl Iterator<Item = &'a str>, format: &str) -> Option<BackingRef> {
    let mut names: Vec<OsString> = Vec::new();
    for name in paths.flat_map(candidates).map(OsString::from) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut names = names.into_iter();
    Some(BackingRef { name: names.next()?, format: Some(format.to_owned()), elsewhere: names.collect() })
}

/// The names by which a path is looked for.
fn candidates(path: &str) -> Vec<String> {
    let slashed = path.replace('\\', "/");
    let last = slashed.rsplit('/').next().filter(|last| !matches!(*last, "" | "." | "..") && !last.ends_with(':'));
    let rooted = slashed.starts_with("//") || slashed.as_bytes().get(1) == Some(&b':');
    let whole = slashed.strip_prefix("./").unwrap_or(&slashed).to_owned();
    let whole = (!rooted && last.is_some()).then_some(whole);
    whole.into_iter().chain(last.map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::candidates;

    #[test]
    fn paths_of_windows_become_names() {
        for (path, names) in [
            (r".\p.vhdx", &["p.vhdx", "p.vhdx"][..]),
            (r"..\a b\p.vhdx", &["../a b/p.vhdx", "p.vhdx"]),
            (r"\\?\C:\vms\p.vhdx", &["p.vhdx"]),
            (r"C:\vms\p.vhdx", &["p.vhdx"]),
            (r"\\?\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\vms\p.vhdx", &["p.vhdx"]),
            ("/vms/p.vhdx", &["/vms/p.vhdx", "p.vhdx"]),
            (r"C:", &[]),
            (r"..\..", &[]),
            ("", &[]),
        ] {
            assert_eq!(candidates(path), names, "{path}");
        }
    }
}
