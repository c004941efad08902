//! The table of drivers: what vimg can open and make, and nothing else knows it.

use crate::block::Drivers;
use crate::filters::FILTERS;
use crate::formats::FORMATS;
use crate::protocols::PROTOCOLS;

/// Every driver there is.
pub const DRIVERS: &Drivers = &Drivers { formats: FORMATS, protocols: PROTOCOLS, filters: FILTERS };
