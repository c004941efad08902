//! `--reproducible`, `--uuid`, `--cid`: the ids and times of a new image.

use super::{Complaint, help};
use crate::ops::ids::IdChoice;

/// The options.
#[derive(Debug, clap::Args)]
pub struct IdArgs {
    /// the same bytes at every run: ids follow from the last part of the name and from the size, the time is SOURCE_DATE_EPOCH or 1970
    #[arg(long, help_heading = help::OWN)]
    reproducible: bool,
    /// the UUID of the new image (vdi, vpc, vhdx, luks)
    ///
    /// default: a random one
    #[arg(long, value_name = "UUID", value_parser = uuid, help_heading = help::OWN)]
    uuid: Option<u128>,
    /// the content id of the new image (vmdk), eight hexadecimal digits
    ///
    /// default: a random one
    #[arg(long, value_name = "CID", value_parser = cid, help_heading = help::OWN)]
    cid: Option<u32>,
}

fn uuid(text: &str) -> Result<u128, Complaint> {
    let lengths = text.split('-').map(str::len);
    let digits = text.replace('-', "");
    let formed = lengths.eq([8, 4, 4, 4, 12]) || text.len() == 32;
    let number = Some(&digits).filter(|digits| formed && digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let number = number.and_then(|digits| u128::from_str_radix(digits, 16).ok());
    match number {
        Some(0) => Err(Complaint::value("a UUID of zeros alone is none: an image could not be known by it")),
        Some(number) => Ok(number),
        None => Err(Complaint::value(format!("'{text}' is no UUID"))),
    }
}

/// What a vmdk without a backing file has for the content id of one.
const NO_PARENT: u32 = u32::MAX;

fn cid(text: &str) -> Result<u32, Complaint> {
    let bad = || Complaint::value(format!("'{text}' is no content id: it is eight hexadecimal digits"));
    let formed = text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = u32::from_str_radix(text, 16).ok().filter(|_| formed).ok_or_else(bad)?;
    match number {
        NO_PARENT => Err(Complaint::value(format!("the content id '{text}' means that there is no parent"))),
        number => Ok(number),
    }
}

impl IdArgs {
    /// What is said of the new image's ids.
    pub fn choice(&self) -> IdChoice {
        let Self { reproducible, uuid, cid } = *self;
        IdChoice { reproducible, uuid: uuid.map(u128::to_be_bytes), cid }
    }

    /// Refuses what cannot have an effect.
    pub fn check(&self, no_create: bool, reorder: bool) -> Result<(), Complaint> {
        if no_create && self.choice() != IdChoice::default() {
            return Err(Complaint::value(
                "--reproducible, --uuid and --cid have no effect when skipping image creation",
            ));
        }
        if self.reproducible && reorder {
            return Err(Complaint::value("--reproducible and out-of-order writes (-W) exclude each other"));
        }
        Ok(())
    }
}
