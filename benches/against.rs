//! Times vimg and qemu-img in turn on the same work.
fn main() {}
