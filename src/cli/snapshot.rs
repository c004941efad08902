//! `snapshot`: lists an image's internal snapshots, takes, applies or deletes one.

use std::ffi::OsString;

use clap::ArgAction;
use serde_json::{Value, json};

use super::common::Common;
use super::exit::Exit;
use super::interrupt::Interrupt;
use super::output::ResultArgs;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, human};
use crate::block::{OpenHow, Purpose};
use crate::ops::info;
use crate::ops::snapshot::{self, SnapshotChange};

/// The options.
#[derive(Debug, clap::Args)]
pub struct SnapshotArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    result: ResultArgs,
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// allow other writers: do not lock the image (with -l)
    #[arg(short = 'U', long)]
    force_share: bool,
    /// list the snapshots, which is done if nothing else is asked for
    #[arg(short, long, action = ArgAction::Count)]
    list: u8,
    /// take a snapshot of that name
    #[arg(short, long, value_name = "SNAPSHOT", action = ArgAction::Append)]
    create: Vec<String>,
    /// give the disk the content of the snapshot with that id or name
    #[arg(short, long, value_name = "SNAPSHOT", action = ArgAction::Append)]
    apply: Vec<String>,
    /// delete the first snapshot of that name
    #[arg(short, long, value_name = "SNAPSHOT", action = ArgAction::Append)]
    delete: Vec<String>,
    /// image with the snapshots
    #[arg(value_name = "FILENAME")]
    operands: Vec<OsString>,
}

impl Subcommand for SnapshotArgs {
    const NAME: &'static str = "snapshot";
    const ABOUT: &'static str = "List or manipulate snapshots within image";
    const USAGE: &'static [&'static str] =
        &["[-f FMT | --image-opts] [-l | -a|-c|-d SNAPSHOT]", "[-U] [--object OBJDEF] [-q] FILENAME"];
    const EXAMPLE: &'static str = "vimg snapshot -c before-upgrade disk.qcow2";

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let change = self.change()?;
        let Some(secrets) = self.common.define(program)? else { return Ok(Exit::Success) };
        let [name] = &self.operands[..] else {
            return Err(Complaint::usage("Expecting one image file name").into());
        };
        let source =
            ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let (image, how) = source.image(program, name)?;
        let interrupt = change.is_some().then(Interrupt::catch);
        let purpose = if change.is_some() { Purpose::Write } else { how.purpose };
        let opener = program.opener(&secrets);
        let node = opener.open(&image, &OpenHow { purpose, ..how });
        program.notices(&opener);
        let opened = node?;
        program.works_on(opened.name());
        let node = opened.beneath_filters();
        if let (Some(change), Some(interrupt)) = (change, interrupt) {
            interrupt.during(|| snapshot::change(&node, &change))?;
            let (done, name) = match &change {
                SnapshotChange::Create(name) => ("create", name),
                SnapshotChange::Apply(name) => ("apply", name),
                SnapshotChange::Delete(name) => ("delete", name),
            };
            program.result(json!({"filename": node.name(), done: name}));
            return Ok(Exit::Success);
        }
        let snapshots = snapshot::list(&node)?;
        let list: Vec<Value> = snapshots.iter().map(info::snapshot_json).collect();
        program.result(json!({"filename": node.name(), "snapshots": list}));
        if !snapshots.is_empty() && !program.tells_results() {
            program.println("Snapshot list:");
            program.println(&human::snapshot_head());
            snapshots.iter().for_each(|snapshot| program.println(&human::snapshot_row(snapshot)));
        }
        Ok(Exit::Success)
    }
}

impl SnapshotArgs {
    /// What is changed; nothing where they are listed. One thing at a time.
    fn change(&self) -> Result<Option<SnapshotChange>, Complaint> {
        let create = self.create.iter().cloned().map(SnapshotChange::Create);
        let apply = self.apply.iter().cloned().map(SnapshotChange::Apply);
        let mut changes = create.chain(apply).chain(self.delete.iter().cloned().map(SnapshotChange::Delete));
        let first = changes.next();
        let all = usize::from(self.list) + usize::from(first.is_some()) + changes.count();
        if all > 1 {
            return Err(Complaint::usage("Cannot mix '-l', '-a', '-c', '-d'"));
        }
        Ok(first)
    }
}
