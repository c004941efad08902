//! vimg: virtual-machine disk images, created, inspected, converted and resized.

pub mod block;
pub mod cli;
pub mod codec;
pub mod formats;
pub mod ops;
#[allow(unsafe_code)]
pub mod storage;
