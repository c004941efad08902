//! What comes up on the way, for the user to know. Whoever asks for it shows it.

/// Something to tell the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A line as it is.
    Line(String),
    /// A warning, to be marked as one.
    Warning(String),
}
