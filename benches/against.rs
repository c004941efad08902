//! Times vimg and qemu-img, and if wanted an older vimg, in turn on the same work, with a warm cache unless a job says
//! else, and prints ratios, and what cannot be gone below.
//!
//! `cargo bench --bench against [-- WORD]` runs the jobs whose names have that word. The disk is a real one: an ext4 file system of this machine's own
//! `/usr/bin` and `/usr/share` in a sparse 8 GiB raw file, made once in the scratch folder.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `VIMG_BENCH_DIR` | where the disk and the outputs lie | the temporary folder |
//! | `VIMG_BENCH_GIB` | the disk's size | 8 |
//! | `VIMG_BENCH_ROUNDS` | how often each job is run by each program | 5 |
//! | `QEMU_MODULE_DIR` | where qemu-img's `block-curl.so` is, for the jobs over http | qemu-img's own |
//! | `VIMG_BASE` | another vimg that is measured too, say that of the commit before | none |
//!
//! Where the time goes (`perf record`, two cores, 0.9 GiB of data):
//!
//! * Plain conversions are the kernel's: 45 to 66 % copies into the page cache (`copy_folio_from_iter_atomic`), 11 to
//!   14 % copies out of it (`_copy_to_iter`), the rest is pages and the target's inode lock; user time is under 3 %. The
//!   floor is one copy each way: `cp --sparse=always` of the same disk takes 0.40 s on one core, vimg 0.20 s on two.
//! * `-c` is the encoder on both cores: our encoder with a 4 KiB window at about 120 MB/s a core, libdeflate level 5 for
//!   streamOptimized, zstd level 3. The floor is the codec alone.
//! * Reading compressed images: a third to a half of the processor time is the kernel's, as above; the rest is the decoder
//!   (libdeflate or zstd). Seen as user against system time, not profiled.
//!
//! Ratio = the other's time / vimg's time: above 1 vimg is faster. There are the ratio of the medians and that of the best
//! runs: what else the machine does, and pages that a virtual machine has given back to its host, only ever add time, to
//! either program. The floor of a plain job is its bytes copied in memory, that of a compressed one the codec alone, both
//! on all cores. Memory is the largest resident set.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "against/ciphers.rs"]
mod ciphers;
#[path = "against/cost.rs"]
mod cost;
#[path = "against/far.rs"]
mod far;
#[path = "against/floor.rs"]
mod floor;
#[path = "against/report.rs"]
mod report;
#[path = "against/scene.rs"]
mod scene;
#[path = "against/udif.rs"]
mod udif;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cost::{Runs, cost_of, measure};
use scene::{FileSystem, shell};

/// One piece of work. `{disk}` is the real disk, `{far}` a server of HTTP with the scratch folder's files; other words are files in the scratch folder.
struct Job {
    name: &'static str,
    /// Made once before, by qemu-img, if it is not there: the file and the arguments.
    needs: &'static [(&'static str, &'static str)],
    /// What is timed. Words that start with `+` are qemu-img's alone; those that start with `@` say how it is run: `@cold`,
    /// with what is read out of the page cache; `@many`, 200 times in a row; `@xfs` and `@btrfs`, on such a file system;
    /// `@from` and `@to`, with a `qemu-nbd` of the disk, or of an empty one as long, on `nbd.sock`; `@fromkit` and
    /// `@tokit`, with an `nbdkit`.
    run: &'static str,
}

const QCOW2: (&str, &str) = ("disk.qcow2", "convert -f raw -O qcow2 {disk} disk.qcow2");
const ZLIB: (&str, &str) = ("zlib.qcow2", "convert -f raw -O qcow2 -c {disk} zlib.qcow2");
const ZSTD: (&str, &str) = ("zstd.qcow2", "convert -f raw -O qcow2 -c -o compression_type=zstd {disk} zstd.qcow2");
const VMDK: (&str, &str) = ("disk.vmdk", "convert -f raw -O vmdk {disk} disk.vmdk");
const STREAM: (&str, &str) = ("s.vmdk", "convert -f raw -O vmdk -o subformat=streamOptimized {disk} s.vmdk");
const VDI: (&str, &str) = ("disk.vdi", "convert -f raw -O vdi {disk} disk.vdi");
const VPC: (&str, &str) = ("disk.vpc", "convert -f raw -O vpc {disk} disk.vpc");
const VHDX: (&str, &str) = ("disk.vhdx", "convert -f raw -O vhdx {disk} disk.vhdx");
const QCOW: (&str, &str) = ("disk.qcow", "convert -f raw -O qcow {disk} disk.qcow");
const QED: (&str, &str) = ("disk.qed", "convert -f raw -O qed {disk} disk.qed");
const PARALLELS: (&str, &str) = ("disk.hdd", "convert -f raw -O parallels {disk} disk.hdd");
const LUKS_QCOW2: (&str, &str) = (
    "luks.qcow2",
    "convert -f raw -O qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 {disk} luks.qcow2",
);
const LUKS: (&str, &str) =
    ("disk.luks", "convert --object secret,id=s,data=abc -f raw -O luks -o key-secret=s {disk} disk.luks");
const EMPTY: (&str, &str) = ("empty.qcow2", "create -q -f qcow2 empty.qcow2 8G");
const FULL: (&str, &str) = ("full.qcow2", "create -q -f qcow2 -o preallocation=metadata full.qcow2 1T");
const HUGE: (&str, &str) = ("huge.qcow2", "create -q -f qcow2 huge.qcow2 16T");

const STANDING_RAW: (&str, &str) = ("standing.raw", "convert -f raw -O raw {disk} standing.raw");
const STANDING_QCOW2: (&str, &str) = ("standing.qcow2", "convert -f raw -O qcow2 {disk} standing.qcow2");
const MIB: (&str, &str) = ("mib.raw", "dd -f raw -O raw bs=1M skip=64 count=1 if={disk} of=mib.raw");

/// Makes a chain of 30 overlays, each with a few clusters, over an image in which every other cluster is data.
const CHAIN: &str = "qemu-img create -q -f qcow2 layer0 8G; \
    { for k in $(seq 0 4000); do echo write $((k * 131072)) 64k; done; } | qemu-io layer0 >/dev/null; \
    for n in $(seq 1 30); do qemu-img create -q -f qcow2 -b layer$((n - 1)) -F qcow2 layer$n; \
    { for k in $(seq 0 20); do echo write $(((n * 37 + k * 211) % 8000 * 65536)) 64k; done; } | qemu-io layer$n >/dev/null; done";

const JOBS: &[Job] = &[
    Job { name: "raw→raw", needs: &[], run: "convert -f raw -O raw {disk} out" },
    Job { name: "raw→qcow2", needs: &[], run: "convert -f raw -O qcow2 {disk} out" },
    Job { name: "qcow2→raw", needs: &[QCOW2], run: "convert -f qcow2 -O raw disk.qcow2 out" },
    Job { name: "qcow2→qcow2", needs: &[QCOW2], run: "convert -f qcow2 -O qcow2 disk.qcow2 out" },
    Job { name: "http qcow2→raw", needs: &[QCOW2], run: "convert -f qcow2 -O raw {far}/disk.qcow2 out" },
    Job { name: "http qcow2 zlib→raw", needs: &[ZLIB], run: "convert -f qcow2 -O raw {far}/zlib.qcow2 out" },
    Job { name: "raw→qcow2 -c zlib", needs: &[], run: "convert -f raw -O qcow2 -c {disk} out" },
    Job { name: "zlib, qemu-img -W -m 16", needs: &[], run: "convert -f raw -O qcow2 -c +-W +-m +16 {disk} out" },
    Job { name: "zlib, clusters of 2M", needs: &[], run: "convert -f raw -O qcow2 -c -o cluster_size=2M {disk} out" },
    Job {
        name: "raw→qcow2 -c zstd",
        needs: &[],
        run: "convert -f raw -O qcow2 -c -o compression_type=zstd {disk} out",
    },
    Job { name: "qcow2 zlib→raw", needs: &[ZLIB], run: "convert -f qcow2 -O raw zlib.qcow2 out" },
    Job { name: "qcow2 zstd→raw", needs: &[ZSTD], run: "convert -f qcow2 -O raw zstd.qcow2 out" },
    Job { name: "raw→vmdk", needs: &[], run: "convert -f raw -O vmdk {disk} out" },
    Job { name: "vmdk→raw", needs: &[VMDK], run: "convert -f vmdk -O raw disk.vmdk out" },
    Job {
        name: "raw→vmdk stream", needs: &[], run: "convert -f raw -O vmdk -o subformat=streamOptimized {disk} out"
    },
    Job { name: "vmdk stream→raw", needs: &[STREAM], run: "convert -f vmdk -O raw s.vmdk out" },
    Job { name: "raw→vdi", needs: &[], run: "convert -f raw -O vdi {disk} out" },
    Job { name: "vdi→raw", needs: &[VDI], run: "convert -f vdi -O raw disk.vdi out" },
    Job { name: "raw→vpc", needs: &[], run: "convert -f raw -O vpc {disk} out" },
    Job { name: "vpc→raw", needs: &[VPC], run: "convert -f vpc -O raw disk.vpc out" },
    Job { name: "raw→vhdx", needs: &[], run: "convert -f raw -O vhdx {disk} out" },
    Job { name: "vhdx→raw", needs: &[VHDX], run: "convert -f vhdx -O raw disk.vhdx out" },
    Job { name: "create vhdx fixed 1T", needs: &[], run: "create -f vhdx -o subformat=fixed out 1T" },
    Job { name: "raw→qcow", needs: &[], run: "convert -f raw -O qcow {disk} out" },
    Job { name: "raw→qed", needs: &[], run: "convert -f raw -O qed {disk} out" },
    Job { name: "qed→raw", needs: &[QED], run: "convert -f qed -O raw disk.qed out" },
    Job { name: "raw→parallels", needs: &[], run: "convert -f raw -O parallels {disk} out" },
    Job { name: "parallels→raw", needs: &[PARALLELS], run: "convert -f parallels -O raw disk.hdd out" },
    Job { name: "dmg zlib→raw", needs: &[], run: "convert -f dmg -O raw disk.dmg out" },
    Job { name: "qcow→raw", needs: &[QCOW], run: "convert -f qcow -O raw disk.qcow out" },
    Job {
        name: "raw→qcow2 LUKS",
        needs: &[],
        run: "convert -f raw -O qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 {disk} out",
    },
    Job {
        name: "qcow2 LUKS→raw",
        needs: &[LUKS_QCOW2],
        run: "convert --object secret,id=s,data=abc --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=luks.qcow2 -O raw out",
    },
    Job {
        name: "raw→luks",
        needs: &[],
        run: "convert --object secret,id=s,data=abc -f raw -O luks -o key-secret=s {disk} out",
    },
    Job {
        name: "luks→raw",
        needs: &[LUKS],
        run: "convert --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=disk.luks -O raw out",
    },
    Job { name: "dd bs=1M", needs: &[], run: "dd -f raw -O raw bs=1M if={disk} of=out" },
    Job { name: "dd to qcow2", needs: &[], run: "dd -f raw -O qcow2 bs=1M if={disk} of=out" },
    Job { name: "bench of reads", needs: &[], run: "bench -f raw {disk}" },
    Job { name: "bench of qcow2 reads", needs: &[QCOW2], run: "bench -f qcow2 disk.qcow2" },
    Job { name: "bench of writes", needs: &[], run: "bench -w -f qcow2 -c 20000 --flush-interval 64 new.qcow2" },
    Job { name: "snapshot -c", needs: &[QCOW2], run: "snapshot -c new keep.qcow2" },
    Job { name: "snapshot -a", needs: &[QCOW2], run: "snapshot -a old keep.qcow2" },
    Job { name: "snapshot -d", needs: &[QCOW2], run: "snapshot -d old keep.qcow2" },
    Job { name: "commit of 1G", needs: &[QCOW2], run: "commit -q top.qcow2" },
    Job { name: "commit -d of 1G", needs: &[QCOW2], run: "commit -q -d top.qcow2" },
    Job { name: "rebase of 1G", needs: &[QCOW2], run: "rebase -b other.qcow2 -F qcow2 top.qcow2" },
    Job { name: "rebase -u of 1G", needs: &[QCOW2], run: "rebase -u -b other.qcow2 -F qcow2 top.qcow2" },
    Job { name: "info", needs: &[EMPTY], run: "info empty.qcow2" },
    Job { name: "info of the disk", needs: &[QCOW2], run: "info disk.qcow2" },
    Job { name: "create qcow2 8G", needs: &[], run: "create -f qcow2 out 8G" },
    Job { name: "create raw 8G", needs: &[], run: "create -f raw out 8G" },
    Job { name: "create 1T metadata", needs: &[], run: "create -f qcow2 -o preallocation=metadata out 1T" },
    Job { name: "create qcow2 16T", needs: &[], run: "create -f qcow2 out 16T" },
    Job { name: "16T sparse qcow2→qcow2", needs: &[HUGE], run: "convert -f qcow2 -O qcow2 huge.qcow2 out" },
    Job { name: "16T sparse qcow2→vdi", needs: &[HUGE], run: "convert -f qcow2 -O vdi huge.qcow2 out" },
    Job { name: "16T sparse qcow2→vmdk", needs: &[HUGE], run: "convert -f qcow2 -O vmdk huge.qcow2 out" },
    Job { name: "info 16T", needs: &[HUGE], run: "info huge.qcow2" },
    Job { name: "check 1T metadata", needs: &[FULL], run: "check full.qcow2" },
    Job { name: "check of the disk", needs: &[QCOW2], run: "check disk.qcow2" },
    Job { name: "check of the vmdk", needs: &[VMDK], run: "check disk.vmdk" },
    Job { name: "compare raw, qcow2", needs: &[QCOW2], run: "compare -f raw -F qcow2 {disk} disk.qcow2" },
    Job { name: "compare raw, qcow2 zlib", needs: &[ZLIB], run: "compare -f raw -F qcow2 {disk} zlib.qcow2" },
    Job { name: "compare raw, vmdk stream", needs: &[STREAM], run: "compare -f raw -F vmdk {disk} s.vmdk" },
    Job { name: "map of 30 overlays", needs: &[], run: "map --output=json layer30" },
    Job { name: "resize 8G to 16T", needs: &[], run: "resize -f qcow2 grow.qcow2 16T" },
    Job { name: "cold raw→qcow2", needs: &[], run: "@cold convert -f raw -O qcow2 {disk} out" },
    Job { name: "cold qcow2→raw", needs: &[QCOW2], run: "@cold convert -f qcow2 -O raw disk.qcow2 out" },
    Job { name: "uncached raw→raw", needs: &[], run: "convert -T none -t none -f raw -O raw {disk} out" },
    Job {
        name: "uncached qcow2→qcow2",
        needs: &[QCOW2],
        run: "convert -T none -t none -f qcow2 -O qcow2 disk.qcow2 out",
    },
    Job {
        name: "onto a raw that stands",
        needs: &[STANDING_RAW],
        run: "convert -n +-t +writeback -f raw -O raw {disk} standing.raw",
    },
    Job {
        name: "onto a qcow2 that stands",
        needs: &[STANDING_QCOW2],
        run: "convert -n +-t +writeback -f raw -O qcow2 {disk} standing.qcow2",
    },
    Job { name: "nbd→raw", needs: &[], run: "@from convert -f raw -O raw nbd:unix:nbd.sock out" },
    Job { name: "nbd→qcow2", needs: &[], run: "@from convert -f raw -O qcow2 nbd:unix:nbd.sock out" },
    Job { name: "raw→nbd", needs: &[], run: "@to convert -n -f raw -O raw {disk} nbd:unix:nbd.sock" },
    Job { name: "nbdkit→raw", needs: &[], run: "@fromkit convert -f raw -O raw nbd:unix:nbd.sock out" },
    Job { name: "raw→nbdkit", needs: &[], run: "@tokit convert -n -f raw -O raw {disk} nbd:unix:nbd.sock" },
    Job { name: "200 of 1M raw→qcow2", needs: &[MIB], run: "@many convert -f raw -O qcow2 mib.raw out" },
    Job { name: "XFS raw→raw", needs: &[], run: "@xfs convert -f raw -O raw {disk} out" },
    Job { name: "XFS raw→qcow2", needs: &[], run: "@xfs convert -f raw -O qcow2 {disk} out" },
    Job { name: "XFS qcow2→raw", needs: &[QCOW2], run: "@xfs convert -f qcow2 -O raw disk.qcow2 out" },
    Job { name: "XFS raw→vdi", needs: &[], run: "@xfs convert -f raw -O vdi {disk} out" },
    Job { name: "XFS raw→qcow2 -C", needs: &[], run: "@xfs convert -C -f raw -O qcow2 {disk} out" },
    Job { name: "Btrfs raw→raw", needs: &[], run: "@btrfs convert -f raw -O raw {disk} out" },
    Job { name: "Btrfs raw→qcow2", needs: &[], run: "@btrfs convert -f raw -O qcow2 {disk} out" },
    Job { name: "Btrfs qcow2→raw", needs: &[QCOW2], run: "@btrfs convert -f qcow2 -O raw disk.qcow2 out" },
];

/// Other programs that do the same as a job: its name, the program, and how it is run, if it is there.
const PEERS: &[(&str, &str, &str)] = &[
    ("raw→raw", "cp", "cp --sparse=always --reflink=never {disk} out"),
    ("raw→raw", "nbdcopy", "nbdcopy {disk} out"),
    ("qcow2→raw", "nbdcopy", "nbdcopy -- [ qemu-nbd -r -f qcow2 disk.qcow2 ] out"),
    ("nbd→raw", "nbdcopy", "nbdcopy nbd+unix:///?socket=nbd.sock out"),
    // What is written is on the disk at the end, as it is with the others.
    ("raw→nbd", "nbdcopy", "nbdcopy --flush {disk} nbd+unix:///?socket=nbd.sock"),
    ("nbdkit→raw", "nbdcopy", "nbdcopy nbd+unix:///?socket=nbd.sock out"),
    ("raw→nbdkit", "nbdcopy", "nbdcopy --flush {disk} nbd+unix:///?socket=nbd.sock"),
    ("XFS raw→raw", "cp", "cp {disk} out"),
    ("Btrfs raw→raw", "cp", "cp {disk} out"),
];

/// A program that is measured at a job.
struct Contender {
    name: &'static str,
    command: Vec<String>,
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "--cost") {
        cost_of(&args[1..]);
    }
    let filter = args.iter().find(|arg| !arg.starts_with('-')).cloned().unwrap_or_default();
    let base =
        std::env::var_os("VIMG_BENCH_DIR").map_or_else(|| std::env::temp_dir().join("vimg-bench"), PathBuf::from);
    std::fs::create_dir_all(&base).expect("scratch folder");
    let disk = scene::real_disk(&base, number("VIMG_BENCH_GIB", 8));
    let rounds = number("VIMG_BENCH_ROUNDS", 5).max(1);
    let mut programs = vec![("vimg", PathBuf::from(env!("CARGO_BIN_EXE_vimg"))), ("qemu", PathBuf::from("qemu-img"))];
    if let Some(path) = std::env::var_os("VIMG_BASE") {
        programs.push(("base", std::fs::canonicalize(path).expect("VIMG_BASE is a program")));
    }
    let mut floors = floor::Floors::new(&disk);
    println!("ratio = the other's time / vimg's: above 1.00 vimg is faster; {rounds} rounds, in turn, there and back");
    println!("{}", report::head(&programs.iter().map(|(name, _)| *name).collect::<Vec<_>>()));
    let mut system: Option<(&str, FileSystem)> = None;
    for job in JOBS.iter().filter(|job| job.name.contains(&filter)) {
        let scene = match ["xfs", "btrfs"].into_iter().find(|kind| job.run.starts_with(&format!("@{kind} "))) {
            None => Ok((base.clone(), disk.clone())),
            Some(kind) => {
                if system.as_ref().is_none_or(|(other, _)| *other != kind) {
                    drop(system.take());
                    system = FileSystem::new(&base, kind, &disk).ok().map(|made| (kind, made));
                }
                let made = system.as_ref().map(|(_, made)| (made.dir.clone(), made.disk.clone()));
                made.ok_or_else(|| format!("no {kind} can be mounted here"))
            }
        };
        match scene.and_then(|(dir, disk)| run_job(job, &dir, &disk, rounds, &programs)) {
            Ok(runs) => println!("{}", report::row(job.name, &runs, programs.len(), floors.of(job.name))),
            Err(why) => println!("{:<24} not measured: {}", job.name, why.lines().next().unwrap_or_default()),
        }
    }
    let _ = std::fs::remove_file(base.join("out"));
    scene::end_server(&base);
    if "ciphers".contains(&filter) {
        ciphers::ciphers();
    }
}

/// The words of a line for one of the programs.
fn words(line: &str, disk: &Path, theirs: bool) -> Vec<String> {
    let word = |word: &str| match word.strip_prefix('+') {
        Some(word) => theirs.then(|| word.to_owned()),
        None if word.starts_with("{far}") => {
            Some(word.replace("{far}", &far::url(disk.parent().expect("the scratch folder"))))
        }
        None => Some(word.replace("{disk}", &disk.display().to_string())),
    };
    line.split(' ').filter(|word| !word.starts_with('@')).filter_map(word).collect()
}

/// Whoever does that job, and how.
fn contenders(job: &Job, disk: &Path, programs: &[(&'static str, PathBuf)]) -> Vec<Contender> {
    let ours = programs.iter().map(|(name, path)| {
        let program = path.display().to_string();
        let command = std::iter::once(program).chain(words(job.run, disk, *name == "qemu"));
        Contender { name, command: command.collect() }
    });
    let there = |program: &str| {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&folders).any(|folder| folder.join(program).exists())
    };
    let peers = PEERS.iter().filter(|(name, program, _)| *name == job.name && there(program));
    let peers = peers.map(|(_, program, line)| Contender { name: program, command: words(line, disk, false) });
    let mut all: Vec<Contender> = ours.chain(peers).collect();
    if job.run.starts_with("@many ") {
        let many = ["sh", "-c", "for i in $(seq 200); do \"$@\" || exit 1; done", "sh"].map(str::to_owned);
        all.iter_mut().for_each(|contender| contender.command.splice(0..0, many.clone()).for_each(drop));
    }
    all
}

/// The cost of a run. (Over http qemu-img has been seen to wait for ever for what the server had sent: what takes minutes
/// there is ended, and begins once more.)
fn measure_within(command: &[String], dir: &Path, disk: &Path, job: &Job) -> Result<cost::Cost, String> {
    if !job.run.contains("{far}") {
        return measure(command, dir);
    }
    let limited: Vec<String> =
        ["timeout", "120"].map(str::to_owned).into_iter().chain(command.iter().cloned()).collect();
    measure(&limited, dir).or_else(|_| {
        scene::set(dir, disk, job.run);
        far::take_sent();
        measure(&limited, dir)
    })
}

/// Runs a job by each contender, in turn; one [`Runs`] each.
fn run_job(
    job: &Job,
    dir: &Path,
    disk: &Path,
    rounds: u64,
    programs: &[(&'static str, PathBuf)],
) -> Result<Vec<Runs>, String> {
    for (file, make) in job.needs {
        if !dir.join(file).exists() {
            let status = Command::new("qemu-img").args(words(make, disk, true)).current_dir(dir).status();
            assert!(status.is_ok_and(|s| s.success()), "failed: qemu-img {make}");
        }
    }
    if job.run.contains("layer30") && !dir.join("layer30").exists() {
        shell(dir, CHAIN);
    }
    if job.run.contains("disk.dmg") && !dir.join("disk.dmg").exists() {
        shell(dir, &format!("python3 -c '{}' '{}'", udif::MAKER, disk.display()));
    }
    let contenders = contenders(job, disk, programs);
    let runs = |contender: &Contender| Runs { name: contender.name, costs: Vec::new(), size: 0, fetched: 0 };
    let mut all: Vec<Runs> = contenders.iter().map(runs).collect();
    let mut unable = vec![false; all.len()];
    // One run of each to warm up, then in turn, there and back: who comes after a certain other finds the memory as that
    // one has left it.
    for round in 0..=rounds {
        let mut turns: Vec<usize> = (0..contenders.len()).collect();
        if round % 2 == 1 {
            turns.reverse();
        }
        for turn in turns {
            let (contender, runs) = (&contenders[turn], &mut all[turn]);
            if unable[turn] {
                continue;
            }
            scene::set(dir, disk, job.run);
            if job.run.starts_with("@cold ") {
                scene::chill(dir, disk);
                job.needs.iter().for_each(|(file, _)| scene::chill(dir, Path::new(file)));
            }
            let cost = match measure_within(&contender.command, dir, disk, job) {
                Err(_) if contender.name == "base" => {
                    unable[turn] = true;
                    continue;
                }
                other => other?,
            };
            runs.fetched = far::take_sent();
            if round > 0 {
                runs.costs.push(cost);
            }
            runs.size = std::fs::metadata(dir.join("out")).map_or(0, |m| m.blocks() * 512);
        }
    }
    Ok(all)
}
