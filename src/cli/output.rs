//! `--output`: for people, or for programs.

use super::Complaint;

/// The form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OutputForm {
    /// Text.
    #[default]
    Human,
    /// JSON.
    Json,
}

impl OutputForm {
    /// The form with that word.
    pub fn parse(word: &str) -> Result<Self, Complaint> {
        match word {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(Complaint::usage(format!("--output expects 'human' or 'json', not '{other}'"))),
        }
    }
}
