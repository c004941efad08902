//! Bytes in, bytes out: compression. No files, no formats.
