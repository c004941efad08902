//! Where identifiers and times of new images come from.
//!
//! With `SOURCE_DATE_EPOCH` in the environment they are the same at every run: the time is that one, identifiers
//! follow from it, from the last part of the image's name, from its size, and from what they are for. Without it they are now and random, but
//! for what the user has chosen ([`IdChoice`]).

use std::cell::RefCell;
use std::ffi::OsString;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use fastrand::Rng;

use crate::block::{self, Error, Result};

/// What the user says of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IdChoice {
    /// They are the same at every run; the time is the start of the epoch, if the environment has none.
    pub reproducible: bool,
    /// The UUID that an image of its format is known by, in the order of RFC 9562.
    pub uuid: Option<[u8; 16]>,
    /// The content id of a vmdk.
    pub cid: Option<u32>,
}

/// What a UUID is for by which an image is known, in every format that has one.
const KNOWN_BY: [&str; 3] = ["image", "disk", "luks"];

/// See the module.
#[derive(Debug)]
pub struct ImageIds {
    source: IdSource,
    choice: IdChoice,
    uuid_used: AtomicBool,
    cid_used: AtomicBool,
}

#[derive(Debug)]
enum IdSource {
    Random(Mutex<Rng>),
    Fixed { seconds: u64, seed: u64 },
}

impl ImageIds {
    /// Those of the image with that name and size. Of the name the last part counts: what folders lead to it is no
    /// matter of the image's.
    pub fn of(name: &str, size: u64, choice: IdChoice) -> Result<Self> {
        let name = name.rsplit('/').next().unwrap_or(name);
        let name = name.strip_prefix("file:").unwrap_or(name);
        let set = std::env::var_os("SOURCE_DATE_EPOCH").filter(|text| !text.is_empty());
        let seconds = |text: OsString| {
            let seconds = text.to_str().and_then(|text| text.parse().ok());
            let shown = text.to_string_lossy();
            seconds.ok_or_else(|| Error::invalid(format!("SOURCE_DATE_EPOCH is '{shown}', not a number of seconds")))
        };
        let epoch = set.map(seconds).transpose()?;
        Ok(Self::with(epoch.or(choice.reproducible.then_some(0)), name, size, choice))
    }

    /// Which of the ids that the user has chosen the image does not have.
    pub fn unused(&self) -> Option<&'static str> {
        let unused = |chosen: bool, used: &AtomicBool| chosen && !used.load(Ordering::Relaxed);
        match () {
            () if unused(self.choice.uuid.is_some(), &self.uuid_used) => Some("UUID"),
            () if unused(self.choice.cid.is_some(), &self.cid_used) => Some("content id (CID)"),
            () => None,
        }
    }

    fn with(epoch: Option<u64>, name: &str, size: u64, choice: IdChoice) -> Self {
        let source = match epoch {
            Some(seconds) => {
                let words = [&seconds.to_le_bytes()[..], &size.to_le_bytes(), name.as_bytes()];
                IdSource::Fixed { seconds, seed: words.into_iter().fold(FNV_START, fnv) }
            }
            None => IdSource::Random(Mutex::new(Rng::new())),
        };
        Self { source, choice, uuid_used: AtomicBool::new(false), cid_used: AtomicBool::new(false) }
    }

    fn draw<T>(&self, purpose: &str, of: impl FnOnce(&mut Rng) -> T) -> T {
        match &self.source {
            IdSource::Random(rng) => of(&mut rng.lock().unwrap_or_else(|poisoned| poisoned.into_inner())),
            IdSource::Fixed { seed, .. } => {
                let rng = RefCell::new(Rng::with_seed(fnv(*seed, purpose.as_bytes())));
                of(&mut rng.borrow_mut())
            }
        }
    }
}

impl ImageIds {
    /// The time: seconds since the epoch, and nanoseconds.
    pub fn time(&self) -> (u64, u32) {
        match self.source {
            IdSource::Fixed { seconds, .. } => (seconds, 0),
            IdSource::Random(_) => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or((0, 0), |since| (since.as_secs(), since.subsec_nanos())),
        }
    }
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, 64 bits.
fn fnv(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

impl block::Ids for ImageIds {
    fn seconds(&self) -> u64 {
        self.time().0
    }

    fn are_fixed(&self) -> bool {
        matches!(self.source, IdSource::Fixed { .. })
    }

    fn uuid(&self, purpose: &str) -> [u8; 16] {
        if let Some(uuid) = self.choice.uuid.filter(|_| KNOWN_BY.contains(&purpose)) {
            self.uuid_used.store(true, Ordering::Relaxed);
            return uuid;
        }
        let mut uuid = self.draw(purpose, |rng| rng.u128(..)).to_be_bytes();
        // RFC 9562, section 5.4: version 4, variant 10.
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }

    fn word(&self, purpose: &str) -> u32 {
        if let Some(cid) = self.choice.cid.filter(|_| purpose == "cid") {
            self.cid_used.store(true, Ordering::Relaxed);
            return cid;
        }
        self.draw(purpose, |rng| rng.u32(..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Ids as _;

    #[test]
    fn fixed_ones_depend_on_everything_that_is_given_and_on_nothing_else() {
        let uuid =
            |epoch, name, size, purpose| ImageIds::with(Some(epoch), name, size, IdChoice::default()).uuid(purpose);
        let one = uuid(1, "a", 2, "x");
        assert_eq!(one, uuid(1, "a", 2, "x"));
        for other in [uuid(2, "a", 2, "x"), uuid(1, "b", 2, "x"), uuid(1, "a", 3, "x"), uuid(1, "a", 2, "y")] {
            assert_ne!(one, other);
        }
        assert_eq!((one[6] >> 4, one[8] >> 6), (4, 2));
        assert_eq!(ImageIds::with(Some(7), "a", 0, IdChoice::default()).seconds(), 7);
    }

    #[test]
    fn random_ones_differ() {
        let ids = ImageIds::with(None, "a", 0, IdChoice::default());
        assert_ne!(ids.uuid("x"), ids.uuid("x"));
        assert_ne!(ImageIds::with(None, "a", 0, IdChoice::default()).uuid("x"), ids.uuid("x"));
        assert!(ids.seconds() > 1_600_000_000);
    }
}
