//! Ciphers alone, beside OpenSSL's.

use std::process::{Command, Stdio};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use vimg::crypto::{CipherAlgorithm, CipherMode, CipherSpec, IvGenerator, SectorCipher};

/// Ciphers on one core, in GB/s of time on the CPU, and what OpenSSL makes of the same, which counts that time too.
pub fn ciphers() {
    println!("\n{:<24} {:>8} {:>8} {:>8}", "cipher, GB/s a core", "encrypt", "decrypt", "openssl");
    for (name, mode) in [("aes-256", "xts"), ("aes-128", "xts"), ("aes-256", "cbc"), ("aes-128", "cbc")] {
        let cipher = CipherAlgorithm::parse(name).expect("a cipher");
        let mode_is = CipherMode::parse(mode).expect("a mode");
        let spec = CipherSpec { cipher, mode: mode_is, iv: IvGenerator::Plain64 };
        let key: Vec<u8> = (1..=64).collect();
        let cipher = SectorCipher::new(spec, &key[..spec.key_bytes()]).expect("a key");
        let speed = |act: &dyn Fn(u64, &mut [u8])| {
            let mut sectors = vec![7; 1 << 20];
            let start = thread_seconds();
            (0..2000).for_each(|n| act(n * 2048, &mut sectors));
            2000.0 * sectors.len() as f64 / (thread_seconds() - start) / 1e9
        };
        let encrypt = speed(&|first, sectors| cipher.encrypt(first, sectors).expect("whole sectors"));
        let decrypt = speed(&|first, sectors| cipher.decrypt(first, sectors).expect("whole sectors"));
        let theirs = openssl(&format!("{name}-{mode}")).map_or_else(|| "-".to_owned(), |speed| format!("{speed:.2}"));
        println!("{:<24} {encrypt:>8.2} {decrypt:>8.2} {theirs:>8}", format!("{name}-{mode}"));
    }
}

/// This thread's time on the CPU.
fn thread_seconds() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock");
    Duration::from(time).as_secs_f64()
}

/// What `openssl speed` says of a cipher in pieces of 16 KiB, in GB/s.
fn openssl(cipher: &str) -> Option<f64> {
    let args = ["speed", "-mr", "-seconds", "2", "-bytes", "16384", "-evp", cipher];
    let out = Command::new("openssl").args(args).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let last = text.lines().rfind(|line| line.starts_with("+F:"))?.rsplit(':').next()?.to_owned();
    Some(last.parse::<f64>().ok()? / 1e9)
}
