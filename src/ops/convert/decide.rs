//! What a conversion is going to do: decided, and refused, before anything is touched.
//!
//! [`ConvertRequest`] is what the user typed. [`ConvertRequest::check`] refuses options that exclude each other, before
//! anything is opened; [`ConvertRequest::decide`] refuses what does not go with the open sources and the wanted
//! target. What is left is a [`Conversion`].

use std::ffi::OsString;
use std::sync::Arc;

use crate::block::driver::SnapshotKey;
use crate::block::error::Context;
use crate::block::{CreateOptions, Error, Node, OptionValue, Result};
use crate::crypto::{Digest, DigestKind};
use crate::ops::copy::CopyOptions;
use crate::ops::create::NewImage;
use crate::ops::snapshot;

/// What the user asks for, as typed.
#[derive(Debug, Default)]
pub struct ConvertRequest {
    /// How the bytes are copied.
    pub copy: CopyOptions,
    /// `-S` was typed.
    pub sparse_given: bool,
    /// Write to an image that is there.
    pub no_create: bool,
    /// The user's word that the image that is there reads as zeros.
    pub target_is_zero: bool,
    /// The target is named by a list of options.
    pub target_image_opts: bool,
    /// `-o` was typed.
    pub create_options_given: bool,
    /// The target's backing file.
    pub backing: Option<OsString>,
    /// Its format.
    pub backing_format: Option<String>,
    /// The internal snapshot that is converted.
    pub snapshot: Option<SnapshotKey>,
    /// Copy persistent bitmaps.
    pub bitmaps: bool,
    /// Leave out those that are inconsistent.
    pub skip_broken_bitmaps: bool,
    /// How it is made sure of what was copied.
    pub proof: Proof,
}

/// A conversion, decided.
pub struct Conversion {
    /// What is converted, one after the other.
    pub sources: Vec<Arc<Node>>,
    /// The image to make; none where one is there already.
    pub new: Option<NewImage>,
    /// How the bytes are copied.
    pub copy: CopyOptions,
    /// The target has a backing file whose content need not be copied.
    pub backed: bool,
    /// The user's word that an existing target reads as zeros.
    pub target_is_zero: bool,
    /// Persistent bitmaps are copied, those that are consistent.
    pub bitmaps: bool,
    /// Those that are not, by name.
    pub skipped_bitmaps: Vec<String>,
    /// How it is made sure of what was copied.
    pub proof: Proof,
}

/// How it is made sure of what was copied.
#[derive(Debug, Clone, Copy, Default)]
pub struct Proof {
    /// The digest that is made of what the sources hold.
    pub digest: Option<DigestKind>,
    /// What it has to be.
    pub expected: Option<Digest>,
    /// The target is read again, and has to hold what the sources did.
    pub verify: bool,
}

impl Proof {
    /// The kind of the digest that is made on the way.
    pub fn kind(&self) -> Option<DigestKind> {
        self.digest.or(self.verify.then_some(DigestKind::Blake3Tree))
    }
}

fn refuse(text: impl Into<String>) -> Result<()> {
    Err(Error::invalid(text))
}

impl ConvertRequest {
    /// Refuses options that exclude each other. Needs no image.
    pub fn check(&self) -> Result<()> {
        if self.skip_broken_bitmaps && !self.bitmaps {
            return refuse("Use of --skip-broken-bitmaps requires --bitmaps");
        }
        if self.copy.offload {
            if self.copy.compress {
                return refuse("Cannot enable copy offloading when -c is used");
            }
            if self.sparse_given {
                return refuse("Cannot enable copy offloading when -S is used");
            }
            if self.copy.salvage {
                return refuse("Cannot use copy offloading in salvaging mode");
            }
        }
        if self.target_image_opts && !self.no_create {
            return refuse("--target-image-opts requires use of -n flag");
        }
        if self.no_create && self.create_options_given {
            return refuse("-o has no effect when skipping image creation");
        }
        if self.target_is_zero && !self.no_create {
            return refuse("--target-is-zero requires use of -n flag");
        }
        Ok(())
    }

    /// The sources as they were at the snapshot that was asked for. Of several the first is meant.
    pub fn at_snapshot(&self, mut sources: Vec<Arc<Node>>) -> Result<Vec<Arc<Node>>> {
        let Some(key) = &self.snapshot else { return Ok(sources) };
        if let (SnapshotKey::IdOrName(_), true) = (key, sources.len() > 1) {
            return Err(Error::invalid("No support for concatenating multiple snapshot"));
        }
        if let Some(node) = sources.first_mut() {
            *node = at_snapshot(node, key).context("Failed to load snapshot")?;
        }
        Ok(sources)
    }

    /// Decides everything that the open sources and the wanted target leave to decide. `new` has the options that were
    /// typed; its size and backing file are filled in here.
    pub fn decide(self, sources: Vec<Arc<Node>>, mut new: Option<NewImage>) -> Result<Conversion> {
        if let Some(new) = &mut new {
            self.set_backing(new)?;
        }
        let backed = match &new {
            Some(new) => new.options.name("backing_file").is_some(),
            None => self.backing.is_some(),
        };
        if self.target_is_zero && backed {
            refuse("Cannot use --target-is-zero when the destination image has a backing file")?;
        }
        if backed && sources.len() > 1 {
            refuse("Having a backing file for the target makes no sense when concatenating multiple input images")?;
        }
        let mut copy = self.copy.clone();
        if let Some(new) = &mut new {
            if backed && new.options.text("backing_fmt").is_none() {
                refuse("Use of backing file requires explicit backing format")?;
            }
            if copy.compress {
                check_compression(new)?;
            }
        }
        let skipped_bitmaps = if self.bitmaps { self.broken_bitmaps(&sources)? } else { Vec::new() };
        if let Some(new) = &mut new {
            new.size = sources.iter().fold(0, |sum, node| sum.saturating_add(node.virtual_size()));
            new.options.set("size", OptionValue::Size(new.size))?;
            if let Some(create) = new.format.creating() {
                copy.effort = create.effort(&new.options, copy.compress).with_context(|| new.converting())?;
            }
        }
        Ok(Conversion {
            sources,
            new,
            copy,
            backed,
            target_is_zero: self.target_is_zero,
            bitmaps: self.bitmaps,
            skipped_bitmaps,
            proof: self.proof,
        })
    }

    fn set_backing(&self, new: &mut NewImage) -> Result<()> {
        let format = new.format.name();
        let named = [
            ("backing_file", self.backing.clone().map(OptionValue::Name), "Backing file"),
            ("backing_fmt", self.backing_format.clone().map(OptionValue::Text), "Backing file format"),
        ];
        for (key, value, what) in named {
            let Some(value) = value else { continue };
            let unsupported = |_| Error::unsupported(format!("{what} not supported for file format '{format}'"));
            new.options.set(key, value).map_err(unsupported)?;
        }
        Ok(())
    }

    /// The names of the inconsistent bitmaps, in the reference's order; an error where they may not be left out.
    fn broken_bitmaps(&self, sources: &[Arc<Node>]) -> Result<Vec<String>> {
        let [source] = sources else {
            return Err(Error::invalid("Copying bitmaps only possible with single source"));
        };
        let bitmaps = source.driver().bitmaps().ok_or_else(|| Error::unsupported("Source lacks bitmap support"))?;
        let broken = bitmaps.list().into_iter().rev().filter(|bitmap| !bitmap.consistent);
        let broken: Vec<String> = broken.map(|bitmap| bitmap.name).collect();
        match broken.first() {
            Some(name) if !self.skip_broken_bitmaps => {
                Err(Error::unsupported(format!("Cannot copy inconsistent bitmap '{name}'"))
                    .hint("Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"))
            }
            _ => Ok(broken),
        }
    }
}

fn check_compression(new: &NewImage) -> Result<()> {
    let preallocates = |options: &CreateOptions| options.text("preallocation").is_some_and(|mode| mode != "off");
    let Some(create) = new.format.creating().filter(|create| create.compresses()) else {
        return refuse("Compression not supported for this file format");
    };
    if create.encrypts(&new.options) {
        return refuse("Compression and encryption not supported at the same time");
    }
    if preallocates(&new.options) {
        return refuse("Compression and preallocation not supported at the same time");
    }
    Ok(())
}

/// The same image as it was at an internal snapshot, with the backing chain that it has now.
pub fn at_snapshot(node: &Arc<Node>, key: &SnapshotKey) -> Result<Arc<Node>> {
    let snapshots = node.driver().snapshots().ok_or_else(|| {
        let format = node.driver().format();
        Error::unsupported(format!(
            "Block format '{format}' used by device '' does not support temporarily loading internal snapshots"
        ))
    })?;
    let driver = snapshots.open(key).map_err(|error| snapshot::advising(error, node, key))?;
    Ok(Arc::new(Node::new(driver, node.backing().cloned(), node.name().to_owned())))
}
