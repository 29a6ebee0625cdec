//! The craton binary. Everything is in the library, so that tests reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    craton::run(&std::env::args_os().collect::<Vec<_>>())
}
