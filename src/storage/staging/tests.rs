//! Files under construction, and how they come to their names.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;
use crate::storage::Zeroing;
use crate::storage::file;
use crate::storage::lock::Access;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn refusal(path: &Path) -> String {
    Staging::new(CacheMode::Unsafe, Durability::Never).create(path).unwrap_err().to_string()
}

#[test]
fn a_new_file_appears_at_commit_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let staging = Staging::new(CacheMode::Writeback, Durability::Always);
    let file = staging.create(&path).unwrap();
    file.write_at(0, b"new").unwrap();
    assert!(names(dir.path()).is_empty());
    assert_eq!(staging.find(&path).unwrap().len().unwrap(), 3);
    assert!(staging.find(&dir.path().join("b")).is_none());
    staging.commit().unwrap();
    assert_eq!(names(dir.path()), ["a"]);
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

#[test]
fn dropped_leaves_things_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, b"old").unwrap();
    let staging = Staging::new(CacheMode::Unsafe, Durability::Never);
    staging.create(&path).unwrap().write_at(0, b"half").unwrap();
    staging.create(&dir.path().join("b")).unwrap().write_at(0, b"half").unwrap();
    drop(staging);
    assert_eq!(names(dir.path()), ["a"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn names_are_given_to_all_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("gone")).unwrap();
    let staging = Staging::new(CacheMode::Unsafe, Durability::Never);
    staging.create(&at("gone/main")).unwrap();
    for name in ["a", "b"] {
        let how = CreateHow { secondary: true, ..CreateHow::default() };
        staging.create_with(&at(name), &how).unwrap();
    }
    fs::remove_dir_all(at("gone")).unwrap();
    staging.commit().unwrap_err();
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_file_in_use_is_replaced_by_who_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["a", "b"] {
        fs::write(at(name), b"old").unwrap();
    }
    symlink("a", at("soft")).unwrap();
    let how = file::FileHow { write: true, access: Access::WRITE, ..file::FileHow::default() };
    let held = HostFile::open(&at("a"), &how).unwrap();
    let staging = Staging::new(CacheMode::Writeback, Durability::Always);
    assert!(staging.replace(&at("b"), &held).unwrap().is_none(), "another file");
    staging.replace(&at("soft"), &held).unwrap().unwrap().write_at(0, b"new").unwrap();
    assert_eq!(fs::read(at("a")).unwrap(), b"old");
    staging.commit().unwrap();
    assert_eq!((fs::read(at("a")).unwrap(), fs::read(at("soft")).unwrap()), (b"new".to_vec(), b"new".to_vec()));
    assert_eq!(names(dir.path()), ["a", "b", "soft"]);
}

#[test]
fn an_older_file_keeps_mode_and_lock() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, b"old").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    let staging = Staging::new(CacheMode::Writeback, Durability::Always);
    staging.create(&path).unwrap().write_at(0, b"new").unwrap();
    let again = Staging::new(CacheMode::Unsafe, Durability::Never).create(&path).unwrap_err();
    assert_eq!(again.to_string(), "Failed to get \"resize\" lock", "held until commit");
    staging.commit().unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((fs::read(&path).unwrap().as_slice(), meta.mode() & 0o7777), (b"new".as_slice(), 0o600));
    assert_ne!(meta.ino(), inode);
    assert_eq!(names(dir.path()), ["a"]);
}

#[test]
fn links_stay_links() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), b"old").unwrap();
    symlink("file", at("soft")).unwrap();
    symlink("nothing", at("dangling")).unwrap();
    fs::write(at("hard"), b"old").unwrap();
    fs::hard_link(at("hard"), at("hard2")).unwrap();
    let staging = Staging::new(CacheMode::Unsafe, Durability::Never);
    for name in ["soft", "dangling", "hard"] {
        staging.create(&at(name)).unwrap().write_at(0, b"new").unwrap();
        assert!(staging.find(&at(name)).is_some());
    }
    staging.commit().unwrap();
    for name in ["soft", "file", "dangling", "nothing", "hard", "hard2"] {
        assert_eq!(fs::read(at(name)).unwrap(), b"new", "{name}");
    }
    assert_eq!(fs::read_link(at("soft")).unwrap(), Path::new("file"));
    assert_eq!(fs::read_link(at("dangling")).unwrap(), Path::new("nothing"));
    assert_eq!(fs::metadata(at("hard")).unwrap().nlink(), 2);
    // Written in place and given up: no half image.
    Staging::new(CacheMode::Unsafe, Durability::Never).create(&at("hard")).unwrap().write_at(0, b"half").unwrap();
    assert_eq!(fs::read(at("hard2")).unwrap(), b"");
}

#[test]
fn refusals_have_the_references_texts() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path().to_string_lossy().into_owned();
    nix::unistd::mkfifo(&dir.path().join("f"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("l", dir.path().join("l")).unwrap();
    assert_eq!(refusal(dir.path()), format!("Could not create '{d}': Is a directory"));
    assert_eq!(refusal(Path::new("")), "Could not create '': No such file or directory");
    let cases = [
        ("no/x", "No such file or directory"),
        ("f/x", "Not a directory"),
        ("l", "Too many levels of symbolic links"),
        ("x/", "Is a directory"),
    ];
    for (name, reason) in cases {
        let name = format!("{d}/{name}");
        assert_eq!(refusal(Path::new(&name)), format!("Could not create '{name}': {reason}"));
    }
    assert_eq!(refusal(&dir.path().join("f")), "Could not resize file: Invalid argument");
    let long = format!("{d}/{}", "a".repeat(256));
    assert_eq!(refusal(Path::new(&long)), format!("Could not create '{long}': File name too long"));
    let how = CreateHow { extent_size_hint: Some(1 << 33), ..CreateHow::default() };
    let error =
        Staging::new(CacheMode::Unsafe, Durability::Never).create_with(&dir.path().join("h"), &how).unwrap_err();
    assert_eq!(error.to_string(), "Extent size hint is too large");
}

#[test]
fn a_name_that_somebody_gave_meanwhile_is_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    for held in [false, true] {
        let staging = Staging::new(CacheMode::Unsafe, Durability::Never);
        staging.create(&path).unwrap().write_at(0, b"new").unwrap();
        fs::write(&path, b"other").unwrap();
        let how = file::FileHow { write: true, access: Access::WRITE, ..file::FileHow::default() };
        let holder = held.then(|| HostFile::open(&path, &how).unwrap());
        let text = staging.commit().unwrap_err().to_string();
        match held {
            true => assert_eq!(text, "Failed to get \"write\" lock"),
            false => assert_eq!(text, format!("Could not create '{}': File exists", path.display())),
        }
        drop(holder);
        assert_eq!(fs::read(&path).unwrap(), b"other");
        assert_eq!(names(dir.path()), ["a"]);
        fs::remove_file(&path).unwrap();
    }
    // One that was there, and is another now.
    fs::write(&path, b"old").unwrap();
    let staging = Staging::new(CacheMode::Unsafe, Durability::Never);
    staging.create(&path).unwrap().write_at(0, b"new").unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(dir.path().join("b"), b"other").unwrap();
    fs::rename(dir.path().join("b"), &path).unwrap();
    staging.commit().unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"other");
    // One that has gone leaves its name free.
    let staging = Staging::new(CacheMode::Unsafe, Durability::Never);
    staging.create(&path).unwrap().write_at(0, b"new").unwrap();
    fs::remove_file(&path).unwrap();
    staging.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

#[test]
fn of_two_for_one_new_name_the_second_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let first = Staging::new(CacheMode::Unsafe, Durability::Never);
    first.create(&path).unwrap().write_at(0, b"first").unwrap();
    assert_eq!(refusal(&path), "Failed to get \"write\" lock");
    assert_eq!(first.commit().map_err(|error| error.to_string()), Ok(()));
    assert_eq!(fs::read(&path).unwrap(), b"first");
    drop(Staging::new(CacheMode::Unsafe, Durability::Never).create(&path).unwrap());
}

fn secondary() -> CreateHow {
    CreateHow { secondary: true, ..CreateHow::default() }
}

#[test]
fn what_was_replaced_is_put_back_when_a_name_cannot_be_given() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["header", "data"] {
        fs::write(at(name), b"old").unwrap();
    }
    let staging = Staging::new(CacheMode::Unsafe, Durability::Always);
    staging.create(&at("header")).unwrap().write_at(0, b"new").unwrap();
    for name in ["data2", "data"] {
        staging.create_with(&at(name), &secondary()).unwrap().write_at(0, b"new").unwrap();
    }
    fs::write(at("data2"), b"other").unwrap();
    staging.commit().unwrap_err();
    assert_eq!(names(dir.path()), ["data", "data2", "header"]);
    for (name, bytes) in [("header", b"old".as_slice()), ("data", b"old"), ("data2", b"other")] {
        assert_eq!(fs::read(at(name)).unwrap(), bytes, "{name}");
    }
}

#[test]
fn images_of_several_files_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["header", "data"] {
        fs::write(at(name), b"old").unwrap();
    }
    let staging = Staging::new(CacheMode::Unsafe, Durability::Replacing);
    for name in ["header", "data", "more"] {
        let how = CreateHow { secondary: name != "header", ..CreateHow::default() };
        staging.create_with(&at(name), &how).unwrap().write_at(0, b"new").unwrap();
    }
    // Both of the older ones take a block; the larger one, or the last of equals, is told.
    assert_eq!(staging.replaces(), Some(at("data").to_string_lossy().into_owned()));
    assert!(staging.is_unseen() && staging.is_blank());
    staging.commit().unwrap();
    assert_eq!(names(dir.path()), ["data", "header", "more"]);
    for name in ["header", "data", "more"] {
        assert_eq!(fs::read(at(name)).unwrap(), b"new", "{name}");
    }
}

/// The header's file is replaced, but one with data is written in place: the older header may not lie beside it.
#[test]
fn an_older_header_goes_before_data_is_written_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["header", "data"] {
        fs::write(at(name), b"old").unwrap();
    }
    fs::hard_link(at("data"), at("data2")).unwrap();
    let staging = Staging::new(CacheMode::Unsafe, Durability::Replacing);
    staging.create(&at("header")).unwrap().write_at(0, b"new").unwrap();
    staging.create_with(&at("data"), &secondary()).unwrap().write_at(0, b"new").unwrap();
    assert!(!staging.is_unseen());
    assert_eq!((fs::read(at("header")).unwrap(), fs::read(at("data2")).unwrap()), (b"".to_vec(), b"new".to_vec()));
    staging.commit().unwrap();
    for name in ["header", "data", "data2"] {
        assert_eq!(fs::read(at(name)).unwrap(), b"new", "{name}");
    }
}

/// What is written in place is no image before it is complete.
#[test]
fn a_header_in_place_is_written_last() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("a"), b"old").unwrap();
    fs::hard_link(at("a"), at("b")).unwrap();
    let staging = Staging::new(CacheMode::Unsafe, Durability::Replacing);
    let file = staging.create(&at("a")).unwrap();
    file.set_len(0, Preallocation::Off).unwrap();
    assert_eq!((file.len().unwrap(), fs::read(at("b")).unwrap()), (0, b"old".to_vec()));
    let bytes: Vec<u8> = (0..2000u32).map(|i| (i % 251) as u8 + 1).collect();
    file.write_at(0, &bytes[..100]).unwrap();
    assert_eq!(file.len().unwrap(), 100);
    file.write_at(100, &bytes[100..]).unwrap();
    file.zero(500, 20, Zeroing::Punch).unwrap();
    let mut expected = bytes.clone();
    expected[500..520].fill(0);
    let mut seen = vec![1; 2000];
    file.read_at(0, &mut seen).unwrap();
    assert!(seen == expected && !file.extent(0, 9).unwrap().is_zero());
    file.read_at(510, &mut seen[..9]).unwrap();
    assert_eq!(seen[..9], expected[510..519]);
    let there = fs::read(at("b")).unwrap();
    assert!(there[..512].iter().all(|byte| *byte == 0) && there[512..2000] == expected[512..]);
    assert!(there.len() > 2000 && there[2000..].iter().all(|byte| *byte == 0));
    assert!(file.extent(2000, 9).unwrap().is_zero());
    staging.commit().unwrap();
    assert!(fs::read(at("b")).unwrap() == expected);
}

/// What fails before anything is written has changed nothing.
#[test]
fn an_older_header_in_place_stays_until_something_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (name, link) in [("header", "header2"), ("data", "data2")] {
        fs::write(at(name), b"old").unwrap();
        fs::hard_link(at(name), at(link)).unwrap();
    }
    let staging = Staging::new(CacheMode::Unsafe, Durability::Replacing);
    let header = staging.create(&at("header")).unwrap();
    staging.create_with(&at("missing/data"), &secondary()).unwrap_err();
    assert_eq!(fs::read(at("header")).unwrap(), b"old");
    let mut seen = [1; 3];
    header.read_at(0, &mut seen).unwrap();
    assert_eq!(seen, [0; 3]);
    drop((header, staging));
    assert_eq!(fs::read(at("header2")).unwrap(), b"old");
    let staging = Staging::new(CacheMode::Unsafe, Durability::Replacing);
    staging.create(&at("header")).unwrap();
    staging.create_with(&at("data"), &secondary()).unwrap();
    assert_eq!((fs::read(at("header")).unwrap(), fs::read(at("data")).unwrap()), (Vec::new(), Vec::new()));
}

#[test]
fn what_is_lost_while_it_is_written_back_early_replaces_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    for durability in [Durability::Replacing, Durability::Always] {
        fs::write(&path, b"old").unwrap();
        let staging = Staging::new(CacheMode::Unsafe, durability);
        staging.create(&path).unwrap().write_at(0, b"new").unwrap();
        staging.writeback.lose(std::io::Error::from_raw_os_error(nix::libc::EIO));
        let error = staging.commit().unwrap_err();
        assert!(error.to_string().contains("Input/output error"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a"]);
    }
}
