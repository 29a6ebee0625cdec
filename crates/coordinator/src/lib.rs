//! The small linearizable store with leases that a cluster agrees through.
//!
//! # Layout
//! * [`api`]: [`api::Coordinator`], the trait, and the plain data it speaks.
//! * [`kv`]: the state machine; [`promise`]: one voter's part in the lease. Both pure.
//! * [`raft`]: the consensus core, pure. [`embedded`]: the backend inside the agents.
//! * [`etcd`]: the backend in an etcd that is there already. [`place`]: which of the two, and where;
//!   [`placed`]: records that move between them while the cluster runs.
//! * [`conformance`]: the suite that all backends pass.
//! * [`model`]: all of it in memory, for tests and the simulator.

pub mod api;
pub mod clock;
pub mod conformance;
#[cfg(test)]
mod contest;
pub mod embedded;
pub mod etcd;
pub mod kv;
pub mod model;
pub mod place;
pub mod placed;
pub mod promise;
pub mod raft;
