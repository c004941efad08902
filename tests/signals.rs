//! SIGUSR1 asks a conversion how far it is: one line on standard error, as qemu-img answers.

use crate::common::{Scratch, vimg_path, write_pattern};

#[test]
fn a_conversion_says_on_sigusr1_how_far_it_is() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk"), 0, 1, 64 << 20);
    for program in [vimg_path(), "qemu-img".into()] {
        // Asked once it hears the signal (before, that ends it), again and again until it has answered.
        let (program, source) = (program.display(), if program.ends_with("qemu-img") { "small" } else { "disk" });
        let line = format!(
            "head -c 1M disk > small; {program} convert -r 1M -f raw -O raw {source} out > said 2> answer & p=$!; \
             until grep -Eq 'Sig(Blk|Cgt):.*[2367abef]..$' /proc/$p/status; do sleep 0.01; done; \
             while [ ! -s answer ] && kill -USR1 $p 2>/dev/null; do sleep 0.05; done; \
             kill -TERM $p 2>/dev/null; wait $p; cat said; cat answer"
        );
        let out = scratch.sh(&line).stdout;
        let percent = out.strip_prefix("    (").and_then(|rest| rest.strip_suffix("/100%)\n"));
        let percent: Option<f64> = percent.and_then(|number| number.parse().ok());
        assert!(percent.is_some_and(|percent| (0.0..=100.0).contains(&percent)), "{program}: {out:?}");
    }
}
