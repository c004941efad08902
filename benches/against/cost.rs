//! What a program takes: time, processor time, memory.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};

/// What one run took.
#[derive(Clone, Copy)]
pub struct Cost {
    pub seconds: f64,
    pub cpu: f64,
    pub peak_kib: i64,
}

/// Run as `against --cost PROGRAM ARGS...`: does that work and prints what it cost. A process of its own, because
/// the kernel tells peak memory only of all children together.
pub fn cost_of(command: &[String]) -> ! {
    let start = Instant::now();
    let status = Command::new(&command[0]).args(&command[1..]).stdout(Stdio::null()).status();
    let seconds = start.elapsed().as_secs_f64();
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage");
    let time = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    println!("{seconds} {} {}", time(usage.user_time()) + time(usage.system_time()), usage.max_rss());
    std::process::exit(status.ok().and_then(|s| s.code()).unwrap_or(101));
}

/// Runs a command in that folder.
pub fn measure(command: &[String], dir: &Path) -> Result<Cost, String> {
    let myself = std::env::current_exe().expect("myself");
    let out = Command::new(myself).arg("--cost").args(command).current_dir(dir).output().expect("run myself");
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).trim().to_owned());
    }
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut words = text.split_whitespace();
    let mut next = || words.next().and_then(|w| w.parse::<f64>().ok()).expect("three numbers");
    Ok(Cost { seconds: next(), cpu: next(), peak_kib: next() as i64 })
}

/// What all runs of one job by one program took: none for an older vimg that cannot do it.
pub struct Runs {
    pub name: &'static str,
    pub costs: Vec<Cost>,
    /// Bytes that the file `out` takes on the host.
    pub size: u64,
    /// Bytes that came over the net.
    pub fetched: u64,
}

impl Runs {
    fn sorted(&self, what: fn(&Cost) -> f64) -> Vec<f64> {
        let mut values: Vec<f64> = self.costs.iter().map(what).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    pub fn median(&self, what: fn(&Cost) -> f64) -> f64 {
        self.sorted(what).get(self.costs.len() / 2).copied().unwrap_or(f64::NAN)
    }

    pub fn best(&self, what: fn(&Cost) -> f64) -> f64 {
        self.sorted(what).first().copied().unwrap_or(f64::NAN)
    }

    pub fn peak_mib(&self) -> f64 {
        self.costs.iter().map(|cost| cost.peak_kib).max().unwrap_or(0) as f64 / 1024.0
    }
}
