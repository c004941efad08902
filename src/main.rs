//! The program: see [`vimg::cli`].
fn main() {}
