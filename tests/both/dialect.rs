//! Where the installed qemu-img (dialect D, Debian's 10.0) words a thing as no other version does, vimg prints
//! upstream's current words (dialect N). The one table of such words; nothing else is normalised.

use crate::common::run::vimg;

/// D's words and N's.
const WORDS: &[(&str, &str)] = &[
    (" --help' for more info\n", " --help' for more information\n"),
    ("--output expects 'human' or 'json' not '", "--output expects 'human' or 'json', not '"),
];

/// Texts of the installed program as current upstream words them.
pub fn normalise(text: &str) -> String {
    let mut text = text.to_owned();
    for (old, new) in WORDS {
        text = text.replace(old, new);
    }
    // Number errors: `Invalid image size specified: 'x'.` lost its period.
    let lines = text.split_inclusive('\n').map(|line| match line.strip_suffix("'.\n") {
        Some(head) if head.contains(": Invalid ") && head.contains(" specified: '") => format!("{head}'\n"),
        _ => line.to_owned(),
    });
    lines.collect()
}

/// Every option of every dialect (up to 11): a subcommand, its letters, its long names; a colon takes a value.
const OPTIONS: &[(&str, &str, &str)] = &[
    ("amend", "ho:f:t:pq", "help object: image-opts force quiet progress format: cache: options:"),
    (
        "bench",
        "hc:d:f:ni:o:qs:S:t:wU",
        "help flush-interval: image-opts pattern: no-drain force-share format: cache: count: depth: offset: \
         buffer-size: step-size: aio: native write object: quiet",
    ),
    (
        "bitmap",
        "b:f:F:g:h",
        "help object: image-opts add remove clear enable disable merge: granularity: source-file: source-format: format:",
    ),
    ("check", "hf:r:T:qU", "help format: repair: output: object: image-opts force-share quiet cache:"),
    ("commit", "f:ht:b:dpqr:", "help object: image-opts quiet format: cache: drop base: progress rate: rate-limit:"),
    (
        "compare",
        "hf:F:T:pqsU",
        "help object: image-opts force-share quiet cache: a-format: b-format: left-format: right-format: strict progress",
    ),
    (
        "convert",
        "hf:O:B:b:CcF:o:l:S:pt:T:qnm:WUr:",
        "help object: image-opts force-share target-image-opts salvage target-is-zero bitmaps skip-broken-bitmaps \
         quiet source-image-opts source-format: source-cache: snapshot: sparse-size: output-format: options: \
         output-cache: backing: backing-format: rate: rate-limit: parallel: oob-writes copy-range-offloading \
         target-format: target-format-options: target-cache: no-create progress",
    ),
    ("create", "F:B:b:f:ho:qu", "help object: quiet format: backing: backing-format: backing-unsafe options:"),
    ("dd", "hf:O:U", "help format: output-format: object: image-opts force-share"),
    ("info", "f:hUbt:", "help format: output: backing-chain object: image-opts force-share cache:"),
    ("map", "f:s:l:hU", "help format: output: object: image-opts force-share start-offset: max-length:"),
    (
        "measure",
        "hf:O:o:l:Us:",
        "help image-opts object: output: size: force-share target-format: format: options: snapshot: source-format: \
         source-image-opts target-format-options:",
    ),
    (
        "rebase",
        "hf:F:B:b:upt:T:qUc",
        "help object: image-opts force-share compress quiet progress format: cache: backing: backing-format: \
         backing-cache: backing-unsafe",
    ),
    ("resize", "f:hq", "help object: image-opts preallocation: shrink quiet format:"),
    ("snapshot", "la:c:d:hqUf:", "help object: image-opts force-share quiet format: list apply: create: delete:"),
];

#[test]
fn the_options_of_all_dialects_are_taken() {
    let refusal = |command: &str, word: &str| vimg(&[command, word]).run().stderr;
    for (command, letters, names) in OPTIONS {
        for name in names.split(' ') {
            // A bad use of an option shows that it is known, and whether it takes a value.
            let (word, text) = match name.strip_suffix(':') {
                Some(name) => (format!("--{name}"), format!("option '--{name}' requires an argument")),
                None => (format!("--{name}=x"), format!("option '--{name}' doesn't allow an argument")),
            };
            let said = refusal(command, &word);
            assert!(said.contains(&text), "{command} {word}: {said}");
        }
        assert_eq!(vimg(&[command, "-h"]).run().code, Some(0), "{command} -h");
        for (at, letter) in letters.char_indices().filter(|(_, letter)| !matches!(letter, ':' | 'h')) {
            let (word, text) = match letters[at + 1..].starts_with(':') {
                true => (format!("-{letter}"), format!("option requires an argument -- '{letter}'")),
                false => (format!("-{letter}?"), "invalid option -- '?'".to_owned()),
            };
            let said = refusal(command, &word);
            assert!(said.contains(&text), "{command} {word}: {said}");
        }
    }
}
