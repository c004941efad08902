//! How the images that are read, or changed in place, are named on the command line: `-f`, `--image-opts`, `-U`.

use std::ffi::OsStr;

use super::{Complaint, Program};
use crate::block::keys::as_text;
use crate::block::{ImageRef, OpenHow};

/// The options that say how names are taken.
#[derive(Debug, Clone, Copy, Default)]
pub struct ImageArgs<'a> {
    /// `-f`.
    pub format: Option<&'a str>,
    /// `--image-opts`.
    pub image_opts: bool,
    /// `-U`.
    pub force_share: bool,
}

impl ImageArgs<'_> {
    /// Refuses options that exclude each other.
    pub fn check(&self) -> Result<(), Complaint> {
        match (self.image_opts, self.format) {
            (true, Some(_)) => Err(Complaint::value("--image-opts and --format are mutually exclusive")),
            _ => Ok(()),
        }
    }

    /// The image with that name, and how it is opened: to be read, with its backing chain. The caller changes
    /// what it wants otherwise.
    pub fn image(&self, program: &Program, name: &OsStr) -> anyhow::Result<(ImageRef, OpenHow)> {
        let how =
            OpenHow { format: self.format.map(str::to_owned), force_share: self.force_share, ..OpenHow::default() };
        if !self.image_opts {
            return Ok((ImageRef::name(name), how));
        }
        let (image, warnings) = ImageRef::image_opts(&name.to_string_lossy())?;
        warnings.iter().for_each(|(warning, hint)| program.deprecated(warning, hint));
        if let ImageRef::Tree(tree, _) = &image
            && let Some(share) = tree.get("force-share")
            && self.force_share
            && as_text(share).as_deref() != Some("on")
        {
            return Err(Complaint::value("--force-share/-U conflicts with image options").into());
        }
        Ok((image, how))
    }
}
