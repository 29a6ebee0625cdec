//! Members as hosts of their own: network namespaces, real processes, real faults, and clients whose every write
//! is accounted for. Shared by `tests/hosts.rs` and `benches/failover`.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::manual_assert,
    clippy::indexing_slicing,
    clippy::format_push_string,
    clippy::print_stderr,
    reason = "each user takes a part of it; a test may fail at any line"
)]

pub mod cable;
pub mod craton;
pub mod fault;
pub mod net;
pub mod system;
pub mod trial;
