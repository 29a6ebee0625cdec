//! Keeps the fence process alive and tells it whom to guard and until when.

use std::sync::Arc;

use craton_core::BootTime;
use craton_pg::Postmaster;

use crate::config::AgentConfig;

/// The fence, as the agent holds it.
pub struct Fencing {}

impl Fencing {
    /// Starts.
    pub fn start(_config: &AgentConfig) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {}))
    }
    /// x
    pub fn guard(&self, _process: &Postmaster) {}
    /// x
    pub fn deadline(&self, _until: Option<BootTime>) {}
    /// x
    pub fn rest(&self) {}
    /// x
    pub fn end(&self) {}
    /// x
    pub async fn keep_alive(self: Arc<Self>) {}
}
