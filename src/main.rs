//! The program: see [`vimg::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    vimg::cli::main(std::env::args_os().collect())
}
