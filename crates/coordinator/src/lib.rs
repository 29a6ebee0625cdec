//! The small linearizable store with leases that a cluster agrees through.
//!
//! # Layout
//! * [`api`]: [`api::Coordinator`], the trait, and the plain data it speaks.
//! * [`kv`]: the state machine; [`promise`]: one voter's part in the lease. Both pure.
//! * [`raft`]: the consensus core, pure. [`embedded`]: the backend inside the agents.
//! * [`conformance`]: the suite that all backends pass.
//! * [`model`]: all of it in memory, for tests and the simulator.

pub mod api;
pub mod clock;
pub mod conformance;
pub mod embedded;
pub mod kv;
pub mod model;
pub mod promise;
pub mod raft;
