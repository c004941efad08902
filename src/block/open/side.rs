//! Files of a layer that options alone name, beside the one that is named by itself.

use super::layer::no_such_node;
use super::opened::Opened;
use super::settings::Settings;
use super::{OpenHow, Opener, Trail};
use crate::block::keys::take_text;
use crate::block::name::take_below;
use crate::block::{Format, OptionTree, Result};

impl Opener<'_> {
    /// Takes what the options say of the format's side files, and opens and locks those that are named, in the format's
    /// order.
    pub(super) fn side_files(
        &self,
        format: &dyn Format,
        options: &mut OptionTree,
        settings: &Settings,
        how: &OpenHow,
        trail: &mut Trail,
    ) -> Result<Vec<Opened>> {
        let mut files = Vec::new();
        for role in format.side_files() {
            let below = take_below(options, role);
            if let Some(reference) = take_text(options, role) {
                return Err(no_such_node(&reference, below.is_empty()));
            }
            if below.is_empty() {
                continue;
            }
            let file = self.bytes_of(role, None, below, settings, how, trail)?;
            if file.locking {
                trail.lock(&*file.child.storage, settings.access().and(file.access))?;
            }
            files.push(file);
        }
        Ok(files)
    }
}
