//! The small linearizable store with leases that a cluster agrees through.
//!
//! # Layout
//! * [`api`]: [`api::Coordinator`], the trait, and the plain data it speaks.
//! * [`kv`]: the state machine; [`promise`]: one voter's part in the lease. Both pure.
//! * [`model`]: all of it in memory, for tests and the simulator.

pub mod api;
pub mod clock;
pub mod kv;
pub mod model;
pub mod promise;
pub mod raft;
