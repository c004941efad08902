//! vimg: virtual-machine disk images, created, inspected, checked, converted and resized.
//!
//! # The house
//!
//! Strata; arrows only point down.
//!
//! ```text
//! cli       what the user typed and what the user sees: clap, anyhow, text, JSON, exit codes, progress
//! ops       what is done: convert, check, commit, rebase, ..., and copy, the engine that moves guest data; no printing, no exit
//! drivers   the table of drivers
//! formats   raw, qcow2, vmdk, ...: each knows its own on-disk layout and nothing of the others
//! protocols file, host_device, nbd, http, ...: names to bytes
//! filters   blkdebug, throttle, quorum, ...: between a format and its file, or over an image
//! block     one vocabulary for every image: BlockDriver, Format, Protocol, Filter, Extent, Node, Opener, options, error
//! codec     deflate, zstd, bzip2, ...: bytes in, bytes out; no files
//! crypto    ciphers, hashes, keys under passphrases: likewise
//! storage   bytes on the host by position: file, block device, memory; sparse files and preallocation
//! ```
//!
//! [`block`] names no driver: the table, [`drivers::DRIVERS`], is handed to the [`block::Opener`]. Help, `-o help`,
//! names, create and open read it and nothing else. So to add a driver is one folder or file, its `mod` line, and one
//! line of [`formats::FORMATS`], [`protocols::PROTOCOLS`] or [`filters::FILTERS`]. "The reference" is qemu-img 10.0.2,
//! in all comments.
//!
//! # Where a thing goes
//!
//! | what | where | and one line |
//! |---|---|---|
//! | a format `foo` that can be read | `formats/foo.rs`: a [`Format`](block::Format) and its [`BlockDriver`](block::BlockDriver); `formats/bochs/` is a small one to begin from | in [`formats::FORMATS`] |
//! | a protocol `bar:` | `protocols/bar.rs`: a [`Protocol`](block::protocol::Protocol) and the [`Storage`](storage::Storage) that it opens | in [`protocols::PROTOCOLS`] |
//! | a filter | `filters/baz.rs`: a [`Filter`](block::filter::Filter) and its storage over another one | in [`filters::FILTERS`] |
//! | `check` of a format | `formats/foo/check.rs`: a [`Check`](block::Check) | the driver's [`checking`](block::BlockDriver::checking) |
//! | another ability: writing, resizing, snapshots | likewise, a file by its name | the driver's accessor of that name |
//! | encryption of a format | options and keys: `formats/encryption.rs`, and `formats/sector_cipher.rs`, which makes the cipher; `formats/qcow/` does no more than that | the driver's [`cipher`](block::BlockDriver::cipher); [`encrypts`](block::Create::encrypts) and [`open_options`](block::Create::open_options) for new images |
//! | a cipher of LUKS | the crate that computes it | in the table of `crypto/spec.rs` |
//! | an option `-o` of a new image | `formats/foo/create.rs`: where it is read from the [`CreateOptions`](block::CreateOptions) | in the format's table of [`OptionSpec`](block::OptionSpec)s |
//! | an option of a subcommand | a field of its arguments | in the table of `cli/arguments.rs`, if its value is a file, a format or the like |
//! | a subcommand | `cli/qux.rs`: its arguments and what is done with them | in [`cli::SUBCOMMANDS`] |
//!
//! What can be seen from outside has a line in a table of README.md as well: formats, protocols and subcommands under
//! "Options", and what differs from the reference under "Differences", with its test in `tests/both/deviations.case`.
//!
//! # Map, then act
//!
//! A driver ([`block::BlockDriver`]) does not read or write guest data. It answers *where* data is
//! ([`extent`](block::BlockDriver::extent)) and *where* new data may go ([`place`](block::Write::place), then, once
//! the data is there, [`publish`](block::Write::publish), which has the tables say so). The walk down a backing chain,
//! the decoding of compressed units and the fill of a partly written cluster are each written once, in [`block::node`]
//! and [`block::io`], where a layer's cipher is applied too. No lock is held while guest data moves, and the order of
//! the calls to `place` alone decides where data lies: that is why a conversion gives the same bytes on any number of
//! threads.
//!
//! # An example
//!
//! How much of an image is data, and what is in its first sector:
//!
//! ```
//! use vimg::block::{Allowed, GuestOffset, ImageRef, NO_SECRETS, OpenHow, Opener, Policy, io::Scratch};
//! use vimg::drivers::DRIVERS;
//!
//! # let folder = std::env::temp_dir().join(format!("vimg-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder)?;
//! # let path = folder.join("disk.img");
//! # std::fs::write(&path, vec![7u8; 4096])?;
//! let opener = Opener::new(DRIVERS, Policy::Refuse(Allowed::default()), &NO_SECRETS);
//! let node = opener.open(&ImageRef::name(&path), &OpenHow::default())?;
//!
//! let (mut at, mut data) = (0, 0);
//! while at < node.virtual_size() {
//!     let mapping = node.map(GuestOffset(at), u64::MAX, usize::MAX)?;
//!     if !mapping.is_zero() {
//!         data += mapping.len;
//!     }
//!     at += mapping.len;
//! }
//! let mut sector = [0; 512];
//! node.read(GuestOffset(0), &mut sector, &mut Scratch::default())?;
//! # assert_eq!((data, sector), (4096, [7; 512]));
//! # std::fs::remove_dir_all(&folder)?;
//! println!("{data} bytes of data in {}", node.name());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// A line that cannot be written would be a panic: `cli::program` writes them all.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod block;
pub mod cli;
pub mod codec;
pub mod crypto;
pub mod drivers;
pub mod filters;
pub mod formats;
pub mod ops;
pub mod protocols;
#[allow(unsafe_code)]
pub mod storage;
