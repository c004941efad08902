//! What the user typed and what the user sees.
