//! A resize of a vmdk that is stopped, or fails, at every write in turn: by qemu-img's word the image then has its old
//! or its new size and all its data, and the resize can be repeated.
use std::ffi::OsStr;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use vimg::block::io::Scratch as Buffers;
use vimg::block::{
    BlockDriver, Child, Error, Format, GuestOffset, NO_SECRETS, OpenRequest, OptionTree, Purpose, Related, ResizeFiles,
    Result, format,
};
use vimg::formats::FORMATS;
use vimg::storage::fault::{Fault, Faulty, FaultyOperation};
use vimg::storage::file::{FileHow, HostFile};
use vimg::storage::memory::Memory;
use vimg::storage::{CacheMode, Preallocation, Storage};

use crate::common::inside;
use crate::common::{Scratch, judge, pattern, vimg, write_pattern};
use crate::kinds;

const NAME: &str = "d.vmdk";

/// The files of an image, through storages that count together.
struct Folder {
    path: PathBuf,
    first: Faulty,
    /// Files made by the resize, with the names that they shall have.
    made: Mutex<Vec<(String, PathBuf)>>,
}

impl Folder {
    fn new(path: &Path, fault: Option<(usize, Fault)>) -> Self {
        let inner = Arc::new(Memory::default());
        let first = match fault {
            Some((at, fault)) => Faulty::new(inner, at, fault),
            None => Faulty::recording(inner),
        };
        Self { path: path.to_owned(), first, made: Mutex::default() }
    }

    fn storage(&self, path: &Path) -> Arc<dyn Storage> {
        let file = HostFile::open(path, &FileHow { write: true, cache: CacheMode::Unsafe, ..FileHow::default() })
            .expect("open");
        Arc::new(self.first.beside(Arc::new(file)))
    }

    fn child(&self, name: &str) -> Child {
        Child {
            role: "file".to_owned(),
            name: name.to_owned(),
            driver: "file",
            storage: self.storage(&self.path.join(name)),
        }
    }

    fn open(&self) -> Box<dyn BlockDriver> {
        let mut options = OptionTree::new();
        let vmdk: &dyn Format = format::find(FORMATS, "vmdk").expect("vmdk");
        let file = self.child(NAME);
        let request = OpenRequest {
            file,
            side_files: Vec::new(),
            options: &mut options,
            purpose: Purpose::Write,
            secrets: &NO_SECRETS,
            related: self,
        };
        vmdk.open(request).unwrap_or_else(|e| panic!("{}", e.message()))
    }

    fn new_file(&self, name: &str) -> PathBuf {
        let path = self.path.join(format!("{name}.tmp"));
        fs::write(&path, "").expect("new file");
        self.made.lock().unwrap().push((name.to_owned(), path.clone()));
        path
    }
}

impl Related for Folder {
    fn open(&self, _role: &str, name: &OsStr) -> Result<Child> {
        Ok(self.child(name.to_str().expect("text")))
    }
}

impl ResizeFiles for Folder {
    fn beside(&self, name: &OsStr) -> Result<Arc<dyn Storage>> {
        let name = name.to_str().expect("text");
        if self.path.join(name).exists() {
            return Err(Error::invalid(name));
        }
        Ok(self.storage(&self.new_file(name)))
    }

    fn commit(&self, main: &[u8]) -> Result<Option<Arc<dyn Storage>>> {
        let text = self.storage(&self.new_file(NAME));
        text.write_at(0, main)?;
        for (name, path) in std::mem::take(&mut *self.made.lock().unwrap()) {
            // To give a name is a step like any other.
            let before = self.first.inner().len()?;
            self.first.write_at(before, &[1])?;
            if self.first.inner().len()? > before {
                fs::rename(path, self.path.join(name)).expect("rename");
            }
        }
        Ok(Some(text))
    }
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    crate::common::sh(&format!("cp -r --sparse=always {} {}", from.display(), to.display())).ok();
}

/// Sizes of the image before and after.
struct Case {
    options: &'static str,
    old: u64,
    new: u64,
}

fn model(path: &Path, case: &Case, size: u64) {
    let file = fs::File::create(path).expect("model");
    file.set_len(case.old).expect("model");
    for (seed, at) in [(1, 0), (2, case.old / 2 + 12_345), (3, case.old - 70_000)] {
        file.write_all_at(&pattern(seed, 70_000), at).expect("model");
    }
    file.set_len(size).expect("model");
}

/// `qemu-img` finds the same in the first bytes of the image and in the model.
fn same(scratch: &Scratch, model: &str, bytes: u64) -> bool {
    let image = format!("driver=raw,size={bytes},file.driver=vmdk,file.file.driver=file,file.file.filename=now/{NAME}");
    let model = format!("driver=raw,size={bytes},file.driver=file,file.filename={model}");
    judge(&["compare", "--image-opts", &image, &model]).dir(scratch.path()).run().code == Some(0)
}

fn virtual_size(scratch: &Scratch) -> u64 {
    let image = format!("now/{NAME}");
    let out = judge(&["info", "-f", "vmdk", "--output=json", &image]).dir(scratch.path()).ok();
    out.json()["virtual-size"].as_u64().expect("a size")
}

fn every_point(case: &Case, floor: usize) {
    let scratch = Scratch::new();
    let (start, now) = (scratch.file("start"), scratch.file("now"));
    fs::create_dir(&start).expect("folder");
    model(&scratch.file("old"), case, case.old);
    model(&scratch.file("new"), case, case.new);
    let options = format!("subformat={}", case.options);
    scratch.judge(&["convert", "-f", "raw", "-O", "vmdk", "-o", &options, "old", "start/d.vmdk"]);
    let run = |fault| {
        copy(&start, &now);
        let folder = Folder::new(&now, fault);
        let driver = folder.open();
        let resizing = driver.resizing().expect("vmdk resizes");
        let worked = resizing.resize_with(case.new, Preallocation::Off, &folder).and_then(|()| driver.close());
        for entry in fs::read_dir(&now).expect("folder").flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "tmp") {
                fs::remove_file(entry.path()).expect("remove");
            }
        }
        (folder.first.operations(), worked.is_ok())
    };
    let (operations, worked) = run(None);
    let what = format!("{options} {} to {}", case.old, case.new);
    assert!(worked && operations.len() >= floor, "{what}: {operations:?}");
    assert!(virtual_size(&scratch) == case.new && same(&scratch, "new", case.new), "{what}");
    for fault in [Fault::Stop, Fault::Shorten, Fault::FailFrom(Errno::ENOSPC)] {
        for (at, operation) in operations.iter().enumerate() {
            let what = format!("{what}: {fault:?} at {operation:?}, {at} of {}", operations.len());
            let (_, worked) = run(Some((at, fault)));
            assert!(fault == Fault::Stop || !worked, "{what}: not reported");
            if matches!(fault, Fault::FailFrom(_))
                || (fault == Fault::Shorten && !matches!(operation, FaultyOperation::Write { len: 2.., .. }))
            {
                // The files are as after a stop.
                continue;
            }
            let size = virtual_size(&scratch);
            // Or the last extent is whole grains already, and what is to come behind it is not there yet.
            let between = case.old.next_multiple_of(64 << 10);
            assert!([case.old, between, case.new].contains(&size), "{what}: {size} bytes");
            let fine = match size == case.new {
                true => same(&scratch, "new", case.new),
                // The old disk, all of it.
                false => same(&scratch, "old", case.old.min(size)),
            };
            assert!(fine, "{what}: with {size} bytes the content differs");
            if fault != Fault::Stop {
                continue;
            }
            // Again: it works, or says what to do.
            let again = |code| {
                let size = case.new.to_string();
                vimg(&["resize", "-f", "vmdk", "--shrink", NAME, &size]).dir(&now).fails(code)
            };
            let strays = size != case.new && now.join("d-s003.vmdk").exists() | now.join("d-f003.vmdk").exists();
            if !strays && at % 3 != 0 {
                continue;
            }
            if strays {
                let out = again(1);
                assert!(out.stderr.contains("remove it and try again"), "{what}: {out:?}");
                crate::common::sh("rm -f d-?00[3-9].vmdk").dir(&now).ok();
            }
            again(0);
            assert!(virtual_size(&scratch) == case.new && same(&scratch, "new", case.new), "{what}: repeated");
        }
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn a_stopped_resize_of_a_single_file_loses_nothing() {
    // 32 MiB need a table.
    every_point(&Case { options: "monolithicSparse", old: 20 * MIB, new: 70 * MIB }, 4);
    every_point(&Case { options: "monolithicSparse", old: 40 * MIB, new: 30 * MIB - 512 }, 3);
    every_point(&Case { options: "streamOptimized", old: 20 * MIB, new: 70 * MIB }, 4);
}

#[test]
fn a_stopped_resize_of_a_flat_image_loses_nothing() {
    every_point(&Case { options: "monolithicFlat", old: 20 * MIB, new: 70 * MIB }, 3);
    every_point(&Case { options: "monolithicFlat", old: 40 * MIB, new: 30 * MIB - 512 }, 3);
}

#[test]
fn a_stopped_resize_of_a_split_image_loses_nothing() {
    every_point(&Case { options: "twoGbMaxExtentSparse", old: 2060 * MIB, new: 2100 * MIB }, 5);
    every_point(&Case { options: "twoGbMaxExtentSparse", old: 2100 * MIB, new: 2060 * MIB }, 4);
    every_point(&Case { options: "twoGbMaxExtentFlat", old: 2100 * MIB, new: 2060 * MIB }, 3);
}

#[test]
fn a_stopped_growth_by_new_extents_loses_nothing() {
    every_point(&Case { options: "twoGbMaxExtentSparse", old: 2060 * MIB, new: 4200 * MIB }, 8);
    every_point(&Case { options: "twoGbMaxExtentSparse", old: 2060 * MIB + 512, new: 4200 * MIB }, 9);
    every_point(&Case { options: "twoGbMaxExtentFlat", old: 2060 * MIB, new: 4200 * MIB }, 5);
}

/// A grain that lies in two extents would be written by two threads at once.
#[test]
fn no_grain_lies_in_two_extents() {
    let scratch = Scratch::new();
    scratch.vimg(&["create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", NAME, "3221229056"]);
    scratch.vimg(&["resize", "-f", "vmdk", NAME, "5G"]);
    assert_eq!(kinds::virtual_size("vmdk", &scratch.file(NAME)), 5 << 30);
    fs::File::create(scratch.file("raw")).and_then(|f| f.set_len(5 << 30)).expect("raw");
    write_pattern(&scratch.file("raw"), (3 << 30) - 5 * MIB, 1, 12 << 20);
    scratch.vimg(&["convert", "-n", "-m", "4", "-f", "raw", "-O", "vmdk", "raw", NAME]);
    let window = "driver=raw,offset=3212836864,size=16777216,file.";
    let ours = format!("{window}driver=vmdk,file.file.driver=file,file.file.filename={NAME}");
    let theirs = format!("{window}driver=file,file.filename=raw");
    let out = scratch.judge(&["compare", "--image-opts", &ours, &theirs]);
    assert_eq!(out.stdout, "Images are identical.\n");
    // One that begins within a grain all the same is read, and not written.
    let text = fs::read_to_string(scratch.file(NAME)).expect("text");
    let odd = text.replacen("RW 4194304 SPARSE \"d-s001.vmdk\"", "RW 1 FLAT \"raw\" 0", 1);
    assert_ne!(text, odd);
    fs::write(scratch.file(NAME), odd).expect("write");
    scratch.vimg(&["info", NAME]);
    let out = vimg(&["resize", "-f", "vmdk", NAME, "+1M"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("An extent that begins within a grain can be read, but not written"), "{out:?}");
}

#[test]
fn an_open_image_goes_on_after_a_resize() {
    let vmdk = format::find(FORMATS, "vmdk").expect("vmdk");
    for options in ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let files = inside::create(vmdk, NAME, 20 * MIB, &format!("subformat={options}"));
        let node = inside::open(&files, vmdk, NAME, true, None).expect("open");
        let mut model = vec![0; 20 << 20];
        let mut buffers = Buffers::default();
        for (seed, size) in [(1, 20 * MIB), (2, 100 * MIB), (3, 33 * MIB), (4, 70 * MIB), (5, 90 * MIB + 512)] {
            let resizing = node.driver().resizing().expect("vmdk resizes");
            resizing.resize(size, Preallocation::Off).expect("resize");
            model.resize(size as usize, 0);
            for at in [size - 100_000, size / 3, 5 * MIB + seed * 70_000] {
                let data = pattern(seed, 90_000);
                node.write(GuestOffset(at), &data, &mut buffers).expect("write");
                model[at as usize..][..90_000].copy_from_slice(&data);
            }
            let mut got = vec![1; model.len()];
            node.read(GuestOffset(0), &mut got, &mut buffers).expect("read");
            assert!(got == model, "{options}: {size} bytes");
        }
        node.driver().close().expect("close");
        let scratch = Scratch::new();
        files.save(scratch.path());
        fs::write(scratch.file("model"), &model).expect("model");
        scratch.assert_same_content("vmdk", NAME, "raw", "model");
        scratch.assert_clean("vmdk", NAME);
    }
}

#[test]
fn an_extent_that_shares_its_file_is_not_resized() {
    let vmdk = format::find(FORMATS, "vmdk").expect("vmdk");
    let files = inside::Files::default();
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
                RW 2048 FLAT \"f\" 2048\nRW 2048 FLAT \"f\" 0\n";
    files.put(NAME, Arc::new(Memory::new(text.as_bytes().to_vec())));
    files.put("f", Arc::new(Memory::new(pattern(1, 2 << 20))));
    let node = inside::open(&files, vmdk, NAME, true, None).expect("open");
    for size in [3 * MIB, MIB + 512] {
        let error = node.driver().resizing().expect("vmdk resizes").check(size, Preallocation::Off).unwrap_err();
        assert!(error.message().contains("shares its file with another one"), "{}", error.message());
    }
}

/// More extents than files that a process may have open unasked, and a descriptor that is not UTF-8.
#[test]
fn many_extents_and_other_encodings_are_kept() {
    let scratch = Scratch::new();
    let program = crate::common::vimg_path();
    let line = format!(
        "ulimit -S -n 40; '{0}' create -q -f vmdk -o subformat=twoGbMaxExtentSparse m.vmdk 200G && '{0}' resize -q m.vmdk 210G",
        program.display()
    );
    scratch.sh(&line);
    assert_eq!(kinds::virtual_size("vmdk", &scratch.file("m.vmdk")), 210 << 30);
    scratch.vimg(&["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", NAME, "1M"]);
    let mut text = fs::read(scratch.file(NAME)).expect("read");
    text.truncate(text.iter().position(|byte| *byte == 0).unwrap_or(text.len()));
    text.extend_from_slice(b"ddb.comment = \"gr\xfc\xdfe\"\n");
    fs::write(scratch.file(NAME), &text).expect("write");
    scratch.vimg(&["resize", "-q", "-f", "vmdk", NAME, "2M"]);
    let now = fs::read(scratch.file(NAME)).expect("read");
    assert!(now.windows(6).any(|window| window == b"\"gr\xfc\xdfe"), "{}", now.escape_ascii());
    assert_eq!(kinds::virtual_size("vmdk", &scratch.file(NAME)), 2 << 20);
}

/// What somebody left behind the end of a disk, in its last grain, does not come into sight; and an extent whose
/// compressed grains have no markers is not written to.
#[test]
fn what_lies_behind_the_end_stays_hidden() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vmdk", NAME, "1M"]);
    scratch.qemu_io("vmdk", NAME, &["write -P 5 0 1M"]);
    let mut file = fs::read(scratch.file(NAME)).expect("read");
    file[12..20].copy_from_slice(&2000u64.to_le_bytes());
    fs::write(scratch.file(NAME), &file).expect("write");
    scratch.vimg(&["resize", "-q", "-f", "vmdk", NAME, "2M"]);
    scratch.qemu_io("vmdk", NAME, &["read -P 5 0 1024000", "read -P 0 1024000 1073152"]);

    scratch.judge(&["create", "-q", "-f", "vmdk", "-o", "subformat=streamOptimized", "s.vmdk", "1M"]);
    let mut file = fs::read(scratch.file("s.vmdk")).expect("read");
    file[10] &= !2;
    fs::write(scratch.file("s.vmdk"), &file).expect("write");
    write_pattern(&scratch.file("raw"), 0, 1, 1 << 20);
    vimg(&["convert", "-n", "-f", "raw", "-O", "vmdk", "raw", "s.vmdk"]).dir(scratch.path()).fails(1);
    judge(&["convert", "-f", "vmdk", "-O", "raw", "s.vmdk", "back"]).dir(scratch.path()).ok();
}

/// The text's place is full: nothing is changed.
#[test]
fn a_descriptor_without_room_is_found_before_anything_changes() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "vmdk", NAME, "8M"]);
    let mut file = fs::read(scratch.file(NAME)).expect("read");
    file[36..44].copy_from_slice(&1u64.to_le_bytes());
    let text = String::from_utf8(file[512..10752].to_vec()).expect("text");
    let mut text: String = text
        .trim_end_matches('\0')
        .lines()
        .filter(|line| !line.contains("tools"))
        .map(|line| format!("{line}\n"))
        .collect();
    text.extend(std::iter::repeat_n('#', 511 - text.len()));
    text.push('\n');
    file[512..10752].fill(0);
    file[512..1024].copy_from_slice(text.as_bytes());
    fs::write(scratch.file(NAME), &file).expect("write");
    let out = vimg(&["resize", "-f", "vmdk", NAME, "2G"]).dir(scratch.path()).fails(1);
    assert!(out.stderr.contains("does not fit in its place"), "{out:?}");
    assert!(fs::read(scratch.file(NAME)).expect("read") == file);
}

/// Every field of a header, damaged alone: the resize is refused with nothing changed, or what qemu-img reads of the
/// disk stays, and it still opens.
#[test]
fn a_damaged_header_costs_no_data() {
    let scratch = Scratch::new();
    let size = 3_000_320;
    write_pattern(&scratch.file("raw"), 0, 1, size);
    scratch.judge(&["convert", "-f", "raw", "-O", "vmdk", "raw", "m"]);
    scratch.judge(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", "q"]);
    scratch.vimg(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", "s"]);
    // Sparse: the descriptor takes sectors 1 to 20, directories and tables 21 to 30, grains begin at 128.
    let sparse: &[(usize, &[u64])] = &[
        (8, &[0, 0x10001]),
        (12, &[1000, 70_000]),
        (20, &[64, 256]),
        (28, &[0, 20, 26, 128, 1 << 62]),
        (36, &[0, 21, 127, 200, 1 << 40]),
        (44, &[256]),
        (48, &[1, 22, 128, 1 << 40]),
        (56, &[1, 21, 22, 128, 1 << 40]),
        (64, &[0, 200]),
        (73, &[0]),
        (77, &[1]),
    ];
    let stream: &[(usize, &[u64])] = &[
        (8, &[0]),
        (12, &[1000, 70_000]),
        (20, &[64, 1 << 20]),
        (28, &[0, 128]),
        (36, &[200]),
        (56, &[1, 21, 22, 128]),
        (64, &[1 << 40]),
        (77, &[0]),
    ];
    let footer = fs::metadata(scratch.file("s")).expect("there").len() as usize - 1024;
    let mut kept = 0;
    for (image, base, fields) in [("m", 0, sparse), ("q", 0, sparse), ("s", 0, stream), ("s", footer, stream)] {
        for (at, value) in fields.iter().flat_map(|(at, values)| values.iter().map(|value| (*at, *value))) {
            let what = format!("{image} {at}: {value:#x}");
            let width = match at {
                8 | 44 | 73 => 4,
                77 => 2,
                _ => 8,
            };
            let mut file = fs::read(scratch.file(image)).expect("read");
            file[base + at..][..width].copy_from_slice(&value.to_le_bytes()[..width]);
            fs::write(scratch.file(NAME), &file).expect("write");
            let convert = ["convert", "-f", "vmdk", "-O", "raw", NAME];
            let before = judge(&[&convert[..], &["before"]].concat()).dir(scratch.path()).run();
            let out = vimg(&["resize", "-f", "vmdk", NAME, "+1M"]).dir(scratch.path()).run();
            if out.code != Some(0) {
                assert_eq!(out.code, Some(1), "{what}: {out:?}");
                assert!(fs::read(scratch.file(NAME)).expect("read") == file, "{what}: changed");
                continue;
            }
            kept += 1;
            scratch.judge(&[&convert[..], &["after"]].concat());
            let after = fs::read(scratch.file("after")).expect("read");
            let raw = fs::read(scratch.file("raw")).expect("read");
            let as_before =
                before.code == Some(0) && after.starts_with(&fs::read(scratch.file("before")).expect("read"));
            assert!(as_before || after.starts_with(&raw), "{what}: the content differs");
        }
    }
    // Most of it does no harm.
    assert!(kept >= 20, "{kept}");
    // As they are, all three grow.
    for image in ["m", "q", "s"] {
        scratch.vimg(&["resize", "-f", "vmdk", image, "+1M"]);
        scratch.judge(&["convert", "-f", "vmdk", "-O", "raw", image, "after"]);
        let after = fs::read(scratch.file("after")).expect("read");
        assert!(after.starts_with(&fs::read(scratch.file("raw")).expect("read")), "{image}");
        assert!(after.len() == size + (1 << 20) && after[size..].iter().all(|byte| *byte == 0), "{image}");
    }
}
