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
    // What may be given is said in a line, not in a list of one word a paragraph.
    assert!(convert.contains("one of: bochs, cloop,") && !convert.contains("Possible values"), "{convert}");
    let whole = page("vimg.1");
    assert!(whole.contains("[options] COMMAND [command options]") && !whole.contains("generate"), "{whole}");
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

/// Where no file would do, bash offers none.
#[test]
fn bash_offers_no_file_where_none_would_do() {
    let scratch = Scratch::new();
    own(&["generate", "out"]).dir(scratch.path()).ok();
    let script = r#"
compopt() { echo "$*"; }
source out/completions/vimg
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    echo "$line|$(_vimg vimg '' '')"
done
"#;
    let none = [
        "convert -m ",
        "convert -l ",
        "create --uuid=",
        "convert -r ",
        "convert -O x",
        "snapshot -d ",
        "check -r x",
        // Sizes.
        "create a ",
        "create -f qcow2 -o cluster_size=4k a 1",
        "create -qf qcow2 -b b -F raw a ",
        "--untrusted resize -f raw a ",
        "resize a +1",
    ];
    let files = [
        "convert ",
        "convert --passphrase-file ",
        "convert -B ",
        "info ",
        "create ",
        "create -f qcow2 -b ",
        "create -f qcow2 -b b ",
        "resize ",
        "resize -f raw ",
        "convert a ",
        "compare a ",
    ];
    let lines: Vec<String> = none.iter().chain(&files).map(|line| format!("vimg {line}")).collect();
    let args: Vec<&str> = ["-c", script, "bash"].into_iter().chain(lines.iter().map(String::as_str)).collect();
    let out = plain("bash", &args).dir(scratch.path()).ok();
    for (line, wanted) in none.map(|line| (line, true)).into_iter().chain(files.map(|line| (line, false))) {
        let says = |what: &str| out.stdout.lines().any(|said| said == format!("vimg {line}|{what}"));
        assert!(says(if wanted { "+o default +o bashdefault" } else { "" }), "{line}: {}", out.stdout);
    }
}

/// What every shell completes: a line, the first of what it is completed by, and what is not among it.
const EVERYWHERE: [(&str, &[&str], &str); 17] = [
    ("vimg comp", &["compare"], "commit"),
    ("vimg convert --ver", &["--verify"], "--compress"),
    ("vimg convert -O q", &["qcow", "qcow2", "qed"], "vmdk"),
    ("vimg info -f clo", &["cloop"], "qcow"),
    ("vimg create -f clo", &[], "cloop"),
    ("vimg convert -t w", &["writeback", "writethrough"], "none"),
    ("vimg convert --digest b", &["blake3", "blake3-tree"], "sha256"),
    ("vimg dd ", &["if=", "of=", "bs=", "count=", "skip="], "if"),
    ("vimg dd -f raw bs=1k if=fil", &["file"], "other"),
    ("vimg create -f qcow2 -o cluster_", &["cluster_size="], "compat="),
    ("vimg create -f vpc -o cluster_", &[], "cluster_size="),
    ("vimg create -f qcow2 -o cluster_size=64k,prealloc", &["preallocation="], "cluster_size="),
    ("vimg create -f qcow2 -o cluster_size=64k,preallocation=f", &["falloc", "full"], "off"),
    ("vimg convert -O vhdx -o subformat=", &["dynamic", "fixed"], "streamOptimized"),
    ("vimg convert -m f", &[], "file"),
    ("vimg measure -f raw -O luks -o iv", &["ivgen-alg=", "ivgen-hash-alg="], "size="),
    ("vimg amend -f luks -o state=", &["active", "inactive"], "on"),
];

/// What a shell offers for each line, as it would be inserted or shown, against what it should.
fn assert_offers(offers: &[Vec<String>]) {
    assert_eq!(offers.len(), EVERYWHERE.len());
    for ((line, wanted, not), offers) in EVERYWHERE.iter().zip(offers) {
        // Of a word that is partly there, all or the end is offered.
        let is = |word: &str, offer: &str| {
            offer == word || offer.ends_with(&format!("={word}")) || offer.ends_with(&format!(",{word}"))
        };
        for word in *wanted {
            let bare = word.trim_end_matches('=');
            assert!(offers.iter().any(|offer| is(word, offer) || is(bare, offer)), "{line}: {offers:?}");
        }
        assert!(!offers.iter().any(|offer| is(not, offer)), "{line}: {offers:?}");
        assert!(!wanted.is_empty() || offers.is_empty(), "{line}: {offers:?}");
    }
}

#[test]
fn fish_completes_what_there_is() {
    let scratch = Scratch::new();
    own(&["generate", "out"]).dir(scratch.path()).ok();
    std::fs::write(scratch.file("file"), "").unwrap();
    let script = "source out/completions/vimg.fish; for line in $argv; complete -C $line; echo END; end";
    let args: Vec<&str> = ["--no-config", "-c", script].into_iter().chain(EVERYWHERE.map(|(line, ..)| line)).collect();
    let out = plain("fish", &args).dir(scratch.path()).env("HOME", scratch.path().to_str().unwrap()).ok();
    assert_eq!(out.stderr, "");
    let mut offers = vec![Vec::new()];
    for line in out.stdout.lines() {
        match line {
            "END" => offers.push(Vec::new()),
            // A description follows.
            line => offers.last_mut().unwrap().extend(line.split('\t').next().map(str::to_owned)),
        }
    }
    offers.pop();
    assert_offers(&offers);
}

/// On a terminal of its own: a widget completes each line, and writes down what is added as it is.
#[test]
fn zsh_completes_what_there_is() {
    let scratch = Scratch::new();
    own(&["generate", "out"]).dir(scratch.path()).ok();
    std::fs::write(scratch.file("file"), "").unwrap();
    let inner = r#"
fpath=($PWD/out/completions $fpath)
autoload -Uz compinit && compinit -u -D
compadd() {
    local -a offered
    if [[ " $* " != *\ -[AOD]\ * ]]; then
        builtin compadd -O offered "$@"
        (( $#offered )) && print -rl -- $offered >>offers
    fi
    builtin compadd "$@"
}
all-lines() {
    local line
    for line in "${(@f)$(<lines)}"; do
        BUFFER=$line CURSOR=$#line
        zle complete-word-noted
        print END >>offers
    done
    exit
}
zle -C complete-word-noted complete-word _main_complete
zle -N all-lines
bindkey '^X' all-lines
print READY
"#;
    let outer = r#"
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z 'source ./inner'
zpty -r z said '*READY*'
zpty -n -w z $'\x18'
while zpty -r z said; do :; done
"#;
    std::fs::write(scratch.file("inner"), inner).unwrap();
    std::fs::write(scratch.file("lines"), EVERYWHERE.map(|(line, ..)| line).join("\n")).unwrap();
    plain("zsh", &["-f", "-c", outer]).dir(scratch.path()).ok();
    let text = std::fs::read_to_string(scratch.file("offers")).unwrap();
    let offers: Vec<Vec<String>> =
        text.split("END\n").map(|offers| offers.lines().map(str::to_owned).collect()).collect();
    assert_offers(&offers[..offers.len() - 1]);
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
