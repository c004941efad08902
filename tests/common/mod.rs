//! What every test uses: scratch folders, running vimg and the judges, patterns, comparing files.
//!
//! A tool that is missing fails the test and says how to install it. Every program runs with a time limit, in
//! the C locale and in UTC.
#![allow(dead_code, unused_imports)]

pub mod files;
pub mod ftp;
pub mod inside;
pub mod journal;
pub mod run;
pub mod tftp;
pub mod trace;
pub mod web;

use std::path::{Path, PathBuf};

pub use files::{assert_same_bytes, first_difference, pattern, write_pattern};
pub use run::{Output, Run, judge, own, plain, qemu_io, sh, vimg};

/// The program under test. `VIMG` names another one, to try the tests themselves.
pub fn vimg_path() -> PathBuf {
    std::env::var_os("VIMG").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_vimg")), PathBuf::from)
}

/// A scratch folder that is removed when dropped. `VIMG_TEST_DIR` says where it is made.
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    /// A new, empty one.
    pub fn new() -> Self {
        let base = std::env::var_os("VIMG_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let dir = tempfile::Builder::new().prefix("vimg-test-").tempdir_in(base).expect("a scratch folder");
        Self { dir }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A name in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the program under test in it; it must succeed.
    pub fn vimg(&self, args: &[&str]) -> Output {
        vimg(args).dir(self.path()).ok()
    }

    /// Runs `qemu-img` in it; it must succeed.
    pub fn judge(&self, args: &[&str]) -> Output {
        judge(args).dir(self.path()).ok()
    }

    /// Runs a shell line in it, with the judge's programs; it must succeed.
    pub fn sh(&self, line: &str) -> Output {
        sh(line).dir(self.path()).ok()
    }

    /// Runs one command of `qemu-io` on an image in it; it must succeed.
    pub fn qemu_io(&self, format: &str, image: &str, commands: &[&str]) -> Output {
        qemu_io(format, image, commands).dir(self.path()).ok()
    }

    // The judges look without locking (-U): a program that another test starts right now may, for an instant, have
    // inherited an image that this process has just closed, and its lock.

    /// `qemu-img compare` finds the two equal.
    pub fn assert_same_content(&self, format_a: &str, a: &str, format_b: &str, b: &str) {
        let out = judge(&["compare", "-U", "-f", format_a, "-F", format_b, a, b]).dir(self.path()).run();
        assert_eq!(out.code, Some(0), "{a} ({format_a}) and {b} ({format_b}) differ: {out:?}");
        assert_eq!(out.stdout, "Images are identical.\n");
    }

    /// `info` shows what `qemu-img info` does.
    pub fn assert_same_info(&self, image: &str) {
        assert_eq!(self.vimg(&["info", image]).stdout, self.judge(&["info", image]).stdout);
    }

    /// `qemu-img check` finds nothing at all.
    pub fn assert_clean(&self, format: &str, image: &str) {
        let out = judge(&["check", "-U", "-f", format, image]).dir(self.path()).run();
        assert_eq!(out.code, Some(0), "check of {image}: {out:?}");
    }
}

/// Fails, naming the package, if a program is not installed.
pub fn need(program: &str) {
    let package = match program {
        "qemu-img" | "qemu-io" | "qemu-nbd" => "qemu-utils",
        "mke2fs" | "e2fsck" | "debugfs" | "lsattr" => "e2fsprogs",
        "prlimit" | "losetup" | "fallocate" | "setpriv" | "unshare" => "util-linux",
        "mount" | "umount" => "mount",
        "timeout" | "truncate" | "du" | "stat" => "coreutils",
        "7z" => "p7zip-full",
        "vmdkinfo" | "vmdkmount" => "libvmdk-utils",
        "vhdiinfo" | "vhdimount" => "libvhdi-utils",
        "qcowinfo" | "qcowmount" => "libqcow-utils",
        "mkfs.xfs" | "xfs_io" => "xfsprogs",
        "mkfs.btrfs" => "btrfs-progs",
        "uml_moo" | "uml_mkcow" => "uml-utilities",
        "mdir" | "mcopy" => "mtools",
        "fsck.fat" => "dosfstools",
        other => other,
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .any(|folder| folder.join(program).is_file());
    assert!(found, "this test needs `{program}`: apt-get install {package}");
}

/// Fails, saying so, where the test is not run by root.
pub fn need_root(what: &str) {
    let id = run::plain("id", &["-u"]).ok().stdout;
    assert_eq!(id.trim(), "0", "{what} needs root: run the tests as root (as CI does), or with sudo -E");
}
