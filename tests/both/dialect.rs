//! Where the installed qemu-img (dialect D, Debian's 10.0) words a thing as no other version does, vimg prints
//! upstream's current words (dialect N). The one table of such words; nothing else is normalised.

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
