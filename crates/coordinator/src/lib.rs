//! The small linearizable store with leases that a cluster agrees through.
//!
//! [`api::Coordinator`] is the trait; `embedded` (Raft for decisions, diskless promises for the lease) and
//! `model` (in memory, for tests and the simulator) implement it; `conformance` is the suite both pass.

pub mod api;
