//! The agent beside one PostgreSQL: observe, decide, act.
//!
//! * [`agent`]: the loop. It gathers an observation, asks [`craton_core::decide`], and does what it says.
//! * [`server`]: PostgreSQL as the agent holds it; [`parameters`]: its configuration; [`act`]: the long tasks;
//!   [`slots`]: upkeep; `cloning`: a copy from a member or out of the backup repository.
//! * [`lease`]: renewals, [`promises`]: what stands in for them, and the deadline; [`fencing`]: the process that enforces it without the agent.
//! * [`storage`]: the disks, watched from threads of their own.
//! * [`places`]: where the cluster's records are.
//! * [`state`]: what must survive the agent; [`store`]: the coordinator's texts, typed.
//! * `trust`: the agent's certificate; `enrol`: new parts, and new certificates for them.
//! * [`api`], [`views`], [`metrics`], [`hooks`], `live`: what others see. [`run()`] wires it all.

pub mod act;
mod adopting;
pub mod agent;
pub mod api;
mod catch_up;
pub mod clock;
mod cloning;
pub mod config;
mod enrol;
pub mod fencing;
mod handover;
pub mod hooks;
pub mod lease;
pub mod libraries;
mod live;
pub mod logical;
pub mod members;
pub mod metrics;
pub mod parameters;
pub mod places;
pub mod promises;
pub mod receivers;
mod run;
pub mod server;
pub mod slots;
pub mod state;
pub mod storage;
pub mod store;
mod trust;
pub mod views;
pub mod witness;

pub use api::coordinator::{MoveRequest, ProbeRequest, RebuildRequest};
pub use config::{AgentConfig, CloneConfig, FirstStart, Peer, Secrets, VoterWish, WatchdogMode};
pub use craton_coordinator::embedded::{RecoverError, Survey, stand_alone, survey};
pub use craton_coordinator::etcd;
pub use craton_coordinator::place::{Backend, Place};
pub use craton_coordinator::placed::moved_to;
pub use run::{AgentError, run, run_with};
