//! qcow2 images damaged on purpose, checked and mended by vimg and by qemu-img: what they find, what they print, and
//! what they leave behind.
//!
//! `VIMG_CORRUPTIONS` says how many random damages are tried, `VIMG_CORRUPTIONS_FROM` the first seed.

mod compared;
mod damage;

use std::collections::HashSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use vimg::block::{Fix, Purpose, format};
use vimg::formats::FORMATS;
use vimg::storage::Storage;
use vimg::storage::fault::{Fault, Faulty};
use vimg::storage::memory::Memory;

use crate::common::inside::open_for;
use crate::common::run::{self, vimg_within_memory};
use crate::common::{Output, Scratch, judge};
use compared::{check, compare};
use damage::{BASES, Damaged, Tables};

/// Mends an image in a storage; whether that went well, and what was told.
fn mend(storage: Arc<dyn Storage>, fix: Fix) -> (bool, Vec<String>) {
    let told = Mutex::new(Vec::new());
    let qcow2 = format::find(FORMATS, "qcow2").unwrap();
    let done = open_for(storage, qcow2, Purpose::Repair).and_then(|node| {
        let hear = |line: &str| told.lock().unwrap().push(line.to_owned());
        node.driver().checking().unwrap().check(fix, &hear)
    });
    let done = done.is_ok_and(|report| (report.corruptions, report.check_errors) == (0, 0));
    (done, told.into_inner().unwrap())
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Whatever is damaged, both find the same, in the same words, and mend the same; or a row of `compared::DIFFERENCES` says why
/// not. What vimg calls mended qemu-img finds clean, and the guest's data is the same.
#[test]
fn random_damage_is_found_and_mended_as_by_qemu_img() {
    let scratch = Scratch::new();
    damage::make_bases(&scratch);
    let (first, count) = (number("VIMG_CORRUPTIONS_FROM", 1), number("VIMG_CORRUPTIONS", 44));
    let next = AtomicU64::new(first);
    let (failures, excused, beside) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()), Mutex::new(()));
    thread::scope(|scope| {
        for worker in 0..2 {
            let (scratch, next, failures, excused, beside) = (&scratch, &next, &failures, &excused, &beside);
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        break;
                    }
                    let damaged = Damaged::random(scratch, seed);
                    // One of these at a time: they lock the same data file.
                    let _alone = damaged.beside.then(|| beside.lock().unwrap());
                    match compare(scratch, &damaged, &format!("image{worker}")) {
                        Ok(None) => {}
                        Ok(Some(why)) => excused.lock().unwrap().push((why, seed)),
                        Err(what) => {
                            failures.lock().unwrap().push(format!("## seed {seed}: {}\n{what}", damaged.what));
                        }
                    }
                }
            });
        }
    });
    let (failures, excused) = (failures.into_inner().unwrap(), excused.into_inner().unwrap());
    let reasons: HashSet<&str> = excused.iter().map(|(why, _)| *why).collect();
    for why in reasons {
        let seeds: Vec<u64> = excused.iter().filter(|(other, _)| *other == why).map(|(_, seed)| *seed).collect();
        println!("{}: {why} {:?}", seeds.len(), &seeds[..seeds.len().min(10)]);
    }
    assert!((excused.len() as u64) <= count / 2, "{} of {count} differ", excused.len());
    assert!(failures.is_empty(), "{} of {count}:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn leaked_clusters_are_given_back_to_the_host_as_by_qemu_img() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 image 4M; qemu-io -c 'write -P 1 0 4M' image");
    let mut bytes = fs::read(scratch.file("image")).unwrap();
    let l2 = damage::get(&bytes, damage::get(&bytes, 40, 8), 8) & 0x00ff_ffff_ffff_fe00;
    // In the middle and at the end.
    for cluster in (20..24).chain(60..64) {
        damage::put(&mut bytes, l2 + 8 * cluster, 8, 0);
    }
    for fix in ["leaks", "all"] {
        let map = |ours: bool| {
            fs::write(scratch.file("image"), &bytes).unwrap();
            assert_eq!(check(ours, &scratch, "image", Some(fix)).code, Some(0));
            scratch.judge(&["map", "-f", "raw", "--output=json", "image"]).stdout
        };
        let (ours, theirs) = (map(true), map(false));
        assert_eq!(theirs.matches("\"data\": false").count(), 2, "{theirs}");
        assert_eq!(ours, theirs, "-r {fix}");
    }
}

/// One whose entries lead past the end of the file is counted nowhere. qemu-img empties it.
#[test]
fn a_snapshot_table_taken_for_leaked_keeps_its_bytes() {
    let scratch = Scratch::new();
    damage::make_bases(&scratch);
    for seed in [10242, 10440] {
        let damaged = Damaged::random(&scratch, seed);
        let found = compare(&scratch, &damaged, "image");
        assert!(found.as_ref().is_ok_and(Option::is_some), "seed {seed}: {}: {found:?}", damaged.what);
        let table = usize::try_from(u64::from_be_bytes(damaged.bytes[64..72].try_into().unwrap())).unwrap();
        fs::write(scratch.file("image"), &damaged.bytes).unwrap();
        check(true, &scratch, "image", Some("leaks"));
        let after = fs::read(scratch.file("image")).unwrap();
        assert_eq!(after[table..table + 64], damaged.bytes[table..table + 64], "seed {seed}");
    }
}

/// A table whose own refcount cannot be read is passed over where marks are compared.
#[test]
fn tables_without_a_readable_refcount_are_passed_over_as_by_qemu_img() {
    let scratch = Scratch::new();
    damage::make_bases(&scratch);
    for seed in [1239, 10413, 20097] {
        let damaged = Damaged::random(&scratch, seed);
        let found = compare(&scratch, &damaged, "image");
        assert!(found.is_ok(), "seed {seed}: {}: {found:?}", damaged.what);
    }
}

/// Its snapshot table goes where room became free in the file: behind the end, it would make up for what is missing.
/// Where there is none, it stays.
#[test]
fn the_snapshot_table_of_a_truncated_image_is_mended_within_it() {
    let scratch = Scratch::new();
    damage::make_bases(&scratch);
    for seed in [1758, 2076] {
        let damaged = Damaged::random(&scratch, seed);
        let found = compare(&scratch, &damaged, "image");
        assert!(matches!(found, Ok(None)), "seed {seed}: {}: {found:?}", damaged.what);
    }
    // A name that is said to be so long that it takes the rest of the table; and the last cluster is missing.
    let mut bytes = fs::read(scratch.file("s4096")).unwrap();
    let (table, len) = (damage::get(&bytes, 64, 8), bytes.len() - 4096);
    damage::put(&mut bytes, table + 14, 2, 100);
    bytes.truncate(len);
    fs::write(scratch.file("image"), &bytes).unwrap();
    let out = check(true, &scratch, "image", Some("all"));
    assert!(out.code == Some(2) && out.stderr.contains("exceeding the end of the file"), "{out:?}");
    assert!(fs::metadata(scratch.file("image")).unwrap().len() <= len as u64);
    run::vimg(&["convert", "-f", "qcow2", "-O", "raw", "image", "o"]).dir(scratch.path()).fails(1);
}

/// Where its refcounts have to be written anew, they go into room within the file, or stay as they are: behind the end
/// they would make up for what is missing, be that data, a table or the rest of one.
#[test]
fn new_refcounts_of_a_truncated_image_do_not_make_up_for_what_is_missing() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 -o cluster_size=4k data 4M; qemu-io -c 'write -P 1 0 64k' data
         qemu-img create -q -f qcow2 -o cluster_size=4k room 4M; qemu-io -c 'write -P 1 0 64k' -c 'discard 0 16k' room
         qemu-img create -q -f qcow2 -o cluster_size=4k table 4M; qemu-io -c 'write -z 0 64k' table
         qemu-img create -q -f qcow2 -o cluster_size=4k snapshot 4M; qemu-io -c 'write -P 1 0 64k' snapshot
         qemu-img snapshot -c s snapshot; qemu-io -c 'discard 0 64k' snapshot");
    for (name, cut, renewed) in
        [("data", 8192, false), ("room", 8192, true), ("table", 1000, false), ("snapshot", 4096, false)]
    {
        let whole = fs::read(scratch.file(name)).unwrap();
        let tables = Tables::of(&whole);
        let len = whole.len() - cut;
        // A cluster in use without a refcount, the L1 table's; and a refcount table whose second entry cannot be one.
        let unused = damage::get(&whole, 48, 8) + 8;
        for (at, width, value) in [(tables.refcount(tables.l1 >> 12), 2, 0), (unused, 8, 1)] {
            let mut bytes = whole.clone();
            damage::put(&mut bytes, at, width, value);
            bytes.truncate(len);
            fs::write(scratch.file("i"), &bytes).unwrap();
            let what = format!("{name}: {value} at {at}");
            let found = |out: &Output| out.stderr.matches("end of the file").count();
            let before = found(&check(true, &scratch, "i", None));
            assert!(before > 0, "{what}");
            for _ in 0..2 {
                let out = check(true, &scratch, "i", Some("all"));
                assert_eq!(out.code, Some(2), "{what}: {out:?}");
                let after = check(true, &scratch, "i", None);
                assert_eq!((after.code, found(&after)), (Some(2), before), "{what}: {after:?}");
                assert_eq!(fs::metadata(scratch.file("i")).unwrap().len(), len as u64, "{what}");
            }
            let now = fs::read(scratch.file("i")).unwrap();
            assert_eq!(damage::get(&now, 48, 8) != damage::get(&bytes, 48, 8), renewed, "{what}");
            assert!(renewed || width == 2 || now == bytes, "{what}");
        }
    }
}

/// A snapshot table that is said to reach into what follows it, and is written anew: what it reached into is used
/// once from then on, and marked so, after one run.
#[test]
fn one_run_mends_a_snapshot_table_that_reaches_too_far() {
    let scratch = Scratch::new();
    damage::make_bases(&scratch);
    for base in ["s512", "s4096"] {
        for (at, width, value) in [(36, 4, 15), (36, 4, 20), (12, 2, 9), (12, 2, 12), (14, 2, 13), (36, 4, 30)] {
            let mut bytes = fs::read(scratch.file(base)).unwrap();
            let table = damage::get(&bytes, 64, 8);
            damage::put(&mut bytes, table + at, width, value);
            fs::write(scratch.file("image"), &bytes).unwrap();
            let what = format!("{base}: {value} at {at}");
            let first = check(true, &scratch, "image", Some("all"));
            let second = check(true, &scratch, "image", Some("all"));
            // What is wrong with the snapshots themselves stays.
            assert!(matches!(first.code, Some(0 | 2)) && first.code == second.code, "{what}: {first:?}\n{second:?}");
            assert!(!second.stderr.contains("Leaked") && !second.stderr.contains("Repairing"), "{what}: {second:?}");
        }
    }
}

/// What is said to be a snapshot table may be another table, which stays what it is.
#[test]
fn a_snapshot_table_said_to_lie_in_another_table_is_written_elsewhere() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 base 4M; qemu-io -c 'write -P 1 0 1M' base; qemu-img snapshot -c a base
         qemu-img snapshot -c b base; qemu-io -c 'write -P 2 64k 256k' base");
    let base = fs::read(scratch.file("base")).unwrap();
    for (count, place) in [(2, 40), (1, 48)] {
        let mut bytes = base.clone();
        let table = damage::get(&bytes, place, 8);
        damage::put(&mut bytes, 60, 4, count);
        damage::put(&mut bytes, 64, 8, table);
        let mend = |ours: bool, name: &str| {
            fs::write(scratch.file(name), &bytes).unwrap();
            check(ours, &scratch, name, Some("all"))
        };
        let (ours, theirs) = (mend(true, "ours"), mend(false, "theirs"));
        assert_eq!((ours.code, &ours.stdout, &ours.stderr), (Some(0), &theirs.stdout, &theirs.stderr));
        scratch.assert_clean("qcow2", "ours");
        scratch.judge(&["compare", "ours", "theirs"]);
    }
}

/// A snapshot table that lies where guest data is, whose cluster no refcount can count twice: the data keeps its cluster
/// when the table goes elsewhere.
#[test]
fn what_shared_a_cluster_with_a_snapshot_table_keeps_it() {
    let scratch = Scratch::new();
    for bits in [1, 2, 4, 8] {
        scratch.judge(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &format!("cluster_size=1k,refcount_bits={bits}"),
            "i",
            "4M",
        ]);
        // What is all zeros can be read as a snapshot: one that is incomplete.
        scratch.qemu_io("qcow2", "i", &["write -P 0 0 1k", "write -P 1 1k 7k"]);
        let mut bytes = fs::read(scratch.file("i")).unwrap();
        let l2 = Tables::of(&bytes).l2s[0];
        let data = damage::get(&bytes, l2, 8);
        // Other entries for the same cluster, until its count is full.
        for n in 1..(1u64 << bits) - 1 {
            damage::put(&mut bytes, l2 + 8 * (8 + n % 100), 8, data);
        }
        damage::put(&mut bytes, 60, 4, 1);
        damage::put(&mut bytes, 64, 8, data & 0x00ff_ffff_ffff_fe00);
        fs::write(scratch.file("i"), &bytes).unwrap();
        check(true, &scratch, "i", Some("all"));
        let found = check(false, &scratch, "i", None);
        assert_eq!(found.code, Some(0), "{bits} bits: {found:?}");
        scratch.qemu_io("qcow2", "i", &["read -P 0 0 1k", "read -P 1 1k 7k"]);
    }
}

/// A repair that is killed before any of its writes leaves an image that reads as before, and that both can mend
/// afterwards, to the same disk.
#[test]
fn a_repair_that_is_killed_at_any_write_leaves_no_worse() {
    let scratch = Scratch::new();
    damage::make_bases(&scratch);
    let mut points = 0;
    for base in ["p512", "s4096", "b4096"] {
        let honest = fs::read(scratch.file(base)).unwrap();
        let tables = Tables::of(&honest);
        for (what, bytes) in damage::mendable(&honest, &tables) {
            let what = format!("{base}: {what}");
            let shown = |bytes: &[u8]| {
                let mut bytes = bytes.to_vec();
                if damage::get(&bytes, 56, 4) == 0 {
                    // Without a refcount table only a check opens it.
                    damage::put(&mut bytes, 56, 4, 1);
                }
                fs::write(scratch.file("stopped"), &bytes).unwrap();
                let args = ["convert", "-f", "qcow2", "-O", "raw", "stopped", "shown"];
                // A damage may keep it from being read.
                let code = judge(&args).dir(scratch.path()).run().code;
                (code == Some(0)).then(|| fs::read(scratch.file("shown")).unwrap())
            };
            let disk = shown(&bytes);
            // Some of it qemu-img cannot mend.
            fs::write(scratch.file("stopped"), &bytes).unwrap();
            let judges = judge(&["check", "-q", "-f", "qcow2", "-r", "all", "stopped"]).dir(scratch.path()).run();
            let run = |at: usize| {
                let memory = Arc::new(Memory::new(bytes.clone()));
                let faulty = Arc::new(Faulty::new(memory.clone(), at, Fault::Stop));
                let (done, told) = mend(faulty.clone(), Fix::All);
                (memory.to_vec(), faulty.operations().len(), done, told)
            };
            let (whole, count, done, told) = run(usize::MAX);
            assert!(done && !told.is_empty(), "{what}: {told:?}");
            let mended = shown(&whole);
            assert!(mended.is_some() && (disk.is_none() || disk == mended), "{what}: the disk");
            let mut seen = HashSet::new();
            for at in 0..=count {
                let (stopped, ..) = run(at);
                let mut hasher = DefaultHasher::new();
                stopped.hash(&mut hasher);
                if !seen.insert(hasher.finish()) {
                    continue;
                }
                points += 1;
                let what = format!("{what}, stopped at {at} of {count}");
                let now = shown(&stopped);
                assert!(now == disk || now == mended, "{what}: the disk");
                fs::write(scratch.file("stopped"), &stopped).unwrap();
                if judges.code == Some(0) {
                    let out = judge(&["check", "-q", "-f", "qcow2", "-r", "all", "stopped"]).dir(scratch.path()).run();
                    assert_eq!(out.code, Some(0), "{what}: {out:?}");
                }
                let again = Arc::new(Memory::new(stopped));
                let (done, told) = mend(again.clone(), Fix::All);
                assert!(done, "{what}: {told:?}");
                assert!(shown(&again.to_vec()) == mended, "{what}: the disk, mended later");
                scratch.assert_clean("qcow2", "stopped");
            }
        }
    }
    assert!(points > 60, "{points} points");
}

/// Entries that name places far past the end of the file cost no memory, whether refcounts are only compared, or
/// written anew.
#[test]
fn places_far_past_the_end_cost_no_memory() {
    let scratch = Scratch::new();
    scratch.judge(&["create", "-q", "-f", "qcow2", "i", "64T"]);
    scratch.qemu_io("qcow2", "i", &["write 0 64k"]);
    let mut bytes = fs::read(scratch.file("i")).unwrap();
    let tables = Tables::of(&bytes);
    let l2 = tables.l2s[0];
    for n in 1..8192u64 {
        damage::put(&mut bytes, l2 + 8 * n, 8, 1 << 63 | n << 40);
    }
    // And a cluster in use that has no refcount.
    damage::put(&mut bytes, tables.refcount(l2 >> 16), 2, 0);
    fs::write(scratch.file("i"), &bytes).unwrap();
    for args in [&["check", "-f", "qcow2", "i"][..], &["check", "-f", "qcow2", "-r", "all", "i"]] {
        let out = vimg_within_memory(64 << 20, args).dir(scratch.path()).run();
        assert_eq!(out.code, Some(2), "{args:?}: {} {}", out.stdout, out.stderr.len());
        assert!(["16384 errors", "8191 errors"].iter().any(|found| out.stdout.contains(found)), "{}", out.stdout);
    }
    assert!(fs::metadata(scratch.file("i")).unwrap().len() < 2 << 20);
}

/// The images that are damaged here are sound, for both, before that.
#[test]
fn every_base_is_clean() {
    let scratch = Scratch::new();
    damage::make_bases(&scratch);
    for base in BASES {
        let (theirs, ours) = (check(false, &scratch, base.name, None), check(true, &scratch, base.name, None));
        assert_eq!(theirs.code, Some(0), "{theirs:?}");
        assert_eq!((theirs.stdout, theirs.stderr, theirs.code), (ours.stdout, ours.stderr, ours.code), "{}", base.name);
    }
}
