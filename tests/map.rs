//! `map` of random chains, and what it costs.

use std::fmt::Write;

use fastrand::Rng;

use crate::common::{Scratch, judge, vimg};

const MIB: u64 = 1 << 20;

/// Shell lines that make a layer `name`, perhaps over `below`: its format.
fn layer(rng: &mut Rng, line: &mut String, name: &str, below: Option<(&str, &str)>) -> &'static str {
    let size = [2 * MIB, 3 * MIB + 512 * rng.u64(0..2048), 5 * MIB][rng.usize(0..3)];
    let format = match below {
        Some(_) => ["qcow2", "qcow2", "qcow2", "qcow"][rng.usize(0..4)],
        None => ["raw", "raw", "qcow2", "qcow2", "qcow", "vmdk", "vdi", "vpc"][rng.usize(0..8)],
    };
    let mut options = Vec::new();
    let (mut unit, mut compressed) = (4096, false);
    match format {
        "qcow2" => {
            let (bits, extended) = [(9, false), (12, false), (16, false), (16, true), (14, true)][rng.usize(0..5)];
            unit = 1 << bits;
            options.push(format!("cluster_size={unit}"));
            if extended {
                options.push("extended_l2=on".to_owned());
            } else if rng.u8(0..4) == 0 {
                options.push("compat=0.10".to_owned());
            }
            match rng.u8(0..6) {
                0 if below.is_none() => options.push("preallocation=metadata".to_owned()),
                1 if !options.contains(&"compat=0.10".to_owned()) => options.push(format!("data_file={name}.data")),
                _ => compressed = true,
            }
        }
        "vmdk" => options.push(format!("subformat={}", ["monolithicSparse", "monolithicFlat"][rng.usize(0..2)])),
        "vdi" => options.push(format!("static={}", ["on", "off"][rng.usize(0..2)])),
        // A fixed one below a qcow, which does not keep its backing file's format, is raw to the judge.
        "vpc" => options.push("force_size=on".to_owned()),
        _ => {}
    }
    let options = if options.is_empty() { String::new() } else { format!("-o {}", options.join(",")) };
    let backing = below.map_or_else(String::new, |(name, format)| format!("-b {name} -F {format}"));
    writeln!(line, "qemu-img create -q -f {format} {options} {backing} {name} {size}").unwrap();
    write!(line, "qemu-io -f {format}").unwrap();
    for _ in 0..rng.u8(1..7) {
        let at = rng.u64(0..size - 512) / 512 * 512;
        let len = (512 * rng.u64(1..300)).min(size - at);
        let (at, len, what) = match rng.u8(0..8) {
            0 if compressed && at / unit * unit + unit <= size => (at / unit * unit, unit, "write -c"),
            1 => (at, len, "write -z"),
            2 => (at, len, "write -zu"),
            3 if format != "vmdk" => (at, len, "discard"),
            _ => (at, len, "write -P 7"),
        };
        write!(line, " -c '{what} {at} {len}'").unwrap();
    }
    // Not every image takes everything.
    writeln!(line, " {name} >/dev/null || true").unwrap();
    if format == "raw" && rng.bool() {
        writeln!(line, "truncate -s +{} {name}", rng.u64(0..100_000)).unwrap();
    }
    format
}

#[test]
fn random_chains_are_mapped_as_by_the_judge() {
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                let mut rng = Rng::with_seed(seed);
                for _ in 0..50 {
                    map_one(&mut rng);
                }
            });
        }
    });
}

fn map_one(rng: &mut Rng) {
    let scratch = Scratch::new();
    let mut line = "set -e\n".to_owned();
    let mut below: Option<(String, &str)> = None;
    for depth in 0..rng.u8(1..4) {
        let name = format!("layer{depth}");
        let format = layer(rng, &mut line, &name, below.as_ref().map(|(name, format)| (name.as_str(), *format)));
        below = Some((name, format));
    }
    scratch.sh(&line);
    let (name, format) = below.unwrap();
    let part = [rng.u64(0..4 * MIB).to_string(), rng.u64(0..4 * MIB).to_string()];
    for range in [&[][..], &["-s", &part[0], "-l", &part[1]]] {
        for form in ["human", "json"] {
            let mut args = vec!["map", "-U", "-f", format, "--output", form];
            args.extend(range);
            args.push(&name);
            let theirs = judge(&args).dir(scratch.path()).run();
            let ours = vimg(&args).dir(scratch.path()).run();
            assert_eq!((ours.code, &ours.stdout), (theirs.code, &theirs.stdout), "{args:?}\n{line}{}", ours.stderr);
        }
    }
}

#[test]
fn a_chain_of_thirty_overlays_is_mapped_as_by_the_judge() {
    let scratch = Scratch::new();
    let mut line = "set -e\nqemu-img create -q -f qcow2 l0 64M\nqemu-io -f qcow2".to_owned();
    for n in 0..500 {
        write!(line, " -c 'write {} 64k'", n * (128 << 10)).unwrap();
    }
    writeln!(line, " l0 >/dev/null").unwrap();
    for n in 1..31 {
        let below = n - 1;
        writeln!(line, "qemu-img create -q -f qcow2 -b l{below} -F qcow2 l{n}").unwrap();
        write!(line, "qemu-io -f qcow2").unwrap();
        for k in 0..8 {
            write!(line, " -c 'write {} 64k'", (n * 37 + k * 211) % 1000 * (64 << 10)).unwrap();
        }
        writeln!(line, " l{n} >/dev/null").unwrap();
    }
    scratch.sh(&line);
    for args in [["map", "--output=json", "l30"], ["map", "--output=human", "l30"]] {
        assert_eq!(scratch.vimg(&args).stdout, scratch.judge(&args).stdout);
    }
}
