//! The agent beside one PostgreSQL: observe, decide, act.
//!
//! * [`agent`]: the loop. It gathers an observation, asks [`craton_core::decide`], and does what it says.
//! * [`server`]: PostgreSQL as the agent holds it; [`parameters`]: its configuration; [`act`]: the long tasks;
//!   [`slots`]: upkeep.
//! * [`lease`]: renewals and the deadline; [`fencing`]: the process that enforces it without the agent.
//! * [`storage`]: the disks, watched from threads of their own.
//! * [`state`]: what must survive the agent; [`store`]: the coordinator's texts, typed.
//! * [`api`], [`views`], [`metrics`], [`hooks`]: what others see. [`run()`] wires it all.

pub mod act;
pub mod agent;
pub mod api;
pub mod clock;
pub mod config;
pub mod fencing;
pub mod hooks;
pub mod lease;
pub mod metrics;
pub mod parameters;
mod run;
pub mod server;
pub mod slots;
pub mod state;
pub mod storage;
pub mod store;
pub mod views;

pub use config::{AgentConfig, Peer, Secrets, WatchdogMode};
pub use run::{AgentError, run, run_with};
