//! Giving out clusters: the allocator's state.

/// What is known of free space. Its lock is held by whoever changes tables.
#[derive(Debug, Default)]
pub struct Allocator {}
