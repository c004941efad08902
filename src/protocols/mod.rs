//! Ways to bytes by name. A protocol is one file (or folder) here with its `Protocol` and, unless it gives a file of the
//! host, its `Storage` (as in `null`); its `mod` line; and one line of [`PROTOCOLS`].

mod az;
mod file;
mod ftp;
mod gs;
mod host_device;
mod http;
mod nbd;
mod null;
mod ranged;
mod s3;
mod server;
mod sheepdog;
mod store;
mod tftp;
mod url;
mod vvfat;

use crate::block::protocol::Protocol;

/// Every protocol there is; file last, because it takes any plain name.
pub const PROTOCOLS: &[&dyn Protocol] = &[
    &host_device::DEVICE, //
    &host_device::CDROM,
    &http::HTTP,
    &http::HTTPS,
    &ftp::FTP,
    &ftp::FTPS,
    &tftp::TFTP,
    &s3::S3,
    &gs::GS,
    &az::AZ,
    &nbd::Nbd,
    &sheepdog::Sheepdog,
    &null::CO,
    &null::AIO,
    &vvfat::Vvfat,
    &file::File,
];
