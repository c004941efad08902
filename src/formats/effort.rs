//! Our own options that say how hard compression tries. Images do not keep them.

use crate::block::{CreateOptions, Error, OptionKind, OptionSpec, Result};

/// The codec's level.
pub const LEVEL: OptionSpec = OptionSpec::new(
    "compression_level",
    OptionKind::Number,
    "Compression level of convert: from 1 (fastest) to 9, 12 or 22 (smallest), as the method has them",
)
.encoding();

/// How far back deflate refers.
pub const WINDOW: OptionSpec = OptionSpec::new(
    "compression_window",
    OptionKind::Text,
    "Window of zlib compression, 4k (default, for every reader) or 32k (smaller and faster)",
)
.among(&["4k", "32k"])
.encoding();

/// The level that was given, if it is one of 1 to `most`.
pub fn level(options: &CreateOptions, most: u8) -> Result<Option<u8>> {
    match options.number(LEVEL.name) {
        None => Ok(None),
        Some(level) => match u8::try_from(level) {
            Ok(level) if (1..=most).contains(&level) => Ok(Some(level)),
            _ => Err(Error::invalid(format!("'{}' must be a number from 1 to {most} here", LEVEL.name))),
        },
    }
}

/// Whether the full window is asked for.
pub fn wide(options: &CreateOptions) -> Result<bool> {
    match options.text(WINDOW.name) {
        None | Some("4k" | "4K" | "4096") => Ok(false),
        Some("32k" | "32K" | "32768") => Ok(true),
        Some(_) => Err(Error::invalid(format!("'{}' must be 4k or 32k", WINDOW.name))),
    }
}

/// The refusal of options that would have no effect.
pub fn refuse(options: &CreateOptions, why: &str) -> Result<()> {
    match options.given_encoding() {
        Some(name) => Err(Error::invalid(format!("'{name}' has no effect {why}"))),
        None => Ok(()),
    }
}
