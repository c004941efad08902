//! What an image is opened for. It decides permissions and locks, whether damage is an error or a finding, and whether
//! anything may be mended on opening.

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Purpose {
    /// Its header alone is looked at: no keys are needed, and other files may be missing.
    Look,
    /// Its disk is read.
    #[default]
    Read,
    /// Its disk is read, to see whether it holds what was just written: with the key that it was written with.
    ReadBack,
    /// Its disk is read and written.
    Write,
    /// Its tables are checked: what is wrong with them is what is wanted to be known.
    Check,
    /// The same, and what is wrong is mended: by the check, which tells what it mends, not by the opening.
    Repair,
    /// What it holds moves to a layer below, which is opened for writing once it is known which one, and it is emptied.
    Commit,
}

impl Purpose {
    /// The image is written to.
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Repair | Self::Commit)
    }

    /// Nothing but the header is needed.
    pub fn only_looks(self) -> bool {
        self == Self::Look
    }

    /// An image that says of itself that it is damaged is opened all the same.
    pub fn takes_damaged(self) -> bool {
        matches!(self, Self::Look | Self::Read | Self::ReadBack | Self::Check | Self::Repair)
    }

    /// Damage is what is looked for: as long as the image can be told for one, it is opened, whatever is wrong with it.
    pub fn checks(self) -> bool {
        matches!(self, Self::Check | Self::Repair)
    }

    /// What must be put right before guest data is written is put right on opening. Nothing else ever is.
    pub fn mends(self) -> bool {
        matches!(self, Self::Write | Self::Commit)
    }

    /// What the layers below are opened for.
    pub(super) fn below(self) -> Self {
        if self == Self::Look { Self::Look } else { Self::Read }
    }

    /// What the image is opened for that this one lies in.
    pub(super) fn inside(self) -> Self {
        match self {
            Self::ReadBack => Self::ReadBack,
            _ if self.writes() => Self::Write,
            _ => Self::Read,
        }
    }
}
