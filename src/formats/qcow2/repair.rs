//! Putting right what an unclean end left behind.

use crate::block::{Error, Result};

use super::Qcow2Driver;

/// Makes the refcounts of an image whose dirty bit is set what its tables say.
pub fn rebuild(_driver: &Qcow2Driver) -> Result<()> {
    Err(Error::unsupported("The image was not closed cleanly and cannot be opened for writing"))
}
