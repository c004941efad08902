//! Every kind of image that conversions are tested with: each format in all its forms, how each is made, and who says
//! whether it is right: qemu-img, its bytes, and readers that are neither qemu-img nor vimg.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::common::{Output, Run, Scratch, first_difference, judge, need, need_root, vimg};

/// A form of a format.
#[derive(Debug)]
pub struct Kind {
    pub format: &'static str,
    /// What `-o` says.
    pub options: &'static str,
    /// With `-c`.
    pub compressed: bool,
    /// A virtual size may be larger than what was asked for: a whole number of cylinders.
    pub rounds: bool,
    /// The bytes are qemu-img's, apart from ids and times: what compresses has another encoder, or another layout.
    pub same_bytes: bool,
    /// The largest disk that is tried, in GiB.
    pub most: u64,
    /// One of 5 TiB is beyond the format.
    pub limited: bool,
    /// The judge compares a huge empty one in a second.
    pub quick: bool,
    /// Readers of its own.
    pub readers: &'static [Reader],
}

/// Readers that are neither vimg nor QEMU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reader {
    /// 7-Zip, told that type. It knows neither zstd nor subclusters, nor compressed clusters of qcow's first version.
    SevenZip(&'static str),
    /// libyal, which shows the disk as a file in a folder. It knows neither zstd nor subclusters, nor what qemu-img
    /// calls monolithicFlat.
    Mount(&'static str),
}

use Reader::{Mount, SevenZip};

const T: u64 = 1 << 10;
const QCOW: &[Reader] = &[SevenZip("qcow"), Mount("qcowmount")];
const VMDK: &[Reader] = &[SevenZip("vmdk"), Mount("vmdkmount")];
const VHD: &[Reader] = &[SevenZip("vhd"), Mount("vhdimount")];
/// 7-Zip opens whole mebibytes alone.
const VHDX: &[Reader] = &[Mount("vhdimount")];

const PLAIN: Kind = Kind {
    format: "raw",
    options: "",
    compressed: false,
    rounds: false,
    same_bytes: true,
    most: 5 * T,
    limited: false,
    quick: true,
    readers: &[],
};

const fn qcow2(options: &'static str, readers: &'static [Reader]) -> Kind {
    Kind { format: "qcow2", options, readers, ..PLAIN }
}

const fn vmdk(options: &'static str, readers: &'static [Reader]) -> Kind {
    Kind { format: "vmdk", options, readers, quick: false, ..PLAIN }
}

const fn vpc(options: &'static str, rounds: bool) -> Kind {
    Kind { format: "vpc", options, rounds, readers: VHD, most: 2040, limited: true, ..PLAIN }
}

/// Of 5 TiB, the judge takes 20 seconds to open the 2560 extents of 2 GiB, and seconds to make tables of clusters of 512
/// bytes as large as they can be.
const SMALLER: u64 = 16;

pub const KINDS: &[Kind] = &[
    PLAIN,
    qcow2("", QCOW),
    qcow2("compat=0.10", QCOW),
    qcow2("cluster_size=2M", QCOW),
    Kind { most: SMALLER, limited: true, ..qcow2("cluster_size=512", QCOW) },
    qcow2("extended_l2=on", &[]),
    Kind { compressed: true, same_bytes: false, ..qcow2("", QCOW) },
    Kind { compressed: true, same_bytes: false, ..qcow2("compression_type=zstd", &[]) },
    Kind { format: "qcow", quick: false, ..qcow2("", QCOW) },
    Kind { format: "qcow", compressed: true, same_bytes: false, quick: false, ..qcow2("", &[Mount("qcowmount")]) },
    Kind { format: "qed", ..qcow2("", &[]) },
    Kind { format: "parallels", quick: false, ..qcow2("", &[]) },
    vmdk("subformat=monolithicSparse", VMDK),
    Kind { quick: true, ..vmdk("subformat=monolithicFlat", &[SevenZip("vmdk")]) },
    Kind { most: SMALLER, ..vmdk("subformat=twoGbMaxExtentSparse", VMDK) },
    Kind { most: SMALLER, ..vmdk("subformat=twoGbMaxExtentFlat", VMDK) },
    Kind { same_bytes: false, ..vmdk("subformat=streamOptimized", VMDK) },
    Kind { format: "vdi", quick: false, ..qcow2("", &[SevenZip("vdi")]) },
    Kind { format: "vdi", quick: false, ..qcow2("static=on", &[SevenZip("vdi")]) },
    vpc("subformat=dynamic", true),
    vpc("subformat=fixed", true),
    vpc("subformat=dynamic,force_size=on", false),
    vpc("subformat=fixed,force_size=on", false),
    Kind { format: "vhdx", same_bytes: false, quick: false, ..qcow2("", VHDX) },
    // libvhdi counts past the sector bitmaps' entries in dynamic ones alone: of a fixed one, qemu-img's too, it reads the
    // first 4 GiB.
    Kind { format: "vhdx", same_bytes: false, quick: false, ..qcow2("subformat=fixed", &[]) },
];

/// Who converts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Program {
    Vimg,
    Judge,
}

impl Kind {
    /// The conversion of an image to this kind, ready to run in `folder`; ids and times are always the same.
    pub fn conversion(&self, folder: &Path, program: Program, from: (&str, &Path), to: &str) -> Run {
        let source = from.1.to_string_lossy();
        let mut args = vec!["convert", "-f", from.0, "-O", self.format];
        if self.compressed {
            args.push("-c");
        }
        if !self.options.is_empty() {
            args.extend(["-o", self.options]);
        }
        args.extend([&*source, to]);
        match program {
            Program::Vimg => vimg(&args).env("SOURCE_DATE_EPOCH", "1700000000"),
            Program::Judge => judge(&args),
        }
        .dir(folder)
    }

    /// Runs it.
    pub fn convert(&self, folder: &Path, program: Program, from: (&str, &Path), to: &str) {
        let run = self.conversion(folder, program, from, to);
        if program == Program::Judge && self.format == "qcow" && self.compressed {
            // The judge makes a whole image, and then fails without a word.
            run.run();
        } else {
            run.ok();
        }
    }

    /// What messages call it.
    pub fn name(&self) -> String {
        format!("{} {}{}", self.format, self.options, if self.compressed { " -c" } else { "" })
    }
}

/// The judge's word for an image's size.
pub fn virtual_size(format: &str, image: &Path) -> u64 {
    let out = judge(&["info", "-U", "-f", format, "--output=json", &image.to_string_lossy()]).ok();
    out.json()["virtual-size"].as_u64().expect("a size")
}

fn identical(what: &str, out: &Output) {
    assert_eq!(out.code, Some(0), "{what}: {out:?}");
    assert!(out.stdout.ends_with("Images are identical.\n"), "{what}: {out:?}");
}

/// The judge reads the same from both, in either order; what one has more is zeros.
pub fn assert_same(what: &str, a: (&str, &Path), b: (&str, &Path)) {
    for ((format, name), (other_format, other)) in [(a, b), (b, a)] {
        let (name, other) = (name.to_string_lossy(), other.to_string_lossy());
        identical(what, &judge(&["compare", "-U", "-f", format, "-F", other_format, &*name, &*other]).run());
    }
}

/// The judge finds nothing wrong.
pub fn assert_clean(what: &str, format: &str, image: &Path) {
    let out = judge(&["check", "-U", "-f", format, &image.to_string_lossy()]).run();
    // 63: the format has no check.
    assert!(matches!(out.code, Some(0 | 63)), "{what}: {out:?}");
}

/// Where a huge disk is looked at: around its data, at its ends, and anywhere.
fn windows(size: u64, data: &[u64]) -> Vec<u64> {
    let mut rng = fastrand::Rng::with_seed(size);
    let anywhere = (0..4).map(|_| rng.u64(0..size));
    data.iter().copied().chain([0, size]).chain(anywhere).map(|at| at.saturating_sub(WINDOW / 2) / 512 * 512).collect()
}

const WINDOW: u64 = 4 << 20;

/// The judge reads the same in windows of both: it goes through the emptiness of these formats unit by unit, which
/// takes it minutes.
pub fn assert_same_in_windows(what: &str, kind: &Kind, image: &Path, raw: &Path, data: &[u64]) {
    let size = fs::metadata(raw).expect("raw").len();
    for at in windows(size, data) {
        let window = format!("driver=raw,offset={at},size={}", WINDOW.min(size - at));
        let file = |path: &Path| format!("driver=file,filename={}", path.display());
        let below = file(image).replace(',', ",file.file.").replace("driver=file", "file.file.driver=file");
        let ours = format!("{window},file.driver={},{below}", kind.format);
        let theirs = format!("{window},file.{}", file(raw).replace(',', ",file."));
        identical(&format!("{what} at {at}"), &judge(&["compare", "-U", "--image-opts", &ours, &theirs]).run());
    }
}

/// What others read in an image, which has exactly the size of `raw`; the whole of it, or the windows of a huge one.
pub fn assert_readers_agree(scratch: &Scratch, kind: &Kind, image: &Path, raw: &Path, data: Option<&[u64]>) {
    let size = fs::metadata(raw).expect("raw").len();
    for reader in kind.readers {
        let what = format!("{reader:?} of {}", kind.name());
        match *reader {
            SevenZip(name) => {
                need("7z");
                let image = image.display();
                if data.is_some() {
                    let out = scratch.sh(&format!("7z l -slt -t{name} {image}"));
                    assert!(out.stdout.lines().any(|line| line == format!("Size = {size}")), "{what}: {out:?}");
                } else {
                    scratch.sh(&format!("7z x -so -t{name} {image} 2>7z.log > seven.raw"));
                    assert_eq!(first_difference(&scratch.file("seven.raw"), raw), None, "{what}");
                }
            }
            Mount(tool) => {
                let mounted = Mounted::new(scratch, tool, image);
                assert_eq!(fs::metadata(&mounted.disk).expect("a disk").len(), size, "{what}");
                let (ours, wanted) = (fs::File::open(&mounted.disk).expect("disk"), fs::File::open(raw).expect("raw"));
                let pieces = match data {
                    Some(data) => windows(size, data),
                    None => (0..size).step_by(1 << 22).collect(),
                };
                for at in pieces {
                    let mut bytes =
                        [0, 1].map(|fill| vec![fill; usize::try_from(WINDOW.min(size - at)).expect("small")]);
                    let [a, b] = &mut bytes;
                    ours.read_exact_at(a, at).unwrap_or_else(|e| panic!("{what} at {at}: {e}"));
                    wanted.read_exact_at(b, at).expect("raw");
                    assert!(a == b, "{what} differs in {at}+{WINDOW}");
                }
            }
        }
    }
}

/// An image that libyal shows as a file.
struct Mounted {
    folder: PathBuf,
    disk: PathBuf,
}

impl Mounted {
    fn new(scratch: &Scratch, tool: &str, image: &Path) -> Self {
        need(tool);
        need("umount");
        need_root("mounting by FUSE");
        let folder = scratch.file("mounted");
        fs::create_dir_all(&folder).expect("folder");
        scratch.sh(&format!("{tool} {} {} > {tool}.log", image.display(), folder.display()));
        let entry = fs::read_dir(&folder).expect("list").next().expect("one disk").expect("entry");
        Self { disk: entry.path(), folder }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a process that was started a moment ago may still hold our files.
        let out = crate::common::plain("umount", &["-l", &*self.folder.to_string_lossy()]).run();
        assert!(out.code == Some(0) || std::thread::panicking(), "{out:?}");
    }
}

fn names(folder: &Path) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> = fs::read_dir(folder).expect("list").map(|e| e.expect("entry").file_name()).collect();
    names.sort();
    names
}

/// Whether the files of two images are the same bytes.
pub fn difference(a: &Path, b: &Path) -> Option<String> {
    if names(a) != names(b) {
        return Some(format!("{:?} and {:?}", names(a), names(b)));
    }
    let differs = |name: &std::ffi::OsString| {
        first_difference(&a.join(name), &b.join(name)).map(|at| format!("{} at {at:#x}", name.to_string_lossy()))
    };
    names(a).iter().find_map(differs)
}

/// The image in folder `ours` is, byte for byte, what the judge has made in `theirs`, ids and times apart; it is called
/// `image` in both. Copies are compared.
pub fn assert_judges_bytes(scratch: &Scratch, kind: &Kind, ours: &Path, theirs: &Path) {
    let what = kind.name();
    let copies = ["copy-ours", "copy-theirs"].map(|name| scratch.file(name));
    for (from, to) in [ours, theirs].into_iter().zip(&copies) {
        scratch.sh(&format!("cp -r --sparse=always {} {}", from.display(), to.display()));
        mask(kind, &to.join("image"));
    }
    let [ours, theirs] = &copies;
    let text = theirs.join("image");
    if kind.format == "vmdk" && fs::metadata(&text).expect("there").len() < 2048 {
        // The text's length follows the digits of its id; where the last id is the shorter one, the judge leaves a
        // zero byte and the end of the longer text behind it.
        let [a, b] = [ours, theirs].map(|folder| fs::read_to_string(folder.join("image")).expect("text"));
        let text_of = |file: &str| file.split('\0').next().map(str::to_owned);
        assert_eq!(text_of(&a), text_of(&b), "{what}");
        fs::copy(ours.join("image"), &text).expect("copy");
    }
    assert_eq!(difference(ours, theirs), None, "{what}");
    for copy in &copies {
        fs::remove_dir_all(copy).expect("remove");
    }
}

/// Overwrites what differs from run to run: ids and times, and the checksums over them.
fn mask(kind: &Kind, path: &Path) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("open");
    let end = file.metadata().expect("metadata").len();
    let zero = |at: u64, len: usize| file.write_all_at(&vec![0; len], at).expect("write");
    match kind.format {
        "vdi" => zero(0x188, 32),
        "vpc" => {
            for at in if kind.options.contains("fixed") { vec![end - 512] } else { vec![0, end - 512] } {
                zero(at + 24, 4);
                zero(at + 64, 20);
            }
        }
        "vmdk" => {
            let mut head = vec![0; 2048.min(usize::try_from(end).expect("small"))];
            file.read_exact_at(&mut head, 0).expect("read");
            if let Some(at) = head.windows(5).position(|w| w == b"\nCID=") {
                let digits = head[at + 5..].iter().position(|b| *b == b'\n').expect("line");
                let mut rest: Vec<u8> = head[at + 5 + digits..].to_vec();
                // A shorter id written over a longer one leaves the end of the longer text behind a zero byte.
                if let Some(end) = rest.iter().position(|b| *b == 0) {
                    rest[end..].fill(0);
                }
                let mut text = vec![b'0'; 8];
                text.extend(rest);
                // Without leading zeros the text's length varies: what follows it is zeros.
                text.truncate(head.len() - at - 5);
                file.write_all_at(&text, at as u64 + 5).expect("write");
            }
        }
        _ => {}
    }
}
