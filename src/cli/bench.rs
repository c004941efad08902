//! `bench`: measures how long so many reads or writes of an image take, so many of them at once.

use std::ffi::OsString;
use std::num::NonZero;

use super::common::Common;
use super::exit::Exit;
use super::source::ImageArgs;
use super::{Complaint, Program, Subcommand, size};
use crate::block::error::Context;
use crate::block::{OpenHow, Purpose};
use crate::ops::bench::{self, Workload, Writes};
use crate::storage::CacheMode;

/// The options.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    common: Common,
    /// format of the image, detected if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options key=value,...
    #[arg(long)]
    image_opts: bool,
    /// how the image is cached: none, writeback, unsafe, directsync, writethrough
    ///
    /// default: writeback
    #[arg(short = 't', long, value_name = "CACHE", value_parser = cache)]
    cache: Option<CacheMode>,
    /// number of requests, 75000 if not given
    #[arg(short, long, value_name = "COUNT", value_parser = count)]
    count: Option<u64>,
    /// bytes of each request, 4k if not given
    #[arg(short = 's', long, value_name = "BUFFER_SIZE", value_parser = buffer_size)]
    buffer_size: Option<u64>,
    /// number of requests in flight, 64 if not given
    #[arg(short, long, value_name = "DEPTH", value_parser = depth)]
    depth: Option<u64>,
    /// where the first request starts
    ///
    /// default: 0
    #[arg(short, long, value_name = "OFFSET", value_parser = offset)]
    offset: Option<u64>,
    /// how far the next request is, the size of one if not given
    #[arg(short = 'S', long, value_name = "STEP_SIZE", value_parser = step_size)]
    step_size: Option<u64>,
    /// how the kernel is to be asked: threads, native, io_uring. Checked; it is always threads that ask
    ///
    /// default: threads
    #[arg(short = 'i', long, value_name = "AIO", value_parser = aio)]
    aio: Option<Aio>,
    /// the same as --aio native
    #[arg(short, long)]
    native: bool,
    /// write, do not read
    #[arg(short, long)]
    write: bool,
    /// the byte that is written, 0 if not given
    #[arg(long, value_name = "PATTERN", value_parser = pattern)]
    pattern: Option<u64>,
    /// flush each time so many writes are done
    ///
    /// default: no flush
    #[arg(long, value_name = "FLUSH_INTERVAL", value_parser = flush_interval)]
    flush_interval: Option<u64>,
    /// flush while writes are in flight, do not wait for them
    #[arg(long)]
    no_drain: bool,
    /// allow other writers: do not lock the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// image to measure
    #[arg(value_name = "FILENAME")]
    operands: Vec<OsString>,
}

/// How the kernel is to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Aio {
    Threads,
    Native,
    IoUring,
}

fn aio(text: &str) -> Result<Aio, Complaint> {
    match text {
        "threads" => Ok(Aio::Threads),
        "native" => Ok(Aio::Native),
        "io_uring" => Ok(Aio::IoUring),
        _ => Err(Complaint::value(format!("Invalid aio option: {text}"))),
    }
}

fn cache(text: &str) -> Result<CacheMode, Complaint> {
    CacheMode::parse(text).ok_or_else(|| Complaint::value("Invalid cache mode"))
}

const MOST: u64 = i32::MAX as u64;

fn count(text: &str) -> Result<u64, Complaint> {
    size::number_within("request count", text, 1..=MOST)
}

fn depth(text: &str) -> Result<u64, Complaint> {
    size::number_within("queue depth", text, 1..=MOST)
}

fn pattern(text: &str) -> Result<u64, Complaint> {
    size::number_within("pattern byte", text, 0..=u64::from(u8::MAX))
}

fn flush_interval(text: &str) -> Result<u64, Complaint> {
    size::number_within("flush interval", text, 0..=MOST)
}

fn buffer_size(text: &str) -> Result<u64, Complaint> {
    size::size_within("buffer size", text, 1..=MOST)
}

fn step_size(text: &str) -> Result<u64, Complaint> {
    size::size_within("step size", text, 0..=MOST)
}

fn offset(text: &str) -> Result<u64, Complaint> {
    size::size("offset", text)
}

impl Subcommand for BenchArgs {
    const NAME: &'static str = "bench";
    const ABOUT: &'static str = "Run simple image benchmark";
    const USAGE: &'static [&'static str] = &[
        "[-f FMT | --image-opts] [-t CACHE] [-c COUNT] [-d DEPTH]",
        "[-o OFFSET] [-s BUFFER_SIZE] [-S STEP_SIZE] [-i AIO] [-n]",
        "[-w [--pattern PATTERN] [--flush-interval INTERVAL [--no-drain]]]",
        "[-U] [--object OBJDEF] [-q] FILENAME",
    ];
    const EXAMPLE: &'static str = "vimg bench -c 1000 -d 16 -s 64k disk.qcow2";

    fn run(self, program: &Program) -> anyhow::Result<Exit> {
        let [name] = &self.operands[..] else {
            return Err(Complaint::usage("Expecting one image file name").into());
        };
        let workload = self.workload()?;
        let source =
            ImageArgs { format: self.format.as_deref(), image_opts: self.image_opts, force_share: self.force_share };
        source.check()?;
        let Some(secrets) = self.common.define(program)? else { return Ok(Exit::Success) };
        let (image, how) = source.image(program, name)?;
        let opener = program.opener(&secrets);
        let purpose = if self.write { Purpose::Write } else { how.purpose };
        let native_aio = self.native || self.aio == Some(Aio::Native);
        let node = opener.open(&image, &OpenHow { purpose, cache: self.cache.unwrap_or_default(), native_aio, ..how });
        program.notices(&opener);
        let node = node?;
        announce(program, &workload);
        let took = bench::run(&node, &workload).context("Failed request")?;
        program.println(&format!("Run completed in {:.3} seconds.", took.as_secs_f64()));
        node.driver().close()?;
        Ok(Exit::Success)
    }
}

impl BenchArgs {
    fn workload(&self) -> Result<Workload, Complaint> {
        let len = self.buffer_size.unwrap_or(4096);
        let depth = self.depth.unwrap_or(64);
        let flush_every = self.flush_interval.and_then(NonZero::new);
        if flush_every.is_some() && !self.write {
            return Err(Complaint::value("--flush-interval is only available in write tests"));
        }
        if flush_every.is_some_and(|every| every.get() < depth) {
            return Err(Complaint::value("Flush interval can't be smaller than depth"));
        }
        let pattern = u8::try_from(self.pattern.unwrap_or(0)).unwrap_or(u8::MAX);
        let writes = Writes { pattern, flush_every, drain: !self.no_drain };
        Ok(Workload {
            write: self.write.then_some(writes),
            count: self.count.unwrap_or(75_000),
            depth,
            len,
            offset: self.offset.unwrap_or(0),
            step: self.step_size.filter(|step| *step > 0).unwrap_or(len),
        })
    }
}

/// Says what is about to be done.
fn announce(program: &Program, workload: &Workload) {
    let Workload { count, len, depth, offset, step, .. } = workload;
    let kind = if workload.write.is_some() { "write" } else { "read" };
    program.println(&format!(
        "Sending {count} {kind} requests, {len} bytes each, {depth} in parallel (starting at offset {offset}, step size {step})"
    ));
    if let Some(every) = workload.write.and_then(|writes| writes.flush_every) {
        program.println(&format!("Sending flush every {every} requests"));
    }
}
