//! The agent beside one PostgreSQL: observe, decide, act.

pub mod config;
pub mod state;
pub mod store;

pub use config::{AgentConfig, Peer, Secrets};
