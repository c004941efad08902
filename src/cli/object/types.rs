//! The types of `--object` with their properties, and what goes together of a throttle group's.

use std::collections::BTreeMap;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PropertyKind {
    Text,
    Integer,
    /// The number of a key of the kernel's.
    Serial,
    Switch,
    Choice(&'static str, &'static [&'static str]),
    /// A list of numbers of processors or nodes.
    Numbers,
    /// The limits of a throttle group, together.
    Limits,
    /// The rules of an authorization list.
    Rules,
}

pub(super) struct Property {
    pub name: &'static str,
    pub kind: PropertyKind,
    pub required: bool,
}

const fn property(name: &'static str, kind: PropertyKind) -> Property {
    Property { name, kind, required: false }
}

const fn required(name: &'static str, kind: PropertyKind) -> Property {
    Property { name, kind, required: true }
}

/// What becomes of an object of a type.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is taken.
    Taken,
    /// The reference lists it, and knows it not.
    Listed,
}

/// A type that is listed by help.
pub(super) struct ObjectType {
    pub name: &'static str,
    pub standing: Standing,
    /// In the order in which they are checked.
    pub properties: &'static [Property],
}

impl ObjectType {
    /// Whether what it is given is kept from everybody.
    pub fn is_secret(&self) -> bool {
        matches!(self.name, "secret" | "secret_keyring")
    }
}

const fn object_type(name: &'static str, standing: Standing, properties: &'static [Property]) -> ObjectType {
    ObjectType { name, standing, properties }
}

const SECRET_FORMAT: PropertyKind = PropertyKind::Choice("QCryptoSecretFormat", &["raw", "base64"]);
const ENDPOINT: Property = property("endpoint", PropertyKind::Choice("QCryptoTLSCredsEndpoint", &["client", "server"]));
const DIR: Property = property("dir", PropertyKind::Text);
const PRIORITY: Property = property("priority", PropertyKind::Text);
const VERIFY_PEER: Property = property("verify-peer", PropertyKind::Switch);

pub(super) const POLICIES: &[&str] = &["deny", "allow"];
pub(super) const MATCHES: &[&str] = &["exact", "glob"];

pub(super) const TYPES: &[ObjectType] = &[
    object_type(
        "authz-list",
        Standing::Taken,
        &[
            property("policy", PropertyKind::Choice("QAuthZListPolicy", POLICIES)),
            property("rules", PropertyKind::Rules),
        ],
    ),
    object_type(
        "authz-list-file",
        Standing::Listed,
        &[property("filename", PropertyKind::Text), property("refresh", PropertyKind::Switch)],
    ),
    object_type("authz-simple", Standing::Taken, &[required("identity", PropertyKind::Text)]),
    object_type(
        "main-loop",
        Standing::Taken,
        &[
            property("aio-max-batch", PropertyKind::Integer),
            property("thread-pool-min", PropertyKind::Integer),
            property("thread-pool-max", PropertyKind::Integer),
        ],
    ),
    object_type("pr-manager-helper", Standing::Taken, &[required("path", PropertyKind::Text)]),
    object_type(
        "secret",
        Standing::Taken,
        &[
            property("format", SECRET_FORMAT),
            property("keyid", PropertyKind::Text),
            property("iv", PropertyKind::Text),
            property("data", PropertyKind::Text),
            property("file", PropertyKind::Text),
        ],
    ),
    object_type(
        "secret_keyring",
        Standing::Taken,
        &[
            property("format", SECRET_FORMAT),
            property("keyid", PropertyKind::Text),
            property("iv", PropertyKind::Text),
            required("serial", PropertyKind::Serial),
        ],
    ),
    object_type(
        "thread-context",
        Standing::Taken,
        &[property("cpu-affinity", PropertyKind::Numbers), property("node-affinity", PropertyKind::Numbers)],
    ),
    object_type(
        "throttle-group",
        Standing::Taken,
        &[
            property("limits", PropertyKind::Limits),
            property("x-iops-total", PropertyKind::Integer),
            property("x-iops-total-max", PropertyKind::Integer),
            property("x-iops-total-max-length", PropertyKind::Integer),
            property("x-iops-read", PropertyKind::Integer),
            property("x-iops-read-max", PropertyKind::Integer),
            property("x-iops-read-max-length", PropertyKind::Integer),
            property("x-iops-write", PropertyKind::Integer),
            property("x-iops-write-max", PropertyKind::Integer),
            property("x-iops-write-max-length", PropertyKind::Integer),
            property("x-bps-total", PropertyKind::Integer),
            property("x-bps-total-max", PropertyKind::Integer),
            property("x-bps-total-max-length", PropertyKind::Integer),
            property("x-bps-read", PropertyKind::Integer),
            property("x-bps-read-max", PropertyKind::Integer),
            property("x-bps-read-max-length", PropertyKind::Integer),
            property("x-bps-write", PropertyKind::Integer),
            property("x-bps-write-max", PropertyKind::Integer),
            property("x-bps-write-max-length", PropertyKind::Integer),
            property("x-iops-size", PropertyKind::Integer),
        ],
    ),
    object_type("tls-creds-anon", Standing::Taken, &[VERIFY_PEER, DIR, ENDPOINT, PRIORITY]),
    object_type(
        "tls-creds-psk",
        Standing::Taken,
        &[VERIFY_PEER, DIR, ENDPOINT, PRIORITY, property("username", PropertyKind::Text)],
    ),
    object_type(
        "tls-creds-x509",
        Standing::Taken,
        &[
            VERIFY_PEER,
            DIR,
            ENDPOINT,
            PRIORITY,
            property("sanity-check", PropertyKind::Switch),
            property("passwordid", PropertyKind::Text),
        ],
    ),
];

/// Types of QEMU's that its other programs have, and that are invalid here.
pub(super) const ELSEWHERE: &[&str] = &[
    "acpi-generic-initiator",
    "authz-listfile",
    "authz-pam",
    "can-bus",
    "can-host-socketcan",
    "colo-compare",
    "cryptodev-backend",
    "cryptodev-backend-builtin",
    "cryptodev-vhost-user",
    "dbus-vmstate",
    "filter-buffer",
    "filter-dump",
    "filter-mirror",
    "filter-redirector",
    "filter-replay",
    "filter-rewriter",
    "input-barrier",
    "input-linux",
    "iommufd",
    "iothread",
    "memory-backend-epc",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "memory-backend-shm",
    "pef-guest",
    "qtest",
    "rng-builtin",
    "rng-egd",
    "rng-random",
    "s390-pv-guest",
    "sev-guest",
    "sev-snp-guest",
    "tls-cipher-suites",
    "x-remote-object",
    "x-vfio-user-server",
];

/// The most bytes or operations in a second, and in a burst.
const MOST: i64 = 1_000_000_000_000_000;

/// What is wrong with the limits of a throttle group, by their names without `x-`, in the reference's words.
pub(super) fn throttle_fault(limits: &BTreeMap<&str, i64>) -> Option<&'static str> {
    let get = |unit: &str, way: &str, what: &str| limits.get(format!("{unit}-{way}{what}").as_str()).copied();
    let units = ["bps", "iops"].into_iter();
    let mut both = units.clone().flat_map(|unit| ["", "-max"].map(|what| (unit, what)));
    let set = |unit: &str, way: &str, what: &str| get(unit, way, what).is_some_and(|value| value != 0);
    if both.any(|(unit, what)| set(unit, "total", what) && (set(unit, "read", what) || set(unit, "write", what))) {
        return Some("bps/iops/max total values and read/write values cannot be used at the same time");
    }
    let ways = ["total", "read", "write"];
    if limits.get("iops-size").is_some_and(|size| *size != 0) && !ways.iter().any(|way| set("iops", way, "")) {
        return Some("iops size requires an iops value to be set");
    }
    units.flat_map(|unit| ways.map(|way| (unit, way))).find_map(|(unit, way)| {
        let average = get(unit, way, "").unwrap_or(0);
        let most = get(unit, way, "-max").unwrap_or(0);
        let length = get(unit, way, "-max-length").unwrap_or(1);
        if !(0..=MOST).contains(&average) || !(0..=MOST).contains(&most) {
            Some("bps/iops/max values must be within [0, 1000000000000000]")
        } else if length == 0 {
            Some("the burst length cannot be 0")
        } else if length > 1 && most == 0 {
            Some("burst length set without burst rate")
        } else if length > 1 && most > MOST / length {
            Some("burst length too high for this burst rate")
        } else if most > 0 && average == 0 {
            Some("bps_max/iops_max require corresponding bps/iops values")
        } else if most > 0 && most < average {
            Some("bps_max/iops_max cannot be lower than bps/iops")
        } else {
            None
        }
    })
}
