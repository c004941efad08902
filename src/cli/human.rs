//! Numbers for people: sizes with three digits, tables of snapshots.

use chrono::{Local, TimeZone};

use crate::block::info::SnapshotInfo;

const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// A size with three significant digits, as C's `%0.3g` gives them, in the unit that leaves less than 1000.
#[allow(clippy::cast_precision_loss)]
pub fn size(bytes: u64) -> String {
    // Switches where 1000 of the smaller unit are reached, that is where bytes * 1.024 reaches a power of 1024.
    let scaled = u128::from(bytes) * 1024 / 1000;
    let unit = (scaled.max(1).ilog2() / 10).min(6);
    let value = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    let name = UNITS.get(unit as usize).copied().unwrap_or_default();
    format!("{} {name}B", general(value))
}

/// `%.3g` for a value that is not negative.
fn general(value: f64) -> String {
    let text = format!("{value:.2e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if (-4..3).contains(&exponent) {
        let decimals = usize::try_from(2 - exponent).unwrap_or(0);
        return trim(&format!("{value:.decimals$}"));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trim(mantissa), exponent.abs())
}

/// A size, and the same in bytes.
pub fn size_and_bytes(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", size(bytes))
}

/// The head of a table of snapshots.
pub fn snapshot_head() -> String {
    row("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")
}

/// A line of it; the date is in local time.
pub fn snapshot_row(snapshot: &SnapshotInfo) -> String {
    let date = i64::try_from(snapshot.date_sec)
        .ok()
        .and_then(|seconds| Local.timestamp_opt(seconds, 0).single())
        .map_or_else(String::new, |time| time.format("%Y-%m-%d %H:%M:%S").to_string());
    let (millis, seconds) = (snapshot.vm_clock_nsec / 1_000_000 % 1000, snapshot.vm_clock_nsec / 1_000_000_000);
    let clock = format!("{:04}:{:02}:{:02}.{millis:03}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    let icount = snapshot.icount.map_or_else(|| "--".to_owned(), |count| count.to_string());
    row(&snapshot.id, &snapshot.name, &size(snapshot.vm_state_size), &date, &clock, &icount)
}

fn row(id: &str, tag: &str, state: &str, date: &str, clock: &str, icount: &str) -> String {
    // C counts bytes where Rust counts characters.
    let pad = |text: &str, width: usize| format!("{text}{}", " ".repeat(width.saturating_sub(text.len())));
    format!("{} {} {state:>8} {date:>19} {clock:>15} {icount:>10}", pad(id, 7), pad(tag, 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        // From the reference's answers.
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1023, "0.999 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10_000, "9.77 KiB"),
            (197_120, "192 KiB"),
            (1_022_976, "999 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_073_741_824, "1 GiB"),
            (16_106_127_360, "15 GiB"),
            (1 << 40, "1 TiB"),
            ((1 << 63) - 512, "8 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn snapshots_stand_in_columns() {
        assert_eq!(snapshot_head(), "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT");
        let snapshot = SnapshotInfo {
            id: "1".into(),
            name: "s".into(),
            vm_state_size: 1 << 20,
            date_sec: 0,
            vm_clock_nsec: 3_723_004_999_999,
            ..SnapshotInfo::default()
        };
        let line = snapshot_row(&snapshot);
        assert!(line.starts_with("1       s                   1 MiB "), "{line}");
        assert!(line.ends_with(" 0001:02:03.004         --"), "{line}");
    }
}
