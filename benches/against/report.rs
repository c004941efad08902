//! The table.

use crate::cost::Runs;

/// The head: see [`row`].
pub fn head(contenders: &[&str]) -> String {
    let mut line = format!("{:<24}", "job");
    for name in &contenders[1..] {
        line.push_str(&format!("{:>8} {:>7}", format!("vs {name}"), "best"));
    }
    line.push_str(&format!(" {:>7} {:>7}", "cpu", "best"));
    for name in contenders {
        line.push_str(&format!(" {:>9}", format!("{name} s")));
    }
    line.push_str(&format!(" {:>9} {:>9}", "vimg best", "floor s"));
    for name in contenders {
        line.push_str(&format!(" {:>9}", format!("{name} MiB")));
    }
    for name in contenders {
        line.push_str(&format!(" {:>10}", format!("{name} out")));
    }
    line
}

/// For each other program the ratio of the medians and of the best runs; the same of qemu-img's processor time; then for
/// each program seconds; vimg's best run and its floor; memory; and the size of the result. The other `peers` follow on
/// lines of their own.
pub fn row(job: &str, all: &[Runs], contenders: usize, floor: Option<f64>) -> String {
    let (ours, others) = (&all[0], &all[1..contenders]);
    let ratios = |theirs: &Runs| {
        let ratio = theirs.median(|c| c.seconds) / ours.median(|c| c.seconds);
        (ratio, theirs.best(|c| c.seconds) / ours.best(|c| c.seconds))
    };
    let mut line = format!("{job:<24}");
    for theirs in others {
        let (median, best) = ratios(theirs);
        line.push_str(&format!("{median:>8.2} {best:>7.2}"));
    }
    let cpu = (all[1].median(|c| c.cpu) / ours.median(|c| c.cpu), all[1].best(|c| c.cpu) / ours.best(|c| c.cpu));
    line.push_str(&format!(" {:>7.2} {:>7.2}", cpu.0, cpu.1));
    let programs = &all[..contenders];
    for runs in programs {
        line.push_str(&format!(" {:>9.4}", runs.median(|c| c.seconds)));
    }
    let floor = floor.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.4}"));
    line.push_str(&format!(" {:>9.4} {floor:>9}", ours.best(|c| c.seconds)));
    for runs in programs {
        line.push_str(&format!(" {:>9.1}", runs.peak_mib()));
    }
    for runs in programs {
        line.push_str(&format!(" {:>10}", format!("{:.1}M", runs.size as f64 / 1048576.0)));
    }
    if ours.fetched > 0 {
        let fetched = programs.iter().map(|runs| format!("{} {:.1}M", runs.name, runs.fetched as f64 / 1048576.0));
        line.push_str(&format!("\n  fetched: {}", fetched.collect::<Vec<_>>().join(", ")));
    }
    for peer in &all[contenders..] {
        let (median, best) = ratios(peer);
        let (seconds, cpu) = (peer.median(|c| c.seconds), peer.best(|c| c.cpu));
        line.push_str(&format!(
            "\n{:<24}{median:>8.2} {best:>7.2}   {seconds:.4} s, cpu {cpu:.4} s, {:.1} MiB",
            format!("  against {}", peer.name),
            peer.peak_mib()
        ));
    }
    line
}
