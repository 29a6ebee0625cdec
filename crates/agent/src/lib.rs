//! The agent beside one PostgreSQL: observe, decide, act.
//!
//! * [`agent`]: the loop. It gathers an observation, asks [`craton_core::decide`], and does what it says.
//! * [`server`]: PostgreSQL as the agent holds it; [`act`]: the long tasks; [`slots`]: upkeep.
//! * `cloning`: a copy from a member or out of the backup repository.
//! * [`lease`]: renewals and the deadline; [`fencing`]: the process that enforces it without the agent.
//! * [`state`]: what must survive the agent; [`store`]: the coordinator's texts, typed.
//! * [`api`], [`views`], [`metrics`]: what others see. [`run()`] wires it all.

pub mod act;
pub mod agent;
pub mod api;
pub mod clock;
mod cloning;
pub mod config;
pub mod fencing;
pub mod lease;
pub mod metrics;
mod run;
pub mod server;
pub mod slots;
pub mod state;
pub mod store;
pub mod views;

pub use config::{AgentConfig, CloneConfig, Peer, Secrets};
pub use run::{AgentError, run, run_with};
