//! Every pair of kinds of image, on disks that are small and odd, and huge and almost empty.
//!
//! An image made from raw is judged once: equal by `qemu-img compare` both ways, clean by `qemu-img check`, byte for byte
//! what qemu-img makes (ids and times apart) where that is deterministic, the same to readers that are neither vimg nor
//! QEMU. An image made from any other kind is then right if it is the very bytes made from raw; else it is judged itself.
//!
//! Then bytes and ids again, on disks of other sizes.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::common::{Scratch, pattern, vimg};
use crate::kinds::{
    KINDS, Kind, Program, assert_clean, assert_judges_bytes, assert_readers_agree, assert_same, assert_same_in_windows,
    difference, virtual_size,
};

/// The disk whose pairs are gone through.
struct Matrix {
    scratch: Scratch,
    /// Its size, where a kind can hold that much.
    size: u64,
    /// Too large to be read to its end.
    huge: bool,
    /// Images made from raw and judged, by kind and size.
    made: HashMap<(usize, u64), PathBuf>,
    count: Cell<usize>,
}

impl Matrix {
    fn new(size: u64, huge: bool) -> Self {
        Self { scratch: Scratch::new(), size, huge, made: HashMap::new(), count: Cell::new(0) }
    }

    /// A folder that is not there yet.
    fn folder(&self) -> PathBuf {
        self.count.set(self.count.get() + 1);
        let folder = self.scratch.file(&format!("folder-{}", self.count.get()));
        fs::create_dir(&folder).expect("folder");
        folder
    }

    /// How large a disk a kind gets.
    fn size_for(&self, kind: &Kind) -> u64 {
        self.size.min(kind.most << 30)
    }

    /// The disk as raw; of another size it is that of the next smaller kind, with zeros behind it.
    fn raw(&self, size: u64) -> PathBuf {
        let path = self.scratch.file(&format!("{size}.raw"));
        if !path.exists() {
            let filled = KINDS.iter().map(|kind| self.size_for(kind)).filter(|filled| *filled <= size).max();
            let file = fs::File::create(&path).expect("create");
            file.set_len(size).expect("length");
            scatter(&file, filled.expect("a size"));
        }
        path
    }

    /// The image that vimg makes of the raw disk of that size: judged.
    fn reference(&mut self, index: usize, size: u64) -> PathBuf {
        if let Some(folder) = self.made.get(&(index, size)) {
            return folder.clone();
        }
        let (kind, raw, ours) = (&KINDS[index], self.raw(size), self.folder());
        let what = format!("raw to {}", kind.name());
        kind.convert(&ours, Program::Vimg, ("raw", &raw), "image");
        let image = ours.join("image");
        let made = virtual_size(kind.format, &image);
        let wanted = size.next_multiple_of(512);
        assert!(made == wanted || kind.rounds && made > wanted, "{what}: {made} for {wanted}");
        if kind.same_bytes {
            let theirs = self.folder();
            kind.convert(&theirs, Program::Judge, ("raw", &raw), "image");
            assert_judges_bytes(&self.scratch, kind, &ours, &theirs);
            fs::remove_dir_all(theirs).expect("remove");
        }
        // Of a size that other kinds brought here, the judge's own bytes say enough.
        if size == self.size_for(kind) || !kind.same_bytes {
            // Of a huge disk it takes the judge seconds to check some kinds.
            if !self.huge || kind.quick || !kind.same_bytes {
                assert_clean(&what, kind.format, &image);
            }
            self.judge_content(kind, &what, &image, &raw);
            let data = places(size);
            assert_readers_agree(&self.scratch, kind, &image, &self.raw(made), self.huge.then_some(&data));
        }
        self.made.insert((index, size), ours.clone());
        ours
    }

    fn judge_content(&self, kind: &Kind, what: &str, image: &std::path::Path, raw: &std::path::Path) {
        if kind.quick || !self.huge {
            assert_same(what, (kind.format, image), ("raw", raw));
        } else {
            assert_same_in_windows(what, kind, image, raw, &places(fs::metadata(raw).expect("raw").len()));
        }
    }

    /// Every kind to every kind.
    fn go(&mut self) {
        let mut differing = Vec::new();
        for (from, kind) in KINDS.iter().enumerate() {
            let ours = self.reference(from, self.size_for(kind)).join("image");
            let size = virtual_size(kind.format, &ours);
            // Where the judge's image is another one, every second target is made from that.
            let theirs = self.folder();
            if !kind.same_bytes {
                kind.convert(&theirs, Program::Judge, ("raw", &self.raw(size)), "image");
            }
            for (to, other) in KINDS.iter().enumerate() {
                // Of a huge disk every third pair: each kind is a source and a target of several others.
                if other.most << 30 < size || self.huge && (from + to) % 3 != 0 {
                    continue;
                }
                let source = if kind.same_bytes || to % 2 == 0 { ours.clone() } else { theirs.join("image") };
                let (what, out) = (format!("{} to {}", kind.name(), other.name()), self.folder());
                other.convert(&out, Program::Vimg, (kind.format, &source), "image");
                let wanted = self.reference(to, size);
                if let Some(difference) = difference(&out, &wanted) {
                    let image = out.join("image");
                    self.judge_content(other, &what, &image, &self.raw(size));
                    assert_clean(&what, other.format, &image);
                    differing.push(format!("{what}: {difference}"));
                }
                fs::remove_dir_all(out).expect("remove");
            }
            fs::remove_dir_all(theirs).expect("remove");
        }
        // Not wrong, but not expected either.
        assert!(differing.is_empty(), "other bytes than from raw:\n{}", differing.join("\n"));
    }

    /// What a format cannot hold is refused in the judge's words.
    fn refusals(&self) {
        let mut count = 0;
        for kind in KINDS.iter().filter(|kind| kind.limited) {
            let folder = self.folder();
            let raw = self.raw(self.size);
            let [ours, theirs] = [Program::Vimg, Program::Judge]
                .map(|program| kind.conversion(&folder, program, ("raw", &raw), "image").fails(1));
            assert_eq!((ours.stdout, ours.stderr), (theirs.stdout, theirs.stderr), "{}", kind.name());
            count += 1;
        }
        assert_eq!(count, 5);
    }
}

/// Where a disk of that size has data.
fn places(size: u64) -> Vec<u64> {
    let sectors = [3 << 20, (2 << 20) + 65_536, 4_194_304 - 1024].map(|at| at % (size - 1024) / 512 * 512);
    [0, size / 2 + 4096 - size / 2 % 4096 - 512, size - 1300].into_iter().chain(sectors).collect()
}

/// Data at both ends, across units of every size, and in single sectors.
fn scatter(file: &fs::File, size: u64) {
    for ((seed, at), len) in (1..).zip(places(size)).zip([100_000, 70_000, 1300, 512, 512, 512]) {
        file.write_all_at(&pattern(seed, len), at).expect("write");
    }
}

#[test]
fn a_small_odd_disk_converts_between_every_pair_of_kinds() {
    Matrix::new(5_003_776 + 512, false).go();
}

#[test]
fn an_almost_empty_huge_disk_converts_between_every_pair_of_kinds() {
    let mut matrix = Matrix::new(3 << 40, true);
    matrix.refusals();
    matrix.go();
}

#[test]
fn the_bytes_are_the_references() {
    for (number, size) in [512, 5_003_776, (64 << 20) + 512 * 7, 1_000_001].into_iter().enumerate() {
        let scratch = Scratch::new();
        let raw = scratch.file("d.raw");
        let file = fs::File::create(&raw).expect("create");
        file.set_len(size).expect("length");
        let mut rng = fastrand::Rng::with_seed(number as u64);
        for seed in 0..24 {
            let at = rng.u64(..size);
            let len = rng.usize(1..200_000).min(usize::try_from(size - at).expect("small"));
            file.write_all_at(&pattern(seed, len), at / 512 * 512).expect("write");
        }
        file.set_len(size).expect("length");
        for kind in KINDS.iter().filter(|kind| kind.same_bytes) {
            let folders = [(Program::Vimg, "ours"), (Program::Judge, "theirs")].map(|(program, name)| {
                let folder = scratch.file(name);
                fs::create_dir(&folder).expect("folder");
                kind.convert(&folder, program, ("raw", &raw), "image");
                folder
            });
            assert_judges_bytes(&scratch, kind, &folders[0], &folders[1]);
            for folder in folders {
                fs::remove_dir_all(folder).expect("remove");
            }
        }
    }
}

#[test]
fn ids_and_times_are_the_same_under_source_date_epoch() {
    let scratch = Scratch::new();
    fs::write(scratch.file("d.raw"), pattern(1, 3 << 20)).expect("write");
    for kind in KINDS {
        let mut seen = Vec::new();
        for (folder, epoch) in [("a", "1700000000"), ("b", "1700000000"), ("c", "")] {
            fs::create_dir(scratch.file(folder)).expect("folder");
            let mut args = vec!["convert", "-f", "raw", "-O", kind.format];
            if !kind.options.is_empty() {
                args.extend(["-o", kind.options]);
            }
            args.extend(["../d.raw", "image"]);
            let run = vimg(&args).dir(scratch.file(folder));
            if epoch.is_empty() {
                run.ok()
            } else {
                run.env("SOURCE_DATE_EPOCH", epoch).ok()
            };
            seen.push(fs::read(scratch.file(folder).join("image")).expect("image"));
        }
        assert!(seen[0] == seen[1], "{}", kind.name());
        let has_ids = !matches!(kind.format, "raw" | "qcow" | "qcow2" | "qed" | "parallels");
        assert_eq!(seen[0] != seen[2], has_ids, "{}", kind.name());
        for folder in ["a", "b", "c"] {
            fs::remove_dir_all(scratch.file(folder)).expect("remove");
        }
    }
}
