//! SIGUSR1 asks a conversion how far it is: one line on standard error, in qemu-img's form.

use crate::common::{Scratch, vimg_path, write_pattern};

#[test]
fn a_conversion_says_on_sigusr1_how_far_it_is() {
    let scratch = Scratch::new();
    write_pattern(&scratch.file("disk"), 0, 1, 64 << 20);
    // Asked once it hears the signal (before, that ends it), again and again until it has answered.
    let line = format!(
        "{} convert -r 1M -f raw -O raw disk out > said 2> answer & p=$!; \
         until grep -Eq 'SigBlk:.*[2367abef]..$' /proc/$p/status; do sleep 0.01; done; \
         while [ ! -s answer ] && kill -USR1 $p; do sleep 0.05; done; kill -TERM $p; wait $p; cat said answer",
        vimg_path().display()
    );
    let out = scratch.sh(&line).stdout;
    let percent = out.strip_prefix("    (").and_then(|rest| rest.strip_suffix("/100%)\n"));
    let percent: Option<f64> = percent.and_then(|number| number.parse().ok());
    assert!(percent.is_some_and(|percent| (0.0..100.0).contains(&percent)), "{out:?}");
}
