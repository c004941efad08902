//! Checking an image's own tables, and mending what is wrong with them.
//!
//! A check reads tables, never guest data. What it finds is told one by one, as it is found, so memory does not grow
//! with the damage; the numbers come at the end. Damage is a finding, not an error: an error means that the check could
//! not be done.

use super::Result;

/// What may be mended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fix {
    /// Nothing.
    #[default]
    Nothing,
    /// Space that nothing uses.
    Leaks,
    /// All that can be mended without guessing what the guest's data was.
    All,
}

impl Fix {
    /// Anything at all.
    pub fn is_asked_for(self) -> bool {
        self != Self::Nothing
    }

    /// Leaks.
    pub fn leaks(self) -> bool {
        self != Self::Nothing
    }

    /// What is wrong, leaks apart.
    pub fn corruptions(self) -> bool {
        self == Self::All
    }
}

/// Hears of what a check finds and mends, while it goes on.
pub trait Findings: Sync {
    /// A line, as it is to be shown: `Leaked cluster 5 refcount=1 reference=0`, `Repairing ...`, `ERROR ...`.
    fn line(&self, text: &str);

    /// Why the check cannot go on, to be marked as an error of the program's.
    fn error(&self, text: &str) {
        self.line(text);
    }
}

impl<F: Fn(&str) + Sync> Findings for F {
    fn line(&self, text: &str) {
        self(text);
    }
}

/// What a check came to. A number that is zero is none, or not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// Errors that are still there.
    pub corruptions: u64,
    /// Units of space that are used for nothing and are still there.
    pub leaks: u64,
    /// Parts of the image that could not be looked at.
    pub check_errors: u64,
    /// Errors that were mended.
    pub corruptions_fixed: u64,
    /// Units of space that were given back.
    pub leaks_fixed: u64,
    /// Where the last byte in use ends, in bytes of the file.
    pub image_end: u64,
    /// Units of the guest's disk.
    pub total_clusters: u64,
    /// Those of them that have a place in the file.
    pub allocated_clusters: u64,
    /// Those that do not lie behind the one before; compressed ones always count.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
}

impl CheckReport {
    /// Something was mended.
    pub fn is_repaired(&self) -> bool {
        self.corruptions_fixed > 0 || self.leaks_fixed > 0
    }
}

/// Able to check its tables.
pub trait Check {
    /// Checks, and mends what `fix` allows, in an order in which a stop at any write leaves the image no worse than it
    /// was. All that was mended is in the files when this returns. Reads the tables anew at each call: a second one
    /// sees what the first one left.
    ///
    /// `fix` is [`Fix::Nothing`] unless the image was opened for [`Repair`](super::Purpose::Repair).
    fn check(&self, fix: Fix, findings: &dyn Findings) -> Result<CheckReport>;
}

/// Counts what a check finds, and tells it.
pub struct Tally<'a> {
    findings: &'a dyn Findings,
    /// The count so far.
    pub report: CheckReport,
}

impl<'a> Tally<'a> {
    /// Nothing found yet.
    pub fn new(findings: &'a dyn Findings) -> Self {
        Self { findings, report: CheckReport::default() }
    }

    /// An error.
    pub fn wrong(&mut self, text: impl AsRef<str>) {
        self.findings.line(&format!("ERROR: {}", text.as_ref()));
        self.report.corruptions += 1;
    }

    /// So many units of space that nothing uses.
    pub fn leaked(&mut self, units: u64, text: impl AsRef<str>) {
        self.findings.line(&format!("Leaked {}", text.as_ref()));
        self.report.leaks += units;
    }

    /// What was told before is about to be mended.
    pub fn repairing(&self, text: impl AsRef<str>) {
        self.findings.line(&format!("Repairing {}", text.as_ref()));
    }

    /// So many errors are no more.
    pub fn mended(&mut self, errors: u64) {
        self.report.corruptions = self.report.corruptions.saturating_sub(errors);
        self.report.corruptions_fixed += errors;
    }

    /// All leaks are no more.
    pub fn gave_back(&mut self) {
        self.report.leaks_fixed += std::mem::take(&mut self.report.leaks);
    }
}
