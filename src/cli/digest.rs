//! `--digest`, `--expect-digest`: the digest of what a disk holds.

use super::{Complaint, help};
use crate::block::nearest::nearest;
use crate::crypto::{Digest, DigestKind};

/// The options.
#[derive(Debug, clap::Args)]
pub struct DigestArgs {
    /// print the digest of the guest's disk: sha256, blake3 (both as of a raw image of whole sectors), or blake3-tree (holes cost nothing)
    ///
    /// default: blake3-tree for checksum, no digest for convert
    #[arg(long, value_name = "KIND", value_parser = kind, help_heading = help::OWN)]
    digest: Option<DigestKind>,
    /// fail if the digest is not this one, KIND:HEX
    #[arg(long, value_name = "DIGEST", value_parser = digest, help_heading = help::OWN)]
    expect_digest: Option<Digest>,
}

fn kind(name: &str) -> Result<DigestKind, Complaint> {
    let names = || DigestKind::NAMES.join(", ");
    let unknown = || format!("Unknown digest '{name}': there are {}", names());
    DigestKind::parse(name).ok_or_else(|| Complaint::misspelt(unknown(), nearest(name, DigestKind::NAMES)))
}

fn digest(text: &str) -> Result<Digest, Complaint> {
    let form = || Complaint::value(format!("'{text}' is no digest: it is written as sha256:64 hexadecimal digits"));
    Digest::parse(text).ok_or_else(form)
}

impl DigestArgs {
    /// Which digest is made, if any.
    pub fn kind(&self) -> Result<Option<DigestKind>, Complaint> {
        match (self.digest, self.expect_digest) {
            (Some(kind), Some(expected)) if kind != expected.kind => {
                Err(Complaint::value("--digest and --expect-digest name different kinds of digest"))
            }
            (kind, expected) => Ok(kind.or(expected.map(|expected| expected.kind))),
        }
    }

    /// Whether it is printed.
    pub fn is_shown(&self) -> bool {
        self.digest.is_some()
    }

    /// What it has to be.
    pub fn expected(&self) -> Option<Digest> {
        self.expect_digest
    }
}
