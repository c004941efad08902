//! Chains of five layers, of mixed formats and sizes, that are written to, resized, committed, rebased, kept in
//! snapshots and watched by bitmaps, by vimg and by qemu-img, against a model in memory.

use fastrand::Rng;
use serde_json::json;

use crate::bitmaps::bitmaps;
use crate::common::{Scratch, judge, pattern, vimg};

const KIB: usize = 1 << 10;

/// An image: its name, its format, what lies below it, and what it shows.
struct Layer {
    name: String,
    format: &'static str,
    shown: Vec<u8>,
    /// It can have bitmaps.
    watched: bool,
    bitmaps: Vec<Watch>,
}

/// A bitmap of a layer.
struct Watch {
    name: String,
    enabled: bool,
    /// What the layer showed when it was cleared, if it has been enabled since.
    since: Option<Vec<u8>>,
}

/// A chain, the lowest layer first. What was between and is not any more is forgotten.
struct Model {
    layers: Vec<Layer>,
    made: usize,
}

/// Who does the work.
#[derive(Clone, Copy, PartialEq)]
enum Program {
    Vimg,
    Judge,
}

struct Run<'a> {
    scratch: &'a Scratch,
    program: Program,
    label: String,
}

impl Run<'_> {
    fn run(&self, args: &[&str]) {
        let run = if self.program == Program::Vimg { vimg(args) } else { judge(args) };
        let out = run.dir(self.scratch.path()).run();
        assert_eq!(out.code, Some(0), "{}: {out:#?}", self.label);
    }

    /// What the image shows is what the model says, as the judge reads it; and it is consistent.
    fn verify(&self, layer: &Layer, what: &str) {
        let (name, format) = (&*layer.name, layer.format);
        let what = format!("{}, {what}: {name}", self.label);
        if format != "raw" {
            let out = judge(&["check", "-q", "-f", format, name]).dir(self.scratch.path()).run();
            assert!(matches!(out.code, Some(0 | 63)), "{what}: {out:#?}");
        }
        let out = judge(&["convert", "-f", format, "-O", "raw", name, "shown"]).dir(self.scratch.path()).run();
        assert_eq!(out.code, Some(0), "{what}: {out:#?}");
        let shown = std::fs::read(self.scratch.file("shown")).expect("shown");
        let at = shown.iter().zip(&layer.shown).position(|(a, b)| a != b);
        assert!(at.is_none(), "{what}: differs at {at:?}");
        assert_eq!(shown.len(), layer.shown.len(), "{what}");
        self.verify_bitmaps(layer, &what);
    }

    /// The judge sees the bitmaps that there should be, each of which has every change since it was cleared.
    fn verify_bitmaps(&self, layer: &Layer, what: &str) {
        if !layer.watched {
            return;
        }
        let info = judge(&["info", "--output=json", "-f", "qcow2", &layer.name]).dir(self.scratch.path()).ok().json();
        let told = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        let is: Vec<_> = told.iter().map(|one| (one["name"].as_str(), one["flags"] == json!(["auto"]))).collect();
        let wanted: Vec<_> = layer.bitmaps.iter().map(|one| (Some(&*one.name), one.enabled)).collect();
        assert_eq!(is, wanted, "{what}: {told:?}");
        if layer.bitmaps.is_empty() {
            return;
        }
        let file = std::fs::read(self.scratch.file(&layer.name)).expect("image");
        for ((watch, (name, _, bits)), told) in layer.bitmaps.iter().zip(bitmaps(&file)).zip(&told) {
            let Some(since) = &watch.since else { continue };
            let granularity = usize::try_from(told["granularity"].as_u64().expect("a number")).expect("small");
            let parts = since.chunks(granularity).zip(layer.shown.chunks(granularity)).enumerate();
            for (n, (old, new)) in parts {
                let len = old.len().min(new.len());
                let is_set = bits[n / 8] & 1 << (n % 8) != 0;
                assert!(is_set || old[..len] == new[..len], "{what}: bitmap {name} lacks its part {n}");
            }
        }
    }
}

impl Model {
    fn top(&mut self) -> &mut Layer {
        self.layers.last_mut().expect("a layer")
    }

    /// Another overlay, of that format.
    fn push(&mut self, run: &Run<'_>, format: &'static str, options: &str, size: usize) {
        let name = format!("l{}", self.made);
        self.made += 1;
        let mut shown = Vec::new();
        let mut args = vec!["create", "-q", "-f", format];
        let below = self.layers.last().map(|below| (below.name.clone(), below.format));
        if let Some((below, below_format)) = &below {
            shown.clone_from(&self.layers.last().expect("below").shown);
            args.extend(["-b", below, "-F", below_format]);
        }
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        let text = size.to_string();
        args.extend([&*name, &*text]);
        run.run(&args);
        shown.resize(size, 0);
        let watched = format == "qcow2" && !options.contains("compat=0.10");
        self.layers.push(Layer { name, format, shown, watched, bitmaps: Vec::new() });
    }

    /// Adds a bitmap to the top layer, or does something with one that it has.
    fn bitmap(&mut self, run: &Run<'_>, rng: &mut Rng, step: u64) {
        let top = self.top();
        let (image, shown, count) = (&*top.name, &top.shown, top.bitmaps.len());
        let does = |args: &[&str]| run.run(&[&["bitmap", "-f", "qcow2"], args].concat());
        if count < 2 || count < 4 && rng.bool() {
            let (name, granularity) = (format!("b{step}"), (512 << rng.u32(..8)).to_string());
            does(&["--add", "-g", &granularity, image, &name]);
            top.bitmaps.push(Watch { name, enabled: true, since: Some(shown.clone()) });
            return;
        }
        let (one, other) = (rng.usize(..count), rng.usize(..count));
        let name = &*top.bitmaps[one].name;
        match rng.u32(..5) {
            0 => {
                does(&["--clear", image, name]);
                let watch = &mut top.bitmaps[one];
                watch.since = watch.enabled.then(|| shown.clone());
            }
            1 if one != other => does(&["--merge", &top.bitmaps[other].name, image, name]),
            2 => {
                does(&["--disable", image, name]);
                top.bitmaps[one].enabled = false;
                top.bitmaps[one].since = None;
            }
            3 => {
                does(&["--enable", image, name]);
                top.bitmaps[one].enabled = true;
            }
            _ => {
                does(&["--remove", image, name]);
                top.bitmaps.remove(one);
            }
        }
    }

    /// What the layer shows over another one that is shorter, or longer: its own length.
    fn write(&mut self, run: &Run<'_>, rng: &mut Rng, step: u64) {
        let top = self.top();
        let size = top.shown.len();
        let mut commands = Vec::new();
        for n in 0..3 {
            let len = rng.usize(1..=100) * 512;
            let at = rng.usize(..=(size - len) / 512) * 512;
            let zeros = rng.u32(..4) == 0;
            // qemu-io writes the same byte all along.
            let byte = if zeros { 0 } else { pattern(step * 3 + n, 1)[0].max(1) };
            top.shown[at..at + len].fill(byte);
            let command = if zeros { format!("write -z {at} {len}") } else { format!("write -P {byte} {at} {len}") };
            commands.push(command);
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        run.scratch.qemu_io(top.format, &top.name, &commands);
    }

    fn resize(&mut self, run: &Run<'_>, rng: &mut Rng) {
        let top = self.top();
        let size = rng.usize(500..1200) * KIB;
        let size = if top.format == "qed" { size.max(top.shown.len()) } else { size };
        let text = size.to_string();
        let shrink: &[&str] = if size < top.shown.len() { &["--shrink"] } else { &[] };
        run.run(&[&["resize", "-q", "-f", top.format], shrink, &[&top.name, &text]].concat());
        top.shown.resize(size, 0);
        // What is behind the end of a smaller disk is forgotten.
        for since in top.bitmaps.iter_mut().filter_map(|watch| watch.since.as_mut()) {
            since.truncate(size);
        }
    }

    /// The top layer's data moves so many layers down.
    fn commit(&mut self, run: &Run<'_>, depth: usize) {
        let (top, last) = (self.layers.len() - 1, self.layers.len() - 1 - depth);
        let (name, format) = (self.layers[top].name.clone(), self.layers[top].format);
        let base = self.layers[last].name.clone();
        match depth {
            1 => run.run(&["commit", "-q", "-f", format, &name]),
            _ => run.run(&["commit", "-q", "-f", format, "-b", &base, &name]),
        }
        let shown = self.layers[top].shown.clone();
        let below = &mut self.layers[last].shown;
        below.resize(below.len().max(shown.len()), 0);
        below[..shown.len()].copy_from_slice(&shown);
        run.verify(&self.layers[top], "the overlay after a commit");
        // The layers between show something else now.
        let layer = self.layers.pop().expect("top");
        self.layers.truncate(last + 1);
        let below = &self.layers[last];
        if depth > 1 && layer.format == "qcow2" {
            run.run(&["rebase", "-u", "-f", "qcow2", "-b", &below.name, "-F", below.format, &layer.name]);
        }
        if depth == 1 || layer.format == "qcow2" {
            self.layers.push(layer);
        }
    }

    /// The top layer goes to another one of the chain, or to an image of its own.
    fn rebase(&mut self, run: &Run<'_>, rng: &mut Rng) {
        let layer = self.layers.pop().expect("top");
        // The judge aborts at clusters that are stored in part.
        let can = run.program == Program::Vimg && layer.format.starts_with("qcow");
        let compress: &[&str] = if rng.u32(..4) == 0 && can { &["-c"] } else { &[] };
        let to = if rng.u32(..4) == 0 { 0 } else { rng.usize(..=self.layers.len()) };
        let (name, format) = match to.checked_sub(1).map(|to| &self.layers[to]) {
            Some(below) => (below.name.clone(), below.format),
            None => (String::new(), "raw"),
        };
        run.run(&[&["rebase", "-f", layer.format, "-b", &name, "-F", format], compress, &[&layer.name]].concat());
        run.verify(&layer, "the overlay after a rebase");
        self.layers.truncate(to);
        self.layers.push(layer);
    }

    /// A snapshot is taken, written over, gone back to and given up.
    fn snapshot(&mut self, run: &Run<'_>, rng: &mut Rng, step: u64) {
        let before = self.top().shown.clone();
        let name = self.top().name.clone();
        run.run(&["snapshot", "-c", "kept", &name]);
        self.write(run, rng, step);
        if rng.bool() {
            run.run(&["snapshot", "-a", "kept", &name]);
            self.top().shown = before;
        }
        run.run(&["snapshot", "-d", "kept", &name]);
    }
}

/// Formats of layers, and options.
type Kinds = &'static [(&'static str, &'static str)];

fn sequence(program: Program, kinds: Kinds, seed: u64, steps: u64) {
    let (scratch, mut rng) = (Scratch::new(), Rng::with_seed(seed));
    let run = Run { scratch: &scratch, program, label: format!("seed {seed}") };
    let mut model = Model { layers: Vec::new(), made: 0 };
    for step in 0..steps {
        while model.layers.len() < 5 {
            let (format, options) = match model.layers.len() {
                0 if kinds[0].0 != "vmdk" => ("raw", ""),
                _ => kinds[rng.usize(..kinds.len())],
            };
            model.push(&run, format, options, rng.usize(500..1200) * KIB);
            model.write(&run, &mut rng, 1000 + step);
        }
        let run = Run { scratch: &scratch, program, label: format!("seed {seed}, step {step}") };
        let qcow2 = model.top().format == "qcow2";
        match rng.u32(..13) {
            10.. if model.top().watched => model.bitmap(&run, &mut rng, step),
            0..3 => model.write(&run, &mut rng, step),
            3..5 => model.commit(&run, 1),
            5 => model.commit(&run, rng.usize(2..5)),
            6..8 if qcow2 || program == Program::Vimg => model.rebase(&run, &mut rng),
            8 if qcow2 || program == Program::Vimg => model.resize(&run, &mut rng),
            _ if qcow2 => model.snapshot(&run, &mut rng, step),
            _ => {}
        }
        if step % 10 == 9 {
            model.layers.iter().for_each(|layer| run.verify(layer, "all"));
        }
    }
}

const QCOW2: Kinds = &[("qcow2", ""), ("qcow2", "cluster_size=4k"), ("qcow2", "extended_l2=on")];
const MIXED: Kinds =
    &[("qcow2", ""), ("qcow2", "compat=0.10,cluster_size=4k"), ("qcow2", "extended_l2=on"), ("qcow", ""), ("qed", "")];
const VMDK: Kinds = &[("vmdk", ""), ("vmdk", "zeroed_grain=on"), ("vmdk", "subformat=twoGbMaxExtentSparse")];

#[test]
fn sequences_of_layers_are_as_the_model() {
    for seed in 0..3 {
        sequence(Program::Vimg, MIXED, seed, 60);
    }
    sequence(Program::Vimg, VMDK, 3, 30);
}

/// So that the model is not ours alone.
#[test]
fn sequences_of_layers_by_the_judge_are_as_the_model() {
    sequence(Program::Judge, QCOW2, 7, 40);
    sequence(Program::Vimg, QCOW2, 7, 40);
}
