//! Where jobs run: the disk, folders on file systems of their own, and what is made anew before each run.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a line of the shell, which must succeed.
pub fn shell(dir: &Path, line: &str) {
    assert!(try_shell(dir, line), "failed: {line} (apt-get install e2fsprogs qemu-utils)");
}

fn try_shell(dir: &Path, line: &str) -> bool {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let status = Command::new("sh").arg("-c").arg(line).current_dir(dir).env("PATH", path).status();
    status.is_ok_and(|status| status.success())
}

/// The real disk, made if it is not there.
pub fn real_disk(dir: &Path, gib: u64) -> PathBuf {
    let disk = dir.join(format!("disk-{gib}.raw"));
    if !disk.exists() {
        println!("making a {gib} GiB disk of /usr/bin and /usr/share ...");
        let name = disk.display();
        shell(
            dir,
            &format!(
                "rm -rf tree && mkdir tree && cp -a /usr/bin /usr/share tree/ && \
                 mke2fs -q -t ext4 -E root_owner=0:0 -d tree '{name}.new' {gib}G && rm -rf tree && mv '{name}.new' '{name}'"
            ),
        );
    }
    disk
}

/// A file system on a loop device, with a copy of the disk; unmounted when dropped.
pub struct FileSystem {
    pub dir: PathBuf,
    pub disk: PathBuf,
}

impl FileSystem {
    /// Makes it in the scratch folder.
    pub fn new(base: &Path, kind: &str, disk: &Path) -> Result<Self, String> {
        let dir = base.join(kind);
        let made = try_shell(
            base,
            &format!(
                "mkdir -p {kind} && truncate -s 24G {kind}.fs && mkfs.{kind} -q -f {kind}.fs && mount -o loop {kind}.fs {kind}"
            ),
        );
        if !made {
            return Err(format!("no {kind} can be mounted here"));
        }
        let system = Self { disk: dir.join("disk.raw"), dir };
        shell(base, &format!("cp --sparse=always '{}' {kind}/disk.raw && sync -f {kind}", disk.display()));
        Ok(system)
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        try_shell(Path::new("/"), &format!("umount '{0}' && rm -f '{0}.fs'", self.dir.display()));
    }
}

/// Makes an overlay over a copy of the disk, with an eighth of its size in pieces of 256 KiB, and another copy, in which
/// 64 KiB of each 16 MiB differ.
const OVERLAY: &str = "size=$(qemu-img info -f qcow2 --output=json disk.qcow2 | sed -n 's/^    \"virtual-size\": \\([0-9]*\\).*/\\1/p'); \
    [ -e made.qcow2 ] || { qemu-img create -q -f qcow2 -u -b lower.qcow2 -F qcow2 made.qcow2 $size; \
    { for k in $(seq 0 $((size / 2097152 - 1))); do echo write -P 7 $((k * 2097152)) 256k; done; } \
    | qemu-io --image-opts driver=qcow2,backing=,file.filename=made.qcow2 >/dev/null; \
    cp disk.qcow2 other.qcow2; { for k in $(seq 0 $((size / 16777216 - 1))); do echo write -P 8 $((k * 16777216 + 1048576)) 64k; done; } \
    | qemu-io -f qcow2 other.qcow2 >/dev/null; }; \
    cp --reflink=auto disk.qcow2 lower.qcow2; cp --reflink=auto made.qcow2 top.qcow2; sync lower.qcow2 top.qcow2";

/// Ends the server of [`set`].
pub fn end_server(dir: &Path) {
    if dir.join("nbd.pid").exists() {
        shell(dir, "kill $(cat nbd.pid) || true; rm -f nbd.pid nbd.sock nbd.raw");
    }
}

/// What a job changes is made anew before each of its runs.
pub fn set(dir: &Path, disk: &Path, run: &str) {
    let _ = std::fs::remove_file(dir.join("out"));
    end_server(dir);
    let serve = "qemu-nbd --fork -t -e 8 -x '' --pid-file=\"$PWD/nbd.pid\" -k \"$PWD/nbd.sock\" -f raw";
    if run.starts_with("@from ") {
        shell(dir, &format!("{serve} -r '{}'", disk.display()));
    }
    if run.starts_with("@to ") {
        shell(dir, &format!("truncate -r '{}' nbd.raw && {serve} nbd.raw", disk.display()));
    }
    // In the background once it listens.
    let serve = "nbdkit -P \"$PWD/nbd.pid\" -U \"$PWD/nbd.sock\"";
    if run.starts_with("@fromkit ") {
        shell(dir, &format!("{serve} -r file '{}'", disk.display()));
    }
    if run.starts_with("@tokit ") {
        shell(dir, &format!("truncate -r '{}' nbd.raw && {serve} file nbd.raw", disk.display()));
    }
    if run.contains("grow.qcow2") {
        shell(dir, "rm -f grow.qcow2; qemu-img create -q -f qcow2 grow.qcow2 8G");
    }
    if run.contains("new.qcow2") {
        shell(dir, "qemu-img create -q -f qcow2 new.qcow2 64M");
    }
    if run.contains("keep.qcow2") {
        shell(dir, "cp --reflink=auto disk.qcow2 keep.qcow2; qemu-img snapshot -c old keep.qcow2; sync keep.qcow2");
    }
    if run.contains("top.qcow2") {
        shell(dir, OVERLAY);
    }
}

/// Takes a file out of the page cache.
pub fn chill(dir: &Path, file: &Path) {
    shell(dir, &format!("sync '{0}' && dd if='{0}' iflag=nocache count=0 status=none", file.display()));
}
