//! What `generate` makes for packages: completions of shells, and manual pages.

use std::fs;

use crate::common::{Scratch, own, plain, vimg};

/// Packages get completions and manual pages from the tables that the program itself goes by.
#[test]
fn completions_and_pages_are_made() {
    let scratch = Scratch::new();
    own(&["generate", "out"]).dir(scratch.path()).ok();
    for file in ["_vimg", "vimg.fish"] {
        let text = fs::read_to_string(scratch.file("out/completions").join(file)).unwrap();
        for word in ["checksum", "cluster_size", "leaks", "blake3-tree", "falloc", "writethrough"] {
            assert!(text.contains(word), "{file}: {word}");
        }
    }
    let page = |name: &str| fs::read_to_string(scratch.file("out/man").join(name)).unwrap();
    let convert = page("vimg-convert.1");
    assert!(convert.contains(".TH") && convert.contains("vimg convert \\-p"), "{convert}");
    assert_eq!(fs::read_dir(scratch.file("out/man")).unwrap().count(), 18);
    assert!(!page("vimg.1").contains("generate"));
    // It is a tool of packagers: help does not list it, and qemu-img has none.
    assert!(!own(&["--help"]).ok().stdout.contains("generate"));
    assert!(vimg(&["generate", "out"]).dir(scratch.path()).fails(1).stderr.contains("Command not found"));
}

/// What bash makes of each line, whose last word is completed.
fn completed(scratch: &Scratch, lines: &[&str]) -> Vec<String> {
    let script = r#"
source out/completions/vimg
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    _vimg vimg '' ''
    echo "${COMPREPLY[*]}"
done
"#;
    let args: Vec<&str> = ["-c", script, "bash"].into_iter().chain(lines.iter().copied()).collect();
    let out = plain("bash", &args).dir(scratch.path()).ok();
    assert_eq!(out.stderr, "");
    out.stdout.lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_what_there_is() {
    let scratch = Scratch::new();
    own(&["generate", "out"]).dir(scratch.path()).ok();
    let cases = [
        ("vimg comp", "compare"),
        ("vimg help check", "check checksum"),
        ("vimg --untrusted --allow x res", "resize"),
        ("vimg convert --ver", "--verify"),
        // The name of a file is left to the shell.
        ("vimg info ", ""),
        ("vimg convert --passphrase-file ", ""),
        ("vimg convert -O q", "qcow qcow2 qed"),
        ("vimg convert -pO vm", "vmdk"),
        ("vimg convert -pOvm", "-pOvmdk"),
        ("vimg info -f clo", "cloop"),
        // Formats alone.
        ("vimg info -f q", "qcow qcow2 qed"),
        ("vimg convert -f az", ""),
        ("vimg dd ", "if= of= bs= count= skip="),
        ("vimg dd -f raw bs=1k c", "count="),
        ("vimg dd if=", ""),
        ("vimg create -f clo", ""),
        ("vimg convert -t w", "writeback writethrough"),
        ("vimg check -T n", "none"),
        ("vimg check -r ", "leaks all"),
        ("vimg convert --digest b", "blake3 blake3-tree"),
        ("vimg checksum --digest=s", "sha256"),
        ("vimg convert --progress=js", "json json:"),
        // It takes none but behind '='.
        ("vimg convert --progress js", ""),
        ("vimg resize --preallocation f", "falloc full"),
        ("vimg create --output=", "human json"),
        // Keys are those of the format, and values those of the key.
        ("vimg create -f qcow2 -o cluster_", "cluster_size="),
        ("vimg create -f vpc -o cluster_", ""),
        ("vimg create -o cluster_", "cluster_size="),
        ("vimg create -f qcow2 -o cluster_size=64k,pre", "64k,preallocation="),
        ("vimg create -f qcow2 -o cluster_size=64k,preallocation=", "off metadata falloc full"),
        ("vimg create -f raw -o preallocation=", "off falloc full"),
        ("vimg create -o subformat=s", "streamOptimized"),
        ("vimg create -f vhdx -o subformat=", "dynamic fixed"),
        ("vimg create -f qcow2 -o lazy_refcounts=", "on off"),
        ("vimg create -f qcow2 -o encrypt.cipher-alg=serpent", "serpent-128 serpent-192 serpent-256"),
        ("vimg create -f qcow2 -o compression_l", ""),
        ("vimg convert -Oqcow2 -o compression_l", "compression_level="),
        ("vimg convert --target-format=qcow2 -o compression_type=z", "zlib zstd"),
        ("vimg measure -O luks -o iv", "ivgen-alg= ivgen-hash-alg="),
        ("vimg amend -f luks -o state=", "active inactive"),
        ("vimg amend -o comp", "compat="),
    ];
    let lines = cases.map(|(line, _)| line);
    let found = completed(&scratch, &lines);
    for ((line, wanted), found) in cases.into_iter().zip(found) {
        assert_eq!(found, wanted, "{line}");
    }
}
