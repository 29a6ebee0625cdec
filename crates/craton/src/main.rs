//! The craton binary: one file per sub-command.
fn main() {}
