//! Landlock: from here on this process, whatever goes wrong in it, opens nothing but what it was told before.
//!
//! Rules hold for files and folders themselves, not for their names: what a name leads to later is not looked at. Where
//! the kernel has no Landlock (before 5.13, or switched off) there is none, and where it knows less than we ask for it
//! does what it knows. ("Landlock: unprivileged access control", Linux' user-space API guide.)

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, path_beneath_rules,
};

/// The rights that are known of: what a later kernel adds is not restricted.
const KNOWN: ABI = ABI::V5;

/// What any command may read: who we are, what devices are like, what time it is here, and the terminal.
/// Not all of `/proc/self`: the variables that we were started with may hold what is nobody's.
const READABLE: [&str; 8] = [
    "/proc/self/fd",
    "/proc/self/status",
    "/proc/self/mountinfo",
    "/proc/self/cgroup",
    "/sys/block",
    "/sys/devices",
    "/etc/localtime",
    "/usr/share/zoneinfo",
];
/// And where there is a network: names, certificates, and the C library's ways to them.
const OF_NETWORK: [&str; 11] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/ssl",
    "/usr/share/ca-certificates",
    "/lib",
    "/lib64",
    "/usr/lib",
];
const USABLE: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/tty"];

/// What may be opened.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Confinement {
    /// Files, to be read and written; folders, with all that is in them.
    pub usable: Vec<PathBuf>,
    /// Folders whose names may be listed.
    pub listed: Vec<PathBuf>,
    /// Connections may be made.
    pub network: bool,
}

impl Confinement {
    /// Confines this thread and all that it starts, for good. False where the kernel cannot.
    pub fn apply(&self) -> Result<bool, RulesetError> {
        let all = AccessFs::from_all(KNOWN);
        let usable = self.usable.iter().cloned().chain(USABLE.map(PathBuf::from));
        let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(all)?;
        let ruleset = if self.network { ruleset } else { ruleset.handle_access(AccessNet::from_all(KNOWN))? };
        let network = if self.network { &OF_NETWORK[..] } else { &[] };
        let status = ruleset
            .create()?
            .add_rules(path_beneath_rules(network, AccessFs::from_read(KNOWN)))?
            .add_rules(path_beneath_rules(usable, all))?
            .add_rules(path_beneath_rules(READABLE, AccessFs::from_read(KNOWN)))?
            .add_rules(path_beneath_rules(&self.listed, AccessFs::ReadDir))?
            .restrict_self()?;
        Ok(status.ruleset != RulesetStatus::NotEnforced)
    }
}
