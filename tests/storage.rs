//! The storage stratum against the host itself: locks shared with `qemu-io`, loop devices, full disks, file
//! systems with abilities of their own.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use vimg::storage::file::{FileHow, HostFile};
use vimg::storage::lock::Access;
use vimg::storage::staging::{CreateHow, Durability, Staging};
use vimg::storage::{CacheMode, FileKind, HostExtent, Preallocation, Storage, Zeroing};

use crate::common::run::Holder;
use crate::common::{Scratch, judge, need, need_root, pattern, sh, vimg};

const RW: FileHow = FileHow { write: true, cache: CacheMode::Writeback, access: Access::NONE, keep_space: false };

/// A program that another test is just starting holds our descriptors for a moment, until it is that program: so
/// what ought to be free is tried for minutes.
fn patiently<T>(mut take: impl FnMut() -> vimg::storage::Result<T>) -> T {
    let mut tries = 0;
    loop {
        match take() {
            Err(error) if error.errno() == Some(Errno::EAGAIN) && tries < 10_000 => tries += 1,
            other => return other.unwrap(),
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn hold(path: &Path, access: Access) -> HostFile {
    patiently(|| HostFile::open(path, &FileHow { access, ..RW }))
}

fn taking(path: &Path, access: Access) -> String {
    HostFile::open(path, &FileHow { access, ..RW }).map_or_else(|e| e.to_string(), |_| "ok".to_owned())
}

/// A loop device over a file, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path, more: &str) -> Self {
        need("losetup");
        need_root("a loop device");
        let made = sh(&format!("losetup {more} -f --show {}", file.display())).ok();
        Self(made.stdout.trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        sh(&format!("losetup -d {}", self.0.display())).run();
    }
}

/// A file system on a folder, unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(folder: PathBuf, how: &str) -> Self {
        need("mount");
        need_root("mounting a file system");
        fs::create_dir(&folder).unwrap();
        sh(&format!("mount {how} {}", folder.display())).ok();
        Self(folder)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        sh(&format!("umount {}", self.0.display())).run();
    }
}

const NO_WRITE: &str = "Failed to get \"write\" lock";
const NO_SHARED_WRITE: &str = "Failed to get shared \"write\" lock";

#[test]
fn a_judge_that_holds_an_image_keeps_us_out() {
    let dir = Scratch::new();
    dir.judge(&["create", "-q", "-f", "qcow2", "a", "1M"]);
    dir.judge(&["create", "-q", "-f", "raw", "b", "1M"]);
    let (a, b) = (dir.file("a"), dir.file("b"));
    {
        let _writer = Holder::new(dir.path(), &["-f", "qcow2", "a"]);
        assert_eq!(taking(&a, Access::READ), NO_SHARED_WRITE);
        assert_eq!(taking(&a, Access::LOOK), NO_SHARED_WRITE);
        assert_eq!(taking(&a, Access::WRITE), NO_WRITE);
        assert_eq!(taking(&a, Access::CREATE), NO_WRITE);
        assert_eq!(taking(&a, Access::SHARED), "ok");
        let theirs = judge(&["info", "a"]).dir(dir.path()).fails(1);
        let ours = vimg(&["info", "a"]).dir(dir.path()).fails(1);
        assert_eq!(ours.stderr.replacen("vimg", "qemu-img", 1), theirs.stderr);
        let theirs = judge(&["create", "-q", "-f", "qcow2", "a", "2M"]).dir(dir.path()).fails(1);
        let ours = vimg(&["create", "-q", "-f", "qcow2", "a", "2M"]).dir(dir.path()).fails(1);
        assert_eq!(ours.stderr.replacen("vimg", "qemu-img", 1), theirs.stderr);
        vimg(&["info", "-U", "a"]).dir(dir.path()).ok();
    }
    {
        let _reader = Holder::new(dir.path(), &["-r", "-f", "qcow2", "a"]);
        assert_eq!(taking(&a, Access::READ), "ok");
        assert_eq!(taking(&a, Access::WRITE), NO_WRITE);
    }
    {
        // raw adds no refusals of its own: whoever reads it as raw bears its writer.
        let _writer = Holder::new(dir.path(), &["-f", "raw", "b"]);
        assert_eq!(taking(&b, Access::READ), NO_SHARED_WRITE);
        assert_eq!(taking(&b, Access::READ.of_raw()), "ok");
        judge(&["info", "b"]).dir(dir.path()).ok();
        vimg(&["info", "b"]).dir(dir.path()).ok();
    }
    drop(hold(&a, Access::WRITE));
}

#[test]
fn what_we_hold_keeps_the_judge_out() {
    let dir = Scratch::new();
    dir.judge(&["create", "-q", "-f", "qcow2", "a", "1M"]);
    let a = dir.file("a");
    let cases: [(Access, &[&str], &str); 6] = [
        (Access::WRITE, &["info", "a"], NO_SHARED_WRITE),
        (Access::WRITE, &["create", "-q", "-f", "qcow2", "a", "1M"], NO_WRITE),
        (Access::READ, &["resize", "-f", "qcow2", "a", "2M"], NO_WRITE),
        (Access::READ, &["info", "a"], ""),
        (Access::CREATE, &["info", "a"], NO_SHARED_WRITE),
        (Access::CREATE, &["create", "-q", "-f", "raw", "a", "1M"], "Failed to get \"resize\" lock"),
    ];
    for (access, args, expected) in cases {
        let held = hold(&a, access);
        let run = judge(args).dir(dir.path());
        let out = if expected.is_empty() { run.patiently() } else { run.run() };
        assert_eq!(out.code, Some(i32::from(!expected.is_empty())), "{access:?} {args:?}: {out:?}");
        assert!(out.stderr.contains(expected), "{access:?} {args:?}: {out:?}");
        if !expected.is_empty() {
            assert!(out.stderr.contains("Is another process using the image [a]?"), "{out:?}");
        }
        drop(held);
    }
    // An older file stays locked until the new one has its name.
    let staging = Staging::new(CacheMode::Unsafe, Durability::Never);
    patiently(|| staging.create(&a));
    let out = judge(&["resize", "-f", "qcow2", "a", "2M"]).dir(dir.path()).fails(1);
    assert!(out.stderr.contains("lock"), "{out:?}");
    drop(staging);
    drop(hold(&a, Access::WRITE));
    dir.judge(&["resize", "-f", "qcow2", "a", "2M"]);
}

#[test]
fn a_block_device() {
    let dir = Scratch::new();
    let backing = dir.file("disk");
    // Not a multiple of a page, so that O_DIRECT meets an odd end.
    let size = (4u64 << 20) + 512;
    fs::write(&backing, pattern(1, size as usize)).unwrap();
    let device = Loop::new(&backing, "");
    let mut model = pattern(1, size as usize);
    for cache in [CacheMode::Writeback, CacheMode::None, CacheMode::Directsync] {
        let file = HostFile::open(&device.0, &FileHow { cache, ..RW }).unwrap();
        assert_eq!((file.len().unwrap(), file.kind()), (size, FileKind::BlockDevice));
        assert_eq!(file.extent(0, u64::MAX).unwrap(), HostExtent::data(size));
        assert_eq!(file.extent(size, 9).unwrap(), HostExtent::hole(9));
        let check = |model: &[u8]| {
            let mut got = vec![1; size as usize + 100];
            file.read_at(0, &mut got).unwrap();
            assert!(got[..size as usize] == *model && got[size as usize..].iter().all(|b| *b == 0), "{cache:?}");
        };
        check(&model);
        for (at, len) in [(0usize, 512usize), (777, 5000), (size as usize - 300, 300), (1 << 20, 1 << 20)] {
            let bytes = pattern(at as u64 + len as u64, len);
            file.write_at(at as u64, &bytes).unwrap();
            model[at..at + len].copy_from_slice(&bytes);
            check(&model);
        }
        for (how, at, len) in [
            (Zeroing::Punch, 512usize, 65536usize),
            (Zeroing::Punch, 100_000, 70_001),
            (Zeroing::Allocate, 200_000, 99_999),
            (Zeroing::Write, 400_001, 3),
            (Zeroing::Punch, size as usize - 512, 512),
        ] {
            file.zero(at as u64, len as u64, how).unwrap();
            model[at..at + len].fill(0);
            check(&model);
        }
        let past = file.zero(size - 512, 4096, Zeroing::Punch).unwrap_err();
        assert_eq!(past.errno(), Some(Errno::ENOSPC));
        model[size as usize - 512..].fill(0);
        file.discard(1 << 20, 1 << 20).unwrap();
        file.write_at(1 << 20, &model[1 << 20..2 << 20]).unwrap();
        check(&model);
        file.set_len(size - 512, Preallocation::Off).unwrap();
        assert_eq!(file.set_len(size + 1, Preallocation::Off).unwrap_err().to_string(), "Cannot grow device files");
        let text = file.set_len(size, Preallocation::Full).unwrap_err().to_string();
        assert_eq!(text, "Preallocation mode 'full' unsupported for this non-regular file");
        file.flush().unwrap();
    }
    // A target of that kind is written in place, not truncated, and there before the commit.
    let staging = Staging::new(CacheMode::Writeback, Durability::Always);
    let file = staging.create(&device.0).unwrap();
    file.write_at(5, b"hello").unwrap();
    model[5..10].copy_from_slice(b"hello");
    drop(file);
    staging.commit().unwrap();
    drop(device);
    assert!(fs::read(&backing).unwrap() == model);
}

#[test]
fn punching_a_device_gives_its_space_back() {
    let dir = Scratch::new();
    fs::write(dir.file("disk"), vec![7; 8 << 20]).unwrap();
    let device = Loop::new(&dir.file("disk"), "");
    let file = HostFile::open(&device.0, &RW).unwrap();
    file.zero(0, 4 << 20, Zeroing::Punch).unwrap();
    file.discard(4 << 20, 2 << 20).unwrap();
    file.flush().unwrap();
    let left = fs::metadata(dir.file("disk")).unwrap().blocks() * 512;
    assert!(left <= (2 << 20) + 65536, "{left}");
}

#[test]
fn a_read_only_device_is_refused() {
    let dir = Scratch::new();
    fs::write(dir.file("disk"), vec![0; 1 << 20]).unwrap();
    let device = Loop::new(&dir.file("disk"), "-r");
    let name = device.0.to_str().unwrap();
    assert_eq!(taking(&device.0, Access::NONE), "The device is not writable: Permission denied");
    let theirs = judge(&["create", "-q", "-f", "raw", name, "1M"]).fails(1);
    let ours = vimg(&["create", "-q", "-f", "raw", name, "1M"]).fails(1);
    assert_eq!(ours.stderr.replacen("vimg", "qemu-img", 1), theirs.stderr);
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let dir = Scratch::new();
    let small = Mount::new(dir.file("small"), "-t tmpfs -o size=1m vimg-test");
    let path = small.0.join("a");
    fs::write(&path, b"old").unwrap();
    let file = HostFile::open(&path, &RW).unwrap();
    for (fill, text) in [
        (Preallocation::Falloc, "Could not preallocate new data: No space left on device"),
        (Preallocation::Full, "Could not write zeros for preallocation: No space left on device"),
    ] {
        let error = file.set_len(4 << 20, fill).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.errno()), (text, Some(Errno::ENOSPC)));
        assert_eq!(file.len().unwrap(), 3, "the old length is back");
        assert!(fs::metadata(&path).unwrap().blocks() <= 8, "and so is the space");
    }
    let error = file.zero(0, 4 << 20, Zeroing::Allocate).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::ENOSPC));
    drop(file);
    fs::write(&path, b"old").unwrap();
    for name in ["a", "b"] {
        let staging = Staging::new(CacheMode::Unsafe, Durability::Never);
        let file = staging.create(&small.0.join(name)).unwrap();
        let error = (0..64).find_map(|i| file.write_at(i << 16, &[1; 1 << 16]).err()).expect("full");
        assert_eq!(error.to_string(), "No space left on device");
    }
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(&small.0).unwrap().count(), 1);
}

#[test]
fn owner_and_mode_are_kept_and_new_files_obey_the_umask() {
    need_root("giving a file away");
    let dir = Scratch::new();
    let old = dir.file("old");
    fs::write(&old, b"old").unwrap();
    std::os::unix::fs::chown(&old, Some(12345), Some(54321)).unwrap();
    fs::set_permissions(&old, fs::Permissions::from_mode(0o4640)).unwrap();
    dir.vimg(&["create", "-q", "-f", "raw", "old", "1M"]);
    let meta = fs::metadata(&old).unwrap();
    assert_eq!((meta.len(), meta.uid(), meta.gid(), meta.mode() & 0o7777), (1 << 20, 12345, 54321, 0o4640));
    for (umask, name) in [("022", "x"), ("077", "y")] {
        for program in [crate::common::vimg_path().to_str().unwrap(), "qemu-img"] {
            dir.sh(&format!("umask {umask}; rm -f {name}; {program} create -q -f raw {name} 1M"));
            let expected = if umask == "022" { 0o644 } else { 0o600 };
            assert_eq!(fs::metadata(dir.file(name)).unwrap().mode() & 0o7777, expected, "{program}");
        }
    }
}

/// What a user who is not root may not replace is written in place, as the reference does; what may not be
/// written at all is refused in its words.
#[test]
fn other_peoples_folders_and_files() {
    need("setpriv");
    need_root("running as another user");
    let dir = Scratch::new();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(crate::common::vimg_path(), dir.file("vimg")).unwrap();
    let nobody = |program: &str, args: &str| {
        let line = format!("setpriv --reuid 65534 --regid 65534 --clear-groups {program} {args}");
        sh(&line).dir(dir.path()).run()
    };
    let make = |name: &str, mode: u32, folder: u32| {
        let path = dir.file(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(folder)).unwrap();
        fs::metadata(&path).unwrap().ino()
    };
    for (name, folder) in [("closed/a", 0o755), ("sticky/a", 0o1777), ("open/a", 0o777)] {
        let inode = make(name, 0o666, folder);
        let args = format!("create -q -f raw {name} 2M");
        let theirs = nobody("qemu-img", &args);
        let out = nobody("./vimg", &args.replace("2M", "1M"));
        assert_eq!((out.code, out.stderr.replacen("vimg", "qemu-img", 1)), (Some(0), theirs.stderr), "{name}");
        let meta = fs::metadata(dir.file(name)).unwrap();
        assert_eq!((meta.len(), meta.ino(), meta.uid()), (1 << 20, inode, 0), "{name}: in place");
    }
    make("readonly/a", 0o444, 0o777);
    for name in ["readonly/a", "closed/new"] {
        let args = format!("create -q -f raw {name} 1M");
        let (ours, theirs) = (nobody("./vimg", &args), nobody("qemu-img", &args));
        assert_eq!(ours.code, Some(1), "{name}");
        assert_eq!(ours.stderr.replacen("vimg", "qemu-img", 1), theirs.stderr);
    }
    assert_eq!(fs::read(dir.file("readonly/a")).unwrap(), b"old");
}

/// Without `/proc` a file cannot be named later: it has a temporary name meanwhile.
#[test]
fn without_unnamed_files_a_temporary_name_does() {
    need("unshare");
    need_root("hiding /proc");
    let dir = Scratch::new();
    let program = crate::common::vimg_path();
    let hidden =
        |line: &str| sh(&format!("unshare -m sh -c 'mount -t tmpfs none /proc && {line}'")).dir(dir.path()).run();
    fs::write(dir.file("old"), b"old").unwrap();
    for name in ["new", "old"] {
        let out = hidden(&format!("{} create -q -f qcow2 {name} 1M", program.display()));
        assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""));
        dir.assert_clean("qcow2", name);
    }
    let out = hidden(&format!("{} create -q -f raw -o preallocation=metadata old 1M", program.display()));
    assert_eq!(out.code, Some(1));
    dir.assert_clean("qcow2", "old");
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["new", "old"]);
}

#[test]
fn a_bind_mounted_file_is_written_in_place() {
    let dir = Scratch::new();
    for name in ["real", "mounted"] {
        fs::write(dir.file(name), b"old").unwrap();
    }
    need_root("mounting a file");
    dir.sh("mount --bind real mounted");
    let out = vimg(&["create", "-q", "-f", "raw", "mounted", "1M"]).dir(dir.path()).run();
    dir.sh("umount mounted");
    assert_eq!(out.code, Some(0), "{out:?}");
    assert_eq!(fs::metadata(dir.file("real")).unwrap().len(), 1 << 20);
}

#[test]
fn xfs_extent_size_hints_are_set_and_shown() {
    need("mkfs.xfs");
    let dir = Scratch::new();
    dir.sh("truncate -s 400M disk && mkfs.xfs -q disk");
    let xfs = Mount::new(dir.file("xfs"), &format!("-o loop {}", dir.file("disk").display()));
    let hint = |how: &CreateHow| {
        let staging = Staging::new(CacheMode::Unsafe, Durability::Never);
        let file = staging.create_with(&xfs.0.join("a"), how).unwrap();
        let hint = file.host().unwrap().extent_size_hint();
        let warnings = staging.take_notices();
        drop(file);
        staging.commit().unwrap();
        (hint, warnings)
    };
    let of = |hint| CreateHow { extent_size_hint: hint, ..CreateHow::default() };
    assert_eq!(hint(&of(None)), (Some(1 << 20), vec![]));
    assert_eq!(hint(&of(Some(65536))), (Some(65536), vec![]));
    assert_eq!(hint(&of(Some(0))), (None, vec![]));
    let warning = "Failed to set extent size hint: Invalid argument".to_owned();
    assert_eq!(hint(&of(Some(5000))), (None, vec![warning]));
    for options in ["size=1M", "size=1M,extent_size_hint=64k", "size=1M,extent_size_hint=0"] {
        let shown = |program: &str| {
            dir.sh(&format!("{program} create -q -f raw -o {options} xfs/b && qemu-img info xfs/b; rm xfs/b")).stdout
        };
        assert_eq!(shown(crate::common::vimg_path().to_str().unwrap()), shown("qemu-img"), "{options}");
    }
    let direct = Staging::new(CacheMode::None, Durability::Always);
    direct.create(&xfs.0.join("c")).unwrap().write_at(3, b"abc").unwrap();
    direct.commit().unwrap();
    assert_eq!(fs::read(xfs.0.join("c")).unwrap(), b"\0\0\0abc");
}

#[test]
fn nocow_is_set_on_btrfs() {
    need("mkfs.btrfs");
    need("lsattr");
    let dir = Scratch::new();
    dir.sh("truncate -s 200M disk && mkfs.btrfs -q disk");
    let _btrfs = Mount::new(dir.file("b"), &format!("-o loop {}", dir.file("disk").display()));
    let nocow = |name: &str| {
        let shown = dir.sh(&format!("lsattr b/{name}")).stdout;
        shown.split(' ').next().unwrap_or_default().contains('C')
    };
    for (name, options, expected) in [("a", "nocow=on", true), ("c", "nocow=off", false)] {
        dir.vimg(&["create", "-q", "-f", "raw", "-o", options, &format!("b/{name}"), "1M"]);
        assert_eq!(nocow(name), expected, "{options}");
    }
    // A file that is replaced keeps it, as it does where the judge writes it in place.
    dir.judge(&["create", "-q", "-f", "raw", "b/a", "1M"]);
    assert!(nocow("a"));
    dir.vimg(&["create", "-q", "-f", "qcow2", "b/a", "1M"]);
    assert!(nocow("a"));
}

#[test]
fn xfs_flags_and_project_of_a_replaced_file_are_kept() {
    need("mkfs.xfs");
    need("xfs_io");
    let dir = Scratch::new();
    dir.sh("truncate -s 400M disk && mkfs.xfs -q disk");
    let _xfs = Mount::new(dir.file("xfs"), &format!("-o loop {}", dir.file("disk").display()));
    dir.sh("echo old > xfs/a; xfs_io -c 'chproj 42' -c 'chattr +dA' xfs/a");
    let before = fs::metadata(dir.file("xfs/a")).unwrap().ino();
    dir.vimg(&["create", "-q", "-f", "qcow2", "xfs/a", "1M"]);
    assert_ne!(fs::metadata(dir.file("xfs/a")).unwrap().ino(), before, "replaced");
    let shown = dir.sh("xfs_io -r -c lsproj -c lsattr xfs/a").stdout;
    assert!(shown.contains("projid = 42"), "{shown}");
    let flags = shown.lines().last().and_then(|line| line.split(' ').next()).unwrap_or_default().to_owned();
    assert!(flags.contains('d') && flags.contains('A'), "{shown}");
}

type Line = &'static [&'static str];

/// What is on the device below a file system when another file there is synced is what a power cut would leave.
#[test]
fn a_power_cut_leaves_the_new_disk_or_the_old_one() {
    let dir = Scratch::new();
    fs::write(dir.file("s.raw"), pattern(5, 3 << 20)).unwrap();
    fs::write(dir.file("old.raw"), pattern(6, 3 << 20)).unwrap();
    dir.judge(&["create", "-q", "-f", "qcow2", "blank", "3M"]);
    let flat: Line = &["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat"];
    let convert: Line = &["convert", "-f", "raw", "-O", "qcow2"];
    let create: Line = &["create", "-q", "-f", "qcow2"];
    let jobs: [(&str, Line, Line, &str, Line); 5] = [
        ("ext4", convert, &["s.raw", "m/t"], "qcow2", &["s.raw", "none"]),
        ("ext4", create, &["m/t", "3M"], "qcow2", &["blank"]),
        ("ext4", flat, &["s.raw", "m/t"], "vmdk", &["s.raw", "none"]),
        ("xfs", convert, &["s.raw", "m/t"], "qcow2", &["s.raw", "none"]),
        ("xfs", create, &["m/t", "3M"], "qcow2", &["blank"]),
    ];
    for (fs, args, names, format, expected) in jobs {
        for old in [false, true] {
            dir.sh(&match fs {
                "xfs" => "rm -f disk; truncate -s 320M disk; mkfs.xfs -q disk".to_owned(),
                _ => "rm -f disk; truncate -s 64M disk; mkfs.ext4 -q disk".to_owned(),
            });
            let mount = Mount::new(dir.file("m"), &format!("-o loop {}", dir.file("disk").display()));
            fs::write(dir.file("m/other"), "x").unwrap();
            if old {
                let mut before = args.to_vec();
                before.extend(["old.raw", "m/t"].iter().filter(|_| args[0] == "convert"));
                before.extend(["m/t", "9M"].iter().filter(|_| args[0] == "create"));
                dir.judge(&before);
            }
            dir.sh("sync -f m");
            dir.vimg(&[args, names].concat());
            dir.sh("echo y >> m/other; sync m/other; cp --sparse=always disk snap");
            drop(mount);
            fs::remove_dir(dir.file("m")).unwrap();
            let nouuid = if fs == "xfs" { ",nouuid" } else { "" };
            let mount = Mount::new(dir.file("m"), &format!("-o loop{nouuid} {}", dir.file("snap").display()));
            let what = format!("{fs}, {}, {args:?}", if old { "over an older one" } else { "new" });
            if dir.file("m/t").exists() {
                let source = if expected[0] == "blank" { ("qcow2", "blank") } else { ("raw", "s.raw") };
                let same = judge(&["compare", "-U", "-f", format, "-F", source.0, "m/t", source.1]);
                let out = same.dir(dir.path()).run();
                assert_eq!(out.code, Some(0), "{what}: {out:?}");
            } else {
                assert!(!old && expected.contains(&"none"), "{what}: gone");
            }
            drop(mount);
            fs::remove_dir(dir.file("m")).unwrap();
        }
    }
}

/// A profile that allows the very name alone: no unnamed file, no hidden one, no link, no rename.
#[test]
fn where_policy_allows_the_very_name_alone_that_is_used() {
    need("strace");
    let dir = Scratch::new();
    fs::write(dir.file("s.raw"), pattern(5, 300_000)).unwrap();
    let program = crate::common::vimg_path();
    let traced = |how: &str, line: &str| {
        sh(&format!("strace -qq -f -o trace {how} {} {line}", program.display())).dir(dir.path()).run()
    };
    let convert = |how: &str, target: &str| traced(how, &format!("convert -f raw -O qcow2 s.raw {target}"));
    let flat = "convert -f raw -O vmdk -o subformat=monolithicFlat s.raw flat.vmdk";
    for how in ["-e inject=linkat:error=EACCES", "-e inject=linkat,rename,renameat2:error=EPERM"] {
        for older in [false, true] {
            if older {
                fs::write(dir.file("a"), "older").unwrap();
                dir.judge(&["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "flat.vmdk", "5M"]);
            }
            let out = convert(how, "a");
            assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{how}");
            dir.assert_same_content("qcow2", "a", "raw", "s.raw");
            let out = traced(how, flat);
            assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{how}");
            dir.judge(&["compare", "-U", "-f", "vmdk", "-F", "raw", "flat.vmdk", "s.raw"]);
            for name in ["a", "flat.vmdk", "flat-flat.vmdk"] {
                fs::remove_file(dir.file(name)).unwrap();
            }
        }
    }
    // Which of its opens is the one of the unnamed file; the next one is that of a hidden one.
    convert("-e trace=openat", "a");
    fs::remove_file(dir.file("a")).unwrap();
    let trace = fs::read_to_string(dir.file("trace")).unwrap();
    let opens = trace.lines().filter(|line| line.contains("openat("));
    let n = opens.take_while(|line| !line.contains("O_TMPFILE")).count() + 1;
    let how = format!("-e trace=openat,openat2 -e inject=openat:error=EACCES:when={n}..{}", n + 1);
    let out = convert(&how, "a");
    assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""));
    let trace = fs::read_to_string(dir.file("trace")).unwrap();
    assert_eq!(trace.matches("INJECTED").count(), 2, "{trace}");
    dir.assert_same_content("qcow2", "a", "raw", "s.raw");
    // A failure takes the very name along.
    fs::remove_file(dir.file("a")).unwrap();
    let limited = format!("prlimit --fsize=100000 strace -qq -f -o trace {how} {}", program.display());
    let out = sh(&format!("{limited} convert -f raw -O qcow2 s.raw b")).dir(dir.path()).run();
    assert_eq!(out.code, Some(1), "{out:?}");
    assert!(!dir.file("b").exists());
}

/// Data first, then names, then folders; and of an image in several files all data before any name.
#[test]
fn stable_storage_comes_before_names_and_folders_after() {
    need("strace");
    let dir = Scratch::new();
    fs::write(dir.file("s.raw"), pattern(5, 300_000)).unwrap();
    let flat = "-O vmdk -o subformat=monolithicFlat";
    let apart = "convert -f raw -O qcow2 -o data_file=sub/data s.raw new5";
    let _sub = Mount::new(dir.file("sub"), "-t tmpfs -o size=8m vimg-test");
    let jobs = [
        ("create -q -f qcow2 new1 1M", "sync link folder"),
        ("create -q -f qcow2 new1 1M", "sync link move folder"),
        ("convert -f raw -O qcow2 s.raw new2", "sync link"),
        ("convert -f raw -O qcow2 s.raw new2", "sync link move folder"),
        ("convert -t writeback -f raw -O qcow2 s.raw new3", "sync link folder"),
        ("convert -t unsafe -f raw -O qcow2 s.raw new3", "link move"),
        (&format!("convert -f raw {flat} s.raw new4"), "sync sync link link"),
        // The older header goes aside, for good; its data does; the new ones come.
        (&format!("convert -f raw {flat} s.raw new4"), "sync sync move folder move link link folder gone gone folder"),
        // Another file system keeps no order with the header's.
        (apart, "sync sync link link"),
        (apart, "sync sync move folder move link sub link folder sub gone gone folder sub"),
    ];
    for (line, expected) in jobs {
        let program = crate::common::vimg_path();
        let calls = "linkat,link,unlink,unlinkat,rename,renameat,renameat2,fsync,fdatasync";
        dir.sh(&format!("strace -qq -f -y -o trace -e trace={calls} {} {line}", program.display()));
        let trace = fs::read_to_string(dir.file("trace")).unwrap();
        let folder = format!("<{}>", dir.path().display());
        let mut steps: Vec<&str> = Vec::new();
        for call in trace.lines() {
            let step = match call {
                _ if call.contains("unfinished") || call.contains("+++") || call.contains("---") => continue,
                _ if call.contains("unlink") => "gone",
                _ if call.contains("link") => "link",
                _ if call.contains("rename") => "move",
                _ if call.contains(&folder) => "folder",
                _ if call.contains("/sub>") => "sub",
                _ if call.contains("sync") => "sync",
                _ => continue,
            };
            // A driver that flushes by itself does no harm.
            if step != "sync" || steps.iter().filter(|step| **step == "sync").count() < expected.matches("sync").count()
            {
                steps.push(step);
            }
        }
        assert_eq!(steps.join(" "), expected, "{line}:\n{trace}");
    }
}

/// Where the data of an image in several files is written in place, the older header has gone for good before.
#[test]
fn an_older_header_is_off_the_disk_before_its_data_is_overwritten() {
    need("strace");
    let dir = Scratch::new();
    fs::write(dir.file("s.raw"), pattern(5, 300_000)).unwrap();
    let program = crate::common::vimg_path();
    let line = "convert -f raw -O vmdk -o subformat=monolithicFlat s.raw disk.vmdk";
    dir.sh(&format!("{} {line} && ln disk-flat.vmdk link", program.display()));
    let calls = "ftruncate,pwrite64,copy_file_range,fallocate,fsync,fdatasync";
    dir.sh(&format!("strace -qq -f -y -o trace -e trace={calls} {} {line}", program.display()));
    let trace = fs::read_to_string(dir.file("trace")).unwrap();
    let first = |is: &dyn Fn(&str) -> bool| trace.lines().position(is).unwrap_or_else(|| panic!("{trace}"));
    let cut = first(&|line| line.contains("/disk.vmdk>") && line.contains("ftruncate("));
    let synced = first(&|line| line.contains("/disk.vmdk>") && line.contains("sync("));
    let data = first(&|line| line.contains("/disk-flat.vmdk>"));
    assert!(cut < synced && synced < data, "{trace}");
}

/// A target that has to be written in place and is the source under another name: refused before anything is lost.
#[test]
fn what_is_read_is_not_written_over_under_another_name() {
    need("losetup");
    need_root("mounting a file");
    let dir = Scratch::new();
    let bytes = pattern(7, 3 << 20);
    fs::write(dir.file("a"), &bytes).unwrap();
    fs::hard_link(dir.file("a"), dir.file("hard")).unwrap();
    fs::write(dir.file("bound"), "").unwrap();
    dir.sh("mount --bind a bound");
    dir.judge(&["create", "-q", "-f", "qcow2", "-b", "a", "-F", "raw", "overlay"]);
    let losetup = |args: &str| dir.sh(&format!("PATH=$PATH:/sbin:/usr/sbin losetup {args}")).stdout.trim().to_owned();
    let device = losetup("-f --show a");
    let second = losetup(&format!("-f --show {device}"));
    let jobs = [
        "dd -f raw -O raw bs=1M if=a of=hard",
        "dd -f raw -O raw bs=1M if=a of=a",
        "dd -f raw -O raw bs=1M count=2 if=hard of=a",
        "dd -f raw -O qcow2 bs=1M if=a of=hard",
        "dd -f raw -O vdi bs=1M if=a of=bound",
        "dd -f raw -O vmdk bs=1M skip=1 if=bound of=hard",
        "dd -U -f qcow2 -O raw bs=1M if=overlay of=hard",
        "convert -U -f raw -O raw a hard",
        "convert -U -f qcow2 -O qcow2 overlay hard",
        &format!("dd -f raw -O raw bs=1M if={device} of=a"),
        &format!("dd -f raw -O raw bs=1M skip=1 if=a of={device}"),
        &format!("dd -f raw -O raw bs=1M skip=1 if={device} of={device}"),
        &format!("convert -f raw -O raw {device} a"),
        &format!("convert -U -f raw -O raw {device} hard"),
        &format!("convert -f raw -O qcow2 a {second}"),
        &format!("convert -n -f raw -O raw {second} {device}"),
        &format!("convert -n -f raw -O raw {second} a"),
    ];
    let outs = jobs.map(|line| (line.to_owned(), vimg(&line.split(' ').collect::<Vec<_>>()).dir(dir.path()).run()));
    let left = fs::read(dir.file("a")).unwrap();
    losetup(&format!("-d {second} {device}"));
    dir.sh("umount bound");
    for (line, out) in outs {
        assert_eq!(out.code, Some(1), "{line}: {out:?}");
        let said = out.stderr.contains("would be written in place") && out.stderr.contains("is the same file");
        assert!(said, "{line}: {out:?}");
    }
    assert!(left == bytes);
}

/// Nor is it what its own backing file lies in; parts of one device that do not meet are no such thing.
#[test]
fn what_an_image_stands_on_is_not_written_over() {
    need_root("loop devices and a bind mount");
    let dir = Scratch::new();
    let bytes = [pattern(3, 2 << 20), pattern(4, 2 << 20)].concat();
    fs::write(dir.file("raw"), &bytes).unwrap();
    dir.judge(&["convert", "-f", "raw", "-O", "qcow2", "raw", "base"]);
    dir.judge(&["create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", "middle"]);
    dir.judge(&["create", "-q", "-f", "qcow2", "source", "4M"]);
    for name in ["base", "raw"] {
        dir.sh(&format!(
            "ln {name} {name}.hard; ln -s {name} {name}.link; touch {name}.bound; mount --bind {name} {name}.bound"
        ));
    }
    let losetup = |args: &str| dir.sh(&format!("PATH=$PATH:/sbin:/usr/sbin losetup {args}")).stdout.trim().to_owned();
    let [low, high, all, device] = ["-o 0 --sizelimit 2M raw", "-o 2M --sizelimit 2M raw", "raw", "base"]
        .map(|args| losetup(&format!("-f --show {args}")));
    let mut refused = Vec::new();
    for end in ["", ".hard", ".link", ".bound"] {
        refused.push(format!("convert -O qcow2 -B base -F qcow2 source base{end}"));
        refused.push(format!("convert -O qed -B middle -F qcow2 source raw{end}"));
        refused.push(format!("convert -O qcow2 -B middle -F qcow2 -o data_file=raw{end} source new"));
        refused.push(format!("create -f qcow2 -b middle -F qcow2 -o data_file=raw{end} new"));
    }
    refused.push(format!("convert -O qcow2 -B {device} -F qcow2 source base"));
    refused.push(format!("rebase -u -b {device} -F qcow2 base"));
    refused.push(format!("rebase -b {device} -F qcow2 base"));
    refused.push(format!("convert -f raw -O raw {low} {all}"));
    refused.push(format!("convert -f raw -O raw {high} {all}"));
    refused.push(format!("convert -n -f qcow2 -O raw base {device}"));
    refused.push(format!("convert -n -f qcow2 -O raw middle {all}"));
    refused.push(format!("convert -n -f raw -O raw {high} {all}"));
    refused.push(format!("convert -n -f raw -O raw {high} raw"));
    let run = |line: &str| vimg(&line.split(' ').collect::<Vec<_>>()).dir(dir.path()).run();
    let outs: Vec<_> = refused.iter().map(|line| (line, run(line))).collect();
    let left = (fs::read(dir.file("raw")).unwrap(), dir.file("new").exists());
    let same = judge(&["compare", "-f", "raw", "-F", "qcow2", "raw", "base"]).dir(dir.path()).run();
    let copied = run(&format!("convert -f raw -O raw {low} {high}"));
    let after = fs::read(dir.file("raw")).unwrap();
    let fresh = pattern(5, 2 << 20);
    fs::write(dir.file("fresh"), &fresh).unwrap();
    let onto = [("fresh", low.as_str()), (&low, &high)]
        .map(|(from, to)| run(&format!("convert -n -f raw -O raw {from} {to}")));
    let after_onto = fs::read(dir.file("raw")).unwrap();
    losetup(&format!("-d {low} {high} {all} {device}"));
    dir.sh("umount base.bound raw.bound");
    for (line, out) in outs {
        assert_eq!(out.code, Some(1), "{line}: {out:?}");
        let said = ["same filename as the backing file", "is the same file", "infinite loop"];
        assert!(said.iter().any(|text| out.stderr.contains(text)), "{line}: {out:?}");
    }
    assert!(left == (bytes.clone(), false));
    assert_eq!(same.code, Some(0), "{same:?}");
    assert_eq!(copied.code, Some(0), "{copied:?}");
    assert!(after == [&bytes[..2 << 20], &bytes[..2 << 20]].concat());
    assert!(onto.iter().all(|out| out.code == Some(0)), "{onto:?}");
    assert!(after_onto == [&fresh[..], &fresh[..]].concat());
}

#[test]
fn a_resize_on_a_full_disk_names_the_file() {
    let dir = Scratch::new();
    let small = Mount::new(dir.file("small"), "-t tmpfs -o size=1m vimg-test");
    for format in ["raw", "qcow2"] {
        dir.judge(&["create", "-q", "-f", format, "small/image", "64M"]);
        let args = ["resize", "-f", format, "--preallocation=full", "small/image", "90M"];
        let out = vimg(&args).dir(dir.path()).fails(1);
        assert!(out.stderr.contains("image: "), "{format}: {out:?}");
        assert!(out.stderr.contains("No space left on device"), "{format}: {out:?}");
        fs::remove_file(small.0.join("image")).unwrap();
    }
}

/// An older file stays until the new one is whole: where that does not fit, the way in place is named.
#[test]
fn no_room_for_the_older_and_the_new_one_is_said() {
    let dir = Scratch::new();
    fs::write(dir.file("src"), pattern(3, 3 << 20)).unwrap();
    let small = Mount::new(dir.file("small"), "-t tmpfs -o size=5m vimg-test");
    fs::write(small.0.join("a"), pattern(4, 3 << 20)).unwrap();
    let args = ["convert", "--no-space-check", "-f", "raw", "-O", "raw", "src", "small/a"];
    let out = vimg(&args).dir(dir.path()).fails(1);
    assert!(out.stderr.contains("No space left on device"), "{out:?}");
    assert!(out.stderr.contains("small/a' stays until") && out.stderr.contains("-n writes"), "{out:?}");
    assert!(fs::read(small.0.join("a")).unwrap() == pattern(4, 3 << 20));
    dir.vimg(&["convert", "-n", "-f", "raw", "-O", "raw", "src", "small/a"]);
    assert!(fs::read(small.0.join("a")).unwrap() == pattern(3, 3 << 20));
}

/// One conversion to a new name keeps another one off it, from its beginning to its end.
#[test]
fn of_two_conversions_to_one_new_name_one_fails() {
    let dir = Scratch::new();
    fs::write(dir.file("src"), pattern(3, 8 << 20)).unwrap();
    let args = |rate: &'static str| ["convert", "-r", rate, "-f", "raw", "-O", "qcow2", "src", "new"];
    let theirs = {
        let mut first = judge(&args("1M")).dir(dir.path()).spawn();
        dir.sh("until [ -s new ]; do sleep 0.05; done");
        let second = judge(&["convert", "-f", "raw", "-O", "qcow2", "src", "new"]).dir(dir.path()).run();
        let _ = (first.kill(), first.wait());
        fs::remove_file(dir.file("new")).unwrap();
        second
    };
    let mut first = vimg(&args("1M")).dir(dir.path()).spawn();
    // It holds what it is going to make under no name yet.
    dir.sh(&format!("until ls -l /proc/{}/fd | grep -q deleted; do sleep 0.05; done", first.id()));
    let second = vimg(&["convert", "-f", "raw", "-O", "qcow2", "src", "new"]).dir(dir.path()).run();
    let _ = (first.kill(), first.wait());
    assert_eq!((second.code, second.stderr.replace("vimg", "qemu-img")), (Some(1), theirs.stderr));
    assert_eq!(theirs.code, Some(1));
    assert!(!dir.file("new").exists());
}

#[test]
fn a_disk_behind_a_loop_device_is_written_in_place() {
    let dir = Scratch::new();
    fs::write(dir.file("disk"), vec![7; 1 << 20]).unwrap();
    let inode = fs::metadata(dir.file("disk")).unwrap().ino();
    let device = Loop::new(&dir.file("disk"), "");
    fs::write(dir.file("src"), pattern(4, 1 << 20)).unwrap();
    dir.vimg(&["convert", "-f", "raw", "-O", "raw", "src", "disk"]);
    assert_eq!(fs::metadata(dir.file("disk")).unwrap().ino(), inode);
    dir.sh(&format!("cmp src {}", device.0.display()));
}

/// `-O host_device`: the disk goes onto the device, which is as it was but for that.
#[test]
fn a_device_in_the_place_of_the_format() {
    let dir = Scratch::new();
    fs::write(dir.file("disk"), vec![7; 1 << 20]).unwrap();
    let device = Loop::new(&dir.file("disk"), "");
    let name = device.0.to_str().unwrap();
    dir.judge(&["create", "-q", "-f", "qcow2", "large", "2M"]);
    dir.judge(&["create", "-q", "-f", "qcow2", "small", "512k"]);
    dir.qemu_io("qcow2", "small", &["write -P 1 64k 100k"]);
    let both = |args: &[&str]| {
        let [theirs, ours] = [judge(args), vimg(args)].map(|run| {
            sh(&format!("head -c 1M /dev/zero | tr '\\0' x > {name}")).ok();
            let out = run.dir(dir.path()).run();
            (out.code, out.stdout, out.stderr.replace("vimg: ", "qemu-img: "), fs::read(&device.0).unwrap())
        });
        assert!(theirs.3 == ours.3, "{args:?}");
        assert_eq!((theirs.0, theirs.1, theirs.2), (ours.0, ours.1, ours.2), "{args:?}");
        ours.3
    };
    let copied = both(&["convert", "-p", "-f", "qcow2", "-O", "host_device", "small", name]);
    assert_eq!((&copied[..64 << 10], &copied[64 << 10..][..100 << 10]), (&[0; 64 << 10][..], &[1; 100 << 10][..]));
    for args in [
        &["dd", "-f", "qcow2", "-O", "host_device", "if=small", &format!("of={name}")][..],
        &["create", "-f", "host_device", name, "1000"],
        &["create", "-f", "host_device", name, "1M"],
        &["create", "-f", "host_device", name, "2M"],
        &["create", "-f", "host_device", name],
        &["create", "-f", "host_device", &format!("host_device:{name}"), "1M"],
        &["create", "-f", "host_device", &format!("file:{name}"), "1M"],
        &["create", "-f", "file", name, "1M"],
        &["create", "-f", "host_device", "-o", "help", name],
        &["create", "-f", "host_device", "-b", "small", "-F", "qcow2", name],
        &["convert", "-f", "qcow2", "-O", "host_device", "large", name],
        &["convert", "-f", "qcow2", "-O", "file", "small", name],
        &["convert", "-c", "-f", "qcow2", "-O", "host_device", "small", name],
        &["convert", "-f", "raw", "-O", "host_device", name, name],
        &["convert", "-f", "raw", "-O", "raw", name, name],
        &["measure", "-O", "host_device", "small"],
    ] {
        both(args);
    }
    dir.sh("qemu-img resize -q small 1M");
    dir.vimg(&["convert", "--verify", "-f", "qcow2", "-O", "host_device", "small", name]);
}

/// Ended half-way, a convert leaves neither the target nor a temporary file.
#[test]
fn a_signal_takes_the_temporary_file_along() {
    need("unshare");
    need_root("hiding /proc");
    let dir = Scratch::new();
    fs::write(dir.file("src"), pattern(3, 8 << 20)).unwrap();
    let program = crate::common::vimg_path();
    let line = format!(
        "unshare -m sh -c 'mount -t tmpfs none /proc && exec {} convert -r 4k -f raw -O raw src dst' & p=$!; \
         until ls .vimg-*.tmp 2>/dev/null; do sleep 0.05; done; kill -TERM $p; wait $p; echo $?; ls -A",
        program.display()
    );
    let out = dir.sh(&line).stdout;
    let mut lines = out.lines();
    assert!(lines.next().is_some_and(|name| name.starts_with(".vimg-")), "{out}");
    assert_eq!(lines.collect::<Vec<_>>(), ["143", "src"], "{out}");
}
