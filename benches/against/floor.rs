//! What cannot be gone below: the bytes of a plain conversion copied in memory, the codec of a compressed one on all cores.

use std::path::Path;
use std::time::Instant;

use vimg::codec::{deflate, zstd};
use vimg::storage::Storage;
use vimg::storage::file::{FileHow, HostFile};

/// Bytes of the disk that are encoded and decoded; the rest is reckoned.
const SAMPLE: usize = 64 << 20;
const UNIT: usize = 65536;

/// What of a job nobody can do without.
#[derive(Clone, Copy, PartialEq)]
pub enum Floor {
    Copy,
    Deflate(deflate::How),
    Inflate(deflate::How),
    Zstd,
    Unzstd,
}

/// The floor of those jobs that have one, by the end of their names.
const FLOORS: &[(&str, Floor)] = &[
    ("-c zlib", Floor::Deflate(deflate::How::QCOW)),
    ("-c zstd", Floor::Zstd),
    ("vmdk stream", Floor::Deflate(deflate::How::VMDK)),
    ("zlib→raw", Floor::Inflate(deflate::How::QCOW)),
    ("zstd→raw", Floor::Unzstd),
    ("stream→raw", Floor::Inflate(deflate::How::VMDK)),
    ("→raw", Floor::Copy),
    ("→qcow2", Floor::Copy),
    ("→vmdk", Floor::Copy),
    ("→vdi", Floor::Copy),
    ("→vpc", Floor::Copy),
    ("→qcow", Floor::Copy),
    ("dd bs=1M", Floor::Copy),
    ("dd to qcow2", Floor::Copy),
];

/// Measures floors, each once.
pub struct Floors {
    /// Bytes of data on the disk.
    data: u64,
    sample: Vec<u8>,
    known: Vec<(Floor, f64)>,
}

impl Floors {
    pub fn new(disk: &Path) -> Self {
        let file = HostFile::open(disk, &FileHow::default()).expect("the disk");
        let len = file.len().expect("its length");
        let (mut at, mut data, mut sample) = (0, 0, Vec::new());
        while at < len {
            let extent = file.extent(at, len - at).expect("an extent");
            if !extent.is_zero() {
                data += extent.len;
                let wanted = (SAMPLE - sample.len()).min(extent.len as usize);
                let start = sample.len();
                sample.resize(start + wanted, 0);
                file.read_at(at, &mut sample[start..]).expect("data");
            }
            at += extent.len;
        }
        Self { data, sample, known: Vec::new() }
    }

    /// In seconds, best of three.
    pub fn of(&mut self, job: &str) -> Option<f64> {
        let sparse = job.starts_with("16T") || job.starts_with("200");
        let (_, floor) = FLOORS.iter().find(|(end, _)| job.ends_with(end) && !sparse)?;
        if let Some((_, seconds)) = self.known.iter().find(|(known, _)| known == floor) {
            return Some(*seconds);
        }
        let best = (0..3).map(|_| self.measure(*floor)).fold(f64::MAX, f64::min);
        let seconds = best * self.data as f64 / self.sample.len() as f64;
        self.known.push((*floor, seconds));
        Some(seconds)
    }

    /// The sample once, on all cores.
    fn measure(&self, floor: Floor) -> f64 {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let units: Vec<&[u8]> = self.sample.chunks(UNIT).collect();
        let encoded: Vec<Vec<u8>> = match floor {
            Floor::Inflate(how) => units.iter().map(|unit| deflated(how, unit)).collect(),
            Floor::Unzstd => units.iter().map(|unit| zstandard(unit)).collect(),
            Floor::Copy | Floor::Deflate(_) | Floor::Zstd => Vec::new(),
        };
        let mut copy = vec![1; if floor == Floor::Copy { self.sample.len() } else { 0 }];
        let share = units.len().div_ceil(cores).max(1);
        let start = Instant::now();
        std::thread::scope(|scope| match floor {
            Floor::Copy => {
                for (from, to) in self.sample.chunks(share * UNIT).zip(copy.chunks_mut(share * UNIT)) {
                    scope.spawn(|| to.copy_from_slice(from));
                }
            }
            Floor::Deflate(_) | Floor::Zstd => {
                for units in units.chunks(share) {
                    scope.spawn(move || {
                        for unit in units {
                            std::hint::black_box(match floor {
                                Floor::Deflate(how) => deflated(how, unit),
                                _ => zstandard(unit),
                            });
                        }
                    });
                }
            }
            Floor::Inflate(_) | Floor::Unzstd => {
                for (units, encoded) in units.chunks(share).zip(encoded.chunks(share)) {
                    scope.spawn(move || {
                        let mut out = vec![0; UNIT];
                        for (unit, encoded) in units.iter().zip(encoded) {
                            // An empty one did not get smaller: it is stored as it is.
                            match floor {
                                _ if encoded.is_empty() => out[..unit.len()].copy_from_slice(unit),
                                Floor::Inflate(how) => {
                                    deflate::decode(how.stream.wrap(), encoded, &mut out[..unit.len()]).expect("decode")
                                }
                                _ => zstd::decode(encoded, &mut out[..unit.len()]).expect("decode"),
                            }
                        }
                    });
                }
            }
        });
        start.elapsed().as_secs_f64()
    }
}

fn deflated(how: deflate::How, unit: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let smaller = deflate::encode(how, unit, &mut out, UNIT).expect("encode");
    if smaller { out } else { Vec::new() }
}

fn zstandard(unit: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let smaller = zstd::encode(3, unit, &mut out, UNIT).expect("encode");
    if smaller { out } else { Vec::new() }
}
